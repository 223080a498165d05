"""Progress of long work as a line on stderr."""
import contextlib
import datetime
import shutil
import sys
import time
from types import TracebackType

from pipeline.process_pool import Progress

LINE_START = "\r\x1b[K"  # on a terminal: write over the line that is there
LINE_S = 10.0  # seconds between two lines where no terminal is


class ProgressBar(Progress):
    """Progress of long work on stderr, with rate and time left: a line within 80 columns that changes on a
    terminal, else one now and then; the first at once."""

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
        self._start = time.monotonic()
        self._print("" if self._is_terminal else "\n")

    def advance(self, images: int, bytes: int) -> None:
        self._images += images
        self._bytes += bytes
        if time.monotonic() - self._printed > (0.2 if self._is_terminal else LINE_S):
            self._print("" if self._is_terminal else "\n")

    def _print(self, end: str) -> None:
        self._printed = time.monotonic()
        seconds = max(self._printed - self._start, 1e-9)
        figures = f"{min(100 * self._bytes / self._total, 100) if self._total else 100:.0f}% of {size_text(self._total)}"
        if self._images:
            figures += f", {self._images:,} images, {self._images / seconds:,.0f}/s"
        if self._bytes >= self._total:
            figures += f", {seconds:.1f} s"
        elif self._bytes:
            left = datetime.timedelta(seconds=round(seconds * (self._total - self._bytes) / self._bytes))
            figures += f", {size_text(self._bytes / seconds)}/s, {left} left"
        room = shutil.get_terminal_size().columns - len(figures) - 3  # the last column is left free
        stage = self._stage if len(self._stage) <= room else self._stage[:max(8, room - 3)] + "..."
        with contextlib.suppress(OSError):  # nobody reads it any more; the work goes on
            print(f"{LINE_START * self._is_terminal}{stage}: {figures}", end=end, file=sys.stderr, flush=True)


def size_text(count: float) -> str:
    """Bytes for a person: 1.2 MB, 34 MB, 5.6 GB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB" if count >= 1e7 else f"{count / 1e6:,.1f} MB"
