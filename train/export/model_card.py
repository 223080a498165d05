"""The model card of an exported network: what it is, how images must be prepared, what was measured, how to load it.

Everything in it comes from the recipe, the weights' shapes and what a run has noted; what is not known is said to be so. The code
it shows is run by the tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Mapping, Sequence

from model.alexnet import canonical_shapes, parameter_count, shapes
from model.config import Conv, Full, ModelConfig
from train.config import Config
from train.export.plain_code import image_code, plain_code
from train.export.safetensors_io import CLASSES, ONNX, STATS

NOT_SAID = ("Not stated: whoever publishes these weights says under which terms. The program is Apache-2.0; training images have "
            "terms of their own.")


@dataclass(frozen=True)
class Result:
    """A test of these very weights. Errors are shares."""

    split: str
    views: int
    images: int
    top1: float
    top5: float
    source: str


@dataclass(frozen=True)
class About:
    """What the card says that the recipe does not.

    Attributes:
        origin: where the weights come from, in a sentence.
        hashes: what → SHA-256.
        results: tests of these weights.
        classes: how many are named in classes.txt; 0 when there is none.
        order: what the outputs mean, where classes.txt does not say it.
        limits: what else must be known about them.
        versions: program → version.
        licence: of the weights.
        prepared: what their training did with images that this program does not, in a sentence.
        trained: how, when it was not as the recipe says.
    """

    origin: str
    hashes: Mapping[str, str] = field(default_factory=dict)
    results: Sequence[Result] = ()
    classes: int = 0
    order: str = "not known: the index was not there"
    limits: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    licence: str = NOT_SAID
    prepared: str = ""
    trained: str = ""


def card(name: str, config: Config, about: About, onnx: Sequence[str] = ()) -> str:
    """README.md of an exported folder. `onnx`: outputs of model.onnx, if it is there."""
    model = config.model
    order = f"`{CLASSES}` has a line `wnid words` for each output, in order: {about.classes} of the {model.classes} outputs." \
        if about.classes else f"{model.classes} outputs; their order is {about.order}."
    hashes = [*about.hashes.items(), ("recipe, without machine and folders (fingerprint)", config.fingerprint())]
    parts = ["---\nlibrary_name: alexnet-dali\npipeline_tag: image-classification\ntags: [alexnet, image-classification]\n---",
             f"# {name}\n\n{_sentence(model)} {about.origin}",
             "## Layers\n\n" + _layers(model),
             "## Images\n\n" + _images(config, about),
             f"## Classes\n\n{order}",
             "## Loading\n\n" + _loading(config, onnx),
             "## Training\n\n" + (about.trained or _recipe(config)),
             "## Measured\n\n" + _results(about.results),
             "## Use and limits\n\n" + _limits(config, about),
             f"## Licence\n\n{about.licence}",
             "## Hashes and versions\n\n" + "\n".join([*(f"- {what}: SHA-256 `{digest}`" for what, digest in hashes),
                                                       *(f"- {what} {version}" for what, version in about.versions.items())])]
    return "\n\n".join(parts) + "\n"


def _sentence(model: ModelConfig) -> str:
    towers = "two towers" if model.towers == 2 else "one tower"
    return (f"AlexNet (Krizhevsky, Sutskever, Hinton 2012) as the table below has it: {len(model.convs)} convolutions and "
            f"{len(model.fulls)} fully connected layers in {towers}, {parameter_count(model):,} parameters, "
            f"{model.classes} classes.")


def _layers(model: ModelConfig) -> str:
    outputs, held = dict(shapes(model)), canonical_shapes(model)
    lines = ["| layer | what | sees | weight | output | parameters |", "|---|---|---|---|---|---:|"]
    table: dict[str, Conv | Full] = {**model.convs, **model.fulls}
    for number, (name, layer) in enumerate(table.items()):
        weight = held[f"{name}.weight"]
        output = outputs.get(f"pool{name.removeprefix('conv')}", outputs[name])
        sees = "the image" if number == 0 else "its own tower" if model.towers == 2 and layer.sees == "own" else \
            "both towers" if model.towers == 2 else "all"
        count = math.prod(weight) + weight[0]
        lines.append(f"| {name} | {_what(model, name, layer)} | {sees} | {_times(weight)} | {_times(output)} | {count:,} |")
    lines.append(f"| | | | | | {parameter_count(model):,} |")
    text = "\n".join(lines) + ("\n\nWeights are (outputs, inputs, rows, columns); the first fully connected layer sees the maps "
                               "below it row by row, map after map.")
    if model.towers == 2:
        text += (" The first half of the outputs of every layer is tower a, the second tower b; a layer that sees its own tower "
                 "has the inputs of that half only (`groups=2`).")
    if (lrn := model.lrn) is not None:
        text += (f" LRN: b = a / ({lrn.k:g} + {lrn.alpha:g} Σ a²)^{lrn.beta:g} over {lrn.n} adjacent maps"
                 + (" of one tower" if model.towers == 2 else "") + "; alpha is not divided by their number.")
    return text


def _what(model: ModelConfig, name: str, layer: Conv | Full) -> str:
    active = "ReLU" if model.activation == "relu" else model.activation
    if isinstance(layer, Full):
        silenced = f", dropout {model.dropout:g} in training" if layer.dropout and model.dropout and name != model.last else ""
        return ("linear" if name == model.last or layer.linear else active) + silenced
    steps = [f"{layer.px}×{layer.px}, stride {layer.stride}, pad {layer.pad}", active]
    if model.lrn is not None and layer.lrn != "none":
        steps.insert({"before": 1}.get(layer.lrn, 2), "LRN")
    if layer.pool:
        pooling = f"max pooling {model.pool.px}×{model.pool.px}, stride {model.pool.stride}"
        steps.append(pooling)
    return ", ".join(steps)


def _times(shape: Sequence[int]) -> str:
    return "×".join(str(size) for size in shape)


def _images(config: Config, about: About) -> str:
    data = config.data
    side, crop = data.square_px, data.crop_px
    what = {"image": f"the mean image ({side}×{side}×3, `mean_image` of `{STATS}`) at the crop's place, reflected with it",
            "image_center": f"the centre of the mean image (`mean_image` of `{STATS}`), whatever the crop's place",
            "channel": f"three numbers (`channel_mean` of `{STATS}`)"}[data.mean]
    text = ("RGB, 0–255, as decoded: no scaling to 0–1, no division by a deviation, EXIF orientation not applied. Short side to "
            f"{side} pixels (antialiased linear filter, long side rounded half up), the central square, from it a crop of "
            f"{crop}×{crop}, less {what}. Tests take the centre crop, or the four corners, the centre and their reflections, "
            f"whose softmax outputs are averaged. The centre crop in plain code:\n\n```python\n{image_code(config)}\n```")
    return text + (f"\n\n{about.prepared}" if about.prepared else "")


def _loading(config: Config, onnx: Sequence[str]) -> str:
    crop = config.model.input_px
    text = ("With this package:\n\n```python\nfrom train.export.safetensors_io import from_pretrained\n"
            'network = from_pretrained(".")  # this folder; checks its hashes\n'
            f"logits = network(images)  # (B, 3, {crop}, {crop}) → (B, {config.model.classes})\n```\n\n"
            f"With safetensors and torch alone:\n\n```python\n{plain_code(config.model)}\n```")
    if onnx:
        text += (f"\n\n`{ONNX}`: input `images` (N, 3, {crop}, {crop}) float32, mean subtracted; output "
                 + " and ".join(f"`{name}`" for name in onnx) + f" (N, {config.model.classes}).")
    return text


def _recipe(config: Config) -> str:
    optimizer, schedule, train, data = config.optimizer, config.schedule, config.train, config.data
    moves = ", ".join(f"{step.lr:g} from epoch {step.epoch}" for step in schedule.milestones) or "constant"
    if (plateau := schedule.plateau) is not None:
        moves = f"times {plateau.factor:g} when the validation error stops improving, at most {plateau.drops} times"
    crops = f"crops of {data.crop_px} from " + ("the central square" if data.region == "square" else "the whole image")
    return "\n".join([
        "In full in `config.yaml`. In short:", "",
        f"- batch {train.batch}, up to {train.epochs} epochs, seed {train.seed}",
        f"- learning rate {optimizer.lr:g}, {moves}; momentum {optimizer.momentum:g}, weight decay {optimizer.weight_decay:g} "
        f"(none on biases), biases at {optimizer.bias_lr_factor:g} times the rate",
        f"- {crops}, {'reflected at random' if data.mirror else 'not reflected'}, "
        + (f"lighting noise of deviation {data.lighting:g}" if data.lighting else "no lighting noise")])


def _results(results: Sequence[Result]) -> str:
    if not results:
        return "Nothing has been measured of these weights."
    lines = ["| split | images | views | top-1 error | top-5 error | from |", "|---|---:|---:|---:|---:|---|"]
    return "\n".join(lines + [f"| {one.split} | {one.images:,} | {one.views} | {one.top1:.2%} | {one.top5:.2%} | {one.source} |"
                              for one in results])


def _limits(config: Config, about: About) -> str:
    return "\n".join([f"- {line}" for line in (
        "For research: reproducing results of 2012, comparing, teaching, starting values for fine-tuning. Later networks are "
        "better and smaller.",
        f"It answers with one of its {config.model.classes} classes, whatever the picture shows, and its probabilities are not "
        "calibrated.",
        "It has learnt what its training images have: their places, people, names of classes and mistakes. Not for decisions "
        "about people, nor where an error harms.", *about.limits)])
