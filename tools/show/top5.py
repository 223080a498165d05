"""Images with the five labels that the network holds most probable (paper figure 4, left):

    python tools/show/top5.py --run runs/NAME --out top5.png

The right label stands below each image, and its bar, where it is among the five, has another colour. Images are drawn at random,
by --seed, not chosen.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

    from train.checkpoint.load_trained import TrainedNetwork

MOST = 60  # images of a sheet
RIGHT, WRONG, TRACK = "#e4572e", "#9db8d9", "#eef0f2"
_WIDE, _HIGH = 2.25, 3.4  # inches of an image with its bars
_BAR = 1.95  # inches


def probabilities(trained: TrainedNetwork, split: str, ids: np.ndarray, views: int) -> np.ndarray:
    """(N, K) softmax of images in the order of `ids`, averaged over 1 view or 10, as a test computes it."""
    import numpy as np
    import torch

    from train.build import autocast

    found = []
    with trained.loader(trained.index, split, ids) as loader, torch.no_grad(), autocast(trained.config, trained.topology)():
        for batch in loader:
            made = [trained.network(view.contiguous()).double().softmax(1) for view in loader.crops(batch.images, views)]
            found.append((sum(made[1:], made[0]) / views).cpu().numpy())
    return np.concatenate(found)


def draw(pixels: np.ndarray, found: np.ndarray, labels: np.ndarray, words: Sequence[str], title: str) -> Figure:
    """The sheet. Raises RuntimeError without matplotlib.

    Args:
        pixels: (N, S, S, 3) uint8.
        found: (N, K) probabilities.
        labels: (N,) right classes, -1 unknown.
        words: (K) names of the classes.
        title: above it.
    """
    import textwrap

    import numpy as np

    from tools.show.similar_sheet import fitting
    from train.figures.kernels import need_matplotlib

    need_matplotlib()
    from matplotlib.figure import Figure

    columns = min(4, len(pixels))
    rows, most = -(-len(pixels) // columns), min(5, found.shape[1])
    heading = textwrap.wrap(title, 34 * columns)
    head = 0.22 + 0.15 * len(heading)
    width, height = columns * _WIDE + 0.1, rows * _HIGH + head
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    figure.text(0.12 / width, 1 - 0.1 / height, "\n".join(heading), fontsize=8, va="top", linespacing=1.2,
                parse_math=False)
    for place in range(len(pixels)):
        left = 0.1 + place % columns * _WIDE
        bottom = height - head - (place // columns + 1) * _HIGH
        picture = figure.add_axes(((left + 0.225) / width, (bottom + 1.68) / height, 1.7 / width, 1.7 / height))
        picture.imshow(pixels[place], interpolation="antialiased")
        picture.axis("off")
        label, order = int(labels[place]), np.argsort(-found[place], kind="stable")
        rank = int(np.flatnonzero(order == label)[0]) if label >= 0 else -1
        below = "label unknown" if label < 0 else words[label] + ("" if rank < most else f" (place {rank + 1})")
        for number, line in enumerate(textwrap.wrap(below, max(26, len(below) // 2 + 8))):  # two lines
            figure.text((left + 1.075) / width, (bottom + 1.53 - 0.14 * number) / height, line, ha="center", va="baseline",
                        fontsize=fitting(line, 8, _BAR, "bold"), fontweight="bold", parse_math=False)
        bars = figure.add_axes(((left + 0.1) / width, (bottom + 0.2) / height, _BAR / width, 1.1 / height))
        bars.set(xlim=(0, 1), ylim=(most - 0.5, -0.5))
        bars.axis("off")
        for row, name in enumerate(order[:most].tolist()):
            share = float(found[place, name])
            bars.barh(row, 1, height=0.8, color=TRACK)
            bars.barh(row, share, height=0.8, color=RIGHT if name == label else WRONG)
            weight = "bold" if name == label else "normal"
            bars.text(0.02, row + 0.02, words[name], fontsize=fitting(words[name], 7, _BAR - 0.4, weight), va="center_baseline",
                      fontweight=weight, parse_math=False)  # 0.4 for the percentage
            bars.text(0.985, row + 0.02, f"{share:.0%}", fontsize=6.5, va="center_baseline", ha="right", color="#30363d")
    return figure


def run(asked: argparse.Namespace) -> None:
    """Choose images, ask the network, draw. Raises ValueError or RuntimeError."""
    import numpy as np

    from pipeline.files import atomic_write
    from train.figures.kernels import need_matplotlib
    from train.figures.similar import crops_of, pick, split_of
    from train.checkpoint.load_trained import class_name, load_trained
    from train.checkpoint.resolve import resolve

    count = len(asked.ids or ()) or asked.images
    if not 1 <= count <= MOST:
        raise ValueError(f"images (={count}) must lie in 1..{MOST}; larger sheets cannot be read")
    need_matplotlib()
    source = resolve(asked.run or asked.checkpoint, asked.which)
    with load_trained(source, index=asked.index, archives=asked.archives, device=asked.device) as trained:
        index, views = trained.index, asked.views or trained.config.train.test_views
        split = asked.split or trained.config.data.test_split
        splits = split_of(index, asked.ids) if asked.ids else [split]
        ids = np.array(asked.ids, np.int64) if asked.ids else pick(index, split, asked.images, asked.seed)
        for used in set(splits):
            index.check_archives(used)
        found = probabilities(trained, splits[0], ids, views)
        labels = index.samples["label"][ids].astype(np.int64)
        words = [class_name(index.classes, label) for label in range(found.shape[1])]
        pixels = crops_of(trained, index, splits[0], ids)
        how = f"drawn at random (seed {asked.seed})" if not asked.ids else "chosen"
        title = (f"{len(ids)} images of split {', '.join(sorted(set(splits)))}, {how}, and their most probable labels, "
                 f"{views} view{'s' if views > 1 else ''} each; {trained.source.path}")
    sheet = draw(pixels, found, labels, words, title)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(asked.out) as file:
        sheet.savefig(file, format="png", metadata={"Software": None})
    places = (found > found[np.arange(len(ids)), labels][:, None]).sum(1)[labels >= 0]
    print(f"{len(ids)} images in {asked.out}; the right label is the first of {int((places == 0).sum())}, among five of "
          f"{int((places < 5).sum())}")


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit code: 0, or 2 with a message on stderr."""
    parser = argparse.ArgumentParser(prog="show_top5.py",
                                     description="Write a PNG of images with their five most probable labels.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, metavar="DIR", help="run folder")
    which.add_argument("--checkpoint", type=Path, metavar="DIR", help="checkpoint folder")
    parser.add_argument("--which", choices=("best", "last"), help="of the run's checkpoints (default last)")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--images", type=int, default=8, metavar="N", help="drawn at random (default %(default)s)")
    chosen.add_argument("--ids", type=int, nargs="+", metavar="ID", help="these samples of the index instead")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (default %(default)s)")
    parser.add_argument("--split", help="to draw from (default: the recipe's test split)")
    parser.add_argument("--views", type=int, choices=(1, 10), help="views per image (default: the recipe's)")
    parser.add_argument("--index", type=Path, metavar="DIR", help="index (default: the run's)")
    parser.add_argument("--archives", type=Path, metavar="DIR", help="folder of the archives when they have moved")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to compute (default: the run's)")
    from tools.cli import guarded
    asked = parser.parse_args(arguments)
    return guarded(lambda: run(asked))


if __name__ == "__main__":
    sys.exit(main())
