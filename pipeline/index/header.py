"""The header of an index, index.json: its schema, version and hash.

It holds counts, classes, archives, oddities and SHA-256 hashes: of each array file (compared when an index is loaded), and of its
own content without the archives' paths (`read_header` compares that: it is the identity of the data set, `SampleIndex.sha256`).
"""
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pipeline.files import json_sha256, read_json
from pipeline.schema import Count, Sha256, read_as

VERSION = 1
MAGIC = "alexnet-sample-index"
ARRAY_NAME = re.compile(r"(samples(\.[0-9a-f]{16})?\.npy|names(\.[0-9a-f]{16})?\.bin)")

ArrayName = Annotated[str, lambda name: "" if ARRAY_NAME.fullmatch(name) else "must be samples.npy or names.bin, bare"]
ArchiveKind = Annotated[str, lambda kind: "" if kind in ("tar", "folder") else "must be tar or folder"]


@dataclass(frozen=True)
class ClassInfo:
    """One class: its WordNet id (or folder name) and its words (empty without a devkit)."""
    wnid: str
    words: str


@dataclass(frozen=True)
class Archive:
    """A tar file or a folder of images, as it was when indexed. `size` in bytes (a folder: of all its images)."""
    path: Path
    size: Count
    fingerprint: str
    kind: ArchiveKind
    nested: bool = False  # a tar of <wnid>.tar: a sample's name is <wnid>/<name in the inner tar>

    @property
    def is_folder(self) -> bool:
        return self.kind == "folder"


@dataclass(frozen=True)
class Split:
    """Rows [first, first + count) of the index."""
    name: str
    first: Count
    count: Count
    excluded: Count


@dataclass(frozen=True)
class Odd:
    """What is odd about an image, or (`id` None) about a member that is none."""
    name: str
    split: str
    reason: str
    kept: bool
    id: Count | None


@dataclass(frozen=True)
class Derivation:
    """A subset that led to this index: of what, by which options, and the classes that had too few images."""
    index: str
    samples: Count
    classes: Count
    chosen: str
    too_few: list[str]


@dataclass(frozen=True)
class Measured:
    """Packed images of a split: their number, mean bytes, and PSNR in dB of those that were measured."""
    images: Count
    bytes: float
    measured: Count
    psnr_mean: float
    psnr_min: float


@dataclass(frozen=True)
class Packed:
    """How packed images were made (with the other `PackOptions`); `source`: split → `split_sha256` of the original's."""
    square_px: Count
    source: dict[str, str] = field(default_factory=dict)
    measured: dict[str, Measured] = field(default_factory=dict)


@dataclass(frozen=True)
class ArrayFile:
    """An array file beside the header."""
    file: ArrayName
    size: Count  # bytes
    sha256: Sha256


@dataclass(frozen=True)
class Arrays:
    """samples.npy, and names.bin where a folder of images was indexed."""
    samples: ArrayFile
    names: ArrayFile | None = None


@dataclass(frozen=True)
class Header:
    """Schema of index.json."""
    preset: str
    samples: Count
    crc32: bool
    splits: list[Split]
    archives: list[Archive]
    reasons: dict[str, Count]
    oddities: list[Odd]
    classes: list[ClassInfo]
    files: Arrays
    derived: list[Derivation] = field(default_factory=list)  # the first subset first
    packed: Packed | None = None

    def broken(self) -> str:
        """The rule that the values together break; "" when none."""
        names, first = [split.name for split in self.splits], 0
        for split in self.splits:
            if split.first != first or split.excluded > split.count:
                return f"split {split.name} (={split.first} + {split.count}) must follow the one before it"
            first += split.count
        if first != self.samples or len(set(names)) != len(names):
            return f"splits (={', '.join(names)} of {first} samples) must be those of the {self.samples} samples, each once"
        return next((f"oddity (={odd.name}) must be of a split and a sample" for odd in self.oddities
                     if odd.split not in names or (odd.id or 0) >= self.samples), "")


def label_of(classes: Sequence[ClassInfo]) -> dict[str, int]:
    """wnid → label."""
    return {entry.wnid: label for label, entry in enumerate(classes)}


def content_sha256(header: dict[str, Any]) -> str:
    """SHA-256 (hex) of a header without its archives' paths: equal wherever the archives lie."""
    content = {key: value for key, value in header.items() if key != "sha256"}
    if isinstance(header.get("archives"), list):
        content["archives"] = [{key: value for key, value in archive.items() if key != "path"}
                               for archive in header["archives"] if isinstance(archive, dict)]
    return json_sha256(content)


def _holds_images(path: Path) -> bool:
    """Whether a folder has class folders, or splits of class folders: as far as a quick look tells."""
    files = itertools.islice(itertools.chain(path.glob("*/*"), path.glob("*/*/*")), 1000)
    return any(file.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".bmp") for file in files)


def read_header(path: Path) -> tuple[dict[str, Any], Header]:
    """The checked header of the index folder `path`, as JSON and by its schema. Raises ValueError when it is no index, of another
    version, or altered."""
    file = path / "index.json"
    if not file.is_file():
        if path.name and _holds_images(path):
            raise ValueError(f"index (={path}) is a folder of images, which an index is made of; make it with `alexnet index "
                             f"build classes {path} -o {path}.index`, and give {path}.index")
        problem = "has no index.json" if path.is_dir() else "does not exist" if not path.exists() else "is not a folder"
        raise ValueError(f"index (={path}) {problem}; make one with `alexnet index build`")
    try:
        header = read_json(file)
    except ValueError as error:
        raise ValueError(f"index header (={file}) {error}; build the index again") from None
    if not isinstance(header, dict) or header.get("magic") != MAGIC:
        raise ValueError(f"index header (={file}) is not that of a sample index; build one with `alexnet index build`")
    if header.get("version") != VERSION:
        raise ValueError(f"index version (={header.get('version')}) of {file} is not {VERSION}, the one this code "
                         f"reads; build the index again")
    if content_sha256(header) != header.get("sha256"):
        raise ValueError(f"index header (={file}) does not match its SHA-256, so it was altered; build it again")
    try:
        checked = read_as(Header, header, "header")
    except ValueError as error:
        raise ValueError(f"index header (={file}) is none that build_index.py writes: {error}; build the index again") from None
    if broken := checked.broken():
        raise ValueError(f"index header (={file}) is none that build_index.py writes: {broken}; build the index again")
    return header, checked
