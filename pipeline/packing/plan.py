"""The plan of a packing: which image goes into which shard, decided before the first one is written.

It lies in `plan.json` of the output folder, and is a function of the index and the options; a later call, or another rank, has to
agree with it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Sequence

import numpy as np

from pipeline.files import is_temporary, remove_dead, atomic_write
from pipeline.rng import Purpose, bits
from pipeline.index.sample_index import SampleIndex
from pipeline.packing.jpeg import Ids, PackOptions, allowed, check_budget, decoded, encode, encoder
from pipeline.packing.shard import finished

MEASURED = 200  # images of a split whose PSNR is measured
_ESTIMATED = 256  # images that are encoded to guess the size of all
PLAN = "plan.json"
_SPARE = 1.05  # of the guessed bytes, that must be free


@dataclass(frozen=True)
class Plan:
    """What is packed, and how it is cut into shards.

    Attributes:
        options: what decides an image's bytes.
        source: split → `split_sha256` of the original, in the order of its splits.
        encoder: library and version that writes the JPEGs, and the one that decoded the originals.
        shard_bytes: what a shard was to have; 0 when its images were given.
        shard_images: most images of a shard.
        image_bytes: a guess at an image's share of a shard.
    """
    options: PackOptions
    source: dict[str, str]
    encoder: str
    shard_bytes: int
    shard_images: int
    image_bytes: int

    @property
    def sha256(self) -> str:
        """Of all but the guess."""
        return hashlib.sha256(json.dumps({**asdict(self), "image_bytes": 0}, sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read plan.json. Raises ValueError when it is none."""
        try:
            about = json.loads(path.read_bytes())
            return cls(**{**about, "options": PackOptions(**about["options"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"packing plan (={path}) must be one that pack_shards.py wrote ({type(error).__name__}: {error}); "
                             "give another OUT") from None


@dataclass(frozen=True)
class Piece:
    """The shard `name` holds positions [first, stop) of its split's random order."""
    name: str
    split: str
    first: int
    stop: int


def order(ids: Ids, seed: int) -> Ids:
    """Sample ids in the order of the shards: sorted by a random number of each."""
    return ids[np.lexsort((ids, bits(seed, Purpose.PACK, ids)))]


def pieces(index: SampleIndex, plan: Plan) -> list[Piece]:
    """All shards of a plan; those of a split are of equal size, but for one image."""
    found = []
    for split in plan.source:
        count = len(index.ids(split))
        shards = -(-count // plan.shard_images)
        found += [Piece(f"{split}-{i:06d}", split, i * count // shards, (i + 1) * count // shards) for i in range(shards)]
    return found


def measured_ids(ids: Ids) -> list[int]:
    """Up to MEASURED ids, spread evenly over a split's random order: those whose PSNR is measured."""
    return ids[np.unique(np.linspace(0, len(ids) - 1, min(MEASURED, len(ids))).astype(np.int64))].tolist()


def prepare(index: SampleIndex, out: Path, options: PackOptions, *, splits: Sequence[str] = (), shard_images: int = 0,
            shard_bytes: int = 1_000_000_000, budget: float = 1e-4) -> Plan:
    """The plan of folder `out`: the one that lies there, or a new one. Removes what dead processes left.

    Args:
        splits: to pack; none means all.
        shard_images: most images of a shard; 0: as many as are guessed to fill `shard_bytes`.
        budget: largest share of unreadable samples.

    Raises:
        ValueError: the folder holds something else, or shards of other options or another index; the disk is too small.
    """
    _check_out(index, out)
    splits = _leading(index, splits)
    source = {split: index.split_sha256(split) for split in splits}
    for split in splits:
        index.check_archives(split)
        if not len(index.ids(split)):
            raise ValueError(f"split (={split}) of {index.path} must have samples; it has none, see build_index.py info")
    path = out / PLAN
    if not path.exists():
        image_bytes = _guess(index, splits[0], options, budget)
        plan = Plan(options, source, encoder(), 0 if shard_images else shard_bytes,
                    shard_images or max(1, shard_bytes // image_bytes), image_bytes)
        _check_space(index, out, plan)
        out.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, keep=True) as file:
            file.write((json.dumps(asdict(plan), indent=1) + "\n").encode())
    plan = Plan.load(path)
    new = Plan(options, source, encoder(), 0 if shard_images else shard_bytes, shard_images or plan.shard_images,
               plan.image_bytes)
    if new != plan:
        raise ValueError(f"packing plan (={path}) was made with {_differences(plan, new)}; give the same options and index to "
                         "go on with it, or another OUT")
    remove_dead(out)
    _check_space(index, out, plan)
    return plan


def missing(index: SampleIndex, out: Path, plan: Plan) -> list[Piece]:
    """The shards that are not finished."""
    return [piece for piece in pieces(index, plan) if finished(out / f"{piece.name}.tar", plan.sha256) is None]


def _check_out(index: SampleIndex, out: Path) -> None:
    here = out.resolve()
    if here == index.path.resolve():
        raise ValueError(f"OUT (={out}) must not be the index itself; give the name of a new folder")
    if index.packed is not None:
        raise ValueError(f"INDEX (={index.path}) is packed already; give the index of the originals")
    for archive in index.archives:
        if archive.kind == "folder" and (here == archive.path.resolve() or archive.path.resolve() in here.parents):
            raise ValueError(f"OUT (={out}) must not lie in the folder of images {archive.path}; give another name")
    if out.exists() and not (out / PLAN).is_file() and not (out.is_dir() and all(map(is_temporary, out.iterdir()))):
        raise ValueError(f"OUT (={out}) exists and holds no packed shards; give the name of a new folder")


def _leading(index: SampleIndex, splits: Sequence[str]) -> list[str]:
    """Splits to pack, in the order of the index. Rows keep their numbers, so none may be left out before one that is packed."""
    for split in splits:
        index.split_rows(split)
    found = [split for split in index.split_names if not splits or split in splits]
    before = index.split_names[:index.split_names.index(found[-1]) + 1]
    if found != before:
        raise ValueError(f"--split (={' '.join(found)}) must begin with {' '.join(before)}: samples keep their numbers, and "
                         f"those of {found[-1]} come last; give --split {' '.join(before)}")
    return found


def _guess(index: SampleIndex, split: str, options: PackOptions, budget: float) -> int:
    """Bytes of an image in a shard, headers included: the mean of the first ones in the random order."""
    ids, skipped = order(index.ids(split), options.seed)[:_ESTIMATED], dict[int, str]()
    sizes = [len(encode(pixels, options.quality, options.subsampling))
             for _, pixels in decoded(index, split, ids, options, 1, skipped)]
    check_budget(index, split, skipped, allowed(index, split, budget))
    return int(np.mean([-(-size // 512) * 512 for size in sizes])) + 3 * 512


def _check_space(index: SampleIndex, out: Path, plan: Plan) -> None:
    """Raises ValueError when what is left to write does not fit on the disk."""
    need = int(sum(piece.stop - piece.first for piece in missing(index, out, plan)) * plan.image_bytes * _SPARE)
    disk = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    being_written = sum(file.stat().st_size for file in out.iterdir() if is_temporary(file)) if out.is_dir() else 0
    free = shutil.disk_usage(disk).free + being_written
    if free < need:
        raise ValueError(f"OUT (={out}) needs about {need / 1e9:,.2f} GB, but {disk} has {free / 1e9:,.2f} GB free; make room, "
                         "give another OUT, or a lower --quality")


def _differences(old: Plan, new: Plan) -> str:
    """What differs between two plans, for a person."""
    before, after = asdict(old.options), asdict(new.options)
    said = [f"--{key.replace('_', '-')} {before[key]}, not {after[key]}" for key in before if before[key] != after[key]]
    if list(old.source) != list(new.source):
        said.append(f"--split {' '.join(old.source)}, not {' '.join(new.source)}")
    said += [f"other images of {split} (SHA-256 {old.source[split][:12]}, not {new.source[split][:12]})"
             for split in old.source if new.source.get(split, old.source[split]) != old.source[split]]
    if (old.shard_bytes, old.shard_images) != (new.shard_bytes, new.shard_images):
        said.append(f"{_shard_size(old)}, not {_shard_size(new)}")
    if old.encoder != new.encoder:
        said.append(f"{old.encoder}, not {new.encoder}")
    return "; ".join(said)


def _shard_size(plan: Plan) -> str:
    return f"--shard-mb {plan.shard_bytes / 1e6:g}" if plan.shard_bytes else f"--shard-images {plan.shard_images}"
