"""Times our tiers against other loaders doing the same work: `python tools/bench/__main__.py [INDEX] [--packed DIR]`.

Every contender makes the same training batches of the same photographs with two workers; they take turns, each in a process of
its own, and are idle while another is timed (`tools.bench.rounds`). The first batch of every contender is compared with the
exact pixels (`tools.bench.workload`). No network follows: this is what a loader could give.

Writes OUT.json and OUT.png. Without an INDEX synthetic photographs are made; without --packed they are packed in a temporary
folder.
"""
from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: tools/profile must not hide the standard library's `profile`
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.cli import guarded  # noqa: E402  # found by the line above

if TYPE_CHECKING:
    from pipeline.index.sample_index import SampleIndex
    from tools.bench.workload import Task

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 0.05       # share of the photographs that may be unreadable; ours and the packed ones run without them


def synthetic_index(folder: Path, photographs: int) -> Path:
    """The index of some synthetic photographs with short sides of 333 to 400 pixels, like those of ImageNet."""
    from tools import build_index
    from tools.demo import dataset

    dataset.make(folder / "archives", 0, 4, max(1, photographs // 4), 1, (333, 400))
    with contextlib.redirect_stdout(sys.stderr):
        code = build_index.main(["build", "classes", str(folder / "archives" / dataset.TRAIN), "--out", str(folder / "index")])
    if code:
        raise RuntimeError(f"building the index of synthetic photographs (={folder}) failed; its message is above")
    return folder / "index"


def pack(index: Path, folder: Path) -> Path:
    """The photographs packed at 256 px by tools/pack_shards.py with its defaults."""
    process = subprocess.run([sys.executable, str(ROOT / "tools" / "pack_shards.py"), str(index), str(folder), "--split", "train",
                              "--budget", str(BUDGET)], stdout=sys.stderr)
    if process.returncode:
        raise RuntimeError(f"packing {index} failed (exit code {process.returncode}); its message is above")
    return folder


def prepare(args: argparse.Namespace, packs: bool, scratch: Path) -> Task:
    """Index, statistics and (if `packs`) packed shards, made where they are not given; all bytes in the page cache.

    Raises:
        ValueError: an index is not one, or the packed one is not of the same photographs.
    """
    from pipeline.compute_stats import compute
    from pipeline.config import LoaderConfig
    from pipeline.index.sample_index import SampleIndex
    from pipeline.stats import Stats
    from tools.bench.workload import SQUARE_PX, Task

    path = synthetic_index(scratch, args.photographs) if args.index is None else args.index.absolute()
    index = SampleIndex.load(path)
    index.check_archives("train")
    if args.batch > len(index.ids("train")):
        raise ValueError(f"--batch (={args.batch}) must not exceed the {len(index.ids('train'))} photographs; lower it, or give "
                         "an index of more")
    try:
        stats = Stats.for_index(index, SQUARE_PX)
    except ValueError:      # none there, or of another size: they are computed, and not left beside the index
        stats = compute(index, "train", SQUARE_PX, machine=LoaderConfig(quarantine_budget=BUDGET))
    stats.save(scratch / "stats.npz")
    packed = None
    if packs:
        packed = pack(path, scratch / "packed") if args.packed is None else args.packed.absolute()
        about = SampleIndex.load(packed).packed
        if about is None or about["source"].get("train") != index.split_sha256("train"):
            raise ValueError(f"--packed (={packed}) must hold the photographs of {path}; give the folder that `python "
                             f"tools/pack_shards.py {path} OUT` wrote, or leave it out")
    for folder in (path, packed):
        if folder is not None:
            warm(SampleIndex.load(folder))
    return Task(path, packed, scratch / "stats.npz", scratch, "train", args.batch, args.workers)


def warm(index: SampleIndex) -> None:
    """Read every training image once, so that it lies in the page cache."""
    for id in index.ids("train").tolist():
        index.read(id)


def run(args: argparse.Namespace, command: list[str]) -> None:
    """Measure, print, write. Raises ValueError or RuntimeError."""
    for name in ("workers", "rounds", "batch", "photographs"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} (={getattr(args, name)}) must be at least 1; leave it out for the default")
    if not args.seconds > 0:
        raise ValueError(f"--seconds (={args.seconds}) must be above 0; leave it out for the default")
    for module, extra in (("PIL", "demo"), ("matplotlib", "plots")):
        try:
            importlib.import_module(module)
        except ImportError:
            raise RuntimeError(f"{module} is not installed, and the comparison is drawn and checked with it; pip install -e "
                               f"'.[{extra}]'") from None
    from rich.console import Console

    from pipeline.index.sample_index import SampleIndex
    from tools.bench import report, rounds
    from tools.bench.contenders import CONTENDERS
    from pipeline.files import write_json

    names = [name for name in args.only or CONTENDERS if name not in args.without]
    for name in (*names, *args.without):
        if name not in CONTENDERS:
            raise ValueError(f"contender (={name}) is unknown; contenders are {', '.join(CONTENDERS)}")
    if not names:
        raise ValueError(f"--without (={','.join(args.without)}) must leave a contender; leave some out of it")
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        task = prepare(args, any(CONTENDERS[name].data == "packed" for name in names), Path(folder))
        images = len(SampleIndex.load(task.index).ids(task.split))
        results = rounds.measure(task, names, args.rounds, args.seconds)
    about = {"what": "training crops, 227 of 256, float32, warm page cache", "date": datetime.date.today().isoformat(),
             "command": shlex.join(["python", "tools/bench/__main__.py", *command]),
             "work": {"photographs": images, "batch": args.batch, "workers": args.workers, "rounds": args.rounds,
                      "seconds_a_turn": args.seconds, "drawn": args.index is None}}
    plain = report.as_json(results, about)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out.with_name(args.out.name + ".json"), plain)
    cpu = plain["hardware"]
    title = f"{images} photographs, {args.workers} workers each, {args.rounds} rounds; {cpu['cores']} cores of {cpu['cpu']}"
    report.plot(results, title, args.out.with_name(args.out.name + ".png"))
    report.show(results, Console(width=None if sys.stdout.isatty() else 140))
    print(f"{args.out}.json, {args.out}.png")


def comma_separated(text: str) -> list[str]:
    """Names divided by commas."""
    return [name for name in text.split(",") if name]


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit code: 0, or 2 with a message on stderr."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench",
                                     description="Time our tiers and other loaders doing the same work.")
    parser.add_argument("index", nargs="?", type=Path, metavar="INDEX", help="index to read (default: synthetic photographs)")
    parser.add_argument("--packed", type=Path, metavar="DIR", help="what tools/pack_shards.py made of it (default: made now)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each contender (5)")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="length of a turn (3)")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images of a batch (64)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="threads or processes of each contender (2)")
    parser.add_argument("--photographs", type=int, default=96, metavar="N", help="to make without an INDEX (96)")
    parser.add_argument("--only", type=comma_separated, metavar="NAMES", help="these, divided by commas (default: all)")
    parser.add_argument("--without", type=comma_separated, default=[], metavar="NAMES", help="all but these")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where to write copies for other loaders (default: TMPDIR)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "bench", metavar="NAME",
                        help="writes NAME.json and NAME.png (docs/results/bench)")
    args = parser.parse_args(arguments)
    return guarded(lambda: run(args, sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
