"""Commands of `alexnet` in processes forked from one that has imported everything, so that a trial takes a fraction of a second.

`Server` is that process (`python -m tests.helpers.forked_commands`); `Server.start` runs a command in a child of it, with output
into files, and limits, environment and mounts of its own.
"""
from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tests.helpers.runs import ROOT

MODULES = ("tools.alexnet", "tools.demo.__main__", "tools.build_index", "tools.compute_stats", "tools.pack_shards", "train.main",
           "train.run", "train.evaluate.__main__", "train.report.__main__", "train.export.__main__", "tools.show.__main__",
           "tools.profile_pipeline", "tools.run_study", "train.evaluate.predict", "train.report.plots", "scipy.io",
           "torch.distributed.run", "torch.distributed.checkpoint", "nvidia.dali.fn", "PIL.Image", "train.figures.neighbours")
NEW_MOUNTS, PRIVATE, READ_ONLY, REMOUNT, BIND = 0x20000, 0x40000 | 0x4000, 1, 32, 4096  # of unshare(2) and mount(2)


@dataclass
class Ended:
    """What a command left: its exit code (negative: the signal that ended it), None when it had to be killed; and its output."""
    code: int | None
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


@dataclass
class Command:
    """A command that runs."""
    server: Server
    pid: int
    folder: Path

    def signal(self, number: int) -> None:
        """To the process alone; what it has started must end by itself."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def runs(self) -> bool:
        return self.server.code(self.pid, 0) is None

    def wait(self, limit_s: float) -> Ended:
        """Its end; after `limit_s`, or when what it started lives for 10 s more, all are killed and there is no code."""
        code = self.server.code(self.pid, time.monotonic() + limit_s)
        deadline = time.monotonic() + 10
        while (left := _session(self.pid)) and code is not None:
            if time.monotonic() > deadline:
                code = None
            time.sleep(0.01)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        out, err = ((self.folder / name).read_text(errors="replace") for name in ("out", "err"))
        return Ended(code, out, err + (f"\nleft alone: {left}" if left else ""))


@dataclass
class Server:
    """The process that forks."""
    folder: Path
    _process: subprocess.Popen[bytes] = field(init=False)
    _codes: dict[int, int] = field(default_factory=dict)
    _count: int = 0

    def __post_init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-m", __name__], cwd=ROOT, stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE,
                                         env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})

    def start(self, *words: object, **request: Any) -> Command:
        """`limits`: number of setrlimit → value; `environment`; `read_only`: folders; `shm_kb`: size of /dev/shm; `cores`."""
        self._count += 1
        folder = self.folder / str(self._count)
        folder.mkdir()
        for name in ("out", "err"):  # here: the child may be killed before it could
            (folder / name).touch()
        text = json.dumps({"words": list(map(str, words)), "folder": str(folder), **request})
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(text.encode() + b"\n")
        self._process.stdin.flush()
        while True:
            answer = self._answer()
            if "pid" in answer:
                self._codes.pop(answer["pid"], None)  # of one before, whose number it has
                return Command(self, answer["pid"], folder)

    def run(self, *words: object, limit_s: float = 120, **request: Any) -> Ended:
        return self.start(*words, **request).wait(limit_s)

    def code(self, pid: int, deadline: float) -> int | None:
        assert self._process.stdout
        while pid not in self._codes:
            if not select.select([self._process.stdout], [], [], max(0, deadline - time.monotonic()))[0]:
                return None
            self._answer()
        return self._codes[pid]

    def _answer(self) -> dict[str, int]:
        assert self._process.stdout
        line = b""
        while not line.endswith(b"\n"):  # unbuffered, as `select` looks at the descriptor
            byte = os.read(self._process.stdout.fileno(), 1)
            assert byte, "the server of commands has ended"
            line += byte
        answer: dict[str, int] = json.loads(line)
        if "ended" in answer:
            self._codes[answer["ended"]] = answer["code"]
        return answer

    def close(self) -> None:
        self._process.communicate(timeout=60)


@contextlib.contextmanager
def server(folder: Path) -> Iterator[Server]:
    folder.mkdir()
    one = Server(folder)
    try:
        yield one
    finally:
        one.close()


def _session(leader: int) -> list[int]:
    """The processes of a session that live."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] not in "ZX":
                found.append(int(entry.name))
    return found


def _child(request: dict[str, Any]) -> NoReturn:
    """Becomes the command."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    folder = Path(request["folder"])
    for descriptor, path in enumerate((Path(os.devnull), folder / "out", folder / "err")):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.update(request.get("environment", {}))
    if "read_only" in request or "shm_kb" in request:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(NEW_MOUNTS) == 0 and libc.mount(b"none", b"/", None, PRIVATE, None) == 0
        for path in request.get("read_only", ()):
            name = os.fsencode(path)
            assert libc.mount(name, name, None, BIND, None) == 0
            assert libc.mount(None, name, None, BIND | REMOUNT | READ_ONLY, None) == 0
        if "shm_kb" in request:
            assert libc.mount(b"none", b"/dev/shm", b"tmpfs", 0, f"size={request['shm_kb']}k".encode()) == 0
    if "cores" in request:
        os.sched_setaffinity(0, range(request["cores"]))
    for number, value in request.get("limits", {}).items():
        resource.setrlimit(int(number), (value, value))
    sys.argv = ["alexnet", *request["words"]]
    if request["words"][0] == "torchrun":
        from torch.distributed.run import main
        main(request["words"][1:])
        os._exit(0)
    from tools.alexnet import script
    script()


def _serve() -> None:
    import importlib

    import train  # noqa: F401 (before torch: it says how idle threads wait)
    for name in MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.set_inheritable(answers.fileno(), False)
    requests = open(os.dup(0), "rb", buffering=0)
    os.dup2(2, 1)
    sys.argv = ["alexnet"]
    while True:
        if select.select([requests], [], [], 0.005)[0]:
            line = requests.readline()
            if not line:
                return
            pid = os.fork()
            if not pid:
                answers.close()
                requests.close()
                _child(json.loads(line))
            answers.write(json.dumps({"pid": pid}).encode() + b"\n")
        with contextlib.suppress(ChildProcessError):
            ended, status = os.waitpid(-1, os.WNOHANG)
            if ended:
                answers.write(json.dumps({"ended": ended, "code": os.waitstatus_to_exitcode(status)}).encode() + b"\n")


if __name__ == "__main__":
    _serve()
