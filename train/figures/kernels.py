"""The filters (kernels) of conv1 as the paper's figure 3 shows them: read from a checkpoint, laid out, written as a PNG.

Tower a's kernels above, tower b's below; in the paper those of a are colour-agnostic and those of b colour-specific; which of the
two it is, is up to the initial values. Each kernel is stretched to the full range of grey levels on its own.

Legend: N kernels, 3 colours, H rows, W columns.
"""
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from scipy.stats import mannwhitneyu

from train.checkpoint import checkpoint as checkpoints
from train.export import safetensors_io
from train.parallel.topology import Topology
from train.recipe.strict_yaml import load_yaml

WEIGHT = "weight.conv1.weight"  # of a checkpoint


def need_matplotlib() -> None:
    """Let matplotlib draw into files only. Raises RuntimeError saying how to install it."""
    try:
        import matplotlib
    except ImportError:
        raise RuntimeError("matplotlib is not installed, and this command draws with it; pip install matplotlib") from None
    matplotlib.use("Agg")


def conv1(checkpoint: Path) -> tuple[np.ndarray, int]:
    """Read conv1's weights (N, 3, H, W), of the shape that is stored, and the number of towers from a checkpoint folder, or one
    that train.export wrote.

    Raises DamagedCheckpoint, and ValueError when it has no conv1 that sees three colours.
    """
    exported = (checkpoint / safetensors_io.WEIGHTS).is_file()
    if exported:
        config, tensors = safetensors_io.load_safetensors(checkpoint)
        weights, towers = {f"weight.{name}": tensor for name, tensor in tensors.items()}, config.towers
        shape = tuple(weights[WEIGHT].shape) if WEIGHT in weights else ()
    else:
        checkpoints.verify(checkpoint)
        shape = checkpoints.stored_shapes(checkpoint).get(WEIGHT, ())
    if len(shape) != 4 or shape[1] != 3:
        raise ValueError(f"conv1 (={shape or 'none'} in {checkpoint}) must have the shape (kernels, 3, rows, columns); give a "
                         "checkpoint of a network that sees three colours")
    if not exported:
        towers = int(load_yaml((checkpoint / checkpoints.CONFIG).read_text(encoding="utf-8"))["model"]["towers"])
        weights = {WEIGHT: torch.empty(shape)}
        checkpoints.load(checkpoint, weights, {WEIGHT: shape}, Topology.single(), partial=True)
    return weights[WEIGHT].numpy(), towers


def stretch(kernels: np.ndarray) -> np.ndarray:
    """(N, 3, H, W) floats → (N, H, W, 3) in [0, 1], each kernel from its least to its greatest weight; flat: grey."""
    low, high = (reduce(kernels, axis=(1, 2, 3), keepdims=True) for reduce in (np.min, np.max))
    spread = np.where(high > low, high - low, 1)
    return np.asarray(np.where(high > low, (kernels - low) / spread, 0.5).transpose(0, 2, 3, 1))


def sheet(kernels: np.ndarray, towers: int, scale: int = 5) -> np.ndarray:
    """Lay kernels (N, 3, H, W) out in rows of at most 16, with a gap between towers, each of their pixels `scale` wide: (rows,
    columns, 3) in [0, 1]."""
    pictures = stretch(kernels).repeat(scale, axis=1).repeat(scale, axis=2)
    count, side = len(pictures) // towers, pictures.shape[1] + 4
    columns = max(width for width in range(1, 17) if count % width == 0)      # full rows: 48 kernels are 3 of 16
    rows, gap = -(-count // columns), 3 * scale if towers > 1 else 0
    board = np.full((towers * rows * side + (towers - 1) * gap + 4, columns * side + 4, 3), 0.15)
    for number, picture in enumerate(pictures):
        tower, of_tower = divmod(number, count)
        top = (tower * rows + of_tower // columns) * side + tower * gap + 4
        left = of_tower % columns * side + 4
        board[top:top + picture.shape[0], left:left + picture.shape[1]] = picture
    return board


def png(picture: np.ndarray) -> bytes:
    """A picture (H, W, 3) in [0, 1] as the bytes of a PNG: written here, so that a report needs no library of pictures."""
    pixels = np.round(picture * 255).astype(np.uint8)
    height, width, _ = pixels.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)  # 0: bytes as they are

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(lines.tobytes())) + chunk(b"IEND", b""))


def chroma_share(kernels: np.ndarray) -> np.ndarray:
    """Of each kernel (N, 3, H, W) the share of its energy (sum of squares) that is colour: (N,) in [0, 1]; NaN for one of zeros.

    A colour is its part along grey, (1, 1, 1)/√3, and its chroma, at right angles to it. 0 is a kernel that sees grey only, 1
    one that a grey image leaves cold; noise has 2/3. No mean is taken off first: the response to an even colour is what a
    colour-specific kernel is for (the blobs of the paper's tower b), and without it nothing would be left of them but noise.

    Raises ValueError on a weight that is not finite.
    """
    if not np.isfinite(kernels).all():
        raise ValueError("kernels (=NaN or infinite) must be finite; the weights are damaged, give an earlier checkpoint")
    exact = kernels.astype(np.float64)
    exact = exact / np.maximum(np.abs(exact).max(axis=(1, 2, 3), keepdims=True), np.finfo(np.float64).tiny)
    whole, grey = (exact ** 2).sum(axis=(1, 2, 3)), (exact.sum(axis=1) ** 2).sum(axis=(1, 2)) / 3
    return np.asarray(np.clip(np.divide(whole - grey, whole, out=np.full(len(whole), np.nan), where=whole > 0), 0, 1))


def chroma_lines(kernels: np.ndarray, towers: int) -> list[str]:
    """Each tower's chroma as a line of text, and for two towers the probability that they differ so much or more when the same
    kernels are dealt out to them at random (two-sided Mann-Whitney test of the shares)."""
    shares = [part[~np.isnan(part)] for part in chroma_share(kernels).reshape(towers, -1)]
    lines = []
    for tower, part in zip("ab", shares):
        numbers = f"chroma {part.mean():.0%} of a kernel's energy, {(part > 0.5).sum()} above 50%" if len(part) else "all zero"
        lines.append(f"{f'tower {tower}: ' if towers > 1 else ''}{len(kernels) // towers} kernels, {numbers}")
    if towers == 2 and all(map(len, shares)):
        p = mannwhitneyu(*shares).pvalue
        lines.append(f"p = {p:.2g} that kernels dealt out to the towers at random would differ so much (rank test)")
    return lines
