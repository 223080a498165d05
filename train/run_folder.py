"""The folder of a run: what was asked (config.yaml), with what (versions.jsonl), what came of it (metrics.jsonl).

metrics.jsonl has one JSON object per line. A checkpoint notes its length, and a resume cuts it back to that, so no step
stands there twice.
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

from train.config import Config, differences
from train.recipe import dump, load, load_yaml

CONFIG, VERSIONS, METRICS, CHECKPOINTS = "config.yaml", "versions.jsonl", "metrics.jsonl", "checkpoints"


class Metrics:
    """Lines of metrics.jsonl.

    Args:
        path: the file.
        writes: only the main process does.
    """

    def __init__(self, path: Path, writes: bool) -> None:
        self._path = path
        self.file = path.open("ab") if writes else None

    def write(self, kind: str, **values: Any) -> None:
        """One line: {"kind": …, "time": seconds since 1970, …}."""
        if self.file is not None:
            line = json.dumps({"kind": kind, "time": round(time.time(), 3), **values}, allow_nan=False)
            with self._named():
                self.file.write(line.encode() + b"\n")

    def length(self) -> int:
        """Bytes of the file, with all that was written to it."""
        if self.file is None:
            return 0
        with self._named():
            self.file.flush()
        return self.file.tell()

    def sync(self) -> None:
        """Everything onto the disk."""
        if self.file is not None:
            with self._named():
                self.file.flush()
                os.fsync(self.file.fileno())

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RuntimeError(f"metrics file (={self._path}) could not be written ({error.strerror}); mend this, then go on "
                               "with --resume") from error

    def cut(self, length: int) -> None:
        """Forget what was written after the file had this length."""
        if self.file is not None:
            self.file.flush()
            self.file.truncate(min(length, self.file.seek(0, os.SEEK_END)))
            self.file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Write what is left."""
        if self.file is not None:
            self.sync()
            self.file.close()


def run_folder(config: Config, recipe: Path | None) -> Path:
    """Where a run lies: machine.runs / machine.name, or the recipe's name.

    Raises:
        ValueError: neither gives a name.
    """
    name = config.machine.name or (recipe.stem if recipe else "")
    if not name or "/" in name:
        raise ValueError(f"machine.name (={config.machine.name}) must name a folder of {config.machine.runs}; "
                         "give --machine.name or a recipe")
    return Path(config.machine.runs) / name


def claim(folder: Path, config: Config, resume: bool) -> None:
    """Make the folder of a new run, or check that the one to resume is a run of the same recipe. Main process only.

    Raises:
        ValueError: it holds a run already, or none to resume, or one of another recipe (both fingerprints printed).
    """
    settled = folder / CONFIG
    if not resume:
        if settled.exists():
            raise ValueError(f"run folder (={folder}) already holds a run; go on with --resume, or give another "
                             "--machine.name")
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        partial = folder / f"{CONFIG}.partial"
        partial.write_text(dump(config), encoding="utf-8")
        partial.rename(settled)
        return
    if not settled.exists():
        raise ValueError(f"run folder (={folder}) holds no run to resume; start it without --resume")
    check_same(config, load(settled), load_yaml(settled.read_text(encoding="utf-8")), str(settled))


def check_same(config: Config, stored: Config, stored_values: Mapping[str, Any], where: str) -> None:
    """Raise ValueError with both fingerprints and the keys that differ, when the recipe is not the one of the run."""
    ours, theirs = config.fingerprint(), stored.fingerprint()
    if ours != theirs:
        changed = "; ".join(differences(config.as_dict(), dict(stored_values)))
        raise ValueError(f"fingerprint (={ours[:16]}…) is not that of {where} (={theirs[:16]}…): {changed}; resume "
                         "with the same recipe, or give another --machine.name")


def check_sources(stored: Mapping[str, Any], ours: Mapping[str, str]) -> None:
    """Raise ValueError when index or stats are not those the run was started with; both hashes are printed."""
    for name, digest in ours.items():
        if stored[name] != digest:
            mine, theirs = (f"{found[:16]}…" if found else "random" for found in (digest, stored[name]))
            raise ValueError(f"{name} (={mine}) is not the one of this run (={theirs}); resume with the same "
                             f"{'init_from.checkpoint' if name == 'initial weights' else 'index'}, or start another run with "
                             "--machine.name")


def note_start(folder: Path, **facts: Any) -> None:
    """Append a line to versions.jsonl: this start's versions, git state, command and facts. Main process only."""
    line = {"time": round(time.time(), 3), "command": sys.argv, "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "numpy")}, "dali": _dali(), "git": _git(), **facts}
    with (folder / VERSIONS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _dali() -> str | None:
    """DALI's version, whichever CUDA flavour is installed."""
    return next((version for name in ("nvidia-dali-cuda120", "nvidia-dali-cuda130") if (version := _version(name))),
                None)


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
