"""Index of ILSVRC 2010 and 2012: nested train tar, val and test tars, patch, and the devkit with classes and ground truth.

Line i of a ground truth belongs to the i-th *base name* of the images and holds an ILSVRC ID 1..K; meta.mat maps ID → wnid; our
class is the position of the wnid in sorted order (IDs are not in that order: a wrong map shows as exactly 1/K top-1).
"""
import io
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from pipeline.index.builder import Builder
from pipeline.index.header import ClassInfo, label_of
from pipeline.index.sample_index import REASONS, SAMPLE
from pipeline.index.scan import Oddity, Part, base_names
from pipeline.io_errors import reading

_MAX_ID = 1_000_000
_MAX_DEVKIT_BYTES = 64 << 20  # of one file of it


def build_ilsvrc(builder: Builder, *, train: Path | None = None, val: Path | None = None, test: Path | None = None,
                 devkit: Path | None = None, test_truth: Path | None = None, patch: Path | None = None) -> str:
    """Index any archives of ILSVRC 2010 or 2012; returns the SHA-256 of the index. Raises ValueError, OSError.

    test_truth: ground truth of the test images (2010); patch: tar whose files replace images of the same base name (2010's
    patch_images.tar).
    """
    if train is None and val is None and test is None:
        raise ValueError(f"archives (=none) for preset {builder.preset} are missing; give --train, --val or --test")
    kit = read_devkit(devkit) if devkit is not None else None
    if test_truth is not None and (kit is None or test is None):
        raise ValueError(f"test ground truth (={test_truth}) needs the test archive and the devkit; give --test and --devkit too")
    if kit is not None:
        builder.classes = kit.classes
    patches = builder.flat_tar(patch, "patches") if patch is not None else None
    patch_rows = base_names(patches, patch) if patches is not None and patch is not None else {}
    builder.keep_names = patches is not None
    if train is not None:
        builder.parts["train"] = part = builder.nested(train)
        if kit is not None:  # an archive may be whole and still lack some images of a class
            counts = Counter(part.rows["label"].tolist())
            part.odd += [Oddity(entry.wnid, f"{counts[label]} images, the devkit says {kit.train_counts[entry.wnid]}", True)
                         for label, entry in enumerate(kit.classes)
                         if kit.train_counts.get(entry.wnid, counts[label]) != counts[label]]
    if val is not None:
        builder.add_by_name("val", val, kit.val_labels if kit is not None else None)
    if test is not None:
        labels = None
        if test_truth is not None and kit is not None:
            if not test_truth.is_file():
                raise ValueError(f"test ground truth (={test_truth}) does not exist; give a text file of IDs")
            labels = ground_truth(test_truth.read_bytes(), kit.label_of_id, str(test_truth))
        builder.add_by_name("test", test, labels)
    if patches is not None:
        _apply_patches(builder, patches, patch_rows)
    return builder.write()


def _apply_patches(builder: Builder, patches: Part, patch_rows: dict[str, int]) -> None:
    """Let rows point at the patch archive's images of the same base name; label and split stay."""
    unused = dict.fromkeys(patch_rows)
    for part in builder.parts.values():
        rows = {name.rpartition("/")[2]: row for row, name in enumerate(part.names or ())}
        for base, row in ((base, rows[base]) for base in patch_rows if base in rows):
            new = patches.rows[patch_rows[base]]
            for name in set(SAMPLE.names or ()) - {"label", "split"}:
                part.rows[name][row] = new[name]
            kept = not new["excluded"]
            if kept:
                part.rows["reason"][row] = REASONS.index("patched")
            part.odd = [odd for odd in part.odd if odd.row != row]
            part.odd.append(Oddity(base, REASONS[part.rows["reason"][row]], kept, row))
            unused.pop(base, None)
    builder.add_oddities([Oddity(base, "patch: no image has this name") for base in unused])
    builder.add_oddities([odd for odd in patches.odd if odd.row < 0])


@dataclass(frozen=True)
class Devkit:
    """Classes in wnid order; `label_of_id[ID]` is the class of an ILSVRC ID; -1 marks no class (ID 0, gaps)."""
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
    return Devkit(classes, label_of_id, counts, labels)


def _devkit_files(path: Path) -> dict[str, bytes]:
    wanted = ("meta.mat", "validation_ground_truth.txt")
    if path.is_dir():
        return {file.name: file.read_bytes() for file in sorted(path.rglob("*")) if file.name.endswith(wanted)}
    if not path.is_file():
        raise ValueError(f"devkit (={path}) does not exist; give the ILSVRC devkit, as .tar.gz or as a folder")
    files: dict[str, bytes] = {}
    try:
        with reading(path), tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isreg() and member.name.endswith(wanted) else None
                if file is not None and member.size <= _MAX_DEVKIT_BYTES:
                    files[Path(member.name).name] = file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        if getattr(error, "errno", None) is not None:  # of the system: it says nothing of what the file holds
            raise
        raise ValueError(f"devkit (={path}) cannot be read ({error}); fetch it again") from None
    return files


def _read_meta(data: bytes, path: Path) -> tuple[list[ClassInfo], np.ndarray, dict[str, int]]:
    """(classes, label_of_id, train_counts) of a `Devkit`."""
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
