"""Run folder: config.yaml (the resolved recipe), history.jsonl (what resumes have changed of it), versions.jsonl (one line per
start), metrics.jsonl, checkpoints/.

A checkpoint records the length of metrics.jsonl, and a resume truncates it to that, so that no step appears twice; what it cuts
off is kept in metrics-replaced.jsonl. Whoever trains holds .lock. `.unsaved` is there until the first checkpoint is written:
without it, a run that has metrics but no checkpoint has lost sight of its checkpoints.
"""
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO, Callable, Mapping, Optional, Sequence

from pipeline.files import LockHeld, atomic_write, file_sha256, json_line, lock, parse_line
from pipeline.io_errors import explain, writing
from pipeline.schema import is_file_name
from train.config import Config, changes, changes_results
from train.logs.loggers import Loggers
from train.recipe import dump, load

CONFIG, HISTORY, VERSIONS = "config.yaml", "history.jsonl", "versions.jsonl"
METRICS, CHECKPOINTS = "metrics.jsonl", "checkpoints"
REPLACED, UNSAVED, LOCK = "metrics-replaced.jsonl", ".unsaved", ".lock"
QUARANTINE, LOG = "quarantine.jsonl", "console.log"
EXTENDABLE = ("train.epochs", "schedule.milestones")  # what a resume may change of what changes results
OF_A_START = ("machine.name", "machine.runs", "machine.stop_after")  # settings of one start alone


class Metrics:
    """Writer of metrics.jsonl; not `enabled`, in all processes but the main one, it writes nothing. Raises RuntimeError when the
    file cannot be written, or is no longer the one in the run folder."""

    def __init__(self, path: Path, enabled: bool) -> None:
        self._path = path
        self._file = path.open("ab") if enabled else None
        self._loggers: Optional[Loggers] = None

    def write(self, kind: str, **values: Any) -> None:
        """Append a line: {"kind": …, "time": seconds since 1970, …}."""
        line = json_line({"kind": kind, "time": round(time.time(), 3), **values})
        self._do(lambda file: file.write(line))
        if self._loggers is not None:
            self._loggers.write(kind, values)

    def log_to(self, config: Config, step: int, warn: Callable[[str], None]) -> None:
        """Write what comes from `step` on for machine.log_to as well."""
        if self._file is not None:
            self._loggers = Loggers(self._path.parent, config, step, warn)

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
            if self._loggers is not None:
                self._loggers.close()

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


def check_resumable(config: Config, path: Path, epochs: int = 0) -> None:
    """Raise ValueError naming each key, when `config` is no recipe with which a run of the one stored in `path` could go on after
    it has begun so many `epochs`: it may have more epochs and other milestones after them, and whatever changes no result."""
    stored = load(path)
    (passed, given), run = ([milestone for milestone in each.schedule.milestones if milestone.epoch < epochs]
                            for each in (stored, config)), path.parent
    problems = [f"{key}: {old} in the run, {new} now" for key, (old, new) in changes(stored.as_dict(), config.as_dict()).items()
                if changes_results(key) and (key not in EXTENDABLE or key == "schedule.milestones" and passed != given)]
    if config.train.epochs < epochs:
        raise ValueError(f"train.epochs (={config.train.epochs}) is less than the {epochs} epochs that the run has begun; give "
                         f"--train.epochs={epochs} or more, or start another run with --machine.name")
    if problems:
        lines = (run / VERSIONS).read_bytes().splitlines() if (run / VERSIONS).exists() else []
        starts = [line for line in map(parse_line, lines) if line is not None]
        altered = f" ({CONFIG} there has changed since the last start: copy that of its newest checkpoint)" \
            if is_altered(run, starts) else ""
        raise ValueError(f"recipe (={'; '.join(problems)}) is not the one of {run}{altered}; a resume may raise train.epochs, "
                         "change schedule.milestones of epochs to come, and the groups machine and parallel: give the run's "
                         "other values, or start another run with --machine.name")


def is_altered(folder: Path, starts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether config.yaml has other bytes than when the last of the run's `starts`, the lines of versions.jsonl, was recorded."""
    known = starts[-1].get("config_sha256") if starts else None
    return known is not None and known != file_sha256(folder / CONFIG)


def note_changes(folder: Path, config: Config, step: int, epoch: int) -> list[str]:
    """Note in history.jsonl and config.yaml what a resume at this step, in this epoch, changes of the recipe; lines that say it.
    Main process only."""
    new = config.as_dict()
    changed = {key: values for key, values in changes(load(folder / CONFIG).as_dict(), new).items() if key not in OF_A_START}
    if changed:
        _append(folder / HISTORY, {"step": step, "epoch": epoch, "changes": changed})
        write_config(folder, config)
    return [f"{key}: {old} -> {new}" for key, (old, new) in changed.items()]


def write_config(folder: Path, config: Config) -> None:
    with atomic_write(folder / CONFIG) as file:
        file.write(dump(config).encode())


def record_start(folder: Path, **facts: Any) -> None:
    """Append a line to versions.jsonl: versions, git state and command of this start, the hash of config.yaml as it is now, and
    `facts`. Main process only."""
    _append(folder / VERSIONS, {
        "command": sys.argv, "python": platform.python_version(), "torch": _version("torch"), "numpy": _version("numpy"),
        "dali": _version("nvidia-dali-cuda120") or _version("nvidia-dali-cuda130"), "git": _git(),
        "config_sha256": file_sha256(folder / CONFIG), **facts})


def _append(path: Path, values: Mapping[str, Any]) -> None:
    """Append a line with the time to a file of lines."""
    with writing(path), path.open("ab") as file:
        file.write(json_line({"time": round(time.time(), 3), **values}))


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
