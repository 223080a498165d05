"""Index of WebDataset shards: tars of an image `key.jpg` with `key.cls`, which holds its label as a decimal number.

The key of a member ends at the first dot of its base name.
"""
import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.index.builder import Builder
from pipeline.index.folders import SPLIT_NAMES
from pipeline.index.image_header import is_image_name
from pipeline.index.header import ClassInfo
from pipeline.index.sample_index import REASONS
from pipeline.index.scan import Oddity, Part, joined, scan_members
from pipeline.index.tar import ArchiveError, Member, open_tar, walk

MAX_LABEL = 1_000_000
_SIDE_FILES = ("json", "txt", "id", "wnid", "index")  # written beside images by the usual tools


def build_webdataset(builder: Builder, shards: Sequence[Path]) -> str:
    """Index shards, the split by the shard's name; returns the SHA-256 of the index. Raises ValueError, OSError."""
    sizes = []
    for shard in shards:
        open_tar(shard).close()
        sizes.append(builder.archives[builder.add_archive(shard)].size)
    parts = builder.run(scan_shard, [(shard, builder.crc) for shard in shards], sizes, "shards")
    splits: list[str] = []
    for position, (shard, part) in enumerate(zip(shards, parts, strict=True)):
        part.rows["archive"] = position
        splits += [split_of_shard(shard.absolute())] * len(part.rows)
    whole = joined(parts)
    if not len(whole.rows) and whole.odd:
        raise ValueError(f"shards (={shards[0]} …) hold no images; the first of other files: {whole.odd[0].name}: "
                         f"{whole.odd[0].reason}")
    highest = int(whole.rows["label"].max(initial=-1))
    builder.classes = [ClassInfo(str(label), "") for label in range(highest + 1)]
    builder.add_by_split(whole, splits)
    return builder.write()


def split_of_shard(path: Path) -> str:
    """Split of a shard by its name, or its folder's: a word train, val or test; train otherwise."""
    words = re.split(r"[^a-z]+", path.name.lower()) + re.split(r"[^a-z]+", path.parent.name.lower())
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "train")


def sample_key(name: str) -> tuple[str, str]:
    """(key, extension in lower case) of a member."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return folder + slash + key, extension.lower()


def scan_shard(path: Path, crc: bool) -> Part:
    """Rows of a shard in archive order, labelled. Raises ArchiveError, also on two images of one key and a bad label.

    An image without `key.cls` is excluded; a label without an image is an oddity.
    """
    labels: dict[str, int] = {}
    images: dict[str, Member] = {}
    odd: list[Oddity] = []
    dotted: list[tuple[int, str, str]] = []  # position in `odd`, key, extension
    again = "write the shard again with one image and one .cls a key"
    with open_tar(path) as source:
        for member in walk(source):
            if member.kind == "directory":
                continue
            key, extension = sample_key(member.name)
            if member.kind != "file":
                odd.append(Oddity(member.name, f"a {member.kind}, not a file"))
            elif extension == "cls":
                text = source.at(member.offset, min(member.size, 32)).strip()
                if not text.isdigit() or int(text) > MAX_LABEL:
                    raise ArchiveError(f"label (={text.decode('ascii', 'replace')!r}) in {member.name} of {path} at offset "
                                       f"{member.offset} is not a number from 0 to {MAX_LABEL}; write numbers into .cls files")
                if key in labels:
                    raise ArchiveError(f"sample (={key}) of {path} at offset {member.offset} has two labels; {again}")
                labels[key] = int(text)
            elif is_image_name("." + extension) and "." not in extension:
                if key in images:
                    raise ArchiveError(f"sample (={key}) of {path} at offset {member.offset} has two images; {again}")
                images[key] = member
            elif extension not in _SIDE_FILES:
                if is_image_name("." + extension) or extension.endswith(".cls"):
                    dotted.append((len(odd), key, extension))
                odd.append(Oddity(member.name, "not called an image"))
    for position, key, extension in dotted:
        if key not in images:  # else it is a part of that sample, as x.seg.png of x.png
            why = f"no image or label: a key ends at the first dot, so this is .{extension} of key {key}; write keys without dots"
            odd[position] = Oddity(odd[position].name, why)
    part = scan_members(path, crc, list(images.values()))
    names = part.names or []
    keys = [sample_key(name)[0] for name in names]
    for row, key in enumerate(keys):
        part.rows["label"][row] = labels.get(key, -1)
        if key not in labels and not part.rows["excluded"][row]:
            part.rows["excluded"][row], part.rows["reason"][row] = 1, REASONS.index("unlabelled")
            part.odd = [entry for entry in part.odd if entry.row != row] + [Oddity(names[row], "unlabelled", row=row)]
    with_image = set(keys)
    part.odd += odd + [Oddity(key, "a label without an image") for key in labels if key not in with_image]
    return part
