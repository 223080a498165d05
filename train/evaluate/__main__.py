"""Test networks: one or ten crops of every image, exact counts with 95% intervals; several together as an ensemble.

    python -m train.evaluate --run runs/NAME [--which best|last] [--views 10] [--split val] [--index DIR]
    python -m train.evaluate --checkpoints runs/A runs/B/checkpoints/step-… runs/C/evaluations/… weights/D [--views 10]
    python -m train.evaluate --run runs/NAME --split test --submission predictions.txt --devkit ILSVRC2012_devkit_t12.tar.gz

All probabilities are saved (train/evaluate/predictions.py): the same command then answers without a look at an image. Also under
`torchrun --nproc-per-node N -m -- train.evaluate --run …` (the `--` keeps torchrun from reading --run as an option of its own):
each process holds all of a network and tests every N-th batch, with the same result to the bit.
Exit codes: 0 done, 2 a mistake in what was asked, 4 the machine failed, 130 interrupted.
"""
from train.exit_codes import run_command, start_command

if __name__ == "__main__":
    start_command(decodes=True)

import argparse
from pathlib import Path
from typing import Sequence

from train.exit_codes import exit_code


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate", description="Test trained networks, alone and as an ensemble; prints exact counts with "
        "95% intervals. Exit codes: 0 done, 2 a mistake in what was asked, 4 the machine failed.")
    networks = parser.add_mutually_exclusive_group(required=True)
    networks.add_argument("--run", type=Path, nargs="+", metavar="FOLDER", help="run folders")
    networks.add_argument("--checkpoint", "--checkpoints", type=Path, nargs="+", metavar="FOLDER",
                          help="checkpoint folders; run folders; folders of train.export; saved evaluations, which need no image")
    parser.add_argument("--which", choices=("best", "last"), help="of a run's checkpoints (default last)")
    parser.add_argument("--index", help="index to test on (default: the run's)")
    parser.add_argument("--archives", help="folder to look for archives in")
    parser.add_argument("--split", help="split to test on (default: the recipe's test split)")
    parser.add_argument("--views", type=int, choices=(1, 10), help="crops per image (default: the recipe's)")
    parser.add_argument("--batch", type=int, help="images of a batch (default: the recipe's)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to compute (default: the recipe's)")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="folder for folders of saved probabilities (default: "
                        "evaluations in the run's)")
    parser.add_argument("--submission", type=Path, metavar="FILE", help="write the five best classes of each image, as the "
                        "ILSVRC challenges want them; the split need not have labels then")
    parser.add_argument("--devkit", type=Path, metavar="FILE", help="the challenge's devkit, which has the classes' IDs, for "
                        "--submission")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    args = parse(argv)

    def work() -> None:
        from train.evaluate import command  # here, because --help needs neither torch nor DALI

        command.run(args)
    return exit_code(work, "give a smaller --batch")


if __name__ == "__main__":
    run_command(main)
