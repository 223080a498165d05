"""Walk a tar archive, or a tar inside one, guarded: offset and size of every member, or an error that names the damage.

Python's `tarfile` ends a walk quietly at a damaged header and loops on a crafted one. Here every header's checksum is verified,
every length is bounded, the end-of-archive mark is required, and whatever is not a plain file, a folder, a link or a device is an
`ArchiveError`. Formats: v7, ustar (POSIX.1-1988), GNU (long names, base-256 numbers), PAX (path, size). A block is 512 bytes; a
member is one header block (after any extension headers), then its bytes, padded to whole blocks; two zero blocks end the archive.
"""
import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

BLOCK = 512
MAX_EXTENSION_BYTES = 1 << 20  # a long name or a PAX record; real ones are a few hundred bytes
MAX_EXTENSIONS = 8  # extension headers before one member; tar writes at most 4
MAX_ZERO_TAIL = 1 << 20  # zeros after the end mark; more looks like a pre-allocated, unfinished download
FINGERPRINT_BYTES = 64 << 10

_ZERO = bytes(BLOCK)
_KINDS = {b"0": "file", b"\0": "file", b"7": "file", b"5": "directory", b"1": "link", b"2": "link",
          b"3": "device", b"4": "device", b"6": "device", b"V": "label"}
_COMPRESSED = {b"\x1f\x8b": ("gzip", "gunzip -k"), b"BZh": ("bzip2", "bunzip2 -k"), b"\xfd7zXZ\0": ("xz", "unxz -k"),
               b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"), b"PK\x03\x04": ("zip", "unzip, then index the folder of")}


class ArchiveError(ValueError):
    """An archive that cannot be listed completely. Names archive, member and offset."""


def _damaged(problem: str) -> ArchiveError:
    return ArchiveError(f"{problem}; the archive is damaged, fetch it again")


class Member(NamedTuple):
    """One member: its data is bytes [offset, offset + size) of the file on disk, its first header lies at `header`."""
    name: str
    kind: str  # "file" | "directory" | "link" | "device"
    offset: int
    size: int
    header: int


class ByteWindow(AbstractContextManager["ByteWindow"]):
    """Random reads from one file through a window of `window` bytes, by `pread` (a bad disk: OSError, not SIGBUS)."""

    def __init__(self, path: str | Path, window: int = 16 << 10) -> None:
        self.path, self.window = Path(path), window
        self._start, self._bytes, self._file = 0, b"", -1
        self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._file).st_size

    def at(self, offset: int, count: int) -> bytes:
        """Bytes [offset, offset + count) of the file; fewer only past its end."""
        first = offset - self._start
        if first < 0 or first + count > len(self._bytes):
            self._bytes = self._read(offset, max(count, self.window))
            self._start, first = offset, 0
        return self._bytes[first:first + count]

    def _read(self, offset: int, count: int) -> bytes:
        parts = []
        try:
            while count > 0 and (part := os.pread(self._file, count, offset)):  # one pread returns at most 2 GiB
                parts.append(part)
                offset, count = offset + len(part), count - len(part)
        except OSError as error:
            error.filename = str(self.path)
            raise
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    __del__ = close

    def __exit__(self, *error: object) -> None:
        self.close()


def open_tar(path: str | Path, window: int = 16 << 10) -> ByteWindow:
    """Open an outer archive for `walk`. Raises ArchiveError when it is missing, empty, compressed or no file."""
    if not Path(path).is_file():
        problem = "is not a file" if Path(path).exists() else "does not exist"
        raise ArchiveError(f"archive (={path}) {problem}; give the path of an uncompressed tar file")
    try:
        source = ByteWindow(path, window)
    except PermissionError:
        raise ArchiveError(f"archive (={path}) cannot be read; give yourself read permission") from None
    if source.size == 0:
        raise ArchiveError(f"archive (={path}) is empty (0 bytes); fetch it again")
    refuse_compressed(source.at(0, 8), f"archive (={path})", str(path))
    return source


def refuse_compressed(head: bytes, archive: str, name: str) -> None:
    """Raise ArchiveError when an archive, of which these are the first 8 bytes, is compressed."""
    for magic, (method, command) in _COMPRESSED.items():
        if head.startswith(magic):
            raise ArchiveError(f"{archive} is {method}-compressed, so its members have no fixed place; "
                               f"decompress it first: {command} {name}")


def fingerprint(path: str | Path) -> str:
    """SHA-256 (hex) of a file's size and its first and last 64 KiB: cheap, and sees a cut or a replaced archive."""
    with ByteWindow(path, FINGERPRINT_BYTES) as source:
        digest = hashlib.sha256(str(source.size).encode())
        digest.update(source.at(0, FINGERPRINT_BYTES))
        digest.update(source.at(max(0, source.size - FINGERPRINT_BYTES), FINGERPRINT_BYTES))
    return digest.hexdigest()


def walk(source: ByteWindow, start: int = 0, end: int | None = None, inside: str = "") -> Iterator[Member]:
    """Every member of the tar in bytes [start, end) of `source`, in archive order; `inside` names the inner tar in messages.

    Raises ArchiveError on a damaged header, a sparse or multi-volume member, a member beyond `end`, no end-of-archive mark, or
    bytes behind it. Links and devices are reported, not followed. Each turn moves a block ahead or more, so a walk always ends.
    """
    end = source.size if end is None else end
    archive = f"{source.path}" if not inside else f"{inside} in {source.path}"
    position = first = start  # of this header block, and of the first one of the member
    long_name: str | None = None
    long_size: int | None = None
    extensions = 0
    while True:
        if position + BLOCK > end:
            raise ArchiveError(f"archive (={archive}) ends at offset {end} without its end-of-archive mark (two zero "
                               f"blocks), so members are missing; it is truncated, fetch it again")
        block = source.at(position, BLOCK)
        if block == _ZERO:
            if extensions:
                raise _damaged(f"extended header (of {archive}) at offset {first} is followed by no member")
            _check_end(source, position, end, archive)
            return
        _check_sum(block, position, archive, position == start)
        context = f"of {archive} at offset {position}"
        data = position + BLOCK
        type_byte = block[156:157]
        size = _number(block[124:136], position, archive)
        if type_byte in b"LKxgX":
            extensions += 1
            if size > MAX_EXTENSION_BYTES or extensions > MAX_EXTENSIONS:
                raise _damaged(f"extended header (={type_byte.decode()!r}, {size} bytes, number {extensions}) {context} exceeds "
                               f"{MAX_EXTENSION_BYTES} bytes or {MAX_EXTENSIONS} in a row")
            _check_fits("extended header", type_byte.decode(), data, size, end, archive)
            name, new_size = _read_extension(type_byte, source.at(data, size), context)
            if name is not None and long_name is not None:
                raise _damaged(f"member (={name}) {context} has two long names")
            long_name = name if name is not None else long_name
            long_size = new_size if new_size is not None else long_size
            position = data + _padded(size)
            if type_byte == b"g":  # stands alone; may come before the end mark
                extensions -= 1
                first = first if extensions else position
            continue
        name = long_name if long_name is not None else _name(block)
        size = long_size if long_size is not None else size
        kind = _KINDS.get(type_byte)
        if not name or "\0" in name:
            raise _damaged(f"member (={name!r}) {context} has no usable name")
        if kind is None:
            problem = {b"S": "is sparse (its holes are not stored)", b"M": "continues another volume"}.get(
                type_byte, f"has the unknown type {type_byte!r}")
            raise ArchiveError(f"member (={name}) {context} {problem}, so its bytes do not lie in one piece; extract the archive "
                               "and index the folder")
        if kind == "file" and name.endswith("/"):  # v7 has no type for folders
            kind = "directory"
        if kind != "file" and size:
            raise _damaged(f"member (={name}) {context} is a {kind} of {size} bytes, which must be 0")
        _check_fits("member", name, data, size, end, archive)
        if kind != "label":
            yield Member(name[2:] if name.startswith("./") and len(name) > 2 else name, kind, data, size, first)
        position = first = data + _padded(size)
        long_name = long_size = None
        extensions = 0


def read_member(source: ByteWindow, header: int) -> Member:
    """The one member whose first header block lies at `header`. Raises ArchiveError when there is none."""
    for member in walk(source, header):
        return member
    raise ArchiveError(f"archive (={source.path}) has no member at offset {header}; rebuild the index")


def _padded(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK * BLOCK


def _name(block: bytes) -> str:
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:  # GNU ("ustar ") keeps other things in the prefix field
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _check_sum(block: bytes, position: int, archive: str, is_first: bool) -> None:
    total = sum(block[:148]) + sum(block[156:]) + 256  # the field itself counts as 8 spaces
    try:
        stored = int(block[148:156].split(b"\0", 1)[0].decode("ascii").strip(" "), 8)
    except ValueError:
        stored = -1
    if stored != total:
        advice = "it is no tar archive, or damaged at its start" if is_first else "it is damaged"
        raise ArchiveError(f"header (of {archive}) at offset {position} has checksum {stored if stored >= 0 else 'none'} "
                           f"but its bytes sum to {total}; {advice}: fetch it again")


def _number(field: bytes, position: int, archive: str) -> int:
    """The size of a member: octal digits, or base 256 when the first byte is 0x80 (GNU)."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if not digits:
        return 0
    if digits.isdigit() and b"8" not in digits and b"9" not in digits:
        return int(digits, 8)
    raise _damaged(f"size (={field!r}) in {archive} at offset {position} is not a number from 0 up")


def _check_fits(thing: str, name: str, data: int, size: int, end: int, archive: str) -> None:
    if data + size > end:
        raise ArchiveError(f"{thing} (={name}) of {archive} at offset {data} needs {size} bytes but the archive ends at "
                           f"{end}; it is truncated, fetch it again")


def _check_end(source: ByteWindow, position: int, end: int, archive: str) -> None:
    """From the first zero block on: a second one, then nothing but a bounded padding of zeros."""
    tail = end - position
    if tail < 2 * BLOCK:
        raise ArchiveError(f"archive (={archive}) ends at offset {end} inside its end-of-archive mark (two zero blocks); "
                           f"it is truncated, fetch it again")
    if any(source.at(position, min(tail, MAX_ZERO_TAIL))):
        raise ArchiveError(f"archive (={archive}) has bytes after its end-of-archive mark at offset {position}: tars "
                           f"joined together, or a damaged header; split or repack it (tar --ignore-zeros lists it)")
    if tail > MAX_ZERO_TAIL:
        raise ArchiveError(f"archive (={archive}) ends with {tail} zero bytes from offset {position}, more than "
                           f"{MAX_ZERO_TAIL}: an unfinished download; fetch it again")


def _read_extension(type_byte: bytes, payload: bytes, context: str) -> tuple[str | None, int | None]:
    """Name and size that an extension header gives to the next member: GNU (L), or PAX records `<length> <key>=<value>\\n`."""
    if type_byte == b"K":  # the target of a long link: links are not followed
        return None, None
    if type_byte == b"L":
        return payload.split(b"\0", 1)[0].decode("utf-8", "surrogateescape"), None
    name: str | None = None
    size: int | None = None
    payload = payload.rstrip(b"\0")
    while payload:
        digits, space, _ = payload[:20].partition(b" ")
        length = int(digits) if digits.isdigit() and space else 0
        record = payload[len(digits) + 1:length]
        key, equals, value = record.partition(b"=")
        if length < len(digits) + 4 or length > len(payload) or not equals or record[-1:] != b"\n":
            raise _damaged(f"PAX record (={payload[:32]!r}) {context} is malformed")
        value = value[:-1]
        is_global = type_byte == b"g"
        if key.startswith(b"GNU.sparse") or (is_global and key in (b"path", b"size")):
            described = "a path or size for all members" if is_global else "a sparse file"
            raise ArchiveError(f"PAX record (={key.decode('ascii', 'replace')}) {context} describes {described}, which cannot be "
                               "indexed in place; extract the archive and index the folder")
        if key == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            if not value.isdigit() or len(value) > 19:
                raise _damaged(f"PAX size (={value!r}) {context} is not a number from 0 up")
            size = int(value)
        payload = payload[length:]
    return name, size
