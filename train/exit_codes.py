"""How a command ends: its exit codes, who says why, and the way out.

Reads one of torchrun's variables by itself: there may be something to say before torch is there.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

DONE, MISTAKE, NOT_FINITE, FAILED, STOPPED, INTERRUPTED = 0, 2, 3, 4, 75, 130


def speaks() -> bool:
    """Whether this process tells what all of them find alike: it is alone, or the first."""
    return os.environ.get("RANK", "0") == "0"


def leave(code: int) -> NoReturn:
    """End this process at once, everything being closed: taking libraries down takes seconds, may never end beside a dead
    process, and a signal that comes meanwhile would change the exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
