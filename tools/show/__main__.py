"""Pictures of what a network sees and has learned: `python -m tools.show VERB --help`.

    python -m tools.show batch --config train/recipes/X.yaml --out sheet.png
    python -m tools.show kernels --run runs/NAME --out kernels.png
    python -m tools.show top5 --run runs/NAME --out top5.png
    python -m tools.show similar build --run runs/NAME --split train --out features/NAME
    python -m tools.show similar query --features features/NAME --count 5 --out similar.png
    python -m tools.show similar query --features features/NAME --images photo.jpg --out similar.html
    python -m tools.show similar query --features features/NAME --evaluate 1000
    python -m tools.show figure1 --runs runs/figure1 --out figure1.png

Exit code 0, or 2 with a message on stderr.
"""
from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any, Callable

if not __package__:  # run as a file: tools/profile must not hide the standard library's `profile`
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.cli import guarded  # noqa: E402


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.show", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _batch(verbs.add_parser("batch", help="training crops with labels and augmentation"))
    _kernels(verbs.add_parser("kernels", help="filters of conv1, a tower a block (paper figure 3)"))
    _top5(verbs.add_parser("top5", help="images with their five most probable labels (paper figure 4, left)"))
    similar = verbs.add_parser("similar", help="nearest neighbours at the network's last hidden layer (paper figure 4, right)")
    steps = similar.add_subparsers(dest="step", required=True)
    _similar_build(steps.add_parser("build", help="write the features of a split's images"))
    _similar_query(steps.add_parser("query", help="find the images nearest to others"))
    _figure1(verbs.add_parser("figure1", help="training error by epoch, ReLU against tanh (paper figure 1)"))
    return parser.parse_args(argv)


def _path(parser: Any, name: str, metavar: str, help: str, **options: Any) -> None:
    parser.add_argument(name, type=Path, metavar=metavar, help=help, **options)


def _network(parser: argparse.ArgumentParser, *, required: bool = True, default: str = "") -> None:
    """Options that choose a network."""
    group = parser.add_mutually_exclusive_group(required=required)
    _path(group, "--run", "DIR", "run folder" + default)
    _path(group, "--checkpoint", "DIR", "checkpoint folder")
    parser.add_argument("--which", choices=("best", "last"), help="of the run's checkpoints (default last)")


def _images(parser: argparse.ArgumentParser, whose: str = "the run's") -> None:
    """Options that say where images are read and networks computed."""
    _path(parser, "--index", "DIR", f"index (default: {whose})")
    _path(parser, "--archives", "DIR", "folder of the archives when they have moved")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help=f"where to compute (default: {whose})")
    parser.add_argument("--batch", type=int, metavar="B", help=f"images at once (default: {whose})")


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _batch(parser: argparse.ArgumentParser) -> None:
    _path(parser, "--config", "RECIPE", "for sizes, mean, lighting, seed", required=True)
    _path(parser, "--out", "PNG", "the sheet", required=True)
    _path(parser, "--index", "DIR", "index (default: the recipe's)")
    _path(parser, "--archives", "DIR", "folder of the archives when they have moved")
    parser.add_argument("--count", type=int, default=32, metavar="B", help="crops on the sheet (default %(default)s)")
    parser.add_argument("--step", type=int, default=0, metavar="N", help="which batch of that many, from 0 (default %(default)s)")


def _kernels(parser: argparse.ArgumentParser) -> None:
    _network(parser)
    _path(parser, "--out", "PNG", "the sheet", required=True)
    _json(parser)


def _top5(parser: argparse.ArgumentParser) -> None:
    _network(parser)
    _path(parser, "--out", "PNG", "the sheet", required=True)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--images", type=int, default=8, metavar="N", help="drawn at random (default %(default)s)")
    group.add_argument("--ids", type=int, nargs="+", metavar="ID", help="these samples of the index instead")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (default %(default)s)")
    parser.add_argument("--split", help="to draw from (default: the recipe's test split)")
    parser.add_argument("--views", type=int, choices=(1, 10), help="crops per image (default: the recipe's)")
    _images(parser)


def _similar_build(parser: argparse.ArgumentParser) -> None:
    _network(parser)
    parser.add_argument("--split", help="images to search (default: the recipe's training split)")
    _path(parser, "--out", "DIR", "new folder", required=True)
    parser.add_argument("--force", action="store_true", help="replace the features in that folder")
    _images(parser)


def _similar_query(parser: argparse.ArgumentParser) -> None:
    _path(parser, "--features", "DIR", "folder that build wrote", required=True)
    group = parser.add_mutually_exclusive_group()
    _path(group, "--images", "FILE", "image files, from anywhere", nargs="+")
    group.add_argument("--ids", type=int, nargs="+", metavar="ID", help="samples of the index")
    group.add_argument("--count", type=int, default=5, metavar="N", help="so many of a split, at random (default %(default)s)")
    group.add_argument("--evaluate", type=int, metavar="N", help="so many of a split, counted without a sheet")
    parser.add_argument("--split", help="to draw from (default: the recipe's test split)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (default %(default)s)")
    parser.add_argument("--neighbours", type=int, default=6, metavar="K", help="of each query (default %(default)s)")
    parser.add_argument("--no-pixels", action="store_true", help="leave out the search by pixels, which decodes every image")
    _path(parser, "--out", "PNG|HTML", "the sheet")
    _json(parser)
    _network(parser, required=False, default=" (default: the checkpoint that the features are of)")
    _images(parser, "the features'")


def _figure1(parser: argparse.ArgumentParser) -> None:
    _path(parser, "--runs", "DIR", "folder of run folders relu-… and tanh-…", required=True)
    _path(parser, "--out", "PNG", "where to draw the figure")
    parser.add_argument("--target", type=float, default=0.25, help="training error to reach, a share (default %(default)s)")
    _json(parser)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = parse(argv)

    def work() -> None:
        run: Callable[[argparse.Namespace], None] = importlib.import_module(f"tools.show.{args.verb}").run
        run(args)

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main())
