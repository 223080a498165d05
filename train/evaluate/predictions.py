"""Evaluations on disk, written as they come: what was tested once need not be tested again.

An evaluation is a folder:
  evaluation.json    what was tested (`Facts`) and how (`Made`); when all is there, size and SHA-256 of the two arrays
  images.npy         (N,) IMAGE of train/evaluate/probabilities.py: id, label, the label's place and probability
  probabilities.npy  (N, K) float16: probability × 2^15, which float16 holds to 1/2048 of itself down to 1.9e-9
Batches are written as they are tested. Each row carries a CRC-32 of itself, so whatever ended the test, and in whatever order its
bytes reached the disk, it is known which rows are there; a later test makes the others, in the same batches, hence the same bits.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Literal, Optional

import numpy as np
import torch

from pipeline.files import atomic_write, file_sha256, sync
from train.parallel.topology import Topology
from train.evaluate.probabilities import IMAGE, Evaluation, Facts, Made, check_complete, differences, intact, packed, untested

FORMAT = 1
MANIFEST, PROBABILITIES, IMAGES = "evaluation.json", "probabilities.npy", "images.npy"


class DamagedEvaluation(RuntimeError):
    """A saved evaluation that is not as it was written."""


class NotSaved(RuntimeError):
    """An evaluation cannot be written."""


class Folder:
    """Takes the probabilities of a test and writes them into an evaluation that was begun. Each process writes its own rows.

    Args:
        path: from `claim`.
        ids: (N,) of the split, in order.

    Raises:
        DamagedEvaluation: it is not as it was begun.
    """

    def __init__(self, path: Path, ids: np.ndarray) -> None:
        self.path, self._ids = path, ids
        self.images, self.probabilities = _arrays(path, _read_manifest(path).facts)
        self._files = [os.open(path / name, os.O_WRONLY) for name in (IMAGES, PROBABILITIES)]

    def remaining(self, batch: int) -> np.ndarray:
        """(M,) ids still to test: of whole batches, as the last bit of an image's probabilities may depend on its batch."""
        done = self._done()
        starts = range(0, len(done), batch)
        return np.concatenate([self._ids[:0], *(self._ids[k:k + batch] for k in starts if not done[k:k + batch].all())])

    def take(self, ids: np.ndarray, labels: torch.Tensor, probabilities: torch.Tensor) -> None:
        """Write a batch: (B,) ids that follow each other in the split, (B,) labels, (B, K) float64.

        Plain writes, not stores to a map, which a full disk would answer with a signal. Raises NotSaved.
        """
        first = int(np.searchsorted(self._ids, ids[0]))
        assert np.array_equal(self._ids[first:first + len(ids)], ids), "rows of a batch follow each other"
        try:
            for file, into, rows in zip(self._files, (self.images, self.probabilities), packed(ids, labels, probabilities)):
                _write(file, rows.tobytes(), into.offset + first * rows.strides[0])
        except OSError as error:
            raise _unwritten(self.path, error) from error

    def finish(self, where: Topology) -> tuple[np.ndarray, np.ndarray]:
        """(images, probabilities), on disk and hashed, when all processes have taken theirs. Raises RuntimeError."""
        try:
            for file in self._files:
                os.fsync(file)
            where.any_rank(False)  # all have
            if where.is_main:
                check_complete(self._done(), str(self.path))
                text = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
                files = {name: {"size": (self.path / name).stat().st_size, "sha256": file_sha256(self.path / name)}
                         for name in (IMAGES, PROBABILITIES)}
                _write_manifest(self.path, {**text, "files": files})
        except OSError as error:
            raise _unwritten(self.path, error) from error
        return self.images, self.probabilities

    def _done(self) -> np.ndarray:
        return intact(self.images, self.probabilities) & (self.images["id"] == self._ids)

    def close(self) -> None:
        """Close its files."""
        for file in self._files:
            os.close(file)
        self._files = []


def _write(file: int, data: bytes, offset: int) -> None:
    """All of it; the kernel may take less at once."""
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _unwritten(path: Path, error: OSError) -> NotSaved:
    return NotSaved(f"evaluation (={path}) could not be written ({error.strerror}); mend this and give the same command "
                    "again, or name another folder with --save, or say --no-save")


def _headers(facts: Facts) -> dict[str, tuple[bytes, np.dtype[Any], tuple[int, ...]]]:
    """Name of each array → the first bytes of its file, its type and shape."""
    found: dict[str, tuple[bytes, np.dtype[Any], tuple[int, ...]]] = {}
    shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        IMAGES: (IMAGE, (facts.images,)), PROBABILITIES: (np.dtype(np.float16), (facts.images, facts.outputs))}
    for name, (dtype, shape) in shapes.items():
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False,
                                                      "shape": shape})
        found[name] = header.getvalue(), dtype, shape
    return found


def _arrays(path: Path, facts: Facts) -> tuple[np.memmap, np.memmap]:
    """The two arrays of an evaluation, mapped. Raises DamagedEvaluation."""
    found = []
    for name, (header, dtype, shape) in _headers(facts).items():
        file, size = path / name, int(np.prod(shape)) * dtype.itemsize
        try:
            with open(file, "rb") as opened:
                same = opened.read(len(header)) == header and os.fstat(opened.fileno()).st_size == len(header) + size
        except OSError as error:
            raise DamagedEvaluation(f"evaluation file (={file}) cannot be read ({error.strerror}); test again, with the command "
                                    "that made it") from None
        if not same:
            raise DamagedEvaluation(f"evaluation file (={file}) is not an array of {shape}; test again, with the command "
                                    "that made it")
        found.append(np.memmap(file, dtype, "r", len(header), shape))
    images, probabilities = found
    return images, probabilities


@dataclass(frozen=True)
class _Manifest:
    checkpoint: str
    split: str
    index: str
    facts: Facts
    made: Made
    files: Optional[dict[str, dict[str, Any]]]


def _read_manifest(path: Path) -> _Manifest:
    """Raises DamagedEvaluation; ValueError for another format."""
    file = path / MANIFEST
    try:
        text = json.loads(file.read_text(encoding="utf-8"))
        written = text["format"]
        if written == FORMAT:
            return _Manifest(str(text["checkpoint"]), str(text["split"]), str(text["index"]), Facts(**text["facts"]),
                             Made(**text["made"]), text["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedEvaluation(f"evaluation file (={file}) cannot be read ({error}); delete {path} and test again") from None
    raise ValueError(f"evaluation format (={written} in {file}) must be {FORMAT}, the one of this program; use the version of "
                     "the program that wrote it")


def _write_manifest(path: Path, text: dict[str, Any]) -> None:
    with atomic_write(path / MANIFEST) as file:
        file.write(json.dumps(text, indent=1).encode() + b"\n")


def load(path: Path) -> Evaluation:
    """A whole evaluation, checked against its hashes.

    Raises:
        ValueError: it is not finished, or of another format.
        DamagedEvaluation: its files are not as they were written; naming the file.
    """
    manifest = _read_manifest(path)
    if manifest.files is None:
        raise ValueError(f"evaluation (={path}) is not finished; give the command that began it again, it goes on where it was")
    for name in (IMAGES, PROBABILITIES):
        file, entry = path / name, manifest.files.get(name, {})
        found = {"size": file.stat().st_size, "sha256": file_sha256(file)} if file.is_file() else {}
        if found != entry or not found:
            raise DamagedEvaluation(f"evaluation file (={file}) is not the one that was written (its size or SHA-256 differs); "
                                    "test again, with the command that made it, which replaces damaged rows")
    images, probabilities = _arrays(path, manifest.facts)
    return Evaluation(manifest.checkpoint, manifest.split, manifest.index, manifest.facts, images, probabilities, path)


def claim(base: Path, facts: Facts, made: Made, ids: np.ndarray, labels: np.ndarray, about: dict[str, str],
          tell: Callable[[str], None]) -> tuple[Path, bool, int]:
    """Find the evaluation of these facts at `base`, or beside it at `base`-2, …; begin it where there is none.

    Damaged rows of a finished one count as not tested. Main process only; nobody else may claim it until the handle is closed.

    Args:
        base: folder that need not exist.
        facts, made: what is to be tested, and how.
        ids, labels: (N,) of the split.
        about: paths of checkpoint and index, name of the split.
        tell: told of what was found and does not fit.

    Returns:
        Its folder; whether it is whole; a handle that keeps others off, to be closed at the end.

    Raises:
        NotSaved: it cannot be written.
        RuntimeError: another process is at it.
        ValueError: it is of another format.
    """
    number, path = 1, base
    while True:
        try:
            path.mkdir(parents=True, exist_ok=True)
            handle = _lock(path)
        except OSError as error:
            raise _unwritten(path, error) from error
        try:
            state, other = _state(path, facts, made, tell)
            if state == "nothing":
                _begin(path, facts, made, ids, labels, about)
            if state != "other":
                return path, state == "whole", handle
        except OSError as error:
            os.close(handle)
            raise _unwritten(path, error) from error
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        number += 1
        following = base.with_name(f"{base.name}-{number}")
        tell(f"evaluation (={path}) is of another test: {other}; this one goes to {following.name}")
        path = following


def _state(path: Path, facts: Facts, made: Made,
           tell: Callable[[str], None]) -> tuple[Literal["nothing", "part", "whole", "other"], str]:
    """What a folder has of a test; what is there can be written over in the first case. With how it differs, in the last."""
    if not (path / MANIFEST).exists():
        return "nothing", ""
    try:
        manifest = _read_manifest(path)
        if other := differences(manifest.facts, facts):
            return "other", other
        if manifest.files is not None:
            try:
                load(path)
                return "whole", ""
            except DamagedEvaluation as error:
                tell(f"{_found(error)}; what is damaged is tested again")
                text = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
                _write_manifest(path, {**text, "files": None})
        _arrays(path, facts)
    except DamagedEvaluation as error:
        tell(f"{_found(error)}; it is begun anew")
        return "nothing", ""
    if other := differences(manifest.made, made):
        tell(f"evaluation (={path}) was begun with {other}, which may change last bits; it is begun anew")
        return "nothing", ""
    return "part", ""


def _found(error: Exception) -> str:
    """What a message says is wrong, without what to do."""
    return str(error).partition(";")[0]


def _begin(path: Path, facts: Facts, made: Made, ids: np.ndarray, labels: np.ndarray, about: dict[str, str]) -> None:
    """Lay out an evaluation without a row. Killed anywhere in it, it is begun again. Raises OSError, leaving nothing."""
    (path / MANIFEST).unlink(missing_ok=True)  # first: what follows is not what it says
    try:
        for name, (header, dtype, shape) in _headers(facts).items():
            (path / name).unlink(missing_ok=True)
            with open(path / name, "xb") as file:
                file.write(header)
                if name == IMAGES:
                    file.write(untested(ids, labels).tobytes())
                file.flush()
                size = len(header) + int(np.prod(shape)) * dtype.itemsize
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk says so now
                os.fsync(file.fileno())
        sync(path)
        _write_manifest(path, {"format": FORMAT, **about, "facts": asdict(facts), "made": asdict(made), "files": None})
    except OSError:
        for name in (IMAGES, PROBABILITIES):  # a full disk needs the room
            (path / name).unlink(missing_ok=True)
        raise


def _lock(path: Path) -> int:
    """A handle on a folder that no other process has locked; one that died holds no lock. Raises RuntimeError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise RuntimeError(f"evaluation (={path}) is being made by another process; wait for it, or name another folder with "
                           "--save") from None
    except OSError:  # a file system without locks
        pass
    return handle
