"""Devkits: ILSVRC IDs to labels, ground truths."""
import errno
import gzip
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from pipeline.index.ilsvrc import ground_truth, read_devkit
from tests.helpers.indexes import WNIDS, devkit
from tests.helpers.tars import save


@pytest.mark.parametrize("name", ["kit", "kit.tar.gz"])
@pytest.mark.parametrize("year", ["2010", "2012"])
def test_ids_become_positions_in_wnid_order(tmp_path: Path, name: str, year: str) -> None:
    kit = read_devkit(devkit(tmp_path / name, year=year, images=7))
    assert [entry.wnid for entry in kit.classes] == ["n01", "n02", "n05", "n09"]
    assert kit.classes[2].words == "words of n05"
    assert kit.label_of_id.tolist() == [-1, 2, 0, 3, 1]
    assert kit.val_labels is not None and kit.val_labels.tolist() == [0, 2, 1, 3, 0]
    assert kit.train_counts == dict.fromkeys(WNIDS, 7)


def test_devkit_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"devkit \(=.*none\) does not exist; give the ILSVRC devkit"):
        read_devkit(tmp_path / "none")
    with pytest.raises(ValueError, match=r"devkit \(=.*bad.tar.gz\) cannot be read"):
        read_devkit(save(tmp_path / "bad.tar.gz", gzip.compress(b"x" * 2000)))
    cut = devkit(tmp_path / "cut.tar.gz")
    with pytest.raises(ValueError, match=r"devkit \(=.*cut.tar.gz\) (cannot be read|holds no data/meta.mat)"):
        read_devkit(save(cut, cut.read_bytes()[:200]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"devkit \(=.*empty\) holds no data/meta.mat; give the ILSVRC devkit"):
        read_devkit(tmp_path / "empty")
    save(tmp_path / "rubbish/meta.mat", b"rubbish" * 100)
    with pytest.raises(ValueError, match=r"meta.mat \(of .*rubbish\) is not a table of synsets \(.*; fetch the devkit"):
        read_devkit(tmp_path / "rubbish")
    for number, meta in enumerate([{"ids": [1, 2, 3, 3]}, {"ids": [0, 1, 2, 3]},
                                  {"ids": [1, 2, 3, 10 ** 7]}, {"wnids": ["n1", "n1", "n2", "n3"]}]):
        with pytest.raises(ValueError, match="has 4 classes whose IDs do not lie in 1 to 1000000, each once, with a wnid each"):
            read_devkit(devkit(tmp_path / f"ids{number}", **meta))


def test_what_the_system_says_of_a_devkit_is_not_said_of_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetched again, it would be as unreadable."""
    path = tmp_path / "devkit.tar.gz"
    path.write_bytes(gzip.compress(b"no tar") + b"x")
    with pytest.raises(ValueError, match="fetch it again"):
        read_devkit(path)
    for error in (PermissionError(errno.EACCES, "Permission denied", str(path)), OSError(errno.EIO, "Input/output error")):
        monkeypatch.setattr("tarfile.open", Mock(side_effect=error))
        with pytest.raises(OSError) as caught:
            read_devkit(path)
        assert caught.value.filename == str(path)


@pytest.mark.parametrize(("text", "line", "value"), [
    (b"1\n5\n", 2, "5"), (b"0\n", 1, "0"), (b"1\n\n2\n", 2, ""), (b"1\nx\n", 2, "x"), (b"1\n-1", 2, "-1")])
def test_ground_truth_names_the_bad_line(text: bytes, line: int, value: str) -> None:
    with pytest.raises(ValueError, match=rf"ground truth \(='{value}'\) in line {line} of here is not the ID of a class"):
        ground_truth(text, np.array([-1, 2, 0, 3, 1]), "here")


def test_a_devkit_cut_down_to_some_classes_keeps_its_ids(tmp_path: Path) -> None:
    kit = read_devkit(devkit(tmp_path / "cut", b"7\n30\n", ids=[7, 2, 30, 11]))
    whole = read_devkit(devkit(tmp_path / "whole", ids=[2, 1, 4, 3]))
    assert [kit.label_of_id[id] for id in (7, 2, 30, 11)] == [whole.label_of_id[id] for id in (2, 1, 4, 3)]
    assert (np.delete(kit.label_of_id, [2, 7, 11, 30]) == -1).all()
    with pytest.raises(ValueError, match=r"ground truth \(='8'\) in line 1 of here is not the ID of a class"):
        ground_truth(b"8", kit.label_of_id, "here")


def test_ground_truth_forms() -> None:
    for text in (b"1\n3\n", b"1\n3", b"1\r\n3\r\n", b" 1 \n3\n"):
        assert ground_truth(text, np.array([-1, 2, 0, 3, 1]), "here").tolist() == [2, 3]
