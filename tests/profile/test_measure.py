"""Interleaved measuring: order of turns, what a turn counts, CPU time of a process tree, waiting for idleness."""
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from pipeline.monitor import Monitor
from tools.profile import measure
from tools.profile.measure import Spread, Workload


def test_every_workload_is_called_once_a_round_and_another_one_begins() -> None:
    order: list[str] = []

    def called(name: str) -> int:
        order.append(name)
        return len(order)
    results = measure.interleave({name: lambda name=name: called(name) for name in "abc"}, 3)  # type: ignore[misc]
    assert "".join(order) == "abcbcacab" and results == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


def test_ratios_are_of_one_round() -> None:
    assert measure.ratio([900, 1000, 1200], [800, 800, 400]) == Spread(1.25, 1.125, 3.0)
    assert measure.spread([3, 1, 2]) == Spread(2, 1, 3)


def test_the_warm_up_is_used_up_before_the_clock() -> None:
    taken = []

    def batches() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            time.sleep(0.001)
            yield 4
    turn = measure.run_turn(Workload("a", batches(), warmup=7), 1e-9)
    assert taken == list(range(9)) and turn.images == 8 and len(turn.latency_ms) == 2
    assert turn.rate == 8 / turn.seconds <= 4000 and turn.cpu_ms == 125 * turn.cpu_s > 0
    assert measure.run_turn(Workload("a", iter([4]), warmup=0), 1.0).images == 4     # no more than there is


def test_figures_of_interleaved_turns() -> None:
    monitor = Monitor()

    def batches() -> Iterator[int]:
        while True:
            with monitor.waiting(0):
                monitor.enter("decode")
                time.sleep(0.001)
                monitor.enter("idle")
            yield 3
    figures = measure.measure([Workload("a", batches(), 2, monitor, 5, 100.0), Workload("b", batches())], 0.005, 2)
    a, b = figures["a"], figures["b"]
    assert len(a.rates) == len(a.cpu_ms) == 2 and 0 < a.rate < 3000 and (a.name, a.threads) == ("a", 5)
    p50, p95, p99, most = a.latency_ms
    assert 1 <= p50 <= p95 <= p99 <= most and a.mb_s == pytest.approx(a.rate / 1e4)
    assert 0.5 < a.waited <= 1 and a.causes == {"read": 0, "decode": 1, "normalize": 0, "copy": 0}
    assert b.waited == 0 and b.causes == {}


def test_cpu_time_of_child_processes_is_counted() -> None:
    busy = "import time, sys\nwhile time.process_time() < 0.3: pass\nprint(flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"\n"
    assert measure.process_tree(os.getpid())[0] == os.getpid() and child.pid in measure.process_tree(os.getpid())
    assert 0.3 <= measure.cpu_seconds([child.pid]) < 5
    assert measure.wait_idle()
    child.communicate()
    assert measure.cpu_seconds([child.pid]) == 0


def test_a_busy_child_process_is_not_idle() -> None:
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert not measure.wait_idle(0.3)
    finally:
        child.kill()
        child.wait()
