import gc
import json
import logging
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline.resident import capacity as room, ram_store as store
from pipeline.resident.store import Layout
from pipeline.resident.gpu_store import GpuStore
from pipeline.resident.ram_store import RamStore

FORM, SHA = Layout("rgb", 10, 7), "ab" * 32
ROWS = 40


def squares(rows: int = ROWS) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (rows, 10, 10, 3)).astype(np.uint8))


def opened(folder: Path, form: Layout = FORM, sha: str = SHA) -> RamStore:
    return RamStore(folder, "train", sha, ROWS, form)


def holds(found: RamStore, places: npt.NDArray[np.int64]) -> bool:
    return all(np.array_equal(found.pixels[place], found.layout.encode(squares()[place].numpy())) for place in places)


@pytest.mark.parametrize("kind", ["rgb", "yuv420"])
def test_what_is_put_is_there_for_all_and_after_a_restart(tmp_path: Path, kind: str) -> None:
    form = Layout(kind, 10, 7)
    first, second = opened(tmp_path, form), opened(tmp_path, form)
    assert first.path == second.path == tmp_path / f"train-10-{kind}-cpu-abababababababab.squares" and not first.have.any()
    places = np.array([3, 39, 0])
    first.put(places, squares()[places])
    assert np.flatnonzero(second.have).tolist() == [0, 3, 39] and holds(second, places)
    second.put(np.array([3, 4]), squares()[[5, 4]])  # row 3 is there already and stays
    assert holds(first, np.array([0, 3, 4, 39])) and np.count_nonzero(first.have) == 4
    assert np.array_equal(first.crop(4, 2, 1).numpy(), form.crop(form.encode(squares()[4].numpy()), 2, 1))
    again = opened(tmp_path, form)
    assert again.note == "" and np.count_nonzero(again.have) == 4 and not again.sealed
    header = json.loads(again.path.read_bytes()[:4095])
    assert header["kind"] == kind and header["rows"] == ROWS and header["split_sha256"] == SHA


def test_other_squares_have_other_files(tmp_path: Path) -> None:
    found = {opened(tmp_path, Layout(kind, size, 7), sha).path for kind in ("rgb", "yuv420") for size in (10, 12)
             for sha in (SHA, "cd" * 32)}
    assert len(found) == 8


def test_a_file_that_is_not_what_its_name_says_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = opened(tmp_path).path
    whole = path.read_bytes()
    other = whole.replace(b'"split_sha256": "ababab', b'"split_sha256": "ababac')
    for content in (other, b"", b"\0" * len(whole), whole[:-1], b"[]".ljust(len(whole), b" ")):
        path.write_bytes(content)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = opened(tmp_path)
        assert found.note == f"resident store {path} does not hold these images; it is made anew"
        assert caplog.messages == [found.note] and not found.have.any() and opened(tmp_path).note == ""
    path.write_bytes(whole.replace(b'"version": 3', b'"version": 2'))
    assert opened(tmp_path).note == f"resident store {path} is of version 2, not 3; it is made anew"


def test_a_file_that_becomes_shorter_or_cannot_be_read_is_an_error_and_no_signal(tmp_path: Path) -> None:
    opened(tmp_path).put(np.arange(ROWS), squares())
    found, none = opened(tmp_path), np.zeros(1, np.int64)
    readable = os.dup(found._file)
    os.dup2(os.open(tmp_path, os.O_RDONLY), found._file)  # a read fails with EISDIR there
    with pytest.raises(RuntimeError, match=r"resident store: file .* is a folder, not a file; .*or remove it: it is made anew"):
        found.check(np.arange(3))
    os.dup2(readable, found._file)
    os.truncate(found.path, found.path.stat().st_size - 4096)
    for take in (found.crops, found.located):
        with pytest.raises(RuntimeError, match="has become shorter than its 20192 bytes while in use; resume"):
            take([(none, none, none)])


def test_after_the_machine_stopped_only_a_complete_file_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boot = tmp_path / "boot_id"
    boot.write_text("one\n")
    monkeypatch.setattr(store, "_BOOT", boot)
    found = opened(tmp_path)
    found.put(np.arange(30), squares()[:30])
    path = found.path
    del found  # with the machine go its processes
    gc.collect()
    boot.write_text("two\n")
    again = opened(tmp_path)
    assert again.note == f"resident store {path} was not complete when the machine stopped; it is filled anew"
    assert not again.have.any()
    again.put(np.arange(39), squares()[:39])  # row 39 cannot be read, let us say: then nothing is left to fill
    again.seal()
    again.seal()
    again.close()
    assert again.sealed
    boot.write_text("three\n")
    last = opened(tmp_path)
    assert last.note == "" and last.sealed and np.count_nonzero(last.have) == 39 and holds(last, np.arange(39))
    last.put(np.array([39]), squares()[39:])  # it can be read now
    assert opened(tmp_path).have.all() and holds(last, np.arange(40))


def filler(folder: Path, rank: int, gate: "multiprocessing.synchronize.Barrier") -> None:
    gate.wait()
    found = opened(folder)
    for place in np.random.default_rng(rank).permutation(ROWS)[:30]:
        found.put(np.array([place]), squares()[[place]])


def test_processes_that_start_together_fill_one_file(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    gate = spawn.Barrier(2)
    processes = [spawn.Process(target=filler, args=(tmp_path, rank, gate)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 2
    expected = {place for rank in range(2) for place in np.random.default_rng(rank).permutation(ROWS)[:30].tolist()}
    found = opened(tmp_path)
    assert set(np.flatnonzero(found.have).tolist()) == expected and holds(found, np.array(sorted(expected)))
    assert {path.suffix for path in tmp_path.iterdir()} == {".squares", ".lock"}


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match=r"resident store: .* lies below a file, which is no folder; correct the name "
                                           r"\(machine.resident_folder\)"):
        opened(tmp_path / "file" / "folder")
    found = opened(tmp_path)
    readable = os.open(found.path, os.O_RDONLY)
    os.dup2(readable, found._file)  # as if the disk refused
    os.close(readable)
    with pytest.raises(RuntimeError, match=r"resident store: file \(=.*squares\) cannot be used \(Bad file descriptor\); "):
        found.put(np.array([1]), squares()[:1])
    assert not found.have.any()


def test_what_does_not_fit_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"data.resident \(=rgb\) needs 300000000000.0 GB for 1,000,000,000,000,000,000 "
                                           r"squares, and of .* may be used; use data.tier: packed$"):
        RamStore(tmp_path, "train", SHA, 10 ** 18, FORM)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


IMAGENET = (1_281_167, Layout("rgb", 256, 227).row_bytes)


def refusal(check: Callable[..., None], *arguments: object) -> str:
    with pytest.raises(RuntimeError) as caught:
        check("rgb", *IMAGENET, *arguments)
    return str(caught.value)


def test_refusals_name_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    have, free = (200 * 10 ** 9, "the machine's memory"), 200 * 10 ** 9
    monkeypatch.setattr(room, "memory", lambda: have)
    monkeypatch.setattr(room, "free_bytes", lambda folder: free)
    assert refusal(room.check_memory) == (
        "data.resident (=rgb) needs 251.9 GB for 1,281,167 squares, and of the machine's memory (200.0 GB) 180.0 GB may be used; "
        "use data.resident: yuv420 (half as much, 125.9 GB, fits), or data.tier: packed")
    have = (100 * 10 ** 9, "the memory limit /x")
    assert refusal(room.check_memory) == (
        "data.resident (=rgb) needs 251.9 GB for 1,281,167 squares, and of the memory limit /x (100.0 GB) 90.0 GB may be used; "
        "use data.tier: packed")
    assert refusal(room.check_disk, Path("/")) == (
        "data.resident (=rgb) needs 251.9 GB more in /, where 200.0 GB are free; use data.resident: yuv420 (half as much, "
        "125.9 GB, fits), or machine.resident_folder on another disk, or data.tier: packed")
    have = (300 * 10 ** 9, "the machine's memory")
    room.check_memory("rgb", *IMAGENET)
    room.check_disk("rgb", *IMAGENET, Path("/"), 60 * 10 ** 9)
    room.check_device("rgb", *IMAGENET, 2, 141 * 10 ** 9)
    room.check_device("yuv420", IMAGENET[0], Layout("yuv420", 256, 227).row_bytes, 1, 141 * 10 ** 9)
    assert refusal(room.check_device, 1, 141 * 10 ** 9) == (
        "data.resident (=rgb) needs 251.9 GB on each of 1 GPU, and 132.4 GB are free (of 141.0 GB, 8.6 GB are left to the "
        "network); use data.resident: yuv420 (half as much, 125.9 GB, fits), or at least 2 GPUs of this size that share it, or "
        "data.tier: packed")
    assert "needs 125.9 GB on each of 2 GPUs, and 0.0 MB are free" in refusal(room.check_device, 2, 10 ** 9)


def test_limits_of_control_groups_count(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:       1000 kB\nMemFree: 5 kB\nMemAvailable:    700 kB\n")
    assert room.memory(proc, groups) == (1_024_000, "the machine's memory")
    (proc / "self" / "cgroup").write_text("0::/job/step\n")
    for folder, limit in (("job/step", "max"), ("job", "500000"), (".", "600000")):
        (groups / folder).mkdir(parents=True, exist_ok=True)
        (groups / folder / "memory.max").write_text(limit + "\n")
    assert room.memory(proc, groups) == (500_000, f"the memory limit {groups / 'job' / 'memory.max'}")
    (proc / "self" / "cgroup").write_text("8:pids:/\n4:memory:/old\n")
    (groups / "memory" / "old").mkdir(parents=True)
    (groups / "memory" / "old" / "memory.limit_in_bytes").write_text("400000\n")
    assert room.memory(proc, groups)[0] == 400_000
    assert room.memory()[0] > 10 ** 8  # here, whatever the machine


def test_memory_file_systems_are_known(tmp_path: Path) -> None:
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "mountinfo").write_text(f"22 1 254:0 / / rw shared:1 - ext4 /dev/vda rw\n"
                                             f"30 22 0:5 / {tmp_path}/shm rw - tmpfs tmpfs rw\n")
    (proc / "meminfo").write_text("MemAvailable:    1 kB\n")
    (tmp_path / "shm" / "folder").mkdir(parents=True)
    (tmp_path / "shmem").mkdir()
    assert room.free_bytes(tmp_path / "shm" / "folder", proc) == 1024 < room.free_bytes(tmp_path / "shmem", proc)


@pytest.mark.parametrize("kind", ["rgb", "yuv420"])
def test_a_store_of_one_device_gives_what_was_put(kind: str) -> None:
    form = Layout(kind, 10, 7)
    found = GpuStore(ROWS, form, torch.device("cpu"))
    assert found.shards((1, 3)) == [(1, 3)] and found.owned(np.arange(ROWS)).all()
    places = np.array([7, 1, 20])
    found.put(places, squares()[places])
    assert not found.have.any() and found.agree(places, np.array([False, True, False])).tolist() == [False, True, False]
    assert np.flatnonzero(found.have).tolist() == [7, 20]
    wanted = np.array([20, 7, 20]), np.array([0, 3, 1]), np.array([2, 0, 3])
    expected = [form.crop(form.encode(squares()[place].numpy()), top, left) for place, top, left in zip(*wanted, strict=True)]
    assert np.array_equal(found.crops([wanted]).numpy(), np.stack(expected))


def test_a_file_that_another_machine_is_filling_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = opened(tmp_path)
    mine.put(np.array([1]), squares()[[1]])
    with monkeypatch.context() as patch:
        patch.setattr(store, "_boot_id", lambda: "another machine's")
        with pytest.raises(RuntimeError, match=r"resident store \(=.*\) is being filled by another machine; give each machine a"):
            opened(tmp_path)
    assert opened(tmp_path).have[1] != 0
    del mine
    gc.collect()
    with monkeypatch.context() as patch:
        patch.setattr(store, "_boot_id", lambda: "another boot's")
        other = opened(tmp_path)
    assert not other.have.any() and "was not complete when the machine stopped" in other.note


def test_squares_of_another_decoder_are_others(tmp_path: Path) -> None:
    assert opened(tmp_path).path != RamStore(tmp_path, "train", SHA, ROWS, FORM, decoder="gpu-whole-fancy-1").path
