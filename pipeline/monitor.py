"""Who waits for whom: what the producing side is busy with, and what the consumer's waiting is due to.

One thread makes batches and says with `enter` what it does; one thread consumes them and waits inside `waiting`. What the
producer did meanwhile is why the consumer waited. `span` measures any piece of work of any thread.
"""
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

STATES = ("read", "decode", "colour", "copy")  # what a producer can be busy with, in a batch's order; else it is "idle"
_DEPTHS = 4096  # queue depths kept
_LATE = 0.2  # share of the waiting for bytes and pixels from which on these are late, whatever the rest


def cause_of(seconds: Mapping[str, float]) -> str:
    """Which of STATES is late, given how long each was waited for.

    The producing thread finishes pixels itself while others read and decode the next ones. So when it stands waiting for these at
    all, they are late; only when it does not is it the finishing, however much time that takes.
    """
    late, own = STATES[:2], STATES[2:]
    total = sum(seconds[state] for state in STATES)
    return max(late if sum(seconds[state] for state in late) > _LATE * total else own, key=lambda state: seconds[state])


# What lifts a stall, best first, by tier and by the state that is late: keys of REMEDIES.
_BY_TIER: dict[str, dict[str, tuple[str, ...]]] = {
    "archives": {"read": ("storage", "packed", "resident"), "decode": ("packed", "resident", "threads"),
                 "colour": ("threads", "packed", "resident")},
    "packed": {"read": ("storage", "resident"), "decode": ("resident", "threads"), "colour": ("threads", "resident")},
    "streamed": {"read": ("lanes", "resident"), "decode": ("resident", "threads"), "colour": ("threads", "resident")},
    "resident": {"read": ("filled",), "decode": ("filled",), "colour": ("threads",)},
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


def remedies(tier: str, state: str) -> tuple[str, ...]:
    """What would lift stalls for which this state of a loader is the cause, best first: keys of REMEDIES."""
    return _BY_TIER[tier].get(state, ("queue",))


@dataclass(frozen=True)
class Waits:
    """Seconds the consumer has waited, by what the producer was doing; they add up to `seconds` but for the hand-over itself.

    `batches`: how many were asked for. On a GPU the seconds are the device's: from the end of its work to the next batch.
    """
    seconds: float = 0.0
    read: float = 0.0
    decode: float = 0.0
    colour: float = 0.0
    copy: float = 0.0
    batches: int = 0

    def since(self, earlier: "Waits") -> "Waits":
        """What came after `earlier`."""
        return Waits(self.seconds - earlier.seconds, self.read - earlier.read, self.decode - earlier.decode,
                     self.colour - earlier.colour, self.copy - earlier.copy, self.batches - earlier.batches)

    def plus(self, more: "Waits") -> "Waits":
        """Both together."""
        return Waits(self.seconds + more.seconds, self.read + more.read, self.decode + more.decode, self.colour + more.colour,
                     self.copy + more.copy, self.batches + more.batches)

    @property
    def cause(self) -> str:
        """The state that the waiting is due to, see `cause_of`."""
        return cause_of({state: getattr(self, state) for state in STATES})


@dataclass(frozen=True)
class Span:
    """Totals of one kind of work: wall seconds, CPU seconds of its own thread, how often."""
    wall_s: float = 0.0
    cpu_s: float = 0.0
    count: int = 0


@dataclass(frozen=True)
class Event:
    """One piece of work: for a trace. Seconds on the clock of `time.perf_counter`."""
    name: str
    thread: str
    start_s: float
    end_s: float
    step: int


class Meter:
    """Measures a loader at work; cheap enough to be always on (a few microseconds a batch).

    Args:
        trace: keep an `Event` for every span.
        nvtx: mark spans as NVTX ranges, for Nsight Systems.
        now: the clock, seconds.
    """

    def __init__(self, trace: bool = False, nvtx: bool = False, now: Callable[[], float] = time.perf_counter) -> None:
        self.now, self._trace, self._lock = now, trace, threading.Lock()
        self.decoders: set[int] = set()  # kernel ids of DALI's worker threads
        self._state, self._since = "idle", now()
        self._totals = dict.fromkeys((*STATES, "idle"), 0.0)
        self._spans: dict[str, Span] = {}
        self._waits = Waits()
        self._pending: deque[tuple[Any, Any, Waits, str]] = deque()  # waits whose end the device has not reached yet
        self.events: list[Event] = []
        self.depths: deque[tuple[float, int]] = deque(maxlen=_DEPTHS)
        self._range: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext()
        if nvtx:
            import nvtx as ranges  # type: ignore[import-untyped]  # DALI depends on it
            self._range = ranges.annotate

    def enter(self, state: str) -> None:
        """The producing thread says what it does from now on: one of STATES, or "idle": its queue is full."""
        with self._lock:
            now = self.now()
            self._totals[self._state] += now - self._since
            self._state, self._since = state, now

    def totals(self) -> dict[str, float]:
        """Seconds in each state so far, the current one included."""
        with self._lock:
            return {**self._totals, self._state: self._totals[self._state] + self.now() - self._since}

    @contextmanager
    def span(self, name: str, step: int) -> Iterator[None]:
        """Measure work of this thread on the batch `step`."""
        start, cpu = self.now(), time.thread_time()
        try:
            with self._range(name):
                yield
        finally:
            end, used = self.now(), time.thread_time() - cpu
            with self._lock:
                old = self._spans.get(name, Span())
                self._spans[name] = Span(old.wall_s + end - start, old.cpu_s + used, old.count + 1)
                if self._trace:
                    self.events.append(Event(name, threading.current_thread().name, start, end, step))

    def spans(self) -> dict[str, Span]:
        """Totals of each kind of work so far."""
        with self._lock:
            return dict(self._spans)

    def depth(self, batches: int) -> None:
        """So many finished batches were in the queue when the consumer asked."""
        self.depths.append((self.now(), batches))

    @contextmanager
    def waiting(self, step: int, stream: Any = None) -> Iterator[None]:
        """The consumer waits for batch `step`. `stream`: its CUDA stream, on whose clock the waiting is measured, or None."""
        self._settle()
        before, start = self.totals(), self.now()
        begun = None if stream is None else _mark(stream)
        with self.span("wait", step):
            yield
        seconds, after = self.now() - start, self.totals()
        wait = Waits(seconds, **{state: min(seconds, after[state] - before[state]) for state in STATES}, batches=1)
        self._add(wait, stream, begun, "decode")

    @contextmanager
    def copying(self, step: int, stream: Any = None) -> Iterator[None]:
        """The consumer waits for what another process sends of batch `step`; the producer is not the cause. See `waiting`."""
        self._settle()
        start = self.now()
        begun = None if stream is None else _mark(stream)
        with self.span("swap", step):
            yield
        seconds = self.now() - start
        self._add(Waits(seconds, copy=seconds), stream, begun, "copy")

    def _add(self, wait: Waits, stream: Any, begun: Any, rest: str) -> None:
        if begun is None:
            self._waits = self._waits.plus(wait)
        else:
            self._pending.append((begun, _mark(stream), wait, rest))

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
            share = min(1.0, seconds / max(sum(getattr(wait, state) for state in STATES), 1e-9))
            parts = {state: share * getattr(wait, state) for state in STATES}
            parts[rest] += max(0.0, seconds - sum(parts.values()))
            self._waits = self._waits.plus(Waits(seconds, **parts, batches=wait.batches))


def _mark(stream: Any) -> Any:
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event
