"""What the commands share: exit codes and errors of one line, text safe for a terminal, progress on stderr."""

from __future__ import annotations

import io
import os
import sys
import time
from types import TracebackType
from typing import Any, Callable

PLAIN_SECONDS = 10.0  # between two plain lines


def guarded(work: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Do the work of a command; returns its exit code: what `work` returns (None: 0), 2 after an error that is the user's or the
    world's, 130 after Ctrl-C, each with one line on stderr and no traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks is no error
    try:
        code = work() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # ls | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except MemoryError as error:
        print(f"error: not enough memory ({error}); close other programs, or ask for less", file=sys.stderr)
        return 2
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2


def printable(text: Any) -> str:
    """Text from an archive or a path, safe for a terminal: no control characters, no undecodable bytes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


class ProgressBar:
    """Progress of long work on stderr: a rich bar with rate and time left on a terminal, plain lines otherwise.

    A `pipeline.parallel.Progress`; a context manager, so that the bar is taken down whatever happens.
    """

    def __init__(self) -> None:
        self._stage, self._total, self._bytes, self._images = "", 0, 0, 0
        self._start = self._printed = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "ProgressBar":
        if sys.stderr.isatty():
            from rich.console import Console  # 0.2 s
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self._bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[counts]}"),
                                 TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True))
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._stage and kind is None:
            self._print()

    def expect(self, stage: str, total: int) -> None:
        if self._bar is not None:
            self._task = self._bar.add_task(stage, total=total, counts="")
        elif self._stage:
            self._print()
        self._stage, self._total, self._bytes, self._images = stage, total, 0, 0
        self._start = self._printed = time.monotonic()

    def advance(self, images: int, bytes: int) -> None:
        self._images += images
        self._bytes += bytes
        if self._bar is not None:
            self._bar.update(self._task, advance=bytes, counts=self._counts())
        elif time.monotonic() - self._printed > PLAIN_SECONDS:
            self._print()

    def _counts(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        images = f"{self._images:,} images, {self._images / seconds:,.0f}/s, " if self._images else ""
        return f"{images}{self._bytes / 1e6:,.0f} MB, {self._bytes / 1e6 / seconds:,.0f} MB/s"

    def _print(self) -> None:
        seconds = time.monotonic() - self._start
        left = seconds * (self._total - self._bytes) / self._bytes if self._bytes else 0.0
        share = 100 * self._bytes / self._total if self._total else 100.0
        print(f"{self._stage}: {share:.0f}%, {self._counts()}, {seconds:.1f} s"
              f"{f', {left:.0f} s left' if left >= 1 else ''}", file=sys.stderr, flush=True)
        self._printed = time.monotonic()
