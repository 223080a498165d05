"""The index of packed shards: row i is row i of the original, so order, crops and labels of training are the same from either.

What is not packed (excluded, unreadable) keeps its row, which points at the reason in `left-out.tar`.
"""

from __future__ import annotations

import tarfile
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.files import atomic_write
from pipeline.index.sample_index import FORMATS, REASONS, Archive, SampleIndex
from pipeline.index.tar import fingerprint
from pipeline.index.writer import write_index
from pipeline.packing.images import psnr
from pipeline.packing.plan import Piece, Plan
from pipeline.packing.shard import ROW, Shard, add_member, key_of
from pipeline.stats import Stats, stats_path

_LEFT_OUT = "left-out.tar"


def load_packed(out: Path, plan: Plan) -> SampleIndex | None:
    """The index that lies in `out` already, whatever was excluded from it since; None when it is to be written."""
    try:
        index = SampleIndex.load(out)
    except ValueError:
        return None
    return index if index.packed is not None and index.packed["source"] == plan.source else None


def write_packed_index(index: SampleIndex, out: Path, plan: Plan, shards: dict[Piece, Shard], skipped: dict[int, str]) -> None:
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
        archives.append(out / _LEFT_OUT)
        _write_left_out(index, out / _LEFT_OUT, rows, skipped)
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
    values = [psnr(error, pixels[id]) for shard in shards for id, error in sorted(shard.errors.items())]
    return {"images": len(rows), "bytes": round(int(rows["size"].sum()) / max(1, len(rows)), 1), "measured": len(values),
            "psnr_mean": round(float(np.mean(values)), 2) if values else 0.0,
            "psnr_min": round(min(values), 2) if values else 0.0}


def copy_stats(index: SampleIndex, packed: SampleIndex, split: str, square_px: int) -> str:
    """Copy the statistics of the original, bound to the packed split; returns what was done, for the user."""
    path = stats_path(packed.path, square_px, split)
    if path.exists():
        return f"{path} is there"
    try:
        stats = Stats.for_index(index, square_px, split)
    except ValueError:
        return (f"no statistics of {split} at {square_px} px beside the original to copy; run `python tools/compute_stats.py "
                f"{packed.path} --square-px {square_px} --split {split}`")
    replace(stats, index=packed.split_sha256(split)).save(path)
    return f"{path} copied from the original"
