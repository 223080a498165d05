"""Plan of a packing: its options, and which image goes into which shard, decided before the first shard is written.

It lies in `plan.json` of the output folder and is a function of index and options; a later call, or another rank, must agree
with it.
"""
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.config import REGIONS
from pipeline.files import json_sha256, read_manifest, with_own_hash, write_json
from pipeline.index.sample_index import SampleIndex
from pipeline.rng import Purpose, bits
from pipeline.schema import Count, read_as

SUBSAMPLINGS = ("444", "422", "420")
OWN_HASH = "own_sha256"  # in plan.json and the sidecars: of all their other keys; older ones lack it
MEASURED = 200  # images of a split whose PSNR is measured

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PackOptions:
    """What decides the bytes of packed images. docs/packing.md has the measurements behind the defaults. Raises ValueError."""
    region: str = "square"  # the central square (paper §2), or `full`, the whole image at that short side
    square_px: int = 256  # side of the square, short side of a whole image
    quality: int = 90  # of the JPEG, 1–100
    subsampling: str = "444"  # of its chroma: 444 none, 422 columns halved, 420 columns and rows
    seed: int = 0  # of the order of the images

    def __post_init__(self) -> None:
        for name, allowed in (("region", REGIONS), ("subsampling", SUBSAMPLINGS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} (={getattr(self, name)}) must be one of {', '.join(allowed)}; correct it")
        for name, low, high in (("square_px", 1, 8192), ("quality", 1, 100), ("seed", 0, (1 << 63) - 1)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"--{name.replace('_', '-')} (={getattr(self, name)}) must lie in {low}…{high}; correct it")


@dataclass(frozen=True)
class Plan:
    """What is packed, and how it is cut into shards."""
    options: PackOptions
    source: dict[str, str]  # split → `split_sha256` of the original, in the order of its splits
    encoder: str  # library and version that writes the JPEGs, and the one that decoded the originals
    shard_bytes: Count  # size of a shard that was aimed at; 0 when a number of images was given
    shard_images: Count  # most images of a shard
    image_bytes: Count  # estimate of an image's share of a shard

    @property
    def sha256(self) -> str:
        """Of all but the estimate."""
        return json_sha256({**asdict(self), "image_bytes": 0})

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read plan.json. Raises ValueError when it is none."""
        try:
            return read_as(cls, read_manifest(path, hash_if_any=OWN_HASH), "plan")
        except ValueError as error:
            raise ValueError(f"packing plan (={path}) must be one that pack_shards.py wrote ({error}); restore it, or give "
                             "another OUT") from None

    def save(self, path: Path) -> None:
        """Write plan.json."""
        write_json(path, with_own_hash(asdict(self), OWN_HASH))

    def differences(self, other: "Plan") -> str:
        """What differs between two plans, for the user; "" when nothing does."""
        before, after = self.described(), other.described()
        return "; ".join(f"{name} {value}, not {after[name]}" for name, value in before.items()
                         if after.get(name, value) != value)

    def described(self) -> dict[str, str]:
        """All but the estimate in the words of the command's options."""
        by = f"--shard-mb {self.shard_bytes / 1e6:g}" if self.shard_bytes else f"--shard-images {self.shard_images}"
        return {**{f"--{name.replace('_', '-')}": str(value) for name, value in asdict(self.options).items()},
                "--split": " ".join(self.source), "shards by": by, "encoder": self.encoder,
                **{f"images of {split}": sha256[:12] for split, sha256 in self.source.items()}}


class Piece(NamedTuple):
    """The shard `name` holds positions [first, stop) of its split's random order."""
    name: str
    split: str
    first: int
    stop: int

    @property
    def images(self) -> int:
        return self.stop - self.first


def order(ids: Ids, seed: int) -> Ids:
    """Sample ids in the order of the shards: sorted by a random number of each."""
    return ids[np.lexsort((ids, bits(seed, Purpose.PACK, ids)))]


def pieces(index: SampleIndex, plan: Plan) -> list[Piece]:
    """All shards of a plan; those of a split are of equal size, but for one image."""
    shards = []
    for split in plan.source:
        count = len(index.ids(split))
        number = -(-count // plan.shard_images)
        shards += [Piece(f"{split}-{i:06d}", split, i * count // number, (i + 1) * count // number) for i in range(number)]
    return shards


def measured_ids(ids: Ids) -> frozenset[int]:
    """Up to MEASURED ids, spread evenly over a split's random order: those whose PSNR is measured."""
    return frozenset(ids[np.linspace(0, len(ids) - 1, min(MEASURED, len(ids))).astype(np.int64)].tolist())
