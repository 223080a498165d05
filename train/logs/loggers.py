"""TensorBoard and Weights & Biases as further writers of metrics (machine.log_to). metrics.jsonl stays the record: a failure of
theirs is said once and changes nothing else. A resume continues the same run of theirs.
"""
import hashlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from train.config import Config

NAMES = {"error": "top1_error", "top1": "top1_error", "top5": "top5_error", "waited": "data_wait"}


class Logger(Protocol):
    """A writer of scalars, open from its making on."""

    def write(self, scalars: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard. What lies there of steps from `step` on, of a start before, is purged."""

    def __init__(self, folder: Path, config: Config, step: int) -> None:
        self._writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(
            str(folder / "tensorboard"), purge_step=step, flush_secs=10)

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases in RUN/wandb, its id that of the run folder's first start. Offline unless WANDB_MODE is set:
    nothing leaves the machine before `wandb sync`. No console output, code, packages or system figures are taken along."""

    def __init__(self, folder: Path, config: Config, step: int) -> None:
        wandb = importlib.import_module("wandb")
        first_start = (folder / "versions.jsonl").read_bytes().partition(b"\n")[0]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "alexnet"), name=folder.name, dir=str(folder), config=config.as_dict(),
            id=hashlib.sha256(first_start).hexdigest()[:16], resume="allow", mode=os.environ.get("WANDB_MODE", "offline"),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False, x_disable_stats=True,
                                    x_save_requirements=False))
        self._run.define_metric("*", step_metric="step")  # its own count of steps could not go back at a resume

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log({**scalars, "step": step})

    def close(self) -> None:
        self._run.finish()


LOGGERS: dict[str, Callable[[Path, Config, int], Logger]] = {"tensorboard": TensorBoard, "wandb": Wandb}


def check_installed(config: Config) -> None:
    """Raise ValueError when the package of one of machine.log_to is missing."""
    for name in config.machine.log_to:
        if getattr(importlib.util.find_spec(name), "origin", None) is None:  # also of a mere folder of that name
            raise ValueError(f"machine.log_to (={name}) needs a package that is not installed; pip install {name}, or "
                             "leave it out")


class Loggers:
    """All of machine.log_to, for a run in `folder` that goes on at `step`. `warn` is called once for each that fails, which then
    gets nothing more."""

    def __init__(self, folder: Path, config: Config, step: int, warn: Callable[[str], None]) -> None:
        self._open: dict[str, Logger] = {}
        self._warn = warn
        for name in config.machine.log_to:
            self._attempt(name, lambda: self._open.update({name: LOGGERS[name](folder, config, step)}))

    def write(self, kind: str, values: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl. An epoch is drawn at its last step."""
        for name, logger in list(self._open.items()):
            self._attempt(name, lambda: logger.write(scalars(kind, values), values["step"] - (kind == "epoch")))

    def close(self) -> None:
        for name, logger in list(self._open.items()):
            self._attempt(name, logger.close)
        self._open = {}

    def _attempt(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # of any kind: training is worth more
            self._open.pop(name, None)
            reason = (str(error) or type(error).__name__).splitlines()[0]
            self._warn(f"machine.log_to (={name}) failed ({reason}); it gets nothing more, metrics.jsonl has everything")


def scalars(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Names and figures of a line of metrics.jsonl: `step/loss`, `train/top1_error`, `val/loss`, `test/top5_error` …"""
    group = {"epoch": "train"}.get(kind, kind)
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= scalars("val" if key == "validation" else f"{group}/data_wait", value)
        elif isinstance(value, float):
            found[f"{group}/{NAMES.get(key, key)}"] = value
    return found
