"""Run folders as a training leaves them, written by hand, and pages of train.report taken apart."""

from __future__ import annotations

import copy
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.recipes import write_recipe
from tests.helpers.runs import inside
from train.recipe import load
from train.report.__main__ import main

RECIPES = Path(__file__).resolve().parents[2] / "train" / "recipes"
PNG = b"\x89PNG\r\n\x1a\n"


def small(folder: Path) -> dict[str, Any]:
    """The recipe of the tests as plain values."""
    folder.mkdir(parents=True, exist_ok=True)
    return load(write_recipe(folder)).as_dict()


def recipe(name: str) -> dict[str, Any]:
    """A shipped recipe as plain values."""
    return load(RECIPES / f"{name}.yaml").as_dict()


def write_run(folder: Path, config: dict[str, Any], seed: int = 1, errors: tuple[float, ...] = (0.8, 0.6, 0.5), *,
              test: float | None = 0.4, images: int = 24, train: int = 72, index: str = "i" * 64, views: int = 10) -> Path:
    """A run folder: an epoch for each validation error (training errors lie 0.1 above), and a test."""
    config = copy.deepcopy(config)
    config["train"]["seed"] = seed
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    start = {"time": 1.8e9, "command": ["train"], "python": "3.11", "torch": "2", "dali": "2", "numpy": "2", "device": "cpu",
             "processes": 1, "git": {"commit": "c" * 40, "changed": False}, "index": index, "stats": "s" * 64,
             "fingerprint": "f" * 64}
    (folder / "versions.jsonl").write_text(json.dumps(start) + "\n", encoding="utf-8")
    batch = config["train"]["batch"]
    lines: list[dict[str, Any]] = [{"kind": "step", "time": 1.8e9, "step": 0, "epoch": 0, "lr": 0.01, "loss": 2.0}]
    for epoch, error in enumerate(errors):
        lines.append({"kind": "epoch", "time": 1.8e9 + epoch, "epoch": epoch, "step": -(-(epoch + 1) * train // batch),
                      "lr": 0.01, "loss": 2 * error, "error": error + 0.1, "images_per_s": 100.0, "waited": 0.04,
                      "waited_for": {"read": 0.0, "decode": 0.03, "colour": 0.0, "copy": 0.0}, "seconds": 60.0,
                      "validation": {"images": images, "top1": error, "top5": error / 2, "loss": 1.0}})
    if test is not None:
        lines.append({"kind": "test", "time": 1.8e9 + 99, "split": "val", "views": views, "step": 9, "images": images,
                      "top1": test, "top5": test / 2, "loss": 1.0, "top1_errors": 1, "top5_errors": 1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def report(out: Path, *words: object, code: int = 0) -> tuple[str, str]:
    """The page (empty when it failed) and what was said on stderr."""
    _, said = inside(main, [*map(str, words), "-o", str(out)], code)
    return (out.read_text(encoding="utf-8") if code == 0 else ""), said


class Page(HTMLParser):
    """What a page holds; raises when tags do not match."""

    VOID = {"meta", "link", "img", "br", "wbr"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.handlers: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._table: list[list[str]] = []
        self._cell = False
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert len(given) == len(attrs), f"an attribute twice in {tag}"
        self.tags.add(tag)
        self.handlers += [name for name in given if name.startswith("on")]
        self.ids += [value for value in (given.get("id"),) if value]
        self.loads += [value or "" for name, value in attrs if name in ("src", "srcset", "data", "poster", "action")]
        if "href" in given:
            (self.loads if tag == "link" else self.links).append(given["href"] or "")
        if given.get("role") == "region":
            self._table = self.tables.setdefault(given["aria-label"] or "", [])
        if tag == "tr":
            self._table.append([])
        if tag in ("th", "td"):
            self._table[-1].append("")
            self._cell = True
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, f"<{tag}/> is no HTML"
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()
        self._cell = self._cell and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if self._cell:
            self._table[-1][-1] += data

    def rows(self, name: str) -> list[dict[str, str]]:
        """Of the table whose name begins so: column head → cell."""
        found, = [table for told, table in self.tables.items() if told.startswith(name)]
        head, *rows = found
        return [dict(zip(head, row)) for row in rows]


def checked(page: str) -> Page:
    """A page that is whole, loads nothing and runs nothing."""
    found = Page(page)
    assert page.startswith("<!DOCTYPE html>\n<html lang=\"en\">") and '<meta charset="utf-8">' in page
    assert len(set(found.ids)) == len(found.ids), "an id twice"
    assert all(load.startswith("data:") for load in found.loads), found.loads
    assert all(link.startswith("#") and link[1:] in found.ids for link in found.links), found.links
    assert not found.tags & {"script", "iframe", "object", "embed", "base", "form"} and not found.handlers
    assert "@import" not in page and "Content-Security-Policy" in page
    inner = page[page.index("<body>"):]
    assert all(name.startswith("#") for name in [part.split(")")[0].strip("\"'") for part in inner.split("url(")[1:]])
    for head, *rows in found.tables.values():
        assert all(len(row) == len(head) for row in rows), head
    return found
