"""Run folders into facts: read leniently, believed only where that is safe.

A run may be half done, killed in the middle of a line, or older than this program. What cannot be read is left out and named in
`Run.problems`; only a folder that is no run at all is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, Iterator, Mapping

import yaml

from train.recipe import load_yaml
from train.report.facts import Checkpoint, Epoch, Run, Step, Test
from train.run_folder import CHECKPOINTS, CONFIG, METRICS, VERSIONS

EVALUATIONS = "evaluations"  # folder of a run's saved tests
POINTS = 400  # of a curve by step: more cannot be seen


class NoRun(ValueError):
    """A folder that is not one of a run."""


def read_run(folder: Path) -> Run:
    """The facts of a run folder.

    Raises:
        NoRun: it has no config.yaml that is one of a run, or is a checkpoint or an exported network.
    """
    if not folder.is_dir():
        raise NoRun(f"run (={folder}) is not a folder; name run folders, such as runs/tiny100")
    if (folder / "manifest.json").is_file():  # both have a config.yaml too
        raise NoRun(f"run (={folder}) is a checkpoint or an exported network; name run folders, such as runs/tiny100")
    config = _config(folder / CONFIG)
    problems: list[str] = []
    starts = tuple(_lines(folder / VERSIONS, problems))
    read = _Read()
    for line in _lines(folder / METRICS, problems):
        read.take(line)
    points, loader = _checkpoints(folder / CHECKPOINTS)
    count = _whole(loader.get("samples"))
    images = (count, count) if count else read.train_images(_whole(config["train"].get("batch")))
    tests = [*([read.test] if read.test else []), *_evaluations(folder / EVALUATIONS, problems)]
    epochs = tuple(read.epochs[number] for number in sorted(read.epochs))
    return Run(folder, folder.resolve().name, config, starts, epochs, tuple(read.steps[::-(-len(read.steps) // POINTS) or 1]),
               read.steps[-1].step if read.steps else -1, tuple(tests), points, images, read.validation_images,
               str(loader.get("images") or ""), read.when, tuple(_few(problems + read.problems)))


class _Read:
    """Lines of metrics.jsonl, gathered."""

    def __init__(self) -> None:
        self.epochs: dict[int, Epoch] = {}
        self.steps: list[Step] = []
        self.test: Test | None = None
        self.validation_images: int | None = None
        self.when: tuple[float, float] | None = None
        self.problems: list[str] = []
        self._ends: dict[int, int] = {}  # epoch → steps done at its end

    def take(self, line: Mapping[str, Any]) -> None:
        """One line; kinds and keys of another version are passed over."""
        kind, step, number = line.get("kind"), _whole(line.get("step")), _whole(line.get("epoch"))
        if (time := _number(line.get("time"))) is not None:
            self.when = (self.when or (time, time))[0], time
        if kind == "step" and step is not None:
            self.steps.append(Step(step, _number(line.get("lr")), _number(line.get("loss"))))
            self.problems += _not_finite(line, f"step {step}")
        elif kind == "epoch" and number is not None:
            self.epochs[number] = _epoch(number, line)
            self.problems += _not_finite(line, f"epoch {number}")
            if step is not None:
                self._ends[number] = step
            if isinstance(line.get("validation"), dict):
                self.validation_images = _whole(line["validation"].get("images"))
        elif kind == "test" and (test := _test(line)) is not None:
            self.test = test

    def train_images(self, batch: int | None) -> tuple[int, int] | None:
        """Least and most training images with which these epochs end at these steps: each with the batch of its last image."""
        if not batch or not self._ends:
            return None
        least = max((step - 1) * batch // (epoch + 1) + 1 for epoch, step in self._ends.items())
        most = min(step * batch // (epoch + 1) for epoch, step in self._ends.items())
        return (least, most) if least <= most else None


def _config(path: Path) -> Mapping[str, Any]:
    """config.yaml as plain values; NoRun when it is not one of a run."""
    try:
        config = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NoRun(f"run (={path.parent}) holds no {CONFIG}; name run folders, such as runs/tiny100") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise NoRun(f"run (={path.parent}) has a {CONFIG} that cannot be read ({' '.join(str(error).split())}); mend it, or "
                    "leave the run out") from None
    groups = ("data", "model", "optimizer", "schedule", "train")
    if not isinstance(config, dict) or not all(isinstance(config.get(group), dict) for group in groups) \
            or None in (_whole(config["train"].get("epochs")), _whole(config["train"].get("seed"))):
        raise NoRun(f"run (={path.parent}) has a {CONFIG} that is no resolved recipe; name folders that train.main made")
    return config


def _lines(path: Path, problems: list[str]) -> Iterator[Mapping[str, Any]]:
    """JSON objects of a file of lines; what is none is counted in `problems`."""
    bad: list[int] = []
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, text in enumerate(file, start=1):
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):
                    line = None
                if isinstance(line, dict):
                    yield line
                elif not text.endswith("\n"):
                    problems.append(f"{path.name} ends within a line: the run is writing it, or was killed")
                else:
                    bad.append(number)
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({error.strerror})" if path.exists() else f"{path.name} is missing")
    if bad:
        problems.append(f"{path.name}: {len(bad)} line{'s' * (len(bad) > 1)} cannot be read, the first is line {bad[0]}")


def _epoch(number: int, line: Mapping[str, Any]) -> Epoch:
    score, causes = line.get("validation"), line.get("waited_for")
    score = score if isinstance(score, dict) else {}
    shares = {str(cause): _number(share) for cause, share in (causes if isinstance(causes, dict) else {}).items()}
    return Epoch(number, _number(line.get("lr")), _number(line.get("loss")), _number(line.get("error")),
                 _number(score.get("top1")), _number(score.get("top5")), _number(line.get("images_per_s")),
                 _number(line.get("waited")), {cause: share for cause, share in shares.items() if share is not None},
                 _number(line.get("seconds")))


def _test(line: Mapping[str, Any]) -> Test | None:
    """A test that was counted; None when a count is missing."""
    images, views = _whole(line.get("images")), _whole(line.get("views"))
    top1, top5 = _number(line.get("top1")), _number(line.get("top5"))
    if not images or views is None or top1 is None or top5 is None:
        return None
    return Test(str(line.get("split", "")), views, images, top1, top5, _number(line.get("loss")))


def _checkpoints(root: Path) -> tuple[tuple[Checkpoint, ...], Mapping[str, Any]]:
    """The checkpoints of a run, and what the newest says of its training images."""
    found: list[Checkpoint] = []
    loader: Mapping[str, Any] = {}
    for path in sorted(root.glob("step-*")) if root.is_dir() else []:
        state, manifest = _json(path / "state.json"), path / "manifest.json"
        if not state or not manifest.is_file():
            continue
        found.append(Checkpoint(path.name, _whole(state.get("step")), _number(state.get("validation_error")), _sha256(manifest)))
        loader = state["loader"] if isinstance(state.get("loader"), dict) else loader
    return tuple(found), loader


def _evaluations(root: Path, problems: list[str]) -> list[Test]:
    """Saved tests (train/evaluate/predictions.py), checked against their hashes; one that is not whole is a problem."""
    found = []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        from train.evaluate.ensemble import member_result
        from train.evaluate.predictions import load

        try:
            saved = load(path)
        except (ValueError, RuntimeError, OSError) as error:
            problems.append(str(error).partition(";")[0])
            continue
        if saved.labelled:
            score = member_result(saved).score
            found.append(Test(saved.split, saved.key.views, score.images, score.top1, score.top5, score.loss, path.name,
                              saved.key.checkpoint))
    return found


def _json(path: Path) -> Mapping[str, Any]:
    """A JSON object; empty when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _not_finite(line: Mapping[str, Any], where: str) -> list[str]:
    """Names of figures that are NaN or infinite."""
    return [f"{key} is not finite at {where}" for key, value in line.items()
            if isinstance(value, float) and not math.isfinite(value)]


def _few(problems: list[str], most: int = 6) -> list[str]:
    """At most so many, and how many more there are."""
    return problems if len(problems) <= most else [*problems[:most], f"and {len(problems) - most} more"]


def _number(value: object) -> float | None:
    """A finite number, None for anything else."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def _whole(value: object) -> int | None:
    """A whole number, None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
