"""The kernels of conv1 as the paper's figure 3: `python tools/show_kernels.py --run runs/NAME --out kernels.png`.

Tower a's kernels above, tower b's below; in the paper those of a are colour-agnostic and those of b colour-specific.
Each kernel is stretched to the full range of grey levels on its own.

Legend: N kernels, 3 colours, H rows, W columns.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    import numpy as np


def stretch(kernels: np.ndarray) -> np.ndarray:
    """(N, 3, H, W) floats → (N, H, W, 3) in [0, 1], each kernel from its least to its greatest weight; flat: grey."""
    import numpy as np

    low, high = (reduce(kernels, axis=(1, 2, 3), keepdims=True) for reduce in (np.min, np.max))
    spread = np.where(high > low, high - low, 1)
    return np.asarray(np.where(high > low, (kernels - low) / spread, 0.5).transpose(0, 2, 3, 1))


def sheet(kernels: np.ndarray, towers: int, scale: int = 5) -> np.ndarray:
    """Lay kernels (N, 3, H, W) out in rows of at most 16, with a gap between towers: (rows, columns, 3) in [0, 1].

    scale: pixels of the sheet for each of a kernel.
    """
    import numpy as np

    pictures = stretch(kernels).repeat(scale, axis=1).repeat(scale, axis=2)
    count, side = len(pictures) // towers, pictures.shape[1] + 4
    columns = max(width for width in range(1, 17) if count % width == 0)      # full rows: 48 kernels are 3 of 16
    rows, gap = -(-count // columns), 3 * scale if towers > 1 else 0
    board = np.full((towers * rows * side + (towers - 1) * gap + 4, columns * side + 4, 3), 0.15)
    for number, picture in enumerate(pictures):
        tower, place = divmod(number, count)
        top = (tower * rows + place // columns) * side + tower * gap + 4
        left = place % columns * side + 4
        board[top:top + picture.shape[0], left:left + picture.shape[1]] = picture
    return board


def conv1(checkpoint: Path) -> tuple[np.ndarray, int]:
    """conv1's weights (N, 3, H, W) and the number of towers, of a checkpoint folder."""
    import torch

    from model.alexnet import canonical_shapes
    from train import checkpoint as checkpoints
    from train.distributed import Topology
    from train.recipe import load

    checkpoints.verify(checkpoint)
    config = load(checkpoint / checkpoints.CONFIG)
    shape = canonical_shapes(config.model)["conv1.weight"]
    weights = {"weight.conv1.weight": torch.empty(shape)}
    alone = Topology(0, 1, 0, 1, 0, 1, torch.device("cpu"))
    checkpoints.load(checkpoint, weights, {"weight.conv1.weight": shape}, alone, all_of_it=False)
    return weights["weight.conv1.weight"].numpy(), config.model.towers


def run(asked: argparse.Namespace) -> None:
    """Find the checkpoint and draw. Raises ValueError or RuntimeError."""
    from tools.show_batch import need_matplotlib
    from train.checkpoint import newest_good

    need_matplotlib()
    from matplotlib.image import imsave

    path = asked.checkpoint
    if path is None:
        path = newest_good(asked.run / "checkpoints", lambda message: print(f"warning: {message}", file=sys.stderr))
    if path is None or not path.is_dir():
        raise ValueError(f"checkpoint (={asked.checkpoint or asked.run}) does not exist; give a run folder with --run "
                         "or a checkpoint of it with --checkpoint")
    kernels, towers = conv1(path)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    imsave(asked.out, sheet(kernels, towers), format="png")
    print(f"{len(kernels)} kernels of {path} in {asked.out}")


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit code: 0, or 2 with a message on stderr."""
    parser = argparse.ArgumentParser(prog="show_kernels.py",
                                     description="Write a PNG of conv1's kernels, a tower a block.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, metavar="DIR", help="run folder; its newest checkpoint is shown")
    which.add_argument("--checkpoint", type=Path, metavar="DIR", help="checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG")
    from tools.command import guarded
    asked = parser.parse_args(arguments)
    return guarded(lambda: run(asked))


if __name__ == "__main__":
    sys.exit(main())
