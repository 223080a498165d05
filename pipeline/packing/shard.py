"""One shard of packed images: decoded by our own DALI path, encoded again, written as a WebDataset tar with a sidecar.

The bytes of a shard are a function of (index, options, versions of decoder and encoder): members in the order of the plan, USTAR,
without times or owners. `NAME.tar` is renamed into place when it is on disk, then `NAME.json`, its sidecar, which so says
that the tar is finished. S side of the square, H row, W column of an image.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from pipeline.index.tar import ArchiveError, open_tar, walk
from pipeline.files import atomic_write
from pipeline.packing.jpeg import PackOptions, check_budget, decoded, encode, squared_error

if TYPE_CHECKING:
    from pipeline.index.sample_index import SampleIndex

_RECORD = 20 * 512  # tar pads the archive to this
_READ = 4 << 20


@dataclass(frozen=True)
class Row:
    """Where a packed image lies in its shard; bytes, pixels."""
    id: int
    offset: int
    size: int
    crc32: int
    width: int
    height: int


@dataclass
class Shard:
    """What the sidecar of a finished shard says.

    Attributes:
        plan: SHA-256 of the plan it was written for.
        size, sha256: of the tar.
        rows: the images, in the order of the tar.
        skipped: unreadable ones, id → reason.
        errors: of a few images, id → summed squared difference of the encoded pixels, grey levels squared.
    """
    plan: str
    size: int
    sha256: str
    rows: list[Row] = field(default_factory=list)
    skipped: dict[int, str] = field(default_factory=dict)
    errors: dict[int, int] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the sidecar, whole or not at all."""
        about: dict[str, Any] = {"plan": self.plan, "size": self.size, "sha256": self.sha256,
                                 "rows": [[row.id, row.offset, row.size, row.crc32, row.width, row.height] for row in self.rows],
                                 "skipped": self.skipped, "errors": self.errors}
        with atomic_write(path) as file:
            file.write(json.dumps(about).encode() + b"\n")

    @classmethod
    def load(cls, path: Path) -> "Shard":
        """Read what `save` wrote. Raises FileNotFoundError, ValueError when it is damaged."""
        try:
            about = json.loads(path.read_bytes())
            return cls(str(about["plan"]), int(about["size"]), str(about["sha256"]), [Row(*row) for row in about["rows"]],
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


def key_of(index: "SampleIndex", id: int) -> str:
    """The WebDataset key of a sample: nine digits of its id, then the stem of its original base name, in which whatever is no
    ASCII letter, digit, `_` or `-` (a dot would end the key) has become `_`."""
    base = index.safe_name(id).rpartition("/")[2]
    return f"{id:09d}-{re.sub('[^A-Za-z0-9_-]', '_', base.rpartition('.')[0] or base)[:80]}"


class TarWriter:
    """Writes plain USTAR members without times and owners to a file, and hashes what it writes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self.size = file, hashlib.sha256(), 0

    def add(self, name: str, data: bytes) -> int:
        """Append a member; returns the offset of its data."""
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        offset = self.size
        self._write(data + bytes(-len(data) % 512))
        return offset

    def end(self) -> str:
        """Write the end-of-archive mark; returns the SHA-256 (hex) of the whole."""
        self._write(bytes(1024 + -(self.size + 1024) % _RECORD))
        return self._digest.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)


def write_shard(tar: Path, index: "SampleIndex", split: str, ids: npt.NDArray[np.int64], options: PackOptions, plan: str,
                measured: frozenset[int], threads: int, budget: int) -> Shard:
    """Pack samples `ids` into `tar`, then write its sidecar.

    Args:
        plan: SHA-256 of the plan, for the sidecar.
        measured: ids whose error is measured.
        threads: of the decoder.
        budget: how many samples may be unreadable.

    Raises:
        RuntimeError: more samples are unreadable. OSError: the disk.
    """
    shard = Shard(plan, 0, "")
    with atomic_write(tar) as file:
        writer = TarWriter(file)
        for id, pixels in decoded(index, split, ids, options, threads, shard.skipped):
            check_budget(index, split, shard.skipped, budget)
            jpeg, key = encode(pixels, options.quality, options.subsampling), key_of(index, id)
            offset, label = writer.add(f"{key}.jpg", jpeg), int(index.samples["label"][id])
            if label >= 0:
                writer.add(f"{key}.cls", str(label).encode())
            shard.rows.append(Row(id, offset, len(jpeg), zlib.crc32(jpeg), pixels.shape[1], pixels.shape[0]))
            if id in measured:
                shard.errors[id] = squared_error(pixels, jpeg)
        check_budget(index, split, shard.skipped, budget)
        shard.sha256 = writer.end()
        shard.size = writer.size
    shard.skipped = dict(sorted(shard.skipped.items()))  # threads found them
    shard.save(tar.with_suffix(".json"))
    return shard


def check_shard(tar: Path, shard: Shard) -> str:
    """Read a shard again: its SHA-256, and whether its members are those of the sidecar. Returns what is wrong, or ""."""
    digest = hashlib.sha256()
    try:
        with open(tar, "rb") as file:
            while block := file.read(_READ):
                digest.update(block)
        if digest.hexdigest() != shard.sha256:
            return "differs from the SHA-256 of what was written"
        with open_tar(tar, 1 << 20) as source:
            found = [(int(member.name[:9]), member.offset, member.size) for member in walk(source)
                     if member.name.endswith(".jpg")]
    except (OSError, ArchiveError) as error:
        return f"cannot be read ({error})"
    return "" if found == [(row.id, row.offset, row.size) for row in shard.rows] else "holds other images than its sidecar says"
