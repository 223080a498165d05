"""The squares of a split in memory: one file, mapped by every process of a node: one copy, and a restart finds it filled.

The file lies on a disk of the node or in /dev/shm. Its rows are in the order of `index.ids(split)`:

    header    4096 bytes: JSON (magic, version, split and its SHA-256, S, kind, decoder, rows, row_bytes, boot_id), then
              spaces; the last byte is 1 once every row that is marked is on the disk, else 0
    marks     a byte a row, 1 when the row is filled; zeros up to a multiple of 4096
    rows      N × row_bytes, see `pipeline.resident.layout`

It is made sparse, under a lock, and put in place whole, so of processes that start together one makes it. Any of them may fill
any row, and would write the same bytes; a row is marked after its pixels are written, so a process killed in between leaves it to
be filled again. Pages that were not yet on the disk when a machine stops are lost: a file without the last byte is used only
while `boot_id` is this boot's, and else filled anew. Nodes must not share a file that is being filled: each needs a folder (a
lock, held while the file is open, tells).

N rows, B samples, S side of a square.
"""
import fcntl
import json
import logging
import mmap
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch

from pipeline.resident import capacity as room
from pipeline.files import atomic_write
from pipeline.resident.layout import Form

MAGIC, VERSION = "alexnet-resident-squares", 2  # the version of the pixels too: raise it when decoding or resizing changes
_PAGE = 4096
_BOOT = Path("/proc/sys/kernel/random/boot_id")
Places = npt.NDArray[np.int64]
_log = logging.getLogger(__name__)


class RamStore:
    """The squares of a split, mapped.

    Args:
        folder: where the file is, or is made.
        split, split_sha256: whose squares.
        rows: N.
        form: how a square lies in its row.
        decoder: who decodes, "cpu" or "gpu"; their pixels differ by a grey level here and there.
        gpus: bytes of all GPUs of the machine, for advice.
        make: False takes a file that is there, and makes none.

    Attributes:
        path: the file.
        pixels: (N, row_bytes) uint8, the mapping; read only.
        have: (N,) uint8, 1 where a row is filled, by whatever process; read only.
        stored: the same; see `SpreadStore`.
        note: what was found and not used, in words; empty when all is well.

    Raises:
        RuntimeError: the squares do not fit, the folder cannot be written, or another machine is filling the file; or, without
            `make`, there is none that can be used.
    """

    def __init__(self, folder: Path, split: str, split_sha256: str, rows: int, form: Form, *, decoder: str = "cpu",
                 gpus: int = 0, make: bool = True) -> None:
        self.form, self.rows, self.note = form, rows, ""
        self.path = Path(folder) / f"{split}-{form.square_px}-{form.kind}-{decoder}-{split_sha256[:16]}.squares"
        self._header = {"magic": MAGIC, "version": VERSION, "split": split, "split_sha256": split_sha256,
                        "square_px": form.square_px, "kind": form.kind, "decoder": decoder, "rows": rows,
                        "row_bytes": form.row_bytes}
        self._first = _PAGE + -(-rows // _PAGE) * _PAGE  # offset of row 0
        self._size = self._first + rows * form.row_bytes
        self._seal: threading.Thread | None = None
        if not make and not self.path.is_file():
            raise RuntimeError(f"resident store (={self.path}) is not there; train with data.tier: resident first")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock():
                usable = self._usable()
                if not usable and not make:
                    raise RuntimeError(f"{self.note.partition(';')[0]}; train with data.tier: resident first")
                if self.note:
                    _log.warning(self.note)
                room.check_ram(form.kind, rows, form.row_bytes, self.path.parent,
                               self.path.stat().st_blocks * 512 if usable else 0, promised=self._promised(), gpus=gpus)
                if not usable:
                    self._make()
                self._file = os.open(self.path, os.O_RDWR)
                fcntl.flock(self._file, fcntl.LOCK_SH)  # for as long as it is open; see `_usable`
                weakref.finalize(self, os.close, self._file)
        except OSError as error:
            raise RuntimeError(f"resident store (={self.path}) cannot be made or opened ({error.strerror}); give a folder that "
                               "can be written as machine.resident_folder") from error
        # Writable, or torch would warn of it; but only written with pwrite alone, which can say that the disk is full.
        self._map = mmap.mmap(self._file, self._size)
        whole = np.frombuffer(self._map, np.uint8)
        self.have = self.stored = whole[_PAGE:_PAGE + rows]
        self.pixels = whole[self._first:].reshape(rows, form.row_bytes)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with open(self.path.with_suffix(".lock"), "w") as file:  # stays: a lock on a file that is gone would lock nobody out
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _usable(self) -> bool:
        """Whether the file that is there can be gone on with; says why not."""
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
            self.note = f"resident store {self.path} is not one of these squares; it is made anew"
        elif block[-1:] != b"\1" and boot != _boot_id():
            with open(self.path, "rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise RuntimeError(f"resident store (={self.path}) is being filled by another machine; give each machine a "
                                       "machine.resident_folder of its own") from None
            self.note = f"resident store {self.path} was not complete when the machine stopped; it is filled anew"
        return not self.note

    def _promised(self) -> int:
        """Bytes that the other files of squares in the folder which are being filled, as far as one can see, have yet to get."""
        total = 0
        for path in self.path.parent.glob("*.squares"):
            if path == self.path:
                continue
            with suppress(OSError, ValueError, KeyError, TypeError), open(path, "rb") as file:
                block, there = file.read(_PAGE), os.fstat(file.fileno())
                if block[-1:] == b"\0" and json.loads(block[:-1])["boot_id"] == _boot_id():
                    total += max(0, there.st_size - there.st_blocks * 512)
        return total

    def _make(self) -> None:
        text = json.dumps({**self._header, "boot_id": _boot_id()}).encode()
        with atomic_write(self.path) as file:
            file.write(text + b" " * (_PAGE - 1 - len(text)) + b"\0")
            file.truncate(self._size)

    @property
    def sealed(self) -> bool:
        """Whether all that is marked is on the disk for good."""
        return self._map[_PAGE - 1] == 1

    def put(self, places: Places, squares: torch.Tensor) -> None:
        """Fill rows `places` (B,) from squares (B, S, S, 3) uint8; rows that are filled already are left alone.

        Raises:
            RuntimeError: the disk is full.
        """
        new = np.flatnonzero(self.have[places] == 0)
        if not len(new):
            return
        found = squares.cpu().numpy()
        try:
            for each in new.tolist():
                place = int(places[each])
                _write(self._file, self.form.encode(found[each]), self._first + place * self.form.row_bytes)
                if self.sealed:  # the mark may reach the disk before the row
                    os.fsync(self._file)
                _write(self._file, np.ones(1, np.uint8), _PAGE + place)
        except OSError as error:
            raise RuntimeError(f"resident store (={self.path}) cannot be written ({error.strerror}); make room, or give another "
                               "folder as machine.resident_folder") from error

    def mine(self, places: Places) -> npt.NDArray[np.bool_]:
        """Which of the rows `places` this process may fill: all."""
        return np.ones(len(places), bool)

    def agree(self, places: Places, failed: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Which of the rows `places` failed. Every process finds out for itself: here nobody waits for another."""
        return failed

    def seal(self) -> None:
        """Bring all rows to the disk and say so in the file, in a thread; for when there is nothing left to fill."""
        if not self.sealed and self._seal is None:
            self._seal = threading.Thread(target=self._flush, name="seal")
            self._seal.start()

    def _flush(self) -> None:
        os.fsync(self._file)  # rows and marks …
        _write(self._file, np.ones(1, np.uint8), _PAGE - 1)
        os.fsync(self._file)  # … before the byte that vouches for them

    def crop(self, place: int, top: int, left: int) -> torch.Tensor:
        """RGB (3, c, c) uint8 of a filled row; a view where it can be."""
        return torch.from_numpy(self.form.crop(self.pixels[place], top, left))

    def crops(self, places: Places, top: Places, left: Places) -> Sequence[torch.Tensor]:
        """The crops of a batch, each cut, and converted, only when somebody asks for it, in his thread."""
        return _Crops(self, places, top, left)

    def uploaded(self, places: Places, top: Places, left: Places, pool: ThreadPoolExecutor, threads: int,
                 device: torch.device) -> torch.Tensor:
        """The crops of a batch on a device, (B, 3, c, c) uint8: packed by threads into pinned memory, converted over there."""
        # Pinned memory is used again by torch once the copy from it is done.
        parcels = torch.empty(len(places), self.form.parcel_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        memory = parcels.numpy()

        def pack(rows: Iterable[int]) -> None:
            for row in rows:
                self.form.pack(self.pixels[places[row]], int(top[row]), int(left[row]), memory[row])

        list(pool.map(pack, (range(first, len(places), threads) for first in range(threads))))
        there, down, right = (values.to(device, non_blocking=True)
                              for values in (parcels, torch.from_numpy(top), torch.from_numpy(left)))
        return self.form.unpack(there, down, right)

    def close(self) -> None:
        """Wait for `seal`. The mapping goes when its last view does."""
        if self._seal is not None:
            self._seal.join()
            self._seal = None


class _Crops(Sequence[torch.Tensor]):
    def __init__(self, store: RamStore, places: Places, top: Places, left: Places) -> None:
        self._store, self._places, self._top, self._left = store, places, top, left

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, row: int) -> torch.Tensor: ...

    @overload
    def __getitem__(self, row: slice) -> list[torch.Tensor]: ...

    def __getitem__(self, row: int | slice) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(row, slice):
            return [self[each] for each in range(len(self))[row]]
        return self._store.crop(int(self._places[row]), int(self._top[row]), int(self._left[row]))


def _boot_id() -> str:
    return _BOOT.read_text().strip()


def _write(file: int, data: npt.NDArray[np.uint8], offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:].data, offset + done)
