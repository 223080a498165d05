"""Exit codes of the commands; one-line errors instead of tracebacks; how a process ends.

Reads torchrun's variables by itself: a command line is parsed, and refused, before torch is imported.
"""
import os
import sys
from typing import Callable, NoReturn, Optional, Sequence

DONE, MISTAKE, NOT_FINITE, FAILED, STOPPED, INTERRUPTED = 0, 2, 3, 4, 75, 130


class CommonError(RuntimeError):
    """An error that all processes of a run raise alike, so one of them prints it."""
    code = FAILED


def is_main_process() -> bool:
    """Whether this process prints what all of them find alike: it is the only one, or the first."""
    return os.environ.get("RANK", "0") == "0"


def exit_code(work: Callable[[], Optional[int]], memory_advice: str) -> int:
    """Do the work of a command; returns its exit code, after one line on stderr when it failed. `memory_advice`: what to do when
    memory does not suffice."""
    try:
        return work() or DONE
    except ValueError as error:
        return _fail(error, MISTAKE, is_main_process())
    except CommonError as error:
        return _fail(error, error.code, is_main_process())
    except MemoryError as error:  # Python's own has no text
        return _fail(MemoryError(f"memory (={str(error) or 'used up'}) does not suffice; {memory_advice}"), FAILED)
    except (RuntimeError, OSError) as error:  # each process has its own: after rank, step and phase, which failure.py notes
        return _fail(error, FAILED, position="".join(f"{note}: " for note in getattr(error, "__notes__", ())))
    except KeyboardInterrupt:  # before signal handlers are installed, or a second one
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _fail(error: Exception, code: int, prints: bool = True, position: str = "") -> int:
    """Print an error on one line, without a traceback (with one under `python -X dev`)."""
    if sys.flags.dev_mode:
        raise error
    if prints:
        print(f"error: {position}{error}\n", end="", file=sys.stderr)  # in one write: processes share stderr
    return code


def with_torchrun_report(command: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
    """A command whose unexpected exceptions go into torchrun's report with their tracebacks (torch's `record`)."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return command
    from torch.distributed.elastic.multiprocessing.errors import record  # imports torch
    return record(command)  # type: ignore[return-value]  # None for SystemExit(0) only


def exit_now(code: int) -> NoReturn:
    """End this process at once, everything being closed: taking libraries down takes seconds, may never end beside a dead
    process, and a signal that comes meanwhile would change the exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
