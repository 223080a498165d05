"""A folder tree of images as an archive: its files in sorted order, their names packed for names.bin."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Sequence

from pipeline.index.tar import Member
from pipeline.index.image_header import is_image_name
from pipeline.index.sample_index import Archive
from pipeline.index.scan import Odd


def list_folder(path: Path) -> tuple[list[Member], bytes, list[Odd]]:
    """Image files below `path` sorted by path, names.bin, and files that are not called images.

    A member's `header` is the place of its name in names.bin. Symbolic links are followed. Raises ValueError on a
    folder that contains itself.
    """
    names: list[tuple[str, int]] = []
    odd: list[Odd] = []
    _list(path, "", (), names, odd)
    names.sort()
    members, packed = [], bytearray()
    for name, size in names:
        members.append(Member(name, "file", 0, size, len(packed)))
        packed += os.fsencode(name) + b"\0"
    return members, bytes(packed), odd


def _list(folder: Path, prefix: str, above: tuple[tuple[int, int], ...], names: list[tuple[str, int]],
          odd: list[Odd]) -> None:
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise ValueError(f"folder (={folder}) is a link to a folder above it, so the tree has no end; remove the link")
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = prefix + entry.name
            if entry.is_dir():
                before = len(names)
                _list(folder / entry.name, name + "/", (*above, here), names, odd)
                if len(names) == before:
                    odd.append(Odd(-1, name + "/", "a folder without images", False))
            elif not entry.is_file():
                odd.append(Odd(-1, name, "a dangling link or a device, not a file", False))
            elif not is_image_name(name):
                odd.append(Odd(-1, name, "not called an image", False))
            else:
                names.append((name, entry.stat().st_size))


def folder_archive(path: Path, members: Sequence[Member]) -> Archive:
    """The folder as an Archive: bytes of all images; the fingerprint covers their names and sizes."""
    digest = hashlib.sha256()
    for member in members:
        digest.update(os.fsencode(member.name) + b"\0%d\0" % member.size)
    return Archive(path.absolute(), sum(member.size for member in members), digest.hexdigest(), "folder")
