"""Run folder: config.yaml (the resolved recipe), versions.jsonl (one line per start), metrics.jsonl, checkpoints/.

A checkpoint records the length of metrics.jsonl, and a resume truncates it to that, so that no step appears twice.
"""
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO, Callable

from train.config import Config, differences
from train.recipe import load

CONFIG, VERSIONS, METRICS, CHECKPOINTS = "config.yaml", "versions.jsonl", "metrics.jsonl", "checkpoints"
QUARANTINE, LOG = "quarantine.jsonl", "console.log"


class Metrics:
    """Writer of metrics.jsonl; not `enabled`, in all processes but the main one, it writes nothing. Raises RuntimeError when the
    file cannot be written."""

    def __init__(self, path: Path, enabled: bool) -> None:
        self._path = path
        self._file = path.open("ab") if enabled else None

    def write(self, kind: str, **values: Any) -> None:
        """Append a line: {"kind": …, "time": seconds since 1970, …}."""
        line = json.dumps({"kind": kind, "time": round(time.time(), 3), **values}, allow_nan=False)
        self._do(lambda file: file.write(line.encode() + b"\n"))

    def length(self) -> int:
        """Size in bytes."""
        return 0 if self._file is None else self._file.seek(0, os.SEEK_END)

    def sync(self) -> None:
        self._do(lambda file: os.fsync(file.fileno()))

    def truncate(self, length: int) -> None:
        self._do(lambda file: file.truncate(min(length, file.seek(0, os.SEEK_END))))

    def close(self) -> None:
        self.sync()
        if self._file is not None:
            self._file.close()

    def _do(self, work: Callable[[BinaryIO], object]) -> None:
        try:
            if self._file is not None:
                work(self._file)
                self._file.flush()
        except OSError as error:
            raise RuntimeError(f"metrics file (={self._path}) could not be written ({error.strerror}); mend this, then resume "
                               "with --resume") from error


def folder_of(config: Config, recipe: Path | None) -> Path:
    """The folder of a run: machine.runs / machine.name, or the recipe's name; ValueError when neither gives a name."""
    name = config.machine.name or (recipe.stem if recipe else "")
    if not name or "/" in name:
        raise ValueError(f"machine.name (={config.machine.name}) must name a folder of {config.machine.runs}; "
                         "give --machine.name or a recipe")
    return Path(config.machine.runs) / name


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
    with (folder / VERSIONS).open("a", encoding="utf-8") as file:
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
                                         timeout=10).stdout.strip()
                          for words in (("rev-parse", "HEAD"), ("status", "--porcelain")))
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": bool(status)}
