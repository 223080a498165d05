"""The whole way in one command (`make demo`): archives → index → statistics → training → tests → a table.

    python tools/demo/__main__.py --out DIR [--data FOLDER] [--recipe FILE] [-- --train.epochs=3 …]

Each step is the command a user would type, printed before it runs. Without --data the archives are drawn by
tools/demo/dataset.py and everything is made anew; with it, an index, statistics and a run that are there are gone on with.
A folder of drawn things carries a mark, and only such a folder is made anew: real data and runs are never removed.
What stands after `--` goes to the training as it is. Exit code: that of the first step that failed, or 2.
"""
from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
MARK = "DRAWN"      # the Makefile's `clean` looks for it too

if TYPE_CHECKING:
    from rich.console import Console


class StepFailed(Exception):
    """A step ended with a code other than 0; it has said why."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


@dataclass(frozen=True)
class Archives:
    """The three files of a data set."""

    train: Path
    val: Path
    devkit: Path


def find_archives(folder: Path) -> Archives:
    """The ILSVRC2012 archives of a folder, by name.

    Raises ValueError naming the pattern that no file, or more than one, fits.
    """
    found = []
    for pattern in ("*train*.tar", "*val*.tar", "*devkit*.tar.gz"):
        fits = sorted(folder.glob(pattern))
        if len(fits) != 1:
            names = ", ".join(path.name for path in fits) or "none"
            raise ValueError(f"data folder (={folder}) must hold exactly one {pattern} (found: {names}); put "
                             "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz there")
        found.append(fits[0])
    return Archives(*found)


class Demo:
    """Runs the steps and remembers how long each took."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    def step(self, title: str, words: list[str | Path], capture: bool = False) -> str:
        """Run `python words…` from the root of the tree. Returns what it printed if captured, else "".

        Raises StepFailed.
        """
        shown = shlex.join(str(word) for word in words)
        self.console.rule(f"[bold]{len(self.seconds) + 1}. {title}", align="left")
        self.console.print(f"$ python {shown}", style="dim", highlight=False, markup=False, soft_wrap=True)
        start = time.monotonic()
        with subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE if capture else None) as process:
            try:
                printed, _ = process.communicate()
            except KeyboardInterrupt:
                process.wait()      # the step was interrupted too; it may be saving
                raise
        if process.returncode:
            raise StepFailed(process.returncode)
        self.seconds[title] = time.monotonic() - start
        return printed or ""


def check_out(out: Path, drawn: bool) -> None:
    """Raise ValueError when `out` holds what this run must not mix with: a drawn run removes what was drawn before, and
    only that.
    """
    if drawn and out.exists() and not (out / MARK).exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"output folder (={out}) must be new, empty or of an earlier drawn demo, for it is made anew; give "
                         "another --out (make demo OUT=…), or remove it")
    if not drawn and (out / MARK).exists():
        raise ValueError(f"output folder (={out}) holds a drawn demo, which the next one removes; give another --out (make demo "
                         "OUT=…)")


def check_index(index: Path, archives: Archives) -> None:
    """Raise ValueError when the index that is there was made of other archives."""
    from pipeline.index.tar import fingerprint, open_tar
    from pipeline.index.sample_index import SampleIndex

    given = [archives.train, archives.val]
    for path in given:
        open_tar(path).close()      # for its messages
    recorded = SampleIndex.load(index).archives
    if sorted(archive.fingerprint for archive in recorded) != sorted(map(fingerprint, given)):
        raise ValueError(f"index (={index}) is that of other archives ({', '.join(str(archive.path) for archive in recorded)}) "
                         f"than {archives.train} and {archives.val}; give another --out (make demo OUT=…)")


def run(out: Path, data: Path | None, recipe: Path, extra: list[str], console: Console) -> None:
    """All steps; ends with the table. Raises ValueError or StepFailed."""
    from pipeline.index.sample_index import SampleIndex
    from train.recipe import load

    check_out(out, data is None)
    config = load(recipe)
    px = config.data.square_px
    demo = Demo(console)
    index, runs, name = out / "index", out / "runs", recipe.stem
    out.mkdir(parents=True, exist_ok=True)
    if data is None:
        for old in (index, runs):
            shutil.rmtree(old, ignore_errors=True)
        (out / MARK).write_text("drawn by tools/demo/__main__.py; the next one, and make clean, remove what is here\n", encoding="utf-8")
        demo.step("draw the archives", ["tools/demo/dataset.py", "--out", out])
        console.print("(One of the drawn files is cut off, as happens to downloads. Lines that begin with [ERROR] are DALI's "
                      "own about it; training goes on with another picture.)", highlight=False, markup=False)
    archives = find_archives(data or out)
    if (index / "index.json").exists():
        check_index(index, archives)
    else:
        demo.step("index them in place", ["tools/build_index.py", "build", "ilsvrc2012", "--train", archives.train,
                                          "--val", archives.val, "--devkit", archives.devkit, "--out", index])
    demo.step("mean image and colour components", ["tools/compute_stats.py", index, "--square-px", str(px)])
    found = SampleIndex.load(index)
    resume = ["--resume"] if (runs / name / "config.yaml").exists() else []
    demo.step("train", ["-m", "train.main", "--config", recipe, f"--data.index={index}",
                        f"--model.classes={len(found.classes)}", f"--machine.runs={runs}", *extra, *resume])
    scores = {views: json.loads(demo.step(f"test with {views} view{'s' if views > 1 else ''} per picture",
                                          ["-m", "train.evaluate", "--run", runs / name, "--views", str(views),
                                           "--json"], capture=True))
              for views in (1, 10)}
    _table(demo, len(found.classes), len(found.ids("train")), scores, runs / name)


def _table(demo: Demo, classes: int, pictures: int, scores: dict[int, dict[str, float]], folder: Path) -> None:
    """Print what came of it."""
    from rich.table import Table

    table = Table()
    for column in ("error", "top-1", "top-5"):
        table.add_column(column, justify="left" if column == "error" else "right")
    table.add_row("guessing", *(f"{max(0.0, 1 - best / classes):.1%}" for best in (1, 5)))
    for views, label in ((1, "centre crop"), (10, "ten crops")):
        table.add_row(label, f"{scores[views]['top1']:.1%}", f"{scores[views]['top5']:.1%}")
    demo.console.rule("[bold]result", align="left")
    demo.console.print(f"{pictures} training pictures, {int(scores[1]['images'])} tested, {classes} classes",
                       highlight=False)
    demo.console.print(table)
    quarantine = folder / "quarantine.jsonl"
    if quarantine.exists():
        ids = {json.loads(line).get("id") for line in quarantine.read_text(encoding="utf-8").splitlines()}
        demo.console.print(f"{len(ids)} unreadable training file(s) replaced by others, listed in {quarantine}",
                           soft_wrap=True)
    times = ", ".join(f"{title} {seconds:.0f} s" for title, seconds in demo.seconds.items())
    demo.console.print(f"time: {sum(demo.seconds.values()):.0f} s ({times})", highlight=False, soft_wrap=True)
    demo.console.print(f"run folder: {folder}\nits first kernels: python tools/show/kernels.py --run {folder} --out "
                       "kernels.png", highlight=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="demo.py", description="Index archives in place, train on them, test, and "
                                     "print a table.", epilog="What stands after -- goes to train.main as it is.")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="folder for everything made (default: demo; demo-data with --data)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of ILSVRC2012 archives (default: drawn)")
    parser.add_argument("--recipe", type=Path, metavar="FILE",
                        help="recipe to train (default: demo.yaml; tiny100.yaml, a small network, with --data)")
    parser.add_argument("extra", nargs="*", metavar="-- --key=value", help="for the training")
    asked = parser.parse_args(arguments)
    recipe = asked.recipe or ROOT / "train" / "recipes" / ("demo.yaml" if asked.data is None else "tiny100.yaml")
    from rich.console import Console
    try:
        if not recipe.is_file():
            raise ValueError(f"recipe (={recipe}) does not exist; give one of train/recipes with --recipe")
        if asked.data is not None:
            find_archives(asked.data)
        out = asked.out or Path("demo" if asked.data is None else "demo-data")
        run(out.resolve(), asked.data and asked.data.resolve(), recipe.resolve(), asked.extra, Console())
    except StepFailed as failed:
        return failed.code
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it last saved" if asked.data else "interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
