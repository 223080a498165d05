"""Index of ILSVRC 2010 and 2012 (nested train tar, val and test tars, devkit, patch) and of Fall 2011 (a tar of <wnid>.tar)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pipeline.index.builder import Builder
from pipeline.index.devkit import Devkit, ground_truth, read_devkit
from pipeline.index.sample_index import REASONS, SAMPLE
from pipeline.index.scan import Oddity, Part, base_names


def build_ilsvrc(builder: Builder, *, train: Path | None = None, val: Path | None = None, test: Path | None = None,
                 devkit: Path | None = None, test_truth: Path | None = None, patch: Path | None = None) -> str:
    """Index ILSVRC 2010 or 2012, any of its archives; returns the SHA-256 of the index. Raises ValueError, OSError.

    Args:
        test_truth: ground truth of the test images (2010).
        patch: tar whose files replace images of the same base name (2010's patch_images.tar).
    """
    if train is None and val is None and test is None:
        raise ValueError(f"archives (=none) for preset {builder.preset} are missing; give --train, --val or --test")
    kit = read_devkit(devkit) if devkit is not None else None
    if test_truth is not None and (kit is None or test is None):
        raise ValueError(f"test ground truth (={test_truth}) needs the test archive and the devkit; give --test and --devkit too")
    if kit is not None:
        builder.classes = kit.classes
    patches = None
    if patch is not None:
        patches = builder.flat_tar(patch, "patches")
        patch_rows = base_names(patches, patch)
        builder.watch = frozenset(patch_rows)
    if train is not None:
        part = builder.nested(train)
        if kit is not None:
            part.odd += _count_notes(part, kit)
        builder.parts["train"] = part
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


def build_fall2011(builder: Builder, path: Path) -> str:
    """Index a tar of `<wnid>.tar`, whatever else is in it; returns the SHA-256 of the index."""
    builder.parts["train"] = builder.nested(path)
    return builder.write()


def _count_notes(part: Part, kit: Devkit) -> list[Oddity]:
    """Classes with another number of images than the devkit says: an archive may be whole and still lack some."""
    counts = Counter(part.rows["label"].tolist())
    return [Oddity(entry.wnid, f"{counts[label]} images, the devkit says {kit.train_counts[entry.wnid]}", True)
            for label, entry in enumerate(kit.classes)
            if kit.train_counts.get(entry.wnid, counts[label]) != counts[label]]


def _apply_patches(builder: Builder, patches: Part, patch_rows: dict[str, int]) -> None:
    """Let rows point at the patch archive's images of the same base name; label and split stay."""
    unused = dict.fromkeys(patch_rows)
    fields = [name for name in SAMPLE.names or () if name not in ("label", "split")]
    for part in builder.parts.values():
        for base, row in part.watched.items():
            new = patches.rows[patch_rows[base]]
            for name in fields:
                part.rows[name][row] = new[name]
            kept = not new["excluded"]
            if kept:
                part.rows["reason"][row] = REASONS.index("patched")
            part.odd = [odd for odd in part.odd if odd.row != row]
            part.odd.append(Oddity(base, REASONS[part.rows["reason"][row]], kept, row))
            unused.pop(base, None)
    builder.add_oddities([Oddity(base, "patch: no image has this name") for base in unused])
    builder.add_oddities([odd for odd in patches.odd if odd.row < 0])
