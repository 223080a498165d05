"""Read run folders into `Run`s for reports and model cards, leniently.

A run may be half done, killed in the middle of a line, or older than this program. What cannot be read is left out and named in
`Run.problems`; only a folder that is no run at all is refused. Errors and data wait are shares here, never percent.
"""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

from pipeline.files import file_sha256, parse_line
from pipeline.io_errors import explain, in_words
from train.checkpoint import checkpoint
from train.config import changes_results
from train.evaluate import ensemble, predictions
from train.evaluate.metrics import Score
from train.recipe.strict_yaml import load_yaml
from train.report import paper
from train.run_folder import CHECKPOINTS, CONFIG, HISTORY, METRICS, VERSIONS, is_altered

EVALUATIONS = "evaluations"  # folder of a run's saved evaluations


class NoRun(ValueError):
    """A folder that is not one of a run."""


@dataclass(frozen=True)
class Epoch:
    """One epoch; None where it is not recorded, or not finite."""

    epoch: int
    lr: float | None
    loss: float | None
    error: float | None  # top-1, in training
    validation_loss: float | None
    top1: float | None  # in validation
    top5: float | None
    images_per_s: float | None
    waited: float | None
    waited_for: dict[str, float]  # `waited` by stage of the loader
    seconds: float | None


@dataclass(frozen=True)
class Test:
    """A test of the network: at the end of training, or a saved evaluation."""

    split: str
    views: int
    images: int
    top1: float
    top5: float
    loss: float | None
    source: str = ""  # folder of a saved evaluation
    checkpoint: str = ""  # SHA-256 of its checkpoint's manifest
    step: int | None = None  # of the test at the end of training


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in a run folder."""

    name: str
    validation_error: float | None  # None when not validated
    manifest: str  # its SHA-256


@dataclass(frozen=True)
class Run:
    """All that is known of a run."""

    folder: Path
    name: str
    config: Mapping[str, Any]  # config.yaml as plain values
    starts: tuple[Mapping[str, Any], ...] = ()  # lines of versions.jsonl, oldest first
    epochs: tuple[Epoch, ...] = ()
    began: bool = False  # whether a step or an epoch is recorded
    tests: tuple[Test, ...] = ()  # at the end of training, then saved evaluations
    checkpoints: tuple[Checkpoint, ...] = ()  # oldest first
    train_images: tuple[int, int] | None = None  # least and most it can have; equal where a checkpoint records it
    validation_images: int | None = None
    images_sha256: str = ""  # of the training images, "" unknown
    extended: tuple[str, ...] = ()  # what resumes have changed of what changes results
    problems: tuple[str, ...] = ()  # what could not be read

    @property
    def seed(self) -> int:
        return int(self.config["train"]["seed"])

    @property
    def planned_epochs(self) -> int:
        return int(self.config["train"]["epochs"])

    @property
    def test(self) -> Test | None:
        """The test at the end of training; None before."""
        return next((test for test in self.tests if not test.source), None)

    @property
    def score(self) -> "Test | None":
        """Its test, or before that its last validation."""
        if self.test or not self.epochs or not self.validation_images or self.epochs[-1].top1 is None:
            return self.test
        last = self.epochs[-1]
        return Test("validation", 1, self.validation_images, last.top1 or 0.0, last.top5 or 0.0, last.validation_loss)

    @property
    def at_chance(self) -> bool:
        """Whether its last error is no better than guessing."""
        score, classes = self.score, _whole(self.config["model"].get("classes"))
        return bool(score and classes and Score(score.images, round(score.top1 * score.images), 0, 0.0, classes).at_chance)

    @property
    def state(self) -> str:
        """How far it is, in words."""
        if self.test:
            return "tested"
        if len(self.epochs) >= self.planned_epochs:
            return "trained, not tested"
        if self.epochs:
            return f"not finished: {len(self.epochs)} of {self.planned_epochs} epochs"
        return "in its first epoch" if self.began else "no epoch yet"

    @property
    def data_set(self) -> str:
        """Key of the paper's data set that it was trained and tested on, "" for another."""
        data = self.config["data"]
        same_split = data.get("validation_split") == data.get("test_split")
        tested = self.test.images if self.test else self.validation_images if same_split else None
        return paper.data_set(self.config["model"].get("classes"), self.train_images, tested)

    @property
    def best(self) -> Checkpoint | None:
        """The checkpoint with the lowest validation error, or the newest when none was validated."""
        rated = [(saved.validation_error, saved.name, saved) for saved in self.checkpoints if saved.validation_error is not None]
        return min(rated)[2] if rated else self.checkpoints[-1] if self.checkpoints else None

    def start(self, key: str) -> Any:
        """What its last start recorded under `key`, None where it did not."""
        return self.starts[-1].get(key) if self.starts else None


def runs_below(folder: Path) -> list[Path]:
    """The folder itself, or the run folders in it, when it is none itself."""
    below = [] if (folder / CONFIG).exists() else sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    return below or [folder]


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises NoRun when it has no config.yaml that is one of a run, or is a checkpoint or exported network."""
    if not folder.is_dir():
        raise NoRun(f"run (={folder}) is not a folder; name run folders, such as runs/tiny100")
    if (folder / checkpoint.MANIFEST).is_file():  # both have a config.yaml too
        raise NoRun(f"run (={folder}) is a checkpoint or an exported network; name run folders, such as runs/tiny100")
    config = _config(folder / CONFIG)
    problems: list[str] = []
    starts = tuple(_json_lines(folder / VERSIONS, problems))
    epochs: dict[int, Epoch] = {}
    steps_done: dict[int, int] = {}  # at the end of an epoch
    tests: list[Test] = []
    validation_images, began = None, False
    for line in _json_lines(folder / METRICS, problems):
        kind, step, epoch = line.get("kind"), _whole(line.get("step")), _whole(line.get("epoch"))
        began = began or kind == "step"
        if kind == "epoch" and epoch is not None:
            epochs[epoch] = _epoch(epoch, line)
            if step is not None:
                steps_done[epoch] = step
            if isinstance(line.get("validation"), dict):
                validation_images = _whole(line["validation"].get("images"))
        elif kind == "test":
            tests = _test(line) or tests
    checkpoints: tuple[Checkpoint, ...] = ()
    newest: Mapping[str, Any] = {}
    try:
        checkpoints, newest = _checkpoints(folder / CHECKPOINTS, problems)
    except OSError as error:
        problems.append(explain(error))
    problems += _altered(folder, starts, newest)
    loader: Mapping[str, Any] = newest.get("loader") or {}
    samples = _whole(loader.get("samples"))
    train_images = (samples, samples) if samples else _train_images(_whole(config["train"].get("batch")), steps_done)
    tests = [*tests, *_evaluations(folder / EVALUATIONS, problems)]
    return Run(folder, folder.resolve().name, config, starts, tuple(epochs[number] for number in sorted(epochs)), began,
               tuple(tests), checkpoints, train_images, validation_images, str(loader.get("images") or ""),
               tuple(_extended(folder / HISTORY, problems)), tuple(problems))


def _altered(folder: Path, starts: Sequence[Mapping[str, Any]], newest: Mapping[str, Any]) -> Iterator[str]:
    """What the start that came last, and the state of the newest checkpoint, tell of files that have changed since."""
    if is_altered(folder, starts):
        yield f"{CONFIG} is not as the last start wrote it; each checkpoint has its own"
    if not starts and newest and (folder / VERSIONS).exists():
        yield f"{VERSIONS} tells of no start"
    with contextlib.suppress(OSError):
        if (lacking := (_whole(newest.get("metrics_bytes")) or 0) - (folder / METRICS).stat().st_size) > 0:
            yield f"{METRICS} lacks {lacking} bytes that were written before the newest checkpoint"


def _train_images(batch: int | None, steps_done: Mapping[int, int]) -> tuple[int, int] | None:
    """Least and most training images with which these epochs end after so many steps: each with the batch of its last image."""
    if not batch or not steps_done:
        return None
    least = max((step - 1) * batch // (epoch + 1) + 1 for epoch, step in steps_done.items())
    most = min(step * batch // (epoch + 1) for epoch, step in steps_done.items())
    return (least, most) if least <= most else None


def _config(path: Path) -> Mapping[str, Any]:
    """config.yaml as plain values; NoRun when it is not one of a run."""
    try:
        config = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NoRun(f"run (={path.parent}) holds no {CONFIG}; name run folders, such as runs/tiny100") from None
    except OSError as error:
        raise NoRun(explain(error)) from None
    except ValueError as error:
        raise NoRun(f"run (={path.parent}) has a {CONFIG} that cannot be read ({in_words(error)}); mend it, or "
                    "leave the run out") from None
    groups = ("data", "model", "optimizer", "schedule", "train")
    if not isinstance(config, dict) or not all(isinstance(config.get(group), dict) for group in groups) \
            or None in (_whole(config["train"].get("epochs")), _whole(config["train"].get("seed"))):
        raise NoRun(f"run (={path.parent}) has a {CONFIG} that is no resolved recipe; name folders that train.main made")
    return config


def _json_lines(path: Path, problems: list[str]) -> list[Mapping[str, Any]]:
    """JSON objects of a file of lines; other lines are counted in `problems`."""
    try:
        *lines, cut = path.read_bytes().split(b"\n")
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({error.strerror})" if path.exists() else f"{path.name} is missing")
        return []
    found: list[Mapping[str, Any]] = [line for line in map(parse_line, lines) if line is not None]
    if cut:
        problems.append(f"{path.name} ends within a line: the run is writing it, or was killed")
    if bad := len(lines) - len(found):
        problems.append(f"{path.name}: {bad} line{'s' * (bad > 1)} cannot be read, or {'are' if bad > 1 else 'is'} damaged")
    return found


def _extended(path: Path, problems: list[str]) -> Iterator[str]:
    """What history.jsonl tells, which is there when a resume has changed the recipe."""
    for line in _json_lines(path, problems) if path.exists() else []:
        values = line.get("changes")
        for key, change in values.items() if isinstance(values, dict) else ():
            if changes_results(key) and isinstance(change, list) and len(change) == 2:
                yield f"{key} {change[0]} → {change[1]} from step {line.get('step')} on"


def _epoch(number: int, line: Mapping[str, Any]) -> Epoch:
    score, stages = (value if isinstance(value, dict) else {} for value in (line.get("validation"), line.get("waited_for")))
    shares = {str(stage): share for stage, value in stages.items() if (share := _number(value)) is not None}
    lr, loss, error, images_per_s, waited, seconds = (_number(line.get(key)) for key in (
        "lr", "loss", "error", "images_per_s", "waited", "seconds"))
    return Epoch(number, lr, loss, error, _number(score.get("loss")), _number(score.get("top1")), _number(score.get("top5")),
                 images_per_s, waited, shares, seconds)


def _test(line: Mapping[str, Any]) -> list[Test]:
    """The test at the end of training; empty when a count is missing."""
    views, images = _whole(line.get("views")), _whole(line.get("images"))
    top1, top5 = _number(line.get("top1")), _number(line.get("top5"))
    if not images or views is None or top1 is None or top5 is None:
        return []
    return [Test(str(line.get("split", "")), views, images, top1, top5, _number(line.get("loss")), step=_whole(line.get("step")))]


def _checkpoints(root: Path, problems: list[str]) -> tuple[tuple[Checkpoint, ...], Mapping[str, Any]]:
    """The checkpoints of a run whose state is as it was written, and the newest of those."""
    found: list[Checkpoint] = []
    state: Mapping[str, Any] = {}
    for path in checkpoint.checkpoints(root):
        try:
            checkpoint.verify_state(path)
            state, manifest = checkpoint.read_state(path), file_sha256(path / checkpoint.MANIFEST)
        except (checkpoint.DamagedCheckpoint, OSError, ValueError) as error:
            problems.append(in_words(error).partition(";")[0])
            continue
        found.append(Checkpoint(path.name, _number(state.get("validation_error")), manifest))
    return tuple(found), state


def _evaluations(root: Path, problems: list[str]) -> list[Test]:
    """Saved evaluations, compared with their hashes; one that is not whole is a problem."""
    found = []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        try:
            saved = predictions.load(path)
        except (ValueError, RuntimeError, OSError) as error:
            problems.append(in_words(error).partition(";")[0])
            continue
        if saved.labelled:
            score = ensemble.member_result(saved).score
            found.append(Test(saved.split, saved.key.views, score.images, score.top1, score.top5, score.loss, path.name,
                              saved.key.checkpoint))
    return found


def _number(value: object) -> float | None:
    """A finite number, None for anything else."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def _whole(value: object) -> int | None:
    """A whole number, None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None
