"""Run folder: config.yaml (the resolved recipe), versions.jsonl (one line per start), metrics.jsonl, checkpoints/.

metrics.jsonl has one JSON object per line. A checkpoint records its length, and a resume truncates it to that, so that no step
appears twice.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator, Mapping

from pipeline.files import atomic_write
from train.config import Config, differences
from train.recipe import dump, load, load_yaml

CONFIG, VERSIONS, METRICS, CHECKPOINTS = "config.yaml", "versions.jsonl", "metrics.jsonl", "checkpoints"
QUARANTINE = "quarantine.jsonl"


class Metrics:
    """Writer of metrics.jsonl.

    Args:
        path: the file.
        enabled: false in all processes but the main one, which write nothing.

    Raises:
        RuntimeError: from every method, when the file cannot be written.
    """

    def __init__(self, path: Path, enabled: bool) -> None:
        self._path = path
        self._file = path.open("ab") if enabled else None

    def write(self, kind: str, **values: Any) -> None:
        """Append a line: {"kind": …, "time": seconds since 1970, …}."""
        if self._file is not None:
            line = json.dumps({"kind": kind, "time": round(time.time(), 3), **values}, allow_nan=False)
            with self._explained():
                self._file.write(line.encode() + b"\n")
                self._file.flush()

    def length(self) -> int:
        """Size in bytes."""
        return 0 if self._file is None else self._file.tell()

    def sync(self) -> None:
        """fsync."""
        if self._file is not None:
            with self._explained():
                os.fsync(self._file.fileno())

    def truncate(self, length: int) -> None:
        """Drop everything after this many bytes."""
        if self._file is not None:
            with self._explained():
                self._file.truncate(min(length, self._file.seek(0, os.SEEK_END)))
                self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """fsync and close."""
        if self._file is not None:
            self.sync()
            self._file.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
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


def claim(folder: Path, config: Config, resume: bool) -> None:
    """Create the folder of a new run, or check that the one to resume has the same recipe. Main process only.

    Raises:
        ValueError: it holds a run already, or none to resume, or one of another recipe.
    """
    settled = folder / CONFIG
    if resume:
        if not settled.exists():
            raise ValueError(f"run folder (={folder}) holds no run to resume; start it without --resume")
        check_same_recipe(config, settled)
        return
    if settled.exists():
        raise ValueError(f"run folder (={folder}) already holds a run; resume it with --resume, or give another --machine.name")
    (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    with atomic_write(settled) as file:
        file.write(dump(config).encode())


def check_same_recipe(config: Config, path: Path) -> None:
    """Raise ValueError with both fingerprints and the keys that differ, when the config stored in `path` is of another recipe."""
    # Fingerprints are computed anew: settings may have been added since, with defaults.
    ours, theirs = config.fingerprint(), load(path).fingerprint()
    if ours != theirs:
        changed = "; ".join(differences(config.as_dict(), load_yaml(path.read_text(encoding="utf-8"))))
        raise ValueError(f"fingerprint (={ours[:16]}…) is not that of {path} (={theirs[:16]}…): {changed}; resume "
                         "with the same recipe, or give another --machine.name")


def check_sources(stored: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """Raise ValueError with both hashes when images, statistics or initial weights are not those the run began with."""
    for name, sha256 in ours.items():
        if stored[name] != sha256:
            new, old = (f"{digest[:16]}…" if digest else "random" for digest in (sha256, stored[name]))
            raise ValueError(f"{name} (={new}) is not the one of this run (={old}); resume with the same "
                             f"{'init_from.checkpoint' if name == 'initial weights' else 'index'}, or start another run with "
                             "--machine.name")


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
