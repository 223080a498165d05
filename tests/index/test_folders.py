"""Splits, classes and keys from the names of files and shards."""
from pathlib import Path

import pytest

from pipeline.index.folders import split_and_class, splits_and_classes
from pipeline.index.webdataset import sample_key, split_of_shard
from tests.helpers.indexes import WNIDS, built, contents, devkit, jpeg
from tests.helpers.tars import save, tar_bytes
from tools.build_index import main


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
    with pytest.raises(ValueError, match=r"image \(=train/2.jpg\) of here lies in no split but train/cat/1.jpg does"):
        splits_and_classes(["train/cat/1.jpg", "train/2.jpg"], Path("here"))
    assert splits_and_classes(["train/cat/1.jpg", "Val/2.jpg"], Path("here")) == (["train", "val"], ["cat", None])
    assert splits_and_classes(["a/val/1.jpg", "a/cat/2.jpg"], Path("here")) == (["train", "train"], ["val", "cat"])
    with pytest.raises(ValueError, match=r"class \(=images\) of val/images/1.jpg in here has no image in split train"):
        splits_and_classes(["train/cat/1.jpg", "val/images/1.jpg"], Path("here"))
    assert splits_and_classes(["test/cat/1.jpg"], Path("here")) == (["test"], ["cat"])


@pytest.mark.parametrize(("names", "classes"), [
    (["cat/1.jpg", "cat/may/2.jpg", "dog/may/3.jpg"], ["cat", "cat", "dog"]),
    (["a/b/cat/1.jpg", "a/b/dog/may/2.jpg"], ["cat", "dog"]), (["a/cat/1.jpg"], ["cat"]),
    (["cat/1.jpg", "cat/may/2.jpg"], ["cat", "cat"])])
def test_folders_within_a_class_are_no_classes(names: list[str], classes: list[str]) -> None:
    """Without splits, the class is the first folder below those that all images share, as of torchvision's ImageFolder."""
    assert splits_and_classes(names, Path("here")) == (["train"] * len(names), classes)


def test_shards() -> None:
    for name, split in [("imagenet-train-000001.tar", "train"), ("imagenet1k-validation-00.tar", "val"),
                        ("test/000.tar", "test"), ("000.tar", "train"), ("trainer-000.tar", "train"),
                        ("latest-000.tar", "train"), ("val/x_train_1.tar", "train")]:
        assert split_of_shard(Path("/data") / name) == split
    assert sample_key("a/b.c/x.seg.png") == ("a/b.c/x", "seg.png")
    assert sample_key("x.JPG") == ("x", "jpg")


def kaggle(folder: Path) -> dict[str, bytes]:
    """Kaggle's layout: train in class folders, val and test flat; LOC_val_solution.csv beside. Returns name → bytes."""
    files = {f"Data/CLS-LOC/train/{wnid}/{wnid}_{i}.JPEG": jpeg(10 * number + i)
             for number, wnid in enumerate(WNIDS) for i in range(2)}
    files |= {f"Data/CLS-LOC/{split}/ILSVRC2012_{split}_{i:08d}.JPEG": jpeg(50 + i)
              for split in ("val", "test") for i in range(1, 6)}
    for name, data in files.items():
        save(folder / name, data)
    save(folder / "Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml", b"<a/>")
    lines = [f"ILSVRC2012_val_{i:08d},{WNIDS[truth - 1]} 85 1 499 272 {WNIDS[truth - 1]} 1 2 3 4 " for i, truth in
             enumerate((2, 1, 4, 3, 2), 1)]
    save(folder / "LOC_val_solution.csv", "\r\n".join(["ImageId,PredictionString", *lines[::-1], ""]).encode())
    return files


@pytest.mark.parametrize("packed_as", ["folder", "tar"])
@pytest.mark.parametrize("truth", ["--val-truth", "--devkit", ""])
def test_the_layout_of_kaggle(tmp_path: Path, capsys: pytest.CaptureFixture[str], packed_as: str, truth: str) -> None:
    """Train in class folders, val and test without; labels from the devkit or from Kaggle's own file."""
    files = kaggle(tmp_path / "ILSVRC")
    path = tmp_path / "ILSVRC" / "Data/CLS-LOC"
    if packed_as == "tar":
        path = save(tmp_path / "k.tar", tar_bytes(files | {"Data/CLS-LOC/val/._ILSVRC2012_val_00000001.JPEG": b"\0\5\x16\7"}))
    given = {"--val-truth": [tmp_path / "ILSVRC/LOC_val_solution.csv"], "--devkit": [devkit(tmp_path / "kit")], "": []}[truth]
    index = built(tmp_path, "classes", path, *([truth] if truth else []), *given)
    assert index.split_names == ["train", "val", "test"] and [entry.wnid for entry in index.classes] == sorted(WNIDS)
    found = {name.rpartition("/")[2]: wnid for name, (wnid, _) in contents(index, "val").items()}
    wanted = [WNIDS[number - 1] if truth else "" for number in (2, 1, 4, 3, 2)]
    assert found == {f"ILSVRC2012_val_{i:08d}.JPEG": wnid for i, wnid in enumerate(wanted, 1)}
    assert (index.samples["label"][index.split_rows("test")] == -1).all()
    assert ("note: val has no labels" in capsys.readouterr().err) == (not truth)
    assert index.classes[0].words == ("words of n01" if truth == "--devkit" else "")


def test_ground_truth_of_other_images_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kaggle(tmp_path)
    csv = tmp_path / "LOC_val_solution.csv"
    whole = csv.read_bytes()
    for text, words in ((whole.replace(b"val_00000003", b"val_00000009"), "(=of 5 images) must be that of the 5 images"),
                        (whole + b"ILSVRC2012_val_00000006,n01 1\r\n", "(=of 6 images) must be that of the 5 images"),
                        (whole.replace(b"n05 85", b"n77 85"), "class (=n77) of "), (b"a\nb,c,d\n", "in line 2 of "),
                        (b"a\n\n\xff,\n", "in line 2 of ")):
        csv.write_bytes(text)
        assert main(["build", "classes", str(tmp_path / "Data"), "--val-truth", str(csv), "--out", str(tmp_path / "index")]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and words in error and not (tmp_path / "index").exists()


def test_what_macos_adds_to_tars(tmp_path: Path) -> None:
    """`._n01.tar` beside n01.tar, `._x.JPEG` beside an image: named, and no archive, no image and no line of the truth."""
    double = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(200)
    inner = {f"{name}.JPEG": jpeg(number) for number, name in enumerate("ab")}
    train = {f"{wnid}.tar": tar_bytes({f"._{wnid}_1.JPEG": double, **inner}) for wnid in WNIDS}
    save(tmp_path / "t.tar", tar_bytes({"._n01.tar": double, **train}))
    val = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(i) for i in range(1, 6)}
    save(tmp_path / "v.tar", tar_bytes({f"{prefix}{name}": double if prefix else data for name, data in val.items()
                                        for prefix in ("._", "")}))
    index = built(tmp_path, "ilsvrc2012", "--train", tmp_path / "t.tar", "--val", tmp_path / "v.tar", "--devkit",
                  devkit(tmp_path / "kit", images=2))
    assert len(index) == 8 + 5 and not index.samples["excluded"].any()
    assert {entry["name"]: entry["reason"] for entry in index.header["oddities"]} == {
        "._n01.tar": "not an inner tar", **{f"{wnid}/._{wnid}_1.JPEG": "not an image" for wnid in WNIDS},
        **{f"._{name}": "not an image" for name in val}}
    for name in ("cat/1.jpg", "cat/._1.jpg"):
        save(tmp_path / "tree" / name, double if "._" in name else jpeg(1))
    tree = built(tmp_path, "classes", tmp_path / "tree", "--force")
    assert len(tree) == 1 and [entry["reason"] for entry in tree.header["oddities"]] == ["not called an image"]


def test_dotted_keys_of_webdataset_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = save(tmp_path / "s.tar", tar_bytes({"img.v2.jpg": jpeg(1), "img.v2.cls": b"0"}))
    assert main(["build", "webdataset", str(shard), "--out", str(tmp_path / "index")]) == 2
    assert ("hold no images; the first of other files: img.v2.jpg: no image or label: a key ends at the first dot, so this is "
            ".v2.jpg of key img; write keys without dots") in capsys.readouterr().err
    save(shard, tar_bytes({"img.v2.jpg": jpeg(1), "a.jpg": jpeg(2), "a.cls": b"0"}))
    index = built(tmp_path, "webdataset", shard)
    assert len(index) == 1 and "a key ends at the first dot" in index.header["oddities"][0]["reason"]
