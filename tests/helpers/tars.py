"""Tar archives for tests, headers made by hand where tarfile would not write them."""
import io
import tarfile
from pathlib import Path


def block(name: bytes, size: int | bytes = 0, kind: bytes = b"0", magic: bytes = b"ustar\x0000",
          prefix: bytes = b"") -> bytes:
    """One header block with a right checksum. `size` as bytes goes into its field as it is."""
    field = b"%011o\0" % size if isinstance(size, int) else size.ljust(12, b"\0")
    head = (name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field + b"00000000000\0" + b" " * 8 + kind
            + bytes(100) + magic + bytes(32 + 32 + 16) + prefix.ljust(155, b"\0")).ljust(512, b"\0")
    assert len(head) == 512
    return head[:148] + b"%06o\0 " % sum(head) + head[156:]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def member(name: bytes, data: bytes, **header: object) -> bytes:
    return block(name, len(data), **header) + padded(data)  # type: ignore[arg-type]


def pax(records: dict[str, str], kind: bytes = b"x") -> bytes:
    text = b""
    for key, value in records.items():
        body = f" {key}={value}\n".encode()
        length = len(body) + 1
        while len(str(length)) + len(body) != length:
            length += 1
        text += str(length).encode() + body
    return member(b"PaxHeaders/x", text, kind=kind)


END = bytes(1024)


def tar_bytes(files: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar as tarfile writes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def save(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
