"""What is known of a run, for a report. Errors and waiting are shares here, never percent.

Reading it is train/report/runs.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping

from train.report import paper
from train.evaluate.metrics import Score


@dataclass(frozen=True)
class Epoch:
    """One epoch; None where it is not said, or not finite. `waited_for` divides `waited` by cause."""

    epoch: int
    lr: float | None
    loss: float | None
    error: float | None
    top1: float | None
    top5: float | None
    images_per_s: float | None
    waited: float | None
    waited_for: dict[str, float]
    seconds: float | None


@dataclass(frozen=True)
class Step:
    """A line of a step: its number, learning rate, loss."""

    step: int
    lr: float | None
    loss: float | None


@dataclass(frozen=True)
class Test:
    """A test of the network: at the end of training, or a saved evaluation: then `source` names its folder, and `checkpoint` is
    the SHA-256 of what was tested (its manifest)."""

    split: str
    views: int
    images: int
    top1: float
    top5: float
    loss: float | None
    source: str = ""
    checkpoint: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: folder name, step, validation error (share; None when not validated), SHA-256 of its manifest."""

    name: str
    step: int | None
    validation_error: float | None
    manifest: str


@dataclass(frozen=True)
class Run:
    """All that is known of a run.

    Attributes:
        folder: where it lies.
        name: of the folder.
        config: config.yaml as plain values.
        starts: lines of versions.jsonl, oldest first.
        epochs, steps: of metrics.jsonl; steps are thinned out.
        last_step: the last one noted, -1 for none.
        tests: at the end of training, then saved evaluations.
        checkpoints: oldest first.
        train_images: least and most training images it can have; None unknown. Equal where a checkpoint says it.
        validation_images: of each epoch's validation; None unknown.
        images_sha256: hash of the training images, "" unknown.
        when: seconds since 1970 of the first and last line; None where there is none.
        problems: what could not be read, or is not finite.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    starts: tuple[Mapping[str, Any], ...] = ()
    epochs: tuple[Epoch, ...] = ()
    steps: tuple[Step, ...] = ()
    last_step: int = -1
    tests: tuple[Test, ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ()
    train_images: tuple[int, int] | None = None
    validation_images: int | None = None
    images_sha256: str = ""
    when: tuple[float, float] | None = None
    problems: tuple[str, ...] = field(default_factory=tuple)

    @property
    def seed(self) -> int:
        """Its seed."""
        return int(self.config["train"]["seed"])

    @property
    def asked(self) -> int:
        """Epochs that the recipe asks for."""
        return int(self.config["train"]["epochs"])

    @property
    def test(self) -> Test | None:
        """The test that the recipe asks for, at the end of training; None before."""
        return next((test for test in self.tests if not test.source), None)

    @property
    def at_chance(self) -> bool:
        """Whether the test at the end is no better than guessing: then its distance from others says nothing."""
        test, classes = self.test, self.config["model"].get("classes")
        return bool(test and isinstance(classes, int) and classes > 0
                    and Score(test.images, round(test.top1 * test.images), 0, 0.0, classes).at_chance)

    @property
    def state(self) -> str:
        """How far it is, in words."""
        if self.test:
            return "tested"
        if len(self.epochs) >= self.asked:
            return "trained, not tested"
        if self.epochs:
            return f"not finished: {len(self.epochs)} of {self.asked} epochs"
        return "in its first epoch" if self.last_step >= 0 else "no epoch yet"

    @property
    def data_set(self) -> str:
        """Key of the paper's data set that it was trained and tested on, "" for another."""
        data = self.config["data"]
        same = data.get("validation_split") == data.get("test_split")
        tested = self.test.images if self.test else self.validation_images if same else None
        return paper.data_set(self.config["model"].get("classes"), self.train_images, tested)

    @property
    def best(self) -> Checkpoint | None:
        """The kept checkpoint with the lowest validation error, or the newest when none was validated."""
        rated = [point for point in self.checkpoints if point.validation_error is not None]
        return min(rated, key=lambda point: (point.validation_error, point.name)) if rated else \
            (self.checkpoints[-1] if self.checkpoints else None)

    def start(self, key: str) -> Any:
        """What the last start noted of `key`, None where it did not."""
        return self.starts[-1].get(key) if self.starts else None
