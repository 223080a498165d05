"""What is printed: plain lines without a terminal, a live line with one, nothing from other processes."""

from __future__ import annotations

import io
import itertools
import os
import pty
import re
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from pipeline.monitor import Monitor, Waits
from train.logs.console import Console, Throughput, ThroughputMeter, duration
from train.evaluate.metrics import Score

VALIDATION = Score(images=1000, top1_errors=456, top5_errors=200, loss=1.0, classes=10)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_throughput_by_hand() -> None:
    clock, monitor = iter([0.0, 1.0, 3.0]), Mock(waits=Waits())
    throughput = ThroughputMeter(monitor, now=lambda: next(clock))
    monitor.waits = Waits(0.5, read=0.1, decode=0.4, batches=1)
    throughput.add(10)
    assert throughput.recent() == Throughput(10.0, 0.5, {"read": 0.1, "decode": 0.4, "normalize": 0.0, "copy": 0.0})
    monitor.waits = Waits(0.6, read=0.2, decode=0.4, batches=2)
    throughput.add(20)
    overall = throughput.overall()
    assert throughput.recent() == overall and throughput.seconds == 3.0 and overall.images_per_s == 10.0
    assert overall.waited == pytest.approx(0.2) and overall.causes["decode"] == pytest.approx(0.4 / 3)
    assert str(overall) == "10.0 img/s  data wait 20.0% (decode)"


def test_hardly_any_waiting_has_no_cause() -> None:
    waits = {"read": 0.004, "decode": 0.0, "normalize": 0.0, "copy": 0.0}
    assert str(Throughput(1234.5, 0.004, waits)) == "1234 img/s  data wait 0.4%"


def test_recent_throughput_forgets_the_start() -> None:
    now = [0.0]
    throughput = ThroughputMeter(Monitor(), now=lambda: now[0])
    for step in range(60):
        now[0] += 10.0 if step < 10 else 1.0
        throughput.add(8)
    assert throughput.recent().images_per_s == 8.0 and throughput.overall().images_per_s < 4


def steps(console: Console, count: int) -> None:
    clock = itertools.count()
    throughput = ThroughputMeter(Monitor(), now=lambda: float(next(clock)))
    for step in range(count):
        throughput.add(8)
        console.step("3/90", 700 + step, step + 1, count, 3.2, 0.5, throughput.recent(), 3723)


def row(console: Console, validation: Score = VALIDATION) -> None:
    console.epoch("3/90", 3.21, 0.5, validation, 0.01, Throughput(34.5, 0.03, {}))


def test_plain_lines_come_every_so_often_and_rows_under_one_header() -> None:
    stream = io.StringIO()
    console = Console(True, 1e9, stream)
    steps(console, 50)
    row(console)
    row(console)
    console.warn("odd")
    console.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5 and "\x1b" not in stream.getvalue()
    assert lines[0].startswith("epoch 3/90  step 700 (1/50)  train loss 3.2000  train err@1 50.0%  ")
    assert lines[0].endswith(" img/s  data wait 0.0%  ETA 1:02:03")
    assert lines[1] == "  epoch  train loss  train err@1  val loss  val err@1  val err@5       lr    img/s  data wait"
    assert lines[2] == "   3/90      3.2100       50.00%    1.0000     45.60%     20.00%     0.01     34.5       3.0%"
    assert lines[4] == "WARNING: odd"
    often = io.StringIO()
    steps(Console(True, 1e-9, often), 5)
    assert len(often.getvalue().splitlines()) == 5


def test_tests_tell_their_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("train.logs.console.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    console = Console(True, 10, stream)
    told = console.testing("validation")
    told(10, 100)
    now[0] += 11
    told(20, 100)
    assert stream.getvalue() == "validation  20/100 images\n"


@pytest.mark.parametrize("columns, beside", [
    (160, "1/5  loss 3.2000  err@1 50.0%  "), (80, " 20% loss 3.200 err@1 50.0% "), (40, " 20% loss 3.200 ETA 1:02:03")])
def test_a_terminal_has_a_progress_bar_that_fits(columns: int, beside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    console = Console(True, 1e9, stream)
    console.print("[not markup]")
    steps(console, 5)
    console.close()
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()))
    bars = [line.rstrip() for line in lines if line.startswith("epoch 3/90")]
    assert "[not markup]" in lines and bars and max(map(len, lines)) <= columns
    assert beside in bars[0] and (columns < 80 or bars[0].endswith("ETA 1:02:03") and "wait 0.0%" in bars[0])


def test_the_table_fits_80_columns_and_hides_the_five_best_of_few_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    console = Console(True, 1e9, stream)
    row(console)
    assert stream.getvalue().splitlines() == [
        "           train    train      val      val      val                       data",
        "  epoch     loss    err@1     loss    err@1    err@5       lr    img/s     wait",
        "   3/90   3.2100   50.00%   1.0000   45.60%   20.00%     0.01     34.5     3.0%"]
    stream = Terminal()
    row(Console(True, 1e9, stream), replace(VALIDATION, classes=9))
    assert "err@1" in stream.getvalue() and "err@5" not in stream.getvalue() and "20.00%" not in stream.getvalue()


def test_long_times() -> None:
    left = [duration(seconds) for seconds in (0.4, 59.6, 3723, 86_399, 277_000)]
    assert left == ["0:00:00", "0:01:00", "1:02:03", "23:59:59", "3d 04h"]


def test_other_processes_are_silent() -> None:
    stream = Terminal()
    console = Console(False, 1e-9, stream)
    steps(console, 5)
    row(console)
    console.print("hello")
    console.warn("odd")
    console.testing("test")(1, 2)
    console.close()
    assert stream.getvalue() == ""


@pytest.mark.parametrize("before", ["nothing shown", "a bar shown"])
def test_a_terminal_that_is_gone_costs_no_line(tmp_path: Path, before: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As under nohup: writing to it fails with EIO from then on."""
    master, slave = pty.openpty()
    standard = sys.stdout, sys.stderr
    with open(slave, "w", encoding="utf-8") as stream:
        console = Console(True, 0.0, stream, tmp_path / "console.log")
        if before == "a bar shown":
            steps(console, 1)
        os.close(master)
        console._last_shown_s = 0.0
        steps(console, 1)
        console.print("[red]and on\x1b[2J")
        steps(console, 2)
        console.close()
    text = (tmp_path / "console.log").read_text(encoding="utf-8")
    assert text.startswith("[red]and on\\x1b[2J\nepoch 3/90  step ") and text.count("and on") == 1 and "\x1b" not in text
    assert "WARNING: output (=Input/output error) goes on in" in capsys.readouterr().err
    assert (sys.stdout, sys.stderr) == standard
