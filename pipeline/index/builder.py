"""`Builder`: walks archives, scans them in processes, labels and sorts their rows, writes an index; the presets drive it.

Archives are opened for reading only, and no image is extracted. Rows of a split are assembled as a `Part`, sorted, then
the splits are joined in the order train, val, test.
"""
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.index.header import Archive, ClassInfo, label_of
from pipeline.index.image_header import is_apple_double
from pipeline.index.sample_index import SPLITS
from pipeline.index.scan import (CHUNK, DUPLICATE, Oddity, Part, base_names, is_last_of_its_name, joined, scan_files, scan_inner,
                                 scan_members)
from pipeline.index.tar import ArchiveError, Member, fingerprint, open_tar, refuse_compressed, walk
from pipeline.index.writer import check_output, write_index
from pipeline.process_pool import Progress, in_processes

PARALLEL_BYTES = 128 << 20  # a process more for each: below that its start costs more than it saves


class Builder:
    """Collects the parts of one index. Raises ValueError when `out` may not be written.

    preset: kind of data set, for the header; jobs: processes; crc: store CRC-32 (reads every byte); force: replace the index that
    is there.
    """

    def __init__(self, out: str | Path, preset: str, *, jobs: int, crc: bool = True, force: bool = False,
                 progress: Progress = Progress()) -> None:
        self.out, self.preset, self.jobs, self.crc, self.force, self.progress = Path(out), preset, jobs, crc, force, progress
        self.classes: list[ClassInfo] = []
        self.archives: list[Archive] = []
        self.parts: dict[str, Part] = {}  # by split
        self.names: bytes | None = None  # names.bin
        self.keep_names = False  # of the images in inner tars, which may be many
        check_output(self.out, force)

    def add_archive(self, path: Path, nested: bool = False) -> int:
        """Position of a tar in the header."""
        path = path.absolute()
        if any(archive.path == path for archive in self.archives):
            raise ValueError(f"archive (={path}) is given twice; give each archive once")
        self.archives.append(Archive(path, path.stat().st_size, fingerprint(path), "tar", nested))
        return len(self.archives) - 1

    def run(self, function: Callable[..., Part], tasks: Sequence[tuple[Any, ...]], sizes: list[int], stage: str) -> list[Part]:
        """Scan tasks of so many bytes in processes; parts in the order of the tasks."""
        self.progress.expect(stage, sum(sizes))
        parts = []
        jobs = max(1, min(self.jobs, sum(sizes) // PARALLEL_BYTES))
        for part, size in zip(in_processes(function, tasks, jobs), sizes, strict=True):
            self.progress.advance(len(part.rows), size)
            parts.append(part)
        return parts

    def nested(self, path: Path) -> Part:
        """The labelled images of a train tar of `<wnid>.tar`, by class; the inner tars' names are the classes if none are set."""
        inner, odd = self._inner_tars(path)
        self.classes = self.classes or [ClassInfo(wnid, "") for wnid in sorted(inner)]
        labels = label_of(self.classes)
        unknown = sorted(set(inner) - set(labels))
        if unknown:
            raise ValueError(f"class (={unknown[0]}) of {path} is not in the devkit, nor are {len(unknown) - 1} more; "
                             f"give the devkit that belongs to this archive")
        position = self.add_archive(path, nested=True)
        tars = [inner[wnid] for wnid in sorted(inner)]
        parts = self.run(scan_inner, [(path, self.crc, tar, self.keep_names) for tar in tars], [tar.size for tar in tars],
                         f"train {path.name}")
        for wnid, part in zip(sorted(inner), parts, strict=True):
            part.rows["label"], part.rows["archive"] = labels[wnid], position
            part.odd = [replace(entry, name=f"{wnid}/{entry.name}") for entry in part.odd]
        whole = joined(parts)
        whole.odd += odd
        return whole

    @staticmethod
    def _inner_tars(path: Path) -> tuple[dict[str, Member], list[Oddity]]:
        """wnid → inner tar, and what else is in the archive. Raises ArchiveError."""
        inner: dict[str, Member] = {}
        odd = []
        with open_tar(path) as outer:
            for member in walk(outer):
                if member.kind == "directory":
                    continue
                if member.kind != "file" or not member.name.endswith(".tar") or is_apple_double(member.name):
                    odd.append(Oddity(member.name, "not an inner tar"))
                    continue
                refuse_compressed(outer.at(member.offset, min(8, member.size)),
                                  f"inner tar (={member.name}) of {path} at offset {member.offset}", member.name)
                wnid = member.name.rpartition("/")[2][:-4]
                if wnid in inner:
                    raise ArchiveError(f"inner tar (={member.name}) of {path} at offset {member.header} is there "
                                       f"twice; repack the archive with one tar a class")
                inner[wnid] = member
        if not inner:
            raise ArchiveError(f"archive (={path}) holds no <wnid>.tar; for class folders of images: build classes")
        return inner, odd

    def members(self, path: Path) -> list[Member]:
        """All members of a flat tar, with progress."""
        with open_tar(path) as source:
            self.progress.expect(f"listing {path.name}", source.size)
            members: list[Member] = []
            done = 0
            for member in walk(source):
                members.append(member)
                if len(members) % CHUNK == 0:
                    self.progress.advance(0, member.offset - done)
                    done = member.offset
            self.progress.advance(0, source.size - done)
        return members

    def flat(self, position: int, members: list[Member], stage: str) -> Part:
        """The images among the members of archive `position`, in archive order, named; later duplicates win."""
        archive = self.archives[position]
        kept = is_last_of_its_name([member.name for member in members])
        odd = [Oddity(member.name, DUPLICATE)
               for member, is_kept in zip(members, kept) if not is_kept and member.kind == "file"]
        members = [member for member, is_kept in zip(members, kept) if is_kept]
        chunks = [members[i:i + CHUNK] for i in range(0, len(members), CHUNK)]
        tasks = [(archive.path, self.crc, chunk) for chunk in chunks]
        whole = joined(self.run(scan_files if archive.is_folder else scan_members, tasks,
                                [sum(member.size for member in chunk) for chunk in chunks], stage))
        whole.rows["archive"] = position
        whole.odd += odd
        return whole

    def flat_tar(self, path: Path, kind: str) -> Part:
        members = self.members(path)
        return self.flat(self.add_archive(path), members, f"{kind} {path.name}")

    def add_by_name(self, split: str, path: Path, labels: np.ndarray | None) -> None:
        """Add a val or test tar sorted by base name, in whatever folders it is arranged; labels[i] belongs to the i-th."""
        part = self.flat_tar(path, split)
        if not len(part.rows):
            raise ArchiveError(f"archive (={path}) holds no images; give the {split} archive")
        if labels is not None and len(labels) != len(part.rows):
            raise ValueError(f"{split} archive (={path}) has {len(part.rows)} images but the ground truth {len(labels)} lines; "
                             f"give the whole archive and the ground truth that belongs to it")
        rows = base_names(part, path)
        self.parts[split] = part = part.take(np.array([rows[base] for base in sorted(rows)]))
        if labels is not None:
            part.rows["label"] = labels

    def add_by_split(self, whole: Part, splits: list[str]) -> None:
        """Add labelled, named rows by their splits: train sorted by class (stable: archive order), val and test by name."""
        names, labels = whole.names or [], whole.rows["label"].tolist()
        rowless = [odd for odd in whole.odd if odd.row < 0]
        whole.odd = [odd for odd in whole.odd if odd.row >= 0]
        for split in SPLITS:
            rows = [row for row, name in enumerate(splits) if name == split]
            rows.sort(key=(labels if split == "train" else names).__getitem__)
            if rows:
                self.parts[split] = whole.take(np.array(rows))
        self.add_oddities(rowless)

    def add_oddities(self, odd: list[Oddity]) -> None:
        """Oddities that belong to no row, for the first split."""
        if self.parts:
            next(iter(self.parts.values())).odd += odd

    def write(self) -> str:
        """Join the splits, write the index; returns its SHA-256."""
        splits = [split for split in SPLITS if split in self.parts]
        oddities: list[dict[str, Any]] = []
        first = 0
        for code, split in enumerate(splits):
            part = self.parts[split]
            part.rows["split"] = code
            oddities += [{"name": odd.name, "split": split, "reason": odd.reason, "kept": odd.kept,
                          "id": odd.row + first if odd.row >= 0 else None} for odd in part.odd]
            first += len(part.rows)
        if not first:
            raise ValueError(f"archives (={', '.join(str(a.path) for a in self.archives)}) hold no images; nothing was written")
        rows = np.concatenate([self.parts[split].rows for split in splits])
        oddities.sort(key=lambda entry: (entry["id"] is None, entry["id"] or 0))
        return write_index(self.out, rows, classes=self.classes, archives=self.archives, splits=splits, preset=self.preset,
                           crc32=self.crc, oddities=oddities, names=self.names, force=self.force)
