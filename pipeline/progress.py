"""Progress of long work as a line on stderr."""
import contextlib
import sys
import time
from types import TracebackType

from pipeline.process_pool import Progress

LINE_S = 10.0  # seconds between two lines where no terminal is


class ProgressBar(Progress):
    """Progress of long work on stderr, with rate and time left: a line that changes on a terminal, else one now and then."""

    def __init__(self) -> None:
        self._stage, self._total, self._bytes, self._images = "", 0, 0, 0
        self._start = self._printed = 0.0
        self._is_terminal = sys.stderr.isatty()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._stage and (kind is None or self._is_terminal):
            self._print("\n")

    def expect(self, stage: str, total: int) -> None:
        if self._stage:
            self._print("\n")
        self._stage, self._total, self._bytes, self._images = stage, total, 0, 0
        self._start = self._printed = time.monotonic()

    def advance(self, images: int, bytes: int) -> None:
        self._images += images
        self._bytes += bytes
        if time.monotonic() - self._printed > (0.2 if self._is_terminal else LINE_S):
            self._print("" if self._is_terminal else "\n")

    def _print(self, end: str) -> None:
        self._printed = time.monotonic()
        seconds = max(self._printed - self._start, 1e-9)
        left = seconds * (self._total - self._bytes) / self._bytes if self._bytes else 0.0
        share = 100 * self._bytes / self._total if self._total else 100.0
        images = f"{self._images:,} images, {self._images / seconds:,.0f}/s, " if self._images else ""
        line = (f"{self._stage}: {share:.0f}%, {images}{self._bytes / 1e6:,.0f} MB, {self._bytes / 1e6 / seconds:,.0f} MB/s, "
                f"{seconds:.1f} s{f', {left:.0f} s left' if left >= 1 else ''}")
        with contextlib.suppress(OSError):  # nobody reads it any more; the work goes on
            print(f"\r\x1b[K{line}" if self._is_terminal else line, end=end, file=sys.stderr, flush=True)
