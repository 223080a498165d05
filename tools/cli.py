"""How a command ends: exit code and one line on stderr, never a traceback for what a user did."""
import sys
from collections.abc import Callable


def guarded(work: Callable[[], None]) -> int:
    """Do the work of a command; returns its exit code: 0, 2 with the error's message, or 130 after Ctrl-C."""
    try:
        work()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
