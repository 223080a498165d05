"""Scans one WebDataset shard: an image with `key.cls`, which holds its label as a decimal number."""

from __future__ import annotations

from pipeline.index.tar import ArchiveError, Member, open_tar, walk
from pipeline.index.image_header import is_image_name
from pipeline.index.sample_index import REASONS
from pipeline.index.devkit import sample_key
from pipeline.index.scan import Odd, Part, Task, scan

MAX_LABEL = 1_000_000
_SIDE_FILES = ("json", "txt", "id", "wnid", "index")  # written beside images by the usual tools


def scan_shard(task: Task) -> Part:
    """Rows of a shard in archive order, labelled. Raises ArchiveError, also on two images of one key and a bad label.

    An image without `key.cls` is excluded; a label without an image is an oddity.
    """
    labels: dict[str, int] = {}
    images: dict[str, Member] = {}
    odd: list[Odd] = []
    with open_tar(task.path) as source:
        for member in walk(source):
            if member.kind == "directory":
                continue
            key, extension = sample_key(member.name)
            if member.kind != "file":
                odd.append(Odd(-1, member.name, f"a {member.kind}, not a file", False))
            elif extension == "cls":
                text = source.at(member.offset, min(member.size, 32)).strip()
                if not text.isdigit() or int(text) > MAX_LABEL:
                    raise ArchiveError(f"label (={text.decode('ascii', 'replace')!r}) in {member.name} of {task.path} "
                                       f"at offset {member.offset} is not a number from 0 to {MAX_LABEL}; "
                                       f"write class numbers into .cls files")
                if key in labels:
                    raise ArchiveError(f"sample (={key}) of {task.path} at offset {member.offset} has two labels; "
                                       f"write the shard again with one .cls a key")
                labels[key] = int(text)
            elif is_image_name("." + extension) and "." not in extension:
                if key in images:
                    raise ArchiveError(f"sample (={key}) of {task.path} at offset {member.offset} has two images; "
                                       f"write the shard again with one image a key")
                images[key] = member
            elif extension not in _SIDE_FILES:
                odd.append(Odd(-1, member.name, "not called an image", False))
    part = scan(Task(task.path, task.crc, list(images.values())))
    keys = [sample_key(name)[0] for name in part.names or []]
    for row, key in enumerate(keys):
        part.rows["label"][row] = labels.get(key, -1)
        if key not in labels and not part.rows["excluded"][row]:
            part.rows["excluded"][row], part.rows["reason"][row] = 1, REASONS.index("unlabelled")
            part.odd[:] = [entry for entry in part.odd if entry.row != row]
            part.odd.append(Odd(row, (part.names or [])[row], "unlabelled", False))
    with_image = set(keys)
    part.odd += odd + [Odd(-1, key, "a label without an image", False) for key in labels if key not in with_image]
    return part
