"""Progress of long work on stderr: a rich bar with rate and time left on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

PLAIN_SECONDS = 10.0  # between two plain lines


class Console:
    """A `pipeline.parallel.Progress`; a context manager, so that the bar is taken down whatever happens."""

    def __init__(self) -> None:
        self._stage, self._total, self._bytes, self._images = "", 0, 0, 0
        self._began = self._said = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "Console":
        if sys.stderr.isatty():
            from rich.console import Console as Terminal
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self._bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[counts]}"),
                                 TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
                                 console=Terminal(stderr=True))
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._stage and kind is None:
            self._say()

    def expect(self, stage: str, total: int) -> None:
        if self._bar is not None:
            self._task = self._bar.add_task(stage, total=total, counts="")
        elif self._stage:
            self._say()
        self._stage, self._total, self._bytes, self._images = stage, total, 0, 0
        self._began = self._said = time.monotonic()

    def advance(self, images: int, bytes: int) -> None:
        self._images += images
        self._bytes += bytes
        if self._bar is not None:
            self._bar.update(self._task, advance=bytes, counts=self._counts())
        elif time.monotonic() - self._said > PLAIN_SECONDS:
            self._say()

    def _counts(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        images = f"{self._images:,} images, {self._images / seconds:,.0f}/s, " if self._images else ""
        return f"{images}{self._bytes / 1e6:,.0f} MB, {self._bytes / 1e6 / seconds:,.0f} MB/s"

    def _say(self) -> None:
        seconds = time.monotonic() - self._began
        left = seconds * (self._total - self._bytes) / self._bytes if self._bytes else 0.0
        share = 100 * self._bytes / self._total if self._total else 100.0
        print(f"{self._stage}: {share:.0f}%, {self._counts()}, {seconds:.1f} s"
              f"{f', {left:.0f} s left' if left >= 1 else ''}", file=sys.stderr, flush=True)
        self._said = time.monotonic()
