"""Write a small data set shaped as ILSVRC2012: `python tools/demo/dataset.py --out DIR`.

The one concept: what is easy to get wrong about the real archives is the same here. The train tar is a tar of
`<wnid>.tar`, numbers in names are neither padded nor consecutive, validation members are out of name order,
ILSVRC2012_IDs are not in wnid order, `meta.mat` holds inner nodes beside the leaves, and a few files are odd (a PNG, a
CMYK and a grey picture named .JPEG, an empty file, a JPEG cut short). The same arguments and library versions give the
same bytes.
"""
from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
ODDITIES = ("png", "cmyk", "grey", "empty", "cut")      # one of each, in the first classes


def wnids(count: int, seed: int) -> list[str]:
    """`count` different names like n03445777, in no order, none of them real WordNet nouns (n9…)."""
    import numpy as np
    numbers = np.random.default_rng([seed, 1]).choice(10 ** 6, size=count, replace=False)
    return [f"n9{number * 7 % 10 ** 7:07d}" for number in map(int, numbers)]


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _tar(members: Iterator[tuple[str, bytes]]) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in members:
            _add(archive, name, data)
    return target.getvalue()


def meta_mat(leaves: list[tuple[str, str, int]]) -> bytes:
    """`meta.mat` as in the devkit: leaf k of `leaves` (wnid, words, training images) has ILSVRC2012_ID k + 1; two inner
    nodes and a root follow.
    """
    import numpy as np
    from scipy.io import savemat
    half = len(leaves) // 2
    total = len(leaves)
    rows: list[tuple[str, str, list[int], int]] = [
        *((wnid, words, [], images) for wnid, words, images in leaves),
        ("n95000001", "one half", list(range(1, half + 1)), 0),
        ("n90000002", "the other half", list(range(half + 1, total + 1)), 0),
        ("n99999999", "toy", [total + 1, total + 2], 0)]
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height",
              "num_train_images")
    synsets = np.zeros((len(rows), 1), dtype=[(field, object) for field in fields])
    for k, (wnid, words, children, images) in enumerate(rows):
        height = 0 if not children else 2 if k == len(rows) - 1 else 1
        synsets[k, 0] = (float(k + 1), wnid, words, f"a drawn {words}", float(len(children)),
                         np.array([children], dtype=np.float64), float(height), float(images))
    target = io.BytesIO()
    savemat(target, {"synsets": synsets}, format="5", oned_as="row")
    # The first 116 bytes are free text, into which scipy writes the date.
    return b"MATLAB 5.0 MAT-file, drawn by tools/make_demo.py".ljust(116) + target.getvalue()[116:]


def _damage(oddity: str, draw: Callable[[], Any], encode: Callable[..., bytes]) -> bytes:
    if oddity == "empty":
        return b""
    if oddity == "cut":
        data = encode(draw())
        return data[:len(data) * 3 // 10]       # so high that every crop reaches below the cut
    return encode(draw(), oddity)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it takes the place of `path` at the end, and is removed when something fails."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def make(out: Path, seed: int, class_count: int, per_class: int, val_per_class: int, sides: tuple[int, int],
         report: Callable[[int, int], None] = lambda done, total: None) -> dict[str, int]:
    """Write the three archives into `out` (made if missing); return {"train": members, "val": members, "classes": …}.

    report(done, total) is called after every class. Raises ValueError for counts out of range, RuntimeError when Pillow
    is missing.
    """
    import numpy as np
    from tools.demo.images import classes, draw, encode
    for name, value in (("per-class", per_class), ("val-per-class", val_per_class)):
        if value < 1:
            raise ValueError(f"{name} (={value}) must be at least 1; there is nothing to learn from less")
    if seed < 0:
        raise ValueError(f"seed (={seed}) must be at least 0; choose another")
    if not 16 <= sides[0] <= sides[1]:
        raise ValueError(f"sides (={sides[0]} {sides[1]}) must be two numbers of pixels, from 16 on, the smaller "
                         "first; say e.g. 90 160")
    kinds = classes(class_count)
    names = wnids(class_count, seed)                     # of class k, which has ILSVRC2012_ID k + 1
    random = np.random.default_rng([seed, 2])
    out.mkdir(parents=True, exist_ok=True)
    train_count = 0

    def members(k: int) -> Iterator[tuple[str, bytes]]:
        nonlocal train_count
        colour, shape = kinds[k]
        numbers = random.choice(np.arange(1, 20 * per_class + 40), size=per_class + 1, replace=False)
        for i in range(per_class):
            train_count += 1
            yield f"{names[k]}_{numbers[i]}.JPEG", encode(draw(seed, colour, shape, i, sides))
        if k < len(ODDITIES):
            train_count += 1
            yield (f"{names[k]}_{numbers[per_class]}.JPEG",
                   _damage(ODDITIES[k], lambda: draw(seed, colour, shape, per_class, sides), encode))

    with _whole(out / TRAIN) as path, tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for done, k in enumerate(sorted(range(class_count), key=names.__getitem__)):
            _add(archive, f"{names[k]}.tar", _tar(members(k)))
            report(done + 1, class_count)

    truth = random.permutation(np.repeat(np.arange(class_count), val_per_class))          # class of the i-th *name*
    seen = [0] * class_count
    pictures = []
    for i, k in enumerate(map(int, truth)):
        # Numbers of pictures far from those of training: a validation picture is never a training picture.
        pictures.append((f"ILSVRC2012_val_{i + 1:08d}.JPEG",
                         encode(draw(seed, *kinds[k], 10 ** 6 + seen[k], sides))))
        seen[k] += 1
    with _whole(out / VAL) as path, tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for i in random.permutation(len(pictures)):
            _add(archive, *pictures[i])

    folder = DEVKIT.removesuffix(".tar.gz")
    leaves = [(names[k], f"{colour} {shape}, toy", per_class + (k < len(ODDITIES)))
              for k, (colour, shape) in enumerate(kinds)]
    devkit = _tar(iter([
        (f"{folder}/readme.txt", b"Drawn by tools/make_demo.py in the shape of the ILSVRC2012 development kit.\n"),
        (f"{folder}/data/meta.mat", meta_mat(leaves)),
        (f"{folder}/data/ILSVRC2012_validation_ground_truth.txt", "".join(f"{k + 1}\n" for k in truth).encode())]))
    with _whole(out / DEVKIT) as path:
        path.write_bytes(gzip.compress(devkit, mtime=0))
    return {"train": train_count, "val": len(pictures), "classes": class_count}


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 with a message on stderr."""
    parser = argparse.ArgumentParser(description="Write a small, drawn data set shaped as ILSVRC2012: train tar, val "
                                                 "tar, devkit.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the three archives")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classes", type=int, default=10, metavar="N", help="4 to 36")
    parser.add_argument("--per-class", type=int, default=200, metavar="N", help="training pictures of a class")
    parser.add_argument("--val-per-class", type=int, default=30, metavar="N", help="validation pictures of a class")
    parser.add_argument("--sides", type=int, nargs=2, default=(90, 160), metavar=("LO", "HI"),
                        help="range of the short side, pixels")
    options = parser.parse_args(arguments)
    try:
        from rich.progress import Progress
        with Progress(disable=not sys.stderr.isatty()) as progress:
            bar = progress.add_task("drawing", total=options.classes)
            counts = make(options.out, options.seed, options.classes, options.per_class, options.val_per_class,
                          tuple(options.sides), lambda done, total: progress.update(bar, completed=done))
    except KeyboardInterrupt:
        print("interrupted; no archive was left half-written", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"error: output folder (={options.out}) cannot be written ({error.strerror}); give another --out", file=sys.stderr)
        return 2
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{counts['train']} training and {counts['val']} validation pictures of {counts['classes']} classes in "
          f"{options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
