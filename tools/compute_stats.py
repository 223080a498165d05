"""Mean image and RGB principal components of a training set, through the training's own decode; stored beside the index.

    python tools/compute_stats.py INDEX [--square-px 256]

Interrupted, it goes on where it last saved. Exit codes: 0 done, 2 a mistake in what was asked or in the data, 130 interrupted.
"""
import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from pipeline.stats import Stats


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="compute_stats.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("index", type=Path, help="folder written by build_index.py")
    parser.add_argument("--square-px", type=int, default=256, help="side of the central square (data.square_px of the recipe)")
    parser.add_argument("--split", default="train", help="split to measure (default: train)")
    parser.add_argument("--archives", type=Path, help="folder to look for archives in when they have moved")
    parser.add_argument("--threads", type=int, default=0, help="decoding threads (default: one per core)")
    parser.add_argument("--device", type=int, help="GPU that decodes (default: the CPU)")
    parser.add_argument("--budget", type=float, default=1e-4, help="largest share of unreadable images (default: 0.0001)")
    parser.add_argument("--force", action="store_true", help="compute again even if the stats are there and fit")
    asked = parser.parse_args(arguments)
    try:
        return _run(asked)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it last saved", file=sys.stderr)
        return 130
    except MemoryError:
        print(f"error: --square-px (={asked.square_px}) needs more memory than there is; give the recipe's data.square_px",
              file=sys.stderr)
        return 2
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(asked: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from pipeline.config import LoaderConfig
    from pipeline.index.sample_index import SampleIndex
    from pipeline.compute_stats import compute
    from pipeline.stats import Stats, stats_path

    if asked.square_px < 1:
        raise ValueError(f"--square-px (={asked.square_px}) must be at least 1; give the recipe's data.square_px")
    if asked.threads < 0 or not 0 <= asked.budget <= 1:
        raise ValueError(f"--threads (={asked.threads}) must be at least 0 and --budget (={asked.budget}) a share between 0 "
                         "and 1; correct them")
    index = SampleIndex.load(asked.index, archives=asked.archives)
    path = stats_path(index.path, asked.square_px, asked.split)
    if path.exists() and not asked.force:
        try:
            stats = Stats.for_index(index, asked.square_px, asked.split)
        except ValueError as error:
            print(f"computing again: {error}", file=sys.stderr)
        else:
            print(f"{path} is there and fits (--force computes it again)")
            return _show(stats, path)
    try:  # before the pass, which may take half an hour
        with tempfile.TemporaryFile(dir=index.path):
            pass
    except OSError as error:
        raise ValueError(f"index folder (={index.path}) must be writable, the statistics are stored in it "
                         f"({error.strerror}); give yourself permission, or copy the index") from None
    machine = LoaderConfig(threads=asked.threads, quarantine_budget=asked.budget)
    columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(index.ids(asked.split)), rate="")

        def tell(done: int, total: int) -> None:
            speed = bar.tasks[0].finished_speed or bar.tasks[0].speed
            bar.update(task, completed=done, rate=f"{speed:,.0f} img/s" if speed else "")

        stats = compute(index, asked.split, asked.square_px, machine=machine, device_id=asked.device, progress=tell)
    stats.save(path)
    return _show(stats, path)


def _show(stats: "Stats", path: Path) -> int:
    mean, roots = stats.channel_mean, stats.eigenvalues ** 0.5
    print(f"{path}: {stats.count:,} images of {stats.split}, {len(stats.skipped)} skipped, SHA-256 {stats.sha256[:16]}")
    print(f"mean R {mean[0]:.2f} G {mean[1]:.2f} B {mean[2]:.2f}; "
          f"standard deviations along the components {roots[0]:.2f} {roots[1]:.2f} {roots[2]:.2f} (grey levels)")
    for id, reason in stats.skipped.items():
        print(f"skipped sample {id}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
