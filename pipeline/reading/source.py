"""Where encoded bytes come from: `Source`, and `ArchiveSource`, the archives as they were downloaded.

Archives are read, not mapped: a file that was cut, or a bad sector, is then an error and not the end of the process (SIGBUS), and
the interpreter's lock is free while bytes are copied. B samples of a batch."""
import os
import resource
import threading
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from zlib_ng.zlib_ng import crc32

from pipeline.decoding.resize import Buffers
from pipeline.index.image_header import HEAD_BYTES, NeedMore, probe
from pipeline.index.sample_index import SampleIndex
from pipeline.io_errors import explain
from pipeline.reading.quarantine import Pool, SampleError
from pipeline.sampling.batch_plan import Encoded
from pipeline.sampling.sampler import Ids

_preadv, _NOWAIT = os.preadv, os.RWF_NOWAIT
_OTHER_CRC = "has another CRC-32 than the index"
_SHARE = 4  # one in so many of the files that this process may open: there are loaders beside this one, and other files


class Source(ABC):
    """Gives the bytes of samples. Threads may ask at the same time."""

    def open(self, step: int) -> AbstractContextManager[object]:
        """Begin to read ahead from batch `step` on, until the context is left."""
        return nullcontext()

    @abstractmethod
    def pools(self, ids: Ids, epochs: Ids) -> Sequence[Pool]:
        """For each of B samples what reads it; waits until it can."""

    def read_batch(self, ids: Ids, epochs: Ids) -> list[Encoded | SampleError]:
        """The bytes of each of B samples, or what is wrong with it; see `Pool.read`."""
        def read(id: int, pool: Pool) -> Encoded | SampleError:
            try:
                return pool.read(id)
            except SampleError as error:
                return error

        return list(map(read, ids.tolist(), self.pools(ids, epochs)))

    def release(self, step: int) -> None:
        """Batch `step` and all before it are decoded; what only they need may go."""


def other_crc(view: Encoded, crc: int) -> str:
    """"" when an image's bytes are those that were indexed, else what is wrong."""
    return "" if crc32(view) == crc else _OTHER_CRC


def other_header(view: Encoded, width: int, height: int) -> str:
    """As `other_crc`, where there is none, by the header at least. One that cannot be read must not reach DALI 2.4: it throws
    while its other threads still work on the batch, and now and then the process dies of it."""
    try:
        found = probe(bytes(view[:HEAD_BYTES]), len(view) <= HEAD_BYTES)
    except NeedMore:
        found = probe(bytes(view), True)
    return "has another header than the index" if found.problem or (found.width, found.height) != (width, height) else ""


class _File:
    """An open file, closed when nobody refers to it any more: a thread may still read what another has let go."""

    def __init__(self, path: Path) -> None:
        self.path, self.number = path, os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.number).atexit = False

    def expect(self, offset: int, size: int) -> None:
        """Ask the kernel to fetch a range."""
        os.posix_fadvise(self.number, offset, size, os.POSIX_FADV_WILLNEED)

    def read(self, view: memoryview, offset: int) -> int:
        """Fill `view`, waiting for the storage; returns how many bytes there were. Raises OSError."""
        done = 0
        while done < len(view) and (count := _preadv(self.number, (view[done:],), offset + done)):
            done += count
        return done


class ArchiveSource(Source):
    """Reads samples of tars and folders in any order: a `Source`, and its one `Pool`, of samples `ids` that may stand in for
    one another (by default none). `check_crc`: compare the bytes with the CRC-32 of the index, where it has one.

    A batch's bytes lie in one block of memory, which is used again when nobody refers to them."""

    def __init__(self, index: SampleIndex, ids: Ids | None = None, *, check_crc: bool = True) -> None:
        self.ids = np.empty(0, np.int64) if ids is None else ids
        self._index = index
        self._check_crc = check_crc and bool(index.header["crc32"])
        self._folders = frozenset(position for position, archive in enumerate(index.archives) if archive.is_folder)
        self._files: OrderedDict[int, _File] = OrderedDict()  # the one used last comes last
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = max(1, limit // _SHARE) if limit != resource.RLIM_INFINITY else len(index.archives)
        self._lock = threading.Lock()
        self._buffers = Buffers(np.uint8)

    def pools(self, ids: Ids, epochs: Ids) -> Sequence[Pool]:
        return [self] * len(ids)

    def read(self, id: int) -> Encoded:
        """(size,) bytes of a sample. Raises SampleError when they differ from what the index recorded, RuntimeError
        when the archive itself is missing, has another size, or cannot be read."""
        (found,) = self.read_batch(np.array([id]), np.zeros(1, np.int64))
        if isinstance(found, SampleError):
            raise found
        return found

    def read_batch(self, ids: Ids, epochs: Ids) -> list[Encoded | SampleError]:
        """Reads what memory holds; then asks the kernel for all the rest, so that storage works on it in parallel, and waits.
        The loops are short on purpose: what they do for an image, the interpreter's lock is held."""
        rows = self._index.samples[ids]
        positions, offsets, sizes = (rows[name].tolist() for name in ("archive", "offset", "size"))
        stops = np.cumsum(rows["size"], dtype=np.int64).tolist()
        # Rounded up, so that a batch a little larger than all before it finds a block large enough.
        memory: Any = self._buffers.take(1 << stops[-1].bit_length()).numpy()
        block = memoryview(memory)
        found: list[Any] = [block[low:high] for low, high in zip([0, *stops], stops)]
        late, errors, last, number = list[int](), dict[int, SampleError](), -1, -1
        for row in np.argsort(rows["archive"], kind="stable").tolist():
            if (position := positions[row]) != last:
                last, file = position, None if position in self._folders else self._file(position)
                number = -1 if file is None else file.number  # preadv of no file is an error, as that of bytes not there
            try:
                if _preadv(number, (found[row],), offsets[row], _NOWAIT) != sizes[row]:
                    late.append(row)
            except OSError:  # not in memory (EAGAIN), or a file system that cannot say (EOPNOTSUPP)
                late.append(row)
        for row in late:
            if positions[row] not in self._folders:
                self._file(positions[row]).expect(offsets[row], sizes[row])
        for row in late:
            if (error := self._read_late(int(ids[row]), positions[row], offsets[row], found[row])) is not None:
                errors[row] = error
        reasons: list[str] = []
        if not self._check_crc:
            reasons = list(map(other_header, found, rows["width"].tolist(), rows["height"].tolist()))
        elif (actual := list(map(crc32, found))) != (crcs := rows["crc32"].tolist()):
            reasons = [_OTHER_CRC if one != other else "" for one, other in zip(actual, crcs)]
        for row, reason in enumerate(reasons):
            if reason:
                found[row] = SampleError(self._index, int(ids[row]), reason)
        for row, error in errors.items():
            found[row] = error
        return found

    def _read_late(self, id: int, position: int, offset: int, view: memoryview) -> SampleError | None:
        """Wait for the bytes of one sample; returns what is wrong with it."""
        if position not in self._folders:
            file = self._file(position)
            try:
                count = file.read(view, offset)
            except OSError as error:
                raise RuntimeError(f"archive {explain(error, file.path)}") from error
            if count < len(view):
                raise RuntimeError(f"archive {file.path} (={os.fstat(file.number).st_size} bytes) ends within sample {id}, and "
                                   f"had {self._index.archives[position].size} bytes when it was indexed; restore it, or build "
                                   "the index again")
            return None
        try:
            with open(self._index.file_path(id), "rb", buffering=0) as opened:
                size = os.fstat(opened.fileno()).st_size
                count = opened.readinto(view) if size == len(view) else 0
        except OSError as error:
            failed = SampleError(self._index, id, f"cannot be read ({error.strerror})")
            failed.__cause__ = error
            return failed
        return None if count == len(view) else SampleError(self._index, id,
                                                           f"has {size} bytes where the index has {len(view)}")

    def location(self, id: int) -> dict[str, str]:
        return {"member": self._index.safe_name(id),
                "archive": str(self._index.archive_path(int(self._index.samples[id]["archive"])))}

    def _file(self, position: int) -> _File:
        with self._lock:
            found = self._files.get(position)
            if found is None:
                found = self._files[position] = self._open(position)
                if len(self._files) > self._most:
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(position)
            return found

    def _open(self, position: int) -> _File:
        try:
            path = self._index.archive_path(position)
        except ValueError as error:  # it was there when the run began: the world's fault by now
            raise RuntimeError(str(error)) from error
        try:
            file = _File(path)
        except OSError as error:
            raise RuntimeError(f"archive {explain(error, path)}") from error
        size, expected = os.fstat(file.number).st_size, self._index.archives[position].size
        if size != expected:
            raise RuntimeError(f"archive {path} (={size} bytes) must have the {expected} bytes the index recorded; restore it, "
                               "or build the index again")
        return file
