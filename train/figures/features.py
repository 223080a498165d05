"""The features of a split: what a network's last layer sees of every image, in a folder, searched for neighbours (figure 4).

A folder holds
  features.npy    (N, D) float32, memory-mapped. Rounded to float16, half as large, one query in 500 gets another sixth neighbour
                  among 50,000 images (and one in 150 another order); not worth a second format
  ids.npy         (N,) int64 sample ids of the index, ascending
  manifest.json   which checkpoint and images they are of, sizes and SHA-256 of both files, and its own; written last, so that a
                  folder without it holds nothing
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterator

import numpy as np

from pipeline.files import remove_dead, atomic_write
from train.checkpoint.load_trained import TrainedNetwork

FORMAT = 1
MANIFEST, FEATURES, IDS = "manifest.json", "features.npy", "ids.npy"
BLOCK = 4096  # rows searched at once


@dataclass(frozen=True)
class Source:
    """What features are of.

    Attributes:
        checkpoint, checkpoint_sha256: the network, and its identity (of its manifest).
        layer: whose activation it is: fc7 in the paper.
        index, index_sha256: the data set.
        split, split_sha256: of it, and of the images.
    """

    checkpoint: str
    checkpoint_sha256: str
    layer: str
    index: str
    index_sha256: str
    split: str
    split_sha256: str

    @classmethod
    def of(cls, trained: TrainedNetwork, split: str) -> "Source":
        """What the features of a split would be of."""
        index = trained.index
        return cls(str(trained.source.path.absolute()), trained.source.sha256, trained.layer, str(index.path), index.sha256,
                   split, index.split_sha256(split))


class Features:
    """A folder of features whose files are the ones that were written.

    Attributes:
        path: the folder.
        source: what they are of.
        ids: (N,) int64.
        rows: (N, D) float32, a read-only memory map.
        skipped: id → reason of the images that could not be read, and have none.
    """

    def __init__(self, path: Path, source: Source, ids: np.ndarray, rows: np.ndarray, skipped: dict[int, str]) -> None:
        self.path, self.source, self.ids, self.rows, self.skipped = path, source, ids, rows, skipped

    @classmethod
    def load(cls, path: Path) -> "Features":
        """Compare a folder with its manifest and open it. Raises ValueError saying which file is not as it was written."""
        manifest = _read_manifest(path)
        arrays = {}
        for name in (FEATURES, IDS):
            entry, file = manifest["files"][name], path / name
            size = file.stat().st_size if file.is_file() else None
            if size != entry["size"]:
                raise ValueError(f"features file (={file}) {'is missing' if size is None else f'has {size} bytes'}, was written "
                                 f"with {entry['size']}; build the features again")
            if (found := _sha256(file)) != entry["sha256"]:
                raise ValueError(f"features file (={file}) has SHA-256 {found[:16]}…, was written with "
                                 f"{entry['sha256'][:16]}…; build the features again")
            arrays[name] = np.load(file, mmap_mode="r" if name == FEATURES else None, allow_pickle=False)
        return cls(path, Source(**manifest["source"]), arrays[IDS], arrays[FEATURES],
                   {int(id): reason for id, reason in manifest["skipped"].items()})

    def check(self, trained: TrainedNetwork) -> None:
        """Raise ValueError unless queries that this network makes can be compared with these features."""
        now = Source.of(trained, self.source.split)
        for key, what in (("checkpoint_sha256", "checkpoint"), ("split_sha256", "index")):
            if getattr(now, key) != getattr(self.source, key):
                raise ValueError(f"{what} (={getattr(now, what)}) is not the one that the features of {self.path} were made with "
                                 f"(={getattr(self.source, what)}, SHA-256 {getattr(self.source, key)[:16]}…, now "
                                 f"{getattr(now, key)[:16]}…); give that one, or build the features again")

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids (B,), rows (B, D)) of all, in memory a block at a time."""
        for first in range(0, len(self.ids), BLOCK):
            yield self.ids[first:first + BLOCK], np.array(self.rows[first:first + BLOCK])


def build(trained: TrainedNetwork, split: str, out: Path, *, force: bool = False,
          progress: Callable[[int, int], None] = lambda done, total: None) -> Features:
    """Write the features of every readable image of a split. What is unreadable is left out and listed.

    A reader sees nothing until all is there. `progress` is told of images done, and in all. Raises ValueError when `out` holds
    something already (unless `force`, and it is features), or the split has no images.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"features folder (={out}) is a file; give the name of a new folder")
    if (out / MANIFEST).exists() and not force:
        raise ValueError(f"features folder (={out}) holds features already; give another name, or --force to replace them")
    if out.is_dir() and (others := sorted({path.name for path in out.iterdir() if not path.name.startswith(".")}
                                          - {MANIFEST, FEATURES, IDS})):
        raise ValueError(f"features folder (={out}) holds {others[0]}, which is no part of features; give a new folder")
    source = Source.of(trained, split)
    trained.index.check_archives(split)
    with trained.loader(trained.index, split, skip_corrupt=True) as loader:
        out.mkdir(parents=True, exist_ok=True)
        remove_dead(out)
        (out / MANIFEST).unlink(missing_ok=True)
        total, ids = len(trained.index.ids(split)), []
        with atomic_write(out / FEATURES) as file:
            done = 0
            for some, rows in trained.features(loader):
                if done == 0:
                    start = _header(file, total, rows.shape[1])
                file.write(np.ascontiguousarray(rows).tobytes())
                ids.append(some)
                done += len(some)
                progress(done, total)
            if done == 0:
                raise ValueError(f"split (={split}) of {trained.index.path} has no image that can be read; run build_index.py "
                                 "verify")
            file.seek(0)
            if _header(file, done, rows.shape[1]) != start:
                raise RuntimeError(f"features file (={out / FEATURES}) would have a header of another length; report this")
        skipped = loader.skipped
    with atomic_write(out / IDS) as file:
        np.save(file, np.concatenate(ids), allow_pickle=False)
    manifest: dict[str, Any] = {"format": FORMAT, "source": asdict(source), "images": done,
                                "skipped": {str(id): reason for id, reason in sorted(skipped.items())},
                                "files": {name: {"size": (out / name).stat().st_size, "sha256": _sha256(out / name)}
                                          for name in (FEATURES, IDS)}}
    with atomic_write(out / MANIFEST) as file:
        file.write(json.dumps({**manifest, "sha256": _content_sha256(manifest)}, indent=1).encode())
    return Features.load(out)


def _header(file: BinaryIO, rows: int, width: int) -> int:
    """Write the beginning of a .npy file; returns where the values begin, the same for any number of rows."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, width)})
    return file.tell()


def _read_manifest(path: Path) -> dict[str, Any]:
    """The checked manifest of a folder. Raises ValueError."""
    file = path / MANIFEST
    if not file.is_file():
        what = "does not exist" if not path.exists() else f"has no {MANIFEST}: it was never finished, or is something else"
        raise ValueError(f"features folder (={path}) {what}; make one with tools/show/similar.py build")
    try:
        manifest = json.loads(file.read_bytes())
        written, own = manifest["format"], manifest.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"features manifest (={file}) is not one; build the features again") from None
    if written != FORMAT:
        raise ValueError(f"features format (={written} in {file}) must be {FORMAT}, the one of this program; build the features "
                         "again")
    if _content_sha256(manifest) != own:
        raise ValueError(f"features manifest (={file}) does not match its SHA-256, so it was altered; build the features again")
    return dict(manifest)


def _content_sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
