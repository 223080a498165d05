"""The kernels of conv1 as the paper's figure 3 shows them: from a checkpoint to a sheet, from a sheet to a PNG.

Tower a's kernels above, tower b's below; in the paper those of a are colour-agnostic and those of b colour-specific.
Each kernel is stretched to the full range of grey levels on its own.

Legend: N kernels, 3 colours, H rows, W columns.
"""
from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

WEIGHT = "weight.conv1.weight"  # of a checkpoint


def need_matplotlib() -> Any:
    """matplotlib, drawing into files only.

    Raises RuntimeError saying how to install it.
    """
    try:
        import matplotlib
    except ImportError:
        raise RuntimeError("matplotlib is not installed, and this command draws with it; "
                           "pip install -e '.[plots]'") from None
    matplotlib.use("Agg")
    return matplotlib


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
    """conv1's weights (N, 3, H, W) and the number of towers, of a checkpoint folder.

    The shape is the one that is stored, so a checkpoint of any version of the recipes can be shown.

    Raises:
        DamagedCheckpoint: its files are not the ones that were written.
        ValueError: it has no conv1 that sees three colours.
    """
    import torch
    from train.checkpoint import checkpoint as checkpoints
    from train.parallel.topology import Topology
    from train.recipe import load_yaml

    checkpoints.verify(checkpoint)
    shape = checkpoints.stored_shapes(checkpoint).get(WEIGHT, ())
    if len(shape) != 4 or shape[1] != 3:
        raise ValueError(f"conv1 (={shape or 'none'} in {checkpoint}) must have the shape (kernels, 3, rows, columns); give a "
                         "checkpoint of a network that sees three colours")
    towers = int(load_yaml((checkpoint / checkpoints.CONFIG).read_text(encoding="utf-8"))["model"]["towers"])
    weights = {WEIGHT: torch.empty(shape)}
    alone = Topology.single()
    checkpoints.load(checkpoint, weights, {WEIGHT: shape}, alone, partial=True)
    return weights[WEIGHT].numpy(), towers


def png(picture: np.ndarray) -> bytes:
    """A picture (H, W, 3) in [0, 1] as the bytes of a PNG. Raises RuntimeError without matplotlib."""
    need_matplotlib()
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, picture, format="png")
    return buffer.getvalue()


def chroma_share(kernels: np.ndarray) -> np.ndarray:
    """Of each kernel (N, 3, H, W) the share of its energy (sum of squares) that is colour: (N,) in [0, 1]; NaN for one of zeros.

    A colour is its part along grey, (1, 1, 1)/√3, and its chroma, at right angles to it. 0 is a kernel that sees grey only, 1
    one that a grey image leaves cold; noise has 2/3. No mean is taken off first: the response to an even colour is what a
    colour-specific kernel is for (the blobs of the paper's tower b), and without it nothing would be left of them but noise.

    Raises ValueError on a weight that is not finite.
    """
    import numpy as np

    if not np.isfinite(kernels).all():
        raise ValueError("kernels (=NaN or infinite) must be finite; the weights are damaged, give an earlier checkpoint")
    exact = kernels.astype(np.float64)
    exact = exact / np.maximum(np.abs(exact).max(axis=(1, 2, 3), keepdims=True), np.finfo(np.float64).tiny)
    whole, grey = (exact ** 2).sum(axis=(1, 2, 3)), (exact.sum(axis=1) ** 2).sum(axis=(1, 2)) / 3
    return np.asarray(np.clip(np.divide(whole - grey, whole, out=np.full(len(whole), np.nan), where=whole > 0), 0, 1))


@dataclass(frozen=True)
class TowerChroma:
    """The chroma shares of a tower's kernels. `colourful`: kernels more than half of whose energy is chroma. Mean and median are
    None when all of its kernels are zero."""

    tower: str
    kernels: int
    mean: float | None
    median: float | None
    colourful: int


def tower_chroma(kernels: np.ndarray, towers: int) -> tuple[list[TowerChroma], float | None]:
    """Each tower's chroma, and the chance that towers differ so much or more when the same kernels are dealt out to them at
    random (two-sided Mann-Whitney test of the shares); None for one tower.

    In the paper tower a is colour-agnostic and tower b colour-specific; which of them it is, is up to the initial values.
    """
    import numpy as np

    shares = chroma_share(kernels).reshape(towers, -1)
    finite = [part[~np.isnan(part)] for part in shares]
    found = [TowerChroma("ab"[place], shares.shape[1], float(part.mean()) if len(part) else None,
                         float(np.median(part)) if len(part) else None, int((part > 0.5).sum()))
             for place, part in enumerate(finite)]
    if towers != 2 or not all(map(len, finite)):
        return found, None
    from scipy.stats import mannwhitneyu

    return found, float(mannwhitneyu(*finite).pvalue)


def chroma_lines(found: list[TowerChroma], chance: float | None) -> list[str]:
    """What `tower_chroma` found, in words."""
    lines = []
    for entry in found:
        figures = "all zero" if entry.mean is None or entry.median is None else \
            f"chroma {entry.mean:.0%} of a kernel's energy (median {entry.median:.0%}), {entry.colourful} above 50%"
        lines.append(f"{f'tower {entry.tower}: ' if len(found) > 1 else ''}{entry.kernels} kernels, {figures}")
    if chance is not None:
        lines.append(f"p = {chance:.2g} that kernels dealt out to the towers at random would differ so much (rank test)")
    return lines


def captioned(picture: np.ndarray, lines: list[str]) -> bytes:
    """A picture (H, W, 3) in [0, 1] over lines of text, as the bytes of a PNG. Raises RuntimeError without matplotlib."""
    import numpy as np

    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size, dpi, edge = 10, 100, 10
    high = round(size / 72 * dpi * 1.5)
    figure = Figure(dpi=dpi, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    texts = [figure.text(0, 0, line, fontsize=size, va="top") for line in lines]
    widest = max(text.get_window_extent(canvas.get_renderer()).width for text in texts)
    width, below = max(picture.shape[1], int(widest) + 2 * edge), high * len(lines) + edge  # a small network's sheet is narrow
    figure.set_size_inches(width / dpi, below / dpi)
    for place, text in enumerate(texts):
        text.set_position((edge / width, 1 - (edge / 2 + high * place) / below))
    canvas.draw()
    written = np.asarray(canvas.buffer_rgba())[..., :3] / 255
    beside = np.ones((picture.shape[0], written.shape[1] - picture.shape[1], 3))
    return png(np.concatenate([np.concatenate([picture, beside], axis=1), written]))
