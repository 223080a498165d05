"""`SampleIndex`: the data set as one row per image, read in place from archives that are never extracted.

An index is a folder: `index.json` (`pipeline.index.header`) and `samples.npy` (rows of `SAMPLE`, memory-mapped on load, no
pickle); `names.bin` too when a folder tree of images was indexed (NUL-terminated relative paths). Names of tar members are not
stored: they are read back from the tar headers. The row number is the sample's **id**; it never changes, excluded rows stay.
Rows are sorted by split (train, val, test), in train by class, then by position in the archive; in val and test by name (ILSVRC:
by base name), or as in train where they were held out of it (`pipeline.index.subset`).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from pipeline.index.header import read_header
from pipeline.index.tar import BLOCK, ByteWindow, fingerprint, read_member

SPLITS = ("train", "val", "test")
FORMATS = ("unknown", "jpeg", "png", "gif", "webp", "bmp", "gzip")
# Reasons of odd images. Kept: grey, cmyk, misnamed (a PNG called .JPEG), patched (replaced by 2010's patch_images).
REASONS = ("", "grey", "cmyk", "misnamed", "patched", "gzip", "empty", "too_large", "not_an_image",
           "unreadable_header", "unsupported", "unlabelled", "damaged")

SAMPLE = np.dtype([
    ("offset", "<u8"),  # of the image's first byte in the archive; in a folder archive: of its name in names.bin
    ("size", "<u4"),  # bytes
    ("crc32", "<u4"),  # of those bytes; 0 when the header says crc32: false
    ("width", "<u4"), ("height", "<u4"),  # pixels as stored (EXIF orientation not applied); 0 when unreadable
    ("label", "<i4"),  # position in classes; -1 unknown
    ("archive", "<u4"),  # position in archives
    ("header_blocks", "<u2"),  # 512-byte blocks from the member's first header to its data; 0 in a folder
    ("split", "u1"),  # position in splits
    ("format", "u1"), ("reason", "u1"),  # positions in FORMATS, REASONS
    ("channels", "u1"),  # as stored: 1 grey, 3 colour, 4 CMYK or colour with alpha
    ("excluded", "u1"),  # 1: in no batch
    ("spare", "u1"),  # 0; makes the row 40 bytes, so that offsets are aligned
])


@dataclass(frozen=True)
class ClassInfo:
    """One class: its WordNet id (or folder name) and its words (empty without a devkit)."""

    wnid: str
    words: str


@dataclass(frozen=True)
class Archive:
    """A tar file or a folder of images, as it was when indexed. `size` in bytes (a folder: of all its images)."""

    path: Path
    size: int
    fingerprint: str
    kind: str  # "tar" | "folder"
    nested: bool = False  # a tar of <wnid>.tar: a sample's name is <wnid>/<name in the inner tar>

    @property
    def is_folder(self) -> bool:
        return self.kind == "folder"

    def fits(self, path: Path) -> bool:
        """Whether a folder, or a file, of any content lies at `path`."""
        return path.is_dir() if self.is_folder else path.is_file()


def label_of(classes: Sequence[ClassInfo]) -> dict[str, int]:
    """wnid → label."""
    return {entry.wnid: label for label, entry in enumerate(classes)}


class SampleIndex:
    """A loaded index. `samples` is a read-only memory map of SAMPLE rows; see the module for the order of rows."""

    def __init__(self, path: Path, header: dict[str, Any], samples: np.ndarray, folders: Sequence[Path]) -> None:
        self.path, self.header, self.samples, self.sha256 = path, header, samples, str(header["sha256"])
        self.classes = [ClassInfo(**entry) for entry in header["classes"]]
        self.archives = [Archive(Path(entry["path"]), entry["size"], entry["fingerprint"], entry["kind"],
                                 entry["nested"]) for entry in header["archives"]]
        self.split_names: list[str] = [split["name"] for split in header["splits"]]
        self._folders = list(folders)
        self._open: dict[int, ByteWindow] = {}
        self._split_hashes: dict[str, str] = {}
        self._archive_paths: dict[int, Path] = {}
        self._names: mmap.mmap | None = None
        self._lock = threading.Lock()  # a window serves one thread at a time

    @classmethod
    def load(cls, path: str | Path, archives: str | Path | Sequence[str | Path] | None = None) -> "SampleIndex":
        """Memory-map the index at `path`. `archives`: folder(s) to find archives in when the recorded path is gone, by the end
        of that path (train/000.tar before 000.tar). Raises ValueError when it is no index, of another version, cut or altered."""
        path = Path(path).absolute()
        header = read_header(path)
        folders = [archives] if isinstance(archives, (str, Path)) else list(archives or [])
        for folder in folders:
            if not Path(folder).is_dir():
                raise ValueError(f"archives (={folder}) is not a folder; give the folder that holds the tar files")
        for name, entry in header["files"].items():
            file = path / entry["file"]
            size = file.stat().st_size if file.is_file() else None
            if size != entry["size"]:
                raise ValueError(f"{name} (={file}) {'is missing' if size is None else f'has {size} bytes'} but the "
                                 f"header says {entry['size']} bytes; build the index again")
        file = path / header["files"]["samples"]["file"]
        try:
            samples = np.load(file, mmap_mode="r" if header["samples"] else None, allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"samples (={file}) cannot be read ({error}); build the index again") from None
        if samples.dtype != SAMPLE or samples.shape != (header["samples"],):
            raise ValueError(f"samples (={file}) holds {samples.shape} of {samples.dtype}, not the "
                             f"{header['samples']} samples of the header; build the index again")
        return cls(path, header, samples, [Path(folder) for folder in folders])

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def packed(self) -> dict[str, Any] | None:
        """How tools/pack_shards.py made these images (`pipeline.index.header`); None when they are the originals."""
        return self.header.get("packed")

    @property
    def derived(self) -> list[dict[str, Any]]:
        """The subsets that led from an index of archives to this one (`pipeline.index.header`)."""
        return self.header.get("derived", [])

    @property
    def name_bytes(self) -> bytes | None:
        """names.bin, or None when no archive is a folder."""
        names = self.header["files"].get("names")
        return (self.path / names["file"]).read_bytes() if names else None

    def __reduce__(self) -> tuple[Any, ...]:  # to another process go the paths, not the rows
        return SampleIndex.load, (self.path, self._folders)

    def split_rows(self, split: str) -> slice:
        """The rows of a split, excluded ones included. Raises ValueError naming the splits there are."""
        if split not in self.split_names:
            raise ValueError(f"split (={split}) is not in the index {self.path}; it has {', '.join(self.split_names)}")
        entry = self.header["splits"][self.split_names.index(split)]
        return slice(entry["first"], entry["first"] + entry["count"])

    def ids(self, split: str) -> np.ndarray:
        """Sample ids of a split that are not excluded: (N,) int64, ascending."""
        rows = self.split_rows(split)
        return np.flatnonzero(self.samples["excluded"][rows] == 0).astype(np.int64) + rows.start

    def split_sha256(self, split: str) -> str:
        """SHA-256 (hex) of what a split's images are: ids and rows of those not excluded, classes, archives' fingerprints.
        Stats and runs are bound to it, so that leaving out a validation image invalidates neither."""
        if split not in self._split_hashes:
            ids = self.ids(split)
            digest = hashlib.sha256(ids.tobytes())
            digest.update(np.ascontiguousarray(self.samples[ids]).tobytes())
            digest.update(json.dumps([self.header["classes"], [a.fingerprint for a in self.archives]]).encode())
            self._split_hashes[split] = digest.hexdigest()
        return self._split_hashes[split]

    def class_rows(self, wnid: str) -> np.ndarray:
        """Ids of every row of a class, excluded ones included: (N,) int64. Raises ValueError when unknown."""
        label = label_of(self.classes).get(wnid)
        if label is None:
            raise ValueError(f"class (={wnid}) is not in the index {self.path}; "
                             f"its {len(self.classes)} classes are listed by info --json")
        return np.flatnonzero(self.samples["label"] == label).astype(np.int64)

    def row(self, id: int) -> np.void:
        """The row of a sample. Raises ValueError when there is no such id."""
        if not 0 <= id < len(self.samples):
            raise ValueError(f"id (={id}) is not in the index {self.path}; ids go from 0 to {len(self.samples) - 1}")
        row: np.void = self.samples[id]
        return row

    def name(self, id: int) -> str:
        """Name of a sample, read back from its archive: `n01440764/n01440764_10026.JPEG`, or a path in a folder."""
        row = self.row(id)
        position = int(row["archive"])
        if self.archives[position].is_folder:
            return self._folder_name(int(row["offset"]))
        header = int(row["offset"]) - BLOCK * int(row["header_blocks"])
        with self._lock:
            name = read_member(self._window(position), header).name
        return f"{self.classes[row['label']].wnid}/{name}" if self.archives[position].nested else name

    def safe_name(self, id: int) -> str:
        """The sample's name, or "?" where its archive can no longer tell."""
        try:
            return self.name(id)
        except (ValueError, OSError):
            return "?"

    def file_path(self, id: int) -> Path:
        """The file of a sample in a folder archive."""
        return self.archive_path(int(self.row(id)["archive"])) / self._folder_name(int(self.row(id)["offset"]))

    def archive_path(self, position: int) -> Path:
        """Where archive `position` lies now. Raises ValueError when it is gone, unreadable or of another size."""
        if position not in self._archive_paths:
            path = self.find_archive(position)
            archive = self.archives[position]
            if not os.access(path, os.R_OK):
                raise ValueError(f"archive (={path}) cannot be read; give yourself read permission")
            if not archive.is_folder and path.stat().st_size != archive.size:
                raise ValueError(f"archive (={path}) has {path.stat().st_size} bytes, but had {archive.size} when it "
                                 f"was indexed; restore it, or build the index again")
            self._archive_paths[position] = path
        return self._archive_paths[position]

    def check_archives(self, split: str) -> None:
        """Look for every archive that a split uses, before long work. Raises ValueError when one is not as it was."""
        for position in np.unique(self.samples["archive"][self.ids(split)]).tolist():
            self.archive_path(position)

    def find_archive(self, position: int) -> Path:
        """Like `archive_path`, without the check of its size where it was indexed. In the folders given to `load` lie other
        data sets too, with files of the same name: there it must be the same archive."""
        archive = self.archives[position]
        if self.packed is not None and (beside := self.path / archive.path.name).is_file():  # they move together
            return beside
        if archive.fits(archive.path):
            return archive.path
        others = []
        for folder in self._folders:
            for first in range(1, len(archive.path.parts)):  # longest tail of the path first
                path = folder.joinpath(*archive.path.parts[first:])
                if archive.fits(path):
                    if self._is_archive(position, path):
                        return path
                    others.append(path)
        raise ValueError(f"archive (={archive.path}) is not there"
                         f"{''.join(f', nor in {folder}' for folder in self._folders)}"
                         f"{''.join(f' ({path} has another size or content)' for path in others)}; "
                         f"name the folder that holds it with --archives")

    def _is_archive(self, position: int, path: Path) -> bool:
        """Whether `path` is the archive that was indexed: a tar by size and fingerprint, a folder by two of its files."""
        archive = self.archives[position]
        try:
            if not archive.is_folder:
                return path.stat().st_size == archive.size and fingerprint(path) == archive.fingerprint
            rows = self.samples[self.samples["archive"] == position][[0, -1]]
            return all((path / self._folder_name(int(row["offset"]))).stat().st_size == row["size"] for row in rows)
        except OSError:
            return False

    def read(self, id: int) -> bytes:
        """The bytes of one image, by a plain read. Raises ValueError when they are not there."""
        row = self.row(id)
        position, size = int(row["archive"]), int(row["size"])
        if self.archives[position].is_folder:
            path = self.file_path(id)
            try:
                data = path.read_bytes()
            except OSError as error:
                raise ValueError(f"file (={path}) of sample {id} cannot be read ({error.strerror}); restore it, or leave it "
                                 f"out with verify --full --exclude") from None
        else:
            with self._lock:
                data = self._window(position).at(int(row["offset"]), size)
        if len(data) != size:
            raise ValueError(f"sample (={id}) of {self.archives[position].path} has {len(data)} bytes, the index says "
                             f"{size}; run verify")
        return data

    def summary(self) -> dict[str, Any]:
        """What the index holds, as JSON values: the header with counts and bytes, without its list of files."""
        counts = np.bincount(self.samples["label"][self.ids("train")], minlength=len(self.classes)).tolist() \
            if "train" in self.split_names else []
        formats = np.bincount(self.samples["format"], minlength=len(FORMATS)).tolist()
        return {"path": str(self.path), **{key: self.header[key] for key in ("version", "preset", "sha256", "crc32")},
                "derived": self.derived, "samples": len(self), "bytes": int(self.samples["size"].sum(dtype=np.int64)),
                "splits": self.header["splits"], "formats": {name: count for name, count in zip(FORMATS, formats) if count},
                "reasons": self.header["reasons"], "archives": self.header["archives"], "classes": self.header["classes"],
                # a class that training never sees: an empty inner tar, or labels that begin at 1
                "empty_classes": [entry.wnid for entry, count in zip(self.classes, counts) if not count],
                "oddities": self.header["oddities"]}

    def _window(self, position: int) -> ByteWindow:
        if position not in self._open:
            self._open[position] = ByteWindow(self.archive_path(position), window=4096)
        return self._open[position]

    def _folder_name(self, offset: int) -> str:
        if self._names is None:
            with open(self.path / self.header["files"]["names"]["file"], "rb") as file:
                self._names = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return os.fsdecode(self._names[offset:self._names.find(b"\0", offset)])
