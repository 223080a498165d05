"""Packs an index once into shuffled WebDataset shards of small JPEGs, the paper's own preprocessing: data tier 2.

A plan says which image goes into which shard; each shard is written on its own (`pipeline.packing.shard`), by any process of any
rank, in any order, and can be written again with the same bytes. So a killed run goes on: what is finished stays. Whoever finds
all shards finished reads them again, and writes the index: row i is row i of the original, so that order, crops and labels of
training are the same from either. What is not packed (excluded, unreadable) keeps its row, which points at the reason in
`left-out.tar`.
"""

from __future__ import annotations

import dataclasses
import tempfile
import threading
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.index.tar import fingerprint
from pipeline.files import is_temporary, atomic_write
from pipeline.index.sample_index import FORMATS, REASONS, SAMPLE, Archive, SampleIndex
from pipeline.index.writer import write_index
from pipeline.packing.jpeg import allowed, check_budget, psnr
from pipeline.packing.plan import Piece, Plan, measured_ids, missing, order, pieces
from pipeline.packing.shard import Shard, TarWriter, check_shard, key_of, write_shard
from pipeline.parallel import Progress, in_processes
from pipeline.stats import Stats, stats_path

_LEFT_OUT = "left-out.tar"


@dataclass(frozen=True)
class _Task:
    index: SampleIndex
    out: Path
    plan: Plan
    piece: Piece
    threads: int
    budget: int


def write(index: SampleIndex, out: Path, plan: Plan, *, jobs: int = 1, rank: int = 0, world: int = 1, budget: float = 1e-4,
          progress: Progress) -> int:
    """Write the shards of this rank that are not finished, in processes; returns how many images were written.

    Raises RuntimeError when too many samples are unreadable, or a process dies; OSError of the disk.
    """
    if not 0 <= rank < world:
        raise ValueError(f"--rank (={rank}) must lie in 0…{world - 1}, below --world; correct it")
    left = set(missing(index, out, plan))
    mine = [piece for i, piece in enumerate(pieces(index, plan)) if i % world == rank and piece in left]
    if not mine:
        return 0
    threads = max(1, jobs // max(1, len(mine)))  # few shards: more threads for each
    tasks = [_Task(index, out, plan, piece, threads, allowed(index, piece.split, budget)) for piece in mine]
    progress.expect("packing", sum(piece.stop - piece.first for piece in mine) * plan.image_bytes)
    skipped: dict[str, dict[int, str]] = {split: {} for split in plan.source}
    written = 0
    with _Watch(out, mine, progress):
        for piece, shard in zip(mine, in_processes(_write, tasks, jobs), strict=True):
            written += len(shard.rows)
            skipped[piece.split] |= shard.skipped
            check_budget(index, piece.split, skipped[piece.split], allowed(index, piece.split, budget))
    return written


def complete(index: SampleIndex, out: Path, plan: Plan, *, jobs: int = 1, budget: float = 1e-4,
             progress: Progress) -> tuple[SampleIndex, list[str]]:
    """Verify all shards and write the index, unless it is there; any number of ranks may do so at once.

    Returns:
        The index, and what is worth saying: samples left out, statistics copied or to be computed.

    Raises:
        RuntimeError: a shard is damaged (the same command then writes it again), samples are missing or there twice, or more
            of them are unreadable than the budget allows.
    """
    every = pieces(index, plan)
    shards = [Shard.load(out / f"{piece.name}.json") for piece in every]
    progress.expect("verifying", sum(shard.size for shard in shards))
    checks = in_processes(_check, [(out / f"{piece.name}.tar", shard) for piece, shard in zip(every, shards)], jobs)
    for piece, shard, problem in zip(every, shards, checks, strict=True):
        if problem:
            (out / f"{piece.name}.json").unlink(missing_ok=True)
            raise RuntimeError(f"shard (={out / piece.name}.tar) {problem}; the same command writes it again")
        progress.advance(len(shard.rows), shard.size)
    skipped: dict[int, str] = {}
    for split in plan.source:
        parts = [shard for piece, shard in zip(every, shards) if piece.split == split]
        lost = {id: why for shard in parts for id, why in shard.skipped.items()}
        check_budget(index, split, lost, allowed(index, split, budget))
        there = np.sort(np.array([row.id for shard in parts for row in shard.rows] + list(lost), np.int64))
        if not np.array_equal(there, index.ids(split)):
            raise RuntimeError(f"packed samples of {split} (={len(there)}) must be the {len(index.ids(split))} of the index, "
                               "each once; remove OUT and pack again")
        skipped |= lost
    if _load(out, plan) is None:
        _write_index(index, out, plan, every, shards, skipped)
    made = SampleIndex.load(out)
    said = [f"left out sample {id} (={index.safe_name(id)}): {why}" for id, why in sorted(skipped.items())]
    return made, said + [_bring_stats(index, made, split, plan.options.square_px) for split in plan.source if split == "train"
                         or stats_path(index.path, plan.options.square_px, split).exists()]


def _check(task: tuple[Path, Shard]) -> str:
    return check_shard(*task)


def _write(task: _Task) -> Shard:
    piece, ids = task.piece, order(task.index.ids(task.piece.split), task.plan.options.seed)
    return write_shard(task.out / f"{piece.name}.tar", task.index, piece.split, ids[piece.first:piece.stop], task.plan.options,
                       task.plan.sha256, frozenset(measured_ids(ids)), task.threads, task.budget)


def _load(out: Path, plan: Plan) -> SampleIndex | None:
    """The index that lies in `out` already, whatever was excluded from it since; None when it is to be written."""
    try:
        index = SampleIndex.load(out)
    except ValueError:
        return None
    return index if index.packed is not None and index.packed["source"] == plan.source else None


def _write_index(index: SampleIndex, out: Path, plan: Plan, every: list[Piece], shards: list[Shard],
                 skipped: dict[int, str]) -> None:
    """Rows of the original, pointing at the packed images."""
    count = sum(len(index.samples[index.split_rows(split)]) for split in plan.source)
    rows = np.array(index.samples[:count])
    taken = [name for name in SAMPLE.names or () if name not in ("label", "split", "reason", "excluded")]
    for name in taken:
        rows[name] = 0
    for position, shard in enumerate(shards):
        ids = np.array([row.id for row in shard.rows], np.int64)
        for name in ("offset", "size", "crc32", "width", "height"):
            rows[name][ids] = [getattr(row, name) for row in shard.rows]
        rows["archive"][ids], rows["format"][ids], rows["channels"][ids] = position, FORMATS.index("jpeg"), 3
    lost = np.array(list(skipped), np.int64)
    rows["excluded"][lost], rows["reason"][lost] = 1, REASONS.index("damaged")
    rows["header_blocks"] = 1
    archives = [out / f"{piece.name}.tar" for piece in every]
    if rows["excluded"].any():
        archives.append(out / _LEFT_OUT)
        _write_left_out(index, out / _LEFT_OUT, rows, skipped)
        rows["archive"][rows["excluded"] != 0] = len(archives) - 1
    oddities = [entry for entry in index.header["oddities"] if entry["split"] in plan.source and entry["id"] not in skipped]
    oddities += [{"name": index.safe_name(id), "split": index.split_names[rows["split"][id]], "reason": f"damaged: {why}",
                  "kept": False, "id": id} for id, why in skipped.items()]
    oddities.sort(key=lambda entry: (entry["id"] is None, entry["id"] or 0))
    packed = {"source": plan.source, **asdict(plan.options), "shard_images": plan.shard_images, "encoder": plan.encoder,
              "measured": {split: _measures([s for p, s in zip(every, shards) if p.split == split]) for split in plan.source}}
    write_index(out.absolute(), rows, classes=index.classes, splits=list(plan.source), preset="packed", crc32=True,
                archives=[Archive(path.absolute(), path.stat().st_size, fingerprint(path), "tar") for path in archives],
                oddities=oddities, packed=packed)


def _write_left_out(index: SampleIndex, path: Path, rows: npt.NDArray[Any], skipped: dict[int, str]) -> None:
    """A tar of one text a sample that is not packed: a row has to point somewhere, and there it says why."""
    with atomic_write(path) as file:
        writer = TarWriter(file)
        for id in np.flatnonzero(rows["excluded"]).tolist():
            why = skipped.get(id, REASONS[rows["reason"][id]])
            text = f"not packed: sample {id} of the original index ({why})\n".encode()
            rows["offset"][id] = writer.add(f"{key_of(index, id)}.txt", text)
            rows["size"][id], rows["crc32"][id] = len(text), zlib.crc32(text)
        writer.end()


def _measures(shards: list[Shard]) -> dict[str, float]:
    """Of one split: images, mean bytes, and PSNR of the sample."""
    sizes = {row.id: row.width * row.height for shard in shards for row in shard.rows}
    values = [psnr(error, sizes[id]) for shard in shards for id, error in sorted(shard.errors.items())]
    total = sum(row.size for shard in shards for row in shard.rows)
    return {"images": len(sizes), "bytes": round(total / max(1, len(sizes)), 1), "measured": len(values),
            "psnr_mean": round(float(np.mean(values)), 2) if values else 0.0,
            "psnr_min": round(min(values), 2) if values else 0.0}


def _bring_stats(index: SampleIndex, made: SampleIndex, split: str, square_px: int) -> str:
    """Copy the statistics of the original, bound to the packed split; says what was done."""
    path = stats_path(made.path, square_px, split)
    command = f"run `python tools/compute_stats.py {made.path} --square-px {square_px} --split {split}`"
    if path.exists():
        return f"{path} is there"
    try:
        stats = Stats.for_index(index, square_px, split)
    except ValueError:
        return f"no statistics of {split} at {square_px} px beside the original to copy; {command}"
    with tempfile.TemporaryDirectory() as folder, atomic_write(path) as file:
        dataclasses.replace(stats, index=made.split_sha256(split)).save(Path(folder) / path.name)
        file.write((Path(folder) / path.name).read_bytes())
    return f"{path} copied from the original"


class _Watch:
    """Tells a Progress, from a thread, how many bytes of the shards being written are on disk."""

    def __init__(self, out: Path, mine: list[Piece], progress: Progress) -> None:
        self._out, self._names, self._progress = out, {f"{piece.name}.tar" for piece in mine}, progress
        self._told = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(0.5):
            self._tell()
        self._tell()

    def _tell(self) -> None:
        now = 0
        for file in self._out.iterdir():
            name = file.name
            if name in self._names or is_temporary(file) and name[1:name.find(".tar.") + 4] in self._names:
                try:
                    now += file.stat().st_size
                except OSError:  # renamed meanwhile
                    continue
        self._progress.advance(0, max(0, now - self._told))
        self._told = max(now, self._told)
