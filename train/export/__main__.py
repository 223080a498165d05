"""Publish a trained network: safetensors in canonical layout, a model card and, with --onnx, an ONNX file.

    python -m train.export runs/NAME --out FOLDER [--which best|last] [--onnx]
    python -m train.export runs/NAME/checkpoints/step-… --out FOLDER

The folder (train/export/safetensors_io.py lists its files) is written whole or not at all, after its files have given the
network's logits. Errors on the card are those that the run noted of this very checkpoint. See docs/weights.md.
Exit codes: 0 done, 2 a mistake in what was asked, 4 the machine failed or the check did, 130 interrupted.
"""
from train.exit_codes import run_command, start_command

if __name__ == "__main__":
    start_command()

import argparse
from pathlib import Path
from typing import Sequence

from train.cli import Parser, check_runs
from train.exit_codes import exit_code


def parser(prog: str = "python -m train.export") -> Parser:
    top = Parser(prog=prog, description="Write a trained network as safetensors with a model card, and as ONNX.",
                 example=f"{prog} runs/demo -o weights/demo --which best --onnx")
    top.add_argument("run", type=Path, metavar="RUN", help="run folder or checkpoint")
    top.add_out("folder to write, not there yet", required=True)
    top.add_which()
    top.add_argument("--index", type=Path, metavar="INDEX", help="index whose class names are written (default: the recipe's)")
    top.add_argument("--onnx", action="store_true", help="write model.onnx too")
    return top


def export(args: argparse.Namespace) -> None:
    """Find the checkpoint, write the folder, print what was written."""
    check_runs([args.run])
    from model.alexnet import AlexNet, parameter_count  # --help needs none of this
    from pipeline.index.sample_index import SampleIndex
    from train.checkpoint.resolve import resolve
    from train.export.folder import NOISE_IMAGES, describe, write_folder
    from train.parallel.topology import Topology

    source = resolve(args.run, args.which)
    config, problem = source.config(), ""
    try:
        index = SampleIndex.load(args.index or config.data.images)
        source.check_classes(index)
    except ValueError as error:
        if args.index is not None:
            raise
        problem = str(error)
    network = AlexNet(config.model, seed=0)
    source.load_weights(network, config, Topology.single())
    differences = write_folder(args.out, config, network, source.stats(), describe(source),
                               classes=() if problem else index.classes, onnx=args.onnx,
                               hashes={"classes_sha256": str(source.classes_sha256), "checkpoint_sha256": source.sha256})
    files = sorted(args.out.iterdir())
    print(f"{args.out}: {parameter_count(config.model):,} parameters, "
          f"{sum(path.stat().st_size for path in files):,} bytes in {', '.join(path.name for path in files)}")
    print(f"logits of {NOISE_IMAGES} images of noise differ from the network's by at most: "
          + ", ".join(f"{name} {difference:.3g}" for name, difference in differences.items()))
    if problem:
        print(f"classes.txt was not written: {problem}")


def main(argv: Sequence[str], prog: str = "python -m train.export") -> int:
    return exit_code(lambda: export(parser(prog).parse_args(argv)), "use a machine with more")


if __name__ == "__main__":
    run_command(main)
