"""Neighbours as a web page that needs no other file, script or network (similar.html.jinja)."""
from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import jinja2
import numpy as np
import simplejpeg

SAME, OTHER, NEUTRAL = "#1a7f37", "#c0261c", "#8a8f94"  # frames: of the query's class, of another, unknown


@dataclass(frozen=True)
class Picture:
    """An image as it is shown.

    Attributes:
        crop: (c, c, 3) uint8.
        word: its class, or its name.
        same: whether it is of the query's class; None: not known.
        name: split and id, or the file's name.
    """

    crop: np.ndarray
    word: str
    same: bool | None
    name: str

    def jpeg(self) -> str:
        """The crop as a JPEG in base64."""
        jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(self.crop), quality=92, colorsubsampling="444")
        return base64.b64encode(jpeg).decode()


@dataclass(frozen=True)
class Row:
    """A query and its neighbours of each kind: {"fc7": k pictures, …}."""

    query: Picture
    kinds: dict[str, Sequence[Picture]]


def page(rows: Sequence[Row], title: str) -> str:
    """The HTML of the page."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("similar.html.jinja").render(rows=rows, title=title, SAME=SAME, OTHER=OTHER)
