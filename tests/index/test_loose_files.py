"""Loose image files as an index."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from pipeline.index.folders import index_of_files


def test_a_png_is_indexed(tmp_path: Path) -> None:
    Image.new("RGBA", (90, 70), (200, 100, 50, 255)).save(tmp_path / "a.png")
    index = index_of_files([tmp_path / "a.png"], tmp_path / "scratch")
    assert (int(index.row(0)["width"]), int(index.row(0)["height"])) == (90, 70)


@pytest.mark.parametrize("data, message", [
    (b"", r"image \(=.*bad.jpg\) cannot be read: empty; give a JPEG or PNG file"),
    (b"words" * 99, r"image \(=.*bad.jpg\) cannot be read: not an image; give"),
    (None, r"image \(=.*bad.jpg\) does not exist; give a JPEG or PNG file")])
def test_files_that_are_no_images_are_named(tmp_path: Path, data: bytes | None, message: str) -> None:
    Image.new("RGB", (90, 70)).save(tmp_path / "good.png")
    if data is not None:
        (tmp_path / "bad.jpg").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        index_of_files([tmp_path / "good.png", tmp_path / "bad.jpg"], tmp_path / "scratch")
