"""One self-contained page about runs, with the paper's results beside ours:

    python -m train.report runs/a runs/b … -o report.html [--json report.json] [--picture "caption=sheet.png" …]

The page needs no network, no script and no other file. Runs may be unfinished or broken: what cannot be read is named in it.
Exit codes: 0 done, 2 a mistake in what was asked, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Sequence

from train.exit_codes import DONE, INTERRUPTED, MISTAKE

if TYPE_CHECKING:  # --help needs none of it
    from train.report.facts import Run
    from train.report.compare import Ensemble
    from train.report.groups import Group

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"


def arguments(argv: Sequence[str]) -> argparse.Namespace:
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


def picture(said: str) -> tuple[str, Path]:
    """CAPTION=FILE. Raises ValueError when it is not, or the file is no PNG or JPEG."""
    caption, _, name = said.rpartition("=")
    path = Path(name)
    if not caption or not path.is_file():
        raise ValueError(f"--picture (={said}) must be CAPTION=FILE with a file that is there; correct it")
    with path.open("rb") as file:
        if not file.read(8).startswith((PNG, JPEG)):
            raise ValueError(f"--picture (={said}) must name a PNG or JPEG; convert it")
    return caption, path


def as_json(groups: Sequence[Group], averaged: Sequence[Ensemble], wrong: Sequence[str], title: str,
            made: float) -> dict[str, Any]:
    """All facts of the page as plain values: errors and waiting as shares, the paper's as percent, as in its tables."""
    from train.report import paper
    from train.report.compare import ablations, matches, sooner, ten_crops
    from train.report.groups import COUNTED, stat

    def plain(value: Any) -> Any:
        return dataclasses.asdict(value) if value is not None else None

    results = [{"name": group.name, "runs": [run.name for run in group.runs], "seeds": [run.seed for run in group.counted],
                "experiment": group.experiment or None, "departs": group.departs, "data": group.data,
                "data_set": group.data_set or None,
                **{name: plain(group.stat(name)) for name in COUNTED}} for group in groups]
    means = [{"name": one.group.name, "members": one.members, "split": one.split, "views": one.views, "top1": one.top1.mean,
              "top5": one.top5.mean, "less_top1": one.less_top1.mean, "less_top5": one.less_top5.mean} for one in averaged]
    rows = [{**dataclasses.asdict(row), "ours": [
        {"name": group.name, **{name: plain(stat(getattr(test, name) for run in group.counted if (test := ten_crops(run, row))))
                                for name in ("top1", "top5")}} for group in matches(row, groups) if row.key != paper.FIVE]}
            for row in paper.ROWS]
    changed = [{"experiment": one.group.experiment, "name": one.group.name, "full": one.full.name, "paper_top1": one.change.top1,
                "paper_top5": one.change.top5, "top1": plain(one.top1), "top5": plain(one.top5), "also": list(one.also)}
               for one in ablations(groups)]
    pair = sooner(groups)
    figure1 = pair and {"relu": pair.relu.name, "tanh": pair.tanh.name, "relu_epochs": plain(pair.relu_epochs),
                        "tanh_epochs": plain(pair.tanh_epochs)}
    runs = [{**dataclasses.asdict(run), "folder": str(run.folder), "state": run.state} for group in groups for run in group.runs]
    return {"title": title, "made": made, "results": results, "averaged": means, "paper": rows, "changes": changed,
            "figure1": figure1, "runs": runs, "problems": list(wrong)}


def write(path: Path, content: str) -> None:
    """A text file that is there whole or not at all."""
    from pipeline.files import atomic_write

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(content.encode("utf-8", "replace"))


def run(asked: argparse.Namespace) -> None:
    """Read the runs, write the page. Raises ValueError, RuntimeError or OSError."""
    from train.report import page as parts, tables
    from train.figures.kernels import need_matplotlib
    from train.report.compare import ensembles
    from train.report.groups import group
    from train.report.html import page

    need_matplotlib()
    for path in filter(None, (asked.out, asked.json)):
        if path.is_dir():
            raise ValueError(f"output (={path}) is a folder; name a file in it")
    shown = [picture(said) for said in asked.picture]
    runs, left_out = collect(asked.runs)
    for reason in left_out:
        print(f"warning: {reason}", file=sys.stderr)
    groups, made = group(runs), time.time()
    averaged, failed = ensembles(groups)
    wrong = [*(f"left out: {reason}" for reason in left_out), *failed]
    sections = [("results", "Results", tables.results(groups, averaged, wrong)),
                ("paper", "The paper beside ours", tables.beside_the_paper(groups, averaged)),
                ("changes", "Changes", tables.changes(groups, averaged)), ("curves", "Curves", parts.curves(groups)),
                ("kernels", "Kernels", parts.first_kernels(groups)),
                *([("pictures", "Pictures", parts.pictures(shown))] if shown else []),
                ("runs", "Runs", parts.all_runs(groups))]
    write(asked.out, page(asked.title, sections, parts.head(groups, made)))
    if asked.json:
        facts = as_json(groups, averaged, wrong, asked.title, made)
        write(asked.json, json.dumps(facts, indent=1, ensure_ascii=False, default=str) + "\n")
    print(f"{len(runs)} run{'s' * (len(runs) > 1)} in {asked.out} ({asked.out.stat().st_size / 1e6:.1f} MB)")


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    asked = arguments(argv)
    try:
        run(asked)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
