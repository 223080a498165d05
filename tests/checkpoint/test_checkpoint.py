"""Checkpoints: exact, atomic, checked, of any topology, pruned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import pytest
import torch

from tests.helpers.checkpoints import ALONE, SHAPES, attach, check, save, tensors
from tests.helpers.runs import processes
from train.checkpoint import checkpoint
from train.checkpoint.checkpoint import DamagedCheckpoint


def test_saved_and_loaded_bits_are_equal(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    check(path, 7)
    assert checkpoint.read_state(path)["step"] == 7 and [p.name for p in tmp_path.iterdir()] == ["step-000000007"]


def test_channels_last_tensors_keep_their_values(tmp_path: Path) -> None:
    shapes = {"weight.c": (4, 3, 5, 5)}
    whole = torch.randn(4, 3, 5, 5)
    path = checkpoint.save(tmp_path, "step-000000001", {"weight.c": whole.to(memory_format=torch.channels_last)}, shapes,
                           {"validation_error": None}, attach, ALONE)
    found = torch.zeros(4, 3, 5, 5)
    checkpoint.load(path, {"weight.c": found}, shapes, ALONE)
    assert torch.equal(found, whole)


def test_a_part_can_be_loaded_only_when_asked(tmp_path: Path) -> None:
    path, part = save(tmp_path, 7), {"weight.a": torch.zeros(5, 3)}
    with pytest.raises(ValueError, match=r"velocity.a \(=none here\) is \(5, 3\) in .*; load it with the recipe"):
        checkpoint.load(path, part, SHAPES, ALONE)
    checkpoint.load(path, part, SHAPES, ALONE, partial=True)
    assert torch.equal(part["weight.a"], tensors(7)["weight.a"])


def test_other_shapes_and_names_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    with pytest.raises(ValueError, match=r"weight.b \(=\(6,\) here\) is \(4,\) in "):
        checkpoint.load(path, {**tensors(1), "weight.b": torch.zeros(6)}, {**SHAPES, "weight.b": (6,)}, ALONE)
    with pytest.raises(ValueError, match=r"weight.c \(=\(6,\) here\) is none in "):
        checkpoint.load(path, {"weight.c": torch.zeros(6)}, {"weight.c": (6,)}, ALONE, partial=True)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json", "config.yaml", "stats.npz"])
def test_one_flipped_bit_is_found_and_named(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 7)
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(DamagedCheckpoint, match=rf"{name}\) has SHA-256 \w+…, was written with \w+…; use another"):
        checkpoint.verify(path)


def test_missing_cut_and_unlisted_files_are_named(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    (path / "stats.npz").write_bytes(b"12")
    with pytest.raises(DamagedCheckpoint, match=r"stats.npz\) has 2 bytes, was written with 3; "):
        checkpoint.verify(path)
    (path / "stats.npz").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"stats.npz\) is missing; "):
        checkpoint.verify(path)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    del manifest["files"]["stats.npz"]
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(DamagedCheckpoint, match=r"stats.npz\) is not in the manifest; "):
        checkpoint.verify(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": {"a": 3}}', '{"files": {"a": {"size": "x", "sha256": ""}}}'])
def test_a_damaged_manifest_is_an_error(tmp_path: Path, text: str) -> None:
    path = save(tmp_path, 7)
    (path / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(DamagedCheckpoint, match=r"manifest.json\) cannot be read .*; use another checkpoint"):
        checkpoint.verify(path)


def test_newest_good_falls_back_and_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    assert checkpoint.newest_good(tmp_path, said.append) is None
    first, second, third = save(tmp_path, 1), save(tmp_path, 2), save(tmp_path, 3)
    assert checkpoint.newest_good(tmp_path, said.append) == third and not said
    (third / "state.json").write_text("{}", encoding="utf-8")
    (second / "manifest.json").unlink()
    assert checkpoint.newest_good(tmp_path, said.append) == first
    assert len(said) == 2 and "step-000000003/state.json" in said[0] and "step-000000002/manifest.json" in said[1]
    (first / "stats.npz").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"are damaged, all 3 of them; start another run"):
        checkpoint.newest_good(tmp_path, said.append)


class Died(BaseException):
    """As if the process were killed here."""


def test_killed_while_writing_leaves_the_old_ones_whole(tmp_path: Path) -> None:
    def die(folder: Path) -> None:
        raise Died
    good = save(tmp_path, 1)
    with pytest.raises(Died):
        save(tmp_path, 2, attach=die)
    assert checkpoint.checkpoints(tmp_path) == [good] and (tmp_path / ".step-000000002.partial").exists()
    second = save(tmp_path, 2)  # over what was left
    checkpoint.verify(second)
    with pytest.raises(Died):
        save(tmp_path, 3, attach=die)
    checkpoint.prune(tmp_path, 5, second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000001", "step-000000002"]


def test_the_same_name_is_replaced(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "state.json").write_text("damaged", encoding="utf-8")
    checkpoint.verify(save(tmp_path, 1))


def test_killed_while_replacing_leaves_one_of_the_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Death at each operation on folders in turn: the newest good checkpoint is always of this step."""
    for deadly in range(4):
        root = tmp_path / str(deadly)
        save(root, 1)
        save(root, 2)
        left = [deadly]

        def mortal(real: Callable[..., Any]) -> Callable[..., Any]:
            def operation(*args: Any, **options: Any) -> Any:
                if left[0] == 0:
                    raise Died
                left[0] -= 1
                return real(*args, **options)
            return operation

        def armed(folder: Path) -> None:
            attach(folder)
            monkeypatch.setattr(checkpoint.shutil, "rmtree", mortal(checkpoint.shutil.rmtree))
            monkeypatch.setattr(Path, "rename", mortal(Path.rename))

        with pytest.raises(Died):
            save(root, 2, attach=armed)
        monkeypatch.undo()
        found = checkpoint.newest_good(root, pytest.fail)
        assert found is not None and checkpoint.read_state(found)["step"] == 2, deadly
        save(root, 2)
        assert [path.name for path in checkpoint.checkpoints(root)] == ["step-000000001", "step-000000002"]


def test_one_that_steps_aside_comes_before_its_successor_only(tmp_path: Path) -> None:
    for name in ("step-000000002-epoch-0001", "step-000000002", "step-000000003", "step-000000002-before"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [
        "step-000000002-before", "step-000000002", "step-000000002-epoch-0001", "step-000000003"]


def test_damaged_newer_ones_are_set_aside_and_the_saved_one_is_never_pruned(tmp_path: Path) -> None:
    said: list[str] = []
    first, second, third = save(tmp_path, 1), save(tmp_path, 5), save(tmp_path, 9)
    checkpoint.prune(tmp_path, 2, first)
    assert checkpoint.checkpoints(tmp_path) == [first, second, third]
    checkpoint.set_aside(tmp_path, first, said.append)
    assert checkpoint.checkpoints(tmp_path) == [first] and len(said) == 2
    assert f"damaged checkpoint (={third}) is now damaged-step-000000009; delete it when" in said[1]
    save(tmp_path, 9)
    checkpoint.set_aside(tmp_path, first, said.append)  # again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged-step-000000005", "damaged-step-000000009",
                                                                "step-000000001"]


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_another_format_is_refused_not_passed_over(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "format": 2}), encoding="utf-8")
    read = checkpoint.read_state if name == "state.json" else lambda folder: checkpoint.newest_good(tmp_path, pytest.fail)
    with pytest.raises(ValueError, match=rf"checkpoint format \(=2 in .*{name}\) must be 1, the one of this program; use"):
        read(path.parent)


def test_prune_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    for step, error in ((1, 0.9), (2, 0.3), (3, 0.3), (4, None), (5, 0.5), (6, 0.4)):
        save(tmp_path, step, error, epochs=None if error is None else step)
    best = checkpoint.best(tmp_path)
    assert best is not None and best.name == "step-000000002-epoch-0002"
    checkpoint.prune(tmp_path, 2, checkpoint.checkpoints(tmp_path)[-1])
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [
        "step-000000002-epoch-0002", "step-000000005-epoch-0005", "step-000000006-epoch-0006"]


def test_one_whose_state_is_damaged_is_no_best_and_is_not_removed(tmp_path: Path) -> None:
    """Its error may have been the lowest."""
    paths = [save(tmp_path, step, 0.2 + step / 10, epochs=step) for step in range(1, 5)]
    file = paths[0] / "state.json"
    file.write_text(file.read_text().replace('"validation_error": 0.3', '"validation_error": 0.9'))
    found: list[tuple[Path, str]] = []
    assert checkpoint.best(tmp_path, lambda *each: found.append(each)) == paths[1]
    assert [path for path, _ in found] == paths[:1] and "state.json) has SHA-256" in found[0][1]
    checkpoint.prune(tmp_path, 1, paths[3])
    assert checkpoint.checkpoints(tmp_path) == [paths[0], paths[1], paths[3]]


def test_killed_while_one_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of it is no checkpoint, and goes next time."""
    paths = [save(tmp_path, step) for step in range(1, 4)]

    def killed(path: Path) -> None:
        (path / "state.json").unlink()
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", killed)
        checkpoint.prune(tmp_path, 2, paths[2])
    assert checkpoint.checkpoints(tmp_path) == paths[1:] and len(list(tmp_path.iterdir())) == 3
    checkpoint.prune(tmp_path, 2, paths[2])
    assert sorted(tmp_path.iterdir()) == paths[1:]


def test_no_best_without_validation(tmp_path: Path) -> None:
    save(tmp_path, 1)
    assert checkpoint.best(tmp_path) is None


TOPOLOGIES = """
import sys, time, warnings
warnings.simplefilter("error")
import torch
from pathlib import Path
from model.towers import Tower, tower_slice
from train.checkpoint import checkpoint
from train.parallel.topology import process_group
from tests.helpers.checkpoints import SHAPES, attach, tensors
by_one, by_two = map(Path, sys.argv[1:])
torch.set_num_threads(1)
with process_group(towers=2, device="cpu", timeout_s=60) as where:
    tower = Tower(where.tower_rank, where.tower_ranks)
    mine = {name: tower_slice(whole, tower).clone() for name, whole in tensors(7).items()}
    def slowly(folder):
        time.sleep(0.5)
        attach(folder)
    path = checkpoint.save(by_two, "step-000000007", mine, SHAPES, {"validation_error": None}, slowly, where)
    assert path.is_dir(), "gone on before it was there"
    for root in by_one, by_two:
        found = {name: torch.zeros_like(part) for name, part in mine.items()}
        checkpoint.load(root / "step-000000007", found, SHAPES, where)
        assert all(torch.equal(found[name], part) for name, part in mine.items())
        assert len(found["weight.a"]) == 3 - where.tower_rank  # 5 rows: 3 and 2
    assert where.broadcast_object("main" if where.is_main else "other") == "main"
    print("done")
"""


@pytest.mark.slow
def test_two_processes_write_and_one_reads_and_the_reverse(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TOPOLOGIES, encoding="utf-8")
    save(tmp_path / "by_one", 7)
    processes(2, script, tmp_path / "by_one", tmp_path / "by_two")
    path = tmp_path / "by_two" / "step-000000007"
    assert len(list(path.glob("*.distcp"))) == 2
    check(path, 7)


EVERY_WAY = """
import sys, warnings
warnings.simplefilter("error")
import torch
from dataclasses import replace
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
from model.towers import Tower, tower_slice
from train.checkpoint import checkpoint
from train.parallel.topology import process_group
from tests.helpers.checkpoints import SHAPES, attach, tensors
root = Path(sys.argv[1])
torch.set_num_threads(1)
with process_group(towers=2, device="cpu", timeout_s=60) as pairs:
    assert (pairs.data_ranks, pairs.tower_ranks) == (2, 2)
    flat = replace(pairs, data_rank=pairs.global_rank, data_ranks=4, tower_rank=0, tower_ranks=1,
                   mesh=init_device_mesh("cpu", (4, 1), mesh_dim_names=("data", "tower")))
    tower = Tower(pairs.tower_rank, 2)
    ways = {"towers": (pairs, ("weight.a", "velocity.a", "weight.b")), "weird": (pairs, ("weight.b",)), "flat": (flat, ())}
    for way, (where, split) in ways.items():
        mine = {name: (tower_slice(whole, tower) if name in split else whole).clone() for name, whole in tensors(7).items()}
        checkpoint.save(root, way, mine, SHAPES, {"validation_error": None}, attach, where)
    for way, (where, split) in ways.items():
        mine = {name: (tower_slice(whole, tower) if name in split else whole) for name, whole in tensors(7).items()}
        for written in (*ways, "alone"):
            found = {name: torch.zeros_like(part) for name, part in mine.items()}
            checkpoint.load(root / written, found, SHAPES, where)
            assert all(torch.equal(found[name], part) for name, part in mine.items()), (way, written)
    print("done")
"""


def test_written_and_read_by_four_processes_in_every_way(tmp_path: Path) -> None:
    """Two pairs of towers, two pairs with some tensors whole ("weird"), four data ranks, one alone: each reads all."""
    script = tmp_path / "script.py"
    script.write_text(EVERY_WAY, encoding="utf-8")
    checkpoint.save(tmp_path, "alone", tensors(7), SHAPES, {"validation_error": None}, attach, ALONE)
    processes(4, script, tmp_path)
    size = sum(file.stat().st_size for file in (tmp_path / "alone").glob("*.distcp")) / len(SHAPES)
    for written, parts in ("towers", 6), ("weird", 4), ("flat", 3):
        path = tmp_path / written
        check(path, 7)
        assert sum(file.stat().st_size for file in path.glob("*.distcp")) < (parts + 0.5) * size, "each part is written once"


def test_ctrl_c_while_one_is_read_is_none_of_its_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 1)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt
    monkeypatch.setattr(checkpoint.Reader, "read_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.load(path, tensors(1), SHAPES, ALONE)


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_what_cannot_be_read_now_is_not_damaged(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither passed over, which would rename it, nor pruned: an I/O error stops the command with nothing changed."""
    paths = [save(tmp_path, step, 0.5, epochs=step) for step in (1, 2, 3)]
    for method in ("read_bytes", "read_text"):
        real = getattr(Path, method)

        def read(path: Path, *args: Any, real: Callable[..., Any] = real, **options: Any) -> Any:
            if path == paths[0] / name or path == paths[2] / name:
                raise OSError(5, "Input/output error")
            return real(path, *args, **options)
        monkeypatch.setattr(Path, method, read)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoint.newest_good(tmp_path, pytest.fail) if name == "manifest.json" else checkpoint.prune(tmp_path, 1, paths[2])
    assert checkpoint.checkpoints(tmp_path) == paths
