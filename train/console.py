"""What a person sees: a live line in a terminal, plain lines elsewhere, one table row an epoch. One process speaks."""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import IO, Callable, Optional

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from pipeline.monitor import STAGES, Waits, cause_of

_WINDOW = 50  # steps over which the rates are taken


@dataclass(frozen=True)
class Row:
    """One epoch in the table; errors are shares, `lr` the rate it was trained with."""

    epoch: int
    epochs: int
    loss: float
    error: float
    validation_top1: float
    validation_top5: float
    lr: float
    images_per_s: float
    waited: float
    seconds: float


@dataclass(frozen=True)
class Pace:
    """Images per second, the share of the time the network waited for the loader, and what for (shares of the time too)."""

    images_per_s: float
    waited: float
    causes: dict[str, float]

    @property
    def why(self) -> str:
        """What the waiting is for, as "(decode)"; empty when there is hardly any."""
        return f" ({cause_of(self.causes)})" if self.waited >= 0.005 else ""


class Rates:
    """The pace over the last steps and over all."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._last = self._start = now()
        self._steps: deque[tuple[int, Waits, float]] = deque(maxlen=_WINDOW)
        self._images, self._waits = 0, Waits()

    def add(self, images: int, waits: Waits) -> None:
        """A step is done: it had so many images, and its batch was waited for so long."""
        now = self._now()
        self._steps.append((images, waits, now - self._last))
        self._last = now
        self._images += images
        self._waits = self._waits.plus(waits)

    def recent(self) -> Pace:
        """That of the last steps."""
        waits = Waits()
        for step in self._steps:
            waits = waits.plus(step[1])
        return _pace(sum(step[0] for step in self._steps), waits, sum(step[2] for step in self._steps))

    def overall(self) -> tuple[Pace, float]:
        """That since the start, and how many seconds that is ago."""
        spent = self._last - self._start
        return _pace(self._images, self._waits, spent), spent


def _pace(images: int, waits: Waits, spent: float) -> Pace:
    spent = max(spent, 1e-9)
    return Pace(images / spent, min(1.0, waits.seconds / spent),
                {cause: min(1.0, getattr(waits, cause) / spent) for cause in STAGES})


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03, or 2:03."""
    minutes, rest = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Console:
    """The one voice of a run.

    Args:
        speaks: false in all processes but the main one, which print nothing but warnings of their own failure.
        log_s: seconds between two plain lines.
        stream: where to print; its being a terminal decides between live and plain.
    """

    def __init__(self, speaks: bool, log_s: float, stream: Optional[IO[str]] = None) -> None:
        stream = stream or sys.stdout
        self._speaks, self._log_s, self._stream = speaks, log_s, stream
        self._live: Optional[Progress] = None
        self._task: Optional[TaskID] = None
        self._said = -float("inf")
        self._header = False
        self._terminal = Terminal(file=stream, highlight=False)
        if speaks and self._terminal.is_terminal:
            self._live = Progress(TextColumn("{task.description}"), BarColumn(bar_width=24),
                                  TextColumn("{task.completed}/{task.total}"), TextColumn("{task.fields[figures]}"),
                                  console=self._terminal, transient=True)

    def say(self, text: str) -> None:
        """A line, above the live one."""
        if not self._speaks:
            return
        if self._live is not None:
            self._live.console.print(Text(text))
        else:
            print(text, file=self._stream, flush=True)

    def warn(self, text: str) -> None:
        """A line nobody should miss."""
        self.say(f"WARNING: {text}")

    def step(self, epoch: int, epochs: int, done: int, total: int, step: int, loss: float, error: float,
             rates: Rates, left_s: float) -> None:
        """A training step is done: `done` of `total` of its epoch; loss and error are means over the epoch so far."""
        if not self._due():
            return
        pace = rates.recent()
        figures = (f"loss {loss:.4f} error {error:.1%} {pace.images_per_s:.1f} img/s waiting {pace.waited:.1%}{pace.why} "
                   f"left {duration(left_s)}")
        self._show(f"epoch {epoch + 1}/{epochs}", done, total, figures, f"step {step}")

    def testing(self, what: str) -> Callable[[int, int], None]:
        """A function to tell of images tested, done and in all."""
        def told(done: int, total: int) -> None:
            if self._due():
                self._show(what, done, total, "images", "")
        self._said = time.monotonic()  # a short test needs no line
        return told

    def row(self, row: Row) -> None:
        """A line of the table, under its header."""
        if not self._header:
            self._header = True
            self.say(" epoch   loss   error  val top-1  val top-5      lr    img/s  waiting     time")
        self.say(f"{row.epoch + 1:3d}/{row.epochs:<3d} {row.loss:6.4f} {row.error:6.2%} {row.validation_top1:9.2%} "
                 f"{row.validation_top5:10.2%} {row.lr:8.2g} {row.images_per_s:7.1f} {row.waited:7.1%} "
                 f"{duration(row.seconds):>9}")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _due(self) -> bool:
        """Whether to show figures now: in a terminal rich decides, elsewhere every log_s."""
        if not self._speaks:
            return False
        if self._live is not None:
            return True
        if time.monotonic() - self._said < self._log_s:
            return False
        self._said = time.monotonic()
        return True

    def _show(self, what: str, done: int, total: int, figures: str, where: str) -> None:
        if self._live is None:
            self.say(" ".join(part for part in (what, where, f"{done}/{total}", figures) if part))
            return
        if self._task is None:
            self._live.start()
            self._task = self._live.add_task(what, total=total, figures="")
        self._live.update(self._task, description=what, completed=done, total=total, figures=figures)
