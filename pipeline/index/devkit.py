"""What a member's name and the devkit say about an image: its split, its class, its label.

- ILSVRC 2010 / 2012: `<wnid>.tar` inside the train tar; val and test in any order, in any folders. Line i of the ground truth
  belongs to the i-th *base name* and holds an ILSVRC ID 1..K; meta.mat maps ID → wnid; our class is the position of the wnid
  in sorted order (IDs are not in that order: a wrong map shows as exactly 1/K top-1).
- Class folders: `[.../]<split>/<class>/.../x.jpg` or `[.../]<class>/x.jpg`.
- WebDataset: `key.jpg` with `key.cls`; the key ends at the first dot of the base name.
"""

from __future__ import annotations

import io
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from pipeline.index.sample_index import ClassInfo

SPLITS = ("train", "val", "test")
_SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
                "test": "test", "testing": "test"}
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
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isreg() and member.name.endswith(wanted) else None
                if file is not None and member.size <= _MAX_DEVKIT_BYTES:
                    found[Path(member.name).name] = file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"devkit (={path}) cannot be read ({error}); fetch it again") from None
    return found


def _read_meta(data: bytes, path: Path) -> tuple[list[ClassInfo], np.ndarray, dict[str, int]]:
    from scipy.io import loadmat  # lazily: 0.3 s

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
    order = sorted(wnids)
    label_of_id = np.full(max(ids) + 1, -1, np.int32)
    place = {wnid: label for label, wnid in enumerate(order)}
    label_of_id[ids] = [place[wnid] for wnid in wnids]
    return [ClassInfo(wnid, words[wnid]) for wnid in order], label_of_id, counts


def ground_truth(text: bytes, label_of_id: np.ndarray, what: str) -> np.ndarray:
    """Labels (N,) int32 of a ground-truth file: one ILSVRC ID a line. Raises ValueError naming the line."""
    labels = []
    for number, line in enumerate(text.split(b"\n")[:-1] if text.endswith(b"\n") else text.split(b"\n"), 1):
        value = line.strip()
        if not value.isdigit() or int(value) >= len(label_of_id) or label_of_id[int(value)] < 0:
            raise ValueError(f"ground truth (={value.decode('ascii', 'replace')!r}) in line {number} of {what} is not "
                             f"the ID of a class (they go up to {len(label_of_id) - 1}); give the file that belongs to "
                             f"this devkit")
        labels.append(label_of_id[int(value)])
    return np.array(labels, np.int32)


def place(name: str) -> tuple[str | None, str]:
    """(split or None, class) of an image in class folders, by its path. Raises ValueError when it is in no folder.

    The first folder called train, val (valid, validation) or test that has a folder below it is the split; the folder
    below it is the class. Without one, the class is the folder the image lies in.
    """
    folders = name.split("/")[:-1]
    for i, folder in enumerate(folders[:-1]):
        split = _SPLIT_NAMES.get(folder.lower())
        if split is not None:
            return split, folders[i + 1]
    if not folders or folders[-1] in (".", ""):
        raise ValueError(f"image (={name}) lies in no class folder; arrange images as <class>/<image> or "
                         f"train/<class>/<image>")
    return None, folders[-1]


def place_all(names: Sequence[str], where: str) -> tuple[list[str], list[str]]:
    """Splits and classes of all images of a data set; all or none of them lie below a split. Raises ValueError."""
    placed = [place(name) for name in names]
    without = next((name for name, (split, _) in zip(names, placed) if split is None), None)
    within = next((name for name, (split, _) in zip(names, placed) if split is not None), None)
    if without is not None and within is not None:
        raise ValueError(f"image (={without}) of {where} lies in no split but {within} does; "
                         f"put all or none below train/, val/ or test/")
    splits, classes = [split or "train" for split, _ in placed], [name for _, name in placed]
    if "train" in splits:
        known = {name for split, name in placed if split in (None, "train")}
        for name, (split, wnid) in zip(names, placed):
            if wnid not in known:
                raise ValueError(f"class (={wnid}) of {name} in {where} has no image in split train; "
                                 f"remove it, or name its folder as in train")
    return splits, classes


def shard_split(path: Path) -> str:
    """Split of a WebDataset shard by its name, or its folder's: a word train, val or test; train otherwise."""
    for text in (path.name, path.parent.name):
        for word in re.split(r"[^a-z]+", text.lower()):
            if word in _SPLIT_NAMES:
                return _SPLIT_NAMES[word]
    return "train"


def sample_key(name: str) -> tuple[str, str]:
    """(key, extension) of a WebDataset member: the key ends at the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return folder + slash + key, extension.lower()


def class_table(names: Sequence[str], words: dict[str, str] | None = None) -> list[ClassInfo]:
    """Classes in sorted order of their names."""
    return [ClassInfo(name, (words or {}).get(name, "")) for name in sorted(set(names))]


def label_of(classes: Sequence[ClassInfo]) -> dict[str, int]:
    """wnid → label."""
    return {entry.wnid: label for label, entry in enumerate(classes)}


def check_count(kind: str, images: int, labels: np.ndarray | None, where: Any) -> None:
    """Raises ValueError when a ground truth does not have one line per image."""
    if labels is not None and len(labels) != images:
        raise ValueError(f"{kind} archive (={where}) has {images} images but the ground truth {len(labels)} lines; "
                         f"give the whole archive and the ground truth that belongs to it")
