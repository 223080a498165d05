"""Write the folder of an exported network, whole or not at all, after checking that its files give the network's logits."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping, Optional, Sequence

import torch

from model.alexnet import AlexNet
from pipeline.files import atomic_folder, remove_dead
from pipeline.index.sample_index import ClassInfo
from pipeline.stats import Stats
from train.config import Config
from train.export import safetensors_io as weights
from train.export.model_card import About, card
from train.export.onnx import onnx_model
from train.recipe import dump

# Of the largest logit. Two programs add the same float32 products in another order: measured 2e-7; a bfloat16 weight is 4e-3.
TOLERANCE = 2e-5
NOISE_IMAGES, NOISE_STD = 3, 60.0  # of the check; about the standard deviation of photographs


@dataclass(frozen=True)
class Check:
    """Largest differences of logits (`onnx` is None without model.onnx), and the largest logit."""

    safetensors: float
    onnx: Optional[float]
    largest: float


def write_folder(out: Path, config: Config, network: AlexNet, stats: Stats, about: About, *,
                 classes: Sequence[ClassInfo] = (), hashes: Mapping[str, str] = {}, onnx: bool = False, softmax: bool = False,
                 check: bool = True) -> Optional[Check]:
    """Write a network that anyone can load; train/export/safetensors_io.py lists the files.

    Args:
        out: the folder, which must not exist yet.
        config: the recipe.
        network: all of it, float32 on the CPU.
        stats: whose mean is subtracted from images.
        about: for the model card.
        classes: in the order of the outputs; empty when not known.
        hashes: for the files' metadata.
        onnx, softmax: write model.onnx too; with probabilities.
        check: compare the logits of what was written with the network's.

    Raises:
        ValueError: the folder exists, or a weight is not finite.
        RuntimeError: a library is missing, or the check failed; nothing is left then.
    """
    if os.path.lexists(out):
        raise ValueError(f"--out (={out}) exists already; give a folder that does not")
    config = weights.without_machine(config)
    hashes = {**hashes, "stats_sha256": stats.sha256}
    tensors = {name: parameter.detach() for name, parameter in network.named_parameters()}
    outputs = () if not onnx else ("logits", "probabilities") if softmax else ("logits",)
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_dead(out.parent, out.name)
    with atomic_folder(out) as folder:
        (folder / weights.WEIGHTS).write_bytes(weights.pack(config, tensors, hashes))
        (folder / weights.CONFIG).write_text(dump(config), encoding="utf-8")
        stats.save(folder / weights.STATS)
        if classes:
            lines = [f"{entry.wnid} {entry.words}".rstrip() for entry in classes]
            (folder / weights.CLASSES).write_text("\n".join(lines) + "\n", encoding="utf-8")
        if onnx:
            packed = onnx_model(config.model, tensors, softmax=softmax, metadata={"fingerprint": config.fingerprint(), **hashes})
            (folder / weights.ONNX).write_bytes(packed)
        (folder / weights.CARD).write_text(card(out.name, config, about, outputs), encoding="utf-8")
        weights.write_manifest(folder)
        return compare(folder, network, outputs) if check else None


def compare(folder: Path, network: AlexNet, outputs: Sequence[str]) -> Check:
    """Read a folder back and compare its logits on noise with those of the network.

    Args:
        outputs: of model.onnx; empty when there is none.

    Raises:
        RuntimeError: they differ, or onnxruntime is not installed.
    """
    shape = (NOISE_IMAGES, 3, network.config.input_px, network.config.input_px)
    images = NOISE_STD * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network.eval()(images)
        loaded = weights.from_pretrained(folder)(images)
    largest = float(expected.abs().max())
    difference = _difference(loaded, expected, largest, weights.WEIGHTS)
    onnx = _onnx_difference(folder / weights.ONNX, images, expected, largest, outputs) if outputs else None
    return Check(difference, onnx, largest)


def _onnx_difference(path: Path, images: torch.Tensor, expected: torch.Tensor, largest: float, outputs: Sequence[str]) -> float:
    """The largest difference of model.onnx's logits, for all images at once and for one, as onnxruntime computes them."""
    try:
        import onnxruntime
    except ImportError:
        raise RuntimeError("onnxruntime (=not installed) is needed to check model.onnx; pip install onnxruntime, or leave the "
                           "check out with --no-check") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in (images, images[:1]):
        logits, *probabilities = [torch.from_numpy(value) for value in session.run(list(outputs), {"images": batch.numpy()})]
        worst = max(worst, _difference(logits, expected[:len(batch)], largest, weights.ONNX))
        for value in probabilities:
            _difference(value, expected[:len(batch)].softmax(1), max(1.0, largest), f"{weights.ONNX}: probabilities")
    return worst


def _difference(value: torch.Tensor, expected: torch.Tensor, largest: float, what: str) -> float:
    """The largest difference. Raises RuntimeError when it is too large, or a value is not finite."""
    difference = float((value - expected).abs().max())
    if not difference <= TOLERANCE * largest:
        raise RuntimeError(f"{what} (={difference:.3g}) differs from the network by more than {TOLERANCE * largest:.3g} (largest "
                           f"value {largest:.3g}); nothing was written, report this with the recipe")
    return difference
