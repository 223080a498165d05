"""`ShardSource`: packed shards read front to back, once, through DALI's WebDataset reader; local files or an object store.

A *lane* is one such reader. For every passage (one lane, one epoch) it is given index files as wds2idx writes them, but a line
stands for a *run* of neighbouring samples, headers and all, up to 8 MiB: an object store is asked for 8 MiB at a time instead
of for every picture, a passage begins at any sample, and nothing is read that is not needed. A window's runs are kept in
memory until the last batch that uses them is decoded. n samples of a passage or a window, r runs."""
import ctypes
import mmap
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.decoding.dali import ShardReader
from pipeline.index.sample_index import SampleIndex
from pipeline.index.tar import BLOCK
from pipeline.reading.quarantine import Pool, SampleError
from pipeline.reading.source import Source, other_crc, other_header
from pipeline.sampling.batch_plan import Bytes, Encoded
from pipeline.sampling.sampler import Ids, Passage, WindowSampler

RUN_BYTES = 8 << 20  # 8 MiB: at 100 MB/s long beside an object store's latency, short beside a window
Key = tuple[int, int]  # epoch, number of a window in it


@dataclass(frozen=True)
class Runs:
    """Ranges of bytes that hold a passage's samples."""
    archives: Ids  # (r,) int64 position in the index's archives; so the next three
    starts: Ids  # bytes
    sizes: Ids  # bytes
    windows: Ids  # numbers of windows
    of: Ids  # (n,) int64 run of each sample
    at: Ids  # (n,) int64 first byte of each sample's image in its run


def runs(rows: npt.NDArray[np.void], windows: Ids, run_bytes: int = RUN_BYTES) -> Runs:
    """The runs of samples `rows` (n rows of the index, ordered by place). A run lies in one archive and one window, and ends with
    the first sample that makes it longer than `run_bytes`, or before."""
    archives, data = rows["archive"].astype(np.int64), rows["offset"].astype(np.int64)
    starts = data - BLOCK * rows["header_blocks"].astype(np.int64)  # with the header, which tells whether it is the sample
    stops = data + rows["size"].astype(np.int64)
    cut = np.ones(len(rows), bool)
    cut[1:] = (np.diff(archives) != 0) | (np.diff(windows) != 0)
    base = starts[np.maximum.accumulate(np.where(cut, np.arange(len(rows)), 0))]
    cut[1:] |= np.diff((starts - base) // run_bytes) > 0
    first = np.flatnonzero(cut)
    last = np.append(first[1:], len(rows)) - 1
    of = np.cumsum(cut) - 1
    return Runs(archives[first], starts[first], stops[last] - starts[first], windows[first], of, data - starts[first][of])


class Window:
    """The bytes of n samples, in memory: the `Pool` of each of them. `ids`: in the order they lie in the shards, their images
    at `at` in `content`; `last_step`: last global batch that uses it."""

    def __init__(self, index: SampleIndex, ids: Ids, last_step: int, content: Bytes, at: Ids, crc: bool,
                 path_of: Callable[[int], str]) -> None:
        self.ids, self.last_step = ids, last_step
        self._index, self._content, self._crc, self._path_of = index, content, crc, path_of
        self._places = dict(zip(ids.tolist(), zip(at.tolist(), index.samples[ids]["size"].tolist()), strict=True))

    def location(self, id: int) -> dict[str, str]:
        """Its name, from the tar header before it ("?" where there is none), and its shard."""
        at = self._places[id][0]
        name = self._content[at - BLOCK:at - BLOCK + 100].tobytes().split(b"\0")[0].decode("utf-8", "replace") or "?"
        return {"member": name, "archive": self._path_of(int(self._index.samples[id]["archive"]))}

    def read(self, id: int) -> Encoded:
        """(size,) bytes of a sample of this window, a view. Raises SampleError when another file lies in its place, or
        its bytes differ from what the index recorded."""
        at, size = self._places[id]
        header = self._content[at - BLOCK:at].tobytes()
        # Holds for indexes without CRC-32 too: a shard that was written anew has its headers elsewhere.
        if header[257:262] != b"ustar" or header[124:135] != b"%011o" % size:
            raise SampleError(self._index, id, "does not lie where the index has it")
        view = memoryview(self._content)[at:at + size]  # type: ignore[arg-type]  # NumPy's arrays are buffers
        row = self._index.samples[id]
        if reason := (other_crc(view, int(row["crc32"])) if self._crc else
                      other_header(view, int(row["width"]), int(row["height"]))):
            raise SampleError(self._index, id, reason)
        return view


class _PassageReader:
    """Reads one passage: windows in their order. `path_of`, `crc`: see `Lane`."""

    def __init__(self, index: SampleIndex, passage: Passage, path_of: Callable[[int], str], crc: bool) -> None:
        self._index, self._passage, self._path_of, self._crc = index, passage, path_of, crc
        self._runs = found = runs(index.samples[passage.ids], passage.windows)
        self._paths = [path_of(position) for position in found.archives.tolist()]
        ahead = int(np.bincount(found.windows - found.windows[0]).max())
        shards = np.flatnonzero(np.append(True, np.diff(found.archives) != 0)).tolist()
        self._folder = tempfile.TemporaryDirectory(prefix="streamed-")
        lists = [Path(self._folder.name, f"{number}.idx") for number in range(len(shards))]
        try:
            for file, first, stop in zip(lists, shards, [*shards[1:], len(found.archives)], strict=True):
                lines = [f"jpg {found.starts[run]} {found.sizes[run]} run.jpg" for run in range(first, stop)]
                if file is lists[-1]:
                    # DALI reads ahead past the end, from the beginning again: a block each instead of megabytes.
                    lines += [f"jpg {found.starts[first]} {BLOCK} end.jpg"] * (ahead + 4)
                file.write_text(f"v1.2 {len(lines)}\n" + "\n".join(lines) + "\n")
            self._reader = ShardReader([self._paths[first] for first in shards], [str(file) for file in lists], ahead)
        except BaseException:
            self._folder.cleanup()
            raise

    def __iter__(self) -> Iterator[tuple[Key, Window]]:
        found, passage = self._runs, self._passage
        for number in np.unique(passage.windows).tolist():
            low, high = np.searchsorted(passage.windows, (number, number + 1))
            first, stop = found.of[low], found.of[high - 1] + 1
            edges = np.append(0, np.cumsum(found.sizes[first:stop]))
            # A mapping of its own goes back to the system when its last view does; DALI's buffers, held for a window's time,
            # are scattered over the heaps of its threads, and the process grows.
            content = np.frombuffer(mmap.mmap(-1, int(edges[-1])), np.uint8)
            for run in range(first, stop):
                content[edges[run - first]:edges[run - first + 1]] = self._next_run(run)
            content.flags.writeable = False
            at = edges[found.of[low:high] - first] + found.at[low:high]
            yield (passage.epoch, number), Window(self._index, passage.ids[low:high], passage.last_steps[number], content, at,
                                                  self._crc, self._path_of)

    def _next_run(self, run: int) -> Bytes:
        try:
            content = self._reader.next()
        except RuntimeError as error:
            message, paths = str(error), dict.fromkeys(self._paths)
            # DALI reads ahead of `run`, so it need not be that one's shard.
            culprit = next((path for number, path in enumerate(paths) if path in message or f"/{number}.idx" in message
                            or f"object={path.split('/', 3)[-1]}:" in message), self._paths[run])
            raise RuntimeError(f"shard {culprit} cannot be read ({_plain(message)}); restore it, or the connection, and "
                               "resume") from error
        self._folder.cleanup()  # DALI has read all lists before its first run: a process killed later leaves nothing behind
        if len(content) != self._runs.sizes[run]:
            raise RuntimeError(f"shard {self._paths[run]} (from byte {self._runs.starts[run]} on) must give "
                               f"{self._runs.sizes[run]} bytes, not {len(content)}; restore it, and resume")
        return content

    def close(self) -> None:
        self._reader.close()
        self._folder.cleanup()
        # glibc keeps freed memory in the heaps of the threads that asked for it, DALI's here, and every passage has new ones
        # (30 ms; measured over 40 short passages of 8 lanes: 300 MiB ± 12 instead of 360 growing to 610).
        if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
            trim(0)


def _plain(message: str) -> str:
    """DALI's words for a shard it cannot read, in plain ones where they are known."""
    for words, meaning in (("Could not open file", "it is not there"), ("curlCode", "the connection to the store failed"),
                           ("S3 Object not found", "no such object, or no right to it"),
                           ("outside of the archive", "it is shorter than when it was indexed"),
                           ("Error reading from a file", "it ends early")):
        if words in message:
            return meaning
    return message


class Lane:
    """The windows of a lane, in order; threads may ask for them. Each of the `passages`, epoch after epoch, is opened when the
    one before it has been taken, before it is needed. `path_of`: path or URI of an archive, by its position; raises
    RuntimeError when it is not as it was indexed. `crc`: compare bytes with the index's CRC-32, where it has them."""

    def __init__(self, index: SampleIndex, passages: Iterator[Passage], path_of: Callable[[int], str], *,
                 crc: bool = True) -> None:
        self._index, self._passages, self._path_of, self._crc = index, passages, path_of, crc and bool(index.header["crc32"])
        self._held: dict[Key, Window] = {}
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        self._open()

    def _open(self) -> None:
        passage = next(self._passages)
        self._left = len(np.unique(passage.windows))
        self._reader = _PassageReader(self._index, passage, self._path_of, self._crc)
        self._windows = iter(self._reader)

    def window(self, key: Key, needed: int) -> Window:
        """The window `key`; windows only used by batches before step `needed` are dropped. Raises RuntimeError when a shard is
        missing, cut, or cannot be read."""
        with self._lock:
            for old in [old for old, window in self._held.items() if window.last_step < needed]:
                del self._held[old]
            while key not in self._held:
                if self._failure is not None:  # of another thread's call
                    raise self._failure
                try:
                    found, self._held[found] = next(self._windows)
                    self._left -= 1
                    if not self._left:
                        self._reader.close()
                        self._open()
                except BaseException as failure:
                    self._failure = failure
                    raise
            return self._held[key]

    def close(self) -> None:
        with self._lock:
            self._reader.close()
            self._held = {}


class ShardSource(Source):
    """Packed shards (tools/pack_shards.py: random already, so that windows are) as a `Source`: the lanes of a rank, in the
    sampler's order. `store`: ``s3://bucket/prefix`` under which the shards lie by base name; empty: where the index finds
    them. Raises ValueError when it is no s3 address."""

    def __init__(self, index: SampleIndex, sampler: WindowSampler, *, store: str = "", check_crc: bool = True) -> None:
        if store and not (store.startswith("s3://") and len(store) > len("s3://")):
            raise ValueError(f"store (={store}; of a recipe: machine.archives) must be s3://bucket/prefix; correct it, or "
                             "leave it out to read the shards where the index finds them")
        self._index, self._sampler, self._store, self._check_crc = index, sampler, store.rstrip("/"), check_crc
        self._lanes: dict[int, Lane] = {}
        self._needed = 0  # step of the first batch that is not decoded yet

    @contextmanager
    def open(self, step: int) -> Iterator[None]:
        self._needed, self._lanes = step, {}
        with ExitStack() as stack:
            for lane in self._sampler.own_lanes():
                opened = Lane(self._index, self._sampler.passages(lane, step), self._path_of, crc=self._check_crc)
                self._lanes[lane] = stack.enter_context(closing(opened))
            yield

    def pools(self, ids: Ids, epochs: Ids) -> Sequence[Pool]:
        """The windows in which the samples lie in their epochs; raises RuntimeError when a shard cannot be read."""
        found: dict[int, Window] = {}
        for epoch in np.unique(epochs).tolist():
            rows = np.flatnonzero(epochs == epoch)
            lanes, windows = self._sampler.locate(epoch, ids[rows])
            for row, lane, window in zip(rows.tolist(), lanes.tolist(), windows.tolist(), strict=True):
                found[row] = self._lanes[lane].window((epoch, window), self._needed)
        return [found[row] for row in range(len(ids))]

    def release(self, step: int) -> None:
        self._needed = step + 1

    def _path_of(self, position: int) -> str:
        if self._store:
            return f"{self._store}/{self._index.archives[position].path.name}"
        try:
            return str(self._index.archive_path(position))
        except ValueError as error:  # it was there when the run began: the world's fault by now
            raise RuntimeError(str(error)) from error
