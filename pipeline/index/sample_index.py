"""`SampleIndex`: the data set as one row per image, read in place from archives that are never extracted.

An index is a folder: `index.json`, its header, and `samples.npy` (rows of `SAMPLE`, memory-mapped, no pickle); `names.bin` too
when a folder tree of images was indexed (NUL-terminated relative paths). Names of tar members are not stored: they are read
back from the tar headers. The row number is the sample's **id**; it never changes, excluded rows stay. Rows are sorted by split
(train, val, test), in train by class, then by position in the archive; in val and test by name (ILSVRC: by base name), or as in
train where they were held out of it (`pipeline.index.subset`).

The header holds counts, classes, archives, oddities and SHA-256 hashes: of each array file (`verify` checks those), and of its
own content without the archives' paths (`read_header` checks that: it is the identity of the data set, `SampleIndex.sha256`).
`packed`, in an index of packed images: how they were made (`PackOptions`), source (split → `split_sha256` of the original's) and
measured (split → images, mean bytes, psnr_mean and psnr_min in dB). `derived`: for each subset that led here, first one first,
SHA-256, rows and classes of the index it was taken of, the options, and the classes that had too few images.
"""
import hashlib
import json
import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.files import json_sha256
from pipeline.index.tar import BLOCK, ByteWindow, fingerprint, read_member

VERSION = 1
MAGIC = "alexnet-sample-index"
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


def label_of(classes: Sequence[ClassInfo]) -> dict[str, int]:
    """wnid → label."""
    return {entry.wnid: label for label, entry in enumerate(classes)}


def content_sha256(header: dict[str, Any]) -> str:
    """SHA-256 (hex) of a header without its archives' paths: equal wherever the archives lie."""
    content = {key: value for key, value in header.items() if key != "sha256"}
    if isinstance(header.get("archives"), list):
        content["archives"] = [{key: value for key, value in archive.items() if key != "path"}
                               for archive in header["archives"] if isinstance(archive, dict)]
    return json_sha256(content)


def read_header(path: Path) -> dict[str, Any]:
    """The checked header of the index folder `path`. Raises ValueError when it is no index, of another version, or altered."""
    file = path / "index.json"
    if not file.is_file():
        problem = "has no index.json" if path.is_dir() else "does not exist" if not path.exists() else "is not a folder"
        raise ValueError(f"index (={path}) {problem}; make one with tools/build_index.py build")
    try:
        header = json.loads(file.read_bytes())
    except ValueError:
        raise ValueError(f"index header (={file}) is not JSON; build the index again") from None
    if not isinstance(header, dict) or header.get("magic") != MAGIC:
        raise ValueError(f"index header (={file}) is not that of a sample index; build one with tools/build_index.py")
    if header.get("version") != VERSION:
        raise ValueError(f"index version (={header.get('version')}) of {file} is not {VERSION}, the one this code "
                         f"reads; build the index again")
    if content_sha256(header) != header.get("sha256"):
        raise ValueError(f"index header (={file}) does not match its SHA-256, so it was altered; build it again")
    return header


class SampleIndex:
    """A loaded index. `samples` is a read-only memory map of SAMPLE rows; see the module for the order of rows."""

    def __init__(self, path: Path, header: dict[str, Any], samples: np.ndarray, folders: Sequence[Path]) -> None:
        self.path, self.header, self.samples, self.sha256 = path, header, samples, str(header["sha256"])
        self.classes = [ClassInfo(**entry) for entry in header["classes"]]
        self.archives = [Archive(**{**entry, "path": Path(entry["path"])}) for entry in header["archives"]]
        self.split_names: list[str] = [split["name"] for split in header["splits"]]
        self.packed: dict[str, Any] | None = header.get("packed")  # see the module; None when these are the originals
        self.derived: list[dict[str, Any]] = header.get("derived", [])
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
        folders = [Path(folder) for folder in ([archives] if isinstance(archives, (str, Path)) else archives or [])]
        for folder in folders:
            if not folder.is_dir():
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
        return cls(path, header, samples, folders)

    def __len__(self) -> int:
        return len(self.samples)

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
            path, archive = self.find_archive(position), self.archives[position]
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
        lies_at = Path.is_dir if archive.is_folder else Path.is_file  # whatever its content
        if self.packed is not None and (beside := self.path / archive.path.name).is_file():  # they move together
            return beside
        if lies_at(archive.path):
            return archive.path
        others = []
        for folder in self._folders:
            for first in range(1, len(archive.path.parts)):  # longest tail of the path first
                path = folder.joinpath(*archive.path.parts[first:])
                if lies_at(path):
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
            try:
                data = self.file_path(id).read_bytes()
            except OSError as error:
                raise ValueError(f"file (={error.filename}) of sample {id} cannot be read ({error.strerror}); restore it, or "
                                 f"leave it out with verify --full --exclude") from None
        else:
            with self._lock:
                data = self._window(position).at(int(row["offset"]), size)
        if len(data) != size:
            raise ValueError(f"sample (={id}) of {self.archives[position].path} has {len(data)} bytes, the index says "
                             f"{size}; run verify")
        return data

    def _window(self, position: int) -> ByteWindow:
        if position not in self._open:
            self._open[position] = ByteWindow(self.archive_path(position), window=4096)
        return self._open[position]

    def _folder_name(self, offset: int) -> str:
        if self._names is None:
            with open(self.path / self.header["files"]["names"]["file"], "rb") as file:
                self._names = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return os.fsdecode(self._names[offset:self._names.find(b"\0", offset)])
