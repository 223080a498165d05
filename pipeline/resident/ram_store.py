"""`RamStore`: the squares of a split in one memory-mapped file that all processes of a node share; a restart finds it filled.

The file lies on a disk of the node or in /dev/shm. Its rows are in the order of `index.ids(split)`:

    header    4096 bytes: JSON (magic, version, split and its SHA-256, S, kind, decoder, rows, row_bytes, boot_id), then
              spaces; the last byte is 1 once every row that is marked is on the disk, else 0
    marks     a little-endian uint32 a row: the low half of its 64-bit XXH3 (1 where that is 0), or 0, not filled; zeros up to a
              multiple of 4096
    rows      N × row_bytes, see `pipeline.resident.store.Layout`

It is made sparse, under a lock, and put in place whole, so of processes that start together one makes it. Any of them may fill
any row, and would write the same bytes; a row is marked after its pixels are written, so a process killed in between leaves it
to be filled again. Each process compares a row with its checksum before it first uses it, and fills it again where they
differ. Pages that were not yet on the disk when a machine stops are lost: a file without the last byte is used only while
`boot_id` is this boot's, and else filled anew. Nodes must not share a file that is being filled: each needs a folder (a lock,
held while the file is open, tells). N rows, B samples, S side of a square."""
import fcntl
import json
import logging
import mmap
import os
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from pipeline.decoding.resize import LazyRows
from pipeline.files import atomic_write, lock
from pipeline.io_errors import explain
from pipeline.resident.capacity import check_disk, check_memory
from pipeline.resident.store import Crops, Layout, Located, Rows, Store

MAGIC, VERSION = "alexnet-resident-squares", 3  # the version of the pixels too: raise it when decoding or resizing changes
_PAGE, _MARK = 4096, 4  # bytes
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_log = logging.getLogger(__name__)


class RamStore(Store):
    """The N (`count`) squares of a split in a file `path` in `folder`, mapped; `pixels` (N, row_bytes) uint8 are read only.
    `device`: where crops are wanted; `decoder`: name of what makes the squares (`DecodeSettings.decoder`), part of the file's
    name, since decoders differ by a grey level here and there; `threads` compare checksums. Raises RuntimeError when the squares
    do not fit, the folder cannot be written, another machine fills the file, or the file cannot be read any more."""

    def __init__(self, folder: Path, split: str, split_sha256: str, count: int, layout: Layout, *,
                 device: torch.device = torch.device("cpu"), decoder: str = "cpu", threads: int = 1) -> None:
        self.layout, self._device = layout, device
        self.path = Path(folder) / f"{split}-{layout.square_px}-{layout.kind}-{decoder}-{split_sha256[:16]}.squares"
        self._header = {"magic": MAGIC, "version": VERSION, "split": split, "split_sha256": split_sha256,
                        "square_px": layout.square_px, "kind": layout.kind, "decoder": decoder, "rows": count,
                        "row_bytes": layout.row_bytes}
        self._first = _PAGE + -(-count * _MARK // _PAGE) * _PAGE  # offset of row 0
        self._size = self._first + count * layout.row_bytes
        self._sealing: threading.Thread | None = None
        self._threads = threads
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with lock(self.path.with_suffix(".lock"), wait=True):
                usable = self._usable()
                if self.note:
                    _log.warning(self.note)
                check_memory(layout.kind, count, layout.row_bytes)
                check_disk(layout.kind, count, layout.row_bytes, self.path.parent,
                           self.path.stat().st_blocks * 512 if usable else 0)
                if not usable:
                    text = json.dumps({**self._header, "boot_id": _boot_id()}).encode()
                    with atomic_write(self.path) as file:
                        file.write(text + b" " * (_PAGE - 1 - len(text)) + b"\0")
                        file.truncate(self._size)
                self._file = os.open(self.path, os.O_RDWR)
                fcntl.flock(self._file, fcntl.LOCK_SH)  # for as long as it is open; see `_usable`
                weakref.finalize(self, os.close, self._file)
        except OSError as error:
            raise RuntimeError(f"resident store: {explain(error, self.path)} (machine.resident_folder)") from error
        self._unchecked = np.ones(count, bool)
        # Writable, or torch would warn of it; but only written with pwrite alone, which can say that the disk is full.
        self._map = mmap.mmap(self._file, self._size)
        whole = np.frombuffer(self._map, np.uint8)
        self.have = self.stored = whole[_PAGE:_PAGE + count * _MARK].view("<u4")
        self.pixels = whole[self._first:].reshape(count, layout.row_bytes)

    def _usable(self) -> bool:
        """Whether the file that is there can be used; if not `note` says why."""
        try:
            with open(self.path, "rb") as file:
                block, size = file.read(_PAGE), os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return False
        try:
            header: dict[str, Any] = json.loads(block[:-1])
            boot = header.pop("boot_id")
        except (ValueError, KeyError, AttributeError, TypeError):
            header, boot = {}, ""
        if header != self._header or size != self._size:
            version = header.get("version", VERSION)
            why = "does not hold these images" if version == VERSION else f"is of version {version}, not {VERSION}"
            self.note = f"resident store {self.path} {why}; it is made anew"
        elif block[-1:] != b"\1" and boot != _boot_id():
            with open(self.path, "rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise RuntimeError(f"resident store (={self.path}) is being filled by another machine; give each machine a "
                                       "machine.resident_folder of its own") from None
            self.note = f"resident store {self.path} was not complete when the machine stopped; it is filled anew"
        return not self.note

    @property
    def sealed(self) -> bool:
        return self._map[_PAGE - 1] == 1

    def put(self, rows: Rows, squares: torch.Tensor) -> None:
        """See `Store`; rows that are filled already are left alone."""
        new = np.flatnonzero(self.have[rows] == 0)
        if not len(new):
            return
        pixels = squares.cpu().numpy()
        try:
            for each in new.tolist():
                row, data = int(rows[each]), self.layout.encode(pixels[each])
                _write(self._file, data, self._offset(row))
                if self.sealed:  # the mark may reach the disk before the row
                    os.fsync(self._file)
                self._set_mark(row, _checksum(data.data))
                self._unchecked[row] = False
        except OSError as error:
            raise RuntimeError(f"resident store: {explain(error, self.path)} (machine.resident_folder)") from error

    def _offset(self, row: int) -> int:
        return self._first + row * self.layout.row_bytes

    def _set_mark(self, row: int, checksum: int) -> None:
        _write(self._file, np.array([checksum], "<u4").view(np.uint8), _PAGE + row * _MARK)

    def check(self, rows: Rows) -> Rows:
        """See `Store`. Read, not mapped: what cannot be read is an error then, and no signal."""
        rows = np.unique(rows[self._unchecked[rows] & (self.have[rows] != 0)])
        if not len(rows):
            return rows
        parts = np.array_split(rows, min(self._threads, len(rows)))
        with ThreadPoolExecutor(len(parts)) as pool:
            good = np.concatenate(list(pool.map(self._intact, parts)))
        self._unchecked[rows[good]] = False
        for row in (bad := rows[~good]).tolist():
            self._set_mark(row, 0)
        return bad

    def _intact(self, rows: Rows) -> npt.NDArray[np.bool_]:
        memory, good = bytearray(self.layout.row_bytes), np.zeros(len(rows), bool)
        try:
            for each, row in enumerate(rows.tolist()):
                size = os.preadv(self._file, [memory], self._offset(row))
                good[each] = size == len(memory) and _checksum(memory) == self.have[row]
        except OSError as error:
            raise RuntimeError(f"resident store: {explain(error, self.path)}, or remove it: it is made anew") from error
        return good

    def _check_size(self) -> None:
        """Raises RuntimeError when the file has become shorter: what is mapped beyond its end ends the process, with SIGBUS."""
        if os.fstat(self._file).st_size < self._size:
            raise RuntimeError(f"resident store (={self.path}) has become shorter than its {self._size} bytes while in use; "
                               "resume, and it is made anew")

    def seal(self) -> None:
        """Bring all rows to the disk and say so in the file, in a thread."""
        if not self.sealed and self._sealing is None:
            self._sealing = threading.Thread(target=self._flush, name="seal")
            self._sealing.start()

    def _flush(self) -> None:
        os.fsync(self._file)  # rows and marks …
        _write(self._file, np.ones(1, np.uint8), _PAGE - 1)
        os.fsync(self._file)  # … before the byte that vouches for them

    def crop(self, row: int, top: int, left: int) -> torch.Tensor:
        """RGB (3, c, c) uint8 of a filled row; a view where it can be."""
        return torch.from_numpy(self.layout.crop(self.pixels[row], top, left))

    def crops(self, wanted: Sequence[Crops]) -> Sequence[torch.Tensor]:
        self._check_size()
        rows, top, left = (column.tolist() for column in wanted[0])
        return LazyRows(len(rows), lambda each: self.crop(rows[each], top[each], left[each]))

    def located(self, wanted: Sequence[Crops]) -> Located:
        """See `Store`: packed in memory that is pinned, and used again by torch once the copy from it is done."""
        self._check_size()
        rows, top, left = wanted[0]
        memory = torch.empty(len(rows) * self.layout.packed_bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        self.layout.pack(self.layout.planes(torch.from_numpy(self.pixels)), self.layout.packed_in(memory, len(rows)),
                         *map(torch.from_numpy, wanted[0]))
        there = self.layout.packed_in(memory.to(self._device, non_blocking=True), len(rows))
        return Located(there, np.arange(len(rows)), top, left)

    def close(self) -> None:
        """Wait for `seal`. The mapping goes when its last view does."""
        if self._sealing is not None:
            self._sealing.join()
            self._sealing = None


def _boot_id() -> str:
    return _BOOT.read_text().strip()


def _checksum(row: memoryview | bytearray) -> int:
    return xxhash.xxh3_64_intdigest(row) & 0xffffffff or 1  # 0 is the mark of what is not filled


def _write(file: int, data: npt.NDArray[np.uint8], offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:].data, offset + done)
