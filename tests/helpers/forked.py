"""Processes of this repository's commands without the seconds in which an interpreter imports torch and DALI.

`Popen` is subprocess.Popen; but where its command is this interpreter with a module or script of this repository, a text (-c) or
torchrun, a server that has imported the libraries forks, and the fork runs it as the interpreter would: as `__main__`, with its
own arguments, environment, folder and descriptors, and its exit functions run. Commands that a fork starts are forks too. What
tests the start of an interpreter itself, or who is whose parent, takes subprocess. Where there is a GPU all processes are
ordinary ones, as CUDA may not be forked.
"""

from __future__ import annotations

import atexit
import functools
import gc
import inspect
import io
import json
import os
import pickle
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = "torch.distributed.run"
OURS = ("train.", "tools", "tests.")
# What an interpreter or a library reads while it starts: where one of these differs from the server's, an interpreter starts.
READ_AT_START = ("PYTHON", "LD_", "LC_", "LANG", "DALI_", "TRITON_", "MKL_")
THREADS = "OMP_NUM_THREADS"
_SIGNATURE = inspect.signature(subprocess.Popen._execute_child)  # type: ignore[attr-defined]
_address = ""  # of the server, in a process that may ask it


@functools.cache
def at_start() -> dict[str, str]:
    """The environment in which the server starts: that of the first call."""
    return dict(os.environ)


@functools.cache
def _server() -> str:
    """The address of this process's server; started with the first command, it ends with this process."""
    if _address:
        return _address
    folder = tempfile.TemporaryDirectory(prefix="forked-")
    atexit.register(folder.cleanup)
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", "from tests.helpers import forked; forked.serve()", f"{folder.name}/socket"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**at_start(), "PYTHONPATH": str(ROOT), THREADS: "1", "OPENBLAS_NUM_THREADS": "1"})
    assert process.stdout is not None and process.stdout.read(1) == b"x", "the server did not start"
    atexit.register(process.communicate)  # its standard input closed, it ends
    return f"{folder.name}/socket"


def _command(args: Any, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the server is asked for; None for what needs an interpreter of its own."""
    import torch

    if isinstance(args, (str, bytes)) or torch.cuda.is_available():
        return None
    words = [os.fsdecode(word) for word in args]
    if words[:1] != [sys.executable] or any(options.get(name) for name in ("shell", "preexec_fn", "executable", "pass_fds")):
        return None
    rest, strict, unbuffered = words[1:], False, False
    while rest and (rest[0] == "-u" or rest[:2] == ["-W", "error"]):
        strict, unbuffered = strict or rest[0] == "-W", unbuffered or rest[0] == "-u"
        rest = rest[1 if rest[0] == "-u" else 2:]
    how = rest[0] if rest[:1] in (["-m"], ["-c"]) and len(rest) > 1 else ""
    folder = Path(options.get("cwd") or Path.cwd())
    if not how and not (rest and rest[0].endswith(".py")) or how == "-m" and rest[1] != TORCHRUN and not rest[1].startswith(OURS):
        return None
    if how:
        rest = rest[1:]
    given = options.get("env")
    environment = dict(os.environ if given is None else given)

    def read_at_start(of: Mapping[str, str]) -> dict[str, str]:
        return {name: value for name, value in of.items() if name.startswith(READ_AT_START) and name != "PYTHONPATH"}
    if read_at_start(environment) != read_at_start(at_start()):
        return None
    if folder.resolve() != ROOT and str(ROOT) not in environment.get("PYTHONPATH", "").split(os.pathsep) and not (
            not how and (folder / rest[0]).resolve().is_relative_to(ROOT)):
        return None
    return {"how": how, "words": rest, "strict": strict, "unbuffered": unbuffered or bool(environment.get("PYTHONUNBUFFERED")),
            "cwd": str(folder), "environment": environment, "session": bool(options.get("start_new_session"))}


class Popen(subprocess.Popen[Any]):
    """subprocess.Popen, of a fork where it may be one."""
    _connection: socket.socket | None = None

    def _execute_child(self, *given: Any) -> None:
        options = _SIGNATURE.bind(self, *given).arguments
        request = _command(options["args"], options)
        if request is None:
            super()._execute_child(*given)  # type: ignore[misc]
            return
        ends = [options[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.connect(_server())
            text = json.dumps(request).encode()
            descriptors = [end if end != -1 else number for number, end in enumerate((ends[0], ends[3], ends[5]))]
            socket.send_fds(connection, [len(text).to_bytes(8, "big")], descriptors)
            connection.sendall(text)
            self.pid = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "big")
            assert self.pid, "the server has ended"
            self._connection, self._child_created = connection, True
        finally:
            self._close_pipe_fds(*ends)  # type: ignore[attr-defined]

    def _try_wait(self, flags: int) -> tuple[int, int]:
        if self._connection is None:
            return super()._try_wait(flags)  # type: ignore[misc, no-any-return]
        if flags & os.WNOHANG and not select.select([self._connection], [], [], 0)[0]:
            return 0, 0
        with self._connection:
            status = self._connection.recv(8, socket.MSG_WAITALL)
        return self.pid, int.from_bytes(status, "big") if status else signal.SIGKILL

    def _internal_poll(self, *args: Any, **options: Any) -> int | None:
        if self._connection is None:
            return super()._internal_poll(*args, **options)  # type: ignore[misc, no-any-return]
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)  # type: ignore[attr-defined]
        return self.returncode


def run(command: Sequence[Any], **options: Any) -> subprocess.CompletedProcess[str]:
    """subprocess.run with `capture_output` and text, of a fork where it may be one."""
    timeout, check = options.pop("timeout", None), options.pop("check", False)
    with Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    if check and process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, out, err)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


_CALL = """
import pickle, sys
paths, call = pickle.load(open(sys.argv[1], "rb"))
sys.path[:] = paths
function, arguments = pickle.loads(call)
function(int(sys.argv[2]), *arguments)
"""


def spawn(function: Callable[..., None], arguments: tuple[Any, ...], count: int, folder: Path,
          codes: Sequence[int] | None = None) -> None:
    """Call a function of a module as `function(rank, *arguments)` in so many processes, which end with `codes` (0). `folder`: for
    the call."""
    path = folder / "call.pickle"
    path.write_bytes(pickle.dumps((sys.path, pickle.dumps((function, arguments)))))
    processes = [Popen([sys.executable, "-c", _CALL, path, str(rank)], cwd=ROOT, text=True, stderr=subprocess.PIPE)
                 for rank in range(count)]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == list(codes or [0] * count), "\n".join(said)


def together(folder: Path, rank: int, count: int = 2) -> None:
    """Return when all processes of a `spawn` have come here."""
    (folder / f"ready{rank}").touch()
    while not all((folder / f"ready{other}").exists() for other in range(count)):
        time.sleep(0.001)


def serve() -> None:
    """The server: import what commands import, then fork for each connection until standard input is closed."""
    global _address
    _address = sys.argv[1]
    at_start()
    import train.run  # noqa: F401
    import train.evaluate.predict  # noqa: F401
    import pipeline.packing.pack  # noqa: F401
    import pytest  # noqa: F401
    from torch.distributed import run as _  # noqa: F401
    assert len(os.listdir("/proc/self/task")) == 1, "threads are not forked"
    gc.collect()
    gc.freeze()
    awake, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(awake, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    connections: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(_address)
        listening.listen(64)
        os.write(1, b"x")
        while True:
            ready = select.select([listening, awake, 0], [], [])[0]
            if awake in ready:
                os.read(awake, 4096)
                _report_ended(connections)
            if listening in ready:
                connection, _address_of_client = listening.accept()
                request, descriptors = _receive(connection)
                pid = os.fork()
                if not pid:
                    break
                for descriptor in descriptors:
                    os.close(descriptor)
                connections[pid] = connection
                connection.sendall(pid.to_bytes(8, "big"))
            elif 0 in ready:
                os._exit(0)
    for other in (connection, *connections.values()):
        other.close()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.close(awake)
    os.close(wake)
    _become(request, descriptors)


def _report_ended(connections: dict[int, socket.socket]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        with connections.pop(pid) as connection:
            try:
                connection.sendall(status.to_bytes(8, "big"))
            except OSError:
                pass  # who asked for it has gone


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    size, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
    left, parts = int.from_bytes(size, "big"), []
    while left:
        parts.append(connection.recv(left))
        left -= len(parts[-1])
    return json.loads(b"".join(parts)), descriptors


def _become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Turn this fork into the process that was asked for, and run its command to its end."""
    if request["session"]:
        os.setsid()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    for descriptor in descriptors:
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as importing train does
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        old = getattr(sys, name)
        raw = open(number, f"{mode}b", buffering=0 if mode == "w" and request["unbuffered"] else -1, closefd=False)
        new = io.TextIOWrapper(raw, encoding=old.encoding, errors=old.errors, write_through=request["unbuffered"],
                               line_buffering=number == 2 or os.isatty(number))
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    import torch
    if (threads := os.environ.get(THREADS)) != "1":
        torch.set_num_threads(int(threads) if threads else len(os.sched_getaffinity(0)))
    if not request["strict"]:
        sys.warnoptions.clear()
        warnings.filters.remove(("error", None, Warning, None, 0))  # type: ignore[attr-defined]
        warnings.simplefilter("default", append=True)
    subprocess.Popen = Popen  # type: ignore[misc]
    import torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler as handler
    handler.Popen = Popen  # type: ignore[attr-defined]
    how, first = request["how"], request["words"][0]
    sys.argv = ["-c" if how == "-c" else first, *request["words"][1:]]
    sys.path[0] = str(Path(first).parent) if not how else request["cwd"] if how == "-m" else ""
    code: Any = 0
    try:
        if how == "-m":
            if first == TORCHRUN:  # it names its caller in its log: half a second each time, with so much imported
                inspect.stack = lambda: [types.SimpleNamespace(function=frame.f_code.co_name)  # type: ignore[assignment]
                                         for frame, _ in traceback.walk_stack(sys._getframe(1))]
            sys.modules.pop(first, None)
            runpy.run_module(first, run_name="__main__", alter_sys=True)
        elif how == "-c":
            exec(compile(first, "<string>", "exec"), sys.modules["__main__"].__dict__)
        else:
            runpy.run_path(first, run_name="__main__")
    except SystemExit as end:
        code = end.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code or 0)  # without half a second in which all that was imported is taken down
