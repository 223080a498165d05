"""A file that is there whole or not at all, and temporaries that tell whether their writer still lives.

A temporary is a hidden sibling named by host and process, locked (`flock`) as long as it is written; the kernel drops the lock
when its writer dies, however. Whoever obtains the lock of a temporary has found what a dead process left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path
from typing import BinaryIO, Iterator


def is_temporary(path: Path) -> bool:
    """Whether a file is called like a temporary of `replacing`."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


@contextlib.contextmanager
def replacing(path: Path, *, keep: bool = False) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` in one rename, on disk, at the end; on an exception nothing remains.

    Any number of processes of any number of hosts may do so at once: the last one wins, with `keep` the first. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    file = _locked(temporary)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if keep:
                _keep(temporary, path)
            else:
                os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names of a folder's files on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _keep(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        os.replace(temporary, path)
        return
    temporary.unlink()


def _locked(temporary: Path) -> BinaryIO:
    while True:
        file = open(temporary, "wb")
        try:
            with contextlib.suppress(OSError):  # a file system without locks: then nobody removes it either
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.stat(temporary).st_ino == os.fstat(file.fileno()).st_ino:
                return file
        except FileNotFoundError:  # `remove_dead` was quicker, between our open and our lock
            pass
        file.close()


def remove_dead(folder: Path) -> list[Path]:
    """Remove the temporaries of `replacing` in a folder whose writers are dead; returns them."""
    removed = []
    for temporary in sorted(folder.iterdir()):
        if not is_temporary(temporary) or not temporary.is_file():
            continue
        with contextlib.suppress(OSError), open(temporary, "rb") as file:  # gone by now, or its writer lives
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            temporary.unlink()
            removed.append(temporary)
    return removed
