"""Data stalls of a loader: seconds its consumer waits for data, by the stage that is the cause, and its headroom.

One thread makes batches and says with `enter` which stage it is in; one thread consumes them and waits inside `waiting`. The
stage the producer was in meanwhile is why the consumer waited. `span` measures any piece of work of any thread.
"""
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from pipeline.config import LoaderConfig

STAGES = ("read", "decode", "normalize", "copy")  # in a batch's order; a producer in none of them is "idle"
METRIC_NAMES = {"read": "read", "decode": "decode", "normalize": "colour", "copy": "copy"}  # their names in metrics.jsonl
_LATE = 0.2  # share of the waiting for bytes and pixels from which on these are late, whatever the rest

# What lifts a stall, best first, by tier and by the stage that is late: keys of REMEDIES.
_BY_TIER: dict[str, dict[str, tuple[str, ...]]] = {
    "archives": {"read": ("storage", "packed", "resident"), "decode": ("packed", "resident", "threads"),
                 "normalize": ("threads", "packed", "resident")},
    "packed": {"read": ("storage", "resident"), "decode": ("resident", "threads"), "normalize": ("threads", "resident")},
    "streamed": {"read": ("lanes", "resident"), "decode": ("resident", "threads"), "normalize": ("threads", "resident")},
    "resident": {"read": ("filled",), "decode": ("filled",), "normalize": ("threads",)},
}
REMEDIES = {
    "storage": "put the images on faster storage or raise machine.read_threads",
    "packed": "write packed shards once (tools/pack_shards.py, data.tier: packed)",
    "resident": "keep the images in memory (data.tier: resident)",
    "threads": "give the loader more threads (machine.threads)",
    "lanes": "raise data.lanes (another order, so another run), or copy the shards to a disk of this machine (data.tier: packed)",
    "filled": "nothing to do if the first epoch was among these: it fills the memory, later ones only cut crops",
    "queue": "raise machine.queue",
}


def cause_of(seconds: Mapping[str, float]) -> str:
    """The stage that is late, given the seconds that each of STAGES was waited for.

    The producing thread normalizes pixels itself while others read and decode the next ones. So when it waits for these at all,
    they are late; only when it does not is it the normalizing, however much time that takes.
    """
    late, own = STAGES[:2], STAGES[2:]
    total = sum(seconds[stage] for stage in STAGES)
    return max(late if sum(seconds[stage] for stage in late) > _LATE * total else own, key=lambda stage: seconds[stage])


def remedies(tier: str, stage: str) -> tuple[str, ...]:
    """What would lift stalls for which this stage of a loader is the cause, best first: keys of REMEDIES."""
    return _BY_TIER[tier].get(stage, ("queue",))


@dataclass(frozen=True)
class _Sums:
    """Totals that only grow."""

    def plus(self, other: Self) -> Self:
        return type(self)(*(own + more for own, more in zip(vars(self).values(), vars(other).values())))

    def since(self, earlier: Self) -> Self:
        """What came after `earlier`; at least 0, for threads that have ended take their count with them."""
        return type(self)(*(max(0, own - past) for own, past in zip(vars(self).values(), vars(earlier).values())))


@dataclass(frozen=True)
class Waits(_Sums):
    """Seconds the consumer has waited, by the producer's stage; they add up to `seconds` but for the hand-over itself. On a GPU
    they are the device's: from the end of its work to the next batch."""
    seconds: float = 0.0
    read: float = 0.0
    decode: float = 0.0
    normalize: float = 0.0
    copy: float = 0.0
    batches: int = 0  # how many were asked for

    @property
    def cause(self) -> str:
        return cause_of(vars(self))


@dataclass(frozen=True)
class Usage(_Sums):
    """Seconds a loader has used up to a moment."""
    time: float = 0.0  # on the clock
    read: float = 0.0  # by its reading threads
    decode: float = 0.0  # by DALI's threads, CPU time
    making: float = 0.0  # by the thread that makes batches, while its queue was not full


class Event(NamedTuple):
    """One piece of work, for a trace. Seconds on the clock of `time.perf_counter`."""
    name: str
    thread: str
    start_s: float
    end_s: float
    step: int


class Monitor:
    """Measures a loader at work; cheap enough to be always on (a few microseconds a batch).

    `trace`: keep an `Event` for every span. `nvtx`: mark spans as NVTX ranges, for Nsight Systems. `now`: the clock, seconds.
    """

    def __init__(self, trace: bool = False, nvtx: bool = False, now: Callable[[], float] = time.perf_counter) -> None:
        self.now, self._trace, self._lock = now, trace, threading.Lock()
        self.decoders: set[int] = set()  # kernel ids of DALI's worker threads
        self.read_s = 0.0  # wall time of all spans "read"
        self.events: list[Event] = []
        self._stage, self._since = "idle", now()
        self._totals = dict.fromkeys((*STAGES, "idle"), 0.0)
        self.spans: Counter[str] = Counter()  # how often each kind of work was done
        self._waits = Waits()
        self._pending: deque[tuple[Any, Any, Waits, str]] = deque()  # waits whose end the device has not reached yet
        self._range: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext()
        if nvtx:
            import nvtx as ranges  # type: ignore[import-untyped]  # DALI depends on it
            self._range = ranges.annotate

    def enter(self, stage: str) -> None:
        """The producing thread is in this stage from now on: one of STAGES, or "idle" when its queue is full."""
        with self._lock:
            now = self.now()
            self._totals[self._stage] += now - self._since
            self._stage, self._since = stage, now

    def totals(self) -> dict[str, float]:
        """Seconds the producer has spent in each stage so far, the current one included."""
        with self._lock:
            return {**self._totals, self._stage: self._totals[self._stage] + self.now() - self._since}

    @contextmanager
    def span(self, name: str, step: int) -> Iterator[None]:
        """Measure work of this thread on the batch `step`."""
        start = self.now()
        try:
            with self._range(name):
                yield
        finally:
            end = self.now()
            with self._lock:
                self.spans[name] += 1
                self.read_s += end - start if name == "read" else 0.0
                if self._trace:
                    self.events.append(Event(name, threading.current_thread().name, start, end, step))

    @contextmanager
    def waiting(self, step: int, stream: Any = None, *, swap: bool = False, on_device: str = "decode") -> Iterator[None]:
        """The consumer waits for batch `step`; or (`swap`) for what another process sends of it, which no stage is the cause of.
        `stream`: its CUDA stream, on whose clock the waiting is measured, or None; made there to wait for the batch in here, so
        that what the host does not wait for is counted too, as the stage `on_device`."""
        self._settle()
        before, start = self.totals(), self.now()
        mark = None if stream is None else _mark(stream)
        with self.span("swap" if swap else "wait", step):
            yield
        seconds, after = self.now() - start, self.totals()
        wait = Waits(seconds, copy=seconds) if swap else Waits(
            seconds, **{stage: min(seconds, after[stage] - before[stage]) for stage in STAGES}, batches=1)
        if mark is None:
            self._waits = self._waits.plus(wait)
        else:
            self._pending.append((mark, _mark(stream), wait, "copy" if swap else on_device))

    @property
    def waits(self) -> Waits:
        """All waiting so far (on a GPU: as far as the device has come)."""
        self._settle()
        return self._waits

    def _settle(self) -> None:
        """Count the waits whose end the device has reached."""
        while self._pending and self._pending[0][1].query():
            start, end, wait, rest = self._pending.popleft()
            seconds = start.elapsed_time(end) / 1e3
            # The device may have been busy while the host waited, and may wait for the loader's kernels when it no longer does.
            share = min(1.0, seconds / max(sum(getattr(wait, stage) for stage in STAGES), 1e-9))
            parts = {stage: share * getattr(wait, stage) for stage in STAGES}
            parts[rest] += max(0.0, seconds - sum(parts.values()))
            self._waits = self._waits.plus(Waits(seconds, **parts, batches=wait.batches))


def _mark(stream: Any) -> Any:
    import torch  # reports of runs need the names of stages without it

    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


@dataclass(frozen=True)
class Headroom:
    """`times`: how many times the present rate the loader could give. `stage`: its busiest one, which limits it."""
    times: float
    stage: str


def usage(monitor: Monitor) -> Usage:
    """What the loader of `monitor` has used so far."""
    totals = monitor.totals()
    return Usage(monitor.now(), monitor.read_s, sum(map(_cpu_s, monitor.decoders)), sum(totals.values()) - totals["idle"])


def headroom(used: Usage, machine: LoaderConfig, decoding: int) -> Headroom:
    """Headroom of a loader that used so much in `used.time` seconds with so many `decoding` threads: one whose busiest stage
    used half of its threads' time could feed a network twice as fast.

    DALI's threads decode, and the kernel counts their CPU time; normalizing, and waiting for what is late, happens in the thread
    that makes the batches, which is busy whenever its queue is not full.
    """
    shares = {"read": used.read / max(1, machine.read_threads), "decode": used.decode / max(1, decoding),
              "making batches": used.making}
    stage = max(shares, key=lambda name: shares[name])
    return Headroom(used.time / max(shares[stage], 1e-9), stage)


def threads() -> set[int]:
    """Kernel ids of this process's threads; none where /proc does not tell."""
    return {int(path.name) for path in Path("/proc/self/task").glob("*")}


def decoder_threads(before: set[int]) -> set[int]:
    """DALI's threads among those that came after `before`. (With one worker its executor decodes, with more the workers do.)"""
    return {thread for thread in threads() - before if _proc(thread, "comm").startswith("[DALI]")}


def _cpu_s(thread: int) -> float:
    """CPU seconds of a thread; those of one that has ended are lost, and count as 0."""
    return int(_proc(thread, "schedstat").split()[0]) / 1e9


def _proc(thread: int, name: str) -> str:
    with suppress(OSError):  # it has ended
        return Path(f"/proc/self/task/{thread}/{name}").read_text()
    return "0"
