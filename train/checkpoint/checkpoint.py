"""Checkpoints that exist whole or not at all, and that any number of processes can read.

A folder `step-000001234` (or `step-000001234-epoch-0003`, taken after the validation of that many epochs) holds
  *.distcp, .metadata   weights and velocities in canonical shapes (torch.distributed.checkpoint); a tower is Shard(0).
                        What several processes hold alike is written by one of them
  state.json            everything else: step, epoch, loader cursor, schedule, sums of the epoch so far
  config.yaml, stats.npz   the resolved recipe and the training set's statistics, so that it can be tested anywhere
  manifest.json         size and SHA-256 of each of these files, checked before a byte of them is believed
It is written beside its place, synced, and renamed into it; one of the same name steps aside first (`…-before`, still
a checkpoint) and goes when the new one is there. Damaged ones that a resume passed over are `damaged-…`. No random
state is kept: all draws are functions of the seed and the step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Optional, Sequence

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, Replicate, Shard

from train.parallel.topology import Topology

FORMAT = 1
ALMOST_FULL = 1 << 20  # bytes
BEFORE = "-before"
MANIFEST, STATE = "manifest.json", "state.json"
CONFIG, STATS = "config.yaml", "stats.npz"

# One process alone is what we asked for. For good, because `catch_warnings` is not for threads, and `save` runs in one.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


class DamagedCheckpoint(RuntimeError):
    """A checkpoint whose files are not the ones that were written."""


class NotWritten(RuntimeError):
    """A checkpoint that could not be written: raised in all processes."""


def checkpoint_name(step: int, epochs_done: int | None) -> str:
    """Folder name; `epochs_done` when it was taken after a validation."""
    return f"step-{step:09d}" + ("" if epochs_done is None else f"-epoch-{epochs_done:04d}")


def checkpoints(root: Path) -> list[Path]:
    """All checkpoint folders of a run, oldest first."""
    return sorted((path for path in root.glob("step-*") if path.is_dir()),
                  key=lambda path: (path.name.removesuffix(BEFORE), not path.name.endswith(BEFORE)))


def save(root: Path, name: str, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, Sequence[int]],
         state: Mapping[str, Any], attach: Callable[[Path], None], where: Topology,
         group: Optional[dist.ProcessGroup] = None) -> Path:
    """Write one checkpoint; all processes call it together, and none comes back before it is there.

    Args:
        root: folder of the run's checkpoints.
        name: from `checkpoint_name`; one of the same name is replaced, without a moment in which neither is there.
        tensors: this process's part of each tensor: its tower's rows, or, where it has the canonical shape, all of it.
        shapes: canonical shape of each.
        state: plain values for state.json.
        attach: writes the other files into the folder it is given; called in the main process.
        where: this process.
        group: all processes, in a group that nobody else uses meanwhile; by default the one of training.

    Raises:
        NotWritten: a process could not write its part; in all of them, with its reason.
    """
    staged, final, before = root / f".{name}.partial", root / name, root / f"{name}{BEFORE}"

    def begin() -> None:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)

    def publish() -> None:
        (staged / STATE).write_text(json.dumps({"format": FORMAT, **state}, indent=1, sort_keys=True), encoding="utf-8")
        attach(staged)
        files = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(staged.iterdir())}
        (staged / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1), encoding="utf-8")
        for path in staged.iterdir():
            _sync(path)
        _sync(staged)
        if final.exists():
            shutil.rmtree(before, ignore_errors=True)
            final.rename(before)
        staged.rename(final)
        _sync(root)
        shutil.rmtree(before, ignore_errors=True)

    try:
        _in_main(begin, where, group)
        with _reasons(""):
            dcp.save(_canonical(tensors, shapes, where), storage_writer=dcp.FileSystemWriter(staged), process_group=group,
                     no_dist=where.is_alone)
        _in_main(publish, where, group)
    except Exception as error:
        if where.is_main:
            shutil.rmtree(staged, ignore_errors=True)  # a full disk needs the room
        kept = "the ones before it are whole: mend this, then go on with --resume" if checkpoints(root) else \
            "there is none before it: mend this, then start again (--resume does)"
        raise NotWritten(f"checkpoint (={final}) could not be written: {error}{_room(root)}; {kept}") from error
    return final


def _room(root: Path) -> str:
    """What a full disk looks like to torch's own writer ("unexpected pos") is not what a person calls it."""
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(root).free
        if free < ALMOST_FULL:
            return f" (the disk of {root} is full: {free} bytes left)"
    return ""


def _in_main(work: Callable[[], None], where: Topology, group: Optional[dist.ProcessGroup]) -> None:
    """Do something in the main process, while the others wait for it; they fail as it does."""
    failure: Optional[Exception] = None
    if where.is_main:
        try:
            work()
        except Exception as error:
            failure = error
    if not where.is_alone:
        told = [str(failure) if failure else None]
        dist.broadcast_object_list(told, src=0, group=group, device=torch.device("cpu"))
        if told[0] is not None and failure is None:
            failure = RuntimeError(told[0])
    if failure is not None:
        raise failure


@contextlib.contextmanager
def _reasons(prefix: str) -> Iterator[None]:
    """What failed inside torch's checkpointing, and in which process, as a RuntimeError of one line after `prefix`.

    Its own is a BaseException, which passes every `except Exception`, with a traceback for each process as its text.
    """
    try:
        yield
    except dcp.CheckpointException as error:
        found = sorted(error.failures.items())
        raise RuntimeError(prefix + "; ".join(f"process {rank}: {(str(cause) or type(cause).__name__).splitlines()[0]}"
                                              for rank, (cause, _) in found)) from error


def verify(path: Path) -> None:
    """Compare a checkpoint with its manifest.

    Raises:
        DamagedCheckpoint: naming the file that is missing, of another size, or has other bytes.
        ValueError: it is of another format.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        written = int(manifest["format"])
        listed = {str(name): (int(entry["size"]), str(entry["sha256"]))
                  for name, entry in (manifest["files"] if written == FORMAT else {}).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"checkpoint file (={path / MANIFEST}) cannot be read ({error}); use another "
                                "checkpoint") from None
    _check_format(written, path / MANIFEST)
    for name in sorted({STATE, CONFIG, STATS, ".metadata"} - listed.keys()):
        raise DamagedCheckpoint(f"checkpoint file (={path / name}) is not in the manifest; use another checkpoint")
    for name, (size, digest) in listed.items():
        file = path / name
        if not file.is_file():
            raise DamagedCheckpoint(f"checkpoint file (={file}) is missing; use another checkpoint")
        if file.stat().st_size != size:
            raise DamagedCheckpoint(f"checkpoint file (={file}) has {file.stat().st_size} bytes, was written with "
                                    f"{size}; use another checkpoint")
        found = _sha256(file)
        if found != digest:
            raise DamagedCheckpoint(f"checkpoint file (={file}) has SHA-256 {found[:16]}…, was written with "
                                    f"{digest[:16]}…; use another checkpoint")


def _check_format(written: object, path: Path) -> None:
    """Raise ValueError for a file of another format: not damage, so nothing may pass it over or set it aside."""
    if written != FORMAT:
        raise ValueError(f"checkpoint format (={written} in {path}) must be {FORMAT}, the one of this program; use the version "
                         "of the program that wrote it")


def newest_good(root: Path, complain: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that equals its manifest; None when there is none at all.

    Args:
        root: folder of the run's checkpoints.
        complain: told of each damaged one that is passed over.

    Raises:
        DamagedCheckpoint: there are checkpoints, and every one is damaged.
    """
    found = checkpoints(root)
    for path in reversed(found):
        try:
            verify(path)
            return path
        except DamagedCheckpoint as error:
            complain(str(error))
    if found:
        raise DamagedCheckpoint(f"checkpoints (={root}) are damaged, all {len(found)} of them; start another run")
    return None


def set_aside(root: Path, chosen: Path, tell: Callable[[str], None]) -> None:
    """Rename the checkpoints newer than `chosen`, all of them damaged, to `damaged-…`: they count no longer.

    Left in place, they would be the last ones to `prune`, and new ones would be removed in their stead.
    """
    found = checkpoints(root)
    for path in found[found.index(chosen) + 1:]:
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        tell(f"damaged checkpoint (={path}) is now {aside.name}; delete it when you have looked at it")


def best(root: Path) -> Path | None:
    """The checkpoint with the lowest validation error (the earliest of equals); None when none was validated."""
    rated = []
    for path in checkpoints(root):
        try:
            error = read_state(path)["validation_error"]
        except (OSError, ValueError, KeyError):
            continue  # damaged; verify says so when somebody wants it
        if error is not None:
            rated.append((float(error), path.name))
    return root / min(rated)[1] if rated else None


def prune(root: Path, keep_last: int, saved: Path) -> None:
    """Remove all but the last `keep_last`, the best and the just `saved` one, and what a killed process left half-written."""
    keep = {*checkpoints(root)[-keep_last:], best(root), saved}
    for path in checkpoints(root):
        if path not in keep:
            shutil.rmtree(path)
    for path in root.glob(".step-*.partial"):
        shutil.rmtree(path)


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint (verify it first); ValueError when it is of another format."""
    state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    _check_format(state.get("format"), path / STATE)
    return state


def load(path: Path, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, Sequence[int]], where: Topology,
         *, all_of_it: bool = True) -> None:
    """Fill this process's tensors in place from a checkpoint written by any number of processes.

    Args:
        path: a checkpoint that `verify` accepted.
        tensors: this process's part of each tensor.
        shapes: canonical shape of each.
        where: this process.
        all_of_it: the checkpoint must hold no other tensors than these.

    Raises:
        ValueError: names or shapes differ from those in the checkpoint; both are printed.
    """
    check_shapes(stored_shapes(path), {name: tuple(shapes[name]) for name in tensors}, path, exact=all_of_it)
    with _reasons(f"checkpoint (={path}) could not be read: "):
        dcp.load(_canonical(tensors, shapes, where), storage_reader=dcp.FileSystemReader(path), no_dist=where.is_alone)


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Canonical shape of each tensor of a checkpoint."""
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in metadata.items() if hasattr(entry, "size")}


def check_shapes(stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], path: Path, *,
                 exact: bool = False) -> None:
    """Raise ValueError naming the first tensor that `path` lacks or has in another shape, or, if `exact`, that is not wanted."""
    for name in sorted(wanted.keys() | (stored.keys() if exact else set())):
        if stored.get(name) != wanted.get(name):
            raise ValueError(f"{name} (={wanted.get(name, 'none')} here) is {stored.get(name, 'none')} in {path}; "
                             "load it with the recipe it was written with")


def _canonical(tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, Sequence[int]],
               where: Topology) -> dict[str, Any]:
    """The tensors as parts of the whole network's: what a tower holds some rows of is Shard(0) over the pair."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        shape = torch.Size(shapes[name])
        found[name] = tensor.detach()
        if tensor.shape != shape:
            assert where.mesh is not None and where.tower_ranks == 2, f"{name} {tuple(tensor.shape)} is not {tuple(shape)}"
            found[name] = DTensor.from_local(tensor.detach(), where.mesh, [Replicate(), Shard(0)], run_check=False, shape=shape,
                                             stride=torch.empty(shape, device="meta").stride())
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Bytes of a file, or entries of a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
