"""ILSVRC development kits: the classes (meta.mat) and the ground truth of validation and test images.

Line i of a ground truth belongs to the i-th *base name* of the images and holds an ILSVRC ID 1..K; meta.mat maps ID → wnid; our
class is the position of the wnid in sorted order (IDs are not in that order: a wrong map shows as exactly 1/K top-1).
"""

from __future__ import annotations

import io
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from pipeline.index.sample_index import ClassInfo, label_of

_MAX_ID = 1_000_000
_MAX_DEVKIT_BYTES = 64 << 20  # of one file of it


@dataclass(frozen=True)
class Devkit:
    """Classes in wnid order; `label_of_id[ID]` is the class of an ILSVRC ID; -1 marks no class (ID 0, gaps)."""

    path: Path
    classes: list[ClassInfo]
    label_of_id: np.ndarray  # (largest ID + 1,) int32
    train_counts: dict[str, int]  # wnid → images in the train archive
    val_labels: np.ndarray | None  # (N,) int32 in the order of the val images' names; None without ground truth


def read_devkit(path: str | Path) -> Devkit:
    """Read meta.mat and the validation ground truth of a devkit (.tar.gz or folder). Raises ValueError."""
    path = Path(path)
    files = _devkit_files(path)
    meta = next((data for name, data in files.items() if name.endswith("meta.mat")), None)
    if meta is None:
        raise ValueError(f"devkit (={path}) holds no data/meta.mat; give the ILSVRC devkit, as .tar.gz or as a folder")
    classes, label_of_id, counts = _read_meta(meta, path)
    truth = next((data for name, data in files.items() if name.endswith("validation_ground_truth.txt")), None)
    labels = None if truth is None else ground_truth(truth, label_of_id, f"{path} (validation)")
    return Devkit(path, classes, label_of_id, counts, labels)


def _devkit_files(path: Path) -> dict[str, bytes]:
    wanted = ("meta.mat", "validation_ground_truth.txt")
    if path.is_dir():
        return {file.name: file.read_bytes() for file in sorted(path.rglob("*")) if file.name.endswith(wanted)}
    if not path.is_file():
        raise ValueError(f"devkit (={path}) does not exist; give the ILSVRC devkit, as .tar.gz or as a folder")
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isreg() and member.name.endswith(wanted) else None
                if file is not None and member.size <= _MAX_DEVKIT_BYTES:
                    files[Path(member.name).name] = file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"devkit (={path}) cannot be read ({error}); fetch it again") from None
    return files


def _read_meta(data: bytes, path: Path) -> tuple[list[ClassInfo], np.ndarray, dict[str, int]]:
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(data), squeeze_me=True)["synsets"])
        fields = synsets.dtype.names or ()
        id_field = next(name for name in fields if name.endswith("_ID"))
        leaves = [row for row in synsets if int(row["num_children"]) == 0]
        ids = [int(row[id_field]) for row in leaves]
        wnids = [str(row["WNID"]) for row in leaves]
        words = {str(row["WNID"]): str(row["words"]) for row in leaves}
        counts: dict[str, int] = {}
        if "num_train_images" in fields:
            counts = {str(row["WNID"]): int(row["num_train_images"]) for row in leaves}
    except Exception as error:  # scipy raises anything on a damaged file
        raise ValueError(f"meta.mat (of {path}) is not a table of synsets ({type(error).__name__}: {error}); "
                         f"fetch the devkit again") from None
    # A devkit cut down to some classes may keep the IDs they had among all: gaps are fine, repetitions are not.
    if not leaves or not 1 <= min(ids) <= max(ids) <= _MAX_ID or len({*ids}) != len(ids) or len(words) != len(leaves):
        raise ValueError(f"meta.mat (of {path}) has {len(leaves)} classes whose IDs do not lie in 1 to {_MAX_ID}, each "
                         f"once, with a wnid each; fetch the devkit again")
    classes = [ClassInfo(wnid, words[wnid]) for wnid in sorted(wnids)]
    labels = label_of(classes)
    label_of_id = np.full(max(ids) + 1, -1, np.int32)
    label_of_id[ids] = [labels[wnid] for wnid in wnids]
    return classes, label_of_id, counts


def ground_truth(text: bytes, label_of_id: np.ndarray, source: str) -> np.ndarray:
    """Labels (N,) int32 of a ground-truth file: one ILSVRC ID a line. Raises ValueError naming the line."""
    labels = []
    for number, line in enumerate(text.removesuffix(b"\n").split(b"\n"), 1):
        value = line.strip()
        if not value.isdigit() or int(value) >= len(label_of_id) or label_of_id[int(value)] < 0:
            raise ValueError(f"ground truth (={value.decode('ascii', 'replace')!r}) in line {number} of {source} is not the ID "
                             f"of a class (they go up to {len(label_of_id) - 1}); give the file that belongs to this devkit")
        labels.append(label_of_id[int(value)])
    return np.array(labels, np.int32)
