"""`SampleIndex`: the data set as one row per image, read in place from archives that are never extracted.

An index is a folder: `index.json`, its header, and `samples.npy` (rows of `SAMPLE`, memory-mapped, no pickle); `names.bin` too
when a folder tree of images was indexed (NUL-terminated relative paths). Names of tar members are not stored: they are read
back from the tar headers. The row number is the sample's **id**; it never changes, excluded rows stay. Rows are sorted by split
(train, val, test), in train by class, then by position in the archive; in val and test by name (ILSVRC: by base name), or as in
train where they were held out of it (`pipeline.index.subset`). The header: `pipeline.index.header`.
"""
import hashlib
import json
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.arrays import read_array
from pipeline.files import difference, recalled, remember, stamp
from pipeline.index.header import Header, read_header
from pipeline.index.tar import BLOCK, ByteWindow, fingerprint, read_member

VERIFIED = "verified.json"  # in the folder of a large index: see `load`
ONCE_BYTES = 16 << 20  # of its arrays; smaller ones are compared with their SHA-256 at every load
_MAPPED_BYTES = 256 << 20  # of an array; smaller ones are read: what is mapped and then cut off ends the process, by a signal
_OPEN = 64  # archives that stay open
_CHECKED = 1 << 16  # rows that are checked together: their 2.6 MB stay in the cache
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


class DamagedBytes(ValueError):
    """The bytes of a sample were read, and are not those that were indexed."""


class SampleIndex:
    """A loaded index. `samples` are SAMPLE rows, read-only; see the module for their order."""

    def __init__(self, path: Path, header: dict[str, Any], about: Header, samples: np.ndarray, folders: Sequence[Path]) -> None:
        self.path, self.header, self.samples, self.sha256 = path, header, samples, str(header["sha256"])
        self.classes, self.archives, self.files = about.classes, about.archives, about.files
        self.split_names = [split.name for split in about.splits]
        self.packed: dict[str, Any] | None = header.get("packed")  # header.Packed; None: these are the originals
        self.derived: list[dict[str, Any]] = header.get("derived", [])  # header.Derivation
        self._splits = about.splits
        self._folders = list(folders)
        self._open: dict[int, ByteWindow] = {}
        self._split_hashes: dict[str, str] = {}
        self._archive_paths: dict[int, Path] = {}
        self._names: mmap.mmap | bytes | None = None
        self._lock, self._pid = threading.Lock(), os.getpid()  # a window serves one thread at a time

    @classmethod
    def load(cls, path: str | Path, archives: str | Path | Sequence[str | Path] | None = None) -> "SampleIndex":
        """Load the index at `path`, arrays of 256 MB and more as memory maps. `archives`: folder(s) to find archives in when the
        recorded path is gone, by the end of that path (train/000.tar before 000.tar). Raises ValueError when it is no index, of
        another version, cut or altered.

        The arrays are compared with their SHA-256: below ONCE_BYTES at every load, else when their inode, size or times are not
        those that verified.json beside them has kept since the last time (it is not kept on a disk that cannot be written)."""
        path = Path(path).absolute()
        header, about = read_header(path)
        folders = [Path(folder) for folder in ([archives] if isinstance(archives, (str, Path)) else archives or [])]
        for folder in folders:
            if not folder.is_dir():
                raise ValueError(f"archives (={folder}) is not a folder; give the folder that holds the tar files")
        arrays = list(filter(None, (about.files.samples, about.files.names)))
        stamps = {array.file: stamp(path / array.file, array.sha256) for array in arrays}
        is_new = sum(array.size for array in arrays) < ONCE_BYTES or stamps != recalled(path / VERIFIED)
        for array in arrays:
            if is_new and (problem := difference(path / array.file, vars(array))):
                raise ValueError(f"array (={path / array.file}) of the index {problem}; build the index again")
        samples = _read(path / about.files.samples.file, about)
        if is_new:
            _check_rows(samples, about, path / about.files.samples.file)
            if sum(array.size for array in arrays) >= ONCE_BYTES:
                remember(path / VERIFIED, stamps)
        return cls(path, header, about, samples, folders)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def name_bytes(self) -> bytes | None:
        """names.bin, or None when no archive is a folder."""
        return (self.path / self.files.names.file).read_bytes() if self.files.names else None

    def __reduce__(self) -> tuple[Any, ...]:  # to another process go the paths, not the rows
        return SampleIndex.load, (self.path, self._folders)

    def split_rows(self, split: str) -> slice:
        """The rows of a split, excluded ones included. Raises ValueError naming the splits there are."""
        if split not in self.split_names:
            raise ValueError(f"split (={split}) is not in the index {self.path}; it has {', '.join(self.split_names)}")
        entry = self._splits[self.split_names.index(split)]
        return slice(entry.first, entry.first + entry.count)

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
        with self._lock_here():
            name = read_member(self._window(position), header).name
        return f"{self.classes[row['label']].wnid}/{name}" if self.archives[position].nested else name

    def safe_name(self, id: int) -> str:
        """The sample's name, or "?" where its archive can no longer tell."""
        try:
            return self.name(id)
        except (ValueError, OSError):
            return "?"

    def location(self, id: int) -> str:
        """Where a sample lies: the path of its file, or of its archive followed by its name in it."""
        return str(self.archive_path(int(self.row(id)["archive"])) / self.name(id))

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
        kind, is_other = "folder" if archive.is_folder else "file", os.path.lexists(archive.path)
        raise ValueError(f"archive (={archive.path}) {f'is no {kind} any more' if is_other else 'is not there'}"
                         f"{''.join(f', nor in {folder}' for folder in self._folders)}"
                         f"{''.join(f' ({path} has another size or content)' for path in others)}; "
                         "name the folder that holds it with --archives (in training: --machine.archives; in Python: "
                         "SampleIndex.load(INDEX, archives=FOLDER)), or mount its disk")

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
        """The bytes of one image, by a plain read. Raises DamagedBytes when they are not as many as were indexed; OSError and
        other ValueErrors when they cannot be read now, which says nothing about them."""
        row = self.row(id)
        position, size = int(row["archive"]), int(row["size"])
        if self.archives[position].is_folder:
            data = self.file_path(id).read_bytes()
            if len(data) != size:
                raise DamagedBytes(f"file (={self.file_path(id)}) of sample {id} has {len(data)} bytes, the index says {size}; "
                                   "run verify")
            return data
        with self._lock_here():
            data = self._window(position).at(int(row["offset"]), size)
        if len(data) != size:
            raise ValueError(f"archive (={self.archive_path(position)}) was cut while it was read, within sample {id}; restore "
                             "it")
        return data

    def _lock_here(self) -> threading.Lock:
        """The lock of the open archives. In a forked process both are made anew: a thread it does not have may hold the lock."""
        if self._pid != os.getpid():
            self._pid, self._lock, self._open = os.getpid(), threading.Lock(), {}
        return self._lock

    def _window(self, position: int) -> ByteWindow:
        """The archive, opened; the lock is held. Of many shards the last ones stay open."""
        window = self._open.pop(position, None) or ByteWindow(self.archive_path(position), window=4096)
        if len(self._open) >= _OPEN:
            self._open.pop(next(iter(self._open))).close()
        self._open[position] = window
        return window

    def _folder_name(self, offset: int) -> str:
        if self._names is None:
            assert self.files.names is not None  # see _check_rows
            with open(self.path / self.files.names.file, "rb") as file:
                self._names = file.read() if self.files.names.size < _MAPPED_BYTES else \
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return os.fsdecode(self._names[offset:self._names.find(b"\0", offset)])


def _read(file: Path, about: Header) -> np.ndarray:
    """samples.npy, read-only: a memory map where it is large. Raises ValueError when it is not that of the header."""
    try:
        mapped = read_array(file, SAMPLE, (about.samples,))
    except ValueError as error:
        raise ValueError(f"samples (={file}) cannot be read ({error}); build the index again") from None
    if mapped.nbytes >= _MAPPED_BYTES:
        return mapped
    samples: np.ndarray = np.array(mapped, subok=True)  # of the same class
    samples.setflags(write=False)
    return samples


def _check_rows(samples: np.ndarray, about: Header, file: Path) -> None:
    """Raise ValueError when a row points at a class, archive, split, name … that is not there."""
    stops = {"archive": len(about.archives), "label": len(about.classes), "format": len(FORMATS), "reason": len(REASONS)}
    is_folder = np.array([archive.is_folder for archive in about.archives], bool)
    name_bytes = about.files.names.size if about.files.names else 0
    sizes = np.array([archive.size for archive in about.archives], np.uint64)
    for code, split in enumerate(about.splits):
        for first in range(split.first, split.first + split.count, _CHECKED):
            rows = samples[first:min(first + _CHECKED, split.first + split.count)]
            wrong = [name for name, stop in stops.items() if rows[name].max() >= stop or int(rows[name].min()) < -1]
            if (rows["split"] != code).any() or int((rows["excluded"] != 0).sum()) > split.excluded:
                wrong.append("split")
            if not wrong:
                in_folder, ends = is_folder[rows["archive"]], sizes[rows["archive"]]
                if (rows["offset"] >= np.where(in_folder, name_bytes, ends + 1)).any():
                    wrong.append("name or offset")
                elif (~in_folder & ((rows["offset"] < BLOCK * rows["header_blocks"].astype(np.uint64))
                                    | (rows["size"] > ends - rows["offset"]))).any():
                    wrong.append("range of bytes")
            if wrong:
                raise ValueError(f"samples (={file}) hold a {wrong[0]} from row {first} on that is not in the index; build the "
                                 "index again")
