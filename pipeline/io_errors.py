"""What an error of the operating system means, for all commands: `explain` gives thing, cause and remedy on one line.

`writing` sees to it that an error has what that needs: the name of the file, and the full disk that a library does not tell of.
"""
import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

FULL_BYTES = 1 << 20  # a disk with less free counts as full
_ROOM = "make room there, or name another place"
_PROCESSES = "end other programs, or raise the limit (ulimit -u)"
_NETWORK = "run the same command again when the server answers"
# errno → what it means for the file or folder named, and what to do. None of these says anything about its content.
CAUSES = {
    errno.ENOSPC: ("cannot be written: the disk is full", _ROOM),
    errno.EDQUOT: ("cannot be written: your quota on this disk is used up", _ROOM),
    errno.EFBIG: ("cannot be written: files may not grow so large here (ulimit -f, or the file system)",
                  "raise the limit, or name another place"),
    errno.EROFS: ("cannot be written: its disk is mounted read-only", "name another place"),
    errno.EACCES: ("may not be read or written by this user",
                   "change its permissions and those of the folders above it, or name another"),
    errno.ENOENT: ("is not there", "correct the name, restore it, or mount the disk it lies on"),
    errno.ENOTDIR: ("lies below a file, which is no folder", "correct the name"),
    errno.EISDIR: ("is a folder, not a file", "give a file"),
    errno.EEXIST: ("is there already", "give another name"),
    errno.ENAMETOOLONG: ("has too long a name", "give a shorter one"),
    errno.ELOOP: ("is a link that leads to itself", "correct the link"),
    errno.EMFILE: ("cannot be opened: this process has as many files open as it may", "raise the limit (ulimit -n 65536)"),
    errno.ENFILE: ("cannot be opened: this machine has as many files open as it may", "end other programs, or raise fs.file-max"),
    errno.EAGAIN: ("cannot be started: this user has as many processes and threads as it may, or memory is used up", _PROCESSES),
    errno.ENOMEM: ("cannot be opened or read: memory is used up", "end other programs"),
    errno.EIO: ("cannot be read or written now: its disk reports an error (EIO)",
                "look into dmesg, then run the same command again, or restore it on another disk"),
    errno.ESTALE: ("cannot be reached: the file server has replaced it (ESTALE)", "mount its disk again"),
    **dict.fromkeys((errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN, errno.ECONNREFUSED, errno.ECONNRESET),
                    ("cannot be reached: the file server does not answer", _NETWORK)),
}
CAUSES[errno.ENOTEMPTY], CAUSES[errno.EPERM] = CAUSES[errno.EEXIST], CAUSES[errno.EACCES]


def explain(error: OSError, path: str | Path | None = None) -> str:
    """What an error of the operating system means, on one line: `<thing> (=path) <cause>; <what to do>`. `path`: of what could
    not be read or written, where the error does not name it."""
    named = path if error.filename is None else error.filename
    if error.errno not in CAUSES:
        if error.errno is None:  # a library's own text
            return " ".join(str(error).split())
        reason = " ".join(str(error.strerror).split())
        cause, remedy = f"cannot be used ({reason})", "look into dmesg, then run the same command again"
    else:
        cause, remedy = CAUSES[error.errno]
    if not isinstance(named, (str, bytes, Path)):
        return f"{'the current folder' if error.errno == errno.ENOENT else 'a file or folder'} {cause}; {remedy}"  # of getcwd(2)
    return f"{'folder' if os.path.isdir(named) else 'file'} (={os.fsdecode(named)}) {cause}; {remedy}"


def in_words(error: BaseException) -> str:
    """An error on one line; as `explain` has it where it is one of the operating system."""
    return explain(error) if isinstance(error, OSError) else " ".join(str(error).split()) or type(error).__name__


def is_full(path: Path) -> bool:
    """Whether the disk of a path, which need not exist, has no room or no inodes left."""
    try:
        disk = os.statvfs(next(folder for folder in (path, *path.absolute().parents) if folder.exists()))
    except OSError:
        return False  # not known
    return disk.f_bavail * disk.f_frsize < FULL_BYTES or (disk.f_files > 0 and disk.f_favail == 0)


def _has_grown_too_large(under_way: Path) -> bool:
    """Whether a file, or one of a folder, is as large as this process may make files (ulimit -f)."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if most == resource.RLIM_INFINITY:
        return False
    try:
        return any(path.stat().st_size >= most for path in (under_way, *under_way.rglob("*")) if path.is_file())
    except OSError:  # another process of the run is removing it: the error at hand is the one to be told
        return False


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Around the use of an open `path`: what fails is an OSError that names it, which read(2), mmap(2) and fsync(2) do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def writing(path: Path, under_way: Path | None = None) -> Iterator[None]:
    """Around the writing of `path` (by way of the temporary `under_way`): what fails is an OSError that names it.

    write(2) does not name a file; and torch and others hide a full disk behind a RuntimeError, so the disk is asked here, before
    whoever is around this removes what was written.
    """
    try:
        yield
    except OSError as error:
        hidden = under_way is not None and os.fsdecode(error.filename or "").startswith(os.fspath(under_way))
        if hidden or (error.filename is None and error.errno in CAUSES):  # `reading` names what is read meanwhile
            error.filename, error.filename2 = os.fspath(path), None
        raise
    except RuntimeError as error:
        if number := errno.ENOSPC if is_full(path) else errno.EFBIG if under_way and _has_grown_too_large(under_way) else 0:
            raise OSError(number, os.strerror(number), os.fspath(path)) from error
        raise
