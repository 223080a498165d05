"""Archives, devkits and indexes in small for tests: ILSVRC's layout, built by the command as a user would."""
import gzip
import io
import json
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.files import file_sha256
from pipeline.index.header import content_sha256
from pipeline.index.sample_index import SampleIndex
from tests.helpers.small_set import encode, picture
from tests.helpers.tars import block, save, tar_bytes
from tools.build_index import main

COMMAND = [sys.executable, str(Path(__file__).parents[2] / "tools/build_index.py")]
WNIDS = ["n05", "n01", "n09", "n02"]  # ID 1..4: not in wnid order


def meta_mat(ids: list[int] = [1, 2, 3, 4], wnids: list[str] = WNIDS, year: str = "2012", images: int = 0) -> bytes:
    """The devkit's table of classes."""
    from scipy.io import savemat  # 0.3 s

    fields = [(f"ILSVRC{year}_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O"), ("num_train_images", "O")]
    rows = [(id, wnid, f"words of {wnid}", 0, images) for id, wnid in zip(ids, wnids)]
    rows.insert(2, (99, "n00", "an inner node", len(ids), 0))
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array(rows, fields)})
    return buffer.getvalue()


def devkit(path: Path, truth: bytes = b"2\n1\n4\n3\n2\n", year: str = "2012", **meta: object) -> Path:
    """A devkit: a folder, or a .tar.gz when the path says so."""
    files = {"data/meta.mat": meta_mat(year=year, **meta), f"data/ILSVRC{year}_validation_ground_truth.txt": truth,
             "readme.txt": b"x"}  # type: ignore[arg-type]
    if not path.name.endswith(".tar.gz"):
        for name, data in files.items():
            save(path / name, data)
        return path
    return save(path, gzip.compress(tar_bytes({f"kit/{name}": data for name, data in files.items()})))


def jpeg(number: int, height: int = 24, width: int = 32, mode: str = "RGB") -> bytes:
    """A JPEG of picture `number`."""
    return encode(picture(number, height, width).convert(mode))


def train_tar(path: Path, extra: dict[str, dict[str, bytes]] = {}) -> dict[str, bytes]:
    """A train tar of 4 classes × 5 images, inner tars not in wnid order; returns name → bytes."""
    files: dict[str, dict[str, bytes]] = {
        wnid: {f"{wnid}_{10 * i}.JPEG": jpeg(number * 10 + i) for i in (3, 1, 12, 0, 7)}
        for number, wnid in enumerate(["n09", "n01", "n05", "n02"])}
    for wnid, more in extra.items():
        files.setdefault(wnid, {}).update(more)
    save(path, tar_bytes({f"{wnid}.tar": tar_bytes(inner) for wnid, inner in files.items()}))
    return {f"{wnid}/{name}": data for wnid, inner in files.items() for name, data in inner.items()}


def val_tar(path: Path, folder: str = "", year: str = "2012", kind: str = "val") -> dict[str, bytes]:
    """A val or test tar of 5 images; returns name → bytes."""
    files = {f"{folder}ILSVRC{year}_{kind}_{i:08d}.JPEG": jpeg(100 + i) for i in (3, 1, 5, 2, 4)}  # not in name order
    save(path, (block(folder.encode(), kind=b"5") if folder else b"") + tar_bytes(files))
    return files


def built(tmp_path: Path, *arguments: object, code: int = 0) -> SampleIndex:
    """The index `tmp_path`/index, built by the command."""
    out = tmp_path / "index"
    assert main(["build", *map(str, arguments), "--out", str(out), "--jobs", "1"]) == code
    return SampleIndex.load(out) if code == 0 else None  # type: ignore[return-value]


def contents(index: SampleIndex, split: str) -> dict[str, tuple[str, bytes]]:
    """name → (wnid, bytes) of a split, read through the index; geometry and CRC-32 checked on the way."""
    found = {}
    for id in index.ids(split).tolist():
        row, data = index.samples[id], index.read(id)
        assert zlib.crc32(data) == row["crc32"] or not index.header["crc32"]
        assert Image.open(io.BytesIO(data)).size == (row["width"], row["height"])
        found[index.name(id)] = (index.classes[row["label"]].wnid if row["label"] >= 0 else "", data)
    return found


def with_rows(index: SampleIndex, samples: np.ndarray) -> SampleIndex:
    """The index with other rows in its array file, with the right hashes; loaded."""
    np.save(index.path / "samples.npy", samples)
    altered(index.path, {"files": {**index.header["files"], **file_entry(index.path / "samples.npy")}})
    return SampleIndex.load(index.path)


def file_entry(path: Path) -> dict[str, dict[str, object]]:
    """A header's entry for samples.npy."""
    return {"samples": {"file": path.name, "size": path.stat().st_size, "sha256": file_sha256(path)}}


def altered(folder: Path, change: dict[str, object], resign: bool = True) -> None:
    """Change the header of an index, and its own hash."""
    header = json.loads((folder / "index.json").read_text())
    header.update(change)
    if resign:
        header["sha256"] = content_sha256(header)
    (folder / "index.json").write_text(json.dumps(header))
