"""Console output of a run: a live line in a terminal, plain lines elsewhere, one table row per epoch, and at the end one line on
data wait, its cause and the loader's headroom. Only one process prints.
"""
import contextlib
import os
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Callable, Iterator, Optional

from rich.console import Console as Terminal
from rich.live import Live
from rich.text import Text

from pipeline.config import LoaderConfig
from pipeline.monitor import METRIC_NAMES, REMEDIES, STAGES, Monitor, Usage, Waits, cause_of, headroom, remedies, usage
from train.evaluate.metrics import Score

RECENT_STEPS = 50  # over which the displayed throughput is taken
SMALL_WAIT = 0.01  # a data wait below this share of the time needs no advice


@dataclass(frozen=True)
class Throughput:
    """Images per second, the share of the time spent waiting for data, and its division by cause (one of STAGES)."""
    images_per_s: float
    waited: float
    causes: dict[str, float]

    def __str__(self) -> str:
        cause = f" ({cause_of(self.causes)})" if self.waited >= 0.005 else ""
        return f"{self.images_per_s:.1f} img/s data wait {self.waited:.1%}{cause}"

    def as_dict(self) -> dict[str, Any]:
        """Rounded, for a line of metrics.jsonl."""
        return {"images_per_s": round(self.images_per_s, 2), "waited": round(self.waited, 4),
                "waited_for": {METRIC_NAMES[cause]: round(share, 4) for cause, share in self.causes.items()}}


class ThroughputMeter:
    """Throughput of training steps, over the recent ones and over all. `monitor` is the loader's, whose waits are counted."""

    def __init__(self, monitor: Monitor, now: Callable[[], float] = time.perf_counter) -> None:
        self._monitor, self._now = monitor, now
        self._start = (now(), 0, monitor.waits)
        self._ends = deque([self._start], maxlen=RECENT_STEPS + 1)  # of steps: time, images and waits so far

    def add(self, images: int) -> None:
        """A step of so many images has ended."""
        self._ends.append((self._now(), self._ends[-1][1] + images, self._monitor.waits))

    def recent(self) -> Throughput:
        return _throughput(self._ends[0], self._ends[-1])

    def overall(self) -> Throughput:
        return _throughput(self._start, self._ends[-1])

    @property
    def seconds(self) -> float:
        return self._ends[-1][0] - self._start[0]


def _throughput(start: tuple[float, int, Waits], end: tuple[float, int, Waits]) -> Throughput:
    seconds, waits = max(end[0] - start[0], 1e-9), end[2].since(start[2])
    return Throughput((end[1] - start[1]) / seconds, min(1.0, waits.seconds / seconds),
                      {stage: min(1.0, getattr(waits, stage) / seconds) for stage in STAGES})


class Console:
    """Everything a run prints on stdout. Not `enabled`, in all processes but the main one, it prints nothing. Whether `stream` is
    a terminal decides between a live line and plain ones, `log_s` seconds apart. Output never ends a run: when nobody reads it
    any more (`… | head`) or it cannot be written, the rest goes to the file `log`."""

    def __init__(self, enabled: bool, log_s: float, stream: Optional[IO[str]] = None, log: Path = Path(os.devnull)) -> None:
        self._enabled, self._log_s, self._stream, self._log = enabled, log_s, stream or sys.stdout, log
        self._last_line_s, self._has_header = -float("inf"), False
        terminal = Terminal(file=self._stream, highlight=False)
        self._live = Live(console=terminal, transient=True) if enabled and terminal.is_terminal else None

    def print(self, text: str) -> None:
        """A line, above the live one."""
        if not self._enabled:
            return
        if self._live is not None:
            self._live.console.print(Text(text))
            return
        try:
            print(text, file=self._stream, flush=True)
        except OSError as error:
            self._divert(error)

    def _divert(self, error: OSError) -> None:
        """Let the stream write into the log, what it still holds included."""
        try:
            file = open(self._log, "ab")
        except OSError:  # the run folder is not there yet
            file = open(os.devnull, "wb")
        with file:
            os.dup2(file.fileno(), self._stream.fileno())
        with contextlib.suppress(OSError):
            print(f"WARNING: output (={error.strerror}) goes on in {self._log}", file=sys.stderr, flush=True)
            self._stream.flush()

    def warn(self, text: str) -> None:
        self.print(f"WARNING: {text}")

    def step(self, epoch: str, step: int, done: int, total: int, loss: float, error: float, throughput: Throughput,
             left_s: float) -> None:
        """Progress of an epoch (`1/90`) after a training step; loss and error are means over the epoch so far."""
        if self._is_due():
            self._show(f"epoch {epoch} step {step} {done}/{total} loss {loss:.4f} error {error:.1%} {throughput} "
                       f"left {timedelta(seconds=round(left_s))}")

    def testing(self, title: str) -> Callable[[int, int], None]:
        """A function that shows the progress of a test, given images done and in all."""
        def show(done: int, total: int) -> None:
            if self._is_due():
                self._show(f"{title} {done}/{total} images")
        self._last_line_s = time.monotonic()  # a short test needs no line
        return show

    def epoch(self, epoch: str, loss: float, error: float, validation: Score, lr: float, throughput: Throughput,
              seconds: float) -> None:
        """A table row of an epoch (`1/90`), under its header; errors are shares, `lr` is the rate it was trained with."""
        if not self._has_header:
            self._has_header = True
            self.print(" epoch   loss   error  val top-1  val top-5      lr    img/s  data wait     time")
        self.print(f"{epoch:>7} {loss:6.4f} {error:6.2%} {validation.top1:9.2%} {validation.top5:10.2%} {lr:8.2g} "
                   f"{throughput.images_per_s:7.1f} {throughput.waited:9.1%} {timedelta(seconds=round(seconds))!s:>9}")

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _is_due(self) -> bool:
        """Whether to show progress now: in a terminal always (rich limits the rate), elsewhere every log_s."""
        if not self._enabled or self._live is not None:
            return self._enabled
        if time.monotonic() - self._last_line_s < self._log_s:
            return False
        self._last_line_s = time.monotonic()
        return True

    def _show(self, text: str) -> None:
        if self._live is None:
            self.print(text)
        else:
            self._live.start()
            self._live.update(Text(text))


@dataclass
class DataWait:
    """What the loop waited for its loader, and how busy the loader's threads were, during training without validation."""
    waits: Waits = field(default_factory=Waits)
    used: Usage = field(default_factory=Usage)
    _start: tuple[Waits, Usage] = (Waits(), Usage())
    _has_batch: bool = False

    @contextlib.contextmanager
    def measured(self, monitor: Monitor) -> Iterator[None]:
        self._start = monitor.waits, usage(monitor)
        try:
            yield
        finally:
            waits, used = self._start
            self.waits = self.waits.plus(monitor.waits.since(waits))
            self.used = self.used.plus(usage(monitor).since(used))

    def batch_arrived(self, monitor: Monitor) -> None:
        """The first batch of a run is not counted: until then the loader has been starting."""
        if not self._has_batch:
            self._has_batch, self._start = True, (monitor.waits, usage(monitor))

    def summary(self, machine: LoaderConfig, threads: int, on_gpu: bool, tier: str = "archives", swaps: bool = False) -> str:
        """The line, with headroom or advice for a loader of so many decoding `threads`; empty when nothing was trained. `on_gpu`:
        decoding is on a GPU, whose headroom the CPU's threads do not show. `swaps`: half of each batch comes from another
        process, and waiting for it counts as copying."""
        if self.used.time <= 0 or not self.waits.batches:
            return ""
        share = min(1.0, self.waits.seconds / self.used.time)
        if share < SMALL_WAIT:
            room = headroom(self.used, machine, threads)
            return f"data wait: {share:.1%} of the time" + (
                "" if on_gpu else f"; the loader has {room.times:.1f}× headroom ({room.stage} is its busiest part)")
        cause = self.waits.cause
        advice = ("try --parallel.feed=replicate" if swaps and cause == "copy" else
                  "; or ".join(REMEDIES[remedy] for remedy in remedies(tier, cause)))
        shares = {stage: getattr(self.waits, stage) / self.waits.seconds for stage in STAGES}
        shares["other"] = max(0.0, 1 - sum(shares.values()))
        parts = ", ".join(f"{stage} {part:.0%}" for stage, part in shares.items() if part >= 0.005)
        return (f"data wait: {share:.1%} of the time (of that {parts}): {advice}; `python tools/profile_pipeline.py --config "
                "RECIPE` measures what would help")
