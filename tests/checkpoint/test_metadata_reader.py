"""A checkpoint's table of contents is a pickle: what it names is never called, and what it says is checked."""

from __future__ import annotations

import enum
import os
import pickle
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from tests.helpers.checkpoints import ALONE, SHAPES, check, save, tensors
from train.checkpoint import checkpoint
from train.checkpoint.reader import Reader


class Planted:
    """Pickled, it is a call of a function with an argument."""

    def __init__(self, function: Callable[..., Any], *words: Any) -> None:
        self.call = function, words

    def __reduce__(self) -> Any:
        return self.call


def replace(path: Path, content: object) -> None:
    """Give a checkpoint another table of contents, and a manifest that vouches for it."""
    (path / ".metadata").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    checkpoint.write_manifest(path, [file.name for file in path.iterdir() if file.name != checkpoint.MANIFEST])
    checkpoint.verify(path)


@pytest.mark.parametrize("function, words", [(os.system, "touch {}"), (eval, "open({!r}, 'w')"), (os.mkdir, "{}")])
@pytest.mark.parametrize("within", [False, True], ids=["instead of the table", "within it"])
def test_a_planted_call_is_not_made(tmp_path: Path, function: Callable[..., Any], words: str, within: bool) -> None:
    path, victim = save(tmp_path, 7), tmp_path / "ran"
    planted: Any = Planted(function, words.format(str(victim)))
    if within:
        whole = FileSystemReader(path).read_metadata()
        whole.planner_data = planted
        planted = whole
    replace(path, planted)
    with pytest.raises(RuntimeError, match=r"\.metadata\) is not one that a checkpoint has \(it names .*\); use another"):
        checkpoint.load(path, tensors(1), SHAPES, ALONE)
    assert not victim.exists()


def put(name: str, **values: Any) -> Callable[[Metadata], object]:
    def change(whole: Metadata) -> None:
        where: Any = whole if name == "whole" else next(iter(getattr(whole, name).values()))
        for key, value in values.items():
            object.__setattr__(where, key, value)
    return change


@pytest.mark.parametrize("change, reason", [
    (put("storage_data", relative_path="../precious"), "a file elsewhere"),
    (put("storage_data", relative_path="/etc/passwd"), "a file elsewhere"),
    (put("storage_data", relative_path=3), "a file elsewhere"),
    (put("storage_data", offset=-1), "lies nowhere"),
    (put("storage_data", length="x"), "not supported"),
    (put("state_dict_metadata", size=3), "other than tensors"),
    (put("state_dict_metadata", size=torch.Size([10 ** 12, 3])), "are not the whole of it"),
    (put("whole", storage_data=None), "no attribute"),
    (put("whole", state_dict_metadata=[]), "no attribute"),
])
def test_a_table_that_says_something_else_is_refused_in_a_line(tmp_path: Path, change: Callable[[Metadata], object],
                                                               reason: str) -> None:
    path = save(tmp_path, 7)
    whole = FileSystemReader(path).read_metadata()
    change(whole)
    replace(path, whole)
    with pytest.raises(RuntimeError, match=rf"\.metadata\) is not one that a checkpoint has \(.*{reason}.*\); use") as caught:
        checkpoint.load(path, tensors(1), SHAPES, ALONE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps([]), pickle.dumps({"a": 1}), b"\x80\x04\x95"])
def test_other_bytes_are_refused_in_a_line(tmp_path: Path, content: bytes) -> None:
    path = save(tmp_path, 7)
    replace(path, content)
    with pytest.raises(RuntimeError, match=r"is not one that a checkpoint has \("):
        checkpoint.stored_shapes(path)


def test_a_planted_call_in_a_file_of_tensors_is_not_made(tmp_path: Path) -> None:
    path, victim = save(tmp_path, 7), tmp_path / "ran"
    torch.save(Planted(os.mkdir, str(victim)), path / "__0_0.distcp")
    with pytest.raises(RuntimeError, match=r"checkpoint \(=.*\) could not be read: process 0: ") as caught:
        checkpoint.load(path, tensors(1), SHAPES, ALONE)
    assert not victim.exists() and "\n" not in str(caught.value)


def test_what_dcp_writes_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert Reader(path).read_metadata().state_dict_metadata == FileSystemReader(path).read_metadata().state_dict_metadata
    check(path, 7)


def test_what_other_versions_of_python_write_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3.11.2 writes a member of an enumeration as a call of getattr, others as one of its class."""
    monkeypatch.setattr(enum.Enum, "__reduce_ex__", lambda self, protocol: (getattr, (type(self), self.name)))
    path = save(tmp_path, 7)
    assert b"getattr" in (path / ".metadata").read_bytes()
    check(path, 7)
    replace(path, Planted(getattr, torch.Size, "mro"))  # and nothing else is got by it
    with pytest.raises(RuntimeError, match=r"\.metadata\) is not one that a checkpoint has \("):
        checkpoint.load(path, tensors(1), SHAPES, ALONE)
