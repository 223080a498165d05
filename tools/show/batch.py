"""A sheet of training crops with what was drawn for each: `python tools/show/batch.py --config RECIPE --out sheet.png`.

The one concept: what the network sees, made visible. The mean is added back; the lighting noise stays in. Every crop
carries its class, sample id, offset in its region, reflection, and lighting shift in grey levels.

Legend: B crops, H rows, W columns.
"""
from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from train.figures.kernels import need_matplotlib  # noqa: E402

if TYPE_CHECKING:
    import numpy as np

    from pipeline.config import DataConfig
    from pipeline.sampling.augment import Augmentation
    from pipeline.index.sample_index import SampleIndex
    from pipeline.loading.batch import Batch
    from pipeline.loading.train_loader import TrainLoader
    from pipeline.stats import Stats


def restore(batch: Batch, drawn: Augmentation, data: DataConfig, stats: Stats) -> np.ndarray:
    """The crops of a batch with the subtracted mean added back, (B, H, W, 3) uint8."""
    import numpy as np

    crops = batch.images.cpu().numpy().transpose(0, 2, 3, 1).copy()
    px = data.crop_px
    for row, crop in enumerate(crops):
        if data.mean == "channel":
            crop += stats.channel_mean
            continue
        top, left, mirror = int(drawn.top[row]), int(drawn.left[row]), bool(drawn.mirror[row])
        if data.mean == "image_center":
            top = left = (data.square_px - px) // 2
            mirror = False
        piece = stats.mean_image[top:top + px, left:left + px]
        crop += piece[:, ::-1] if mirror else piece
    return np.clip(crops + 0.5, 0, 255).astype(np.uint8)


def captions(index: SampleIndex, batch: Batch, drawn: Augmentation, stats: Stats) -> list[str]:
    """Three lines for each crop: class; id and epoch; draws."""
    from pipeline.sampling.augment import lighting_shift

    shifts = lighting_shift(drawn.alphas, stats.eigenvalues, stats.eigenvectors)
    result = []
    for row, id in enumerate(batch.ids):
        label = index.classes[int(batch.labels[row])]
        words = label.words.split(",")[0][:22] or label.wnid
        light = " ".join(f"{channel}{value:+.0f}" for channel, value in zip("RGB", shifts[row]))
        mirror = " mirrored" if drawn.mirror[row] else ""
        result.append(f"{words}\nid {id}, epoch {batch.epochs[row]}\n"
                      f"at {drawn.top[row]}, {drawn.left[row]}{mirror}\n{light}")
    return result


def draw_sheet(crops: np.ndarray, texts: list[str], title: str, out: Path) -> None:
    """Write the PNG: crops (B, H, W, 3) uint8, eight in a row, each over its text."""
    need_matplotlib()
    from matplotlib.figure import Figure

    columns = min(8, len(crops))
    rows = -(-len(crops) // columns)
    figure = Figure(figsize=(2.1 * columns, 2.85 * rows + 0.5), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=9)
    for place in range(rows * columns):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.axis("off")
        if place < len(crops):
            axes.imshow(crops[place], interpolation="nearest")
            axes.set_title(texts[place], fontsize=7, y=-0.04, va="top")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")


def _loader(asked: argparse.Namespace, scratch: str) -> tuple[TrainLoader, Stats, str]:
    from dataclasses import replace

    from pipeline.index.sample_index import SampleIndex
    from pipeline.stats import Stats
    from pipeline.tiers import train_loader
    from train.recipe import load

    config = load(asked.config)
    data = replace(config.data, index=str(asked.index or config.data.images), packed="")
    archives = asked.archives or config.machine.archives
    store = str(archives) if str(archives).startswith("s3://") else ""
    index = SampleIndex.load(data.index, None if store else archives or None)
    stats = Stats.for_index(index, data.square_px)
    # Tier resident would begin to fill its file: not for a sheet.
    machine = replace(config.machine.loader(0), resident_memory="ram", resident_folder=scratch)
    loader = train_loader(data.tier, index, data.train_split, data.pixels(), asked.count, config.train.seed, stats,
                          resident=data.resident, window=data.window, lanes=data.lanes, store=store, machine=machine)
    loader.load_state_dict({**loader.state_dict(), "step": asked.step})
    return loader, stats, data.tier


def run(asked: argparse.Namespace) -> None:
    """Load one batch and draw it. Raises ValueError or RuntimeError."""
    if not 1 <= asked.count <= 200:
        raise ValueError(f"--count (={asked.count}) must lie in 1..200; larger sheets cannot be read")
    if asked.step < 0:
        raise ValueError(f"--step (={asked.step}) must be at least 0; batches are counted from 0")
    need_matplotlib()
    with tempfile.TemporaryDirectory() as scratch:
        loader, stats, tier = _loader(asked, scratch)
        with loader:
            batch = next(iter(loader))
            drawn = loader.augmentation(batch.ids, batch.epochs)
    first = batch.step * asked.count
    draw_sheet(restore(batch, drawn, loader.data, stats), captions(loader.index, batch, drawn, stats),
               f"{loader.index.path}, tier {tier}, training crops {first} to {first + asked.count - 1}, {loader.data}", asked.out)
    print(f"{len(batch.ids)} crops in {asked.out}")


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit code: 0, or 2 with a message on stderr."""
    parser = argparse.ArgumentParser(prog="show_batch.py",
                                     description="Write a PNG of training crops with labels and draws.")
    parser.add_argument("--config", type=Path, required=True, metavar="RECIPE", help="for sizes, mean, lighting, seed")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG")
    parser.add_argument("--index", type=Path, metavar="DIR", help="index (default: the recipe's)")
    parser.add_argument("--archives", type=Path, metavar="DIR", help="folder of the archives when they have moved")
    parser.add_argument("--count", type=int, default=32, metavar="B", help="crops on the sheet (default 32)")
    parser.add_argument("--step", type=int, default=0, metavar="N", help="which batch of that many, from 0 (default 0)")
    from tools.cli import guarded
    asked = parser.parse_args(arguments)
    return guarded(lambda: run(asked))


if __name__ == "__main__":
    sys.exit(main())
