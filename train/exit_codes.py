"""Exit codes of the commands; one-line errors instead of tracebacks; how a process ends.

Reads torchrun's variables by itself: a command line is parsed, and refused, before torch is imported.
"""

from __future__ import annotations

import os
import sys
from typing import Callable, NoReturn, Sequence

DONE, MISTAKE, NOT_FINITE, FAILED, STOPPED, INTERRUPTED = 0, 2, 3, 4, 75, 130


def speaks() -> bool:
    """Whether this process prints what all of them find alike: it is the only one, or the first."""
    return os.environ.get("RANK", "0") == "0"


def exit_code(work: Callable[[], None], memory_advice: str) -> int:
    """Do the work of a command; returns its exit code, after one line on stderr when it failed.

    Args:
        memory_advice: what to do when memory does not suffice.
    """
    try:
        work()
    except ValueError as error:
        if speaks():
            print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except MemoryError as error:
        print(f"error: memory (={str(error) or 'used up'}) does not suffice; {memory_advice}", file=sys.stderr)
        return FAILED
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return DONE


def recorded(command: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
    """A command whose unexpected exceptions go into torchrun's report with their tracebacks (torch's `record`)."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return command
    from torch.distributed.elastic.multiprocessing.errors import record  # imports torch
    return record(command)  # type: ignore[return-value]  # None for SystemExit(0) only


def leave(code: int) -> NoReturn:
    """End this process at once, everything being closed: taking libraries down takes seconds, may never end beside a dead
    process, and a signal that comes meanwhile would change the exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
