"""Save, verify and load checkpoints; newest, best and old ones. Whole or not at all; readable by any number of processes.

A folder `step-000001234` (or `step-000001234-epoch-0003`, taken after the validation of that many epochs) holds
  *.distcp, .metadata   weights and velocities in canonical shapes (torch.distributed.checkpoint); a tower is Shard(0)
  state.json            everything else: step, epoch, loader cursor, schedule, sums of the epoch so far
  config.yaml, stats.npz   the resolved recipe and the training set's statistics, so that it can be tested anywhere
  manifest.json         size and SHA-256 of each of these files, compared before any of them is used
It is written beside its final path, synced, and renamed; one of the same name is renamed first (`…-before`, still a
checkpoint) and removed when the new one is there. Damaged ones that a resume passed over are `damaged-…`. No random
state is kept: every draw is a function of the seed and the step.
"""
import contextlib
import dataclasses
import json
import math
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Collection, Iterator, Mapping, Optional, Sequence

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, Replicate, Shard

from pipeline.files import difference, file_entries, read_json, read_manifest, sync, sync_tree
from pipeline.io_errors import explain, in_words, writing
from pipeline.schema import Count, read_as
from train.checkpoint.reader import Reader
from train.exit_codes import CommonError
from train.parallel.topology import Topology

FORMAT = 1
BEFORE = "-before"
MANIFEST, STATE = "manifest.json", "state.json"
CONFIG, STATS = "config.yaml", "stats.npz"

# One process alone is intended. Not by `catch_warnings`, which is not thread-safe: `save` runs in a thread.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


class DamagedCheckpoint(RuntimeError):
    """A checkpoint or exported network whose files are not the ones that were written."""


class OtherFormat(ValueError):
    """A file of another version of this program: not damaged."""


class NotWritten(CommonError):
    """A checkpoint that could not be written."""


def checkpoint_name(step: int, epochs_done: int | None) -> str:
    """Folder name; `epochs_done` when it was taken after a validation."""
    return f"step-{step:09d}" + ("" if epochs_done is None else f"-epoch-{epochs_done:04d}")


def save(root: Path, name: str, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, Sequence[int]],
         state: Mapping[str, Any], attach: Callable[[Path], None], topology: Topology,
         group: Optional[dist.ProcessGroup] = None) -> Path:
    """Write one checkpoint into `root`, the run's folder of them; all processes call it together, and it returns in all of them
    when it is there. One of the same `name` is replaced, without a moment in which neither is there. `tensors`: this process's
    part of each: its tower's rows, or, where it has the canonical shape (`shapes`), all of it. `state`: JSON values for
    state.json. `attach` writes the other files into the folder it is given; called in the main process. `group`: all processes,
    in a group that nobody else uses meanwhile. Raises NotWritten in all processes, with the reason, when one could not write
    its part."""
    staged, final, before = root / f".{name}.partial", root / name, root / f"{name}{BEFORE}"

    def begin() -> None:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)

    def publish() -> None:
        (staged / STATE).write_text(json.dumps({"format": FORMAT, **state}, indent=1, sort_keys=True), encoding="utf-8")
        attach(staged)
        write_manifest(staged, [path.name for path in staged.iterdir()])
        sync_tree(staged)
        if final.exists():
            shutil.rmtree(before, ignore_errors=True)
            final.rename(before)
        staged.rename(final)
        sync(root)
        shutil.rmtree(before, ignore_errors=True)

    try:
        with writing(root, staged):  # torch reports a full disk as "unexpected pos"
            _in_main_process(begin, topology, group)
            with _one_line_error(""):
                dcp.save(_distributed(tensors, shapes, topology), storage_writer=dcp.FileSystemWriter(staged),
                         process_group=group, no_dist=topology.is_single)
            _in_main_process(publish, topology, group)
    except Exception as error:
        if topology.is_main:
            shutil.rmtree(staged, ignore_errors=True)  # a full disk needs the room
        others = "there is none before it: mend this, then start again (--resume does)"
        with contextlib.suppress(OSError):
            if checkpoints(root):
                others = "the ones before it are whole: mend this, then go on with --resume"
        raise NotWritten(f"checkpoint (={final}) could not be written: {in_words(error)}; {others}") from error
    return final


def _in_main_process(work: Callable[[], None], topology: Topology, group: Optional[dist.ProcessGroup]) -> None:
    """Call `work` in the main process while the others wait; a failure is raised in all."""
    failure: Optional[Exception] = None
    if topology.is_main:
        try:
            work()
        except Exception as error:
            failure = error
    if not topology.is_single:
        reason = [in_words(failure) if failure else None]
        dist.broadcast_object_list(reason, src=0, group=group, device=torch.device("cpu"))
        if reason[0] is not None and failure is None:
            failure = RuntimeError(reason[0])
    if failure is not None:
        raise failure


@contextlib.contextmanager
def _one_line_error(prefix: str) -> Iterator[None]:
    """Turn torch's CheckpointException, a BaseException with tracebacks as its text, into a RuntimeError of one line: `prefix`,
    then each failed process's reason; or back into the Ctrl-C that it was."""
    try:
        yield
    except dcp.CheckpointException as error:
        if any(isinstance(cause, KeyboardInterrupt) for cause, _ in error.failures.values()):
            raise KeyboardInterrupt from error
        reasons = {rank: explain(cause) if isinstance(cause, OSError) else (str(cause) or type(cause).__name__).splitlines()[0]
                   for rank, (cause, _) in sorted(error.failures.items())}
        raise RuntimeError(prefix + "; ".join(f"process {rank}: {reason}" for rank, reason in reasons.items())) from error


def write_manifest(folder: Path, names: Collection[str]) -> None:
    manifest = {"format": FORMAT, "files": file_entries(folder, sorted(names))}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def verify(path: Path) -> None:
    """Compare a checkpoint with its manifest. Raises as `verify_manifest`."""
    verify_manifest(path, [STATE, CONFIG, STATS, ".metadata"], "checkpoint file", "use another checkpoint")


def verify_state(path: Path) -> None:
    """Compare state.json alone. Raises as `verify_manifest`."""
    verify_manifest(path, [], "checkpoint file", "use another checkpoint", only=STATE)


def verify_manifest(folder: Path, required: Collection[str], what: str, advice: str, only: str = "") -> None:
    """Compare the files of a folder, or `only` one, with its manifest.json, which must list `required`. `what` and `advice`: for
    messages.
    Raises DamagedCheckpoint, naming the file that is missing, of another size, or has other bytes. Raises ValueError when it is
    of another format, OSError when it cannot be read now: neither is damage, and nothing may pass it over."""
    path = folder / MANIFEST
    try:
        manifest = read_manifest(path)
        version = int(manifest["format"])
        entries = {str(name): {"size": int(entry["size"]), "sha256": str(entry["sha256"])}
                   for name, entry in (manifest["files"] if version == FORMAT else {}).items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:  # other OSErrors: may be readable later
        raise DamagedCheckpoint(f"{what} (={path}) cannot be read ({error}); {advice}") from None
    _check_format(version, path)
    for name in sorted(set(required) - entries.keys()):
        raise DamagedCheckpoint(f"{what} (={folder / name}) is not in the manifest; {advice}")
    for name, entry in entries.items():
        if (not only or name == only) and (problem := difference(folder / name, entry)):
            raise DamagedCheckpoint(f"{what} (={folder / name}) {problem}; {advice}")


def _check_format(version: object, path: Path) -> None:
    """Raise ValueError for a file of another format: not damage, so nothing may pass it over or rename it."""
    if version != FORMAT:
        raise OtherFormat(f"checkpoint format (={version} in {path}) must be {FORMAT}, the one of this program; use the version "
                          "of the program that wrote it")


def checkpoints(root: Path) -> list[Path]:
    """All checkpoint folders of a run, oldest first; none before the run has made `root`. Raises OSError when they cannot be
    listed now."""
    if not root.is_symlink() and not root.exists():
        return []
    return sorted((path for path in map(root.joinpath, os.listdir(root)) if path.name.startswith("step-") and path.is_dir()),
                  key=lambda path: (path.name.removesuffix(BEFORE), not path.name.endswith(BEFORE)))


def newest_good(root: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that equals its manifest; None when there is none at all. `warn` is called for each damaged one that
    is passed over; raises DamagedCheckpoint when every one is, OSError also when there is no `root`: that is not to have none."""
    os.listdir(root)
    paths = checkpoints(root)
    for path in reversed(paths):
        try:
            verify(path)
            return path
        except DamagedCheckpoint as error:
            warn(str(error))
    if paths:
        raise DamagedCheckpoint(f"checkpoints (={root}) are damaged, all {len(paths)} of them; start another run")
    return None


def set_aside(root: Path, chosen: Path, warn: Callable[[str], None]) -> None:
    """Rename the checkpoints newer than `chosen`, all of them damaged, to `damaged-…`: else `prune` would keep them as the last
    ones, and remove new ones instead."""
    paths = checkpoints(root)
    for path in paths[paths.index(chosen) + 1:]:
        renamed = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(renamed, ignore_errors=True)
        path.rename(renamed)
        warn(f"damaged checkpoint (={path}) is now {renamed.name}; delete it when you have looked at it")


def best(root: Path, passed_over: Callable[[Path, str], object] = lambda path, problem: None) -> Path | None:
    """The checkpoint with the lowest validation error (the earliest of equals); None when none was validated. `passed_over` is
    called with each whose state is damaged, and what is wrong."""
    rated = []
    for path in checkpoints(root):
        try:
            verify_state(path)
            error = read_state(path)["validation_error"]
        except (DamagedCheckpoint, ValueError) as damage:
            passed_over(path, str(damage))
            continue
        if error is not None and math.isfinite(error):
            rated.append((float(error), path.name))
    return root / min(rated)[1] if rated else None


def prune(root: Path, keep_last: int, saved: Path) -> None:
    """Remove all but the last `keep_last`, the best and the just `saved` one, and what a killed process left half-written. One
    whose state cannot be read may have been the best, and stays. Raises OSError, at the end, when some could not be removed."""
    keep = {*checkpoints(root)[-keep_last:], saved}
    keep.add(best(root, lambda path, problem: keep.add(path)) or saved)
    failures = []
    for path in (*root.glob(".step-*.partial"), *(path for path in checkpoints(root) if path not in keep)):
        try:  # renamed first: half of one is no damaged checkpoint
            shutil.rmtree(path if path.name.startswith(".") else path.rename(root / f".{path.name}.partial"))
        except OSError as error:
            failures.append(error)
    if failures:
        raise failures[0]


@dataclass(frozen=True)
class Epoch:
    """Schema of `progress` in state.json."""
    epoch: Count
    images: Count
    errors: Count
    loss: float


@dataclass(frozen=True)
class State:
    """Schema of state.json; what a resume needs has no value until it is read."""
    validation_error: float | None
    step: Count | None = None
    progress: Epoch | None = None
    loader: dict[str, Any] | None = None
    schedule: dict[str, Any] | None = None
    metrics_bytes: Count | None = None
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    fingerprint: str = ""
    classes: str = ""  # hash of the class list in its order


def read_state(path: Path, *, whole: bool = False) -> dict[str, Any]:
    """state.json of a checkpoint (verify it first), with `whole` one that a resume can begin with; ValueError when it is of
    another format, or not as it is written."""
    file = path / STATE
    try:
        given = read_json(file)
        _check_format(given.get("format") if isinstance(given, dict) else FORMAT, file)
        state = dataclasses.asdict(read_as(State, given, "state"))
    except OtherFormat:
        raise
    except ValueError as error:
        raise ValueError(f"checkpoint file (={file}) is not as it is written ({error}); use another checkpoint") from None
    if whole and (lacking := [name for name, value in state.items() if value is None and name != "validation_error"]):
        raise ValueError(f"checkpoint file (={file}) lacks {', '.join(lacking)}; use another checkpoint")
    return {name: value for name, value in state.items() if value is not None or name == "validation_error"}


def load(path: Path, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, Sequence[int]], topology: Topology,
         *, partial: bool = False) -> None:
    """Fill this process's part of each tensor in place from a checkpoint that `verify` accepted, written by any number of
    processes; with `partial` it may hold other tensors too. Raises ValueError when names or canonical shapes differ."""
    check_shapes(stored_shapes(path), {name: tuple(shapes[name]) for name in tensors}, path, exact=not partial)
    with _one_line_error(f"checkpoint (={path}) could not be read: "):
        dcp.load(_distributed(tensors, shapes, topology), storage_reader=Reader(path), no_dist=topology.is_single)


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Canonical shape of each tensor of a checkpoint."""
    metadata = Reader(path).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}


def check_shapes(stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], path: Path, *,
                 exact: bool = False) -> None:
    """Raise ValueError naming the first tensor that `path` lacks or has in another shape, or, if `exact`, that is not wanted."""
    for name in sorted(wanted.keys() | (stored.keys() if exact else set())):
        if stored.get(name) != wanted.get(name):
            raise ValueError(f"{name} (={wanted.get(name, 'none')} here) is {stored.get(name, 'none')} in {path}; "
                             "load it with the recipe it was written with")


def _distributed(tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, Sequence[int]], topology: Topology) -> dict[str, Any]:
    """The tensors as DTensors of canonical shape, where this process holds a tower's rows: Shard(0) over the pair."""
    parts: dict[str, Any] = {}
    for name, tensor in tensors.items():
        shape = torch.Size(shapes[name])
        parts[name] = tensor.detach()
        if tensor.shape != shape:
            assert topology.mesh is not None and topology.tower_ranks == 2, f"{name} {tuple(tensor.shape)} is not {tuple(shape)}"
            parts[name] = DTensor.from_local(tensor.detach(), topology.mesh, [Replicate(), Shard(0)], run_check=False,
                                             shape=shape, stride=torch.empty(shape, device="meta").stride())
    return parts
