"""What a run has noted of one of its checkpoints, for the model card: what was measured of these very weights, and with what they
were trained. What cannot be read is left out."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Iterator, Optional

from train.checkpoint import checkpoint
from train.evaluate import predictions as saved
from train.export.model_card import Result
from train.recipe import load
from train.run_folder import CHECKPOINTS, METRICS, VERSIONS
from train.evaluate.metrics import score

EVALUATIONS = "evaluations"  # of a run


def measured(path: Path, manifest: str) -> list[Result]:
    """Tests of a checkpoint: the validation it was saved after, the test at the end of training when it is the last one, and
    saved evaluations of it. Of a checkpoint that has left its run's folder there are none.

    Args:
        path: the checkpoint, verified.
        manifest: SHA-256 of its manifest.
    """
    if path.parent.name != CHECKPOINTS:
        return []
    run, state, config = path.parent.parent, checkpoint.read_state(path), load(path / checkpoint.CONFIG)
    found: list[Optional[Result]] = []
    for line in _lines(run / METRICS):
        validation = line.get("validation")
        if line.get("step") != state["step"]:
            continue
        if line.get("kind") == "test":
            found.append(_result(line, "the end of training"))
        elif line.get("kind") == "epoch" and state["validation_error"] is not None and isinstance(validation, dict):
            said = {"split": config.data.validation_split, "views": config.train.validate_views, **validation}
            found.append(_result(said, f"the validation after epoch {line.get('epoch')}, counted from 0"))
    for folder in sorted((run / EVALUATIONS).glob("*/")):
        try:
            evaluation = saved.load(folder)
        except (ValueError, RuntimeError, OSError) as error:
            print(f"warning: not on the card: {error}", file=sys.stderr)
            continue
        if evaluation.key.checkpoint == manifest and evaluation.labelled:
            images, key = evaluation.images, evaluation.key
            counted = score(images["place"], images["probability"], key.outputs)
            found.append(Result(evaluation.split, key.views, counted.images, counted.top1, counted.top5, "a saved evaluation"))
    return list(dict.fromkeys(result for result in found if result is not None))


def versions(path: Path) -> dict[str, str]:
    """What trained a checkpoint, as far as its run has noted it, and what exports it."""
    starts = list(_lines(path.parent.parent / VERSIONS)) if path.parent.name == CHECKPOINTS else []
    last = starts[-1] if starts else {}
    said = {f"trained with {name}": str(last[name]) for name in ("python", "torch", "dali", "numpy") if last.get(name)}
    git = last.get("git")
    if isinstance(git, dict) and git.get("commit"):
        said["trained by commit"] = str(git["commit"]) + (", changed" if git.get("changed") else "")
    return said | exported_with()


def exported_with() -> dict[str, str]:
    """Versions of what writes the files."""
    return {f"exported with {name}": metadata.version(name) for name in ("torch", "safetensors")}


def _result(line: dict[str, Any], source: str) -> Optional[Result]:
    """A test that was counted; None when the line does not say all of it."""
    try:
        return Result(str(line["split"]), int(line["views"]), int(line["images"]), float(line["top1"]), float(line["top5"]),
                      source)
    except (KeyError, TypeError, ValueError):
        return None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """JSON objects of a file of lines."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for part in text.splitlines():
        try:
            line = json.loads(part)
        except ValueError:
            continue
        if isinstance(line, dict):
            yield line
