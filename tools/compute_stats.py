"""Mean image and RGB principal components of a training set, through the training's own decode; stored beside the index.

    python tools/compute_stats.py INDEX [--square-px 256]

Interrupted, the same command resumes where it last saved. Exit codes: 0 done, 2 an error, 130 interrupted.
"""
import sys
from pathlib import Path

if not __package__:  # run as a file: tools/profile must not hide the standard library's `profile`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train.exit_codes import run_command, start_command  # noqa: E402

if __name__ == "__main__":
    start_command(decodes=True)

import argparse

from tools.cli import ProgressBar, guarded  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compute_stats.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("index", type=Path, help="folder written by build_index.py")
    parser.add_argument("--square-px", type=int, default=256, help="side of the central square (data.square_px of the recipe)")
    parser.add_argument("--split", default="train", help="split to measure (default: train)")
    parser.add_argument("--archives", type=Path, help="folder to look for archives in when they have moved")
    parser.add_argument("--threads", type=int, default=0, help="decoding threads (default: one per core)")
    parser.add_argument("--device", type=int, help="GPU that decodes (default: the CPU)")
    parser.add_argument("--budget", type=float, default=1e-4, help="largest share of unreadable images (default: 0.0001)")
    parser.add_argument("--force", action="store_true", help="compute again even if the stats are there and fit")
    args = parser.parse_args(argv)
    return guarded(lambda: _compute(args), "interrupted; the same command resumes where it last saved")


def _compute(args: argparse.Namespace) -> None:
    from pipeline.compute_stats import compute
    from pipeline.config import LoaderConfig
    from pipeline.index.sample_index import SampleIndex
    from pipeline.stats import Stats, stats_path

    if args.square_px < 1:
        raise ValueError(f"--square-px (={args.square_px}) must be at least 1; give the recipe's data.square_px")
    if args.threads < 0 or not 0 <= args.budget <= 1:
        raise ValueError(f"--threads (={args.threads}) must be at least 0 and --budget (={args.budget}) a share between 0 "
                         "and 1; correct them")
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
        machine = LoaderConfig(threads=args.threads, quarantine_budget=args.budget)
        with ProgressBar() as progress:
            stats = compute(index, args.split, args.square_px, machine=machine, device_id=args.device, progress=progress,
                            out=path)
    mean, roots = stats.channel_mean, stats.eigenvalues ** 0.5
    print(f"{path}: {stats.count:,} images of {stats.split}, {len(stats.skipped)} skipped, SHA-256 {stats.sha256[:16]}")
    print(f"mean R {mean[0]:.2f} G {mean[1]:.2f} B {mean[2]:.2f}; "
          f"standard deviations along the components {roots[0]:.2f} {roots[1]:.2f} {roots[2]:.2f} (grey levels)")
    for id, reason in stats.skipped.items():
        print(f"skipped sample {id}: {reason}")


if __name__ == "__main__":
    run_command(main)
