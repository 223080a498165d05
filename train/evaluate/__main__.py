"""Test networks: one or ten crops of every image, exact counts with 95% intervals; several together as an ensemble.

    python -m train.evaluate RUN … [--which best|last] [--views 10] [--split val] [--index INDEX]

All probabilities are saved (train/evaluate/predictions.py): the same command then answers without a look at an image. Also under
`torchrun --nproc-per-node N --no-python alexnet eval RUN`: each process holds all of a network and tests every N-th batch, with
the same result to the bit.
Exit codes: 0 done, 2 a mistake in what was asked, 4 the machine failed, 130 interrupted.
"""
from train.exit_codes import run_command, start_command

if __name__ == "__main__":
    start_command(decodes=True)

from pathlib import Path
from typing import Sequence

from train.cli import Parser, at_least, check_runs
from train.exit_codes import exit_code


def parser(prog: str = "python -m train.evaluate") -> Parser:
    top = Parser(prog=prog, former=dict.fromkeys(("--run", "--checkpoint", "--checkpoints"), "") | {"--save": "--out"},
                 description="Test trained networks, alone and as an ensemble: exact counts with 95% intervals. All "
                 "probabilities are saved, so that the same command then answers without reading an image.", example=f"""\
  {prog} runs/demo --views 10
  {prog} runs/a runs/b weights/c --json scores.json      (three networks, and their ensemble)
  {prog} runs/a --split test --submission predictions.txt --devkit ILSVRC2012_devkit_t12.tar.gz""")
    top.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, checkpoint, folder written by export, or "
                     "saved evaluation; several are an ensemble")
    top.add_which()
    top.add_argument("--index", type=Path, metavar="INDEX", help="index to test on (default: the run's)")
    top.add_archives()
    top.add_argument("--split", help="split to test on (default: the recipe's test split)")
    top.add_argument("--views", type=int, choices=(1, 10), help="crops per image (default: the recipe's)")
    top.add_argument("--batch", type=at_least(1), metavar="N", help="images of a batch (default: the recipe's)")
    top.add_device()
    top.add_out("folder for folders of saved probabilities (default: evaluations in the run's)")
    top.add_argument("--submission", type=Path, metavar="FILE", help="write the five best classes of each image, as the ILSVRC "
                     "challenges want them; the split need not have labels then")
    top.add_argument("--devkit", type=Path, metavar="FILE", help="the challenge's devkit, which has the classes' IDs, for "
                     "--submission")
    top.add_json("the results as JSON, to FILE.json or, without it, to stdout")
    return top


def main(argv: Sequence[str], prog: str = "python -m train.evaluate") -> int:
    """The command; returns its exit code."""
    def work() -> None:
        args = parser(prog).parse_args(argv)
        check_runs(args.runs)
        from train.evaluate import command  # here, because --help needs neither torch nor DALI

        command.run(args)
    return exit_code(work, "give a smaller --batch")


if __name__ == "__main__":
    run_command(main)
