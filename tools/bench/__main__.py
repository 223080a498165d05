"""Our tiers against other loaders doing the same work, side by side: `python tools/bench/__main__.py [INDEX] [--packed DIR]`.

The one concept: every side makes the same training batches of the same photographs with two workers; they take turns, each
in a process of its own, and are at rest while another is timed (`tools.bench.rounds`). The first batch of every side is
compared with the exact pixels (`tools.bench.workload`). Nothing is followed by a network: this is what a loader could give.

Writes OUT.json and OUT.png. Without an INDEX photographs are drawn; without --packed they are packed in a temporary folder.
"""
from __future__ import annotations

import argparse
import contextlib
import datetime
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if TYPE_CHECKING:
    from pipeline.index.sample_index import SampleIndex
    from tools.bench.report import Result
    from tools.bench.workload import Work

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 0.05       # share of the photographs that may be unreadable; ours and the packed ones go on without them


def drawn_index(folder: Path, photographs: int) -> Path:
    """The index of `photographs` drawn pictures with short sides of 333 to 400 pixels, like those of ImageNet."""
    from tools import build_index
    from tools.demo import dataset as make_demo

    make_demo.make(folder / "archives", 0, 4, max(1, photographs // 4), 1, (333, 400))
    with contextlib.redirect_stdout(sys.stderr):
        code = build_index.main(["build", "classes", str(folder / "archives" / make_demo.TRAIN), "--out", str(folder / "index")])
    if code:
        raise RuntimeError(f"building the index of drawn pictures (={folder}) failed; its message is above")
    return folder / "index"


def pack(index: Path, folder: Path) -> Path:
    """The photographs packed at 256 px by tools/pack_shards.py with its defaults."""
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "pack_shards.py"), str(index), str(folder), "--split", "train",
                           "--budget", str(BUDGET)], stdout=sys.stderr)
    if done.returncode:
        raise RuntimeError(f"packing {index} failed (exit code {done.returncode}); its message is above")
    return folder


def prepare(asked: argparse.Namespace, chosen: Sequence[str], scratch: Path) -> Work:
    """Index, statistics and packed shards, made where they are not given; all bytes in the page cache.

    Raises:
        ValueError: an index is not one, or the packed one is not of the same photographs.
    """
    from pipeline.config import LoaderConfig
    from pipeline.index.sample_index import SampleIndex
    from pipeline.compute_stats import compute
    from pipeline.stats import Stats
    from tools.bench.sides import BY_NAME
    from tools.bench.workload import SQUARE_PX, Work

    path = drawn_index(scratch, asked.photographs) if asked.index is None else asked.index.absolute()
    index = SampleIndex.load(path)
    index.check_archives("train")
    if asked.batch > len(index.ids("train")):
        raise ValueError(f"--batch (={asked.batch}) must not exceed the {len(index.ids('train'))} photographs; lower it, or give "
                         "an index of more")
    try:
        stats = Stats.for_index(index, SQUARE_PX)
    except ValueError:      # none there, or of another size: they are computed, and not left beside the index
        stats = compute(index, "train", SQUARE_PX, machine=LoaderConfig(quarantine_budget=BUDGET))
    stats.save(scratch / "stats.npz")
    packed = None
    if any(BY_NAME[name].data == "packed" for name in chosen):
        packed = pack(path, scratch / "packed") if asked.packed is None else asked.packed.absolute()
        about = SampleIndex.load(packed).packed
        if about is None or about["source"].get("train") != index.split_sha256("train"):
            raise ValueError(f"--packed (={packed}) must hold the photographs of {path}; give the folder that `python "
                             f"tools/pack_shards.py {path} OUT` wrote, or leave it out")
    for folder in (path, packed):
        if folder is not None:
            warm(SampleIndex.load(folder))
    return Work(path, packed, scratch / "stats.npz", scratch, "train", asked.batch, asked.workers)


def warm(index: SampleIndex) -> None:
    """Read every training image once, so that it lies in the page cache."""
    for id in index.ids("train").tolist():
        index.read(id)


def measure(work: Work, chosen: Sequence[str], rounds: int, seconds: float) -> list[Result]:
    """Start the sides one after the other, then let them take turns; in every round another one begins.

    Raises:
        RuntimeError: one of ours failed, or any side did once the turns had begun. Others that cannot run are only noted.
    """
    from tools.bench.report import Result
    from tools.bench.sides import BY_NAME
    from tools.bench.rounds import Player, Turn
    from tools.bench.workload import NotAvailable

    players: dict[str, Player] = {}
    reasons: dict[str, str] = {}
    turns: dict[str, list[Turn]] = {name: [] for name in chosen}
    try:
        for name in chosen:
            print(f"starting {BY_NAME[name].label} ({BY_NAME[name].data})", file=sys.stderr, flush=True)
            try:
                players[name] = Player(name, work)
            except NotAvailable as error:
                reasons[name] = str(error)
            except RuntimeError as error:
                if BY_NAME[name].role == "ours":
                    raise
                reasons[name] = str(error)
        order = list(players)
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            first = number * len(order) // rounds
            for name in order[first:] + order[:first]:
                turns[name].append(players[name].turn(seconds))
    finally:
        for player in players.values():
            player.close()
    return [Result(BY_NAME[name], tuple(turns[name]), players[name].difference if name in players else None,
                   reasons.get(name, "")) for name in chosen]


def run(asked: argparse.Namespace) -> None:
    """Measure, print, write. Raises ValueError or RuntimeError."""
    for name in ("workers", "rounds", "batch", "photographs"):
        if getattr(asked, name) < 1:
            raise ValueError(f"--{name} (={getattr(asked, name)}) must be at least 1; leave it out for the default")
    if not asked.seconds > 0:
        raise ValueError(f"--seconds (={asked.seconds}) must be above 0; leave it out for the default")
    from tools.bench import report as bench_report
    from tools.bench.workload import Material, need
    for module, what in (("PIL", "demo"), ("matplotlib", "plots")):
        try:
            need(module)
        except RuntimeError as error:
            raise RuntimeError(f"{error}, and the comparison is drawn and checked with it; pip install -e '.[{what}]'") from None
    chosen = [name for name in asked.only or bench_report.BY_NAME if name not in asked.without]
    for name in (*chosen, *asked.without):
        if name not in bench_report.BY_NAME:
            raise ValueError(f"side (={name}) is unknown; sides are {bench_report.names()}")
    if not chosen:
        raise ValueError(f"--without (={','.join(asked.without)}) must leave a side; leave some out of it")
    from rich.console import Console
    with tempfile.TemporaryDirectory(dir=asked.scratch) as folder:
        work = prepare(asked, chosen, Path(folder))
        images = len(Material(work, "original").ids)
        results = measure(work, chosen, asked.rounds, asked.seconds)
    about = {"what": "training crops, 227 of 256, float32, warm page cache", "date": datetime.date.today().isoformat(),
             "command": shlex.join(["python", "tools/bench/__main__.py", *asked.words]),
             "work": {"photographs": images, "batch": asked.batch, "workers": asked.workers, "rounds": asked.rounds,
                      "seconds_a_turn": asked.seconds, "drawn": asked.index is None}}
    found = bench_report.as_json(results, about)
    bench_report.write_json(found, asked.out.with_name(asked.out.name + ".json"))
    cpu = found["hardware"]
    title = f"{images} photographs, {asked.workers} workers each, {asked.rounds} turns; {cpu['cores']} cores of {cpu['cpu']}"
    bench_report.plot(results, title, asked.out.with_name(asked.out.name + ".png"))
    bench_report.show(results, Console(width=None if sys.stdout.isatty() else 140))
    print(f"{asked.out}.json, {asked.out}.png")


def listed(text: str) -> list[str]:
    """Names divided by commas."""
    return [name for name in text.split(",") if name]


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit code: 0, or 2 with a message on stderr."""
    parser = argparse.ArgumentParser(prog="bench.py", description="Time our tiers and other loaders doing the same work.")
    parser.add_argument("index", nargs="?", type=Path, metavar="INDEX", help="index to read (default: drawn pictures)")
    parser.add_argument("--packed", type=Path, metavar="DIR", help="what tools/pack_shards.py made of it (default: made now)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each side (5)")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="length of a turn (3)")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images of a batch (64)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="threads or processes of each side (2)")
    parser.add_argument("--photographs", type=int, default=96, metavar="N", help="to draw without an INDEX (96)")
    parser.add_argument("--only", type=listed, metavar="NAMES", help="these sides, divided by commas (default: all)")
    parser.add_argument("--without", type=listed, default=[], metavar="NAMES", help="all but these")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where to write copies for other loaders (default: TMPDIR)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "bench", metavar="NAME",
                        help="writes NAME.json and NAME.png (docs/results/bench)")
    from tools.cli import guarded
    asked = parser.parse_args(arguments)
    asked.words = sys.argv[1:] if arguments is None else arguments
    return guarded(lambda: run(asked))


if __name__ == "__main__":
    sys.exit(main())
