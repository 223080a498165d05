"""The model card (README.md) of an exported network: layers, preprocessing, measured errors, and code that loads it.

Its text is model_card.md.jinja. Everything in it comes from the recipe, the weights' shapes and what the run has noted of this
very checkpoint. The tests run the code that it shows.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Mapping, Sequence

import jinja2

from model.alexnet import canonical_shapes, parameter_count, shapes
from train.checkpoint import checkpoint
from train.checkpoint.resolve import Resolved
from train.config import Config
from train.report.runs import NoRun, Test, read_run

NO_LICENCE = ("Not stated: whoever publishes these weights says under which terms. The program is Apache-2.0; training images "
              "have terms of their own.")


@dataclass(frozen=True)
class About:
    """What the card says that the recipe does not.

    Attributes:
        origin: where the weights come from, in a sentence.
        hashes: what → SHA-256.
        results: tests of these weights.
        classes: number of classes named in classes.txt; 0 when there is none.
        versions: program → version.
        licence: of the weights.
    """

    origin: str
    hashes: Mapping[str, str] = field(default_factory=dict)
    results: Sequence[Test] = ()
    classes: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    licence: str = NO_LICENCE


def card(name: str, config: Config, about: About, onnx: Sequence[str] = ()) -> str:
    """README.md of an exported folder. `onnx`: outputs of model.onnx, if it is written."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined,
                                     trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["times"] = lambda shape: "×".join(map(str, shape))
    model = config.model
    return environment.get_template("model_card.md.jinja").render(
        name=name, config=config, data=config.data, model=model, about=about, onnx=onnx, parameters=parameter_count(model),
        weights=canonical_shapes(model), outputs=dict(shapes(model)), prod=math.prod)


def describe(source: Resolved, classes: int, licence: str | None) -> About:
    """What is known of a checkpoint: its hashes, and the tests and versions that its run has noted.

    A checkpoint that was moved out of its run's folder has no results; what cannot be read is left out with a warning.
    """
    state, config = checkpoint.read_state(source.path), source.config()
    origin = f"Trained for {state['step']:,} steps of {config.train.batch} images (checkpoint `{source.path.name}`)."
    hashes = {"checkpoint (its manifest)": source.sha256, "classes": state["classes"],
              **{what: digest for what, digest in state.get("sources", {}).items() if digest}}
    results, versions = _of_run(source, state, config)
    versions |= {f"exported with {name}": metadata.version(name) for name in ("torch", "safetensors")}
    return About(origin, hashes, results, classes, versions, licence or NO_LICENCE)


def _of_run(source: Resolved, state: Mapping[str, Any], config: Config) -> tuple[list[Test], dict[str, str]]:
    """Tests of a checkpoint (the validation it was saved after, the test at the end of training when it is the last one, saved
    evaluations of it), and the versions that trained it."""
    try:
        run = read_run(source.run) if source.run is not None else None
    except NoRun:
        run = None
    if run is None:
        return [], {}
    for problem in run.problems:
        print(f"warning: {problem}", file=sys.stderr)
    results: list[Test] = []
    epochs, data = state["progress"]["epoch"], config.data
    validation = {epoch.epoch: epoch for epoch in run.epochs}.get(epochs - 1)
    if state["validation_error"] is not None and validation is not None and run.validation_images is not None \
            and validation.top1 is not None and validation.top5 is not None:
        results.append(Test(data.validation_split, config.train.validate_views, run.validation_images, validation.top1,
                            validation.top5, None, f"the validation after epoch {validation.epoch}, counted from 0"))
    if run.test is not None and epochs == config.train.epochs:
        results.append(replace(run.test, source="the end of training"))
    results += [replace(test, source="a saved evaluation") for test in run.tests if test.checkpoint == source.sha256]
    start = run.starts[-1] if run.starts else {}
    versions = {f"trained with {name}": str(start[name]) for name in ("python", "torch", "dali", "numpy") if start.get(name)}
    git = start.get("git")
    if isinstance(git, dict) and git.get("commit"):
        versions["trained by commit"] = str(git["commit"]) + (", changed" if git.get("changed") else "")
    return list(dict.fromkeys(results)), versions
