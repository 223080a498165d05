"""Names to splits and classes; the devkit's IDs to labels."""
import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.index.devkit import check_count, ground_truth, place, place_all, read_devkit, sample_key, shard_split
from tests.helpers.tars import save

WNIDS = ["n05", "n01", "n09", "n02"]  # ID 1..4: not in wnid order


def meta_mat(ids: list[int] = [1, 2, 3, 4], wnids: list[str] = WNIDS, year: str = "2012", images: int = 0) -> bytes:
    from scipy.io import savemat

    fields = [(f"ILSVRC{year}_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O"), ("num_train_images", "O")]
    rows = [(id, wnid, f"words of {wnid}", 0, images) for id, wnid in zip(ids, wnids)]
    rows.insert(2, (99, "n00", "an inner node", len(ids), 0))
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array(rows, fields)})
    return buffer.getvalue()


def devkit(path: Path, truth: bytes = b"2\n1\n4\n3\n2\n", year: str = "2012", **meta: object) -> Path:
    """A devkit: a folder, or a .tar.gz when the path says so."""
    files = {"data/meta.mat": meta_mat(year=year, **meta), f"data/ILSVRC{year}_validation_ground_truth.txt": truth,
             "readme.txt": b"x"}  # type: ignore[arg-type]
    if not path.name.endswith(".tar.gz"):
        for name, data in files.items():
            save(path / name, data)
        return path
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"kit/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


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


def test_counts_must_agree() -> None:
    check_count("val", 2, np.zeros(2), "x")
    check_count("val", 2, None, "x")
    with pytest.raises(ValueError, match=r"val archive \(=x\) has 3 images but the ground truth 2 lines; give the whole"):
        check_count("val", 3, np.zeros(2), "x")


@pytest.mark.parametrize(("name", "split", "wnid"), [
    ("cifar10/train/cat/1.jpg", "train", "cat"), ("cifar10/test/cat/1.jpg", "test", "cat"), ("cat/1.jpg", None, "cat"),
    ("a/b/cat/1.jpg", None, "cat"), ("train/n01/images/1.JPEG", "train", "n01"), ("Validation/cat/1.jpg", "val", "cat"),
    ("vehicles/train/1.jpg", None, "train"), ("train/train/1.jpg", "train", "train"), ("valid/x/1.jpg", "val", "x")])
def test_place(name: str, split: str | None, wnid: str) -> None:
    assert place(name) == (split, wnid)


def test_place_errors() -> None:
    with pytest.raises(ValueError, match=r"image \(=1.jpg\) lies in no class folder; arrange images as <class>/<image>"):
        place("1.jpg")
    with pytest.raises(ValueError, match=r"image \(=cat/1.jpg\) of here lies in no split but train/cat/1.jpg does"):
        place_all(["train/cat/1.jpg", "cat/1.jpg"], "here")
    with pytest.raises(ValueError, match=r"class \(=images\) of val/images/1.jpg in here has no image in split train"):
        place_all(["train/cat/1.jpg", "val/images/1.jpg"], "here")
    assert place_all(["test/cat/1.jpg"], "here") == (["test"], ["cat"])


def test_shards() -> None:
    for name, split in [("imagenet-train-000001.tar", "train"), ("imagenet1k-validation-00.tar", "val"),
                        ("test/000.tar", "test"), ("000.tar", "train"), ("trainer-000.tar", "train"),
                        ("latest-000.tar", "train"), ("val/x_train_1.tar", "train")]:
        assert shard_split(Path("/data") / name) == split
    assert sample_key("a/b.c/x.seg.png") == ("a/b.c/x", "seg.png")
    assert sample_key("x.JPG") == ("x", "jpg")
