"""What is printed: plain lines without a terminal, a live line with one, nothing from other processes."""

from __future__ import annotations

import io
import time

import pytest

from pipeline.monitor import Waits
from train.console import Console, Pace, Rates, Row, duration

ROW = Row(epoch=2, epochs=90, loss=3.21, error=0.5, validation_top1=0.456, validation_top5=0.2, lr=0.01, images_per_s=34.5,
          waited=0.03, seconds=3723)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_rates_by_hand() -> None:
    clock = iter([0.0, 1.0, 3.0])
    rates = Rates(now=lambda: next(clock))
    rates.add(10, Waits(0.5, read=0.1, decode=0.4, batches=1))
    assert rates.recent() == Pace(10.0, 0.5, {"read": 0.1, "decode": 0.4, "colour": 0.0, "copy": 0.0})
    rates.add(20, Waits(0.1, read=0.1, batches=1))
    pace, seconds = rates.overall()
    assert rates.recent() == pace and seconds == 3.0 and pace.images_per_s == 10.0
    assert pace.waited == pytest.approx(0.2) and pace.causes["decode"] == pytest.approx(0.4 / 3)
    assert pace.why == " (decode)"


def test_hardly_any_waiting_has_no_cause() -> None:
    assert Pace(10.0, 0.004, {"read": 0.004, "decode": 0.0, "colour": 0.0, "copy": 0.0}).why == ""


def test_recent_rates_forget_the_start() -> None:
    now = [0.0]
    rates = Rates(now=lambda: now[0])
    for step in range(60):
        now[0] += 10.0 if step < 10 else 1.0
        rates.add(8, Waits())
    assert rates.recent().images_per_s == 8.0 and rates.overall()[0].images_per_s < 4


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3723, "1:02:03")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def steps(console: Console, count: int) -> None:
    rates = Rates()
    for step in range(count):
        rates.add(8, Waits())
        console.step(2, 90, step + 1, count, 700 + step, 3.2, 0.5, rates, 3723)


def test_plain_lines_come_every_so_often_and_rows_under_one_header() -> None:
    stream = io.StringIO()
    console = Console(True, 1e9, stream)
    steps(console, 50)
    console.row(ROW)
    console.row(ROW)
    console.warn("odd")
    console.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5 and lines[0].startswith("epoch 3/90 step 700 1/50 loss 3.2000 error 50.0%")
    assert lines[0].endswith("left 1:02:03") and "waiting 0.0% left" in lines[0] and "\x1b" not in stream.getvalue()
    assert lines[1].split() == ["epoch", "loss", "error", "val", "top-1", "val", "top-5", "lr", "img/s", "waiting", "time"]
    assert lines[2].split() == ["3/90", "3.2100", "50.00%", "45.60%", "20.00%", "0.01", "34.5", "3.0%", "1:02:03"]
    assert lines[4] == "WARNING: odd"
    often = io.StringIO()
    steps(Console(True, 1e-9, often), 5)
    assert len(often.getvalue().splitlines()) == 5


def test_tests_tell_their_progress() -> None:
    stream = io.StringIO()
    console = Console(True, 0.05, stream)
    told = console.testing("validation")
    told(10, 100)
    time.sleep(0.06)
    told(20, 100)
    assert stream.getvalue() == "validation 20/100 images\n"


def test_terminal_has_a_live_line() -> None:
    stream = Terminal()
    console = Console(True, 1e9, stream)
    steps(console, 5)
    console.testing("validation")(20, 100)
    console.say("[not markup]")
    console.row(ROW)
    console.close()
    text = stream.getvalue()
    assert "\x1b[" in text and "epoch 3/90" in text and "[not markup]" in text and "45.60%" in text


def test_other_processes_are_silent() -> None:
    stream = Terminal()
    console = Console(False, 1e-9, stream)
    steps(console, 5)
    console.row(ROW)
    console.say("hello")
    console.warn("odd")
    console.testing("test")(1, 2)
    console.close()
    assert stream.getvalue() == ""
