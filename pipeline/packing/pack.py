"""Packs an index once into shuffled WebDataset shards of small JPEGs, the paper's own preprocessing: data tier `packed`.

A plan says which image goes into which shard; each shard is written on its own, by any process of any rank, in any order, and
can be written again with the same bytes. So a killed run resumes: what is finished stays. Whoever finds all shards finished
reads them again, and writes the index.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Sequence

import numpy as np

from pipeline.files import atomic_write, is_temporary, remove_dead
from pipeline.index.sample_index import SampleIndex
from pipeline.index.tar import BLOCK
from pipeline.packing.images import check_budget, decoded, encode, encoder
from pipeline.packing.packed_index import copy_stats, load_packed, write_packed_index
from pipeline.packing.plan import PackOptions, Piece, Plan, order, pieces
from pipeline.packing.shard import Shard, ShardTask, check_shard, finished, write_shard
from pipeline.parallel import Progress, in_processes
from pipeline.stats import stats_path

PLAN = "plan.json"
_ESTIMATED = 256  # images that are encoded to estimate the size of all
SPARE = 1.05  # of the estimated bytes, that must be free


def prepare(index: SampleIndex, out: Path, options: PackOptions, *, splits: Sequence[str] = (), shard_images: int = 0,
            shard_bytes: int = 1_000_000_000, budget: float = 1e-4) -> Plan:
    """The plan of folder `out`: the one that lies there, or a new one. Removes what dead processes left.

    Args:
        splits: to pack; none means all.
        shard_images: most images of a shard; 0: as many as are estimated to fill `shard_bytes`.
        budget: largest share of unreadable samples.

    Raises:
        ValueError: the folder holds something else, or shards of other options or another index; the disk is too small.
    """
    _check_out(index, out)
    splits = _leading_splits(index, splits)
    source = {split: index.split_sha256(split) for split in splits}
    for split in splits:
        index.check_archives(split)
        if not len(index.ids(split)):
            raise ValueError(f"split (={split}) of {index.path} must have samples; it has none, see build_index.py info")
    path, shard_bytes = out / PLAN, 0 if shard_images else shard_bytes
    if not path.exists():
        image_bytes = _estimate(index, splits[0], options, budget)
        plan = Plan(options, source, encoder(), shard_bytes, shard_images or max(1, shard_bytes // image_bytes), image_bytes)
        _check_space(index, out, plan)
        out.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, keep=True) as file:  # another rank may have been quicker
            file.write(json.dumps(asdict(plan), indent=1).encode() + b"\n")
    plan = Plan.load(path)
    differences = plan.differences(Plan(options, source, encoder(), shard_bytes, shard_images or plan.shard_images,
                                        plan.image_bytes))
    if differences:
        raise ValueError(f"packing plan (={path}) was made with {differences}; give the same options and index to resume it, or "
                         "another OUT")
    remove_dead(out)
    _check_space(index, out, plan)
    return plan


def _check_out(index: SampleIndex, out: Path) -> None:
    absolute = out.resolve()
    if absolute == index.path.resolve():
        raise ValueError(f"OUT (={out}) must not be the index itself; give the name of a new folder")
    if index.packed is not None:
        raise ValueError(f"INDEX (={index.path}) is packed already; give the index of the originals")
    for archive in index.archives:
        if archive.is_folder and archive.path.resolve() in (absolute, *absolute.parents):
            raise ValueError(f"OUT (={out}) must not lie in the folder of images {archive.path}; give another name")
    if out.exists() and not (out / PLAN).is_file() and not (out.is_dir() and all(map(is_temporary, out.iterdir()))):
        raise ValueError(f"OUT (={out}) exists and holds no packed shards; give the name of a new folder")


def _leading_splits(index: SampleIndex, splits: Sequence[str]) -> list[str]:
    """Splits to pack, in the order of the index. Rows keep their numbers, so none may be left out before one that is packed."""
    for split in splits:
        index.split_rows(split)
    packed = [split for split in index.split_names if not splits or split in splits]
    leading = index.split_names[:index.split_names.index(packed[-1]) + 1]
    if packed != leading:
        raise ValueError(f"--split (={' '.join(packed)}) must begin with {' '.join(leading)}: samples keep their numbers, and "
                         f"those of {packed[-1]} come last; give --split {' '.join(leading)}")
    return packed


def _estimate(index: SampleIndex, split: str, options: PackOptions, budget: float) -> int:
    """Bytes of an image in a shard, headers included: the mean of the first ones in the random order."""
    ids, skipped = order(index.ids(split), options.seed)[:_ESTIMATED], dict[int, str]()
    sizes = [len(encode(pixels, options)) for _, pixels in decoded(index, split, ids, options, 1, skipped)]
    check_budget(index, split, skipped, budget)
    return int(np.mean([-(-size // BLOCK) * BLOCK for size in sizes])) + 3 * BLOCK


def _check_space(index: SampleIndex, out: Path, plan: Plan) -> None:
    """Raises ValueError when what is left to write does not fit on the disk."""
    need = int(sum(map(len, missing(index, out, plan))) * plan.image_bytes * SPARE)
    disk = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(disk).free
    if out.is_dir():
        for file in filter(is_temporary, out.iterdir()):  # what other ranks have written of it
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                free += file.stat().st_size
    if free < need:
        raise ValueError(f"OUT (={out}) needs about {need / 1e9:,.2f} GB, but {disk} has {free / 1e9:,.2f} GB free; make room, "
                         "give another OUT, or a lower --quality")


def missing(index: SampleIndex, out: Path, plan: Plan) -> list[Piece]:
    """The shards that are not finished."""
    return [piece for piece in pieces(index, plan) if finished(out / f"{piece.name}.tar", plan.sha256) is None]


def write(index: SampleIndex, out: Path, plan: Plan, *, jobs: int = 1, rank: int = 0, world: int = 1, budget: float = 1e-4,
          progress: Progress) -> int:
    """Write the shards of this rank that are not finished, in processes; returns how many images were written.

    Raises RuntimeError when too many samples are unreadable, or a process dies; OSError of the disk.
    """
    unfinished = set(missing(index, out, plan))
    share = [piece for i, piece in enumerate(pieces(index, plan)) if i % world == rank and piece in unfinished]
    threads = max(1, jobs // max(1, len(share)))  # few shards: more threads for each
    tasks = [ShardTask(index, out, plan, piece, threads, budget) for piece in share]
    if share:
        progress.expect("packing", sum(map(len, share)) * plan.image_bytes)
    skipped: dict[str, dict[int, str]] = {split: {} for split in plan.source}
    written = 0
    for task, shard in zip(tasks, in_processes(write_shard, tasks, jobs), strict=True):
        split = task.piece.split
        written += len(shard.rows)
        skipped[split] |= shard.skipped
        check_budget(index, split, skipped[split], budget)
        progress.advance(len(shard.rows), shard.size)
    return written


def complete(index: SampleIndex, out: Path, plan: Plan, *, jobs: int = 1, budget: float = 1e-4,
             progress: Progress) -> tuple[SampleIndex, list[str]]:
    """Verify all shards and write the index, unless it is there; any number of ranks may do so at once.

    Returns:
        The index, and notes for the user: samples left out, statistics copied or to be computed.

    Raises:
        RuntimeError: a shard is damaged (the same command then writes it again), samples are missing or there twice, or more
            of them are unreadable than the budget allows.
    """
    shards = {piece: Shard.load(out / f"{piece.name}.json") for piece in pieces(index, plan)}
    progress.expect("verifying", sum(shard.size for shard in shards.values()))
    checks = in_processes(check_shard, [(out / f"{piece.name}.tar", shard) for piece, shard in shards.items()], jobs)
    for (piece, shard), problem in zip(shards.items(), checks, strict=True):
        if problem:
            (out / f"{piece.name}.json").unlink(missing_ok=True)
            raise RuntimeError(f"shard (={out / piece.name}.tar) {problem}; the same command writes it again")
        progress.advance(len(shard.rows), shard.size)
    skipped: dict[int, str] = {}
    for split in plan.source:
        of_split = [shard for piece, shard in shards.items() if piece.split == split]
        unreadable = {id: why for shard in of_split for id, why in shard.skipped.items()}
        check_budget(index, split, unreadable, budget)
        ids = np.sort(np.concatenate([np.array(list(unreadable), np.int64), *(shard.rows["id"] for shard in of_split)]))
        if not np.array_equal(ids, index.ids(split)):
            raise RuntimeError(f"packed samples of {split} (={len(ids)}) must be the {len(index.ids(split))} of the index, "
                               "each once; remove OUT and pack again")
        skipped |= unreadable
    if load_packed(out, plan) is None:
        write_packed_index(index, out, plan, shards, skipped)
    packed = SampleIndex.load(out)
    notes = [f"left out sample {id} (={index.safe_name(id)}): {why}" for id, why in sorted(skipped.items())]
    square_px = plan.options.square_px
    return packed, notes + [copy_stats(index, packed, split, square_px) for split in plan.source
                            if split == "train" or stats_path(index.path, square_px, split).exists()]
