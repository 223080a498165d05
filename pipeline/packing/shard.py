"""One shard of packed images: originals decoded as the loaders see them, encoded as small JPEGs in a WebDataset tar.

The bytes of a shard are a function of (index, options, versions of decoder and encoder): members in the order of the plan, USTAR,
without times or owners. `NAME.tar` is renamed into place when it is on disk, then `NAME.json`, its sidecar, which so says
that the tar is finished. H row, W column of an image.
"""
import io
import json
import math
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import nvidia.dali
import simplejpeg
from zlib_ng.zlib_ng import crc32

from pipeline.config import DataConfig, LoaderConfig
from pipeline.decoding import geometry
from pipeline.decoding.dali import DecodeError, WholeImages
from pipeline.files import atomic_write, file_sha256, read_manifest, with_own_hash
from pipeline.index.image_header import probe
from pipeline.index.sample_index import SampleIndex
from pipeline.index.tar import BLOCK, ArchiveError, open_tar, walk
from pipeline.loading.eval_loader import square_loader
from pipeline.packing.plan import OWN_HASH, Ids, PackOptions, Piece, Plan, measured_ids, order
from pipeline.reading.quarantine import SampleError
from pipeline.reading.source import ArchiveSource
from pipeline.sampling.batch_plan import Encoded
from pipeline.schema import Count, Sha256, read_as

BATCH = 32  # images decoded together: 6 MB of squares
ENCODER = f"simplejpeg {simplejpeg.__version__}, DALI {nvidia.dali.__version__}"  # the libraries that decide the bytes
Pixels = npt.NDArray[np.uint8]
ROW = np.dtype([(name, np.int64) for name in ("id", "offset", "size", "crc32", "width", "height")])  # bytes; pixels


@dataclass(frozen=True)
class _Sidecar:
    """Schema of a sidecar; see `Shard`."""
    plan: Sha256
    size: Count
    sha256: Sha256
    rows: list[list[Count]]
    skipped: dict[str, str]
    errors: dict[str, Count]


@dataclass
class Shard:
    """The sidecar of a finished shard."""
    plan: str  # SHA-256 of the plan it was written for
    size: int  # of the tar
    sha256: str
    rows: npt.NDArray[Any]  # (N,) ROW, the images in the order of the tar
    skipped: dict[int, str]  # unreadable ones, id → reason
    errors: dict[int, int]  # of a few images, id → summed squared difference of the encoded pixels, grey levels squared

    @classmethod
    def load(cls, path: Path) -> "Shard":
        """Read a sidecar. Raises FileNotFoundError, ValueError when it is damaged."""
        try:
            about = read_as(_Sidecar, read_manifest(path, hash_if_any=OWN_HASH), "sidecar")
            return cls(about.plan, about.size, about.sha256, np.array(list(map(tuple, about.rows)), ROW),
                       {int(id): why for id, why in about.skipped.items()},
                       {int(id): error for id, error in about.errors.items()})
        except (ValueError, TypeError, OverflowError) as error:  # NumPy's: rows of another length
            raise ValueError(f"sidecar (={path}) must be one that pack_shards.py wrote ({error}); remove it, and the same "
                             "command writes the shard again") from None


def finished(tar: Path, plan: str) -> Shard | None:
    """The sidecar of a shard, when the tar has its size; None when the shard is to be written. Raises RuntimeError when it was
    written for another plan, which would write all shards again."""
    try:
        shard = Shard.load(tar.with_suffix(".json"))
        has_its_size = tar.stat().st_size == shard.size
    except (FileNotFoundError, ValueError):
        return None
    if shard.plan != plan:
        raise RuntimeError(f"sidecar (={tar.with_suffix('.json')}) was written for another plan.json than the one beside it, so "
                           "one of them was altered; restore it, or give another OUT")
    return shard if has_its_size else None


def key_of(index: SampleIndex, id: int) -> str:
    """The WebDataset key of a sample: nine digits of its id, then the stem of its original base name, in which whatever is no
    ASCII letter, digit, `_` or `-` (a dot would end the key) has become `_`."""
    try:
        base = index.name(id).rpartition("/")[2]
    except ArchiveError:  # what cannot be read now is an error: another key would be another shard
        base = "?"
    return f"{id:09d}-{re.sub('[^A-Za-z0-9_-]', '_', base.rpartition('.')[0] or base)[:80]}"


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a plain USTAR member without times and owners; returns the offset of its data."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
    return tar.offset - -(-len(data) // BLOCK) * BLOCK


def write_shard(index: SampleIndex, out: Path, plan: Plan, piece: Piece, threads: int, budget: float) -> Shard:
    """Write a tar, then its sidecar. Raises RuntimeError when more samples than `budget` are unreadable; OSError."""
    path, ids = out / f"{piece.name}.tar", order(index.ids(piece.split), plan.options.seed)
    measured, rows = measured_ids(ids), []
    skipped: dict[int, str] = {}
    errors: dict[int, int] = {}
    with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for id, pixels in decoded(index, piece.split, ids[piece.first:piece.stop], plan.options, threads, skipped):
            check_budget(index, piece.split, skipped, budget)
            jpeg, key = encode(pixels, plan.options), key_of(index, id)
            offset, label = add_member(tar, f"{key}.jpg", jpeg), int(index.samples["label"][id])
            if label >= 0:
                add_member(tar, f"{key}.cls", str(label).encode())
            rows.append((id, offset, len(jpeg), crc32(jpeg), pixels.shape[1], pixels.shape[0]))
            if id in measured:
                errors[id] = squared_error(pixels, jpeg)
        check_budget(index, piece.split, skipped, budget)
    shard = Shard(plan.sha256, path.stat().st_size, file_sha256(path), np.array(rows, ROW), dict(sorted(skipped.items())), errors)
    with atomic_write(path.with_suffix(".json")) as sidecar:
        content = json.loads(json.dumps({**vars(shard), "rows": shard.rows.tolist()}))  # keys are texts, rows lists
        sidecar.write(json.dumps(with_own_hash(content, OWN_HASH)).encode() + b"\n")
    return shard


def check_shard(tar: Path, shard: Shard) -> str:
    """Read a shard again: its SHA-256, and whether its images are those of the sidecar. Returns what is wrong, or "". Raises
    OSError when it cannot be read now."""
    if file_sha256(tar) != shard.sha256:
        return "differs from the SHA-256 of what was written"
    found = []
    try:
        with open_tar(tar, 1 << 20) as source:
            for member in walk(source):
                if member.name.endswith(".jpg"):
                    data = source.at(member.offset, member.size)
                    size = probe(data, True)[1:3]
                    found.append((int(member.name[:9]), member.offset, member.size, crc32(data), *size))
    except ArchiveError as error:
        return f"cannot be read ({error})"
    return "" if found == shard.rows.tolist() else "holds other images than its sidecar says"


def decoded(index: SampleIndex, split: str, ids: Ids, options: PackOptions, threads: int,
            skipped: dict[int, str]) -> Iterator[tuple[int, Pixels]]:
    """(id, (H, W, 3) uint8) of the samples, in order, as the loaders see them; unreadable ones go into `skipped` instead."""
    if options.region == "full":
        yield from _whole(index, ids, options.square_px, threads, skipped)
        return
    data = DataConfig(region="square", square_px=options.square_px, crop_px=options.square_px, mirror=False, lighting=0,
                      mean="channel")
    machine = LoaderConfig(threads=threads)
    with square_loader(index, split, data, BATCH, None, machine=machine, skip_corrupt=True, ids=ids) as loader:
        for batch in loader:
            skipped.update(loader.skipped)
            yield from zip(batch.ids.tolist(), batch.images.numpy())
        skipped.update(loader.skipped)


def _whole(index: SampleIndex, ids: Ids, short_px: int, threads: int, skipped: dict[int, str]) -> Iterator[tuple[int, Pixels]]:
    """(id, (H, W, 3) uint8) of whole images at a short side of `short_px`, as `decoded`."""
    source, together, alone = ArchiveSource(index), WholeImages(BATCH, threads), None
    for first in range(0, len(ids), BATCH):
        some = ids[first:first + BATCH]
        encoded: dict[int, Encoded] = {}
        for id, found in zip(some.tolist(), source.read_batch(some, np.zeros_like(some))):
            if not isinstance(found, SampleError):
                encoded[id] = found
            elif isinstance(found.__cause__, OSError):
                raise found.__cause__  # not read, so not corrupt
            else:
                skipped[id] = found.reason
        sizes = geometry.sizes(index, np.array(list(encoded), np.int64))
        resized = geometry.resized(sizes, short_px)
        try:
            if encoded:
                yield from zip(encoded, together.images(list(encoded.values()), sizes, resized))
            continue
        except DecodeError:
            pass  # it does not say which one
        alone = alone or WholeImages(1, 1)
        for i, (id, data) in enumerate(encoded.items()):
            try:
                yield id, alone.images([data], sizes[i:i + 1], resized[i:i + 1])[0]
            except DecodeError as error:
                skipped[id] = error.reason


def encode(pixels: Pixels, options: PackOptions) -> bytes:
    """(H, W, 3) uint8 RGB → JPEG, by libjpeg-turbo."""
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), options.quality, "RGB", options.subsampling))


def squared_error(pixels: Pixels, jpeg: bytes) -> int:
    """Sum of squared differences between pixels and their JPEG, grey levels squared; exact."""
    return int(((simplejpeg.decode_jpeg(jpeg, "RGB").astype(np.int64) - pixels) ** 2).sum())


def psnr(error: int, pixels: int) -> float:
    """Peak signal-to-noise ratio in dB of a squared error summed over so many pixels of three channels; at most 100, so that
    equal pixels have a number too."""
    return float(min(10 * np.log10(255 ** 2 * 3 * pixels / max(error, 1e-9)), 100.0))


def check_budget(index: SampleIndex, split: str, skipped: dict[int, str], budget: float) -> None:
    """Raises RuntimeError when a larger share than `budget` of a split's samples is unreadable."""
    if not skipped:
        return
    entry = index.header["splits"][index.split_names.index(split)]
    most = math.ceil(budget * (entry["count"] - entry["excluded"]))
    if len(skipped) > most:
        id, why = next(iter(skipped.items()))
        raise RuntimeError(f"unreadable samples of {split} (={len(skipped)}) must not exceed the budget (={most}); one of "
                           f"them: {index.safe_name(id)} {why}; look with `alexnet index verify {index.path} "
                           "--scrub`, and raise --budget to leave them out")
