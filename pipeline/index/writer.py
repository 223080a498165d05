"""Writes an index atomically (format: `pipeline.index.sample_index`).

A new index is a folder that appears in one rename. When the folder exists already (`force`, or samples marked excluded) the
arrays go beside the old ones under new names and `index.json` is replaced last: a reader sees the old index or the new one.
Other files in the folder (statistics, packed shards) stay.
"""
import contextlib
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.files import atomic_folder, atomic_write, locked_folder, remove_dead
from pipeline.index.header import ARRAY_NAME, MAGIC, VERSION, Archive, ClassInfo, content_sha256, read_header
from pipeline.index.sample_index import REASONS, SAMPLE, SampleIndex


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
    """Write an index folder of SAMPLE rows, sorted by split; returns its SHA-256.

    oddities: {name, split, reason, kept, id or None}; names: names.bin for folder archives; packed: how packed images were made,
    when `out` holds them already; derived: an entry for each subset that led here. Raises ValueError as `check_output`, and for
    rows that are not sorted.
    """
    out = Path(out)
    if packed is None:
        check_output(out, force)
    if samples.dtype != SAMPLE or np.any(np.diff(samples["split"].astype(np.int16)) < 0):
        raise ValueError(f"samples (={samples.dtype}) are not SAMPLE rows sorted by split; sort them")
    header: dict[str, Any] = {
        "magic": MAGIC, "version": VERSION, "preset": preset, "samples": len(samples), "crc32": crc32,
        "splits": _splits(samples, splits),
        "archives": [{**asdict(archive), "path": str(archive.path.absolute())} for archive in archives],
        "reasons": _reasons(samples), "oddities": list(oddities), "classes": [asdict(entry) for entry in classes]}
    if derived:  # an index of whole archives has no such key, so its SHA-256 is what it was before there were subsets
        header["derived"] = list(derived)
    if packed is not None:
        header["packed"] = packed
    is_new = packed is None and not force  # one that has appeared since is another's
    with locked_folder(out) if out.exists() and not is_new else contextlib.nullcontext():
        return _publish(out, header, samples, names, is_packed=packed is not None, is_new=is_new)


def mark_excluded(index: SampleIndex, damaged: dict[int, tuple[str, str]]) -> str:
    """Mark samples (id → name, what is wrong) excluded, in place and atomically; returns the new SHA-256. Raises RuntimeError
    when another process has changed the index since it was loaded."""
    samples = np.array(index.samples)
    ids = sorted(id for id in damaged if not samples["excluded"][id])
    samples["excluded"][ids], samples["reason"][ids] = 1, REASONS.index("damaged")
    oddities = [entry for entry in index.header["oddities"] if entry["id"] not in ids]
    oddities += [{"name": damaged[id][0], "split": index.split_names[samples["split"][id]],
                  "reason": f"damaged: {damaged[id][1]}", "kept": False, "id": id} for id in ids]
    header = {**index.header, "splits": _splits(samples, index.split_names), "reasons": _reasons(samples), "oddities": oddities}
    with locked_folder(index.path):
        if read_header(index.path)[0]["sha256"] != index.sha256:
            raise RuntimeError(f"index (={index.path}) was changed by another process meanwhile, so nothing was excluded; run "
                               "the same command again")
        return _publish(index.path, header, samples, index.name_bytes)


def _splits(samples: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    counts = np.bincount(samples["split"], minlength=len(names))
    excluded = np.bincount(samples["split"][samples["excluded"] != 0], minlength=len(names))
    return [{"name": name, "first": int(counts[:i].sum()), "count": int(counts[i]), "excluded": int(excluded[i])}
            for i, name in enumerate(names)]


def _reasons(samples: np.ndarray) -> dict[str, int]:
    counts = np.bincount(samples["reason"], minlength=len(REASONS))
    return {REASONS[i]: int(count) for i, count in enumerate(counts) if i and count}


def _publish(out: Path, header: dict[str, Any], samples: np.ndarray, names: bytes | None, *, is_packed: bool = False,
             is_new: bool = False) -> str:
    """Write the files of an index, `index.json` last; returns its SHA-256. `is_new`: raise OSError when `out` is there already.

    The index of packed shards appears among them. Several processes may write it at once, with the same content, hence under the
    same names: whose rename comes last does not matter.
    """
    out = out.absolute()
    old = [] if is_packed else _array_files(out)
    array = io.BytesIO()
    np.save(array, samples, allow_pickle=False)
    contents: dict[str, bytes | memoryview] = {}
    header["files"] = {}
    for key, file, data in (("samples", "samples.npy", array.getbuffer()), ("names", "names.bin", names)):
        if data is None:
            continue
        sha256 = hashlib.sha256(data).hexdigest()
        if file in old:  # an index is there: its arrays are needed until index.json is replaced
            file = f"{Path(file).stem}.{sha256[:16]}{Path(file).suffix}"
        contents[file] = data
        header["files"][key] = {"file": file, "size": len(data), "sha256": sha256}
    header["sha256"] = content_sha256(header)
    contents["index.json"] = json.dumps(header, indent=1).encode() + b"\n"
    if out.exists() and not is_new:
        for file, data in contents.items():  # index.json, the commit, comes last
            with atomic_write(out / file) as stream:
                stream.write(data)
        for file in set(old) - set(contents):
            (out / file).unlink(missing_ok=True)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_dead(out.parent, out.name)
        with atomic_folder(out) as folder:
            for file, data in contents.items():
                (folder / file).write_bytes(data)
    return str(header["sha256"])


def _array_files(out: Path) -> list[str]:
    """Names of the array files that lie in the index folder `out`, those of a damaged index too; empty when there is none."""
    return [file.name for file in out.iterdir() if ARRAY_NAME.fullmatch(file.name)] if out.exists() else []
