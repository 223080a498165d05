"""A small set of photographs for tests: a tar of JPEGs and its index, written without the index builder."""
import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.index.tar import fingerprint
from pipeline.index.header import Archive, ClassInfo
from pipeline.index.sample_index import FORMATS, SAMPLE, SampleIndex
from pipeline.index.writer import write_index

SIZES = [(64, 64), (90, 120), (120, 90), (333, 250), (250, 500), (41, 77), (600, 401), (256, 256), (300, 257), (96, 500)]


def picture(number: int, height: int, width: int) -> Image.Image:
    """A smooth, structured RGB picture with edges, different for every number."""
    random = np.random.default_rng(number)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = random.uniform(2, 14, (3, 2))
    pixels = np.stack([127 + 100 * np.sin(2 * np.pi * (a * y + b * x) + random.uniform(0, 6)) for a, b in waves], axis=-1)
    top, left = random.integers(0, height // 2), random.integers(0, width // 2)
    pixels[top:top + height // 3, left:left + width // 3] = random.uniform(0, 255, 3)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 90, "subsampling": 2} if kind == "JPEG" and not options else options))
    return buffer.getvalue()


def photographs(count: int) -> list[bytes]:
    """`count` JPEGs, sizes in turn from SIZES."""
    return [encode(picture(i, *SIZES[i % len(SIZES)])) for i in range(count)]


def write_set(folder: Path, train: list[bytes], val: list[bytes] = [], *, classes: int = 5, crc32: bool = True) -> SampleIndex:
    """Write `folder`/images.tar and `folder`/index; label of image i of a split is i modulo `classes`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = np.zeros(len(train) + len(val), SAMPLE)
    path = folder / "images.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for id, (number, split, blob) in enumerate([(i, 0, b) for i, b in enumerate(train)]
                                                   + [(i, 1, b) for i, b in enumerate(val)]):
            member = tarfile.TarInfo(f"{('train', 'val')[split]}_{number:04d}.JPEG")
            member.size = len(blob)
            tar.addfile(member, io.BytesIO(blob))
            row = rows[id]
            row["offset"] = tar.offset - -(-len(blob) // 512) * 512
            row["size"], row["crc32"], row["header_blocks"] = len(blob), zlib.crc32(blob) if crc32 else 0, 1
            row["label"], row["split"], row["format"], row["channels"] = number % classes, split, FORMATS.index("jpeg"), 3
            try:
                row["width"], row["height"] = Image.open(io.BytesIO(blob)).size
            except OSError:  # not an image; the test says why it is there
                row["width"], row["height"] = 100, 100
    write_index(folder / "index", rows, classes=[ClassInfo(f"n{i:08d}", f"class {i}") for i in range(classes)],
                archives=[Archive(path, path.stat().st_size, fingerprint(path), "tar")],
                splits=["train", "val"] if val else ["train"], preset="classes", crc32=crc32)
    return SampleIndex.load(folder / "index")
