"""Times our tiers against other loaders doing the same work: `python -m tools.bench [INDEX] [--packed DIR]`.

Every contender makes the same training batches of the same photographs with two workers; they take turns, each in a process of
its own, and are idle while another is timed (`tools.bench.rounds`). The first batch of every contender is compared with the
exact pixels (`tools.bench.workload`). No network follows: this is what a loader could give.

Writes OUT.json and OUT.png. Without an INDEX synthetic photographs are made; without --packed they are packed in a temporary
folder.
"""
from __future__ import annotations

from train.exit_codes import run_command, start_command

if __name__ == "__main__":
    start_command(decodes=True)

import argparse
import contextlib
import datetime
import importlib
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tools.cli import guarded
from train.cli import Parser, at_least, positive, put_json

if TYPE_CHECKING:
    from tools.bench.workload import Task

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 0.05  # share of the photographs that may be unreadable; ours and the packed ones run without them
PHOTOGRAPHS = 24  # a class of synthetic ones


def synthetic_index(folder: Path, per_class: int = PHOTOGRAPHS) -> Path:
    """The index of synthetic photographs of four classes with short sides of 333 to 400 pixels, like those of ImageNet."""
    from tools import build_index
    from tools.demo import dataset

    dataset.make(folder / "archives", 0, 4, per_class, 1, (333, 400))
    with contextlib.redirect_stdout(sys.stderr):
        code = build_index.main(["build", "classes", str(folder / "archives" / dataset.TRAIN), "--out", str(folder / "index")])
    if code:
        raise RuntimeError(f"building the index of synthetic photographs (={folder}) failed; its message is above")
    return folder / "index"


def prepare(args: argparse.Namespace, packs: bool, scratch: Path) -> Task:
    """Index, statistics and (if `packs`) packed shards, made where they are not given; all bytes in the page cache. Raises
    ValueError: an index is not one, or the packed one is not of the same photographs."""
    from pipeline.compute_stats import compute
    from pipeline.config import LoaderConfig
    from pipeline.index.sample_index import SampleIndex
    from pipeline.stats import Stats
    from tools.bench.workload import SQUARE_PX, Task

    path = synthetic_index(scratch) if args.index is None else args.index.absolute()
    index = SampleIndex.load(path)
    index.check_archives("train")
    if args.batch > len(index.ids("train")):
        raise ValueError(f"--batch (={args.batch}) must not exceed the {len(index.ids('train'))} photographs; lower it, or give "
                         "an index of more")
    try:
        stats = Stats.for_index(index, SQUARE_PX)
    except ValueError:  # none there, or of another size: they are computed, and not left beside the index
        stats = compute(index, "train", SQUARE_PX, machine=LoaderConfig(quarantine_budget=BUDGET))
    stats.save(scratch / "stats.npz")
    packed = args.packed and args.packed.absolute()
    if packs and packed is None:
        packed = scratch / "packed"
        words = ["tools/pack_shards.py", str(path), str(packed), "--split", "train", "--budget", str(BUDGET)]
        if code := subprocess.run([sys.executable, *words], cwd=ROOT, stdout=sys.stderr).returncode:
            raise RuntimeError(f"packing {path} failed (exit code {code}); its message is above")
    indexes = [index]
    if packs:
        indexes.append(SampleIndex.load(packed))
        about = indexes[1].packed
        if about is None or about["source"].get("train") != index.split_sha256("train"):
            raise ValueError(f"--packed (={packed}) must hold the photographs of {path}; give the folder that `alexnet "
                             f"pack {path} -o OUT` wrote, or leave it out")
    for read in indexes:
        for id in read.ids("train").tolist():
            read.read(id)
    return Task(path, packed if packs else None, scratch / "stats.npz", scratch, args.batch, args.jobs, args.work)


def run(args: argparse.Namespace, command: Sequence[str]) -> None:
    """Measure, print, write. Raises ValueError or RuntimeError."""
    for module, package in (("PIL", "pillow"), ("matplotlib", "matplotlib")):
        try:
            importlib.import_module(module)
        except ImportError:
            raise RuntimeError(f"{package} is not installed, and the comparison is drawn and checked with it; pip install "
                               f"{package}") from None
    from rich.console import Console

    from pipeline.index.sample_index import SampleIndex
    from tools.bench import chart, report, rounds
    from tools.bench.contenders import CONTENDERS

    names = args.only or list(CONTENDERS)
    for name in names:
        if name not in CONTENDERS:
            raise ValueError(f"contender (={name}) is unknown; contenders are {', '.join(CONTENDERS)}")
    with tempfile.TemporaryDirectory() as folder:
        task = prepare(args, any(CONTENDERS[name].data == "packed" for name in names), Path(folder))
        images = len(SampleIndex.load(task.index).ids("train"))
        results = rounds.measure(task, names, args.rounds, args.seconds)
    report.show(results, Console(width=None if sys.stdout.isatty() else 140))
    if not any(result.turns for result in results):
        raise RuntimeError("no contender could run; the table says why (`pip install webdataset spdl` installs the others)")
    about = {"what": f"{args.work}: training crops of {task.data.crop_px} px, float32, warm page cache",
             "date": datetime.date.today().isoformat(),
             "command": shlex.join(["python", "-m", "tools.bench", *command]),
             "work": {"photographs": images, "batch": args.batch, "workers": args.jobs, "rounds": args.rounds,
                      "seconds_a_turn": args.seconds, "drawn": args.index is None}}
    plain = report.as_json(results, about)
    put_json(args.out.with_name(args.out.name + ".json"), plain)
    chart.draw(plain, f"{args.work}, {args.out.name}.json", args.out.with_name(args.out.name + ".png"))
    print(f"{args.out}.json, {args.out}.png")


def parser(prog: str = "python -m tools.bench") -> Parser:
    top = Parser(prog=prog, former={"--workers": "--jobs"}, description="Time our tiers and other loaders doing the same work.",
                 example=f"{prog} photos.index --packed packed --only archives,packed,dataloader -o bench")
    top.add_argument("index", nargs="?", type=Path, metavar="INDEX", help="index to read (default: synthetic photographs)")
    top.add_argument("--packed", type=Path, metavar="FOLDER", help="what pack made of it (default: made now)")
    top.add_argument("--work", choices=("alexnet", "random_resized"), default="alexnet",
                     help="crops and colour jitter of the paper, or RandomResizedCrop, flip, mean and std")
    top.add_argument("--rounds", type=at_least(1), default=5, metavar="N", help="turns of each contender")
    top.add_argument("--seconds", type=positive, default=3.0, metavar="S", help="length of a turn")
    top.add_argument("--batch", type=at_least(1), default=64, metavar="N", help="images of a batch")
    top.add_argument("--jobs", type=at_least(1), default=2, metavar="N", help="threads or processes of each contender")
    top.add_argument("--only", type=lambda names: names.split(","), metavar="NAMES",
                     help="these, divided by commas (default: all)")
    top.add_out("writes NAME.json and NAME.png", "NAME", default=Path("bench"))
    return top


def main(arguments: Sequence[str] | None = None, prog: str = "python -m tools.bench") -> int:
    """The command. Returns its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    return guarded(lambda: run(parser(prog).parse_intermixed_args(words), words))


if __name__ == "__main__":
    run_command(main)
