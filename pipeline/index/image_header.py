"""Width, height, channels and format of an image from its header, without decoding it.

JPEG (walks the segments to the start-of-frame), PNG, GIF, WebP, BMP; gzip is recognised so that it can be named. The
reading is as forgiving as libjpeg's: bytes of rubbish between segments are skipped, EXIF is not looked into.
"""
from struct import error as StructError
from struct import unpack_from
from typing import NamedTuple

from pipeline.index.sample_index import FORMATS, REASONS

MAX_PIXELS = 100_000_000  # 300 MB decoded; the largest image of ILSVRC has 7056 × 4488 = 32 million
HEAD_BYTES = 4096  # holds the header of most images; `probe` asks for all of the bytes otherwise
FORMAT_CODE = {name: code for code, name in enumerate(FORMATS)}
_SUFFIX_FORMAT = {"jpg": "jpeg", "jpeg": "jpeg", "jpe": "jpeg", "png": "png", "gif": "gif", "webp": "webp", "bmp": "bmp"}
_DECODABLE_SOF = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)  # baseline, extended, progressive; arithmetic too


class ImageInfo(NamedTuple):
    """What a header says. `problem` is a name of REASONS ("" when the header can be read)."""
    format: str
    width: int
    height: int
    channels: int
    problem: str


class NeedMore(Exception):
    """The header does not end within the bytes given."""


def probe(data: bytes, complete: bool) -> ImageInfo:
    """Read the header of an image from its first bytes (30 or more). `complete`: `data` is the whole image.

    Raises NeedMore when it is not and the header does not end within it.
    """
    if not data:
        return ImageInfo("unknown", 0, 0, 0, "empty")
    name, supported = "unknown", True
    try:
        if data[:2] == b"\xff\xd8":
            name = "jpeg"
            width, height, channels, supported = _jpeg(data)
        elif data[:8] == b"\x89PNG\r\n\x1a\n":
            name = "png"
            width, height, kind = unpack_from(">II1xB", data, 16)
            channels = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}.get(kind, 0)
        elif data[:6] in (b"GIF87a", b"GIF89a"):
            name = "gif"
            (width, height), channels, supported = unpack_from("<HH", data, 6), 3, False  # DALI reads no GIF
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            name = "webp"
            width, height, channels = _webp(data)
        elif data[:2] == b"BM" and len(data) > 26:
            name = "bmp"
            layout = "<HH2xH" if unpack_from("<I", data, 14)[0] == 12 else "<ii2xH"
            width, height, depth = unpack_from(layout, data, 18)
            height, channels = abs(height), 4 if depth == 32 else 3
        elif data[:2] == b"\x1f\x8b":
            return ImageInfo("gzip", 0, 0, 0, "gzip")
        else:
            return ImageInfo("unknown", 0, 0, 0, "not_an_image")
    except (IndexError, StructError):  # the header ends after the data
        if not complete:
            raise NeedMore from None
        return ImageInfo(name, 0, 0, 0, "unreadable_header")
    except ValueError:
        return ImageInfo(name, 0, 0, 0, "unreadable_header")
    if width <= 0 or height <= 0 or channels == 0:
        return ImageInfo(name, 0, 0, 0, "unreadable_header")
    problem = "too_large" if width * height > MAX_PIXELS else "" if supported else "unsupported"
    return ImageInfo(name, width, height, channels, problem)


def _jpeg(data: bytes) -> tuple[int, int, int, bool]:
    """(width, height, channels, whether it can be decoded)."""
    at = 2
    while True:
        if data[at] != 0xFF:  # rubbish between segments, as libjpeg skips it
            at = data.find(b"\xff", at)
            if at < 0:
                raise IndexError
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            precision, height, width, components = unpack_from(">BHHB", data, at + 4)
            return width, height, components, (marker in _DECODABLE_SOF and precision == 8 and components in (1, 3, 4))
        if marker in (0xD8, 0xD9, 0xDA):
            raise ValueError("no frame before the scan")
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD7:  # stuffed byte, standalone markers
            at += 2
            continue
        length = data[at + 2] << 8 | data[at + 3]
        if length < 2:
            raise ValueError("segment too short")
        at += 2 + length


def _webp(data: bytes) -> tuple[int, int, int]:
    """(width, height, channels)."""
    kind = data[12:16]
    if kind == b"VP8 ":
        if data[23:26] != b"\x9d\x01\x2a":
            raise ValueError("no start code")
        width, height = unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF, 3
    if kind == b"VP8L":
        bits = unpack_from("<I", data, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, 4 if bits >> 28 & 1 else 3
    if kind == b"VP8X":
        if len(data) < 30:
            raise IndexError
        width, height = int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
        return width, height, 4 if data[20] & 0x10 else 3
    raise ValueError("unknown chunk")


def judge(name: str, info: ImageInfo) -> tuple[int, int]:
    """(position in REASONS, excluded 0 or 1) of an image called `name`."""
    if info.problem:
        return REASONS.index(info.problem), 1
    if info.format == "jpeg" and info.channels == 3 and name.endswith((".JPEG", ".jpg")):  # nearly all of them
        return 0, 0
    if _SUFFIX_FORMAT.get(name.rpartition(".")[2].lower(), info.format) != info.format:
        return REASONS.index("misnamed"), 0
    if info.format == "jpeg" and info.channels == 4:
        return REASONS.index("cmyk"), 0
    return (REASONS.index("grey") if info.channels in (1, 2) else 0), 0


def is_image_name(name: str) -> bool:
    _, dot, suffix = name.lower().rpartition(".")
    return bool(dot) and suffix in _SUFFIX_FORMAT and not is_apple_double(name)


def is_apple_double(name: str) -> bool:
    """Whether a file is called like the metadata that macOS writes beside each file into tars: `._x.JPEG` beside `x.JPEG`."""
    return name.rpartition("/")[2].startswith("._")
