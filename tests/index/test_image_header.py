"""Headers are read as PIL reads them, and nothing that is no image passes for one."""
import gzip
import io
import random
import struct

import numpy as np
import pytest
from PIL import Image

from pipeline.index.image_header import NeedMore, is_image_name, judge, probe
from pipeline.index.sample_index import REASONS

CASES = [("JPEG", "RGB", {}), ("JPEG", "L", {}), ("JPEG", "CMYK", {}), ("JPEG", "RGB", {"progressive": True}),
         ("JPEG", "RGB", {"exif": b"Exif\0\0" + bytes(30_000)}), ("JPEG", "RGB", {"comment": b"\xff\xc0" * 40}),
         ("PNG", "RGB", {}), ("PNG", "L", {}), ("PNG", "RGBA", {}), ("PNG", "LA", {}), ("PNG", "P", {}), ("GIF", "P", {}),
         ("WEBP", "RGB", {}), ("WEBP", "RGBA", {}), ("WEBP", "RGB", {"lossless": True}),
         ("WEBP", "RGBA", {"lossless": True}), ("WEBP", "RGB", {"exif": b"Exif\0\0abc"}), ("BMP", "RGB", {}), ("BMP", "L", {})]


def encoded(kind: str, mode: str, options: dict[str, object], size: tuple[int, int] = (123, 45)) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA" if mode != "CMYK" else "CMYK").convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:.*mode.*parameter:DeprecationWarning")
@pytest.mark.parametrize(("kind", "mode", "options"), CASES)
def test_header_equals_pil(kind: str, mode: str, options: dict[str, object]) -> None:
    data = encoded(kind, mode, options)
    info = probe(data, True)
    channels = {"L": 1, "LA": 2, "RGB": 3, "P": 3, "RGBA": 4, "CMYK": 4}[mode] if kind != "BMP" else 3
    assert info == (kind.lower(), 123, 45, channels, "unsupported" if kind == "GIF" else "")
    for cut in range(30, 200):  # a shorter start either says it needs more or reads the same
        try:
            short = probe(data[:cut], False)
        except NeedMore:
            continue
        assert short == info, cut
    assert probe(data[:9], True).problem in ("unreadable_header", "not_an_image")


def jpeg_with(width: int, height: int, marker: int = 0xC0, precision: int = 8, components: int = 3) -> bytes:
    frame = struct.pack(">BBHBHHB", 0xFF, marker, 8 + 3 * components, precision, height, width, components)
    return b"\xff\xd8" + frame + bytes(3 * components) + b"\xff\xd9"


@pytest.mark.parametrize(("data", "reason"), [
    (b"", "empty"), (b"hello, I am text", "not_an_image"), (gzip.compress(jpeg_with(5, 5), mtime=0), "gzip"),
    (jpeg_with(12000, 12000), "too_large"), (jpeg_with(10000, 10000), ""), (jpeg_with(10001, 10000), "too_large"),
    (jpeg_with(5, 0), "unreadable_header"), (jpeg_with(0, 5), "unreadable_header"), (jpeg_with(5, 5, 0xC3), "unsupported"),
    (jpeg_with(5, 5, precision=12), "unsupported"), (jpeg_with(5, 5, components=2), "unsupported"),
    (jpeg_with(5, 5, components=1), "grey"), (jpeg_with(5, 5, components=4), "cmyk"),
    (b"\xff\xd8" + b"\xff\xe1\0\4ab" + b"rubbish" + jpeg_with(5, 5)[2:], ""),  # libjpeg skips it too
    (b"\xff\xd8\xff\xff\xff" + jpeg_with(5, 5)[2:], ""), (b"\xff\xd8\xff\xda\0\4ab" + jpeg_with(5, 5)[2:], "unreadable_header"),
    (b"\xff\xd8\xff\xe0\0\1" + bytes(50), "unreadable_header"), (b"\xff\xd8" + bytes(50), "unreadable_header"),
    (b"RIFF1234WEBPxxxx" + bytes(30), "unreadable_header"), (b"\x89PNG\r\n\x1a\n" + bytes(40), "unreadable_header")])
def test_reasons(data: bytes, reason: str) -> None:
    code, excluded = judge("a.JPEG", probe(data, True))
    assert REASONS[code] == reason
    assert excluded == (reason not in ("", "grey", "cmyk"))


@pytest.mark.filterwarnings("ignore:.*mode.*parameter:DeprecationWarning")
def test_names_and_formats() -> None:
    png = probe(encoded("PNG", "RGB", {}), True)
    for name, reason in [("a.JPEG", "misnamed"), ("a.png", ""), ("a.PNG", ""), ("a", ""), ("a.jpg", "misnamed")]:
        assert judge(name, png) == (REASONS.index(reason), 0)
    assert is_image_name("x/a.JPEG") and is_image_name("a.webp") and not is_image_name("a.txt") and not is_image_name("jpeg")


@pytest.mark.filterwarnings("ignore:.*mode.*parameter:DeprecationWarning")
def test_damaged_headers_raise_nothing() -> None:
    chance = random.Random(3)
    for kind, mode, options in CASES:
        data = encoded(kind, mode, options)[:400]
        for _ in range(100):
            changed = bytearray(data)
            for _ in range(3):
                changed[chance.randrange(len(changed))] = chance.randrange(256)
            info = probe(bytes(changed[:chance.randrange(len(changed))]), True)
            assert info.problem or (0 < info.width * info.height <= 100_000_000 and 1 <= info.channels <= 4)
