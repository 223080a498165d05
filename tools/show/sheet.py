"""Sheets of images drawn by matplotlib: layout in inches, fitted text, PNG files. Importing it fails without matplotlib."""
import textwrap
from pathlib import Path

import numpy as np

from pipeline.files import atomic_write
from tools.cli import printable
from train.figures.kernels import need_matplotlib

need_matplotlib()

from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.font_manager import FontProperties  # noqa: E402
from matplotlib.textpath import TextPath  # noqa: E402

LETTERS = 15  # of a title in an inch


class Sheet:
    """A figure with a title, wrapped to its width. Positions and sizes are inches, from the top left corner below the title."""

    def __init__(self, title: str, width: float, height: float) -> None:
        lines = textwrap.wrap(title, int(width * LETTERS))
        self._top = 0.22 + 0.1625 * len(lines)
        self._width, self._height = width, height + self._top
        self.figure = Figure(figsize=(self._width, self._height), dpi=150, facecolor="white")
        self.figure.text(*self.position(0.12, 0.1 - self._top), "\n".join(lines), fontsize=8, va="top", linespacing=1.2,
                         parse_math=False)

    def position(self, x: float, y: float) -> tuple[float, float]:
        """A point in matplotlib's figure coordinates."""
        return x / self._width, 1 - (self._top + y) / self._height

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes without lines and labels."""
        axes = self.figure.add_axes((*self.position(left, top + height), width / self._width, height / self._height))
        axes.axis("off")
        return axes

    def image(self, pixels: np.ndarray, left: float, top: float, side: float) -> Axes:
        """Draw an image (H, W, 3) uint8."""
        axes = self.axes(left, top, side, side)
        axes.imshow(pixels, interpolation="antialiased")
        return axes

    def text(self, words: str, x: float, baseline: float, size_pt: float, inches: float, weight: str = "normal") -> None:
        """Write a line centred at x, no larger than `size_pt` and no wider than `inches`."""
        words = printable(words)  # of an index: Matplotlib repeats in a warning what it has no glyph for
        self.figure.text(*self.position(x, baseline), words, ha="center", va="baseline",
                         fontsize=fitting(words, size_pt, inches, weight), fontweight=weight, parse_math=False)

    def save(self, out: Path) -> None:
        """Write a PNG, atomically, into a folder that need not exist."""
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(out) as file:
            self.figure.savefig(file, format="png", metadata={"Software": None})


def fitting(words: str, size_pt: float, inches: float, weight: str = "normal") -> float:
    """The font size, at most `size_pt` points, at which words are no wider than so many inches."""
    if not words.strip():
        return size_pt
    plain = words.replace("$", "S")  # else it may be read as mathematics
    width = float(TextPath((0, 0), plain, size_pt, FontProperties(weight=weight)).get_extents().x1)
    return min(size_pt, size_pt * inches * 72 / width)
