"""Profile the data loader: its throughput, what training needs, which stage is the bottleneck, and what would lift it:
`python tools/profile_pipeline.py --config RECIPE --model`, or on a bare index with the paper's crops: `--index INDEX`.

Every stage alone and the loader cut off after each, the loader whole (warm; `--cold`: dropped from the page cache), and with
`--model` or `--need N` the loader feeding its consumer; all in turns, several times. Nothing is written but what is asked
for (and the images of tier resident, which stay for training).

Exit codes: 0 done; 1 `--fail-below X` and the rate together ÷ need is below X; 2 a mistake in what was asked, or the
machine failed; 130 interrupted.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file: tools/profile must not hide the standard library's `profile`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools.cli import guarded  # noqa: E402  # found by the line above

TIERS = ("archives", "packed", "streamed", "resident")


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    top = argparse.ArgumentParser(
        prog="profile_pipeline.py", epilog="Exit codes: 0 done, 1 below --fail-below, 2 a mistake or a failure, 130 Ctrl-C.",
        description="Measure the loader's stages, the loader, and what training needs; say which stage limits and what would "
        "lift it.")
    what = top.add_argument_group("what")
    what.add_argument("--config", type=Path, metavar="RECIPE", help="a recipe: its data, batch, machine settings and network")
    what.add_argument("--index", type=Path, metavar="DIR", help="index, instead of the recipe's; alone: with the paper's crops")
    what.add_argument("--archives", type=Path, metavar="DIR", help="folder of the archives when they have moved")
    what.add_argument("--tier", choices=TIERS, help="where images come from (default: the recipe's, or archives)")
    what.add_argument("--packed", type=Path, metavar="DIR", help="folder of pack_shards.py: tiers packed, streamed")
    what.add_argument("--resident", choices=("rgb", "yuv420"), help="layout of tier resident (default: the recipe's, or rgb)")
    how = top.add_argument_group("settings, instead of the recipe's")
    how.add_argument("--device", choices=("auto", "cpu", "cuda"))
    for name, text in (("threads", "DALI's worker threads"), ("read-threads", "threads that fetch bytes"),
                       ("prefetch", "batches DALI keeps ready"), ("queue", "finished batches kept ready"),
                       ("batch", "images of a batch")):
        how.add_argument(f"--{name}", type=int, metavar="N", help=text)
    need = top.add_argument_group("the need").add_mutually_exclusive_group()
    need.add_argument("--model", action="store_true", help="measure the recipe's network on batches of noise, and feed it")
    need.add_argument("--need", type=float, metavar="N", help="images/s that training takes; a consumer of that rate is fed")
    more = top.add_argument_group("more")
    more.add_argument("--cold", action="store_true", help="also with the page cache emptied of the archives")
    more.add_argument("--sweep", action="store_true", help="find the best threads, prefetch, read threads, batch, decoder share")
    more.add_argument("--compare", action="store_true", help="also torch's DataLoader and other loaders that are installed")
    more.add_argument("--seconds", type=float, default=1.0, metavar="S", help="of each turn (default 1)")
    more.add_argument("--repeats", type=int, default=5, metavar="N", help="turns of each (default 5)")
    more.add_argument("--fail-below", type=float, metavar="X", help="exit 1 when rate together ÷ need is below X, such as 0.99")
    out = top.add_argument_group("files")
    out.add_argument("--json", type=Path, metavar="FILE", help="all figures")
    out.add_argument("--plot", type=Path, metavar="PNG", help="stages as bars against the line of need")
    out.add_argument("--trace", type=Path, metavar="FILE", help="batches through the stages, for chrome://tracing, Perfetto")
    out.add_argument("--nvtx", action="store_true", help="NVTX ranges, for Nsight Systems")
    return top


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for arguments that do not fit together."""
    if args.config is None and args.index is None:
        raise ValueError("--config (=none) must name a recipe, or --index an index; give one of them")
    if args.model and args.config is None:
        raise ValueError("--model (=True) needs the network of a recipe; give --config, or --need N")
    if args.fail_below is not None and not (args.model or args.need):
        raise ValueError(f"--fail-below (={args.fail_below}) needs a need to compare with; add --model or --need N")
    for name, low in (("threads", 0), ("read_threads", 0), ("prefetch", 1), ("queue", 1), ("batch", 1), ("repeats", 1)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise ValueError(f"--{name.replace('_', '-')} (={value}) must be at least {low}; correct the command line")
    for name in ("seconds", "need", "fail_below"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} (={value}) must be positive; correct the command line")


def run(args: argparse.Namespace) -> int:
    """Measure, show, write; returns the exit code. Raises ValueError or RuntimeError."""
    check(args)
    from tools.profile import report
    from tools.profile.run import profile
    from train.figures.kernels import need_matplotlib

    if args.plot:
        need_matplotlib()
    figures, events, depths = profile(args)
    report.show(figures, sys.stdout)
    if args.json:
        report.write_json(report.as_json(figures), args.json)
    if args.plot:
        report.plot(figures, args.plot)
    if args.trace:
        report.write_json(report.trace(events, depths), args.trace, indent=None)
    if args.fail_below is not None and figures.met is not None and figures.met < args.fail_below:
        print(f"the rate together is {figures.met:.3f} of the need, below --fail-below (={args.fail_below})", file=sys.stderr)
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit code, see the module."""
    args = parser().parse_args(arguments)
    return guarded(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
