"""Images that the network finds alike (paper figure 4, right): nearest neighbours at its last hidden layer.

`build` writes the features of every image of a split. `query` finds the images nearest to others by Euclidean distance, exactly,
and beside them, for contrast, those whose pixels are nearest; and counts of both how many are of the query's class.
"""
from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any, Iterator

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress as Bar, TextColumn, TimeRemainingColumn

from pipeline.files import atomic_write
from tools.show.similar_page import Picture, Row, page
from train.checkpoint.load_trained import TrainedNetwork, class_name, load_trained
from train.checkpoint.resolve import resolve
from train.figures import features as feature_folder
from train.figures.features import Features, Progress
from train.figures.kernels import need_matplotlib
from train.figures.neighbours import NearestNeighbours
from train.figures.similar import (Queries, centre_crops, chance_precision, precision, queries_from_files, queries_from_index,
                                   random_ids, search, splits_of)

MOST = 40  # queries of a sheet


def run(args: argparse.Namespace) -> None:
    """Build features or query them. Raises ValueError or RuntimeError."""
    {"build": build, "query": query}[args.step](args)


def build(args: argparse.Namespace) -> None:
    """Write the features of a split."""
    with load_trained(resolve(args.run or args.checkpoint, args.which), index=args.index, archives=args.archives,
                      device=args.device, batch=args.batch) as trained, _bar("features") as progress:
        features = feature_folder.build(trained, args.split or trained.config.data.train_split, args.out, force=args.force,
                                        progress=progress)
    count, width = features.rows.shape
    print(f"{count} images of split {features.source.split}, {width} features each at {features.source.layer}, in {args.out}"
          + (f"; {len(features.skipped)} could not be read" if features.skipped else ""))


def query(args: argparse.Namespace) -> None:
    """Find neighbours, draw them, count them."""
    _check(args)
    features = Features.load(args.features)
    with load_trained(resolve(args.run or args.checkpoint or Path(features.source.checkpoint), args.which),
                      index=args.index or features.source.index, archives=args.archives, device=args.device,
                      batch=args.batch) as trained:
        features.check(trained)
        trained.index.check_archives(features.source.split)
        queries = _queries(args, trained)
        found = {}
        for kind in [features.source.layer] + ["pixels"] * (not args.no_pixels):
            with _bar(f"search by {kind}") as progress:
                found[kind] = search(trained, features, queries, args.neighbours, kind == "pixels", progress)
        if args.out is not None:
            _draw(args, trained, features, queries, found)
        _print(args, trained, features, queries, found)


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Progress]:
    """A bar on stderr: a function to be called with images done, and in all."""
    console = Console(stderr=True)
    with Bar(TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True,
             disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError on options that do not go together; RuntimeError without matplotlib, where it is needed."""
    if (args.out is None) != (args.evaluate is not None):
        raise ValueError(f"--out (={args.out}) names the sheet, and --evaluate (={args.evaluate}) counts without one; give one "
                         "of them")
    if args.out is not None and args.out.suffix.lower() not in (".png", ".html"):
        raise ValueError(f"--out (={args.out}) must end in .png or .html; correct it")
    if args.out is not None and args.out.suffix.lower() == ".png":
        need_matplotlib()
    queries = len(args.images or args.ids or ()) or args.count
    if args.evaluate is None and not 1 <= queries <= MOST:
        raise ValueError(f"queries (={queries}) must lie in 1..{MOST}; larger sheets cannot be read, --evaluate draws none")


def _queries(args: argparse.Namespace, trained: TrainedNetwork) -> Queries:
    if args.images:
        return queries_from_files(trained, args.images)
    index, split = trained.index, args.split or trained.config.data.test_split
    if args.ids:
        ids, splits = np.array(args.ids, np.int64), splits_of(index, args.ids)
    else:
        ids, splits = random_ids(index, split, args.count if args.evaluate is None else args.evaluate, args.seed), [split]
    for used in set(splits):
        index.check_archives(used)
    return queries_from_index(trained, ids)


def _draw(args: argparse.Namespace, trained: TrainedNetwork, features: Features, queries: Queries,
          found: dict[str, NearestNeighbours]) -> None:
    """Write the sheet."""
    index, split = trained.index, features.source.split
    wanted = np.unique(np.concatenate([nearest.ids.ravel() for nearest in found.values()]))
    crops = dict(zip(wanted.tolist(), centre_crops(trained, index, split, wanted)))

    def neighbour(id: int, label: int) -> Picture:
        own = int(index.samples["label"][id])
        return Picture(crops[id], class_name(index.classes, own), None if min(label, own) < 0 else label == own, f"{split} {id}")

    rows = []
    for number, (name, label) in enumerate(zip(queries.names, queries.labels.tolist())):
        word = class_name(index.classes, label) if label >= 0 else name
        rows.append(Row(Picture(queries.crops[number], word, None, name), {
            kind: [neighbour(id, label) for id in nearest.ids[number].tolist()] for kind, nearest in found.items()}))
    chosen = "given" if args.images or args.ids else f"drawn at random (seed {args.seed})"
    title = (f"{len(rows)} {'query' if len(rows) == 1 else 'queries'}, {chosen}, and the nearest of {len(features.ids)} images "
             f"of split {split}, by {' and by '.join(found)}; {trained.source.path}")
    if args.out.suffix.lower() == ".html":
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.out) as file:
            file.write(page(rows, title).encode())
    else:
        from tools.show import similar_sheet  # needs matplotlib

        similar_sheet.draw(rows, title).save(args.out)


def _print(args: argparse.Namespace, trained: TrainedNetwork, features: Features, queries: Queries,
           found: dict[str, NearestNeighbours]) -> None:
    """Print how many neighbours are of the query's class, where that is known."""
    report: dict[str, Any] = {"queries": len(queries.names), "images": len(features.ids), "neighbours": args.neighbours}
    lines = [f"{len(queries.names)} queries, {args.neighbours} nearest of {len(features.ids)} images of split "
             f"{features.source.split}" + (f", in {args.out}" if args.out else "")]
    if (queries.labels >= 0).all():
        labels = trained.index.samples["label"].astype(np.int64)
        for kind, nearest in found.items():
            mean, error = precision(queries.labels, labels[nearest.ids])
            known = error == error  # of one query there is none
            report[kind] = {"precision": mean, "standard_error": error if known else None}
            lines.append(f"of the query's class by {kind}: {100 * mean:.1f}%"
                         + (f" ± {196 * error:.1f} (95% interval, over queries)" if known else ""))
        report["chance"] = chance_precision(trained.index, features, queries)
        lines.append(f"of the query's class by chance: {100 * report['chance']:.1f}%")
    elif args.evaluate is not None:
        raise ValueError(f"queries (={queries.names[int(np.argmin(queries.labels))]} …) must have labels to agree with; take "
                         "them from a split with ground truth")
    print(json.dumps(report) if args.json else "\n".join(lines))
