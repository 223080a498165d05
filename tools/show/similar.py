"""Images that the network finds alike (paper figure 4, right): nearest neighbours at its last hidden layer.

    python tools/show/similar.py build --run runs/NAME --split train --out features/NAME
    python tools/show/similar.py query --features features/NAME --count 5 --out similar.png
    python tools/show/similar.py query --features features/NAME --images photo.jpg --out similar.html
    python tools/show/similar.py query --features features/NAME --evaluate 1000

`build` writes the features of every image of a split. `query` finds the images nearest to others by Euclidean distance, exactly,
and beside them, for contrast, those whose pixels are nearest. Says of both how many are of the query's class.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if TYPE_CHECKING:
    from tools.show.similar_sheet import Row
    from train.figures.features import Features
    from train.figures.neighbours import Nearest
    from train.figures.similar import Queries
    from train.checkpoint.load_trained import TrainedNetwork

MOST = 40  # queries of a sheet


def build(asked: argparse.Namespace) -> None:
    """Write features. Raises ValueError or RuntimeError."""
    from train.figures.features import build as write
    from train.checkpoint.load_trained import load_trained
    from train.checkpoint.resolve import resolve

    source = resolve(asked.run or asked.checkpoint, asked.which)
    with load_trained(source, index=asked.index, archives=asked.archives, device=asked.device, batch=asked.batch) as trained, \
            _bar("features") as progress:
        made = write(trained, asked.split or trained.config.data.train_split, asked.out, force=asked.force, progress=progress)
    count, width = made.rows.shape
    print(f"{count} images of split {made.source.split}, {width} features each at {made.source.layer}, in {asked.out}"
          + (f"; {len(made.skipped)} could not be read" if made.skipped else ""))


def query(asked: argparse.Namespace) -> None:
    """Find neighbours, draw them, count them. Raises ValueError or RuntimeError."""
    from train.figures.features import Features
    from train.checkpoint.load_trained import load_trained
    from train.checkpoint.resolve import resolve

    _check(asked)
    features = Features.load(asked.features)
    source = resolve(asked.run or asked.checkpoint or Path(features.source.checkpoint), asked.which)
    with load_trained(source, index=asked.index or features.source.index, archives=asked.archives, device=asked.device,
                      batch=asked.batch) as trained:
        features.check(trained)
        trained.index.check_archives(features.source.split)
        queries = _queries(asked, trained)
        found = _search(asked, trained, features, queries)
        if asked.out is not None:
            _draw(asked, trained, features, queries, found)
        _tell(asked, trained, features, queries, found)


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr while something is done: told of images done, and in all."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _check(asked: argparse.Namespace) -> None:
    """Raise ValueError on options that do not go together."""
    if (asked.out is None) != (asked.evaluate is not None):
        raise ValueError(f"--out (={asked.out}) names the sheet, and --evaluate (={asked.evaluate}) counts without one; give one "
                         "of them")
    if asked.out is not None and asked.out.suffix.lower() not in (".png", ".html"):
        raise ValueError(f"--out (={asked.out}) must end in .png or .html; correct it")
    if asked.out is not None and asked.out.suffix.lower() == ".png":
        from train.figures.kernels import need_matplotlib
        need_matplotlib()
    queries = len(asked.images or asked.ids or ()) or asked.count
    if asked.evaluate is None and not 1 <= queries <= MOST:
        raise ValueError(f"queries (={queries}) must lie in 1..{MOST}; larger sheets cannot be read, --evaluate draws none")


def _queries(asked: argparse.Namespace, trained: TrainedNetwork) -> Queries:
    import numpy as np

    from train.figures.similar import from_files, from_index, pick, split_of

    if asked.images:
        return from_files(trained, asked.images)
    index, split = trained.index, asked.split or trained.config.data.test_split
    if asked.ids:
        ids, splits = np.array(asked.ids, np.int64), split_of(index, asked.ids)
    else:
        ids, splits = pick(index, split, asked.count if asked.evaluate is None else asked.evaluate, asked.seed), [split]
    for used in set(splits):
        index.check_archives(used)
    return from_index(trained, ids)


def _search(asked: argparse.Namespace, trained: TrainedNetwork, features: Features, queries: Queries) -> dict[str, Nearest]:
    """Neighbours by layer, then by pixels."""
    from train.figures.similar import by_features, by_pixels

    with _bar(f"search at {features.source.layer}") as progress:
        found = {features.source.layer: by_features(trained, features, queries, asked.neighbours, progress)}
    if not asked.no_pixels:
        with _bar("search by pixels") as progress:
            found["pixels"] = by_pixels(trained, features, queries, asked.neighbours, progress)
    return found


def _draw(asked: argparse.Namespace, trained: TrainedNetwork, features: Features, queries: Queries,
          found: dict[str, Nearest]) -> None:
    """Write the sheet."""
    import numpy as np

    from pipeline.files import atomic_write
    from tools.show import similar_sheet as sheet
    from train.figures.similar import crops_of
    from train.checkpoint.load_trained import class_name

    index, split = trained.index, features.source.split
    wanted = np.unique(np.concatenate([nearest.ids.ravel() for nearest in found.values()]))
    crops = dict(zip(wanted.tolist(), crops_of(trained, index, split, wanted)))

    def near(label: int, id: int) -> sheet.Shown:
        other = int(index.samples["label"][id])
        same = None if min(label, other) < 0 else label == other
        return sheet.Shown(crops[id], class_name(index.classes, other), same, f"{split} {id}")

    rows: list[Row] = []
    for place, name in enumerate(queries.names):
        label = int(queries.labels[place])
        kinds = [(kind, [near(label, id) for id in nearest.ids[place].tolist()]) for kind, nearest in found.items()]
        words = class_name(index.classes, label) if label >= 0 else name
        rows.append(sheet.Row(sheet.Shown(queries.crops[place], words, None, name), kinds))
    chosen = "given" if asked.images or asked.ids else f"drawn at random (seed {asked.seed})"
    title = (f"{len(rows)} {'query' if len(rows) == 1 else 'queries'}, {chosen}, and the nearest of {len(features.ids)} images "
             f"of split {split}, by {' and by '.join(found)}; {trained.source.path}")
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(asked.out) as file:
        if asked.out.suffix.lower() == ".html":
            file.write(sheet.html(rows, title).encode())
        else:
            sheet.draw(rows, title).savefig(file, format="png", metadata={"Software": None})


def _tell(asked: argparse.Namespace, trained: TrainedNetwork, features: Features, queries: Queries,
          found: dict[str, Nearest]) -> None:
    """Print how many neighbours are of the query's class, where that is known."""
    from train.figures.similar import agreeing, chance

    labelled = bool((queries.labels >= 0).all())
    if not labelled and asked.evaluate is None:
        if asked.json:
            print(json.dumps({"queries": len(queries.names), "images": len(features.ids), "neighbours": asked.neighbours}))
        else:
            print(f"{len(queries.names)} queries in {asked.out}")
        return
    rates = {kind: agreeing(trained.index, queries, nearest) for kind, nearest in found.items()}
    random = chance(trained.index, features, queries)
    if asked.json:
        values: dict[str, Any] = {kind: {"precision": mean, "standard_error": error if error == error else None}
                                  for kind, (mean, error) in rates.items()}
        print(json.dumps({"queries": len(queries.names), "images": len(features.ids), "neighbours": asked.neighbours, **values,
                          "chance": random}))
        return
    print(f"{len(queries.names)} queries, {asked.neighbours} nearest of {len(features.ids)} images of split "
          f"{features.source.split}" + (f", in {asked.out}" if asked.out else ""))
    for kind, (mean, error) in rates.items():
        spread = f" ± {196 * error:.1f} (95% interval, over queries)" if error == error else ""
        print(f"of the query's class by {kind}: {100 * mean:.1f}%{spread}")
    print(f"of the query's class by chance: {100 * random:.1f}%")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="similar.py",
                                     description="Nearest neighbours of images at the network's last hidden layer.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    making = verbs.add_parser("build", help="write the features of a split's images")
    which = making.add_mutually_exclusive_group(required=True)
    making.add_argument("--split", help="images to search (default: the recipe's training split)")
    making.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")
    making.add_argument("--force", action="store_true", help="replace the features in that folder")
    asking = verbs.add_parser("query", help="find the images nearest to others")
    asking.add_argument("--features", type=Path, required=True, metavar="DIR", help="folder that build wrote")
    whose = asking.add_mutually_exclusive_group()
    whose.add_argument("--images", type=Path, nargs="+", metavar="FILE", help="image files, from anywhere")
    whose.add_argument("--ids", type=int, nargs="+", metavar="ID", help="samples of the index")
    whose.add_argument("--count", type=int, default=5, metavar="N",
                       help="so many of a split, drawn at random (default %(default)s)")
    whose.add_argument("--evaluate", type=int, metavar="N", help="so many of a split, counted without a sheet")
    asking.add_argument("--split", help="to draw from (default: the recipe's test split)")
    asking.add_argument("--seed", type=int, default=0, help="of the drawing (default %(default)s)")
    asking.add_argument("--neighbours", type=int, default=6, metavar="K", help="of each query (default %(default)s)")
    asking.add_argument("--no-pixels", action="store_true", help="leave out the search by pixels, which decodes every image")
    asking.add_argument("--out", type=Path, metavar="PNG|HTML", help="the sheet")
    asking.add_argument("--json", action="store_true", help="print one JSON object")
    where = asking.add_mutually_exclusive_group()
    for verb, group in (making, which), (asking, where):
        group.add_argument("--run", type=Path, metavar="DIR", help="run folder" + (
            "" if verb is making else " (default: the checkpoint that the features are of)"))
        group.add_argument("--checkpoint", type=Path, metavar="DIR", help="checkpoint folder")
        verb.add_argument("--which", choices=("best", "last"), help="of the run's checkpoints (default last)")
        verb.add_argument("--index", type=Path, metavar="DIR", help="index (default: the run's)")
        verb.add_argument("--archives", type=Path, metavar="DIR", help="folder of the archives when they have moved")
        verb.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to compute (default: the run's)")
        verb.add_argument("--batch", type=int, metavar="B", help="images at once (default: the run's)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit code: 0, or 2 with a message on stderr."""
    asked = parse(arguments)
    from tools.cli import guarded
    return guarded(lambda: {"build": build, "query": query}[asked.verb](asked))


if __name__ == "__main__":
    sys.exit(main())
