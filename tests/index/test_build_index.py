"""Every preset, built by the command as a user would: ids, names, labels, oddities, and messages."""
import gzip
import os
import random
from pathlib import Path

import pytest

from pipeline.index.tar import ArchiveError
from pipeline.index.sample_index import SampleIndex
from pipeline.index.builder import Builder
from pipeline.index.ilsvrc import build_ilsvrc
from tests.helpers.indexes import built, contents, devkit, jpeg, train_tar, val_tar
from tests.helpers.small_set import encode, picture
from tests.helpers.tars import block, member, save, tar_bytes
from tools.build_index import main


@pytest.mark.parametrize("kit", ["kit", "kit.tar.gz"])
def test_ilsvrc2012(tmp_path: Path, kit: str, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = train_tar(tmp_path / "t.tar"), val_tar(tmp_path / "v.tar")
    test = val_tar(tmp_path / "x.tar", kind="test")
    index = built(tmp_path, "ilsvrc2012", "--train", tmp_path / "t.tar", "--val", tmp_path / "v.tar", "--test",
                  tmp_path / "x.tar", "--devkit", devkit(tmp_path / kit, images=5))
    assert [entry.wnid for entry in index.classes] == ["n01", "n02", "n05", "n09"]
    assert index.classes[0].words == "words of n01"
    assert contents(index, "train") == {name: (name[:3], data) for name, data in train.items()}
    order = [index.name(id) for id in index.ids("train").tolist()]
    assert order == sorted(train, key=lambda name: name[:3])  # by class, then as in the archive
    wnids = ["n01", "n05", "n02", "n09", "n01"]  # IDs 2 1 4 3 2 of the ground truth
    assert contents(index, "val") == {f"ILSVRC2012_val_{i:08d}.JPEG": (wnids[i - 1], jpeg(100 + i)) for i in range(1, 6)}
    assert [index.name(id) for id in index.ids("val").tolist()] == sorted(val)
    assert contents(index, "test") == {name: ("", data) for name, data in test.items()}
    assert index.split_names == ["train", "val", "test"] and index.header["oddities"] == []
    said = capsys.readouterr()
    assert "train   20 images, 0 excluded" in said.out and "test    5 images, 0 excluded, 5 without label" in said.out
    assert "train t.tar: 100% of 0.1 MB, 20 images" in said.err and "\x1b" not in said.err  # plain lines: no terminal


def test_a_val_tar_in_class_folders_is_in_the_order_of_base_names(tmp_path: Path) -> None:
    """As valprep.sh leaves it: the folders' names must not decide which line of the ground truth an image gets."""
    kit = devkit(tmp_path / "kit", images=5)
    folders = {1: "n09", 2: "n01", 3: "n05", 4: "n02", 5: "n01"}
    save(tmp_path / "v.tar", tar_bytes({f"{folders[i]}/v_{i:08d}.JPEG": jpeg(i) for i in (3, 1, 5, 2, 4)}))
    index = built(tmp_path, "ilsvrc2012", "--val", tmp_path / "v.tar", "--devkit", kit)
    wnids = ["n01", "n05", "n02", "n09", "n01"]  # IDs 2 1 4 3 2 of the ground truth
    assert contents(index, "val") == {f"{folders[i]}/v_{i:08d}.JPEG": (wnids[i - 1], jpeg(i)) for i in range(1, 6)}


def test_parts_of_ilsvrc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_tar(tmp_path / "t.tar")
    index = built(tmp_path / "", "ilsvrc2012", "--train", tmp_path / "t.tar", "--no-crc")
    assert len(index.ids("train")) == 20 and index.classes[3].words == "" and not index.samples["crc32"].any()
    val_tar(tmp_path / "v.tar")
    index = built(tmp_path, "ilsvrc2012", "--val", tmp_path / "v.tar", "--force")
    assert index.samples["label"].tolist() == [-1] * 5 and index.classes == []
    assert "val has no labels, so nothing can be validated on it: give --devkit (or, to classes, " in capsys.readouterr().err


def test_ilsvrc2010_with_patch(tmp_path: Path) -> None:
    good, odd = jpeg(7, 40, 40), gzip.compress(jpeg(8))
    train = train_tar(tmp_path / "t.tar", {"n05": {"n05_1956.JPEG": odd, "n05_1957.JPEG": odd}})
    val, test = val_tar(tmp_path / "v.tar", "val/", "2010"), val_tar(tmp_path / "x.tar", "test/", "2010", "test")
    save(tmp_path / "p.tar", tar_bytes({"patch/n05_1956.JPEG": good, "patch/ILSVRC2010_val_00000002.JPEG": good,
                                        "patch/nowhere.JPEG": good}))
    truth = save(tmp_path / "truth.txt", b"4\n3\n2\n1\n4\n")
    arguments = ["ilsvrc2010", "--train", tmp_path / "t.tar", "--val", tmp_path / "v.tar", "--test", tmp_path / "x.tar",
                 "--test-truth", truth, "--devkit", devkit(tmp_path / "kit", year="2010", images=5)]
    index = built(tmp_path, *arguments, "--patch", tmp_path / "p.tar")
    del train["n05/n05_1957.JPEG"], train["n05/n05_1956.JPEG"]
    assert contents(index, "train") == {name: (name[:3], data) for name, data in train.items()} | {
        "patch/n05_1956.JPEG": ("n05", good)}
    found = contents(index, "val")
    assert found.pop("patch/ILSVRC2010_val_00000002.JPEG") == ("n05", good)
    assert set(found) == set(val) - {"val/ILSVRC2010_val_00000002.JPEG"}
    assert [wnid for wnid, _ in contents(index, "test").values()] == ["n02", "n09", "n01", "n05", "n02"]
    assert set(contents(index, "test")) == set(test)
    assert [(entry["name"], entry["reason"], entry["kept"]) for entry in index.header["oddities"]] == [
        ("n05_1956.JPEG", "patched", True), ("n05/n05_1957.JPEG", "gzip", False),
        ("ILSVRC2010_val_00000002.JPEG", "patched", True),
        ("n05", "7 images, the devkit says 5", True), ("nowhere.JPEG", "patch: no image has this name", False)]
    for entry in index.header["oddities"][:3]:
        assert index.name(entry["id"]).rpartition("/")[2] == entry["name"].rpartition("/")[2]
    plain = built(tmp_path, *arguments, "--force")
    assert (plain.samples["excluded"] != 0).sum() == 2


@pytest.mark.parametrize("name", ["cifar.tar", "tree"])
def test_class_folders(tmp_path: Path, name: str) -> None:
    files = {f"c/{split}/{wnid}/{i}.jpg": jpeg(i) for split in ("train", "test") for wnid in ("dog", "cat") for i in (2, 0, 1)}
    more = {"c/README.md": b"text", "c/train/dog/broken.jpg": b"rubbish"}
    if name == "tree":
        for file, data in (files | more).items():
            save(tmp_path / name / file, data)
        os.symlink(tmp_path / name / "c/train/dog/0.jpg", tmp_path / name / "c/train/dog/9.jpg")
        files["c/train/dog/9.jpg"] = jpeg(0)
    else:
        save(tmp_path / name, tar_bytes(files | more))
    index = built(tmp_path, "classes", tmp_path / name)
    for split in ("train", "test"):
        want = {file: (file.split("/")[2], data) for file, data in files.items() if split in file}
        assert contents(index, split) == want
    assert [entry.wnid for entry in index.classes] == ["cat", "dog"] and index.split_names == ["train", "test"]
    assert [(entry["name"], entry["reason"], entry["kept"]) for entry in index.header["oddities"]] == [
        ("c/train/dog/broken.jpg", "not_an_image", False), ("c/README.md", "not called an image", False)]
    assert index.name(index.header["oddities"][0]["id"]) == "c/train/dog/broken.jpg"
    if name == "tree":
        assert index.file_path(0) == tmp_path / "tree" / index.name(0)
        os.symlink(tmp_path / name, tmp_path / name / "c/loop")
        assert main(["build", "classes", str(tmp_path / name), "--out", str(tmp_path / "other")]) == 2


def test_a_folder_that_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("one", "two"):
        for i in range(3):
            save(tmp_path / kind / f"set/cat/{i}.jpg", jpeg(i, 24 if kind == "one" else 40))
    index = built(tmp_path, "classes", tmp_path / "one/set")
    os.rename(tmp_path / "one", tmp_path / "moved")
    assert SampleIndex.load(index.path, tmp_path / "moved").file_path(1) == tmp_path / "moved/set/cat/1.jpg"
    with pytest.raises(ValueError, match=r"two/set has another size or content\); name the folder"):
        SampleIndex.load(index.path, tmp_path / "two").file_path(1)
    os.remove(tmp_path / "moved/set/cat/1.jpg")
    assert main(["cat", str(index.path), "1", "--archives", str(tmp_path / "moved")]) == 2
    assert (f"error: file (={tmp_path}/moved/set/cat/1.jpg) is not there; correct the name, restore it, or mount"
            in capsys.readouterr().err)


def test_fall2011(tmp_path: Path) -> None:
    train = train_tar(tmp_path / "f.tar")
    for preset in ("fall2011", "classes"):
        index = built(tmp_path, preset, tmp_path / "f.tar", "--force")
        assert contents(index, "train") == {name: (name[:3], data) for name, data in train.items()}
    data = {"readme.txt": b"text", "n1.tar": tar_bytes({"a.JPEG": jpeg(1)})}
    save(tmp_path / "f.tar", tar_bytes(data))
    for preset in ("fall2011", "classes"):  # another file comes first
        index = built(tmp_path, preset, tmp_path / "f.tar", "--force")
        assert contents(index, "train") == {"n1/a.JPEG": ("n1", jpeg(1))}
        assert [entry["name"] for entry in index.header["oddities"]] == ["readme.txt"]
    save(tmp_path / "f.tar", tar_bytes({"cat/1.jpg": jpeg(1), **data}))
    index = built(tmp_path, "fall2011", tmp_path / "f.tar", "--force")
    assert contents(index, "train") == {"n1/a.JPEG": ("n1", jpeg(1))}
    assert [entry["name"] for entry in index.header["oddities"]] == ["cat/1.jpg", "readme.txt"]


def test_classes_that_training_never_sees_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_tar(tmp_path / "t.tar", {"n06": {}})
    built(tmp_path, "ilsvrc2012", "--train", tmp_path / "t.tar")
    assert "no image  in train of 1 classes: n06\n" in capsys.readouterr().out
    shard = save(tmp_path / "train.tar", tar_bytes({f"{i}.{kind}": data for i in (1, 3) for kind, data in (
        ("cls", b"%d" % i), ("jpg", jpeg(i)))}))
    built(tmp_path, "webdataset", shard, "--force")  # labels from 1 on
    assert "no image  in train of 2 classes: 0, 2\n" in capsys.readouterr().out


def test_webdataset(tmp_path: Path) -> None:
    shards: list[Path] = []
    want: dict[str, dict[str, tuple[str, bytes]]] = {"train": {}, "val": {}}
    for number, split in enumerate(["train", "train", "val"]):
        files: dict[str, bytes] = {}
        for i in range(4):
            key = f"{number:03d}{i:05d}"
            files |= {f"{key}.cls": b"%d\n" % (3 - i), f"{key}.jpg": jpeg(number + i), f"{key}.json": b"{}"}
            want[split][f"{key}.jpg"] = (str(3 - i), jpeg(number + i))
        files |= {"lost.cls": b"1", "naked.jpg": jpeg(1), "naked.seg.png": b"x"} if number == 2 else {}
        shards.append(save(tmp_path / f"set-{split}-{number:06d}.tar", tar_bytes(files)))
    index = built(tmp_path, "webdataset", *shards)
    assert contents(index, "train") == want["train"] and contents(index, "val") == want["val"]
    assert index.samples["label"][index.split_rows("train")].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [entry.wnid for entry in index.classes] == ["0", "1", "2", "3"]
    assert sorted((entry["name"], entry["reason"]) for entry in index.header["oddities"]) == [
        ("lost", "a label without an image"), ("naked.jpg", "unlabelled"), ("naked.seg.png", "not called an image")]
    assert index.header["splits"][1]["excluded"] == 1


def test_odd_images_are_listed_kept_or_excluded(tmp_path: Path) -> None:
    bomb = bytearray(jpeg(1))
    at = bomb.index(b"\xff\xc0")
    bomb[at + 5:at + 9] = (20_000).to_bytes(2, "big") * 2
    odd = {"grey.JPEG": jpeg(1, mode="L"), "cmyk.JPEG": jpeg(1, mode="CMYK"), "png.JPEG": encode(picture(1, 9, 9), "PNG"),
           "gzip.JPEG": gzip.compress(b"x"), "bomb.JPEG": bytes(bomb), "zero.JPEG": b"", "text.JPEG": b"hello",
           "cut.JPEG": jpeg(1)[:30], "gif.JPEG": encode(picture(1, 9, 9), "GIF"), "notes.txt": b"hello"}
    train_tar(tmp_path / "t.tar", {"n02": odd})
    index = built(tmp_path, "ilsvrc2012", "--train", tmp_path / "t.tar")
    assert {entry["name"]: (entry["reason"], entry["kept"]) for entry in index.header["oddities"]} == {
        "n02/cmyk.JPEG": ("cmyk", True), "n02/png.JPEG": ("misnamed", True), "n02/gzip.JPEG": ("gzip", False),
        "n02/bomb.JPEG": ("too_large", False), "n02/zero.JPEG": ("empty", False), "n02/text.JPEG": ("not_an_image", False),
        "n02/cut.JPEG": ("unreadable_header", False), "n02/gif.JPEG": ("unsupported", False),
        "n02/notes.txt": ("not an image", False)}
    assert all(index.name(entry["id"]) == entry["name"] for entry in index.header["oddities"] if entry["id"] is not None)
    assert index.header["reasons"]["grey"] == 1  # counted and listed by ls --odd, not by name: 1% of ImageNet is grey
    assert len(index) == 29 and len(index.ids("train")) == 23


def test_duplicates_and_links_are_listed_never_dropped_silently(tmp_path: Path) -> None:
    inner = (member(b"a.JPEG", jpeg(1)) + member(b"b.JPEG", jpeg(2)) + member(b"a.JPEG", jpeg(3)) + block(b"l.JPEG", 0, b"2")
             + bytes(1024))
    save(tmp_path / "t.tar", tar_bytes({"n1.tar": inner, "stray.JPEG": jpeg(1)}))
    index = built(tmp_path, "ilsvrc2012", "--train", tmp_path / "t.tar")
    assert contents(index, "train") == {"n1/a.JPEG": ("n1", jpeg(3)), "n1/b.JPEG": ("n1", jpeg(2))}  # as tar -x would
    assert sorted((entry["name"], entry["reason"]) for entry in index.header["oddities"]) == [
        ("n1/a.JPEG", "duplicate: a later member has the same name"), ("n1/l.JPEG", "a link, not a file"),
        ("stray.JPEG", "not an inner tar")]
    flat = member(b"c/a.jpg", jpeg(1)) + member(b"c/a.jpg", jpeg(2)) + block(b"c/b.jpg", 0, b"1") + bytes(1024)
    index = built(tmp_path, "classes", save(tmp_path / "f.tar", flat), "--force")
    assert contents(index, "train") == {"c/a.jpg": ("c", jpeg(2))}
    assert sorted(entry["reason"] for entry in index.header["oddities"]) == [
        "a link, not a file", "duplicate: a later member has the same name"]


def test_jobs_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_tar(tmp_path / "t.tar")
    one = built(tmp_path, "ilsvrc2012", "--train", tmp_path / "t.tar")
    monkeypatch.setattr("pipeline.index.builder.PARALLEL_BYTES", 1)
    assert main(["build", "ilsvrc2012", "--train", str(tmp_path / "t.tar"), "--out", str(tmp_path / "two"),
                 "--jobs", "2"]) == 0
    assert SampleIndex.load(tmp_path / "two").sha256 == one.sha256
    data = (tmp_path / "t.tar").read_bytes()
    inner = data.index(b"n05_30.JPEG")  # damage in an inner tar comes back from the other process
    save(tmp_path / "t.tar", data[:inner] + b"m" + data[inner + 1:])
    with pytest.raises(ValueError, match=r"header \(of n05.tar in .*t.tar\) at offset \d+ has checksum"):
        build_ilsvrc(Builder(tmp_path / "three", "ilsvrc2012", jobs=2), train=tmp_path / "t.tar")


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archives each with something wrong."""
    folder = tmp_path_factory.mktemp("bad")
    train_tar(folder / "t.tar")
    val_tar(folder / "v.tar")
    data = (folder / "t.tar").read_bytes()
    image = jpeg(1)
    for name, content in {
            "t.tar.gz": gzip.compress(data), "cut.tar": data[:len(data) // 2], "truth.txt": b"1\n", "flat/a.jpg": image,
            "two-labels.tar": member(b"a.cls", b"1") + member(b"a.cls", b"1") + bytes(1024)}.items():
        save(folder / name, content)
    for name, files in {
            "gz-inner": {"n1.tar": gzip.compress(b"x")}, "twice": {"a/n1.tar": tar_bytes({}), "b/n1.tar": tar_bytes({})},
            "other": {"n77.tar": tar_bytes({"a.JPEG": image})}, "bad-label": {"a.cls": b"cat", "a.jpg": image},
            "two-images": {"a.jpg": b"1", "a.png": b"2"}, "nothing": {}, "same": {"a/1.JPEG": image, "b/1.JPEG": image},
            "both": {"a/1.JPEG": image, "n1.tar": tar_bytes({"a.JPEG": image})}}.items():
        save(folder / f"{name}.tar", tar_bytes(files))
    (folder / "empty").mkdir()
    devkit(folder / "kit")
    devkit(folder / "kit3", b"1\n2\n3\n")
    return folder


@pytest.mark.parametrize(("arguments", "message"), [
    ("ilsvrc2012", "archives (=none) for preset ilsvrc2012 are missing; give --train, --val or --test"),
    ("ilsvrc2012 --train none.tar", "archive (=none.tar) does not exist; give the path of an uncompressed tar file"),
    ("ilsvrc2012 --train t.tar.gz", "archive (=t.tar.gz) is gzip-compressed, so its members have no fixed place; "
                                    "decompress it first: gunzip -k t.tar.gz"),
    ("ilsvrc2012 --train gz-inner.tar", "inner tar (=n1.tar) of gz-inner.tar at offset 512 is gzip-compressed"),
    ("ilsvrc2012 --train v.tar", "archive (=v.tar) holds no <wnid>.tar; for class folders of images: build classes"),
    ("ilsvrc2012 --val t.tar", "archive (=t.tar) holds no images; give the val archive"),
    ("ilsvrc2012 --train cut.tar", "it is truncated, fetch it again"),
    ("ilsvrc2012 --train twice.tar", "inner tar (=b/n1.tar) of twice.tar at offset"),
    ("ilsvrc2012 --train other.tar --devkit kit", "class (=n77) of other.tar is not in the devkit, nor are 0 more; give"),
    ("ilsvrc2012 --val v.tar --test v.tar", "v.tar) is given twice; give each archive once"),
    ("ilsvrc2012 --val v.tar --devkit kit3", "val archive (=v.tar) has 5 images but the ground truth 3 lines; give the"),
    ("ilsvrc2010 --test v.tar --test-truth truth.txt", "test ground truth (=truth.txt) needs the test archive and the"),
    ("ilsvrc2010 --test v.tar --devkit kit --test-truth none", "test ground truth (=none) does not exist; give a text file"),
    ("ilsvrc2012 --val same.tar", "image (=1.JPEG) of same.tar is there twice, as a/1.JPEG and as b/1.JPEG; repack the"),
    ("ilsvrc2010 --train t.tar --patch same.tar", "image (=1.JPEG) of same.tar is there twice, as a/1.JPEG and as b/1.JPEG"),
    ("fall2011 flat", "archive (=flat) is not a file; give the path of an uncompressed tar file"),
    ("fall2011 same.tar", "archive (=same.tar) holds no <wnid>.tar; for class folders of images: build classes"),
    ("classes both.tar", "archive (=both.tar) holds images (a/1.JPEG …) as well as tars (n1.tar …), so which are the data set"),
    ("classes none", "data set (=none) does not exist; give a folder of class folders, or a tar of them"),
    ("classes empty", "data set (=empty) holds no images (.jpg"),
    ("classes flat", "lies in no class folder; arrange images as <class>/<image>"),
    ("webdataset bad-label.tar", "label (='cat') in a.cls of bad-label.tar at offset 512 is not a number from 0"),
    ("webdataset two-images.tar", "sample (=a) of two-images.tar at offset 1536 has two images"),
    ("webdataset two-labels.tar", "sample (=a) of two-labels.tar at offset 1536 has two labels"),
    ("webdataset nothing.tar", "nothing.tar) hold no images; nothing was written"),
    ("classes empty --jobs -1", "--jobs (=-1) must be at least 0")])
def test_errors_are_one_line_and_leave_nothing(bad: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(bad)
    before = sorted(os.listdir(bad))
    assert main(["build", *arguments.split(), "--out", "index"]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ") and message in error
    assert "Traceback" not in error and sorted(os.listdir(bad)) == before


def test_no_damage_makes_an_index_shorter_without_a_word(tmp_path: Path) -> None:
    """One to three changed bytes or a cut, 150 times: an error, or every one of the 20 images has its row."""
    chance = random.Random(11)
    train_tar(tmp_path / "t.tar")
    data = (tmp_path / "t.tar").read_bytes()
    blocks = [at for at in range(0, len(data), 512) if data[at + 257:at + 262] == b"ustar"]
    errors = 0
    for number in range(150):
        changed = bytearray(data)
        for _ in range(chance.randrange(1, 4)):
            at = chance.choice(blocks) + chance.randrange(512) if number % 2 else chance.randrange(len(data))
            changed[at] = chance.randrange(256)
        if number % 10 == 0:
            del changed[chance.randrange(len(data)):]
        save(tmp_path / "t.tar", changed)
        try:
            build_ilsvrc(Builder(tmp_path / "index", "ilsvrc2012", jobs=1, force=True), train=tmp_path / "t.tar")
        except ArchiveError as error:
            assert "; " in str(error)
            errors += 1
        else:
            assert len(SampleIndex.load(tmp_path / "index")) == 20
    assert 50 < errors < 150
