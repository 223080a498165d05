"""Packs an index once into shuffled WebDataset shards of small JPEGs, the paper's own preprocessing: data tier `packed`.

A plan says which image goes into which shard; each shard is written on its own, by any process of any rank, in any order, and
can be written again with the same bytes. So a killed run resumes: what is finished stays. Whoever finds all shards finished reads
them again, and writes the index. Its row i is row i of the original, so order, crops and labels of training are the same from
either; what is not packed (excluded, unreadable) keeps its row, which points at the reason in `left-out.tar`.
"""
import contextlib
import shutil
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.files import atomic_write, is_temporary, locked_folder, remove_dead
from pipeline.index.header import Archive
from pipeline.index.sample_index import FORMATS, REASONS, SampleIndex
from pipeline.index.tar import BLOCK, fingerprint
from pipeline.index.verify import check_files, check_rows
from pipeline.index.writer import write_index
from pipeline.packing.plan import PackOptions, Piece, Plan, order, pieces
from pipeline.packing.shard import (ENCODER, ROW, Shard, add_member, check_budget, check_shard, decoded, encode, finished, key_of,
                                    psnr, write_shard)
from pipeline.process_pool import Progress, in_processes
from pipeline.progress import size_text
from pipeline.stats import Stats, stats_path

PLAN = "plan.json"
LEFT_OUT = "left-out.tar"
_ESTIMATED = 256  # images that are encoded to estimate the size of all
SPARE = 1.05  # of the estimated bytes, that must be free


def prepare(index: SampleIndex, out: Path, options: PackOptions, *, splits: Sequence[str] = (), shard_images: int = 0,
            shard_bytes: int = 1_000_000_000, budget: float = 1e-4) -> Plan:
    """The plan of folder `out`: the one that lies there, or a new one. Removes what dead processes left.

    splits: to pack, all if none; shard_images: most images of a shard, 0: as many as are estimated to fill `shard_bytes`; budget:
    largest share of unreadable samples. Raises ValueError: the folder holds something else, or shards of other options or another
    index; the disk is too small.
    """
    _check_out(index, out)
    splits = _leading_splits(index, splits)
    source = {split: index.split_sha256(split) for split in splits}
    for split in splits:
        index.check_archives(split)
        if not len(index.ids(split)):
            raise ValueError(f"split (={split}) of {index.path} must have samples; it has none, see alexnet index info")
    path, wanted = out / PLAN, Plan(options, source, ENCODER, 0 if shard_images else shard_bytes, shard_images, 0)
    if not path.exists():
        image_bytes = _estimate(index, splits[0], options, budget)
        plan = replace(wanted, shard_images=shard_images or max(1, shard_bytes // image_bytes), image_bytes=image_bytes)
        _check_space(index, out, plan)
        out.mkdir(parents=True, exist_ok=True)
        with locked_folder(out):
            if not path.exists():  # else another rank has been quicker
                plan.save(path)
    plan = Plan.load(path)
    if differences := plan.differences(replace(wanted, shard_images=shard_images or plan.shard_images)):
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
    need = int(sum(piece.images for piece in missing(index, out, plan)) * plan.image_bytes * SPARE)
    disk = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(disk).free
    if out.is_dir():
        for file in filter(is_temporary, out.iterdir()):  # what other ranks have written of it
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                free += file.stat().st_size
    if free < need:
        raise ValueError(f"OUT (={out}) needs about {size_text(need)}, but {disk} has {size_text(free)} free; make room, "
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
    if share:
        progress.expect("packing", sum(piece.images for piece in share) * plan.image_bytes)
    skipped: dict[str, dict[int, str]] = {split: {} for split in plan.source}
    written = 0
    shards = in_processes(write_shard, [(index, out, plan, piece, threads, budget) for piece in share], jobs)
    for piece, shard in zip(share, shards, strict=True):
        written += len(shard.rows)
        skipped[piece.split] |= shard.skipped
        check_budget(index, piece.split, skipped[piece.split], budget)
        progress.advance(len(shard.rows), shard.size)
    return written


def complete(index: SampleIndex, out: Path, plan: Plan, *, jobs: int = 1, budget: float = 1e-4,
             progress: Progress) -> tuple[SampleIndex, list[str]]:
    """Verify all shards and write the index, unless it is there; any number of ranks may do so at once. Returns the index, and
    notes for the user: samples left out, statistics copied or to be computed.

    Raises RuntimeError: a shard is damaged (the same command then writes it again), samples are missing or there twice, or more
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
    if not (out / "index.json").exists():
        _write_index(index, out, plan, shards, skipped)
    packed = _written(out, plan)
    notes = [f"left out sample {id} (={index.safe_name(id)}): {why}" for id, why in sorted(skipped.items())]
    square_px = plan.options.square_px
    return packed, notes + [_copy_stats(index, packed, split, square_px) for split in plan.source
                            if split == "train" or stats_path(index.path, square_px, split).exists()]


def _written(out: Path, plan: Plan) -> SampleIndex:
    """The index in `out`, whatever was excluded from it since. Raises RuntimeError when it or left-out.tar is damaged: written
    again, it would include again what was excluded."""
    advice = "; remove index.json, and the same command writes it again (what was excluded from it since, it includes again)"
    try:
        packed = SampleIndex.load(out)
    except ValueError as error:
        raise RuntimeError(f"index of packed images (={out}) is damaged ({error}){advice}") from None
    if (packed.packed or {}).get("source") != plan.source:
        raise RuntimeError(f"index of packed images (={out}) is not of these images{advice}")
    rest = [position for position, archive in enumerate(packed.archives) if archive.path.name == LEFT_OUT]
    findings = [*check_files(packed), *check_rows(packed, np.flatnonzero(np.isin(packed.samples["archive"], rest)), True)]
    if findings:
        raise RuntimeError(f"packed images (={findings[0].name} of {out}) are damaged: {findings[0].problem}{advice}")
    return packed


def _write_index(index: SampleIndex, out: Path, plan: Plan, shards: dict[Piece, Shard], skipped: dict[int, str]) -> None:
    """Write the index of all `shards`; `skipped`: unreadable samples, id → reason."""
    rows = np.zeros(sum(len(index.samples[index.split_rows(split)]) for split in plan.source), index.samples.dtype)
    for name in ("label", "split", "reason", "excluded"):
        rows[name] = index.samples[name][:len(rows)]
    for position, shard in enumerate(shards.values()):
        ids = shard.rows["id"]
        for name in (ROW.names or ())[1:]:
            rows[name][ids] = shard.rows[name]
        rows["archive"][ids], rows["format"][ids], rows["channels"][ids] = position, FORMATS.index("jpeg"), 3
    lost = list(skipped)
    rows["excluded"][lost], rows["reason"][lost] = 1, REASONS.index("damaged")
    rows["header_blocks"] = 1
    archives = [out / f"{piece.name}.tar" for piece in shards]
    if rows["excluded"].any():
        archives.append(out / LEFT_OUT)
        _write_left_out(index, out / LEFT_OUT, rows, skipped)
        rows["archive"][rows["excluded"] != 0] = len(archives) - 1
    oddities = [entry for entry in index.header["oddities"] if entry["split"] in plan.source and entry["id"] not in skipped]
    oddities += [{"name": index.safe_name(id), "split": index.split_names[rows["split"][id]], "reason": f"damaged: {why}",
                  "kept": False, "id": id} for id, why in skipped.items()]
    oddities.sort(key=lambda entry: (entry["id"] is None, entry["id"] or 0))
    packed = {"source": plan.source, **asdict(plan.options), "shard_images": plan.shard_images, "encoder": plan.encoder,
              "measured": {split: _measured([shard for piece, shard in shards.items() if piece.split == split])
                           for split in plan.source}}
    write_index(out.absolute(), rows, classes=index.classes, splits=list(plan.source), preset="packed", crc32=True,
                archives=[Archive(path.absolute(), path.stat().st_size, fingerprint(path), "tar") for path in archives],
                oddities=oddities, packed=packed)


def _write_left_out(index: SampleIndex, path: Path, rows: npt.NDArray[Any], skipped: dict[int, str]) -> None:
    """A tar with a text for each sample that is not packed: a row has to point somewhere, and there it says why."""
    with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for id in np.flatnonzero(rows["excluded"]).tolist():
            why = skipped.get(id, REASONS[rows["reason"][id]])
            text = f"not packed: sample {id} of the original index ({why})\n".encode()
            rows["offset"][id] = add_member(tar, f"{key_of(index, id)}.txt", text)
            rows["size"][id], rows["crc32"][id] = len(text), zlib.crc32(text)


def _measured(shards: list[Shard]) -> dict[str, float]:
    """Of one split: images, their mean bytes, and PSNR of those that were measured."""
    rows = np.concatenate([shard.rows for shard in shards])
    pixels = dict(zip(rows["id"].tolist(), (rows["width"] * rows["height"]).tolist()))
    values = [psnr(error, pixels[id]) for shard in shards for id, error in sorted(shard.errors.items())] or [0.0]
    return {"images": len(rows), "bytes": round(int(rows["size"].sum()) / max(1, len(rows)), 1),
            "measured": sum(len(shard.errors) for shard in shards),
            "psnr_mean": round(float(np.mean(values)), 2), "psnr_min": round(min(values), 2)}


def _copy_stats(index: SampleIndex, packed: SampleIndex, split: str, square_px: int) -> str:
    """Copy the statistics of the original, bound to the packed split; returns what was done, for the user."""
    path = stats_path(packed.path, square_px, split)
    if path.exists():
        Stats.load(path)  # raises when it is damaged
        return f"{path} is there"
    if not stats_path(index.path, square_px, split).exists():
        return (f"no statistics of {split} at {square_px} px beside the original to copy; run `alexnet stats "
                f"{packed.path} --square-px {square_px} --split {split}`")
    try:
        stats = Stats.for_index(index, square_px, split)
    except ValueError as error:
        return f"statistics of {split} not copied: {error}"
    replace(stats, index=packed.split_sha256(split)).save(path)
    return f"{path} copied from the original"
