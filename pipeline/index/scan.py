"""Scans images of one archive into SAMPLE rows: the work of one process of a build.

A task is an inner tar to walk, a list of members of a flat tar, or files of a folder. Rows come back in the order of
the task with label, split and archive still 0; what is odd comes back by name with a reason.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterable, NamedTuple, Sequence

import numpy as np

from pipeline.index.tar import BLOCK, ArchiveError, ByteWindow, Member, walk
from pipeline.index.image_header import FORMAT_CODE, HEAD_BYTES, NeedMore, is_image_name, judge, probe
from pipeline.index.sample_index import REASONS, SAMPLE

CHUNK = 2048  # members of one task of a flat archive
MAX_SIZE = (1 << 32) - 1  # an image's size is stored in 4 bytes
UNLISTED = (0, REASONS.index("grey"))  # grey images are 1% of ImageNet: found by their reason, not listed by name


class Odd(NamedTuple):
    """One oddity. `row`: position in the rows, or -1 when the member has none."""

    row: int
    name: str
    reason: str
    kept: bool


@dataclass(frozen=True)
class Task:
    """What to scan: `members` of the tar at `path`, the inner tar [start, end) when None, or files of a folder."""

    path: Path
    crc: bool
    members: Sequence[Member] | None = None
    start: int = 0
    end: int = 0
    inside: str = ""
    folder: bool = False
    watch: frozenset[str] = frozenset()  # base names whose rows to report (patched images)


@dataclass
class Part:
    """Rows with what is known beside them. `names`: one per row, None when too many to keep (nested archives)."""

    rows: np.ndarray  # (N,) SAMPLE
    odd: list[Odd] = field(default_factory=list)
    names: list[str] | None = None
    watched: dict[str, int] = field(default_factory=dict)  # base name → row

    def reordered(self, order: np.ndarray) -> "Part":
        """The rows in the given order (a permutation of positions)."""
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        return Part(self.rows[order], [odd._replace(row=int(place[odd.row])) if odd.row >= 0 else odd
                                       for odd in self.odd],
                    [self.names[i] for i in order] if self.names is not None else None,
                    {name: int(place[row]) for name, row in self.watched.items()})


def joined(parts: Iterable[Part]) -> Part:
    """Parts one after the other."""
    parts = list(parts)
    first, odd, watched = 0, [], {}
    for part in parts:
        odd += [entry._replace(row=entry.row + first) if entry.row >= 0 else entry for entry in part.odd]
        watched.update({name: row + first for name, row in part.watched.items()})
        first += len(part.rows)
    names = None if any(part.names is None for part in parts) else [n for part in parts for n in part.names or ()]
    return Part(np.concatenate([part.rows for part in parts]) if parts else np.empty(0, SAMPLE), odd, names, watched)


def base_names(part: Part, what: str) -> dict[str, int]:
    """Base name → row, for files that are known by their base names. Raises ArchiveError when two have the same."""
    names = part.names or []
    found: dict[str, int] = {}
    for row, name in enumerate(names):
        base = name.rpartition("/")[2]
        if base in found:
            raise ArchiveError(f"image (={base}) of {what} is there twice, as {names[found[base]]} and as {name}; "
                               f"repack the archive with one file of each name")
        found[base] = row
    return found


def scan(task: Task) -> Part:
    """Read the images of a task. Raises ArchiveError, OSError."""
    if task.folder:
        return _rows(task, task.members or (), _read_file(task.path))
    with ByteWindow(task.path, window=1 << 20 if task.crc else 16 << 10) as source:
        inner = task.members is None
        members = walk(source, task.start, task.end, task.inside) if task.members is None else task.members
        part = _rows(task, members, lambda member, count: source.at(member.offset, count))
    return _without_duplicates(part) if inner else part


def last_of_each(names: Sequence[str]) -> list[bool]:
    """For each name whether it is the last of its kind, the one that extracting the archive would leave."""
    last = {name: i for i, name in enumerate(names)}
    return [last[name] == i for i, name in enumerate(names)]


def _rows(task: Task, members: Iterable[Member], read: Callable[[Member, int], bytes]) -> Part:
    rows: list[tuple[int, ...]] = []
    names: list[str] = []
    odd: list[Odd] = []
    watched: dict[str, int] = {}
    for member in members:
        name, kind, offset, size, header = member
        if kind != "file":
            if kind != "directory":
                odd.append(Odd(-1, name, f"a {kind}, not a file", False))
            continue
        if size > MAX_SIZE:
            odd.append(Odd(-1, name, f"{size} bytes, more than {MAX_SIZE}", False))
            continue
        data = read(member, size if task.crc else min(size, HEAD_BYTES))
        if len(data) < (size if task.crc else min(size, HEAD_BYTES)):
            raise ArchiveError(f"member (={name}) of {task.path} ended after {len(data)} of {size} bytes while it was "
                               f"read; leave the archive alone during a build, and build again")
        try:
            info = probe(data[:HEAD_BYTES], size <= HEAD_BYTES)
        except NeedMore:
            info = probe(data if task.crc else read(member, size), True)
        reason, excluded = judge(name, info)
        if excluded and info.format in ("unknown", "gzip") and not is_image_name(name):
            odd.append(Odd(-1, name, "not an image", False))
            continue
        if reason not in UNLISTED:
            odd.append(Odd(len(rows), name, REASONS[reason], not excluded))
        if task.watch and name.rpartition("/")[2] in task.watch:
            watched[name.rpartition("/")[2]] = len(rows)
        # a folder's rows point at their names, which `header` carries
        rows.append((header if task.folder else offset, size, zlib.crc32(data) if task.crc else 0, info.width,
                     info.height, -1, 0, 0 if task.folder else (offset - header) // BLOCK, 0, FORMAT_CODE[info.format],
                     reason, info.channels, excluded, 0))
        names.append(name)
    return Part(np.array(rows, SAMPLE), odd, names, watched)


def _read_file(folder: Path) -> Callable[[Member, int], bytes]:
    def read(member: Member, count: int) -> bytes:
        with open(folder / member.name, "rb") as file:
            return file.read(count)
    return read


def _without_duplicates(part: Part) -> Part:
    """An inner tar's rows without copies that a later member of the same name replaces; names dropped."""
    names = part.names or []
    keep = last_of_each(names)
    part.names = None
    if all(keep):
        return part
    order = np.flatnonzero(keep)
    place = {int(old): new for new, old in enumerate(order)}
    odd = [entry._replace(row=place.get(entry.row, -1)) for entry in part.odd if entry.row < 0 or keep[entry.row]]
    odd += [Odd(-1, name, "duplicate: a later member has the same name", False)
            for name, kept in zip(names, keep) if not kept]
    return Part(part.rows[order], odd, None, {name: place[row] for name, row in part.watched.items()})
