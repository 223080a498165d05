"""Publish a trained network: safetensors in canonical layout, a model card and, with --onnx, an ONNX file.

    python -m train.export runs/NAME --out FOLDER [--which best|last] [--onnx [--softmax]]
    python -m train.export runs/NAME/checkpoints/step-… --out FOLDER

The folder (train/export/safetensors_io.py says what is in it) is written whole or not at all, and by default its files' logits
are compared
with the network's. Errors on the card are those that the run noted of this very checkpoint. See docs/weights.md.
Exit codes: 0 done, 2 a mistake in what was asked, 4 the machine failed or the check did, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Sequence

from train.exit_codes import DONE, FAILED, INTERRUPTED, MISTAKE, leave

if TYPE_CHECKING:  # --help needs none of it
    import torch

    from pipeline.index.sample_index import ClassInfo
    from train.config import Config


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
    add_outputs(parser)
    return parser.parse_args(argv)


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Options of every command that writes such a folder."""
    parser.add_argument("--onnx", action="store_true", help="write model.onnx too")
    parser.add_argument("--softmax", action="store_true", help="with --onnx: give probabilities besides the logits")
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True,
                        help="compare the logits of what was written with the network's (default)")


def network_weights(path: Path, config: Config) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint: canonical name → float32 on the CPU.

    Raises:
        ValueError: they are not those of the recipe's network.
    """
    import torch

    from model.alexnet import canonical_shapes
    from train.checkpoint import checkpoint
    from train.parallel.topology import Topology

    shapes = canonical_shapes(config.model)
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    checkpoint.load(path, {f"weight.{name}": tensor for name, tensor in tensors.items()},
                    {f"weight.{name}": shape for name, shape in shapes.items()},
                    Topology.single(), all_of_it=False)
    return tensors


def class_names(folder: str, wanted: str, asked: bool) -> tuple[Sequence[ClassInfo], str]:
    """Classes of an index in order, when they are those the network was trained on; and why there are none, in words.

    Args:
        folder: of the index.
        wanted: hash of the classes in the checkpoint.
        asked: somebody named this index: then it must be right.

    Raises:
        ValueError: it was asked for and is no index, or one of other classes.
    """
    from pipeline.index.sample_index import SampleIndex
    from train.build import classes_sha256

    try:
        index = SampleIndex.load(folder)
        if classes_sha256(index) == wanted:
            return index.classes, ""
        problem = (f"index (={folder}) has other classes, or another order of them, than the one the network was trained on; "
                   "give an index of the same classes")
    except ValueError as error:
        problem = str(error)
    if asked:
        raise ValueError(problem)
    return (), problem


def run(asked: argparse.Namespace) -> None:
    """Export what was asked for."""
    from train.checkpoint import checkpoint
    from train.checkpoint.resolve import resolve
    from train.export.model_card import NOT_SAID, About
    from train.export.facts import measured, versions
    from train.export.folder import report, write_folder

    source = resolve(asked.checkpoint, asked.which, default="best")
    path, config, manifest = source.path, source.config(), source.sha256
    state = checkpoint.read_state(path)
    classes, lacking = class_names(asked.index or config.data.images, state["classes"], asked.index is not None)
    tensors = network_weights(path, config)
    sources = state.get("sources", {})
    about = About(
        origin=f"Trained for {state['step']:,} steps of {config.train.batch} images (checkpoint `{path.name}`).",
        hashes={"checkpoint (its manifest)": manifest, "classes": state["classes"],
                **{what: digest for what, digest in sources.items() if digest}},
        results=measured(path, manifest), classes=len(classes), order="not written here: the index was not at hand",
        versions=versions(path), licence=asked.licence or NOT_SAID)
    found = write_folder(asked.out, config, tensors, source.stats(), about, classes=classes, onnx=asked.onnx,
                         softmax=asked.softmax, check=asked.check,
                         facts={"classes_sha256": state["classes"], "checkpoint_sha256": manifest})
    print(report(asked.out, tensors, found, [f"classes.txt was not written: {lacking}"] if lacking else []))


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    return ended(lambda: run(arguments(argv)))


def ended(work: Callable[[], None]) -> int:
    """The exit code of a command, and its one line when it fails."""
    try:
        work()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except MemoryError as error:
        print(f"error: memory (={str(error) or 'used up'}) does not suffice; use a machine with more", file=sys.stderr)
        return FAILED
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return DONE


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
