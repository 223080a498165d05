"""Features of a split on disk: activations of the last hidden layer for every image, to be searched for neighbours (figure 4).

A folder, written whole or not at all, holds
  features.npy    (N, D) float32, memory-mapped. Rounded to float16, half as large, one query in 500 gets another sixth neighbour
                  among 50,000 images (and one in 150 another order); not worth a second format
  ids.npy         (N,) int64 sample ids of the index, ascending
  manifest.json   which checkpoint and images they are of, sizes and SHA-256 of both files, and its own
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Callable, Iterator

import numpy as np

from pipeline.arrays import read_array
from pipeline.files import atomic_folder, difference, file_entries, read_manifest, remove_dead, with_own_hash, write_json
from pipeline.schema import Count, read_as
from pipeline.stats import IdText
from train.checkpoint.resolve import TrainedNetwork

FORMAT = 1
MANIFEST, FEATURES, IDS = "manifest.json", "features.npy", "ids.npy"
BLOCK = 4096  # rows searched at once
Progress = Callable[[int, int], None]  # images done, images in all


@dataclass(frozen=True)
class Source:
    """What features are of."""

    checkpoint: str
    checkpoint_sha256: str  # of its manifest
    layer: str  # whose activations: fc7 in the paper
    index: str
    index_sha256: str
    split: str
    split_sha256: str  # of the images

    @classmethod
    def of(cls, trained: TrainedNetwork, split: str) -> "Source":
        index = trained.index
        return cls(str(trained.source.path.absolute()), trained.source.sha256, trained.layer, str(index.path), index.sha256,
                   split, index.split_sha256(split))


@dataclass(frozen=True)
class Features:
    """A folder of features whose files are the ones that were written."""

    path: Path
    source: Source
    ids: np.ndarray  # (N,) int64
    rows: np.ndarray  # (N, D) float32, a read-only memory map
    skipped: dict[int, str]  # id → why an image could not be read; it has no row

    @classmethod
    def load(cls, path: Path) -> "Features":
        """Compare a folder with its manifest and open it. Raises ValueError naming the file that is not as it was written."""
        file = path / MANIFEST
        if not file.is_file():
            what = "does not exist" if not path.exists() else f"has no {MANIFEST}: it was never finished, or is something else"
            raise ValueError(f"features folder (={path}) {what}; make one with `python -m tools.show similar build`")
        try:
            manifest = read_manifest(file, own_hash=True)
        except ValueError as error:
            raise ValueError(f"features manifest (={file}) {error}; build the features again") from None
        if manifest.get("format") != FORMAT:
            raise ValueError(f"features format (={manifest.get('format')} in {file}) must be {FORMAT}, the one of this program; "
                             "build the features again")
        try:
            source = read_as(Source, manifest.get("source"), "source")
            skipped = read_as(dict[IdText, str], manifest.get("skipped"), "skipped")
            images = read_as(Count, manifest.get("images"), "images")
        except ValueError as error:
            raise ValueError(f"features manifest (={file}) is not as it is written ({error}); build the features again") from None
        arrays = {}
        for name, dtype, shape in ((FEATURES, np.float32, (images, -1)), (IDS, np.int64, (images,))):
            entry = (manifest.get("files") or {}).get(name)
            problem = difference(path / name, entry) if entry else "is not listed"
            try:
                arrays[name] = np.empty(0) if problem else read_array(path / name, dtype, shape)
            except ValueError as error:
                problem = str(error)
            if problem:
                raise ValueError(f"features file (={path / name}) {problem}; build the features again")
        return cls(path, source, np.array(arrays[IDS]), arrays[FEATURES], {int(id): reason for id, reason in skipped.items()})

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


def build(trained: TrainedNetwork, split: str, out: Path, progress: Progress = lambda done, total: None) -> Features:
    """Write the features of every readable image of a split; the others are listed. Raises ValueError when `out` exists, or no
    image can be read."""
    if out.exists():
        raise ValueError(f"features folder (={out}) exists already; give the name of a new folder")
    source = Source.of(trained, split)
    trained.index.check_archives(split)
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_dead(out.parent)
    with trained.loader(trained.index, split, skip_corrupt=True) as loader, atomic_folder(out) as folder:
        total, ids, done = len(trained.index.ids(split)), [], 0
        with open(folder / FEATURES, "xb") as file:
            for batch_ids, rows in trained.features(loader):
                if done == 0:
                    _write_header(file, total, rows.shape[1])
                file.write(np.ascontiguousarray(rows).tobytes())
                ids.append(batch_ids)
                done += len(batch_ids)
                progress(done, total)
            if done == 0:
                raise ValueError(f"split (={split}) of {trained.index.path} has no image that can be read; run build_index.py "
                                 "verify")
            file.seek(0)
            _write_header(file, done, rows.shape[1])  # of the same length
        np.save(folder / IDS, np.concatenate(ids), allow_pickle=False)
        manifest = {"format": FORMAT, "source": asdict(source), "images": done,
                    "skipped": {str(id): reason for id, reason in sorted(loader.skipped.items())},
                    "files": file_entries(folder, (FEATURES, IDS))}
        write_json(folder / MANIFEST, with_own_hash(manifest), newline=False)
    return Features.load(out)


def _write_header(file: BinaryIO, rows: int, width: int) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, width)})
