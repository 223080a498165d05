"""Where encoded bytes come from: `Source`, and `ArchiveSource`, the archives as they were downloaded.

Archives are memory-mapped, so a view costs nothing until its bytes are used, and ranks on one node share one copy of the page
cache."""
import mmap
import os
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from pipeline.index.image_header import HEAD_BYTES, NeedMore, probe
from pipeline.index.sample_index import SampleIndex
from pipeline.reading.quarantine import Pool, SampleError
from pipeline.sampling.batch_plan import Bytes
from pipeline.sampling.sampler import Ids


class Source(ABC):
    """Gives the bytes of samples. Threads may ask at the same time."""

    def open(self, step: int) -> AbstractContextManager[object]:
        """Begin to read ahead from batch `step` on, until the context is left."""
        return nullcontext()

    @abstractmethod
    def pools(self, ids: Ids, epochs: Ids) -> Sequence[Pool]:
        """For each of B samples what reads it; waits until it can, and tells the storage that all will be read."""

    def release(self, step: int) -> None:
        """Batch `step` and all before it are decoded; what only they need may go."""


def check(index: SampleIndex, id: int, view: Bytes, crc: bool) -> None:
    """Whether these are the bytes that were indexed: by their CRC-32, or at least by their header. Raises SampleError when
    they are not. One that cannot be read must not reach DALI 2.4: it throws while its other threads still work on the batch,
    and now and then the process dies of it."""
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


class ArchiveSource(Source):
    """Reads samples of tars and folders in any order: a `Source`, and its one `Pool`, of samples `ids` that may stand in for
    one another (by default none). `check_crc`: compare the bytes with the CRC-32 of the index, where it has one."""

    def __init__(self, index: SampleIndex, ids: Ids | None = None, *, check_crc: bool = True) -> None:
        self.ids = np.empty(0, np.int64) if ids is None else ids
        self._index = index
        self._check_crc = check_crc and bool(index.header["crc32"])
        self._maps: dict[int, tuple[mmap.mmap, Bytes]] = {}
        self._lock = threading.Lock()

    def pools(self, ids: Ids, epochs: Ids) -> Sequence[Pool]:
        self.announce(ids)
        return [self] * len(ids)

    def announce(self, ids: Ids) -> None:
        """Ask the kernel for the bytes of many samples at once, so that cold storage works on all of them in parallel."""
        for row in self._index.samples[ids]:
            if self._index.archives[int(row["archive"])].kind == "tar":
                archive, _ = self._map(int(row["archive"]))
                start = int(row["offset"]) // mmap.PAGESIZE * mmap.PAGESIZE
                archive.madvise(mmap.MADV_WILLNEED, start, int(row["offset"]) + int(row["size"]) - start)

    def read(self, id: int) -> Bytes:
        """(size,) uint8 bytes of a sample: a read-only view for an archive, a copy for a file of a folder. Raises SampleError
        when they differ from what the index recorded, RuntimeError when the archive itself is missing or has another size."""
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

    def location(self, id: int) -> dict[str, str]:
        return {"member": self._index.safe_name(id),
                "archive": str(self._index.archive_path(int(self._index.samples[id]["archive"])))}

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
