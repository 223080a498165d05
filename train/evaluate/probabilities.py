"""What a test keeps of each image: all probabilities in float16, and its label's place and probability as the network gave them.

Counts and losses of one network are those of its float64 probabilities, exact; only an average of several needs the float16 ones.
Those are multiples of 2^-39, so sums of them are exact in float64: neither the order of the members of an ensemble nor where they
come from changes a bit. N images in the order of the split's ids, K outputs of the network, B batch.
"""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import torch

from train.parallel.topology import Topology
from train.evaluate.metrics import ranks

SCALE = 2.0 ** 15  # the largest power of two with which 1 is no overflow; exact, as it only moves the exponent
IMAGE = np.dtype([
    ("id", "<i8"),  # sample id
    ("probability", "<f8"),  # of the label; NaN without one
    ("label", "<i4"),  # -1 unknown
    ("place", "<i4"),  # of the label among the classes, 0 the most probable; -1 without one
    ("crc32", "<u4"),  # of this row with 0 here, then of the row of probabilities; 0: not tested yet
    ("spare", "<u4"),  # 0
])


@dataclass(frozen=True)
class Facts:
    """What an evaluation is of. Two are the same, or may be averaged, by these.

    Attributes:
        checkpoint: SHA-256 of its manifest, hence of weights, recipe and statistics.
        test_images: `SampleIndex.split_sha256`.
        classes: hash of the class list in its order.
        images, outputs: N and K.
        views: 1 or 10.
        precision: in which the network computed.
    """

    checkpoint: str
    test_images: str
    classes: str
    images: int
    outputs: int
    views: int
    precision: str


@dataclass(frozen=True)
class Made:
    """What may change a last bit: a test that was cut off goes on only where it began.

    Attributes:
        device: kind of processor.
        torch: version.
        batch: images of a batch.
    """

    device: str
    torch: str
    batch: int


@dataclass(frozen=True)
class Evaluation:
    """A whole test of one network.

    Attributes:
        checkpoint, split, index: of what: paths, as they were, and the split's name.
        facts: the same, by hashes.
        images: (N,) IMAGE.
        probabilities: (N, K) float16, times SCALE.
        folder: where it is saved; None when it is not.
        tested: images that were tested for it just now; the others were saved.
    """

    checkpoint: str
    split: str
    index: str
    facts: Facts
    images: np.ndarray
    probabilities: np.ndarray
    folder: Optional[Path]
    tested: int = 0

    @property
    def name(self) -> str:
        """What to call it."""
        return called(Path(self.checkpoint))

    @property
    def labelled(self) -> bool:
        """Whether all images have a label."""
        return bool((self.images["label"] >= 0).all())


def run_folder(checkpoint: Path) -> Path:
    """The run that a checkpoint belongs to, or the folder that holds it."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def called(checkpoint: Path) -> str:
    """What to call a checkpoint: by its run's name and its own."""
    return f"{run_folder(checkpoint).name}/{checkpoint.name}"


class Memory:
    """Takes the probabilities of a test and keeps them in memory, in each process its own until the end.

    Args:
        ids, labels: (N,) of the split, in order.
        outputs: K.
    """

    def __init__(self, ids: np.ndarray, labels: np.ndarray, outputs: int) -> None:
        self.images = untested(ids, labels)
        self.probabilities = np.zeros((len(ids), outputs), np.float16)
        self._ids = ids

    def remaining(self, batch: int) -> np.ndarray:
        """(M,) ids still to test."""
        return self._ids

    def close(self) -> None:
        """Nothing is open."""

    def take(self, ids: np.ndarray, labels: torch.Tensor, probabilities: torch.Tensor) -> None:
        """Keep a batch: (B,) ids, (B,) labels, (B, K) float64."""
        rows = np.searchsorted(self._ids, ids)
        self.images[rows], self.probabilities[rows] = packed(ids, labels, probabilities)

    def finish(self, where: Topology) -> tuple[np.ndarray, np.ndarray]:
        """(images, probabilities) of all processes, in each. Raises RuntimeError as `check_complete`."""
        if not where.is_single:
            mine = np.flatnonzero(self.images["crc32"])
            for rows, images, probabilities in where.gather_objects((mine, self.images[mine], self.probabilities[mine])):
                self.images[rows], self.probabilities[rows] = images, probabilities
        check_complete(intact(self.images, self.probabilities), "memory")
        return self.images, self.probabilities


def packed(ids: np.ndarray, labels: torch.Tensor, probabilities: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a batch: (B,) IMAGE and (B, K) float16, of (B,) ids, (B,) labels, (B, K) float64.

    Raises RuntimeError as `ranks`.
    """
    rows = np.zeros(len(ids), IMAGE)
    known = labels >= 0
    column = labels.clamp_min(0)
    own = probabilities.gather(1, column[:, None])[:, 0]
    rows["id"], rows["label"] = ids, labels.cpu().numpy()
    rows["place"] = torch.where(known, ranks(probabilities, column), -1).cpu().numpy()
    rows["probability"] = torch.where(known, own, torch.nan).cpu().numpy()
    halves = (probabilities * SCALE).half().cpu().numpy()
    rows["crc32"] = _checksums(rows, halves)
    return rows, halves


def _checksums(images: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """(B,) uint32, none of them 0: of each row of both."""
    blank = images.copy()
    blank["crc32"] = 0
    return np.array([zlib.crc32(row, zlib.crc32(image)) or 1
                     for image, row in zip(blank, np.ascontiguousarray(probabilities))], np.uint32)


def intact(images: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """(N,) bool: rows that were tested and are as they were written."""
    found = images["crc32"] != 0
    rows = np.flatnonzero(found)
    for part in np.array_split(rows, -(-len(rows) // 4096)) if len(rows) else []:
        found[part] = _checksums(images[part], probabilities[part]) == images["crc32"][part]
    return found


def check_complete(done: np.ndarray, where: str) -> None:
    """Raise RuntimeError unless every image was tested: (N,) bool."""
    if not done.all():
        raise RuntimeError(f"images tested (={int(done.sum())}, in {where}) must be all {len(done)} of the split; if several "
                           "machines write, their folder must be shared; else report this, the counts would be wrong")


def untested(ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N,) IMAGE before any test, of (N,) ids and labels."""
    rows = np.zeros(len(ids), IMAGE)
    rows["id"], rows["label"], rows["place"], rows["probability"] = ids, labels, -1, np.nan
    return rows


def differences(saved: Facts | Made, wanted: Facts | Made) -> str:
    """What of an evaluation is another than it should be, in words; empty when nothing is."""
    def short(value: object) -> str:
        return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)
    mine, theirs = asdict(wanted), asdict(saved)
    return ", ".join(f"{key} {short(theirs[key])} (here {short(mine[key])})" for key in mine if mine[key] != theirs[key])


def device_name(device: torch.device) -> str:
    """Kind of a processor, as far as results depend on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"
