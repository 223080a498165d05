"""Index of class folders, in a tar or on disk: `[.../]<split>/<class>/.../x.jpg` or `[.../]<class>/.../x.jpg`; of a tar of
`<wnid>.tar`. Beside `train/<class>/x.jpg`, val and test may hold images directly, as Kaggle's ILSVRC does. A folder on disk is
an archive too: its image files in sorted order, their names packed for names.bin."""
import csv
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.index.builder import Builder
from pipeline.index.image_header import is_image_name
from pipeline.index.header import Archive, ClassInfo, label_of
from pipeline.index.scan import Oddity
from pipeline.index.tar import Member

# Classes of validation images: by base name without suffix, or in the order of base names.
Truth = Mapping[str, str] | Sequence[str]
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
               "test": "test", "testing": "test"}


def build_fall2011(builder: Builder, path: Path) -> str:
    """Index a tar of `<wnid>.tar`, whatever else is in it; returns the SHA-256 of the index."""
    builder.parts["train"] = builder.nested(path)
    return builder.write()


def build_classes(builder: Builder, path: Path, *, words: Mapping[str, str] = {}, truth: Truth | None = None) -> str:
    """Index a tar or folder of class folders, or a tar of `<wnid>.tar`; returns the SHA-256 of the index. Raises ValueError.

    words: of a class; truth: classes of the validation images that lie in no class folder.
    """
    if path.is_dir():
        members, builder.names, odd = list_folder(path)
        builder.archives.append(folder_archive(path, members))
    elif not path.exists():
        raise ValueError(f"data set (={path}) does not exist; give a folder of class folders, or a tar of them")
    else:
        files = [member for member in builder.members(path) if member.kind != "directory"]
        members = [member for member in files if member.kind == "file" and is_image_name(member.name)]
        tar = next((member for member in files if member.kind == "file" and member.name.endswith(".tar")), None)
        if tar is not None and members:
            raise ValueError(f"archive (={path}) holds images ({members[0].name} …) as well as tars ({tar.name} …), so which are "
                             f"the data set is not known; say fall2011 for the tars, or repack it without them")
        if tar is not None:
            return build_fall2011(builder, path)
        odd = [Oddity(member.name, "not called an image" if member.kind == "file" else f"a {member.kind}, not a file")
               for member in files if member.kind != "file" or not is_image_name(member.name)]
        if members:
            builder.add_archive(path)
    if not members:
        raise ValueError(f"data set (={path}) holds no images (.jpg, .jpeg, .png, .webp, .bmp); give a tar or a folder "
                         f"of class folders, or a tar of <wnid>.tar")
    whole = builder.flat(0, members, path.name)
    splits, classes = splits_and_classes(whole.names or [], path)
    builder.classes = [ClassInfo(name, words.get(name, "")) for name in sorted({name for name in classes if name is not None})]
    labels = label_of(builder.classes)
    if truth is not None:
        flat = [row for row, name in enumerate(classes) if name is None and splits[row] == "val"]
        for row, name in zip(flat, _true_classes([(whole.names or [])[row] for row in flat], truth, path), strict=True):
            if name not in labels:
                raise ValueError(f"class (={name}) of {(whole.names or [])[row]} has no image in split train of {path}; give the "
                                 "ground truth that belongs to it")
            classes[row] = name
    whole.rows["label"] = [-1 if name is None else labels[name] for name in classes]
    builder.add_by_split(whole, splits)
    builder.add_oddities(odd)
    return builder.write()


def split_and_class(name: str) -> tuple[str | None, str]:
    """(split or None, class) of an image by its path. Raises ValueError when it is in no folder.

    The first folder called train, val (valid, validation) or test that has a folder below it is the split; the folder
    below it is the class. Without one, it is the folder the image lies in.
    """
    folders = name.split("/")[:-1]
    for folder, below in zip(folders, folders[1:]):
        if folder.lower() in SPLIT_NAMES:
            return SPLIT_NAMES[folder.lower()], below
    if not folders or folders[-1] in (".", ""):
        raise ValueError(f"image (={name}) lies in no class folder; arrange images as <class>/<image> or train/<class>/<image>")
    return None, folders[-1]


def _true_classes(names: Sequence[str], truth: Truth, path: Path) -> list[str]:
    """The classes of validation images. Raises ValueError when the truth is not theirs."""
    bases = [name.rpartition("/")[2] for name in names]
    if isinstance(truth, Mapping):
        by_base = {base: truth[base.rpartition(".")[0]] for base in bases if base.rpartition(".")[0] in truth}
    else:
        by_base = dict(zip(sorted(bases), truth))
    if len(by_base) != len(names) or len(truth) != len(names):
        raise ValueError(f"ground truth (=of {len(truth)} images) must be that of the {len(names)} images directly in val of "
                         f"{path}, each once; give the whole folder and the ground truth that belongs to it")
    return [by_base[base] for base in bases]


def kaggle_truth(path: Path) -> dict[str, str]:
    """Base name without suffix → class, of Kaggle's LOC_val_solution.csv. Raises ValueError, OSError.

    After a line `ImageId,PredictionString` a line an image: `ILSVRC2012_val_00048981,n03995372 85 1 499 272 …`, class and box of
    each object; in ILSVRC all are of one class.
    """
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.reader(file))[1:]
    for number, row in enumerate(rows, 2):
        if len(row) != 2 or not row[0] or not row[1].split():
            raise ValueError(f"ground truth (={','.join(row)[:60]!r}) in line {number} of {path} is no `image,class box`; give "
                             "Kaggle's LOC_val_solution.csv")
    return {image: boxes.split()[0] for image, boxes in rows}


def splits_and_classes(names: Sequence[str], path: Path) -> tuple[list[str], list[str | None]]:
    """Splits and classes of all images of data set `path`; all or none of them lie below a split. Where some lie in
    `<split>/<class>/`, those directly in val or test have no class. Without splits, the class is the first folder below those
    that all images share, as of torchvision's ImageFolder. Raises ValueError."""
    placed: list[tuple[str | None, str | None]] = [split_and_class(name) for name in names]
    if all(split is None for split, _ in placed):
        folders = [name.split("/")[:-1] for name in names]
        depth = min(len(os.path.commonprefix(folders)), min(map(len, folders)) - 1)
        placed = [(None, parts[depth]) for parts in folders]
    else:
        flat = {name: split for name, split in SPLIT_NAMES.items() if split != "train"}
        placed = [(flat[str(folder).lower()], None) if split is None and str(folder).lower() in flat else (split, folder)
                  for split, folder in placed]
    without = next((name for name, (split, _) in zip(names, placed) if split is None), None)
    within = next((name for name, (split, _) in zip(names, placed) if split is not None), None)
    if without is not None and within is not None:
        raise ValueError(f"image (={without}) of {path} lies in no split but {within} does; "
                         f"put all or none below train/, val/ or test/")
    splits, classes = [split or "train" for split, _ in placed], [name for _, name in placed]
    trained = {name for split, name in zip(splits, classes) if split == "train"}
    for name, wnid in zip(names, classes):
        if trained and wnid is not None and wnid not in trained:
            raise ValueError(f"class (={wnid}) of {name} in {path} has no image in split train; "
                             f"remove it, or name its folder as in train")
    return splits, classes


def list_folder(path: Path) -> tuple[list[Member], bytes, list[Oddity]]:
    """Image files below `path` sorted by path, names.bin, and files that are not called images.

    A member's `offset` is the position of its name in names.bin. Symbolic links are followed. Raises ValueError on a folder that
    contains itself.
    """
    sizes: list[tuple[str, int]] = []
    odd: list[Oddity] = []

    def visit(folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> None:
        status = folder.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            raise ValueError(f"folder (={folder}) is a link to a folder above it, so the tree has no end; remove the link")
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = prefix + entry.name
                if entry.is_dir():
                    before = len(sizes)
                    visit(folder / entry.name, name + "/", (*above, identity))
                    if len(sizes) == before:
                        odd.append(Oddity(name + "/", "a folder without images"))
                elif not entry.is_file():
                    odd.append(Oddity(name, "a dangling link or a device, not a file"))
                elif not is_image_name(name):
                    odd.append(Oddity(name, "not called an image"))
                else:
                    sizes.append((name, entry.stat().st_size))

    visit(path, "", ())
    members, packed = [], bytearray()
    for name, size in sorted(sizes):
        members.append(Member(name, "file", len(packed), size, len(packed)))
        packed += os.fsencode(name) + b"\0"
    return members, bytes(packed), odd


def folder_archive(path: Path, members: Sequence[Member]) -> Archive:
    """The folder as an Archive: bytes of all images; the fingerprint covers their names and sizes."""
    digest = hashlib.sha256()
    for member in members:
        digest.update(os.fsencode(member.name) + b"\0%d\0" % member.size)
    return Archive(path.absolute(), sum(member.size for member in members), digest.hexdigest(), "folder")
