"""Run folder: config.yaml (the resolved recipe), versions.jsonl (one line per start), metrics.jsonl, checkpoints/.

A checkpoint records the length of metrics.jsonl, and a resume truncates it to that, so that no step appears twice; what it cuts
off is kept in metrics-replaced.jsonl. Whoever trains holds .lock. `.unsaved` is there until the first checkpoint is written:
without it, a run that has metrics but no checkpoint has lost sight of its checkpoints.
"""
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO, Callable

from pipeline.files import LockHeld, lock
from pipeline.io_errors import explain, writing
from pipeline.schema import is_file_name
from train.config import Config, differences
from train.recipe import load

CONFIG, VERSIONS, METRICS, CHECKPOINTS = "config.yaml", "versions.jsonl", "metrics.jsonl", "checkpoints"
REPLACED, UNSAVED, LOCK = "metrics-replaced.jsonl", ".unsaved", ".lock"
QUARANTINE, LOG = "quarantine.jsonl", "console.log"


class Metrics:
    """Writer of metrics.jsonl; not `enabled`, in all processes but the main one, it writes nothing. Raises RuntimeError when the
    file cannot be written, or is no longer the one in the run folder."""

    def __init__(self, path: Path, enabled: bool) -> None:
        self._path = path
        self._file = path.open("ab") if enabled else None

    def write(self, kind: str, **values: Any) -> None:
        """Append a line: {"kind": …, "time": seconds since 1970, …}."""
        line = json.dumps({"kind": kind, "time": round(time.time(), 3), **values}, allow_nan=False)
        self._do(lambda file: file.write(line.encode() + b"\n"))

    def length(self) -> int:
        """Size in bytes."""
        self._do(lambda file: None)
        return 0 if self._file is None else self._file.seek(0, os.SEEK_END)

    def sync(self) -> None:
        self._do(lambda file: os.fsync(file.fileno()))

    def truncate(self, length: int) -> int:
        """Cut off what lies behind so many bytes, after a copy of it to metrics-replaced.jsonl. Returns how many bytes there are
        too few of."""
        if self._file is None or (missing := length - self.length()) >= 0:
            return 0 if self._file is None else missing
        with self._path.open("rb") as file, (self._path.parent / REPLACED).open("ab") as replaced:
            file.seek(length)
            shutil.copyfileobj(file, replaced)
            os.fsync(replaced.fileno())
        self._do(lambda file: file.truncate(length))
        return 0

    def close(self) -> None:
        try:
            self.sync()
        finally:
            if self._file is not None:
                self._file.close()

    def _do(self, work: Callable[[BinaryIO], object]) -> None:
        if self._file is None:
            return
        try:
            if not os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno())):
                raise FileNotFoundError
        except FileNotFoundError:
            raise RuntimeError(f"run folder (={self._path.parent}) was removed, moved or replaced while training, or its "
                               f"{self._path.name}; nothing more can be saved there: put it back and resume with --resume, or "
                               "start another run") from None
        try:
            work(self._file)
            self._file.flush()
        except OSError as error:
            raise RuntimeError(f"metrics file (={self._path}) could not be written: {explain(error)}; then resume with --resume"
                               ) from error


def folder_of(config: Config, recipe: Path | None) -> Path:
    """The folder of a run: machine.runs / machine.name, or the recipe's name; ValueError when neither gives a name."""
    name = config.machine.name or (recipe.stem if recipe else "")
    if not is_file_name(name):
        raise ValueError(f"machine.name (={config.machine.name}) must name a folder of {config.machine.runs}; "
                         "give --machine.name or a recipe")
    return Path(config.machine.runs) / name


def hold(folder: Path) -> BinaryIO:
    """Take the lock of a run folder, free again when the returned file is closed. Raises ValueError, naming who has it."""
    try:
        return lock(folder / LOCK)
    except LockHeld as holder:
        raise ValueError(f"run folder (={folder}) is in use by {holder}; wait until that has ended, or give another "
                         "--machine.name") from None


def check_never_saved(folder: Path) -> None:
    """Of a run without checkpoints: raise RuntimeError when it must have had some, as it has metrics of steps."""
    metrics = folder / METRICS
    steps = re.findall(rb'"step": (\d+)', metrics.read_bytes()) if metrics.exists() else []
    if steps and not (folder / UNSAVED).exists():
        raise RuntimeError(f"checkpoints (={folder / CHECKPOINTS}) holds none, but {METRICS} has steps up to {int(steps[-1])}; "
                           "mount them, or put them back, or start another run with --machine.name")


def check_same_recipe(config: Config, path: Path) -> None:
    """Raise ValueError with both fingerprints and the keys that differ, when the config stored in `path` is of another recipe."""
    # Fingerprints are computed anew: settings may have been added since, with defaults.
    stored = load(path)
    ours, theirs = config.fingerprint(), stored.fingerprint()
    if ours != theirs:
        changed = "; ".join(differences(config.as_dict(), stored.as_dict()))
        raise ValueError(f"fingerprint (={ours[:16]}…) is not that of {path} (={theirs[:16]}…): {changed}; resume "
                         "with the same recipe, or give another --machine.name")


def record_start(folder: Path, **facts: Any) -> None:
    """Append a line to versions.jsonl: versions, git state and command of this start, and `facts`. Main process only."""
    line = {"time": round(time.time(), 3), "command": sys.argv, "python": platform.python_version(),
            "torch": _version("torch"), "numpy": _version("numpy"),
            "dali": _version("nvidia-dali-cuda120") or _version("nvidia-dali-cuda130"), "git": _git(), **facts}
    with writing(folder / VERSIONS), (folder / VERSIONS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit of the source tree and whether it has changes; None outside a repository."""
    tree = Path(__file__).resolve().parent.parent
    try:
        commit, status = (subprocess.run(["git", *words], cwd=tree, capture_output=True, text=True, check=True,
                                         encoding="utf-8", errors="replace", timeout=10).stdout.strip()
                          for words in (("rev-parse", "HEAD"), ("status", "--porcelain")))
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": bool(status)}
