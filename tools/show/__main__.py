"""Pictures of what a network sees and has learned: `python -m tools.show VERB --help`.

Exit code 0 done, 2 a mistake, 4 the machine failed, 130 interrupted.
"""
import sys
from pathlib import Path

if not __package__:  # run as a file: tools/profile must not hide the standard library's `profile`
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from train.exit_codes import run_command, start_command  # noqa: E402

if __name__ == "__main__":
    start_command(decodes=True)

import importlib
from collections.abc import Sequence
from typing import Any

from tools.cli import guarded  # noqa: E402
from train.cli import Parser, at_least, check_runs  # noqa: E402


def parser(prog: str = "python -m tools.show") -> Parser:
    top = Parser(prog=prog, description="Pictures of what a network sees and has learned.", example=f"""\
  {prog} batch demo -o sheet.png
  {prog} kernels runs/demo -o kernels.png
  {prog} top5 runs/demo -o top5.png
  {prog} similar build runs/demo --split train -o features/demo
  {prog} similar query --features features/demo --count 5 -o similar.png""")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    former = dict.fromkeys(("--run", "--checkpoint", "--config"), "")

    def add(parent: Any, verb: str, help: str, example: str) -> Parser:
        found: Parser = parent.add_parser(verb, help=help, former=former, example=f"{prog} {example}")
        return found

    batch = add(verbs, "batch", "training crops with labels and augmentation", "batch demo -o sheet.png")
    batch.add_argument("recipe", metavar="RECIPE", help="for sizes, mean, lighting, seed: a name or a file")
    batch.add_argument("--count", type=int, default=32, metavar="B", help="crops on the sheet")
    batch.add_argument("--step", type=int, default=0, metavar="N", help="which batch of that many, from 0")
    kernels = add(verbs, "kernels", "filters of conv1, a tower a block (paper figure 3)", "kernels runs/demo -o kernels.png")
    top5 = add(verbs, "top5", "images with their five most probable labels (paper figure 4, left)", "top5 runs/demo -o top5.png")
    _drawn(top5, 8)
    top5.add_argument("--views", type=int, choices=(1, 10), help="crops per image (default: the recipe's)")
    similar = verbs.add_parser("similar", help="nearest neighbours at the network's last hidden layer (paper figure 4, right)",
                               example=f"{prog} similar build runs/demo -o features/demo")
    steps = similar.add_subparsers(dest="step", required=True, metavar="VERB")
    build = add(steps, "build", "write the features of a split's images", "similar build runs/demo -o features/demo")
    build.add_argument("--split", help="images to search (default: the recipe's training split)")
    build.add_out("new folder", required=True)
    query = add(steps, "query", "find the images nearest to others; without --out, count how many are of their class",
                "similar query --features features/demo --count 5 -o similar.png")
    query.add_argument("--features", type=Path, metavar="FOLDER", required=True, help="folder that build wrote")
    _drawn(query, 5)
    query.add_argument("--neighbours", type=int, default=6, metavar="K", help="of each query")
    query.add_argument("--no-pixels", action="store_true", help="leave out the search by pixels, which decodes every image")
    query.add_json("ids and classes of queries and neighbours as JSON, to FILE.json or, without it, to stdout")
    for one in (batch, kernels, top5, query):
        one.add_out("the sheet", "PNG", required=one is not query)
    for one in (kernels, top5, build, query):
        one.add_argument("run", type=Path, metavar="RUN", nargs="?" if one is query else None,
                         help="run folder, checkpoint, or folder of "
                         "export" + " (default: the one that the features are of)" * (one is query))
        one.add_which()
    for one in (batch, top5, build, query):
        one.add_argument("--index", *(["--data.index"] if one is batch else []), type=Path, metavar="INDEX",
                         help="index (default: that of the recipe or features)")
        one.add_archives()
    for one in (top5, build, query):
        one.add_device()
        one.add_argument("--batch", type=at_least(1), metavar="N", help="images at once (default: the run's)")
    return top


def _drawn(parser: Parser, count: int) -> None:
    """Options that choose images."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--count", type=int, default=count, metavar="N", help="so many, at random")
    group.add_argument("--ids", type=int, nargs="+", metavar="ID", help="these samples of the index instead")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the drawing")
    parser.add_argument("--split", help="to draw from (default: the recipe's test split)")


def main(argv: Sequence[str] | None = None, prog: str = "python -m tools.show") -> int:
    """Run the command; returns its exit code."""
    def work() -> None:
        args = parser(prog).parse_args(argv)
        if vars(args).get("step") != "build" and args.out is not None and args.out.suffix.lower() != ".png":
            raise ValueError(f"--out (={args.out}) must end in .png, which is what is written; correct the name")
        check_runs([args.run] if getattr(args, "run", None) else [])
        importlib.import_module(f"tools.show.{args.verb}").run(args)
    return guarded(work)


if __name__ == "__main__":
    run_command(main)
