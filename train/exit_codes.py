"""How every command begins and ends: exit codes, errors of one line instead of tracebacks, Ctrl-C, and a terminal or pipe that
cannot take the text.

Imports nothing heavy, and reads torchrun's variables by itself: a command line is parsed, and refused, before torch is imported.
"""
import contextlib
import errno
import faulthandler
import fcntl
import io
import json
import os
import select
import signal
import sys
import time
from types import FrameType
from typing import Any, Callable, NoReturn, Optional, Sequence, TextIO

from pipeline.io_errors import CAUSES, explain

DONE, MISTAKE, NOT_FINITE, FAILED, STOPPED, INTERRUPTED = 0, 2, 3, 4, 75, 130
EXIT_CODES = {  # code → why, what to do; docs/errors.md shows them
    DONE: ("done", "nothing"),
    1: ("a check failed: `doctor`: training would not work here; `index verify`: damage; `profile --fail-below`: too slow; "
        "`study`: some runs failed; torchrun: one of its processes ended with another code than 0, which its report shows",
        "read what was printed"),
    MISTAKE: ("a mistake in recipe, command line, index or folder; nothing was changed (tools: anything else that failed, too)",
              "correct what the line names"),
    NOT_FINITE: ("training: the loss or a gradient was not finite; the update was not made",
                 "lower the learning rate, or look at the images; --resume begins at the last checkpoint"),
    FAILED: ("the machine failed: disk, memory, GPU, an archive, a library, another process; or no progress",
             "mend what the line names, then the same command with --resume"),
    STOPPED: ("training: stopped by SIGTERM, Ctrl-C, a closed terminal or machine.stop_after, and saved",
              "--resume continues bit-exactly"),
    INTERRUPTED: ("Ctrl-C before there was anything to save", "start again; what was finished before is used"),
}


class CommonError(RuntimeError):
    """An error that all processes of a run raise alike, so one of them prints it."""
    code = FAILED


# Lines that DALI's decoders write about an image they cannot decode, as a pattern of sed.
_DECODER_ERROR = r"/\[ERROR\].*\[[[:alnum:]_-]*decoder[[:alnum:]_-]*\]/d"
_NO_THREAD = ("can't start new thread", "unable to start watchdog thread", "Resource temporarily unavailable")  # of libraries
CONTROLS = {number: f"\\x{number:02x}" for number in (*range(9), *range(11, 32), *range(127, 160))}  # but tab and newline
_filter: list[int] = []  # what descriptor 2 was, and the process that reads it now


def start_command(decodes: bool = False) -> None:
    """Begin a command, before it imports anything else: what the terminal's encoding lacks is replaced, and Ctrl-C ends it with
    130 and one line, also in the middle of an import. `decodes`: leave out what DALI's decoders write of a corrupt image."""
    signal.signal(signal.SIGINT, _interrupted)  # also where a shell has started it in the background, which ignores SIGINT
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # None: its descriptor is closed; this takes it
        setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if decodes:
        _hide_decoder_errors()
    faulthandler.enable(2)  # where threads were at a signal that ends the process: SIGBUS of a mapped file, SIGSEGV of a library


def _hide_decoder_errors() -> None:
    """DALI's decoders write to descriptor 2 themselves, in colours, whatever it is and whatever its settings say; the quarantine
    tells of such an image in our own line. A process of its own reads the descriptor, since a thread of this one could wait for
    Python's lock while a library that holds it waits for room in the pipe; it ends when the last writer has."""
    try:
        terminal = _above_standard(2)
        ends = os.pipe()
        reading, writing = map(_above_standard, ends)
        for end in ends:
            os.close(end)
        number = os.posix_spawnp("sed", ["sed", "-u", _DECODER_ERROR], os.environ, setsid=True, file_actions=[
            (os.POSIX_SPAWN_DUP2, reading, 0), (os.POSIX_SPAWN_DUP2, terminal, 1),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)])
    except OSError:  # descriptor 2 is closed, or there is no sed: those lines stay
        return
    os.dup2(writing, 2)
    os.close(reading)
    os.close(writing)
    sys.stderr = open(terminal, "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
    _filter[:] = [terminal, number]


def _above_standard(descriptor: int) -> int:
    """A copy of it above 2: one that takes the number of a closed standard stream would be taken for that stream."""
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)


def _end_filter() -> None:
    """Let it write what it has, before the shell's prompt comes; not for long, as others may write there still."""
    os.dup2(_filter[0], 2)
    for _ in range(50):
        if os.waitpid(_filter[1], os.WNOHANG)[0]:
            return
        time.sleep(0.01)


def _interrupted(number: int, frame: Optional[FrameType]) -> None:
    """A KeyboardInterrupt is lost, or becomes another error, in the middle of an import: there is nothing to tidy up yet."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"interrupted\n")
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def run_command(main: Callable[[list[str]], Optional[int]]) -> NoReturn:
    """Run a command that `start_command` has begun, and end the process with its exit code."""
    try:
        code = main(sys.argv[1:]) or DONE
    except SystemExit as end:  # argparse, after --help or a wrong option
        code = end.code if isinstance(end.code, int) else 1 if end.code else DONE
    exit_now(code)


def is_main_process() -> bool:
    """Whether this process prints what all of them find alike: it is the only one, or the first."""
    return os.environ.get("RANK", "0") == "0"


def exit_code(work: Callable[[], Optional[int]], memory_advice: str, interrupted: str = "interrupted",
              failed: int = FAILED) -> int:
    """Do the work of a command; returns its exit code, after one line on stderr when it failed. `memory_advice`: what to do when
    memory does not suffice. `failed`: the code for what is no mistake of the user's: MISTAKE for tools, which are no processes
    of one run, so that each prints its own."""
    prints = failed == MISTAKE or is_main_process()
    try:
        code = work() or DONE
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()  # here, where a full disk can be told
        return code
    except ValueError as error:
        return _fail(error, MISTAKE, prints)
    except CommonError as error:
        return _fail(error, error.code, prints)
    except MemoryError as error:  # Python's own has no text
        return _fail(MemoryError(f"memory (={str(error) or 'used up'}) does not suffice; {memory_advice}"), failed)
    except BrokenPipeError as error:
        return DONE if _nobody_reads(sys.stdout) else _fail(error, failed)  # … | head
    except ImportError as error:
        if (error.name or "").partition(".")[0] in ("pipeline", "model", "train", "tools"):
            raise
        return _fail(RuntimeError(f"module (={error.name or 'unknown'}) cannot be imported ({error}); `alexnet doctor` "
                                  "says what is missing and how to install it"), failed)
    except (RuntimeError, OSError) as error:  # each process has its own: after rank, step and phase, which failure.py notes
        return _fail(error, failed, position="".join(f"{note}: " for note in getattr(error, "__notes__", ())))
    except KeyboardInterrupt:  # before signal handlers are installed, or a second one
        _say(interrupted)
        return INTERRUPTED


class ToolOutput:
    """Standard output of a tool, which works on when the reader has closed it. Control characters, which names may hold, are
    escaped."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(BrokenPipeError):
            self.stream.write(text.translate(CONTROLS))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _nobody_reads(stream: TextIO) -> bool:
    """Whether a stream is a pipe whose reader has closed it. (A flush may not tell: what could not be written may be gone.)"""
    poll = select.poll()
    try:
        poll.register(stream.fileno(), select.POLLOUT)
    except (OSError, ValueError):  # not a file of the system
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _fail(error: Exception, code: int, prints: bool = True, position: str = "") -> int:
    """Print an error on one line, without a traceback (with one under `python -X dev`), and put it into torchrun's report: it may
    end the process that prints before that has printed."""
    if sys.flags.dev_mode:
        raise error
    text = explain(error) if isinstance(error, OSError) else str(error)
    if any(words in text for words in _NO_THREAD):
        text = f"thread (={text.splitlines()[-1]}) {'; '.join(CAUSES[errno.EAGAIN])}"
    line = f"{position}{printable(text)}"
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError), open(path, "x", encoding="utf-8") as file:  # one is there: train/parallel/failure.py's
            json.dump({"message": line, "timestamp": time.time()}, file)
    if prints:
        _say(f"error: {line}")
    return code


def _say(line: str) -> None:
    """A line on stderr, in one write, as processes share it; none when nobody can read it."""
    with contextlib.suppress(OSError):
        print(f"{line}\n", end="", file=sys.stderr, flush=True)


def printable(text: Any) -> str:
    """Text from an archive or a path, safe for a terminal: no control characters, no undecodable bytes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def with_torchrun_report(command: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
    """A command whose unexpected exceptions go into torchrun's report with their tracebacks (torch's `record`)."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return command
    from torch.distributed.elastic.multiprocessing.errors import record  # imports torch
    return record(command)  # type: ignore[return-value]  # None for SystemExit(0) only


def exit_now(code: int) -> NoReturn:
    """End this process at once, everything being closed: taking libraries down takes seconds, may never end beside a dead
    process, and a signal that comes meanwhile would change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe, a full disk
            stream.flush()
    if _filter:
        with contextlib.suppress(OSError):
            _end_filter()
    os._exit(code)
