import time
from collections.abc import Iterator

import pytest

from pipeline.monitor import STAGES, Monitor, Waits


class Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def test_waiting_is_divided_by_what_the_producer_did() -> None:
    clock = Clock()
    monitor = Monitor(now=clock)
    clock.time = 5.0
    monitor.enter("decode")
    clock.time = 6.0
    with monitor.waiting(0):
        clock.time = 8.0
        monitor.enter("read")
        clock.time = 8.5
        monitor.enter("normalize")
        clock.time = 9.0
    assert monitor.waits == Waits(seconds=3.0, read=0.5, decode=2.0, normalize=0.5, copy=0.0, batches=1)
    assert monitor.waits.cause == "decode"
    earlier = monitor.waits
    with monitor.waiting(1):
        clock.time = 13.0
    assert monitor.waits.since(earlier) == Waits(seconds=4.0, normalize=4.0, batches=1)
    assert monitor.totals() == {"read": 0.5, "decode": 3.0, "normalize": 4.5, "copy": 0.0, "idle": 5.0}
    assert set(monitor.totals()) == {*STAGES, "idle"}


def test_what_another_process_sends_is_not_waited_for_from_the_producer() -> None:
    clock = Clock()
    monitor = Monitor(now=clock)
    monitor.enter("decode")
    with monitor.waiting(0, swap=True):
        clock.time = 2.0
    assert monitor.waits == Waits(seconds=2.0, copy=2.0) and monitor.spans["swap"] == 1
    with monitor.waiting(0):
        clock.time = 5.0
    assert monitor.waits == Waits(seconds=5.0, decode=3.0, copy=2.0, batches=1)


def test_on_a_device_the_remainder_is_of_what_was_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host goes on at once; the device waits 2 s for another process, then 3 s for the producer."""
    class Mark:
        def __init__(self, stream: Iterator[float]) -> None:
            self.time = next(stream)

        def query(self) -> bool:
            return True

        def elapsed_time(self, end: "Mark") -> float:
            return (end.time - self.time) * 1e3

    monkeypatch.setattr("pipeline.monitor._mark", Mark)
    monitor, stream = Monitor(now=Clock()), iter([1.0, 3.0, 4.0, 7.0])
    with monitor.waiting(0, stream, swap=True):
        pass
    with monitor.waiting(0, stream):
        pass
    assert monitor.waits == Waits(seconds=5.0, decode=3.0, copy=2.0, batches=1)


@pytest.mark.parametrize("seconds, cause", [
    ((0.0, 2.5, 7.0, 0.5), "decode"), ((1.2, 0.9, 8.0, 0.0), "read"),
    ((0.8, 0.8, 8.4, 0.0), "normalize"), ((0.0, 1.0, 7.0, 2.0), "normalize"),
    ((0.1, 0.1, 1.0, 3.0), "copy"), ((0.0, 0.0, 0.0, 0.0), "normalize")])
def test_what_is_waited_for_at_all_is_late(seconds: tuple[float, ...], cause: str) -> None:
    assert Waits(sum(seconds), *seconds).cause == cause


def test_spans_count_and_trace() -> None:
    monitor = Monitor(trace=True)
    with monitor.span("read", 3):
        time.sleep(0.01)
    with pytest.raises(KeyError), monitor.span("read", 5):
        raise KeyError
    assert monitor.spans == {"read": 2} and [(event.name, event.step) for event in monitor.events] == [("read", 3), ("read", 5)]
    assert {event.thread for event in monitor.events} == {"MainThread"}
    assert monitor.events[0].end_s - monitor.events[0].start_s >= 0.01


def test_nvtx_ranges_need_no_profiler_and_no_gpu() -> None:
    monitor = Monitor(nvtx=True)
    with monitor.span("decode", 0):
        pass
    assert monitor.spans == {"decode": 1} and not monitor.events
