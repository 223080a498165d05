"""The data sets an index can be built from: ILSVRC 2010 and 2012, class folders, Fall 2011, WebDataset shards.

Each function drives a `pipeline.index.builder.Builder` and returns the SHA-256 of the index it wrote.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Sequence

import numpy as np

from pipeline.index.tar import open_tar
from pipeline.index.folders import folder_archive, list_folder
from pipeline.index.image_header import is_image_name
from pipeline.index.sample_index import REASONS, ClassInfo
from pipeline.index.builder import Builder
from pipeline.index.devkit import (SPLITS, Devkit, class_table, ground_truth, label_of, place_all, read_devkit, shard_split)
from pipeline.index.scan import Odd, Part, Task, base_names, joined
from pipeline.index.shards import scan_shard


def build_ilsvrc(builder: Builder, *, train: Path | None, val: Path | None, test: Path | None, devkit: Path | None,
                 test_truth: Path | None = None, patch: Path | None = None) -> str:
    """ILSVRC 2010 or 2012, any of its archives; returns the SHA-256 of the index. Raises ValueError, OSError.

    Args:
        test_truth: ground truth of the test images (2010).
        patch: tar whose files replace images of the same base name (2010's patch_images.tar).
    """
    if train is None and val is None and test is None:
        raise ValueError(f"archives (=none) for preset {builder.preset} are missing; give --train, --val or --test")
    kit = read_devkit(devkit) if devkit is not None else None
    if test_truth is not None and (kit is None or test is None):
        raise ValueError(f"test ground truth (={test_truth}) needs the test archive and the devkit; "
                         f"give --test and --devkit too")
    builder.classes = kit.classes if kit is not None else []
    patches: Part | None = None
    place_of: dict[str, int] = {}
    if patch is not None:
        patches = builder.flat(patch, f"patches {patch.name}")
        place_of = base_names(patches, str(patch))
    if train is not None:
        part = builder.nested(train, kit.classes if kit is not None else None, frozenset(place_of))
        if kit is not None:
            part.odd += _count_notes(part, kit)
        builder.parts["train"] = part
    if val is not None:
        builder.by_name(val, "val", kit.val_labels if kit is not None else None)
    if test is not None:
        labels = None
        if test_truth is not None and kit is not None:
            if not test_truth.is_file():
                raise ValueError(f"test ground truth (={test_truth}) does not exist; give a text file of IDs")
            labels = ground_truth(test_truth.read_bytes(), kit.label_of_id, str(test_truth))
        builder.by_name(test, "test", labels)
    if patches is not None:
        _patch(builder.parts, patches, place_of)
    return builder.write()


def _count_notes(part: Part, kit: Devkit) -> list[Odd]:
    """Classes whose images are not as many as the devkit says: an archive may be whole and still lack some."""
    counts = Counter(part.rows["label"].tolist())
    return [Odd(-1, entry.wnid, f"{counts[label]} images, the devkit says {kit.train_counts[entry.wnid]}", True)
            for label, entry in enumerate(kit.classes)
            if kit.train_counts.get(entry.wnid, counts[label]) != counts[label]]


def _patch(parts: dict[str, Part], patches: Part, place_of: dict[str, int]) -> None:
    """Let rows point at the patch archive's images of the same base name; label and split stay."""
    used = set()
    patched = REASONS.index("patched")
    taken = [name for name in patches.rows.dtype.names or () if name not in ("label", "split")]
    for part in parts.values():
        found = part.watched if part.names is None else {
            name.rpartition("/")[2]: row for row, name in enumerate(part.names)
            if name.rpartition("/")[2] in place_of}
        for base, row in found.items():
            new = patches.rows[place_of[base]]
            for name in taken:
                part.rows[name][row] = new[name]
            if not new["excluded"]:
                part.rows["reason"][row] = patched
            part.odd[:] = [odd for odd in part.odd if odd.row != row]
            part.odd.append(Odd(row, base, "patched" if not new["excluded"] else REASONS[new["reason"]],
                                not new["excluded"]))
            used.add(base)
    spare = [Odd(-1, base, "patch: no image has this name", False) for base in place_of if base not in used]
    next(iter(parts.values())).odd += spare + [odd for odd in patches.odd if odd.row < 0]


def build_fall2011(builder: Builder, path: Path) -> str:
    """A tar of `<wnid>.tar`, whatever else is in it; returns the SHA-256 of the index."""
    builder.parts["train"] = builder.nested(path, None)
    return builder.write()


def build_classes(builder: Builder, path: Path) -> str:
    """A tar or folder of class folders, or a tar of `<wnid>.tar`; returns the SHA-256 of the index."""
    if path.is_dir():
        members, builder.name_bytes, odd = list_folder(path)
        builder.archives.append(folder_archive(path, members))
        is_folder = True
    else:
        is_folder = False
        everything = builder.members(path)
        members = [member for member in everything if member.kind == "file" and is_image_name(member.name)]
        tar = next((member for member in everything if member.kind == "file" and member.name.endswith(".tar")), None)
        if tar is not None and members:
            raise ValueError(f"archive (={path}) holds images ({members[0].name} …) as well as tars ({tar.name} …), so which are "
                             f"the data set is not known; say fall2011 for the tars, or repack it without them")
        if tar is not None:
            return build_fall2011(builder, path)
        odd = [Odd(-1, member.name, "not called an image" if member.kind == "file" else f"a {member.kind}, not a file",
                   False) for member in everything if member.kind not in ("file", "directory")
               or (member.kind == "file" and not is_image_name(member.name))]
    if not members:
        raise ValueError(f"data set (={path}) holds no images (.jpg, .jpeg, .png, .webp, .bmp); give a tar or a folder "
                         f"of class folders, or a tar of <wnid>.tar")
    whole = builder.flat(path, path.name, members, is_folder)
    splits, classes = place_all(whole.names or [], str(path))
    builder.classes = class_table(classes)
    labels = label_of(builder.classes)
    whole.rows["label"] = [labels[name] for name in classes]
    _split_up(builder, whole, splits)
    next(iter(builder.parts.values())).odd += odd
    return builder.write()


def build_webdataset(builder: Builder, shards: Sequence[Path]) -> str:
    """WebDataset shards (`key.jpg` + `key.cls`), the split by the shard's name; returns the SHA-256 of the index."""
    if not shards:
        raise ValueError("shards (=none) are missing; give one or more tar files")
    splits: list[str] = []
    sizes = []
    for shard in shards:
        open_tar(shard).close()
        sizes.append(builder.archives[builder.add_archive(shard)].size)
    parts = builder.run([Task(shard, builder.crc) for shard in shards], sizes, "shards", scan_shard)
    for position, (shard, part) in enumerate(zip(shards, parts, strict=True)):
        part.rows["archive"] = position
        splits += [shard_split(shard.absolute())] * len(part.rows)
    whole = joined(parts)
    highest = int(whole.rows["label"].max(initial=-1))
    builder.classes = [ClassInfo(str(label), "") for label in range(highest + 1)]
    _split_up(builder, whole, splits)
    return builder.write()


def _split_up(builder: Builder, whole: Part, splits: list[str]) -> None:
    """Sort rows by split, then train by class (stable: archive order), val and test by name; oddities follow."""
    names = whole.names or []
    first = 0
    order = sorted(range(len(names)), key=lambda i: (
        SPLITS.index(splits[i]), int(whole.rows["label"][i]) if splits[i] == "train" else 0,
        "" if splits[i] == "train" else names[i]))
    whole = whole.reordered(np.array(order, np.int64))
    counts = Counter(splits)
    for split in SPLITS:
        rows = counts[split]
        if rows:
            builder.parts[split] = Part(whole.rows[first:first + rows], [
                odd._replace(row=odd.row - first) for odd in whole.odd if first <= odd.row < first + rows])
        first += rows
    if builder.parts:
        next(iter(builder.parts.values())).odd += [odd for odd in whole.odd if odd.row < 0]
