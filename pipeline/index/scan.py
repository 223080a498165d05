"""Scans the images of an archive into SAMPLE rows: the work of one process of a build.

A task is an inner tar to walk, a list of members of a flat tar, or files of a folder. Rows come back in the order of the task
with label, split and archive still 0; whatever is odd comes back by name with a reason.
"""
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from zlib_ng.zlib_ng import crc32

from pipeline.index.image_header import FORMAT_CODE, HEAD_BYTES, NeedMore, is_image_name, judge, probe
from pipeline.index.sample_index import REASONS, SAMPLE
from pipeline.index.tar import BLOCK, ArchiveError, ByteWindow, Member, walk

CHUNK = 2048  # members of one task of a flat archive
MAX_SIZE = (1 << 32) - 1  # an image's size is stored in 4 bytes
DUPLICATE = "duplicate: a later member has the same name"
UNLISTED = (0, REASONS.index("grey"))  # grey images are 1% of ImageNet: found by their reason, not listed by name


@dataclass(frozen=True)
class Oddity:
    """What is odd about a member of an archive, for the header of the index. `row`: of its image; -1 when it has none."""
    name: str
    reason: str
    kept: bool = False
    row: int = -1


@dataclass
class Part:
    """Rows of a part of the data set with what is known beside them."""
    rows: np.ndarray  # (N,) SAMPLE
    odd: list[Oddity] = field(default_factory=list)
    names: list[str] | None = None  # one per row; None when too many to keep (nested archives)

    def take(self, order: np.ndarray) -> "Part":
        """The rows at the positions `order`, with their oddities and those that have no row."""
        new = np.full(len(self.rows) + 1, -1)  # old row → new row; -1 → -1
        new[order] = np.arange(len(order))
        odd = [replace(odd, row=int(new[odd.row])) for odd in self.odd if odd.row < 0 or new[odd.row] >= 0]
        return Part(self.rows[order], odd, [self.names[i] for i in order] if self.names is not None else None)


def joined(parts: Iterable[Part]) -> Part:
    parts = list(parts)
    first, odd = 0, []
    for part in parts:
        odd += [replace(entry, row=entry.row + first) if entry.row >= 0 else entry for entry in part.odd]
        first += len(part.rows)
    names = None if any(part.names is None for part in parts) else [n for part in parts for n in part.names or ()]
    return Part(np.concatenate([part.rows for part in parts]) if parts else np.empty(0, SAMPLE), odd, names)


def base_names(part: Part, archive: Path) -> dict[str, int]:
    """Base name → row, for files that are known by their base names. Raises ArchiveError when two have the same."""
    names = part.names or []
    rows: dict[str, int] = {}
    for row, name in enumerate(names):
        base = name.rpartition("/")[2]
        if base in rows:
            raise ArchiveError(f"image (={base}) of {archive} is there twice, as {names[rows[base]]} and as {name}; "
                               f"repack the archive with one file of each name")
        rows[base] = row
    return rows


def is_last_of_its_name(names: Sequence[str]) -> list[bool]:
    """For each name whether it is its last occurrence, the one that extracting the archive would leave."""
    last = {name: i for i, name in enumerate(names)}
    return [last[name] == i for i, name in enumerate(names)]


def scan_inner(path: Path, crc: bool, tar: Member, keep_names: bool) -> Part:
    """Rows of the images in the inner tar `tar` of the tar at `path`."""
    with ByteWindow(path, window=1 << 20 if crc else 16 << 10) as source:
        members = walk(source, tar.offset, tar.offset + tar.size, tar.name)
        part = _rows(path, crc, members, lambda member, count: source.at(member.offset, count))
    names = part.names or []
    kept = is_last_of_its_name(names)
    if not all(kept):
        part = part.take(np.flatnonzero(kept))
        part.odd += [Oddity(name, DUPLICATE) for name, is_kept in zip(names, kept) if not is_kept]
    part.names = part.names if keep_names else None
    return part


def scan_members(path: Path, crc: bool, members: Sequence[Member]) -> Part:
    """Rows of the images among members of the tar at `path`."""
    with ByteWindow(path, window=1 << 20 if crc else 16 << 10) as source:
        return _rows(path, crc, members, lambda member, count: source.at(member.offset, count))


def scan_files(folder: Path, crc: bool, members: Sequence[Member]) -> Part:
    """Rows of the images among files of a folder, whose offsets are those of their names in names.bin."""
    def read(member: Member, count: int) -> bytes:
        with open(folder / member.name, "rb") as file:
            return file.read(count)

    return _rows(folder, crc, members, read)


def _rows(path: Path, crc: bool, members: Iterable[Member], read: Callable[[Member, int], bytes]) -> Part:
    """`read(member, count)`: the first `count` bytes of a member. Raises ArchiveError, OSError."""
    rows: list[tuple[int, ...]] = []
    names: list[str] = []
    odd: list[Oddity] = []
    for member in members:
        name, kind, offset, size, header = member
        if kind != "file":
            if kind != "directory":
                odd.append(Oddity(name, f"a {kind}, not a file"))
            continue
        if size > MAX_SIZE:
            odd.append(Oddity(name, f"{size} bytes, more than {MAX_SIZE}"))
            continue
        count = size if crc else min(size, HEAD_BYTES)
        data = read(member, count)
        if len(data) < count:
            raise ArchiveError(f"member (={name}) of {path} ended after {len(data)} of {size} bytes while it was "
                               f"read; leave the archive alone during a build, and build again")
        try:
            info = probe(data, count == size)
        except NeedMore:
            info = probe(read(member, size), True)
        reason, excluded = judge(name, info)
        if excluded and info.format in ("unknown", "gzip") and not is_image_name(name):
            odd.append(Oddity(name, "not an image"))
            continue
        if reason not in UNLISTED:
            odd.append(Oddity(name, REASONS[reason], not excluded, len(rows)))
        rows.append((offset, size, crc32(data) if crc else 0, info.width, info.height, -1, 0, (offset - header) // BLOCK, 0,
                     FORMAT_CODE[info.format], reason, info.channels, excluded, 0))
        names.append(name)
    return Part(np.array(rows, SAMPLE), odd, names)
