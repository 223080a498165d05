"""`Builder`: walks archives, scans them in processes, labels, sorts, writes an index (the presets drive it).

Archives are opened for reading only, and no image is extracted. Rows of a split are assembled as a `Part`, sorted, then
the splits are joined in the order train, val, test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import numpy as np

from pipeline.index.tar import ArchiveError, Member, fingerprint, open_tar, refuse_compressed_inner, walk
from pipeline.index.sample_index import Archive, ClassInfo
from pipeline.index.writer import check_output, write_index
from pipeline.index.devkit import SPLITS, check_count, class_table, label_of
from pipeline.parallel import Progress, Silent, in_processes
from pipeline.index.scan import CHUNK, Odd, Part, Task, base_names, joined, last_of_each, scan

_PARALLEL_BYTES = 128 << 20  # a process more for each: below that its start costs more than it saves


class Builder:
    """Collects the parts of one index. `jobs`: processes; `crc`: store CRC-32 (reads every byte)."""

    def __init__(self, out: str | Path, preset: str, *, jobs: int, crc: bool = True, force: bool = False,
                 progress: Progress | None = None) -> None:
        self.out, self.preset, self.jobs, self.crc, self.force = Path(out), preset, jobs, crc, force
        self.progress: Progress = progress or Silent()
        self.classes: list[ClassInfo] = []
        self.archives: list[Archive] = []
        self.parts: dict[str, Part] = {}
        self.name_bytes: bytes | None = None
        check_output(self.out, force)

    def add_archive(self, path: Path, nested: bool = False) -> int:
        """Position of a tar in the header."""
        path = path.absolute()
        if any(archive.path == path for archive in self.archives):
            raise ValueError(f"archive (={path}) is given twice; give each archive once")
        self.archives.append(Archive(path, path.stat().st_size, fingerprint(path), "tar", nested))
        return len(self.archives) - 1

    def run(self, tasks: list[Task], sizes: list[int], stage: str, function: Callable[[Task], Part] = scan,
            ) -> list[Part]:
        """Scan tasks of so many bytes in processes; parts in the order of the tasks."""
        self.progress.expect(stage, sum(sizes))
        parts = []
        jobs = max(1, min(self.jobs, sum(sizes) // _PARALLEL_BYTES))
        for part, size in zip(in_processes(function, tasks, jobs), sizes, strict=True):
            self.progress.advance(len(part.rows), size)
            parts.append(part)
        return parts

    def nested(self, path: Path, classes: list[ClassInfo] | None, watch: frozenset[str] = frozenset()) -> Part:
        """A train tar of `<wnid>.tar`. `classes` of a devkit, or None to take them from the inner tars' names."""
        with open_tar(path) as outer:
            inner: dict[str, Member] = {}
            odd = []
            for member in walk(outer):
                if member.kind == "directory":
                    continue
                if member.kind != "file" or not member.name.endswith(".tar"):
                    odd.append(Odd(-1, member.name, "not an inner tar", False))
                    continue
                refuse_compressed_inner(outer, member)
                wnid = member.name.rpartition("/")[2][:-4]
                if wnid in inner:
                    raise ArchiveError(f"inner tar (={member.name}) of {path} at offset {member.header} is there "
                                       f"twice; repack the archive with one tar a class")
                inner[wnid] = member
        if not inner:
            raise ArchiveError(f"archive (={path}) holds no <wnid>.tar; for class folders of images: build classes")
        self.classes = classes or class_table(list(inner))
        labels = label_of(self.classes)
        unknown = sorted(set(inner) - set(labels))
        if unknown:
            raise ValueError(f"class (={unknown[0]}) of {path} is not in the devkit, nor are {len(unknown) - 1} more; "
                             f"give the devkit that belongs to this archive")
        position = self.add_archive(path, nested=True)
        order = sorted(inner)
        tasks = [Task(path, self.crc, None, inner[w].offset, inner[w].offset + inner[w].size, inner[w].name,
                      watch=watch) for w in order]
        parts = self.run(tasks, [inner[wnid].size for wnid in order], f"train {path.name}")
        for wnid, part in zip(order, parts, strict=True):
            part.rows["label"], part.rows["archive"] = labels[wnid], position
            part.odd[:] = [entry._replace(name=f"{wnid}/{entry.name}") for entry in part.odd]
        whole = joined(parts)
        whole.odd += odd
        return whole

    def members(self, path: Path) -> list[Member]:
        """All members of a flat tar, with progress."""
        with open_tar(path) as source:
            self.progress.expect(f"listing {path.name}", source.size)
            found: list[Member] = []
            done = 0
            for member in walk(source):
                found.append(member)
                if len(found) % CHUNK == 0:
                    self.progress.advance(0, member.offset - done)
                    done = member.offset
            self.progress.advance(0, source.size - done)
        return found

    def flat(self, path: Path, stage: str, members: list[Member] | None = None, folder: bool = False) -> Part:
        """The images of a flat tar (or files of a folder), in archive order, named; later duplicates win."""
        members = self.members(path) if members is None else members
        if folder:
            position = len(self.archives) - 1
        else:
            position = self.add_archive(path)
        keep = last_of_each([member.name for member in members])
        odd = [Odd(-1, member.name, "duplicate: a later member has the same name", False)
               for member, kept in zip(members, keep) if not kept and member.kind == "file"]
        members = [member for member, kept in zip(members, keep) if kept]
        chunks = [members[i:i + CHUNK] for i in range(0, len(members), CHUNK)]
        tasks = [Task(path, self.crc, chunk, folder=folder) for chunk in chunks]
        whole = joined(self.run(tasks, [sum(member.size for member in chunk) for chunk in chunks], stage))
        whole.rows["archive"] = position
        whole.odd += odd
        return whole

    def by_name(self, path: Path, split: str, labels: np.ndarray | None) -> None:
        """Add a val or test tar sorted by base name, in whatever folders it is arranged; labels[i] belongs to the i-th."""
        part = self.flat(path, f"{split} {path.name}")
        if not len(part.rows):
            raise ArchiveError(f"archive (={path}) holds no images; give the {split} archive")
        check_count(split, len(part.rows), labels, path)
        rows = base_names(part, str(path))
        part = part.reordered(np.array([rows[base] for base in sorted(rows)]))
        if labels is not None:
            part.rows["label"] = labels
        self.parts[split] = part

    def write(self) -> str:
        """Join the splits, write the index; returns its SHA-256."""
        splits = [split for split in SPLITS if split in self.parts]
        for code, split in enumerate(splits):
            self.parts[split].rows["split"] = code
        whole = joined(self.parts[split] for split in splits)
        if not len(whole.rows):
            raise ValueError(f"archives (={', '.join(str(a.path) for a in self.archives)}) hold no images; "
                             f"nothing was written")
        oddities: list[dict[str, Any]] = []
        first = 0
        for split in splits:
            part = self.parts[split]
            oddities += [{"name": odd.name, "split": split, "reason": odd.reason, "kept": odd.kept,
                          "id": odd.row + first if odd.row >= 0 else None} for odd in part.odd]
            first += len(part.rows)
        oddities.sort(key=lambda entry: (entry["id"] is None, entry["id"] or 0))
        return write_index(self.out, whole.rows, classes=self.classes, archives=self.archives, splits=splits,
                           preset=self.preset, crc32=self.crc, oddities=oddities, names=self.name_bytes,
                           force=self.force)
