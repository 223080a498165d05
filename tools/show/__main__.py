"""Pictures of what a network sees and has learned: `python -m tools.show VERB --help`.

    python -m tools.show batch --config train/recipes/X.yaml --out sheet.png
    python -m tools.show kernels --run runs/NAME --out kernels.png
    python -m tools.show top5 --run runs/NAME --out top5.png
    python -m tools.show similar build --run runs/NAME --split train --out features/NAME
    python -m tools.show similar query --features features/NAME --count 5 --out similar.png
    python -m tools.show similar query --features features/NAME --count 1000

Exit code 0, or 2 with a message on stderr.
"""
import sys
from pathlib import Path

if not __package__:  # run as a file: tools/profile must not hide the standard library's `profile`
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from train.exit_codes import run_command, start_command  # noqa: E402

if __name__ == "__main__":
    start_command(decodes=True)

import argparse
import importlib
from typing import Any

from tools.cli import guarded  # noqa: E402


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.show", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    batch = verbs.add_parser("batch", help="training crops with labels and augmentation")
    _path(batch, "--config", "RECIPE", "for sizes, mean, lighting, seed", required=True)
    batch.add_argument("--count", type=int, default=32, metavar="B", help="crops on the sheet (default %(default)s)")
    batch.add_argument("--step", type=int, default=0, metavar="N", help="which batch of that many, from 0 (default %(default)s)")
    kernels = verbs.add_parser("kernels", help="filters of conv1, a tower a block (paper figure 3)")
    top5 = verbs.add_parser("top5", help="images with their five most probable labels (paper figure 4, left)")
    _drawn(top5, 8)
    top5.add_argument("--views", type=int, choices=(1, 10), help="crops per image (default: the recipe's)")
    similar = verbs.add_parser("similar", help="nearest neighbours at the network's last hidden layer (paper figure 4, right)")
    steps = similar.add_subparsers(dest="step", required=True)
    build = steps.add_parser("build", help="write the features of a split's images")
    build.add_argument("--split", help="images to search (default: the recipe's training split)")
    _path(build, "--out", "DIR", "new folder", required=True)
    query = steps.add_parser("query", help="find the images nearest to others; without --out, count how many are of their class")
    _path(query, "--features", "DIR", "folder that build wrote", required=True)
    _drawn(query, 5)
    query.add_argument("--neighbours", type=int, default=6, metavar="K", help="of each query (default %(default)s)")
    query.add_argument("--no-pixels", action="store_true", help="leave out the search by pixels, which decodes every image")
    query.add_argument("--json", nargs="?", const=Path("-"), type=Path, metavar="FILE",
                       help="ids and classes of queries and neighbours as JSON, to FILE or, without it, to stdout")
    for one in (batch, kernels, top5, query):
        _path(one, "--out", "PNG", "the sheet", required=one is not query)
    for one in (kernels, top5, build, query):
        group = one.add_mutually_exclusive_group(required=one is not query)
        _path(group, "--run", "DIR", "run folder" + " (default: the checkpoint that the features are of)" * (one is query))
        _path(group, "--checkpoint", "DIR", "checkpoint folder")
        one.add_argument("--which", choices=("best", "last"), help="of the run's checkpoints (default last)")
    for one in (batch, top5, build, query):
        _path(one, "--index", "DIR", "index (default: that of the recipe or features)")
        _path(one, "--archives", "DIR", "folder of the archives when they have moved")
    for one in (top5, build, query):
        one.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to compute (default: the run's)")
        one.add_argument("--batch", type=int, metavar="B", help="images at once (default: the run's)")
    return parser.parse_args(argv)


def _path(parser: Any, name: str, metavar: str, help: str, **options: Any) -> None:
    parser.add_argument(name, type=Path, metavar=metavar, help=help, **options)


def _drawn(parser: argparse.ArgumentParser, count: int) -> None:
    """Options that choose images."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--count", type=int, default=count, metavar="N", help="so many, at random (default %(default)s)")
    group.add_argument("--ids", type=int, nargs="+", metavar="ID", help="these samples of the index instead")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (default %(default)s)")
    parser.add_argument("--split", help="to draw from (default: the recipe's test split)")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = parse(argv)
    return guarded(lambda: importlib.import_module(f"tools.show.{args.verb}").run(args))


if __name__ == "__main__":
    run_command(main)
