"""What the tools share: errors of one line, text safe for a terminal, progress on stderr."""
from collections.abc import Callable

from pipeline.progress import ProgressBar
from train.exit_codes import MISTAKE, exit_code, printable

__all__ = ["ProgressBar", "guarded", "printable"]


def guarded(work: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Do the work of a command; returns its exit code: what `work` returns (None: 0), 2 after an error that is the user's or the
    world's, 130 after Ctrl-C, each with one line on stderr and no traceback."""
    return exit_code(work, "close other programs, or ask for less", interrupted, failed=MISTAKE)
