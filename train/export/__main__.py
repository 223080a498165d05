"""Publish a trained network: safetensors in canonical layout, a model card and, with --onnx, an ONNX file.

    python -m train.export runs/NAME --out FOLDER [--which best|last] [--onnx [--softmax]]
    python -m train.export runs/NAME/checkpoints/step-… --out FOLDER

The folder (train/export/safetensors_io.py lists its files) is written whole or not at all, and by default the logits of its files
are compared with the network's. Errors on the card are those that the run noted of this very checkpoint. See docs/weights.md.
Exit codes: 0 done, 2 a mistake in what was asked, 4 the machine failed or the check did, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Sequence

from train.exit_codes import exit_code, leave

if TYPE_CHECKING:  # --help needs none of it
    from pipeline.index.sample_index import ClassInfo
    from train.checkpoint.resolve import Resolved


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.export", description="Write a trained network as safetensors with a model card, and as ONNX. Exit "
        "codes: 0 done, 2 a mistake in what was asked, 4 the machine failed or the check did.")
    parser.add_argument("checkpoint", type=Path, help="a run folder, or a checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, not there yet")
    parser.add_argument("--which", choices=("best", "last"), help="of a run's checkpoints (default best, else last)")
    parser.add_argument("--index", help="index whose class names are written (default: the recipe's)")
    parser.add_argument("--licence", help="of the weights, a sentence for the card (default: not stated)")
    parser.add_argument("--onnx", action="store_true", help="write model.onnx too")
    parser.add_argument("--softmax", action="store_true", help="with --onnx: give probabilities besides the logits")
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True,
                        help="compare the logits of what was written with the network's (default)")
    return parser.parse_args(argv)


def class_names(source: Resolved, folder: str, required: bool) -> tuple[Sequence[ClassInfo], str]:
    """Classes of an index in order, when they are those the network was trained on; else none, and the reason.

    Args:
        folder: of the index.
        required: raise the reason instead: the user named this index.

    Raises:
        ValueError: it is required, and is no index, or one of other classes.
    """
    from pipeline.index.sample_index import SampleIndex

    try:
        index = SampleIndex.load(folder)
        source.check_classes(index)
        return index.classes, ""
    except ValueError as error:
        if required:
            raise
        return (), str(error)


def export(args: argparse.Namespace) -> None:
    """Find the checkpoint, write the folder, print what was written."""
    from model.alexnet import AlexNet, parameter_count
    from train.checkpoint.resolve import resolve
    from train.export import safetensors_io
    from train.export.folder import NOISE_IMAGES, write_folder
    from train.export.model_card import describe
    from train.parallel.topology import Topology

    source = resolve(args.checkpoint, args.which, default="best")
    config = source.config()
    classes, problem = class_names(source, args.index or config.data.images, args.index is not None)
    network = AlexNet(config.model, seed=0)
    source.load_weights(network, config, Topology.single())
    check = write_folder(args.out, config, network, source.stats(), describe(source, len(classes), args.licence), classes=classes,
                         onnx=args.onnx, softmax=args.softmax, check=args.check,
                         hashes={"classes_sha256": str(source.classes_sha256), "checkpoint_sha256": source.sha256})
    files = sorted(args.out.iterdir())
    print(f"{args.out}: {parameter_count(config.model):,} parameters, "
          f"{sum(path.stat().st_size for path in files):,} bytes in {', '.join(path.name for path in files)}")
    if check is not None:
        onnx = "" if check.onnx is None else f", {safetensors_io.ONNX} {check.onnx:.3g}"
        print(f"logits differ from the network's by at most: {safetensors_io.WEIGHTS} {check.safetensors:.3g}{onnx} "
              f"({NOISE_IMAGES} images of noise, largest logit {check.largest:.3g})")
    if problem:
        print(f"{safetensors_io.CLASSES} was not written: {problem}")


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    args = arguments(argv)
    return exit_code(lambda: export(args), "use a machine with more")


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
