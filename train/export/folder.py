"""The folder of an exported network, written whole or not at all after checking that its files give the network's logits, and its
model card (README.md, from model_card.md.jinja): the recipe, the weights' shapes, and what the run has noted of them. The tests
run the code that it shows.
"""
import math
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Mapping, Sequence

import jinja2
import torch

from model.alexnet import AlexNet, canonical_shapes, parameter_count, shapes
from pipeline.files import atomic_folder, remove_dead
from pipeline.index.header import ClassInfo
from pipeline.stats import Stats
from train.checkpoint import checkpoint
from train.checkpoint.resolve import Resolved
from train.config import Config, MachineConfig, ParallelConfig
from train.evaluate.metrics import FEW_CLASSES
from train.export import safetensors_io as weights
from train.export.onnx import onnx_model
from train.recipe import dump
from train.report.runs import NoRun, Test, read_run

# Of the largest logit. Two programs add the same float32 products in another order: measured 2e-7; a bfloat16 weight is 4e-3.
TOLERANCE = 2e-5
NOISE_IMAGES, NOISE_STD = 3, 60.0  # of the check; about the standard deviation of photographs


@dataclass(frozen=True)
class About:
    """What the card says that the recipe does not."""
    origin: str  # where the weights come from, in a sentence
    hashes: Mapping[str, str] = field(default_factory=dict)  # what → SHA-256
    results: Sequence[Test] = ()  # tests of these weights
    versions: Mapping[str, str] = field(default_factory=dict)  # program → version


def write_folder(out: Path, config: Config, network: AlexNet, stats: Stats, about: About, *, classes: Sequence[ClassInfo] = (),
                 hashes: Mapping[str, str] = {}, onnx: bool = False) -> dict[str, float]:
    """Write a network that anyone can load; train/export/safetensors_io.py lists the files. `network`: all of it, float32 on
    the CPU. `classes`: in the order of the outputs; empty when not known. `hashes`: for the metadata. Returns by how much the
    logits of each file differ from the network's at most. Raises ValueError when the folder exists or a weight is not finite,
    RuntimeError when a library is missing or a difference too large; nothing is left then."""
    if os.path.lexists(out):
        raise ValueError(f"--out (={out}) exists already; give a folder that does not")
    data, init = config.data, config.init_from
    config = replace(config, machine=MachineConfig(), parallel=ParallelConfig(),  # without what tells of this machine
                     data=replace(data, index=_relative(data.index), packed=_relative(data.packed)),
                     init_from=replace(init, checkpoint=_relative(init.checkpoint)))
    hashes = {**hashes, "stats_sha256": stats.sha256}
    tensors = {name: parameter.detach() for name, parameter in network.named_parameters()}
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_dead(out.parent, out.name)
    with atomic_folder(out) as folder:
        (folder / weights.WEIGHTS).write_bytes(weights.pack(config, tensors, hashes))
        (folder / checkpoint.CONFIG).write_text(dump(config), encoding="utf-8")
        stats.save(folder / checkpoint.STATS)
        if classes:
            lines = [f"{entry.wnid} {entry.words}".rstrip() for entry in classes]
            (folder / weights.CLASSES).write_text("\n".join(lines) + "\n", encoding="utf-8")
        if onnx:
            packed = onnx_model(config.model, tensors, {"fingerprint": config.fingerprint(), **hashes})
            (folder / weights.ONNX).write_bytes(packed)
        (folder / weights.CARD).write_text(card(out.name, config, about, len(classes), onnx), encoding="utf-8")
        weights.write_manifest(folder)
        return _compare(folder, network, onnx)


def _relative(path: str) -> str:
    return Path(path).name if Path(path).is_absolute() else path


def _compare(folder: Path, network: AlexNet, onnx: bool) -> dict[str, float]:
    """File → largest difference of its logits on noise from the network's. Raises RuntimeError when it is too large."""
    shape = (NOISE_IMAGES, 3, network.config.input_px, network.config.input_px)
    images = NOISE_STD * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network.eval()(images)
        found = [(weights.WEIGHTS, weights.from_pretrained(folder)(images))]
    if onnx:
        onnxruntime = weights.library("onnxruntime", "check model.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(folder / weights.ONNX, options, providers=["CPUExecutionProvider"])
        found += [(weights.ONNX, torch.from_numpy(session.run(["logits"], {"images": batch.numpy()})[0]))
                  for batch in (images, images[:1])]
    largest, differences = float(expected.abs().max()), dict.fromkeys([name for name, _ in found], 0.0)
    for name, logits in found:
        difference = float((logits - expected[:len(logits)]).abs().max())
        if not difference <= TOLERANCE * largest:  # nor NaN
            raise RuntimeError(f"{name} (={difference:.3g}) differs from the network by more than {TOLERANCE * largest:.3g} "
                               f"(largest value {largest:.3g}); nothing was written, report this with the recipe")
        differences[name] = max(differences[name], difference)
    return differences


def card(name: str, config: Config, about: About, classes: int = 0, onnx: bool = False) -> str:
    """README.md of an exported folder, with `classes` named in classes.txt, and `onnx` with model.onnx."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined,
                                     trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["times"] = lambda shape: "×".join(map(str, shape))
    model = config.model
    return environment.get_template("model_card.md.jinja").render(
        name=name, config=config, data=config.data, model=model, about=about, classes=classes, onnx=onnx,
        top5=model.classes >= FEW_CLASSES,
        parameters=parameter_count(model), weights=canonical_shapes(model), outputs=dict(shapes(model)), prod=math.prod)


def describe(source: Resolved) -> About:
    """What is known of a checkpoint: its hashes, the versions that trained it, and tests of it (the validation it was saved
    after, the test at the end of training when it is the last one, saved evaluations). A checkpoint moved out of its run's
    folder has no results; what cannot be read is left out with a warning."""
    state, config = checkpoint.read_state(source.path), source.config()
    origin = f"Trained for {state['step']:,} steps of {config.train.batch} images (checkpoint `{source.path.name}`)."
    hashes = {"checkpoint (its manifest)": source.sha256, "classes": state["classes"],
              **{what: digest for what, digest in state.get("sources", {}).items() if digest}}
    versions = {f"exported with {name}": weights.library(name).__version__ for name in ("torch", "safetensors")}
    results: list[Test] = []
    try:
        run = read_run(source.run) if source.run is not None else None
    except NoRun:
        run = None
    if run is not None:
        for problem in run.problems:
            print(f"warning: {problem}", file=sys.stderr)
        epochs, data = checkpoint.read_state(source.path, whole=True)["progress"]["epoch"], config.data
        validation = {epoch.epoch: epoch for epoch in run.epochs}.get(epochs - 1)
        if state["validation_error"] is not None and validation is not None and run.validation_images is not None \
                and validation.top1 is not None and validation.top5 is not None:
            results.append(Test(data.validation_split, config.train.validate_views, run.validation_images, validation.top1,
                                validation.top5, None, f"the validation after epoch {epochs}"))
        if run.test is not None and run.test.step == state["step"]:  # of an extended run, that of the last step only
            results.append(replace(run.test, source="the end of training"))
        results += [replace(test, source="a saved evaluation") for test in run.tests if test.checkpoint == source.sha256]
        start = run.starts[-1] if run.starts else {}
        trained = {f"trained with {name}": str(start[name]) for name in ("python", "torch", "dali", "numpy") if start.get(name)}
        git = start.get("git")
        if isinstance(git, dict) and git.get("commit"):
            trained["trained by commit"] = str(git["commit"]) + (", changed" if git.get("changed") else "")
        versions = trained | versions
    return About(origin, hashes, list(dict.fromkeys(results)), versions)
