"""Saved evaluations: all probabilities of a tested network, so that it need not be tested again.

An evaluation is a folder, written while the network is tested and renamed into its place when all of it is on disk:
  evaluation.json    what was tested (`Key`) and how, size and SHA-256 of the two arrays, and of itself
  images.npy         (N,) IMAGE: id, label, the label's rank and probability as the network gave them
  probabilities.npy  (N, K) float16: probability × 2^15, which float16 holds to 1/2048 of itself down to 1.9e-9
Counts and losses of one network are those of its float64 probabilities, exact; only the mean of several needs the float16 ones.
Those are multiples of 2^-39, so sums of them are exact in float64: neither the order of the members of an ensemble nor where they
come from changes a bit. N images in the order of the split's ids, K outputs of the network.
"""

import contextlib
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Optional

import numpy as np

from pipeline.arrays import read_array
from pipeline.files import (FileEntry, atomic_folder, difference, file_entries, read_manifest, remove_dead, with_own_hash,
                            write_json)
from pipeline.io_errors import explain
from pipeline.schema import Count, read_as

FORMAT = 2  # 1 had no hash of the manifest itself
MANIFEST, PROBABILITIES, IMAGES = "evaluation.json", "probabilities.npy", "images.npy"
SCALE = 2.0 ** 15  # the largest power of two with which 1 is no overflow; exact, as it only moves the exponent
IMAGE = np.dtype([
    ("id", "<i8"),  # sample id
    ("probability", "<f8"),  # of the label; NaN without one
    ("label", "<i4"),  # -1 unknown
    ("place", "<i4"),  # rank of the label among the classes, 0 the most probable; -1 without one
    ("crc32", "<u4"),  # 0; earlier versions wrote a checksum of the row
    ("spare", "<u4"),  # 0
])


class DamagedEvaluation(RuntimeError):
    """A saved evaluation that is not as it was written."""


@dataclass(frozen=True)
class Key:
    """What an evaluation is of; two of equal keys have the same results."""

    checkpoint: str  # SHA-256 of its manifest, hence of weights, recipe and statistics
    test_images: str  # `SampleIndex.split_sha256`
    classes: str  # hash of the class list in its order
    images: Count  # N
    outputs: Count  # K
    views: int  # crops of an image, 1 or 10
    precision: str  # in which the network computed


@dataclass(frozen=True)
class Manifest:
    """Schema of evaluation.json."""

    checkpoint: str
    split: str
    index: str
    facts: Key
    files: dict[str, FileEntry] | None  # None: earlier versions left tests that were not finished


def short(value: object) -> str:
    """A value for messages, of a hash its beginning."""
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)


@dataclass(frozen=True)
class Evaluation:
    """A whole test of one network."""

    checkpoint: str  # of what: paths, as they were, and the split's name
    split: str
    index: str
    key: Key  # the same, by hashes
    images: np.ndarray  # (N,) IMAGE
    probabilities: np.ndarray  # (N, K) float16, times SCALE
    folder: Path  # where it is saved
    tested: int = 0  # number of images tested just now: N, or 0 for a saved evaluation

    @property
    def name(self) -> str:
        """Its run's and its checkpoint's name, for messages."""
        return short_name(Path(self.checkpoint))

    @property
    def labelled(self) -> bool:
        return bool((self.images["label"] >= 0).all())


def run_folder(checkpoint: Path) -> Path:
    """The run that a checkpoint belongs to, or the folder that holds it."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def short_name(checkpoint: Path) -> str:
    """The names of a checkpoint's run and of itself, for messages."""
    return f"{run_folder(checkpoint).name}/{checkpoint.name}"


def load(path: Path) -> Evaluation:
    """Read a saved evaluation and compare it with its hashes; the arrays are mapped into memory.

    Raises ValueError for another format, DamagedEvaluation naming the file that is not as it was written.
    """
    file = path / MANIFEST
    try:
        given = read_manifest(file)
        written = given.get("format")
        if written == FORMAT or "sha256" in given and written == 1:
            given = read_manifest(file, own_hash=True)
        manifest = read_as(Manifest, given, "it") if written in (1, FORMAT) else None
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise DamagedEvaluation(f"evaluation file (={file}) cannot be read ({error}); delete {path} and test again") from None
    if manifest is None:
        raise ValueError(f"evaluation format (={written} in {file}) must be {FORMAT}, the one of this program; use the version "
                         "of the program that wrote it")
    key, arrays = manifest.facts, {}
    for name, dtype, shape in ((IMAGES, IMAGE, (key.images,)), (PROBABILITIES, np.float16, (key.images, key.outputs))):
        problem = "is not finished"
        if manifest.files:
            problem = difference(path / name, asdict(manifest.files[name])) if name in manifest.files else "is not listed"
        if not problem:
            try:
                arrays[name] = read_array(path / name, dtype, shape)
            except ValueError as error:
                problem = str(error)
            else:
                if not key.images or name == IMAGES and (arrays[name]["label"] >= key.outputs).any():
                    problem = "holds no images" if not key.images else f"holds labels that are none of {key.outputs}"
        if problem:
            raise DamagedEvaluation(f"evaluation file (={path / name}) {problem}; test again, with the command that made it")
    return Evaluation(manifest.checkpoint, manifest.split, manifest.index, key, arrays[IMAGES], arrays[PROBABILITIES], path)


def find(base: Path, key: Key, warn: Callable[[str], None]) -> tuple[Path, Optional[Evaluation]]:
    """Find the evaluation of a key at `base`, or beside it at `base`-2, …: its folder and itself, or the first free folder and
    None. `warn` is called for each that is passed over. Raises as `load`."""
    path, number = base, 1
    while path.exists() and not (path.is_dir() and not any(path.iterdir())):
        try:
            evaluation = load(path)
            if evaluation.key == key:
                return path, evaluation
            here, there = asdict(key), asdict(evaluation.key)
            other = [f"{name} {short(there[name])} (here {short(here[name])})" for name in here if here[name] != there[name]]
            problem = f"evaluation (={path}) is of another test: {', '.join(other)}"
        except DamagedEvaluation as error:
            problem = str(error).partition(";")[0]
        number += 1
        path = base.with_name(f"{base.name}-{number}")
        warn(f"{problem}; this test goes to {path.name}")
    return path, None


@contextlib.contextmanager
def writing(path: Path, key: Key, about: Mapping[str, Any]) -> Iterator[Callable[[np.ndarray, np.ndarray], None]]:
    """Write an evaluation to `path`, which exists when the `with` has ended without an exception, and not before.

    Yields a function that appends rows: (M,) IMAGE and (M, K) float16. `about` is what else its manifest says. Raises
    RuntimeError when it cannot be written; a full disk says so at the beginning.
    """
    with contextlib.ExitStack() as stack:
        with _says_not_saved(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_dead(path.parent)
            folder = stack.enter_context(atomic_folder(path))
            files = [stack.enter_context(open(folder / name, "xb")) for name in (IMAGES, PROBABILITIES)]
            for file, dtype, shape in zip(files, (IMAGE, np.dtype(np.float16)), ((key.images,), (key.images, key.outputs))):
                np.lib.format.write_array_header_1_0(file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False,
                                                            "shape": shape})
                file.flush()
                os.posix_fallocate(file.fileno(), file.tell(), math.prod(shape) * dtype.itemsize)

        def append(images: np.ndarray, probabilities: np.ndarray) -> None:
            with _says_not_saved(path):
                files[0].write(images.tobytes())
                files[1].write(probabilities.tobytes())

        yield append
        with _says_not_saved(path):
            for file in files:
                file.close()
            write_json(folder / MANIFEST, with_own_hash({"format": FORMAT, **about, "facts": asdict(key),
                                                         "files": file_entries(folder, (IMAGES, PROBABILITIES))}))
            stack.close()


@contextlib.contextmanager
def _says_not_saved(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RuntimeError(f"evaluation (={path}) could not be written: {explain(error, path)}; then give the same command "
                           "again, or name another folder with --save") from error
