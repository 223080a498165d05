"""Console output of a run: a live line in a terminal, plain lines elsewhere, one table row per epoch. Only one process prints."""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import IO, Any, Callable, Optional

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from pipeline.monitor import RECORDED, STAGES, Monitor, Waits, cause_of
from train.evaluate.metrics import Score

RECENT_STEPS = 50  # over which the displayed throughput is taken


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
                "waited_for": {RECORDED[cause]: round(share, 4) for cause, share in self.causes.items()}}


class ThroughputMeter:
    """Throughput of training steps, over the recent ones and over all.

    Args:
        monitor: the loader's, whose waits are counted.
        now: clock in seconds.
    """

    def __init__(self, monitor: Monitor, now: Callable[[], float] = time.perf_counter) -> None:
        self._monitor, self._now = monitor, now
        self._start = (now(), 0, monitor.waits)
        self._ends = deque([self._start], maxlen=RECENT_STEPS + 1)  # of steps: time, images and waits so far

    def add(self, images: int) -> None:
        """A step of so many images has ended."""
        self._ends.append((self._now(), self._ends[-1][1] + images, self._monitor.waits))

    def recent(self) -> Throughput:
        """Throughput of the last steps."""
        return _throughput(self._ends[0], self._ends[-1])

    def overall(self) -> Throughput:
        """Throughput of all steps."""
        return _throughput(self._start, self._ends[-1])

    @property
    def seconds(self) -> float:
        """Time from the start to the end of the last step."""
        return self._ends[-1][0] - self._start[0]


def _throughput(start: tuple[float, int, Waits], end: tuple[float, int, Waits]) -> Throughput:
    seconds, waits = max(end[0] - start[0], 1e-9), end[2].since(start[2])
    return Throughput((end[1] - start[1]) / seconds, min(1.0, waits.seconds / seconds),
                      {stage: min(1.0, getattr(waits, stage) / seconds) for stage in STAGES})


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03, or 2:03."""
    minutes, rest = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Console:
    """Everything a run prints on stdout.

    Args:
        enabled: false in all processes but the main one, which print nothing.
        log_s: seconds between two plain lines.
        stream: output; whether it is a terminal decides between live and plain.
    """

    def __init__(self, enabled: bool, log_s: float, stream: Optional[IO[str]] = None) -> None:
        self._enabled, self._log_s, self._stream = enabled, log_s, stream or sys.stdout
        self._live: Optional[Progress] = None
        self._task: Optional[TaskID] = None
        self._last_line_s = -float("inf")
        self._has_header = False
        terminal = Terminal(file=self._stream, highlight=False)
        if enabled and terminal.is_terminal:
            self._live = Progress(TextColumn("{task.description}"), BarColumn(bar_width=24),
                                  TextColumn("{task.completed}/{task.total}"), TextColumn("{task.fields[figures]}"),
                                  console=terminal, transient=True)

    def print(self, text: str) -> None:
        """A line, above the live one."""
        if not self._enabled:
            return
        if self._live is not None:
            self._live.console.print(Text(text))
        else:
            print(text, file=self._stream, flush=True)

    def warn(self, text: str) -> None:
        """A line with WARNING before it."""
        self.print(f"WARNING: {text}")

    def step(self, epoch: str, step: int, done: int, total: int, loss: float, error: float, throughput: Throughput,
             left_s: float) -> None:
        """Progress of an epoch (`1/90`) after a training step; loss and error are means over the epoch so far."""
        if self._is_due():
            self._show(f"epoch {epoch}", f"step {step}", done, total,
                       f"loss {loss:.4f} error {error:.1%} {throughput} left {duration(left_s)}")

    def testing(self, title: str) -> Callable[[int, int], None]:
        """A function that shows the progress of a test, given images done and in all."""
        def show(done: int, total: int) -> None:
            if self._is_due():
                self._show(title, "", done, total, "images")
        self._last_line_s = time.monotonic()  # a short test needs no line
        return show

    def epoch(self, epoch: str, loss: float, error: float, validation: Score, lr: float, throughput: Throughput,
              seconds: float) -> None:
        """A table row of an epoch (`1/90`), under its header; errors are shares, `lr` is the rate it was trained with."""
        if not self._has_header:
            self._has_header = True
            self.print(" epoch   loss   error  val top-1  val top-5      lr    img/s  data wait     time")
        self.print(f"{epoch:>7} {loss:6.4f} {error:6.2%} {validation.top1:9.2%} {validation.top5:10.2%} {lr:8.2g} "
                   f"{throughput.images_per_s:7.1f} {throughput.waited:9.1%} {duration(seconds):>9}")

    def close(self) -> None:
        """Remove the live line."""
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

    def _show(self, title: str, position: str, done: int, total: int, figures: str) -> None:
        if self._live is None:
            self.print(" ".join(part for part in (title, position, f"{done}/{total}", figures) if part))
            return
        if self._task is None:
            self._live.start()
            self._task = self._live.add_task(title, total=total, figures="")
        self._live.update(self._task, description=title, completed=done, total=total, figures=figures)
