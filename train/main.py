"""Train as a recipe says:

    python -m train.main --config train/recipes/X.yaml [--group.key=value …] [--resume] [--print_config]
    torchrun --nproc-per-node 2 -m train.main …          one tower per process
    torchrun --max-restarts 3 …                          resumes by itself after a process has failed

Exit codes (torchrun's own is 1 for any of them but 0; its report shows them):
    0   trained and tested
    2   a mistake in recipe, command line, index or run folder; nothing was done
    3   the loss or a gradient was not finite; the update was not made
    4   the machine failed: disk, memory, GPU, an archive, another process, all checkpoints damaged; or no progress
    75  stopped by SIGTERM, Ctrl-C or machine.stop_after, and saved: resume with --resume
    130 interrupted by Ctrl-C before training began
A second Ctrl-C kills at once.
"""

from __future__ import annotations

import signal
import sys
from typing import Sequence

if __name__ == "__main__":  # Ctrl-C while modules are imported ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from train.exit_codes import FAILED, INTERRUPTED, MISTAKE, NOT_FINITE, leave, recorded, speaks
from train.recipe import parse


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    try:
        request = parse(argv)
    except ValueError as error:
        return fail(error, MISTAKE, speaks())
    from train.checkpoint.checkpoint import NotWritten  # parsing a command line needs neither torch nor DALI
    from train.parallel.failure import position_of
    from train.parallel.topology import process_group
    from train.run import run
    from train.step import NotFinite

    config, machine = request.config, request.config.machine
    try:
        with process_group(towers=config.model.towers, parallel=config.parallel, device=machine.device,
                           timeout_s=machine.timeout_s, silence_s=machine.silence_s) as topology:
            return run(request, topology)
    except NotFinite as error:
        return fail(error, NOT_FINITE, speaks())
    except ValueError as error:
        return fail(error, MISTAKE, speaks())
    except MemoryError as error:  # Python's own has no text
        return fail(MemoryError(f"memory (={str(error) or 'used up'}) does not suffice; lower train.batch, "
                                "machine.test_batch or machine.prefetch"), FAILED)
    except NotWritten as error:
        return fail(error, FAILED, speaks())
    except (RuntimeError, OSError) as error:
        return fail(error, FAILED, position=position_of(error))  # each process has its own failure
    except KeyboardInterrupt:  # before signal handlers are installed, or a second one
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def fail(error: Exception, code: int, speaks: bool = True, position: str = "") -> int:
    """Print an error on one line, without a traceback (with one under `python -X dev`). Returns `code`."""
    if sys.flags.dev_mode:
        raise error
    if speaks:
        print(f"error: {position}{error}\n", end="", file=sys.stderr)  # in one write: processes share stderr
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    leave(recorded(main)(sys.argv[1:]))
