"""An index derived from another: some of its classes, part of its training images held out as a split of their own.

The archives stay where they are, and the new index reads them in place. Rows keep all but label, split and archive, which become
positions among what is kept; classes keep their order. What is kept of a split keeps its order too, and held-out images have that
of train: by class, then by position in the archive. A row without a label is in no class: train loses it, another split only when
a class is left out. Excluded rows stay excluded, stay in train, and count as no images. N rows, K classes.
"""
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.index.header import label_of, read_header
from pipeline.index.sample_index import SAMPLE, SPLITS, SampleIndex
from pipeline.index.writer import check_output, write_index
from pipeline.rng import Purpose, bits

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Choices:
    """What a subset keeps. Raises ValueError: nothing is chosen, choices exclude each other, a number is out of its range."""
    classes: Sequence[str] | None = None  # names (wnids or folders) of classes to keep; None: all
    class_range: tuple[int, int] | None = None  # (A, B): keep classes A to B − 1, by position
    exclude: Sequence[str] = ()  # names of classes to leave out
    min_images: int = 0  # leave out classes with fewer training images
    hold_out: float | None = None  # share of the training images to hold out
    hold_out_as: str | None = None  # name of their split, val or test
    seed: int = 0  # of the choice of images
    hold_out_min: int = 0  # images to hold out of each class at least, which keeps one

    def __post_init__(self) -> None:
        if not str(self):
            raise ValueError("subset (=all classes, nothing held out) would be the same index again; give --classes, "
                             "--class-range, --exclude-classes, --min-images or --hold-out")
        if self.classes is not None and self.class_range is not None:
            given = ":".join(map(str, self.class_range))
            raise ValueError(f"--class-range (={given}) and --classes exclude each other; give one of them")
        for name in ("min_images", "seed", "hold_out_min"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"--{name.replace('_', '-')} (={value}) must not be negative; correct it")
        if (self.hold_out is None) != (self.hold_out_as is None):
            raise ValueError(f"--hold-out (={self.hold_out}) and --hold-out-as (={self.hold_out_as}) belong together; give both")
        if self.hold_out is not None and not 0 < self.hold_out < 1:
            raise ValueError(f"--hold-out (={self.hold_out}) must be a share between 0 and 1, neither included; half is 0.5")
        if self.hold_out_as not in (None, "val", "test"):
            raise ValueError(f"--hold-out-as (={self.hold_out_as}) must be val or test; correct it")

    def __str__(self) -> str:
        """As options of the command, names counted: for the header of the new index."""
        holds_out = self.hold_out is not None or self.hold_out_as is not None
        options = {"--classes": self.classes and f"({len(set(self.classes))} named)",
                   "--class-range": self.class_range and ":".join(map(str, self.class_range)),
                   "--exclude-classes": self.exclude and f"({len(set(self.exclude))} named)",
                   "--min-images": self.min_images,
                   "--hold-out": holds_out and f"{self.hold_out} --hold-out-as {self.hold_out_as} --seed {self.seed}",
                   "--hold-out-min": self.hold_out_min}
        return " ".join(f"{name} {value}" for name, value in options.items() if value)


DIVISION = Choices(hold_out=0.1, hold_out_as="val", hold_out_min=1)  # of an index without validation images, to train on it


def division_folder(path: Path, sha256: str) -> Path:
    """Where the index at `path` lies divided as `DIVISION` says, or would: in its folder hold-out; in hold-out-<hash> where that
    holds another index, such as one of `path` as it was before, on which runs may have been trained."""
    out = path / "hold-out"
    if not (out / "index.json").is_file() or is_division(out, sha256):
        return out
    return path / f"hold-out-{sha256[:8]}"


def is_division(folder: Path, sha256: str) -> bool:
    """Whether `folder` holds the index of that hash, divided as `DIVISION` says."""
    if not (folder / "index.json").is_file():
        return False
    return [(step.index, step.chosen) for step in read_header(folder)[1].derived[-1:]] == [(sha256, str(DIVISION))]


def division_command(path: Path, out: Path) -> str:
    """The command that writes it."""
    return f"alexnet index subset {path} -o {out} {DIVISION}"


def read_names(path: Path) -> list[str]:
    """Class names of a text file, one a line; what follows a # at the start of a line or after a space is a comment. Raises
    ValueError when there is no such file, or no name in it."""
    if not path.is_file():
        raise ValueError(f"list of classes (={path}) is not a file; give a text file of class names, one a line")
    lines = path.read_bytes().decode("utf-8-sig", "surrogateescape").split("\n")
    names = [(" " + line.replace("\t", " ")).partition(" #")[0].strip() for line in lines]
    if not any(names):
        raise ValueError(f"list of classes (={path}) names no class; write one name a line")
    return [name for name in names if name]


def read_range(text: str) -> tuple[int, int]:
    """A and B of "A:B". Raises ValueError."""
    first, colon, stop = text.partition(":")
    if not (colon and first.isdecimal() and stop.isdecimal()):
        raise ValueError(f"--class-range (={text}) must be A:B, for classes A to B - 1 counted from 0; the first fifty are 0:50")
    return int(first), int(stop)


def derive(index: SampleIndex, out: str | Path, choices: Choices, *, force: bool = False) -> list[str]:
    """Write the subset of an index to the folder `out`, atomically; returns notes for the user.

    Raises ValueError: `out` may not be written (see `check_output`) or is the index itself; the index is packed or damaged; a
    class is not in it; a split would be empty, or is there already.
    """
    out = Path(out)
    if out.resolve() == index.path.resolve():
        raise ValueError(f"OUT (={out}) must not be the index itself; give the name of a new folder")
    check_output(out, force)
    if index.packed is not None:
        raise ValueError(f"INDEX (={index.path}) is packed, and its shards hold the labels and row numbers of their originals; "
                         "take the subset of the index of the originals, and pack that")
    labels, too_few = _chosen_classes(index, choices)
    parts, notes = _divide(index, labels, choices)
    if too_few:
        notes.insert(0, f"left out {len(too_few):,} classes of less than {choices.min_images} training images: "
                        f"{', '.join(too_few[:10])}{' … (all of them: info --json)' if len(too_few) > 10 else ''}")
    ids = np.concatenate(list(parts.values()))
    # Rows as opaque bytes: NumPy copies those of a structure field by field, which takes 15 times as long.
    rows = np.ascontiguousarray(index.samples).view(f"V{SAMPLE.itemsize}")[ids].view(SAMPLE)
    rows["label"] = _positions(labels, len(index.classes))[rows["label"]]
    rows["split"] = np.repeat(np.arange(len(parts)), [len(part) for part in parts.values()])
    used = np.flatnonzero(np.bincount(rows["archive"], minlength=len(index.archives)))
    rows["archive"] = _positions(used, len(index.archives))[rows["archive"]]
    archives = [index.archives[position] for position in used.tolist()]
    step = {"index": index.sha256, "samples": len(index), "classes": len(index.classes), "chosen": str(choices),
            "too_few": too_few}
    write_index(out, rows, classes=[index.classes[label] for label in labels.tolist()], archives=archives, splits=list(parts),
                preset=index.header["preset"], crc32=index.header["crc32"], oddities=_oddities(index, ids, rows, list(parts)),
                names=index.name_bytes if any(archive.is_folder for archive in archives) else None,
                derived=[*index.derived, step], force=force)
    return notes


def _chosen_classes(index: SampleIndex, choices: Choices) -> tuple[Ids, list[str]]:
    """Labels of the classes to keep, ascending, and the names of those that have too few images."""
    names = [entry.wnid for entry in index.classes]
    kept = np.ones(len(names), bool)
    if choices.class_range is not None:
        first, stop = choices.class_range
        if not 0 <= first < stop <= len(names):
            raise ValueError(f"--class-range (={first}:{stop}) must lie within 0:{len(names)}, the classes of {index.path}, and "
                             "not be empty; correct it")
        kept[:first] = kept[stop:] = False
    if choices.classes is not None:
        kept[:] = False
        kept[_labels(index, choices.classes, "--classes")] = True
    kept[_labels(index, choices.exclude, "--exclude-classes")] = False
    too_few = np.zeros_like(kept)
    if choices.min_images:
        labels = index.samples["label"][index.ids("train")]
        too_few = kept & (np.bincount(labels[labels >= 0], minlength=len(names)) < choices.min_images)
    if not (kept & ~too_few).any():
        few = f": those chosen have less than {choices.min_images} training images (--min-images)" if too_few.any() else ""
        raise ValueError(f"subset (of {index.path}) would have none of its {len(names)} classes{few}; choose more")
    return np.flatnonzero(kept & ~too_few), [names[label] for label in np.flatnonzero(too_few).tolist()]


def _labels(index: SampleIndex, names: Sequence[str], option: str) -> list[int]:
    labels = label_of(index.classes)
    if unknown := [name for name in dict.fromkeys(names) if name not in labels]:
        raise ValueError(f"class (={unknown[0]}) of {option} ({len(unknown)} unknown) is not in the index {index.path}; its "
                         f"{len(labels)} classes are listed by info --json")
    return [labels[name] for name in names]


def _divide(index: SampleIndex, labels: Ids, choices: Choices) -> tuple[dict[str, Ids], list[str]]:
    """Split → ids of the rows it keeps, in their new order, for classes `labels`; and notes for the user."""
    if choices.hold_out_as in index.split_names:
        raise ValueError(f"--hold-out-as (={choices.hold_out_as}) is a split of {index.path} already; give another name, or "
                         "build an index without it")
    is_kept = np.append(np.isin(np.arange(len(index.classes)), labels), False)  # of a label; the last for label -1
    parts: dict[str, Ids] = {}
    notes = []
    for split in index.split_names:
        rows = index.split_rows(split)
        old, usable = index.samples["label"][rows], index.samples["excluded"][rows] == 0
        keep = is_kept[old]
        if (usable & (old >= 0)).any() and not (usable & keep).any():
            raise ValueError(f"split (={split}) would be empty: no image of it is in a class that is kept; choose other classes, "
                             f"or build an index without {split}")
        if split != "train" and len(labels) == len(index.classes):
            keep |= old < 0
        lost = int((usable & (old < 0) & ~keep).sum())
        if lost:
            notes.append(f"left out {lost:,} images of {split} without a label, of which no class is known")
        if keep.any():
            parts[split] = np.flatnonzero(keep) + rows.start
        else:
            notes.append(f"left out split {split}: none of its {len(old):,} rows has a label of a class that is kept")
    if choices.hold_out is not None and choices.hold_out_as is not None:
        index.split_rows("train")  # raises when there is none
        train = parts.get("train", np.empty(0, np.int64))
        held = held_out(index, train, choices.hold_out, choices.seed, choices.hold_out_min)
        if not held.any():
            raise ValueError(f"split (={choices.hold_out_as}) would be empty: --hold-out (={choices.hold_out}) of {len(train):,} "
                             "training images, of which every class keeps one, is none; give a larger share")
        parts["train"], parts[choices.hold_out_as] = train[~held], train[held]
    if not parts:
        raise ValueError(f"subset (of {index.path}) would hold no image; choose other classes")
    return {split: parts[split] for split in SPLITS if split in parts}, notes


def held_out(index: SampleIndex, ids: Ids, share: float, seed: int, least: int = 0) -> npt.NDArray[np.bool_]:
    """Which of the rows `ids` (N,) to hold out: of each class its share of the images that are not excluded, at least `least`,
    those whose random number is lowest. So a larger share holds out the same images and more, and no image's number depends on
    the other rows."""
    rows = np.flatnonzero((index.samples["excluded"][ids] == 0) & (index.samples["label"][ids] >= 0))
    labels = index.samples["label"][ids[rows]]
    counts = np.bincount(labels, minlength=len(index.classes))
    ties = bits(seed, Purpose.HOLD_OUT, np.array([_word(entry.wnid) for entry in index.classes], np.uint64))
    numbers = bits(seed, Purpose.HOLD_OUT, *_identities(index, ids[rows]))
    held = np.zeros(len(ids), bool)
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    for of_class, quota in zip(by_class, quotas(counts.tolist(), share, ties.tolist(), least), strict=True):
        # many short sorts: a sixth of the time of one long one
        held[rows[of_class[np.argsort(numbers[of_class], kind="stable")[:quota]]]] = True
    return held


def quotas(counts: Sequence[int], share: float, ties: Sequence[int], least: int = 0) -> list[int]:
    """How many of `counts` (K) images of each class to hold out: its share, but at least `least`; rounded up where most is
    missing (among equals, where `ties` is lowest) until the sum is the share of all; a class that has images keeps one."""
    exact = Fraction(str(share))  # what was written: 0.1 of 30 is 3, and halves are all alike
    numbers = [max(count * exact.numerator // exact.denominator, min(least, count - 1)) for count in counts]
    missing = [count * exact - number for count, number in zip(counts, numbers)]
    order = sorted((label for label, count in enumerate(counts) if missing[label] > 0 and numbers[label] + 1 < count),
                   key=lambda label: (-missing[label], ties[label]))
    for label in order[:max(0, int(sum(counts) * exact + Fraction(1, 2)) - sum(numbers))]:
        numbers[label] += 1
    return numbers


def _identities(index: SampleIndex, ids: Ids) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """What identifies the rows `ids` (N,) in any index of the same archives, as (N,) words: the archive, and the offset in it; of
    an image in a folder: 0, and its name."""
    archives, offsets = index.samples["archive"][ids], index.samples["offset"][ids]
    words = np.array([0 if archive.is_folder else _word(archive.fingerprint) for archive in index.archives], np.uint64)
    is_folder = np.array([archive.is_folder for archive in index.archives], bool)[archives]
    if is_folder.any():
        names = index.name_bytes or b""
        offsets[is_folder] = [_word(names[first:names.index(b"\0", first)]) for first in offsets[is_folder].tolist()]
    return words[archives], offsets


def _word(text: str | bytes) -> int:
    """The first 64 bits of its SHA-256."""
    data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


def _positions(kept: Ids, count: int) -> npt.NDArray[np.int32]:
    """(count + 1,) old position → position among `kept`; -1 if it is not kept, and at the end, where an old -1 points."""
    positions = np.full(count + 1, -1, np.int32)
    positions[kept] = np.arange(len(kept))
    return positions


def _oddities(index: SampleIndex, ids: Ids, rows: npt.NDArray[Any], splits: list[str]) -> list[dict[str, Any]]:
    """The oddities of the rows that are kept; those of members without a row stay with the source."""
    listed = [entry for entry in index.header["oddities"] if entry["id"] is not None]
    positions = np.flatnonzero(np.isin(ids, [entry["id"] for entry in listed]))  # not a dictionary of all 14 million
    new = dict(zip(ids[positions].tolist(), positions.tolist()))
    kept = [{**entry, "id": new[entry["id"]], "split": splits[rows["split"][new[entry["id"]]]]}
            for entry in listed if entry["id"] in new]
    return sorted(kept, key=lambda entry: int(entry["id"]))
