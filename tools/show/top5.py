"""Images with the five labels that the network holds most probable (paper figure 4, left).

The right label stands below each image; its bar, where it is among the five, is green and has a tick. Images are drawn at random,
by --seed, not chosen. N images, K classes.
"""
import argparse
import textwrap
from typing import Sequence

import numpy as np
import torch

from tools.show.sheet import Sheet, fitting
from train.build import autocast
from train.checkpoint.resolve import NETWORKS, TrainedNetwork, class_name, load_trained, resolve
from train.evaluate.metrics import label_ranks
from train.evaluate.predict import average_softmax
from train.figures.neighbours import centre_crops, chosen_ids

MOST = 60  # images of a sheet
RIGHT, WRONG, TRACK = "#63bd6e", "#c9ced6", "#eef0f2"
_CELL, _SIDE, _BAR = (2.25, 3.4), 1.7, 1.95  # inches: of an image with its bars; of the image; of a bar


def probabilities(trained: TrainedNetwork, split: str, ids: np.ndarray, crops: int) -> np.ndarray:
    """(N, K) softmax of images in the order of `ids`, averaged over 1 crop or 10, as a test computes it."""
    context = autocast(trained.config, trained.topology)
    with trained.loader(trained.index, split, ids) as loader, torch.no_grad():
        return np.concatenate([average_softmax(trained.network, loader, batch, crops, context).cpu().numpy() for batch in loader])


def draw(pixels: np.ndarray, found: np.ndarray, labels: np.ndarray, words: Sequence[str], title: str) -> Sheet:
    """Lay out images (N, c, c, 3) uint8 with bars of their probabilities (N, K); right labels (N,), -1 unknown, and K words."""
    columns, shown = min(4, len(pixels)), min(5, found.shape[1])
    ranks = label_ranks(found, np.maximum(labels, 0))
    sheet = Sheet(title, columns * _CELL[0] + 0.1, -(-len(pixels) // columns) * _CELL[1])
    for number, label in enumerate(labels.tolist()):
        left, top = 0.1 + number % columns * _CELL[0], number // columns * _CELL[1]
        sheet.image(pixels[number], left + 0.225, top, _SIDE)
        rank = f" (rank {ranks[number] + 1})" if ranks[number] >= shown else ""
        below = "label unknown" if label < 0 else words[label] + rank
        for line, text in enumerate(textwrap.wrap(below, max(26, len(below) // 2 + 8))):  # two lines
            sheet.text(text, left + 1.075, top + 1.87 + 0.14 * line, 8, _BAR, "bold")
        bars = sheet.axes(left + 0.1, top + 2.1, _BAR, 1.1)
        bars.set(xlim=(0, 1), ylim=(shown - 0.5, -0.5))
        for row, name in enumerate(np.argsort(-found[number], kind="stable")[:shown].tolist()):
            share, weight = float(found[number, name]), "bold" if name == label else "normal"
            bars.barh(row, 1, height=0.8, color=TRACK)
            bars.barh(row, share, height=0.8, color=RIGHT if name == label else WRONG)
            if name == label:
                bars.plot([0.02, 0.035, 0.065], [row + 0.02, row + 0.17, row - 0.2], color="#0b3d14", linewidth=1.4)  # a tick
            size = fitting(words[name], 7, _BAR - 0.6, weight)  # 0.6 for the tick and the percentage
            bars.text(0.1 if name == label else 0.02, row + 0.02, words[name], fontsize=size, va="center_baseline",
                      fontweight=weight, parse_math=False)
            bars.text(0.985, row + 0.02, f"{share:.0%}", fontsize=6.5, va="center_baseline", ha="right", color="#30363d")
    return sheet


def run(args: argparse.Namespace) -> None:
    """Choose images, show them to the network, draw. Raises ValueError or RuntimeError."""
    count = len(args.ids or ()) or args.count
    if not 1 <= count <= MOST:
        raise ValueError(f"images (={count}) must lie in 1..{MOST}; larger sheets cannot be read")
    with load_trained(resolve(args.run, args.which, kinds=NETWORKS, name="RUN"), index=args.index, archives=args.archives,
                      device=args.device, batch=args.batch) as trained:
        index, crops = trained.index, args.views or trained.config.train.test_views
        ids, splits = chosen_ids(index, args.split or trained.config.data.test_split, args.count, args.seed, args.ids)
        found = probabilities(trained, splits[0], ids, crops)
        labels = index.samples["label"][ids].astype(np.int64)
        words = [class_name(index.classes, label) for label in range(found.shape[1])]
        pixels = centre_crops(trained, splits[0], ids)
        how = "chosen" if args.ids else f"drawn at random (seed {args.seed})"
        title = (f"{count} images of split {', '.join(sorted(set(splits)))}, {how}, and their most probable labels, "
                 f"{crops} crop{'s' if crops > 1 else ''} each; {trained.source.path}")
    draw(pixels, found, labels, words, title).save(args.out)
    ranks = label_ranks(found[labels >= 0], labels[labels >= 0])
    print(f"{count} images in {args.out}; the right label is the first for {int((ranks == 0).sum())}, in the top five for "
          f"{int((ranks < 5).sum())}")
