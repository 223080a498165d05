"""One shard of packed images: a WebDataset tar with a sidecar.

The bytes of a shard are a function of (index, options, versions of decoder and encoder): members in the order of the plan, USTAR,
without times or owners. `NAME.tar` is renamed into place when it is on disk, then `NAME.json`, its sidecar, which so says
that the tar is finished.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.files import atomic_write, file_sha256
from pipeline.index.sample_index import SampleIndex
from pipeline.index.tar import BLOCK, ArchiveError, open_tar, walk
from pipeline.packing.images import check_budget, decoded, encode, squared_error
from pipeline.packing.plan import Piece, Plan, measured_ids, order

ROW = np.dtype([(name, np.int64) for name in ("id", "offset", "size", "crc32", "width", "height")])  # bytes; pixels


@dataclass
class Shard:
    """The sidecar of a finished shard.

    Attributes:
        plan: SHA-256 of the plan it was written for.
        size, sha256: of the tar.
        rows: (N,) ROW, the images in the order of the tar.
        skipped: unreadable ones, id → reason.
        errors: of a few images, id → summed squared difference of the encoded pixels, grey levels squared.
    """
    plan: str
    size: int
    sha256: str
    rows: npt.NDArray[Any]
    skipped: dict[int, str]
    errors: dict[int, int]

    def save(self, path: Path) -> None:
        """Write the sidecar, atomically."""
        with atomic_write(path) as file:
            file.write(json.dumps({**vars(self), "rows": self.rows.tolist()}).encode() + b"\n")

    @classmethod
    def load(cls, path: Path) -> "Shard":
        """Read what `save` wrote. Raises FileNotFoundError, ValueError when it is damaged."""
        try:
            about = json.loads(path.read_bytes())
            rows = np.array(list(map(tuple, about["rows"])), ROW)
            return cls(str(about["plan"]), int(about["size"]), str(about["sha256"]), rows,
                       {int(id): str(why) for id, why in about["skipped"].items()},
                       {int(id): int(error) for id, error in about["errors"].items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"sidecar (={path}) must be one that pack_shards.py wrote ({type(error).__name__}: {error}); "
                             "remove it, and the same command writes the shard again") from None


def finished(tar: Path, plan: str) -> Shard | None:
    """The sidecar of a shard, when it belongs to the plan and the tar has its size; None when the shard is to be written."""
    try:
        shard = Shard.load(tar.with_suffix(".json"))
        return shard if shard.plan == plan and tar.stat().st_size == shard.size else None
    except (FileNotFoundError, ValueError):
        return None


def key_of(index: SampleIndex, id: int) -> str:
    """The WebDataset key of a sample: nine digits of its id, then the stem of its original base name, in which whatever is no
    ASCII letter, digit, `_` or `-` (a dot would end the key) has become `_`."""
    base = index.safe_name(id).rpartition("/")[2]
    return f"{id:09d}-{re.sub('[^A-Za-z0-9_-]', '_', base.rpartition('.')[0] or base)[:80]}"


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a plain USTAR member without times and owners; returns the offset of its data."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
    return tar.offset - -(-len(data) // BLOCK) * BLOCK


@dataclass(frozen=True)
class ShardTask:
    """A shard to write: the work of one process. `threads`: of the decoder; `budget`: largest share of unreadable samples."""
    index: SampleIndex
    out: Path
    plan: Plan
    piece: Piece
    threads: int
    budget: float


def write_shard(task: ShardTask) -> Shard:
    """Write a tar, then its sidecar. Raises RuntimeError when too many samples are unreadable; OSError of the disk."""
    index, options, split = task.index, task.plan.options, task.piece.split
    path, ids = task.out / f"{task.piece.name}.tar", order(index.ids(split), options.seed)
    measured, rows = measured_ids(ids), []
    skipped: dict[int, str] = {}
    errors: dict[int, int] = {}
    with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for id, pixels in decoded(index, split, ids[task.piece.first:task.piece.stop], options, task.threads, skipped):
            check_budget(index, split, skipped, task.budget)
            jpeg, key = encode(pixels, options), key_of(index, id)
            offset, label = add_member(tar, f"{key}.jpg", jpeg), int(index.samples["label"][id])
            if label >= 0:
                add_member(tar, f"{key}.cls", str(label).encode())
            rows.append((id, offset, len(jpeg), zlib.crc32(jpeg), pixels.shape[1], pixels.shape[0]))
            if id in measured:
                errors[id] = squared_error(pixels, jpeg)
        check_budget(index, split, skipped, task.budget)
    shard = Shard(task.plan.sha256, path.stat().st_size, file_sha256(path), np.array(rows, ROW), dict(sorted(skipped.items())),
                  errors)
    shard.save(path.with_suffix(".json"))
    return shard


def check_shard(tar_and_shard: tuple[Path, Shard]) -> str:
    """Read a shard again: its SHA-256, and whether its members are those of the sidecar. Returns what is wrong, or ""."""
    tar, shard = tar_and_shard
    try:
        if file_sha256(tar) != shard.sha256:
            return "differs from the SHA-256 of what was written"
        with open_tar(tar, 1 << 20) as source:
            members = [(int(member.name[:9]), member.offset, member.size) for member in walk(source)
                       if member.name.endswith(".jpg")]
    except (OSError, ArchiveError) as error:
        return f"cannot be read ({error})"
    return "" if members == shard.rows[["id", "offset", "size"]].tolist() else "holds other images than its sidecar says"
