"""Write a small synthetic data set shaped as ILSVRC2012: `python -m tools.demo.dataset --out DIR`.

What is easy to get wrong about the real archives is the same here. The train tar is a tar of `<wnid>.tar`, numbers in names are
neither padded nor consecutive, validation members are out of name order, ILSVRC2012_IDs are not in wnid order, `meta.mat` holds
inner nodes beside the leaves, and a few files are odd (a PNG, a CMYK and a grey picture named .JPEG, an empty file, a JPEG cut
short). The same arguments and library versions give the same bytes.
"""
from train.exit_codes import run_command, start_command

if __name__ == "__main__":
    start_command()

import gzip
import io
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from rich.console import Console
from rich.progress import track

from pipeline.files import atomic_write
from tools.cli import guarded
from train.cli import Parser
from tools.demo.images import classes, encode, render

TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
ODDITIES = ("png", "cmyk", "grey", "empty", "cut")  # one of each, in the first classes


def wnids(count: int, seed: int) -> list[str]:
    """`count` different names like n03445777, in no order, none of them real WordNet nouns (n9…)."""
    numbers = np.random.default_rng([seed, 1]).choice(10 ** 6, size=count, replace=False)
    return [f"n9{number * 7 % 10 ** 7:07d}" for number in map(int, numbers)]


def write_tar(file: BinaryIO, members: Iterable[tuple[str, bytes]]) -> None:
    """An uncompressed tar of (name, content)."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def _tar(members: Iterable[tuple[str, bytes]]) -> bytes:
    target = io.BytesIO()
    write_tar(target, members)
    return target.getvalue()


def meta_mat(leaves: list[tuple[str, str, int]]) -> bytes:
    """`meta.mat` as in the devkit: leaf k of `leaves` (wnid, words, training images) has ILSVRC2012_ID k + 1; two inner nodes and
    a root follow."""
    from scipy.io import savemat

    half, total = len(leaves) // 2, len(leaves)
    rows: list[tuple[str, str, list[int], int]] = [
        *((wnid, words, [], images) for wnid, words, images in leaves),
        ("n95000001", "one half", list(range(1, half + 1)), 0),
        ("n90000002", "the other half", list(range(half + 1, total + 1)), 0),
        ("n99999999", "toy", [total + 1, total + 2], 0)]
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height", "num_train_images")
    synsets = np.zeros((len(rows), 1), dtype=[(field, object) for field in fields])
    for k, (wnid, words, children, images) in enumerate(rows):
        height = 0 if not children else 2 if k == len(rows) - 1 else 1
        synsets[k, 0] = (float(k + 1), wnid, words, f"a drawn {words}", float(len(children)),
                         np.array([children], dtype=np.float64), float(height), float(images))
    target = io.BytesIO()
    savemat(target, {"synsets": synsets}, format="5", oned_as="row")
    # The first 116 bytes are free text, into which scipy writes the date. Texts in the devkit keep an earlier name of this file, so
    # that its bytes never change.
    return b"MATLAB 5.0 MAT-file, drawn by tools/make_demo.py".ljust(116) + target.getvalue()[116:]


def make(out: Path, seed: int, class_count: int, per_class: int, val_per_class: int, sides: tuple[int, int]) -> dict[str, int]:
    """Write the three archives into `out` (made if missing); return {"train": members, "val": members, "classes": …}. Raises
    ValueError for counts out of range, RuntimeError when Pillow is missing."""
    for name, value, low in (("seed", seed, 0), ("per-class", per_class, 1), ("val-per-class", val_per_class, 1)):
        if value < low:
            raise ValueError(f"{name} (={value}) must be at least {low}; choose another")
    if not 16 <= sides[0] <= sides[1]:
        raise ValueError(f"sides (={sides[0]} {sides[1]}) must be two numbers of pixels, from 16 on, the smaller "
                         "first; say e.g. 90 160")
    kinds, names = classes(class_count), wnids(class_count, seed)  # of class k, which has ILSVRC2012_ID k + 1
    random = np.random.default_rng([seed, 2])
    odd = dict(enumerate(ODDITIES[:class_count]))

    def picture(k: int, number: int, kind: str = "jpeg") -> bytes:
        if kind == "empty":
            return b""
        if kind == "cut":  # so high that every crop reaches below the cut
            content = picture(k, number)
            return content[:len(content) * 3 // 10]
        return encode(render(seed, *kinds[k], number, sides), kind)

    def train_members(k: int) -> Iterator[tuple[str, bytes]]:
        numbers = random.choice(np.arange(1, 20 * per_class + 40), size=per_class + 1, replace=False)
        for i in range(per_class + (k in odd)):
            yield f"{names[k]}_{numbers[i]}.JPEG", picture(k, i, odd[k] if i == per_class else "jpeg")

    out.mkdir(parents=True, exist_ok=True)
    bar = track(sorted(range(class_count), key=names.__getitem__), "generating", console=Console(stderr=True), transient=True,
                disable=not sys.stderr.isatty())
    with atomic_write(out / TRAIN) as file:
        write_tar(file, ((f"{names[k]}.tar", _tar(train_members(k))) for k in bar))

    truth = random.permutation(np.repeat(np.arange(class_count), val_per_class))  # class of the i-th *name*
    seen = [0] * class_count
    pictures = []
    for i, k in enumerate(map(int, truth)):
        # Numbers of pictures far from those of training: a validation picture is never a training picture.
        pictures.append((f"ILSVRC2012_val_{i + 1:08d}.JPEG", picture(k, 10 ** 6 + seen[k])))
        seen[k] += 1
    with atomic_write(out / VAL) as file:
        write_tar(file, (pictures[i] for i in random.permutation(len(pictures))))

    folder = DEVKIT.removesuffix(".tar.gz")
    leaves = [(names[k], f"{colour} {shape}, toy", per_class + (k in odd)) for k, (colour, shape) in enumerate(kinds)]
    devkit = _tar([
        (f"{folder}/readme.txt", b"Drawn by tools/make_demo.py in the shape of the ILSVRC2012 development kit.\n"),
        (f"{folder}/data/meta.mat", meta_mat(leaves)),
        (f"{folder}/data/ILSVRC2012_validation_ground_truth.txt", "".join(f"{k + 1}\n" for k in truth).encode())])
    with atomic_write(out / DEVKIT) as file:
        file.write(gzip.compress(devkit, mtime=0))
    return {"train": class_count * per_class + len(odd), "val": len(pictures), "classes": class_count}


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 with a message on stderr."""
    parser = Parser(prog="python -m tools.demo.dataset", example="python -m tools.demo.dataset -o demo --classes 4 --per-class 20",
                    description="Write a small synthetic data set shaped as ILSVRC2012: train tar, val tar, devkit.")
    parser.add_out("folder for the three archives", required=True)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the pictures")
    parser.add_argument("--classes", type=int, default=10, metavar="N", help="4 to 36")
    parser.add_argument("--per-class", type=int, default=200, metavar="N", help="training pictures of a class")
    parser.add_argument("--val-per-class", type=int, default=30, metavar="N", help="validation pictures of a class")
    parser.add_argument("--sides", type=int, nargs=2, default=(90, 160), metavar=("LO", "HI"), help="range of the short side")

    def work() -> None:
        args = parser.parse_args(argv)
        counts = make(args.out, args.seed, args.classes, args.per_class, args.val_per_class, tuple(args.sides))
        print(f"{counts['train']} training and {counts['val']} validation pictures of {counts['classes']} classes in {args.out}")
    return guarded(work, "interrupted; no archive was left half-written")


if __name__ == "__main__":
    run_command(main)
