"""The sheet of tools/show/similar.py: each query before its nearest images, at the network's last hidden layer and by pixels.

A neighbour of the query's class has a green frame, another a red, broken one; without labels frames are grey.
PNG (matplotlib), or HTML that needs no other file. k neighbours, c side of a crop.
"""

from __future__ import annotations

import base64
import textwrap
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

SAME, OTHER, NEUTRAL = "#1a7f37", "#c0261c", "#8a8f94"
_WIDE, _LINE = 1.16, 0.125  # inches: a picture, a line of text
_LOOKS = {None: "", True: "same", False: "other"}
_LETTERS = 20  # of a line under a picture


@dataclass(frozen=True)
class Shown:
    """A picture: (c, c, 3) uint8, its class in words, whether it is of the query's class (None: not known), its name."""

    crop: np.ndarray
    word: str
    same: bool | None
    name: str


@dataclass(frozen=True)
class Row:
    """A query and its neighbours of each kind: ("fc7", (k) pictures), …"""

    query: Shown
    kinds: Sequence[tuple[str, Sequence[Shown]]]


def draw(rows: Sequence[Row], title: str) -> Figure:
    """The sheet as a picture. Raises RuntimeError without matplotlib."""
    from train.figures.kernels import need_matplotlib

    need_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = 1 + len(rows[0].kinds[0][1])
    heading = textwrap.wrap(title, int(columns * 19))
    # From the top, in inches: the heading; of each query its lines of pictures, each with as many lines of words as it needs.
    lines = [[max(len(_wrapped(picture.word)) for picture in ([row.query] if kind == row.kinds[0][0] else []) + list(pictures))
              for kind, pictures in row.kinds] for row in rows]
    height = 0.3 + _LINE * 1.3 * len(heading) + sum(0.12 + sum(_WIDE + 0.08 + _LINE * n for n in each) for each in lines)
    width = 0.6 + columns * (_WIDE + 0.1) + 0.2
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    top = height - 0.12
    figure.text(0.1 / width, top / height, "\n".join(heading), fontsize=8, va="top", linespacing=1.2,
                parse_math=False)
    top -= 0.1 + _LINE * 1.3 * len(heading)

    def place(picture: Shown, column: int) -> None:
        left = 0.45 + column * (_WIDE + 0.1) + (0.12 if column else 0)  # the query stands apart
        axes = figure.add_axes((left / width, (top - _WIDE) / height, _WIDE / width, _WIDE / height))
        axes.imshow(picture.crop, interpolation="antialiased")
        axes.axis("off")
        if column:
            colour = NEUTRAL if picture.same is None else SAME if picture.same else OTHER
            axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor=colour, linewidth=2.5,
                                     linestyle=(0, (3, 1.5)) if picture.same is False else "-", clip_on=False))
        weight = "normal" if column else "bold"
        for number, words in enumerate(_wrapped(picture.word), 1):  # one by one: as a whole they hang at uneven heights
            figure.text((left + _WIDE / 2) / width, (top - _WIDE - 0.01 - _LINE * number) / height, words, ha="center",
                        va="baseline", fontsize=fitting(words, 6.5, _WIDE, weight), fontweight=weight, parse_math=False)

    for row, each in zip(rows, lines):
        for number, ((kind, pictures), needed) in enumerate(zip(row.kinds, each)):
            figure.text(0.2 / width, (top - _WIDE / 2) / height, kind, fontsize=7, rotation=90, ha="center", va="center")
            if number == 0:
                place(row.query, 0)
            for column, picture in enumerate(pictures):
                place(picture, column + 1)
            top -= _WIDE + 0.08 + _LINE * needed
        top -= 0.12
    return figure


def fitting(words: str, size: float, inches: float, weight: str = "normal") -> float:
    """The font size, at most `size` points, at which words are no wider than so many inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    if not words.strip():
        return size
    plain = words.replace("$", "S")  # else it may be read as mathematics
    return min(size, size * inches * 72 / float(TextPath((0, 0), plain, size, FontProperties(weight=weight)).get_extents().x1))


def _wrapped(words: str) -> list[str]:
    """Lines no wider than a picture."""
    return textwrap.wrap(words, _LETTERS) or [""]


def html(rows: Sequence[Row], title: str) -> str:
    """The sheet as a page that needs no other file, script or network."""
    body = []
    for row in rows:
        query = f'<div class="query">{_figure(row.query, f"query {row.query.name}: {row.query.word}", "query")}</div>'
        kinds = "".join(f'<h3>{escape(kind)}</h3><div class="near" style="--k:{len(pictures)}">' + "".join(
            _figure(picture, f"neighbour {place} by {kind}: {picture.word}", _LOOKS[picture.same])
            for place, picture in enumerate(pictures, 1)) + "</div>" for kind, pictures in row.kinds)
        body.append(f"<section>{query}<div>{kinds}</div></section>")
    return ('<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
            f"<title>Similar images</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>Similar images</h1>\n"
            f"<p>{escape(title)}</p>\n<p>A neighbour of the query’s class has a green frame, one of another class a red, broken "
            "one.</p>\n" + "\n".join(body) + "\n</body>\n</html>\n")


def _figure(picture: Shown, alt: str, look: str) -> str:
    """A picture with its word below."""
    import numpy as np
    import simplejpeg

    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(picture.crop), quality=92, colorsubsampling="444")
    data, side = base64.b64encode(jpeg).decode(), len(picture.crop)
    return (f'<figure class="{look}" title="{escape(picture.name)}"><img src="data:image/jpeg;base64,{data}" alt="{escape(alt)}" '
            f'width="{side}" height="{side}"><figcaption>{escape(picture.word)}</figcaption></figure>')


_STYLE = f"""
:root{{color-scheme:light dark;--back:#fff;--ink:#1b1f23;--line:#d0d7de;--same:{SAME};--other:{OTHER}}}
@media (prefers-color-scheme:dark){{:root{{--back:#17191b;--ink:#e6e8ea;--line:#3a3f44;--same:#3fb950;--other:#ff7b72}}}}
body{{margin:0 auto;padding:1rem;max-width:70rem;background:var(--back);color:var(--ink);font:1rem/1.4 system-ui,sans-serif}}
h1{{font-size:1.5rem;margin:.2em 0}}
h3{{font-size:.85rem;font-weight:600;margin:.5em 0 .3em}}
p{{overflow-wrap:anywhere}}
section{{display:grid;grid-template-columns:9rem minmax(0,1fr);gap:1.5rem;padding:1rem 0;border-top:1px solid var(--line)}}
.query{{padding-top:1.65rem}}
.near{{display:grid;grid-template-columns:repeat(var(--k),minmax(0,1fr));gap:.8rem}}
figure{{margin:0;max-width:9rem}}
img{{display:block;box-sizing:border-box;width:100%;height:auto;border:3px solid var(--line)}}
.query img{{border-color:transparent}}
.same img{{border-color:var(--same)}}
.other img{{border-color:var(--other);border-style:dashed}}
figcaption{{font-size:.8rem;overflow-wrap:anywhere}}
.query figcaption{{font-weight:600}}
@media (max-width:48rem){{section{{grid-template-columns:1fr}}.query{{padding:0;max-width:9rem}}
.near{{grid-template-columns:repeat(3,minmax(0,1fr))}}}}
"""
