"""Profile the data loader: its throughput, what training needs, which stage is the bottleneck, and what would lift it:
`python tools/profile_pipeline.py RECIPE --model`, or with the paper's crops of any index: `--index INDEX`.

Every stage alone and the loader cut off after each, the loader whole (warm; `--cold`: dropped from the page cache), and with
`--model` or `--need N` the loader feeding its consumer; all in turns, several times. Nothing is written but what is asked
for (and what training stores too: missing statistics, the images of tier resident).

Exit codes: 0 done; 1 `--fail-below X` and the rate together ÷ need is below X; 2 a mistake in what was asked, or the
machine failed; 130 interrupted.
"""
from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: tools/profile must not hide the standard library's `profile`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train.exit_codes import run_command, start_command  # noqa: E402

if __name__ == "__main__":
    start_command(decodes=True)

import argparse
from collections.abc import Sequence

from tools.cli import guarded  # noqa: E402
from train.cli import Parser, at_least, positive, put_json  # noqa: E402

PAPER = "alexnet_ilsvrc2012"


def parser(prog: str = "profile_pipeline.py") -> Parser:
    """The arguments."""
    top = Parser(
        prog=prog, former={"--config": ""}, usage=f"{prog} [RECIPE] [--index INDEX] [--group.key=value …] [options]",
        description="Measure the loader's stages, the loader, and what training needs; say which stage limits and what would "
        "lift it.",
        example=f"  {prog} tiny100 --model --machine.threads=4\n  {prog} --index photos.index --need 5000 --json profile.json\n\n"
        "Exit codes: 0 done, 1 below --fail-below, 2 a mistake, 4 the machine failed, 130 Ctrl-C.")
    top.add_argument("recipe", nargs="?", metavar="RECIPE", help="its data, batch, machine settings and network: a name or a "
                     "file; --group.key=value sets a value of it")
    top.add_argument("--index", type=Path, metavar="INDEX", help="instead of the recipe's; alone: with the paper's crops")
    top.add_argument("--tier", choices=("archives", "packed", "streamed", "resident"), help="instead of the recipe's")
    top.add_argument("--batch", type=at_least(1), metavar="N", help="images of a batch, instead of the recipe's")
    need = top.add_mutually_exclusive_group()
    need.add_argument("--model", action="store_true", help="measure the recipe's network on batches of noise, and feed it")
    need.add_argument("--need", type=positive, metavar="N", help="images/s that training takes; a consumer of that rate is fed")
    top.add_argument("--cold", action="store_true", help="also with the page cache emptied of the archives")
    top.add_argument("--seconds", type=positive, default=1.0, metavar="S", help="of each turn")
    top.add_argument("--repeats", type=at_least(1), default=5, metavar="N", help="turns of each")
    top.add_argument("--fail-below", type=positive, metavar="X", help="exit 1 when rate together ÷ need is below X, such as 0.99")
    top.add_json()
    top.add_argument("--trace", type=Path, metavar="FILE", help="write the stages of batches, for chrome://tracing, Perfetto")
    top.add_argument("--nvtx", action="store_true", help="NVTX ranges, for Nsight Systems")
    return top


def run(args: argparse.Namespace, settings: Sequence[str]) -> int:
    """Measure, show, write; returns the exit code. Raises ValueError or RuntimeError."""
    if args.recipe is None and args.index is None:
        raise ValueError("RECIPE (=none) must be given, or --index INDEX; give one of them")
    if args.fail_below is not None and not (args.model or args.need):
        raise ValueError(f"--fail-below (={args.fail_below}) needs a need to compare with; add --model or --need N")
    from pipeline.process_pool import cores
    from tools.profile import report
    from tools.profile.run import profile
    from train.recipe import parse

    words = [str(args.recipe or PAPER)] + [f"--machine.threads={cores()}"] * (args.recipe is None)
    given = {"data.index": args.index, "data.packed": args.index, "data.tier": args.tier, "train.batch": args.batch}
    words += [f"--{key}={value}" for key, value in given.items() if value is not None]
    figures, events = profile(args, parse([*words, *settings]).config)
    if not put_json(args.json, report.as_json(figures)):
        report.show(figures, sys.stdout)
    put_json(args.trace, report.trace(events))
    met = figures.measured.met
    if args.fail_below is not None and met is not None and met < args.fail_below:
        print(f"the rate together is {met:.3f} of the need, below --fail-below (={args.fail_below})", file=sys.stderr)
        return 1
    return 0


def main(arguments: Sequence[str] | None = None, prog: str = "profile_pipeline.py") -> int:
    """The command. Returns its exit code, see the module."""
    return guarded(lambda: run(*parser(prog).parse_settings(arguments)))


if __name__ == "__main__":
    run_command(main)
