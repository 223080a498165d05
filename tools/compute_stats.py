"""Mean image and RGB principal components of a training set, through the training's own decode; stored beside the index.

    python tools/compute_stats.py INDEX [--square-px 256]

Exit codes: 0 done, 2 an error, 130 interrupted.
"""
import sys
from pathlib import Path

if not __package__:  # run as a file: tools/profile must not hide the standard library's `profile`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train.exit_codes import run_command, start_command  # noqa: E402

if __name__ == "__main__":
    start_command(decodes=True)

import argparse
from collections.abc import Sequence

from tools.cli import ProgressBar, guarded  # noqa: E402
from train.cli import Parser, at_least, gpu, share  # noqa: E402


def parser(prog: str = "compute_stats.py") -> Parser:
    top = Parser(prog=prog, former={"--threads": "--jobs"}, example=f"{prog} photos.index --square-px 256",
                 description="Mean image and RGB principal components of a training set, through the training's own decode; "
                 "stored beside the index.")
    top.add_argument("index", type=Path, metavar="INDEX", help="folder of the index")
    top.add_argument("--square-px", type=at_least(1), default=256, metavar="PX",
                     help="side of the central square, data.square_px of the recipe")
    top.add_argument("--split", default="train", help="split to measure")
    top.add_archives()
    top.add_jobs("decoding threads")
    top.add_device("where to decode", default="cpu")
    top.add_argument("--budget", type=share, default=1e-4, metavar="SHARE", help="largest share of unreadable images")
    top.add_argument("--force", action="store_true", help="compute again even if the stats are there and fit")
    return top


def main(argv: Sequence[str] | None = None, prog: str = "compute_stats.py") -> int:
    return guarded(lambda: _compute(parser(prog).parse_args(argv)))


def _compute(args: argparse.Namespace) -> None:
    from pipeline.compute_stats import compute
    from pipeline.config import LoaderConfig
    from pipeline.index.sample_index import SampleIndex
    from pipeline.stats import Stats, stats_path

    index = SampleIndex.load(args.index, archives=args.archives)
    path = stats_path(index.path, args.square_px, args.split)
    stats = None
    if path.exists() and not args.force:
        try:
            stats = Stats.for_index(index, args.square_px, args.split)
            print(f"{path} is there and fits (--force computes it again)")
        except ValueError as error:
            print(f"computing again: {error}", file=sys.stderr)
    if stats is None:
        machine = LoaderConfig(threads=args.jobs, quarantine_budget=args.budget)
        with ProgressBar() as progress:
            stats = compute(index, args.split, args.square_px, machine=machine, device_id=gpu(args.device or "cpu"),
                            progress=progress, out=path)
    mean, roots = stats.channel_mean, stats.eigenvalues ** 0.5
    print(f"{path}: {stats.count:,} images of {stats.split}, {len(stats.skipped)} skipped, SHA-256 {stats.sha256[:16]}")
    print(f"mean R {mean[0]:.2f} G {mean[1]:.2f} B {mean[2]:.2f}; "
          f"standard deviations along the components {roots[0]:.2f} {roots[1]:.2f} {roots[2]:.2f} (grey levels)")
    for id, reason in stats.skipped.items():
        print(f"skipped sample {id} (={index.safe_name(id)}): {reason}")


if __name__ == "__main__":
    run_command(main)
