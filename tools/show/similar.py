"""Images that the network finds alike (paper figure 4, right): nearest neighbours at its last hidden layer.

`build` writes the features of every image of a split. `query` finds the images nearest to others by Euclidean distance and
beside them, for contrast, those whose pixels are nearest; it draws them and counts how many of both are of the query's class. On
the sheet a neighbour of the query's class has a green frame, another a red, broken one; without labels frames are grey.
"""
import argparse
import contextlib
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Sequence

import numpy as np
from rich.console import Console
from rich.progress import Progress as Bar

from pipeline.index.sample_index import SampleIndex
from train.checkpoint.resolve import NETWORKS, TrainedNetwork, class_name, load_trained, resolve
from train.cli import put_json
from train.figures import features as feature_folder
from train.figures.features import Features, Progress
from train.figures.kernels import need_matplotlib
from train.figures.neighbours import Queries, centre_crops, chosen_ids, precision, search

if TYPE_CHECKING:
    from tools.show.sheet import Sheet

MOST = 40  # queries of a sheet
SAME, OTHER, NEUTRAL = "#1a7f37", "#c0261c", "#8a8f94"  # frames: of the query's class, of another, unknown
_SIDE, _LINE = 1.16, 0.125  # inches: a picture, a line of text
_LETTERS = 20  # of a line under a picture


def run(args: argparse.Namespace) -> None:
    """Build features or query them. Raises ValueError or RuntimeError."""
    {"build": build, "query": query}[args.step](args)


def build(args: argparse.Namespace) -> None:
    """Write the features of a split."""
    with load_trained(resolve(args.run, args.which, kinds=NETWORKS, name="RUN"), index=args.index, archives=args.archives,
                      device=args.device, batch=args.batch) as trained, _bar("features") as progress:
        features = feature_folder.build(trained, args.split or trained.config.data.train_split, args.out, progress)
    count, width = features.rows.shape
    print(f"{count} images of split {features.source.split}, {width} features each at {features.source.layer}, in {args.out}"
          + (f"; {len(features.skipped)} could not be read" if features.skipped else ""))


def query(args: argparse.Namespace) -> None:
    """Find neighbours, draw them, count them."""
    count = len(args.ids or ()) or args.count
    if args.out is not None:
        need_matplotlib()
        if not 1 <= count <= MOST:
            raise ValueError(f"queries (={count}) must lie in 1..{MOST}, as larger sheets cannot be read; without --out "
                             "neighbours are only counted")
    features = Features.load(args.features)
    with load_trained(resolve(args.run or Path(features.source.checkpoint), args.which, kinds=NETWORKS, name="RUN"),
                      index=args.index or features.source.index, archives=args.archives, device=args.device,
                      batch=args.batch) as trained:
        features.check(trained)
        trained.index.check_archives(features.source.split)
        split = args.split or trained.config.data.test_split
        ids, splits = chosen_ids(trained.index, split, args.count, args.seed, args.ids)
        queries = Queries.of(trained, splits[0], ids)
        found = {}
        for kind in [features.source.layer] + ["pixels"] * (not args.no_pixels):
            with _bar(f"search by {kind}") as progress:
                found[kind] = search(trained, features, queries, args.neighbours, kind == "pixels", progress)
        if args.out is not None:
            rows = _rows(trained, features.source.split, queries, found)
            chosen = "given" if args.ids else f"drawn at random (seed {args.seed})"
            draw(rows, f"queries, {chosen}, and the nearest of {len(features.ids)} images of split {features.source.split}, "
                 f"by {' and by '.join(found)}; {trained.source.path}").save(args.out)
        answer = _answer(trained.index, queries, found)
    if put_json(args.json, answer):
        return
    print(f"{count} queries, {args.neighbours} nearest of {len(features.ids)} images of split {features.source.split}"
          + (f", in {args.out}" if args.out else ""))
    for kind, one in answer["of_the_querys_class"].items():
        low, high = one["interval"]
        print(f"of the query's class by {kind}: {one['share']:.1%}, 95% interval over queries {low:.1%} to {high:.1%}")


def _answer(index: SampleIndex, queries: Queries, found: dict[str, np.ndarray]) -> dict[str, Any]:
    """What --json gives: ids and classes of each query and its neighbours, the nearest first; and how many are of its class."""
    labels = index.samples["label"].astype(np.int64)

    def image(id: int) -> dict[str, Any]:
        return {"id": id, "class": class_name(index.classes, int(labels[id]))}

    counted = found if (queries.labels >= 0).all() else {}
    shares = {kind: precision(queries.labels, labels[nearest]) for kind, nearest in counted.items()}
    return {"queries": [{**image(id), "nearest": {kind: list(map(image, nearest[number].tolist()))
                                                  for kind, nearest in found.items()}}
                        for number, id in enumerate(queries.ids.tolist())],
            "of_the_querys_class": {kind: {"share": share, "interval": interval} for kind, (share, interval) in shares.items()}}


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Progress]:
    """A bar on stderr: a function to be called with images done, and in all."""
    console = Console(stderr=True)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@dataclass(frozen=True)
class Picture:
    """An image as it is shown."""

    crop: np.ndarray  # (c, c, 3) uint8
    word: str  # its class, or its name
    same: bool | None = None  # whether it is of the query's class; None: not known


Row = tuple[Picture, dict[str, list[Picture]]]  # a query, and its neighbours of each kind: "fc7", "pixels"


def _rows(trained: TrainedNetwork, split: str, queries: Queries, found: dict[str, np.ndarray]) -> list[Row]:
    index = trained.index
    wanted = np.unique(np.concatenate([nearest.ravel() for nearest in found.values()]))
    crops = dict(zip(wanted.tolist(), centre_crops(trained, split, wanted)))

    def neighbour(id: int, label: int) -> Picture:
        own = int(index.samples["label"][id])
        return Picture(crops[id], class_name(index.classes, own), None if min(label, own) < 0 else label == own)

    return [(Picture(crop, class_name(index.classes, label)),
             {kind: [neighbour(id, label) for id in nearest[number].tolist()] for kind, nearest in found.items()})
            for number, (crop, label) in enumerate(zip(queries.crops, queries.labels.tolist()))]


def draw(rows: Sequence[Row], title: str) -> "Sheet":
    """Lay out the queries one below the other, each before a line of neighbours for each kind."""
    from tools.show.sheet import Sheet  # needs matplotlib

    # Of each kind as many lines of words as its pictures need.
    lines = [[max(len(_wrapped(picture.word)) for picture in [*pictures, *([asked] if number == 0 else [])])
              for number, pictures in enumerate(kinds.values())] for asked, kinds in rows]
    columns = 1 + max(len(pictures) for _, kinds in rows for pictures in kinds.values())
    sheet = Sheet(title, 0.8 + columns * (_SIDE + 0.1), sum(0.12 + sum(_SIDE + 0.08 + _LINE * n for n in each) for each in lines))
    top = 0.0
    for (asked, kinds), each in zip(rows, lines):
        _draw_picture(sheet, asked, 0, top)
        for (kind, pictures), count in zip(kinds.items(), each):
            sheet.figure.text(*sheet.position(0.2, top + _SIDE / 2), kind, fontsize=7, rotation=90, ha="center", va="center")
            for column, picture in enumerate(pictures, 1):
                _draw_picture(sheet, picture, column, top)
            top += _SIDE + 0.08 + _LINE * count
        top += 0.12
    return sheet


def _draw_picture(sheet: "Sheet", picture: Picture, column: int, top: float) -> None:
    left = 0.45 + column * (_SIDE + 0.1) + (0.12 if column else 0)  # the query stands apart
    axes = sheet.image(picture.crop, left, top, _SIDE)
    if column:
        colour = NEUTRAL if picture.same is None else SAME if picture.same else OTHER
        axes.plot([0, 1, 1, 0, 0], [0, 0, 1, 1, 0], color=colour, linewidth=2.5, transform=axes.transAxes, clip_on=False,
                  linestyle=(0, (3, 1.5)) if picture.same is False else "-")
    for number, words in enumerate(_wrapped(picture.word), 1):
        sheet.text(words, left + _SIDE / 2, top + _SIDE + 0.01 + _LINE * number, 6.5, _SIDE, "normal" if column else "bold")


def _wrapped(words: str) -> list[str]:
    """Lines about as wide as a picture."""
    return textwrap.wrap(words, _LETTERS) or [""]
