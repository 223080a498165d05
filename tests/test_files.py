"""Atomic files and folders, temporaries of dead writers, locks, manifests."""
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.arrays import read_array
from pipeline.files import (LockHeld, atomic_folder, atomic_write, difference, file_entries, is_temporary, json_line, json_sha256,
                            lock, parse_line, read_json, read_manifest, remove_dead, with_own_hash, write_json)

ROOT = Path(__file__).resolve().parents[1]


def test_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(path) as file:
        file.write(b"one")
        assert not path.exists() and [is_temporary(found) for found in tmp_path.iterdir()] == [True]
    assert path.read_bytes() == b"one"
    with pytest.raises(KeyError), atomic_write(path) as file:
        file.write(b"two")
        raise KeyError
    assert path.read_bytes() == b"one" and os.listdir(tmp_path) == ["file"]
    with atomic_write(path) as file:
        file.write(b"three")
    assert path.read_bytes() == b"three" and os.listdir(tmp_path) == ["file"]


def test_folder_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with pytest.raises(KeyError), atomic_folder(path) as folder:
        (folder / "file").write_text("half")
        raise KeyError
    assert os.listdir(tmp_path) == []
    with atomic_folder(path) as folder:
        (folder / "below").mkdir()
        (folder / "below" / "file").write_text("whole")
        assert is_temporary(folder) and not path.exists() and remove_dead(tmp_path) == []
    assert (path / "below" / "file").read_text() == "whole" and os.listdir(tmp_path) == ["folder"]
    with pytest.raises(OSError), atomic_folder(path) as folder:
        (folder / "file").write_text("another")
    assert os.listdir(path) == ["below"] and os.listdir(tmp_path) == ["folder"]
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "none" / "folder"):
        pass


def test_a_folder_that_cannot_be_opened_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
    monkeypatch.setattr("pipeline.files.os.open", refuse)
    with pytest.raises(OSError) as error, atomic_folder(tmp_path / "folder"):
        pass
    assert error.value.errno == errno.EMFILE and os.listdir(tmp_path) == []
    monkeypatch.undo()
    monkeypatch.setattr("pipeline.files.Path.exists", refuse)
    with pytest.raises(OSError) as error, atomic_write(tmp_path / "file"):
        pass
    assert error.value.errno == errno.EMFILE and os.listdir(tmp_path) == []


def test_json_of_any_content_is_read_or_refused(tmp_path: Path) -> None:
    for text in (b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"\xff", b"", b"[1"):
        (tmp_path / "file").write_bytes(text)
        with pytest.raises(ValueError, match="^is not JSON$"):
            read_json(tmp_path / "file")


def test_any_flipped_bit_of_a_line_is_found() -> None:
    values = {"kind": "step", "step": 12, "loss": 2.25, "text": "é\n", "below": {"x": [True, None]}}
    line = json_line(values)
    assert parse_line(line[:-1]) == values == {key: value for key, value in json.loads(line).items() if key != "crc32"}
    for bit in range(8 * (len(line) - 1)):
        damaged = bytearray(line[:-1])
        damaged[bit // 8] ^= 1 << bit % 8
        found = parse_line(bytes(damaged))
        assert found is None or found.items() >= values.items(), "only the name of the key crc32 is another"
    for text in (b"", b"[1]", b"{", b"[" * 100_000, b"\xff", line[:-2], line[1:-1]):
        assert parse_line(text) is None
    assert parse_line(b'{"id": 3}') == {"id": 3}  # of an earlier version


@pytest.mark.parametrize(("header", "shape", "words"), [
    ("{'descr': '<f4', 'fortran_order': False, 'shape': " + "(" * 300, (3,), "is no array"),
    ("{'descr': '<f4', 'fortran_order': False, 'shape': (-3,)}", (3,), "is no array"),
    ("{'descr': '|O', 'fortran_order': False, 'shape': (3,)}", (3,), "is no array"),
    ("{'descr': '<f4', 'fortran_order': False, 'shape': (9000000000000000000,)}", (3,), "is no array"),
    ("{'descr': '<f4', 'fortran_order': False, 'shape': (3,)}", (4,), r"holds \(3,\) float32, not \(4,\) float32"),
    ("{'descr': '<f4', 'fortran_order': False, 'shape': (3,)}", (-1, 1), r"holds \(3,\) float32, not \(-1, 1\) float32"),
    ("{'descr': '>f4', 'fortran_order': False, 'shape': (3,)}", (3,), r"holds \(3,\) >f4, not \(3,\) float32")])
def test_arrays_of_any_header_are_read_or_refused(tmp_path: Path, header: str, shape: tuple[int, ...], words: str) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode() + bytes(12))
    with pytest.raises(ValueError, match=f"^{words}"):
        read_array(path, np.float32, shape)


def test_arrays_that_are_none(tmp_path: Path) -> None:
    with open(tmp_path / "zip", "wb") as file:
        np.savez(file, a=np.zeros(3))
    (tmp_path / "empty").touch()
    for name, words in (("zip", "holds several arrays"), ("empty", "is no array")):
        with pytest.raises(ValueError, match=words):
            read_array(tmp_path / name, np.float32, (3,))
    np.save(tmp_path / "one.npy", np.ones((3, 2), np.float32))
    assert read_array(tmp_path / "one.npy", np.float32, (3, -1)).shape == (3, 2)


def run_writer(tmp_path: Path, name: str, code: str) -> subprocess.Popen[str]:
    """A process in the midst of writing `name` until its stdin ends."""
    code = ("import sys\nfrom pathlib import Path\nfrom pipeline.files import *\n"
            f"{code}print('ready', flush=True); sys.stdin.read()\n")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / name)], cwd=ROOT, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_only_the_temporaries_of_the_dead_are_removed(tmp_path: Path) -> None:
    file = "with atomic_write(Path(sys.argv[1])) as file:\n    file.write(b'half'); file.flush(); "
    folder = "with atomic_folder(Path(sys.argv[1])) as folder:\n    (folder / 'file').write_bytes(b'half'); "
    dead, live = ([run_writer(tmp_path, f"{kind}-file", file), run_writer(tmp_path, f"{kind}-folder", folder)]
                  for kind in ("dead", "live"))
    for process in dead:
        process.kill()
        process.communicate()
    (tmp_path / "other").write_text("not ours")
    (tmp_path / ".other.tmp").write_text("not ours")
    assert [path.name.split(".")[1] for path in remove_dead(tmp_path, "dead-folder")] == ["dead-folder"]
    assert [path.name.split(".")[1] for path in remove_dead(tmp_path)] == ["dead-file"]
    assert remove_dead(tmp_path) == []
    for process in live:
        process.communicate("")
    assert sorted(os.listdir(tmp_path)) == [".other.tmp", "live-file", "live-folder", "other"]
    assert (tmp_path / "live-file").read_bytes() == (tmp_path / "live-folder" / "file").read_bytes() == b"half"


def test_what_is_written_again_leaves_no_temporary_of_a_dead_writer(tmp_path: Path) -> None:
    dead, other = tmp_path / ".page.html.host.1.0123abcd.tmp", tmp_path / ".else.html.host.1.0123abcd.tmp"
    dead.write_bytes(b"half")
    other.write_bytes(b"half")
    with atomic_write(tmp_path / "page.html") as file:
        file.write(b"whole")
    assert sorted(tmp_path.iterdir()) == [other, tmp_path / "page.html"]
    (tmp_path / ".weights.host.1.0123abcd.tmp").mkdir()
    with atomic_folder(tmp_path / "weights"):
        pass
    assert sorted(tmp_path.iterdir()) == [other, tmp_path / "page.html", tmp_path / "weights"]


def test_lock_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    process = run_writer(tmp_path, ".lock", "file = lock(Path(sys.argv[1])); ")
    with pytest.raises(LockHeld, match=rf"^pid {process.pid} on .* since 2"):
        lock(tmp_path / ".lock")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with lock(tmp_path / ".lock") as first:
        with pytest.raises(LockHeld, match=f"^pid {os.getpid()} on "):
            lock(tmp_path / ".lock")
        assert not first.closed
    lock(tmp_path / ".lock", wait=True).close()


def test_manifest_tells_what_differs(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"bytes")
    manifest = with_own_hash({"format": 1, "files": file_entries(tmp_path, ["file"])})
    write_json(tmp_path / "manifest.json", manifest)
    content = read_manifest(tmp_path / "manifest.json", own_hash=True)
    entry = content["files"]["file"]
    assert "sha256" not in content and manifest["sha256"] == json_sha256(content) and entry["size"] == 5
    assert difference(tmp_path / "file", entry) == ""
    (tmp_path / "file").write_bytes(b"BYTES")
    assert difference(tmp_path / "file", entry).startswith("has SHA-256 ")
    (tmp_path / "file").write_bytes(b"byte")
    assert difference(tmp_path / "file", entry) == "has 4 bytes, was written with 5"
    (tmp_path / "file").unlink()
    assert difference(tmp_path / "file", entry) == "is missing"
    write_json(tmp_path / "manifest.json", {**manifest, "format": 2})
    assert read_manifest(tmp_path / "manifest.json")["format"] == 2
    with pytest.raises(ValueError, match="^does not match its SHA-256"):
        read_manifest(tmp_path / "manifest.json", own_hash=True)
    for text, problem in ((json.dumps([1]), "is not a JSON object"), ("{", "is not JSON")):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=f"^{problem}$"):
            read_manifest(tmp_path / "manifest.json")
    for name, changed in (("../file", entry), ("file", {**entry, "size": "5"}), ("file", {"size": 5}), ("file", [])):
        write_json(tmp_path / "manifest.json", with_own_hash({"files": {name: changed}}))
        with pytest.raises(ValueError, match="^is not as it was written: "):
            read_manifest(tmp_path / "manifest.json", own_hash=True)
