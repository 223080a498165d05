"""The header of an index, index.json: its version, hashes and checks.

Besides counts, classes, archives and oddities it holds SHA-256 hashes: of each array file (`verify` checks those), and of its own
content without the archives' paths (`read_header` checks that: it is the identity of the data set, `SampleIndex.sha256`).

`packed`, in an index of packed images: how they were made (`PackOptions`), source (split → `split_sha256` of the original's) and
measured (split → images, mean bytes, psnr_mean and psnr_min in dB). `derived`: for each subset that led here, first one first,
SHA-256, rows and classes of the index it was taken of, the options, and the classes that had too few images.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.files import json_sha256

VERSION = 1
MAGIC = "alexnet-sample-index"


def content_sha256(header: dict[str, Any]) -> str:
    """SHA-256 (hex) of a header without its archives' paths: equal wherever the archives lie."""
    content = {key: value for key, value in header.items() if key != "sha256"}
    if isinstance(header.get("archives"), list):
        content["archives"] = [{key: value for key, value in archive.items() if key != "path"}
                               for archive in header["archives"] if isinstance(archive, dict)]
    return json_sha256(content)


def read_header(path: Path) -> dict[str, Any]:
    """The checked header of the index folder `path`. Raises ValueError when it is no index, of another version, or altered."""
    file = path / "index.json"
    if not file.is_file():
        problem = "has no index.json" if path.is_dir() else "does not exist" if not path.exists() else "is not a folder"
        raise ValueError(f"index (={path}) {problem}; make one with tools/build_index.py build")
    try:
        header = json.loads(file.read_bytes())
    except ValueError:
        raise ValueError(f"index header (={file}) is not JSON; build the index again") from None
    if not isinstance(header, dict) or header.get("magic") != MAGIC:
        raise ValueError(f"index header (={file}) is not that of a sample index; build one with tools/build_index.py")
    if header.get("version") != VERSION:
        raise ValueError(f"index version (={header.get('version')}) of {file} is not {VERSION}, the one this code "
                         f"reads; build the index again")
    if content_sha256(header) != header.get("sha256"):
        raise ValueError(f"index header (={file}) does not match its SHA-256, so it was altered; build it again")
    return header
