"""TensorBoard and Weights & Biases, the real ones: what they hold after a stop and a resume; a failure changes nothing else."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.runs import here, lines
from train.logs import loggers
from train.run_folder import Metrics

LINES = [("step", {"step": 3, "epoch": 0, "loss": 2.0, "error": 0.5, "waited": 0.1, "waited_for": {"read": 0.1}}),
         ("epoch", {"step": 4, "epoch": 0, "loss": 1.5, "validation": {"images": 24, "top1": 0.25, "loss": 1.0}})]


def stopped_and_resumed(recipe: Path, runs: Path, name: str) -> dict[str, dict[int, float]]:
    """A run that was stopped at step 13, lost what came after step 10, and was resumed; its figures by name and step."""
    words = [f"--machine.log_to=[{name}]", "--train.epochs=2", "--machine.checkpoint_steps=10"]
    out, _ = here(recipe, runs, *words, "--machine.stop_after=13", code=75)
    shutil.rmtree(runs / "small/checkpoints/step-000000013")
    resumed, _ = here(recipe, runs, *words, "--resume")
    assert "failed" not in out + resumed and "at step 10\n" in resumed
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for line in lines(runs / "small"):
        for key, value in loggers.scalars(line.pop("kind"), line).items():
            found[key][line["step"] - ("val" in key or "train" in key)] = value
    assert len(found["step/loss"]) == 19 and {"train/top1_error", "val/top5_error", "test/loss"} < found.keys()
    return found


def test_tensorboard_holds_each_step_once(recipe: Path, tmp_path: Path) -> None:
    expected = stopped_and_resumed(recipe, tmp_path, "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "small/tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert expected.keys() < set(events.Tags()["scalars"]) and "step/data_wait/decode" in events.Tags()["scalars"]
    for key, values in expected.items():
        assert {event.step: event.value for event in events.Scalars(key)} == pytest.approx(values, rel=1e-6), key
        assert len(events.Scalars(key)) == len(values), key


@pytest.mark.slow  # it starts a service of its own
def test_wandb_stays_offline_and_resumes_the_same_run(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    expected = stopped_and_resumed(recipe, tmp_path, "wandb")
    files = sorted(tmp_path.glob("small/wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and files[0].name == files[1].name
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for row in (row for path in files for row in wandb_rows(path)):
        for key in row.keys() & expected.keys():
            found[key][row["step"]] = row[key]
    assert found == expected


def wandb_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that were logged: the file is a log of LevelDB's form, of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, body, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]
        body += data[at + 7:at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record, body = Record.FromString(body), b""
            if record.HasField("history"):
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
    return rows


def test_a_missing_package_is_one_line_before_anything_is_done(recipe: Path, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *given: None if name == "wandb" else find(name, *given))
    _, err = here(recipe, tmp_path, "--machine.log_to=[wandb]", code=2)
    assert err == "error: machine.log_to (=wandb) needs a package that is not installed; pip install wandb, or leave it out\n"
    assert not (tmp_path / "small").exists()


def test_a_logger_that_cannot_be_opened_or_fails_later_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorboard").write_text("in the way")

    class Full:
        def __init__(self, *given: object) -> None:
            self.written = 0

        def write(self, *given: object) -> None:
            self.written += 1
            if self.written == 2:
                raise OSError(28, "No space left on device")

        def close(self) -> None:
            raise AssertionError("it has failed before")

    monkeypatch.setitem(loggers.LOGGERS, "wandb", Full)
    config: Any = SimpleNamespace(machine=SimpleNamespace(log_to=("tensorboard", "wandb")))
    warnings: list[str] = []
    metrics = Metrics(tmp_path / "metrics.jsonl", True)
    metrics.log_to(config, 0, warnings.append)
    for kind, values in LINES * 3:
        metrics.write(kind, **values)
    metrics.close()
    assert len(warnings) == 2 and warnings[0].startswith("machine.log_to (=tensorboard) failed (")
    assert warnings[1] == ("machine.log_to (=wandb) failed ([Errno 28] No space left on device); it gets nothing more, "
                           "metrics.jsonl has everything")
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 6


def test_a_line_without_a_step_is_a_failure_of_the_logger(tmp_path: Path) -> None:
    config: Any = SimpleNamespace(machine=SimpleNamespace(log_to=("tensorboard",)))
    warnings: list[str] = []
    opened = loggers.Loggers(tmp_path, config, 0, warnings.append)
    opened.write("step", {"loss": 1.0})
    assert len(warnings) == 1 and warnings[0].startswith("machine.log_to (=tensorboard) failed ('step')")


def test_other_processes_log_nothing(tmp_path: Path) -> None:
    config: Any = SimpleNamespace(machine=SimpleNamespace(log_to=("tensorboard",)))
    metrics = Metrics(tmp_path / "metrics.jsonl", False)
    metrics.log_to(config, 0, pytest.fail)
    metrics.write(*LINES[0][:1], **LINES[0][1])
    metrics.close()
    assert not list(tmp_path.iterdir())


def test_names_of_figures() -> None:
    assert loggers.scalars(*LINES[0]) == {"step/loss": 2.0, "step/top1_error": 0.5, "step/data_wait": 0.1,
                                          "step/data_wait/read": 0.1}
    assert loggers.scalars(*LINES[1]) == {"train/loss": 1.5, "val/top1_error": 0.25, "val/loss": 1.0}
