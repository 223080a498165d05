"""Challenge submissions: a line for each image of a split in the order of the images' names, on it the ILSVRC IDs of the five
most probable classes, best first."""

import re
from pathlib import Path
from typing import Callable

import numpy as np

from pipeline.files import atomic_write
from pipeline.io_errors import explain
from pipeline.index.sample_index import SampleIndex
from pipeline.index.ilsvrc import read_devkit


def challenge_ids(index: SampleIndex, devkit: Path) -> np.ndarray:
    """(K,) ILSVRC ID of each class of an index, from the devkit's meta.mat (an index keeps wnids, which are not in that order).
    Raises ValueError when there is no devkit, or it lacks a class of the index."""
    kit = read_devkit(devkit)
    id_of = {kit.classes[label].wnid: number for number, label in enumerate(kit.label_of_id.tolist()) if label >= 0}
    missing = [entry.wnid for entry in index.classes if entry.wnid not in id_of]
    if missing:
        raise ValueError(f"devkit (={devkit}) has no ID for {len(missing)} of the {len(index.classes)} classes of {index.path}, "
                         f"such as {missing[0]}; give the devkit of the challenge it was built from")
    return np.array([id_of[entry.wnid] for entry in index.classes])


def check_numbering(index: SampleIndex, split: str, warn: Callable[[str], None]) -> None:
    """Compare the positions of a split's images with the numbers in their names, as `ILSVRC2012_test_00000001.JPEG` has one.

    Two names suffice: they are in order, all different, so when the first is number 1 and the last number N, none is missing.
    Raises ValueError when one is, or names have no numbers: the lines would belong to other images.
    """
    rows = index.split_rows(split)
    for number, id in (1, rows.start), (rows.stop - rows.start, rows.stop - 1):
        name = index.safe_name(id)
        if name == "?":
            warn(f"the numbers in the names of split {split} could not be compared with the lines, as its archive is not there")
            return
        in_name = re.search(r"(\d+)\.[^./]*$", name)
        if not in_name or int(in_name.group(1)) != number:
            raise ValueError(f"image (={name}) must have number {number} in its name, as the challenge's images have, for that "
                             f"is its place in split {split} of {index.path}; index the whole archive as it was published")


def write(path: Path, index: SampleIndex, split: str, images: np.ndarray, best: np.ndarray, ids: np.ndarray,
          warn: Callable[[str], None]) -> None:
    """Write the file atomically: the (N, 5) `best` classes of the (N,) tested `images`, as `challenge_ids`.

    Excluded images were not tested; their lines, which must be there, are guesses, of which `warn` is told.
    """
    rows = index.split_rows(split)
    lines = np.tile(np.sort(ids)[:best.shape[1]], (rows.stop - rows.start, 1))
    lines[images - rows.start] = ids[best]
    if guesses := len(lines) - len(images):
        warn(f"{guesses} images of split {split} are excluded from {index.path}; their lines of {path} are guesses")
    try:
        with atomic_write(path) as file:
            file.write("".join(" ".join(map(str, line)) + "\n" for line in lines.tolist()).encode())
    except OSError as error:
        raise ValueError(f"submission (={path}) cannot be written: {explain(error, path)}; or give another") from None
