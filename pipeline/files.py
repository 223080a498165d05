"""Atomic files and folders, file locks, SHA-256 and JSON manifests: how everything that must survive a crash is written.

A file or folder under way is a temporary: a hidden sibling named by host and process, which its writer keeps locked (`flock`).
The kernel drops the lock when the writer dies, however it dies, so a temporary whose lock is free is garbage (`remove_dead`).
A manifest is a JSON object with an entry {"size", "sha256"} for each file it vouches for; it may also carry a hash of itself.
"""
import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.io_errors import reading, writing
from pipeline.schema import Count, FileName, Sha256, read_as


class LockHeld(RuntimeError):
    """A lock that another process holds; the message says which process ("pid 12 on host since …", or "another process")."""


def is_temporary(path: Path, name: str = "") -> bool:
    """Whether a file or folder is called like a temporary of this module (that will become `name`)."""
    return re.fullmatch(rf"\.{re.escape(name) or '.+'}\.[^.]*\.\d+\.[0-9a-f]{{8}}\.tmp", path.name) is not None


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write that becomes `path` in one rename, on disk, at the end; on an exception nothing remains.

    Any number of processes on any number of hosts may write the same path at once: the last one wins.
    """
    with contextlib.suppress(OSError):
        remove_dead(path.parent, path.name)  # of a writer that was killed
    temporary, descriptor = _create_temporary(path, is_folder=False)
    try:
        with writing(path, temporary), open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes `path` in one rename, on disk, at the end; on an exception nothing remains.

    `path.parent` must exist. Raises OSError, also when by then `path` is there and is no empty folder.
    """
    with contextlib.suppress(OSError):
        remove_dead(path.parent, path.name)  # of a writer that was killed
    temporary, descriptor = _create_temporary(path, is_folder=True)
    try:
        with writing(path, temporary):
            yield temporary
            sync_tree(temporary)
            os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)
    sync(path.parent)


def remove_dead(folder: Path, name: str = "") -> list[Path]:
    """Remove the temporaries in `folder` whose writers are dead, all or those of `name`; returns them."""
    removed = []
    for temporary in sorted(path for path in folder.iterdir() if is_temporary(path, name)):
        with contextlib.suppress(OSError):  # gone by now, its writer lives, or the file system has no locks
            descriptor = os.open(temporary, os.O_RDONLY if temporary.is_dir() else os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if temporary.is_dir():
                    shutil.rmtree(temporary)
                else:
                    temporary.unlink()
            finally:
                os.close(descriptor)
            removed.append(temporary)
    return removed


def _create_temporary(path: Path, is_folder: bool) -> tuple[Path, int]:
    """A new temporary for `path` and a descriptor of it, which holds its lock until it is closed."""
    host = socket.gethostname().partition(".")[0]
    while True:
        temporary = path.with_name(f".{path.name}.{host}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        try:
            if is_folder:
                temporary.mkdir()
                with _removed_on_error(temporary):
                    descriptor = os.open(temporary, os.O_RDONLY)
            else:
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            continue
        except FileNotFoundError:  # `remove_dead` was quicker, between mkdir and open; or there is no parent
            if not path.parent.is_dir():
                raise
            continue
        with contextlib.suppress(OSError):  # a file system without locks: then nobody removes it either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with _removed_on_error(temporary):
            if temporary.exists():  # `remove_dead` was not quicker
                return temporary, descriptor
        os.close(descriptor)


@contextlib.contextmanager
def _removed_on_error(temporary: Path) -> Iterator[None]:
    try:
        yield
    except OSError:
        with contextlib.suppress(OSError):
            (os.rmdir if temporary.is_dir() else os.unlink)(temporary)
        raise


def sync(path: Path) -> None:
    """fsync a file's bytes, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with reading(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """fsync a folder and everything below it."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def lock(path: Path, *, wait: bool = False) -> BinaryIO:
    """Take the exclusive lock of the lock file `path`, which is created, holds the name of its holder, and stays for good.

    The lock is free again when the returned file is closed (it is a context manager) and no child process has inherited it. On a
    file system without locks nobody is kept out. Raises LockHeld when another process has it, unless told to `wait`.
    """
    file = open(path, "a+b", buffering=0)  # not "w": the name of the holder must stay until the lock is ours
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.seek(0)
        holder = file.read(200).decode(errors="replace").strip()
        file.close()
        raise LockHeld(holder or "another process") from None
    except OSError:  # a file system without locks
        pass
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
    return file


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold the exclusive lock of a folder itself, waiting for it; on a file system without such locks nobody is kept out."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    with reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(content: Any) -> str:
    """SHA-256 (hex) of a value as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class FileEntry:
    """Schema of what a manifest holds of a file."""
    size: Count  # bytes
    sha256: Sha256


def file_entries(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """File name → {"size": bytes, "sha256": hex}, for the "files" of a manifest."""
    return {name: {"size": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)} for name in names}


def difference(path: Path, entry: Mapping[str, Any]) -> str:
    """How a file differs from its manifest entry, as a predicate for a message; "" when it does not. The SHA-256 is computed only
    where the size is right. Raises OSError when a file that is there cannot be read."""
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != entry["size"]:
        return f"has {size} bytes, was written with {entry['size']}"
    if (sha256 := file_sha256(path)) != entry["sha256"]:
        return f"has SHA-256 {sha256[:16]}…, was written with {str(entry['sha256'])[:16]}…"
    return ""


def stamp(path: Path, sha256: str) -> list[Any]:
    """What changes whenever a file is written, with the hash that its content was compared with; [] when it is not there."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return []
    return [sha256, status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def remember(memory: Path, stamps: Mapping[str, list[Any]]) -> None:
    """Keep stamps, taken before their files were read and found right, for `recalled`; where they can be kept."""
    if all(each[-1] < time.time_ns() - 2_000_000_000 for each in stamps.values()):  # a write in the same tick leaves the times
        with contextlib.suppress(OSError):
            write_json(memory, stamps)


def recalled(memory: Path) -> dict[str, list[Any]]:
    """The stamps that `remember` kept; {} when there are none."""
    try:
        return read_as(dict[str, list[Any]], read_json(memory), "stamps")
    except (OSError, ValueError):
        return {}


def write_json(path: Path, content: Any, *, newline: bool = True) -> None:
    """Write a value as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode() + (b"\n" if newline else b""))


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError, a predicate."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # nested too deep
        raise ValueError("is not JSON") from None


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises OSError, which names it, and ValueError, a predicate."""
    with reading(path):
        return parse_json(path.read_bytes())


_LINE = re.compile(rb'(.+), "crc32": "([0-9a-f]{8})"}')


def json_line(values: Mapping[str, Any]) -> bytes:
    """A line of a file of JSON lines. Its last key is `crc32`, of the line without it, which `parse_line` compares."""
    text = json.dumps(values, allow_nan=False).encode()
    return text[:-1] + b', "crc32": "%08x"}\n' % zlib.crc32(text)


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The values of a line that `json_line` made, or of one without a CRC-32, as earlier versions wrote them; None when it is
    none, or is not as it was written."""
    if checked := _LINE.fullmatch(line):
        line = checked[1] + b"}"
        if zlib.crc32(line) != int(checked[2], 16):
            return None
    try:
        values = parse_json(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def with_own_hash(manifest: Mapping[str, Any], key: str = "sha256") -> dict[str, Any]:
    """The manifest and, under `key`, the hash of all its other keys."""
    return {**manifest, key: json_sha256(manifest)}


def read_manifest(path: Path, *, own_hash: bool = False, hash_if_any: str = "") -> dict[str, Any]:
    """Read a JSON object; with `own_hash` one that `with_own_hash` made, returned without its hash. `hash_if_any`: key of a hash
    that older ones lack.

    Its "files", where it has any, are bare names with a size and a hash. Raises OSError, and ValueError when it is no JSON
    object, breaks that, or was altered: a predicate like that of `difference`.
    """
    manifest = read_json(path)
    if not isinstance(manifest, dict):
        raise ValueError("is not a JSON object")
    key = hash_if_any if hash_if_any in manifest else "sha256" if own_hash else ""
    if key and manifest.pop(key, None) != json_sha256(manifest):
        raise ValueError("does not match its SHA-256, so it was altered")
    if manifest.get("files") is not None:
        try:
            read_as(dict[FileName, FileEntry], manifest["files"], "files")
        except ValueError as error:
            raise ValueError(f"is not as it was written: {error}") from None
    return manifest
