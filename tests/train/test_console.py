"""What is printed: plain lines without a terminal, a live line with one, nothing from other processes."""

from __future__ import annotations

import io
from unittest.mock import Mock

import pytest

from pipeline.monitor import Monitor, Waits
from train.console import Console, Throughput, ThroughputMeter
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
    assert str(overall) == "10.0 img/s data wait 20.0% (decode)"


def test_hardly_any_waiting_has_no_cause() -> None:
    waits = {"read": 0.004, "decode": 0.0, "normalize": 0.0, "copy": 0.0}
    assert str(Throughput(10.0, 0.004, waits)) == "10.0 img/s data wait 0.4%"


def test_recent_throughput_forgets_the_start() -> None:
    now = [0.0]
    throughput = ThroughputMeter(Monitor(), now=lambda: now[0])
    for step in range(60):
        now[0] += 10.0 if step < 10 else 1.0
        throughput.add(8)
    assert throughput.recent().images_per_s == 8.0 and throughput.overall().images_per_s < 4


def steps(console: Console, count: int) -> None:
    throughput = ThroughputMeter(Monitor())
    for step in range(count):
        throughput.add(8)
        console.step("3/90", 700 + step, step + 1, count, 3.2, 0.5, throughput.recent(), 3723)


def row(console: Console) -> None:
    console.epoch("3/90", 3.21, 0.5, VALIDATION, 0.01, Throughput(34.5, 0.03, {}), 3723)


def test_plain_lines_come_every_so_often_and_rows_under_one_header() -> None:
    stream = io.StringIO()
    console = Console(True, 1e9, stream)
    steps(console, 50)
    row(console)
    row(console)
    console.warn("odd")
    console.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5 and lines[0].startswith("epoch 3/90 step 700 1/50 loss 3.2000 error 50.0%")
    assert lines[0].endswith("left 1:02:03") and "data wait 0.0% left" in lines[0] and "\x1b" not in stream.getvalue()
    assert lines[1].split() == ["epoch", "loss", "error", "val", "top-1", "val", "top-5", "lr", "img/s", "data", "wait",
                                "time"]
    assert lines[2].split() == ["3/90", "3.2100", "50.00%", "45.60%", "20.00%", "0.01", "34.5", "3.0%", "1:02:03"]
    assert lines[4] == "WARNING: odd"
    often = io.StringIO()
    steps(Console(True, 1e-9, often), 5)
    assert len(often.getvalue().splitlines()) == 5


def test_tests_tell_their_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("train.console.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    console = Console(True, 10, stream)
    told = console.testing("validation")
    told(10, 100)
    now[0] += 11
    told(20, 100)
    assert stream.getvalue() == "validation 20/100 images\n"


def test_terminal_has_a_live_line() -> None:
    stream = Terminal()
    console = Console(True, 1e9, stream)
    console.testing("validation")(20, 100)
    console.print("[not markup]")
    row(console)
    steps(console, 5)
    console.close()
    text = stream.getvalue()
    assert "\x1b[" in text and "epoch 3/90" in text and "[not markup]" in text and "45.60%" in text


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
