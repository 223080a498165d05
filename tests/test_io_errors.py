"""Errors of the operating system: on one line, with thing, cause and remedy; a full disk is named whoever met it."""
import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.arrays import read_array
from pipeline.files import atomic_folder, atomic_write, file_sha256, read_json, sync
from pipeline.io_errors import explain, is_full
from pipeline.stats import Stats
from tools.cli import guarded
from tools.docs.reference import errors


def test_each_cause_is_one_line_with_thing_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for number, words in ((errno.ENOENT, "is not there; correct the name, restore it, or mount"),
                          (errno.EIO, "its disk reports an error (EIO)"),
                          (errno.EMFILE, "as many files open as it may; raise the limit (ulimit -n 65536)"),
                          (errno.EACCES, "may not be read or written by this user; change its permissions"),
                          (errno.ESTALE, "replaced it (ESTALE); mount its disk again"),
                          (errno.EROFS, "is mounted read-only; name")):
        line = explain(OSError(number, os.strerror(number), str(path)))
        assert line.startswith(f"file (={path}) ") and words in line and "\n" not in line
        assert explain(OSError(number, os.strerror(number))).startswith(
            "the current folder " if number == errno.ENOENT else "a file or folder ")
        assert explain(OSError(number, os.strerror(number)), path) == line
    assert explain(OSError(errno.EEXIST, "", str(tmp_path))).startswith(f"folder (={tmp_path}) is there already")
    for number in (errno.EUCLEAN, errno.EXDEV, errno.ENODEV, errno.EBADMSG):  # none that is common: the system's words
        for named in ((), (str(path),)):
            line = explain(OSError(number, os.strerror(number), *named))
            assert line.startswith(f"file (={path}) cannot be used" if named else "a file or folder cannot be used")
            assert f"({os.strerror(number)}); look" in line
    assert explain(OSError("a library's\nown text")) == "a library's own text"
    assert explain(OSError(17, "File exists", 3)).startswith("a file or folder is there already")


def test_what_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """read(2), mmap(2) and fsync(2) name no file."""
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    path = tmp_path / "file.npy"
    np.save(path, np.zeros(3))
    monkeypatch.setattr("hashlib.file_digest", fail)
    monkeypatch.setattr("numpy.load", fail)
    monkeypatch.setattr("pathlib.Path.read_bytes", fail)
    monkeypatch.setattr("os.fsync", fail)
    calls: list[Callable[[], object]] = [lambda: file_sha256(path), lambda: read_array(path, np.float64, (3,)),
                                         lambda: read_json(path), lambda: Stats.load(path), lambda: sync(path)]
    for call in calls:
        with pytest.raises(OSError) as error:
            call()
        assert error.value.filename == str(path)
    with pytest.raises(OSError) as error, atomic_write(tmp_path / "new") as file:
        file.write(b"1")
    assert error.value.filename == str(tmp_path / "new")


def test_a_full_disk_is_named_while_the_unfinished_file_is_there(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever writes: Python, NumPy, or torch, which hides the errno."""
    data = torch.zeros(3_000_000, dtype=torch.uint8)

    def python() -> None:
        with atomic_write(small_disk / "out") as file:
            file.write(data.numpy().tobytes())

    def numpy() -> None:
        with atomic_write(small_disk / "out") as file:
            np.savez(file, data=data.numpy())

    def folder_of_torch() -> None:
        with atomic_folder(small_disk / "out") as folder:
            torch.save(data, folder / "weights")

    assert not is_full(small_disk)
    for write in (python, numpy, folder_of_torch):
        assert guarded(write) == 2  # type: ignore[arg-type]
        assert capsys.readouterr().err == (f"error: file (={small_disk / 'out'}) cannot be written: the disk is full; make room "
                                           "there, or name another place\n")
        assert os.listdir(small_disk) == []
    (small_disk / "fill").write_bytes(bytes(1_500_000))
    assert is_full(small_disk / "none" / "below")


def test_a_file_that_grows_too_large_is_named(tmp_path: Path) -> None:
    code = (f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, {resource.RLIM_INFINITY}))\n"
            "import sys; from pathlib import Path; from pipeline.files import atomic_write; from tools.cli import guarded\n"
            "def write():\n    with atomic_write(Path(sys.argv[1])) as file:\n        file.write(bytes(20_000))\n"
            "sys.exit(guarded(write))")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True,
                          cwd=Path(__file__).parents[1])
    assert done.returncode == 2 and os.listdir(tmp_path) == []
    assert done.stderr.startswith(f"error: file (={tmp_path / 'out'}) cannot be written: files may not grow so large here")
    assert len(done.stderr.splitlines()) == 1


def test_a_file_that_grows_too_large_for_torch_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """torch speaks of positions."""
    def folder_of_torch() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            torch.save(torch.zeros(100_000), folder / "weights")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        code = guarded(folder_of_torch)  # type: ignore[arg-type]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2 and os.listdir(tmp_path) == []
    assert f"file (={tmp_path / 'out'}) cannot be written: files may not grow so large here" in capsys.readouterr().err


def test_what_libraries_say_of_threads(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And a tool says its own error whatever number a process has: only processes of one run share it."""
    for error in (RuntimeError("can't start new thread"), RuntimeError("Error in a pipeline\nResource temporarily unavailable"),
                  BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))):
        def work(error: Exception = error) -> None:
            raise error
        assert guarded(work) == 2
        said = capsys.readouterr().err
        assert "cannot be started: this user has as many processes and threads" in said and "; end other" in said, said
    monkeypatch.setenv("RANK", "1")

    def mistake() -> None:
        raise ValueError("index (=x) does not exist; make it")
    assert guarded(mistake) == 2 and capsys.readouterr().err == "error: index (=x) does not exist; make it\n"


def test_the_page_of_errors_is_what_the_program_says() -> None:
    """Else: python -m tools.docs.reference."""
    written = (Path(__file__).resolve().parents[1] / "docs/errors.md").read_text(encoding="utf-8")
    assert written == errors()


def test_names_with_control_characters_do_not_reach_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: print("index \x1b[2J\x9b1m\tof\nünits")) == 0
    assert capsys.readouterr().out == "index \\x1b[2J\\x9b1m\tof\nünits\n"
