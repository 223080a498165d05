"""Writes an index so that it is there whole or not at all (format: `pipeline.index.sample_index`).

A new index is written to a temporary sibling folder, fsynced, and renamed. When the folder exists already (`force`, or
samples marked excluded) the arrays go beside the old ones under new names and `index.json` is replaced last, in one
rename: a reader sees the old index or the new one. Other files in the folder (statistics) stay. The index of packed shards
appears among them, when they are finished.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from pipeline.files import atomic_write
from pipeline.index.sample_index import (MAGIC, REASONS, SAMPLE, VERSION, Archive, ClassInfo, SampleIndex, content_sha256,
                                         read_header)


def check_output(out: Path, force: bool) -> None:
    """Raises ValueError when `out` may not be written: it exists and is no index, or `force` is not given, or the disk
    does not let us."""
    if out.exists():
        if not (out / "index.json").is_file():
            raise ValueError(f"output folder (={out}) exists and holds no index; give the name of a new folder")
        if not force:
            raise ValueError(f"output folder (={out}) holds an index already; give another name, or --force to replace it")
    # An index appears by a rename beside `out`, so its parent counts; one that is replaced also changes within.
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    for folder in (parent, out) if out.exists() else (parent,):
        try:
            os.rmdir(tempfile.mkdtemp(prefix=".writable-", dir=folder))  # permission bits do not tell of read-only disks
        except OSError as error:
            raise ValueError(f"output folder (={out}) must be in a folder that can be written, but {folder} cannot "
                             f"({error.strerror}); give another name") from None


def write_index(out: str | Path, samples: np.ndarray, *, classes: Sequence[ClassInfo], archives: Sequence[Archive],
                splits: Sequence[str], preset: str, crc32: bool, oddities: Sequence[dict[str, Any]] = (),
                names: bytes | None = None, packed: dict[str, Any] | None = None, derived: Sequence[dict[str, Any]] = (),
                force: bool = False) -> str:
    """Write an index folder; returns its SHA-256.

    `samples`: SAMPLE rows, sorted by split. `oddities`: {name, split, reason, kept, id or None}. `names`: names.bin
    for folder archives. `packed`: how these images were made (`pipeline.index.sample_index.PACKED`); then `out` holds them
    already.
    `derived`: the subsets that led here from an index of archives (`pipeline.index.sample_index.DERIVED`). Raises ValueError as
    `check_output`, and when the rows are not sorted by split.
    """
    out = Path(out)
    if packed is None:
        check_output(out, force)
    if samples.dtype != SAMPLE or np.any(np.diff(samples["split"].astype(np.int16)) < 0):
        raise ValueError(f"samples (={samples.dtype}) are not SAMPLE rows sorted by split; sort them")
    counts = np.bincount(samples["split"], minlength=len(splits))
    excluded = np.bincount(samples["split"][samples["excluded"] != 0], minlength=len(splits))
    reasons = np.bincount(samples["reason"], minlength=len(REASONS))
    header: dict[str, Any] = {
        "magic": MAGIC, "version": VERSION, "preset": preset, "samples": len(samples), "crc32": crc32,
        "splits": [{"name": name, "first": int(counts[:i].sum()), "count": int(counts[i]),
                    "excluded": int(excluded[i])} for i, name in enumerate(splits)],
        "archives": [{**asdict(archive), "path": str(archive.path.absolute())} for archive in archives],
        "reasons": {REASONS[i]: int(n) for i, n in enumerate(reasons) if i and n},
        "oddities": list(oddities), "classes": [asdict(entry) for entry in classes]}
    if derived:  # an index of whole archives has no such key, so its SHA-256 is what it was before there were subsets
        header["derived"] = list(derived)
    if packed is not None:
        return _publish_among(out, {**header, "packed": packed}, samples)
    return _publish(out, header, samples, names)


def mark_excluded(index: SampleIndex, damaged: dict[int, tuple[str, str]]) -> str:
    """Mark samples (id → name, what is wrong) excluded, in place and atomically; returns the new SHA-256."""
    samples = np.array(index.samples)
    header = json.loads(json.dumps(index.header))
    for id, (name, problem) in sorted(damaged.items()):
        if samples["excluded"][id]:
            continue
        split = header["splits"][samples["split"][id]]
        split["excluded"] += 1
        before = REASONS[samples["reason"][id]]
        if before:
            header["reasons"][before] -= 1
        header["reasons"]["damaged"] = header["reasons"].get("damaged", 0) + 1
        samples["excluded"][id], samples["reason"][id] = 1, REASONS.index("damaged")
        header["oddities"] = [entry for entry in header["oddities"] if entry["id"] != id]
        header["oddities"].append({"name": name, "split": split["name"], "reason": f"damaged: {problem}",
                                   "kept": False, "id": id})
    header["reasons"] = {reason: count for reason, count in header["reasons"].items() if count}
    names = header["files"].get("names")
    return _publish(index.path, header, samples, (index.path / names["file"]).read_bytes() if names else None)


def _publish(out: Path, header: dict[str, Any], samples: np.ndarray, names: bytes | None) -> str:
    out = out.absolute()
    old = read_old_files(out)
    folder = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    folder.mkdir(parents=True)
    try:
        np.save(folder / "samples.npy", samples, allow_pickle=False)
        contents = {"samples": "samples.npy"}
        if names is not None:
            (folder / "names.bin").write_bytes(names)
            contents["names"] = "names.bin"
        header["files"] = {}
        for key, file in contents.items():
            sha256 = file_sha256(folder / file)
            final = file
            if file in old:  # an index is there: its arrays are needed until index.json is replaced
                final = f"{Path(file).stem}.{sha256[:16]}{Path(file).suffix}"
                os.rename(folder / file, folder / final)
            header["files"][key] = {"file": final, "size": (folder / final).stat().st_size, "sha256": sha256}
        header["sha256"] = content_sha256(header)
        (folder / "index.json").write_text(json.dumps(header, indent=1) + "\n")
        for written in folder.iterdir():
            _sync(written)
        _sync(folder)
        if not out.exists():
            os.rename(folder, out)
        else:
            new = [entry["file"] for entry in header["files"].values()]
            for final in new:
                os.replace(folder / final, out / final)
            os.replace(folder / "index.json", out / "index.json")  # the commit
            _sync(out)
            for final in set(old) - set(new):
                (out / final).unlink(missing_ok=True)
        _sync(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return str(header["sha256"])


def _publish_among(out: Path, header: dict[str, Any], samples: np.ndarray) -> str:
    """Put an index among its archives. Several processes may do so at once, with the same content, hence with the same names:
    whose rename comes last does not matter."""
    array = io.BytesIO()
    np.save(array, samples, allow_pickle=False)
    header["files"] = {"samples": {"file": "samples.npy", "size": len(array.getbuffer()),
                                   "sha256": hashlib.sha256(array.getbuffer()).hexdigest()}}
    header["sha256"] = content_sha256(header)
    with atomic_write(out / "samples.npy") as file:
        file.write(array.getbuffer())
    with atomic_write(out / "index.json") as file:  # the commit
        file.write(json.dumps(header, indent=1).encode() + b"\n")
    return str(header["sha256"])


def read_old_files(out: Path) -> list[str]:
    """Names of the array files of the index at `out`, damaged or not; empty when there is none."""
    if not out.exists():
        return []
    try:
        return [entry["file"] for entry in read_header(out)["files"].values()]
    except ValueError:  # damaged: replace whatever arrays lie there
        return [file.name for file in out.iterdir() if file.name.startswith(("samples.", "names."))]


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
