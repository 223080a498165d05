"""Splits, classes and keys from the names of files and shards."""
from pathlib import Path

import pytest

from pipeline.index.folders import split_and_class, splits_and_classes
from pipeline.index.webdataset import sample_key, split_of_shard


@pytest.mark.parametrize(("name", "split", "wnid"), [
    ("cifar10/train/cat/1.jpg", "train", "cat"), ("cifar10/test/cat/1.jpg", "test", "cat"), ("cat/1.jpg", None, "cat"),
    ("a/b/cat/1.jpg", None, "cat"), ("train/n01/images/1.JPEG", "train", "n01"), ("Validation/cat/1.jpg", "val", "cat"),
    ("vehicles/train/1.jpg", None, "train"), ("train/train/1.jpg", "train", "train"), ("valid/x/1.jpg", "val", "x")])
def test_split_and_class(name: str, split: str | None, wnid: str) -> None:
    assert split_and_class(name) == (split, wnid)


def test_split_and_class_errors() -> None:
    with pytest.raises(ValueError, match=r"image \(=1.jpg\) lies in no class folder; arrange images as <class>/<image>"):
        split_and_class("1.jpg")
    with pytest.raises(ValueError, match=r"image \(=cat/1.jpg\) of here lies in no split but train/cat/1.jpg does"):
        splits_and_classes(["train/cat/1.jpg", "cat/1.jpg"], Path("here"))
    with pytest.raises(ValueError, match=r"class \(=images\) of val/images/1.jpg in here has no image in split train"):
        splits_and_classes(["train/cat/1.jpg", "val/images/1.jpg"], Path("here"))
    assert splits_and_classes(["test/cat/1.jpg"], Path("here")) == (["test"], ["cat"])


def test_shards() -> None:
    for name, split in [("imagenet-train-000001.tar", "train"), ("imagenet1k-validation-00.tar", "val"),
                        ("test/000.tar", "test"), ("000.tar", "train"), ("trainer-000.tar", "train"),
                        ("latest-000.tar", "train"), ("val/x_train_1.tar", "train")]:
        assert split_of_shard(Path("/data") / name) == split
    assert sample_key("a/b.c/x.seg.png") == ("a/b.c/x", "seg.png")
    assert sample_key("x.JPG") == ("x", "jpg")
