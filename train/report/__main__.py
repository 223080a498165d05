"""One self-contained page about runs, with the paper's results beside ours:

    python -m train.report runs/a runs/b … -o report.html [--json report.json] [--picture "caption=sheet.png" …]

The page needs no network, no script and no other file. Runs may be unfinished or broken: what cannot be read is named in it.
Exit codes: 0 done, 2 a mistake in what was asked, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Sequence

from pipeline.files import atomic_write
from train.exit_codes import DONE, INTERRUPTED, MISTAKE

if TYPE_CHECKING:  # --help needs none of it
    from train.report.runs import Run

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.report", description="Write one self-contained HTML page about runs, with the paper's results "
        "beside theirs. Exit codes: 0 done, 2 a mistake in what was asked.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                        help="run folder; runs that differ only in the seed become one result")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="HTML", help="the page")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the same facts as JSON")
    parser.add_argument("--picture", action="append", default=[], metavar="CAPTION=PNG",
                        help="show a picture (PNG or JPEG) with a caption: example predictions, nearest images; may be repeated")
    parser.add_argument("--title", default="Training AlexNet", help="title of the page (default: %(default)s)")
    return parser.parse_args(argv)


def collect(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs in these folders, each once, and why others are left out.

    Raises:
        ValueError: a folder does not exist, or none holds a run.
    """
    from train.report.runs import NoRun, read_run

    runs, left_out = [], []
    for folder in {folder.resolve(): folder for folder in folders}.values():
        if not folder.exists():
            raise ValueError(f"run (={folder}) does not exist; name run folders, such as runs/tiny100")
        try:
            runs.append(read_run(folder))
        except NoRun as error:
            left_out.append(str(error))
    if not runs:
        raise ValueError(left_out[0])
    return runs, left_out


def picture(text: str) -> tuple[str, Path]:
    """CAPTION=FILE. Raises ValueError when it is not, or the file is no PNG or JPEG."""
    caption, _, name = text.rpartition("=")
    path = Path(name)
    if not caption or not path.is_file():
        raise ValueError(f"--picture (={text}) must be CAPTION=FILE with a file that is there; correct it")
    with path.open("rb") as file:
        if not file.read(8).startswith((PNG, JPEG)):
            raise ValueError(f"--picture (={text}) must name a PNG or JPEG; convert it")
    return caption, path


def write(path: Path, content: str) -> None:
    """A text file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(content.encode("utf-8", "replace"))  # undecodable bytes of a file's name become question marks


def run(args: argparse.Namespace) -> None:
    """Read the runs, write the page. Raises ValueError, RuntimeError or OSError."""
    from train.figures.kernels import need_matplotlib
    from train.report.compare import compare
    from train.report.groups import group
    from train.report.page import render

    need_matplotlib()
    for path in filter(None, (args.out, args.json)):
        if path.is_dir():
            raise ValueError(f"output (={path}) is a folder; name a file in it")
    pictures = [picture(text) for text in args.picture]
    runs, left_out = collect(args.runs)
    for reason in left_out:
        print(f"warning: {reason}", file=sys.stderr)
    made, (compared, not_averaged) = time.time(), compare(group(runs))
    problems = [*(f"left out: {reason}" for reason in left_out), *not_averaged]
    write(args.out, render(args.title, made, compared, problems, pictures))
    if args.json:
        facts = {"title": args.title, "made": made, **compared.as_dict(), "problems": problems}
        write(args.json, json.dumps(facts, indent=1, ensure_ascii=False, default=str) + "\n")
    print(f"{len(runs)} run{'s' * (len(runs) > 1)} in {args.out} ({args.out.stat().st_size / 1e6:.1f} MB)")


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    args = parse(argv)
    try:
        run(args)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
