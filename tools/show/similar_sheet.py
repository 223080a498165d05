"""Neighbours as a picture: each query before its nearest images, at the network's last hidden layer and by pixels.

A neighbour of the query's class has a green frame, another a red, broken one; without labels frames are grey.
"""
from __future__ import annotations

import textwrap
from typing import Sequence

from matplotlib.patches import Rectangle

from tools.show.sheet import Sheet
from tools.show.similar_page import NEUTRAL, OTHER, SAME, Picture, Row

_SIDE, _LINE = 1.16, 0.125  # inches: a picture, a line of text
_LETTERS = 20  # of a line under a picture


def draw(rows: Sequence[Row], title: str) -> Sheet:
    """Lay out the queries one below the other, each with a line of neighbours for each kind."""
    # Of each kind as many lines of words as its pictures need.
    lines = [[max(len(_wrapped(picture.word)) for picture in [*pictures, *([row.query] if number == 0 else [])])
              for number, pictures in enumerate(row.kinds.values())] for row in rows]
    columns = 1 + max(len(pictures) for row in rows for pictures in row.kinds.values())
    sheet = Sheet(title, 0.8 + columns * (_SIDE + 0.1), sum(0.12 + sum(_SIDE + 0.08 + _LINE * n for n in each) for each in lines))
    top = 0.0
    for row, each in zip(rows, lines):
        for number, ((kind, pictures), count) in enumerate(zip(row.kinds.items(), each)):
            sheet.figure.text(*sheet.position(0.2, top + _SIDE / 2), kind, fontsize=7, rotation=90, ha="center", va="center")
            if number == 0:
                _draw_picture(sheet, row.query, 0, top)
            for column, picture in enumerate(pictures, 1):
                _draw_picture(sheet, picture, column, top)
            top += _SIDE + 0.08 + _LINE * count
        top += 0.12
    return sheet


def _draw_picture(sheet: Sheet, picture: Picture, column: int, top: float) -> None:
    left = 0.45 + column * (_SIDE + 0.1) + (0.12 if column else 0)  # the query stands apart
    axes = sheet.image(picture.crop, left, top, _SIDE)
    if column:
        colour = NEUTRAL if picture.same is None else SAME if picture.same else OTHER
        axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor=colour, linewidth=2.5,
                                 linestyle=(0, (3, 1.5)) if picture.same is False else "-", clip_on=False))
    for number, words in enumerate(_wrapped(picture.word), 1):
        sheet.text(words, left + _SIDE / 2, top + _SIDE + 0.01 + _LINE * number, 6.5, _SIDE, "normal" if column else "bold")


def _wrapped(words: str) -> list[str]:
    """Lines about as wide as a picture."""
    return textwrap.wrap(words, _LETTERS) or [""]
