"""Schemas: what fits comes out typed, what does not is one line that names the key, the value and the rule."""
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.schema import Count, FileName, Sha256, check_types, read_as


@dataclass(frozen=True)
class Entry:
    file: FileName
    size: Count
    sha256: Sha256 = "0" * 64


@dataclass(frozen=True)
class Header:
    name: str
    share: float
    whole: bool
    entries: dict[str, Entry]
    classes: list[str] = field(default_factory=list)
    packed: dict[str, Any] | None = None


GOOD: dict[str, Any] = {"name": "x", "share": 1, "whole": True, "entries": {"a": {"file": "b.npy", "size": 3}}, "later": 1}


def test_arguments_of_another_type_are_named() -> None:
    hints = {"count": int, "share": float, "name": str | Path, "flag": bool, "pair": tuple[int, int] | None, "other": Any}
    check_types({"count": np.int64(3), "share": 1, "name": Path(), "flag": False, "pair": None, "other": 3, "more": 4}, hints)
    for values, words in (({"count": True}, "count (=True) must be a whole number"),
                          ({"share": "1"}, "share (='1') must be a number"),
                          ({"name": 3}, "name (=3) must be a text or a Path"), ({"flag": 1}, "flag (=1) must be True or False"),
                          ({"pair": (1, "2")}, "pair (=(1, '2')) must be a tuple of numbers or None")):
        with pytest.raises(TypeError) as caught:
            check_types(values, hints, "")
        assert str(caught.value) == words


def test_what_fits_is_typed() -> None:
    header = read_as(Header, GOOD, "header")
    assert header == Header("x", 1.0, True, {"a": Entry("b.npy", 3)}) and type(header.share) is float
    assert read_as(Header, {**GOOD, "packed": {"a": [1]}, "classes": ["c"]}, "header").packed == {"a": [1]}


@pytest.mark.parametrize(("change", "words"), [
    ({"name": 3}, "header.name (=3) must be a text"), ({"name": None}, "header.name (=None) must be a text"),
    ({"share": True}, "header.share (=True) must be a number"), ({"whole": 1}, "header.whole (=1) must be true or false"),
    ({"entries": []}, "header.entries (=[]) must be an object"), ({"entries": None}, "must be an object"),
    ({"entries": {"a": {"file": "b"}}}, "header.entries.a (without size) must have it"),
    ({"entries": {"a": {"file": "b", "size": -5}}}, "header.entries.a.size (=-5) must be a number from 0 up"),
    ({"entries": {"a": {"file": "b", "size": 1.0}}}, "size (=1.0) must be a whole number"),
    ({"entries": {"a": {"file": "b", "size": True}}}, "size (=True) must be a whole number"),
    ({"entries": {"a": {"file": "b", "size": 1 << 63}}}, "must be a number from 0 up"),
    ({"entries": {"a": {"file": "b", "size": 1, "sha256": "zz"}}}, "must be 64 hexadecimal digits"),
    ({"classes": "abc"}, "header.classes (='abc') must be a list"),
    ({"classes": ["a", 1]}, "header.classes[1] (=1) must be a text"), ({"name": ["a" * 500]}, "must be a text"),
    ({"packed": []}, "header.packed (=[]) must be an object")])
def test_what_does_not_fit_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:
        read_as(Header, {**GOOD, **change}, "header")
    assert words in str(error.value) and len(str(error.value)) < 150


@pytest.mark.parametrize("name", ["../precious.npy", "/etc/passwd", "a/b", "", ".", "..", "a\0b"])
def test_names_in_files_are_bare(name: str) -> None:
    with pytest.raises(ValueError, match="must be the bare name of a file in the same folder"):
        read_as(Entry, {"file": name, "size": 1}, "entry")
    with pytest.raises(ValueError, match="must be the bare name of a file in the same folder"):
        read_as(dict[FileName, Any], {name: 1}, "files")
