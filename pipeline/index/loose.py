"""Image files from anywhere as an index of their own, so that they are read, checked and decoded as every other image is."""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

from pipeline.index.sample_index import REASONS, SampleIndex
from pipeline.index.builder import Builder
from pipeline.index.ilsvrc import build_classes

SPLIT = "train"


def index_of_files(files: Sequence[Path], folder: Path) -> SampleIndex:
    """An index, in an empty folder, of image files that stay where they are: sample id is the place among `files`. They have the
    one class "file", which says nothing.

    Raises:
        ValueError: there is none; naming the one that is no file, or no image that can be decoded.
    """
    if not files:
        raise ValueError("images (=none) are missing; give one or more JPEG or PNG files")
    links = folder / "images" / "file"
    links.mkdir(parents=True)
    for place, file in enumerate(files):
        if not file.is_file():
            raise ValueError(f"image (={file}) does not exist; give a JPEG or PNG file")
        (links / f"{place:09d}.JPEG").symlink_to(file.absolute())  # the format is told by the bytes, whatever the name
    build_classes(Builder(folder / "index", "classes", jobs=1), links.parent)
    index = SampleIndex.load(folder / "index")
    for place, row in enumerate(index.samples):
        if row["excluded"]:
            raise ValueError(f"image (={files[place]}) cannot be read: {REASONS[row['reason']].replace('_', ' ')}; give a JPEG "
                             "or PNG file")
    return index
