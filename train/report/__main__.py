"""One self-contained page about runs, with the paper's results beside ours:

    python -m train.report runs/a runs/b … -o report.html

The page needs no network, no script and no other file. Runs may be unfinished or broken: what cannot be read is named in it.
Exit codes: 0 done, 2 a mistake in what was asked, 4 the machine failed, 130 interrupted.
"""
from train.exit_codes import run_command, start_command

if __name__ == "__main__":
    start_command()

import argparse
import sys
from pathlib import Path
from typing import Sequence

from pipeline.files import atomic_write
from train.cli import Parser, check_runs
from train.exit_codes import exit_code


def run(args: argparse.Namespace) -> None:
    """Read the runs, write the page. Raises ValueError, RuntimeError or OSError."""
    from train.report.groups import group  # here: --help needs none of it
    from train.report.page import render
    from train.report.runs import NoRun, read_run, runs_below

    check_runs(args.runs)
    if args.out.is_dir():
        raise ValueError(f"output (={args.out}) is a folder; name a file in it")
    runs, left_out = [], []
    folders = [folder for given in args.runs for folder in runs_below(given)]
    for folder in {folder.resolve(): folder for folder in folders}.values():
        try:
            runs.append(read_run(folder))
        except NoRun as error:
            left_out.append(str(error))
    if not runs:
        raise ValueError(left_out[0])
    for reason in left_out:
        print(f"warning: {reason}", file=sys.stderr)
    page = render(group(runs), [f"left out: {reason}" for reason in left_out])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.out) as file:
        file.write(page.encode("utf-8", "replace"))  # undecodable bytes of a file's name become question marks
    print(f"{len(runs)} run{'s' * (len(runs) > 1)} in {args.out} ({args.out.stat().st_size / 1e6:.1f} MB)")


def parser(prog: str = "python -m train.report") -> Parser:
    top = Parser(prog=prog, description="Write one self-contained HTML page about runs, with the paper's results beside theirs.",
                 example=f"{prog} runs/a runs/b -o report.html")
    top.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                     help="run folder, or a folder of run folders; runs that differ only in the seed become one result")
    top.add_out("the page", "HTML", default=Path("report.html"))
    return top


def main(argv: Sequence[str], prog: str = "python -m train.report") -> int:
    """The command; returns its exit code."""
    return exit_code(lambda: run(parser(prog).parse_args(argv)), "name fewer runs")


if __name__ == "__main__":
    run_command(main)
