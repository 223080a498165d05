"""ids → byte views of the archives, checked; and the list of what could not be read.

Archives are memory-mapped, so a view costs nothing until its bytes are used, and ranks on one node share one copy of the
page cache.
"""
import contextlib
import json
import mmap
import os
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.index.image_header import HEAD_BYTES, NeedMore, probe
from pipeline.index.sample_index import SampleIndex

Bytes = npt.NDArray[np.uint8]


class SampleError(RuntimeError):
    """A sample whose bytes are missing, changed or undecodable. `reason` is short, the message names the sample."""

    def __init__(self, index: SampleIndex, id: int, reason: str) -> None:
        self.id, self.reason = id, reason
        super().__init__(f"sample {id} (={index.safe_name(id)} in {index.path}) {reason}; run "
                         f"`python tools/build_index.py verify {index.path} --scrub --exclude` to leave it out")


def check(index: SampleIndex, id: int, view: Bytes, crc: bool) -> None:
    """Whether these are the bytes that were indexed: by their CRC-32, or at least by their header.

    One that cannot be read must not reach DALI 2.4: it throws while its other threads still work on the batch, and now and then
    the process dies of it.

    Raises:
        SampleError: they are not.
    """
    row = index.samples[id]
    if crc:
        if zlib.crc32(view.data) != int(row["crc32"]):
            raise SampleError(index, id, "has another CRC-32 than the index")
        return
    try:
        found = probe(view[:HEAD_BYTES].tobytes(), len(view) <= HEAD_BYTES)
    except NeedMore:
        found = probe(view.tobytes(), True)
    if found.problem or (found.width, found.height) != (int(row["width"]), int(row["height"])):
        raise SampleError(index, id, "has another header than the index")


class Reader:
    """Byte views of samples.

    Args:
        index: the data set.
        check_crc: compare the bytes with the CRC-32 of the index, where it has one.
    """

    def __init__(self, index: SampleIndex, *, check_crc: bool = True) -> None:
        self._index = index
        self._check_crc = check_crc and bool(index.header["crc32"])
        self._maps: dict[int, tuple[mmap.mmap, Bytes]] = {}
        self._lock = threading.Lock()

    def announce(self, ids: npt.NDArray[np.int64]) -> None:
        """Ask the kernel for the bytes of many samples at once, so that cold storage works on all of them in parallel."""
        for row in self._index.samples[ids]:
            if self._index.archives[int(row["archive"])].kind == "tar":
                archive, _ = self._map(int(row["archive"]))
                start = int(row["offset"]) // mmap.PAGESIZE * mmap.PAGESIZE
                archive.madvise(mmap.MADV_WILLNEED, start, int(row["offset"]) + int(row["size"]) - start)

    def read(self, id: int) -> Bytes:
        """(size,) uint8 bytes of a sample: a read-only view for an archive, a copy for a file of a folder.

        Raises:
            SampleError: the bytes differ from what the index recorded.
            RuntimeError: the archive itself is missing or has another size.
        """
        row = self._index.samples[id]
        size = int(row["size"])
        if self._index.archives[int(row["archive"])].kind == "folder":
            try:
                view = np.fromfile(self._index.file_path(id), np.uint8)
            except OSError as error:
                raise SampleError(self._index, id, f"cannot be read ({error.strerror})") from error
            if len(view) != size:
                raise SampleError(self._index, id, f"has {len(view)} bytes where the index has {size}")
        else:
            offset = int(row["offset"])
            view = self._map(int(row["archive"]))[1][offset:offset + size]
        check(self._index, id, view, self._check_crc)
        return view

    def _map(self, position: int) -> tuple[mmap.mmap, Bytes]:
        found = self._maps.get(position)
        if found is not None:
            return found
        with self._lock:
            if position not in self._maps:
                try:
                    path = self._index.archive_path(position)
                except ValueError as error:  # it was there when the run began: the world's fault by now
                    raise RuntimeError(str(error)) from error
                expected = self._index.archives[position].size
                try:
                    with open(path, "rb") as file:
                        size = os.fstat(file.fileno()).st_size
                        if size != expected:  # a shorter file would end in SIGBUS at the first read past its end
                            raise RuntimeError(f"archive {path} (={size} bytes) must have the {expected} bytes the index "
                                               "recorded; restore it, or build the index again")
                        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                except OSError as error:
                    raise RuntimeError(f"archive {path} cannot be opened ({error.strerror}); restore it, or pass the "
                                       "folder that holds it as the archives folder") from error
                self._maps[position] = mapped, np.frombuffer(mapped, np.uint8)
            return self._maps[position]


class Quarantine:
    """The samples training could not use: named, counted, bounded. Of several processes each writes what it finds into a file
    of its own, and reads the others' whenever it finds something, so that the budget is the whole run's.

    Args:
        budget: how many distinct samples may fail before training stops.
        path: quarantine.jsonl, or None. Samples that it or the other processes' files name count.
        process: number of this process: 0 appends to `path`, 3 to quarantine-3.jsonl beside it.
    """

    def __init__(self, budget: int, path: str | Path | None = None, *, process: int = 0) -> None:
        self.budget = budget
        self.ids: set[int] = set()
        self._path = None if path is None else Path(path)
        self._own = self._path and self._path.with_name(f"{self._path.stem}-{process}{self._path.suffix}" if process
                                                        else self._path.name)
        self._read: dict[Path, int] = {}  # bytes of each file that `ids` has
        self._lock = threading.Lock()
        self._catch_up()
        if self._own in self._read and self._own.stat().st_size > self._read[self._own]:  # a line cut off by a kill
            with open(self._own, "a") as file:
                file.write("\n")

    def _catch_up(self) -> None:
        """Count what all files name; they only grow."""
        if self._path is None:
            return
        for path in self._path.parent.glob(f"{self._path.stem}*{self._path.suffix}"):
            start = self._read.setdefault(path, 0)
            if path.stat().st_size > start:
                with open(path, "rb") as file:
                    file.seek(start)
                    lines, _, _ = file.read().rpartition(b"\n")  # the last one may be half written
                self._read[path] += len(lines) + 1 if lines else 0
                for line in lines.splitlines():
                    with contextlib.suppress(ValueError, KeyError):  # one cut off; the sample will be found again
                        self.ids.add(int(json.loads(line)["id"]))

    def add(self, index: SampleIndex, error: SampleError, *, archive: str = "", **where: Any) -> None:
        """Note a sample. `where` (epoch, step, substitute …) goes into its line; `archive`: URI of its archive when that is no
        local file.

        Raises:
            RuntimeError: more samples than the budget allows have failed.
        """
        with self._lock:
            if error.id not in self.ids:
                self._catch_up()  # another process may have found it
            if error.id not in self.ids:
                self.ids.add(error.id)
                if self._own is not None:
                    row = index.samples[error.id]
                    line = {"id": error.id, "member": index.safe_name(error.id),
                            "archive": archive or str(index.archive_path(int(row["archive"]))), "reason": error.reason, **where}
                    with open(self._own, "a") as file:
                        file.write(json.dumps(line) + "\n")
                    self._catch_up()  # of two that find one each at the same time, one at least reads of both
            if len(self.ids) > self.budget:
                several = self._path and len(self._read) > 1
                files = self._path and (self._path.with_name(f"{self._path.stem}*{self._path.suffix}") if several else self._path)
                raise RuntimeError(f"quarantine (={len(self.ids)} unreadable samples) must not exceed its budget "
                                   f"(={self.budget}); the last one: {error}{f', all in {files}' if files else ''}; or raise "
                                   "machine.quarantine_budget") from error
