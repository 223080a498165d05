"""Subsets of an index: rows, labels, order, what is held out; read, verified, packed, trained on like any index."""
import dataclasses
import json
import os
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from pipeline.index.sample_index import REASONS, SAMPLE, SampleIndex
from pipeline.index.writer import mark_excluded, write_index
from pipeline.index.subset import Choices, held_out, quotas, read_names, read_range
from pipeline.index.verify import full, quick
from pipeline.compute_stats import compute
from pipeline.stats import Stats, stats_path
from tests.conftest import TinySet
from tests.helpers.indexes import altered, built, contents, devkit, jpeg, train_tar, val_tar
from tests.helpers.packed_set import write_packed
from tests.helpers.small_set import photographs
from tests.helpers.tars import save, tar_bytes
from tools import pack_shards
from tools.build_index import main

SPLIT_FIELDS = {"label", "split", "archive"}  # what a subset may change of a row


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    """ILSVRC2012 in small: n01 n02 n05 n09 of 5, 6, 7, 5 images, a CMYK one in n02, an empty one in n05; 5 val, 5 unlabelled
    test images."""
    folder = tmp_path_factory.mktemp("source")
    train_tar(folder / "t.tar", {"n02": {"g.JPEG": jpeg(1, mode="CMYK")}, "n05": {"h.JPEG": jpeg(2), "empty.JPEG": b""}})
    val_tar(folder / "v.tar")
    val_tar(folder / "x.tar", kind="test")
    return built(folder, "ilsvrc2012", "--train", folder / "t.tar", "--val", folder / "v.tar", "--test", folder / "x.tar",
                 "--devkit", devkit(folder / "kit"))


def subset(index: SampleIndex, out: Path, *options: object, code: int = 0) -> SampleIndex:
    """By the command, as a user would."""
    assert main(["subset", str(index.path), "--out", str(out), *map(str, options)]) == code
    return SampleIndex.load(out) if code == 0 else None  # type: ignore[return-value]


def refused(index: SampleIndex, out: Path, *options: object, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line a refused command says; it leaves nothing."""
    before = sorted(os.listdir(out.parent))
    capsys.readouterr()
    subset(index, out, *options, code=2)
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert sorted(os.listdir(out.parent)) == before
    return said.err


def everything(index: SampleIndex) -> dict[str, tuple[str, str, bytes]]:
    """name → split, wnid, bytes of all images that are not excluded."""
    return {f"{split}/{name}": (split, *found) for split in index.split_names for name, found in contents(index, split).items()}


def flat(folder: Path, files: dict[str, bytes]) -> SampleIndex:
    save(folder / "c.tar", tar_bytes(files))
    return built(folder, "classes", folder / "c.tar")


def test_some_classes(source: SampleIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = subset(source, tmp_path / "out", "--class-range", "1:3")
    said = capsys.readouterr()
    assert [entry.wnid for entry in made.classes] == ["n02", "n05"] and made.classes[1].words == "words of n05"
    kept = {name: found for name, found in everything(source).items() if found[1] in ("n02", "n05")}
    assert everything(made) == kept and len(kept) == 12 + 2
    assert made.split_names == ["train", "val"] and [len(made.ids(split)) for split in made.split_names] == [12, 2]
    places = {source.name(id): id for id in range(len(source)) if source.samples["split"][id] < 2}
    old = np.array([places[made.name(id)] for id in range(len(made))])
    assert (np.diff(old) > 0).all()  # the order of the source
    for name in set(SAMPLE.names or ()) - SPLIT_FIELDS:
        assert np.array_equal(made.samples[name], source.samples[name][old])
    assert len(made) == 13 + 2 and made.samples["excluded"].sum() == 1  # the empty file stays, excluded
    assert made.split_sha256("train") != source.split_sha256("train") and made.sha256 != source.sha256
    assert "note: left out 5 images of test without a label, of which no class is known\n" in said.err
    assert "note: left out split test: none of its 5 rows has a label of a class that is kept\n" in said.err
    assert f"derived   of {source.sha256[:16]}… (33 samples, 4 classes): --class-range 1:3\n" in said.out
    assert [archive.path.name for archive in made.archives] == ["t.tar", "v.tar"]


def test_oddities_follow_their_rows(source: SampleIndex, tmp_path: Path) -> None:
    made = subset(source, tmp_path / "out", "--class-range", "2:4")
    said = [entry["reason"] for entry in source.header["oddities"] if entry["id"] is not None]
    assert said == ["cmyk", "empty"] and len(source.header["oddities"]) > 2  # the others are of no row
    (entry,) = made.header["oddities"]
    assert (entry["reason"], entry["kept"], made.name(entry["id"])) == ("empty", False, "n05/empty.JPEG")
    assert made.header["reasons"] == {"empty": 1} and made.header["splits"][0]["excluded"] == 1


def test_lists_of_classes(source: SampleIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = save(tmp_path / "list.txt", b"\xef\xbb\xbf# for pre-training\r\nn09  # the last\r\n\r\n  n01\nn05\t# x\nn01\n")
    assert read_names(listed) == ["n09", "n01", "n05", "n01"]
    assert read_names(save(tmp_path / "c", b"c#\ngolden retriever #1\n\xff\n")) == ["c#", "golden retriever", "\udcff"]
    made = subset(source, tmp_path / "out", "--classes", listed, "--exclude-classes", save(tmp_path / "no.txt", b"n05\n"))
    assert [entry.wnid for entry in made.classes] == ["n01", "n09"]
    assert made.derived[0]["chosen"] == "--classes (3 named) --exclude-classes (1 named)"
    assert {wnid for _, wnid, _ in everything(made).values()} == {"n01", "n09"}
    for text, message in [
            (b"n01\nn77\nn78\nn77\n", "class (=n77) of --classes (2 unknown) is not in the index {}; its 4 classes are"),
            (b"n77", "class (=n77) of --classes (1 unknown) is not in the index {}; its 4 classes are listed by info --json"),
            (b"# nothing\n", "names no class; write one name a line")]:
        save(listed, text)
        assert message.format(source.path) in refused(source, tmp_path / "x", "--classes", listed, capsys=capsys)
    assert "of --exclude-classes" in refused(source, tmp_path / "x", "--exclude-classes", save(listed, b"n77"), capsys=capsys)
    assert "none) is not a file" in refused(source, tmp_path / "x", "--classes", tmp_path / "none", capsys=capsys)


def test_classes_of_few_images(source: SampleIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = subset(source, tmp_path / "out", "--min-images", 6)
    said = capsys.readouterr()
    assert [entry.wnid for entry in made.classes] == ["n02", "n05"]  # n05 has 6 besides the empty one
    assert "note: left out 2 classes of less than 6 training images: n01, n09\n" in said.err
    assert made.derived[0]["too_few"] == ["n01", "n09"] and "--min-images 6; 2 classes had too few images\n" in said.out
    message = refused(source, tmp_path / "x", "--min-images", 7, capsys=capsys)
    assert "would have none of its 4 classes: those chosen have less than 7 training images (--min-images)" in message


def test_positions_keep_the_order_of_the_source(tmp_path: Path) -> None:
    """WebDataset classes are numbers: 10 comes after 2. A shard that no row uses is forgotten, and need not be there."""
    for shard in range(3):
        files = {f"{label:02d}.{kind}": jpeg(label) if kind == "jpg" else b"%d" % label
                 for label in range(4 * shard, 4 * shard + 4) for kind in ("jpg", "cls")}
        save(tmp_path / f"train/s{shard}.tar", tar_bytes(files))
    index = built(tmp_path, "webdataset", *(tmp_path / f"train/s{i}.tar" for i in range(3)))
    made = subset(index, tmp_path / "out", "--classes", save(tmp_path / "list", b"10\n11\n2\n"))
    assert [entry.wnid for entry in made.classes] == ["2", "10", "11"] and made.samples["label"].tolist() == [0, 1, 2]
    assert [archive.path.name for archive in made.archives] == ["s0.tar", "s2.tar"]
    assert made.samples["archive"].tolist() == [0, 1, 1]
    os.remove(tmp_path / "train/s1.tar")
    assert contents(made, "train") == {f"{i:02d}.jpg": (str(i), jpeg(i)) for i in (2, 10, 11)}
    assert full(made, 1) == [] and quick(made) == []


def test_unlabelled_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "train.tar", tar_bytes({"a.jpg": jpeg(1), "a.cls": b"0", "b.jpg": jpeg(2), "c.jpg": jpeg(3), "c.cls": b"1"}))
    index = built(tmp_path, "webdataset", tmp_path / "train.tar")
    rows = np.array(index.samples)
    assert rows["label"].tolist() == [-1, 0, 1] and rows["excluded"].tolist() == [1, 0, 0]
    rows = np.concatenate([rows, rows[[0, 1]]])
    rows["split"], rows["label"], rows["excluded"] = [0, 0, 0, 1, 1], [-1, 0, 1, -1, 1], [1, 0, 0, 0, 0]
    write_index(index.path, rows, classes=index.classes, archives=index.archives, splits=["train", "val"], preset="webdataset",
                crc32=True, force=True)
    index = SampleIndex.load(index.path)
    made = subset(index, tmp_path / "all", "--min-images", 1)  # every class is kept
    assert made.samples["label"].tolist() == [0, 1, -1, 1] and made.samples["split"].tolist() == [0, 0, 1, 1]
    capsys.readouterr()
    made = subset(index, tmp_path / "one", "--class-range", "1:2")
    assert made.samples["label"].tolist() == [0, 0] and made.samples["split"].tolist() == [0, 1]
    assert capsys.readouterr().err == "note: left out 1 images of val without a label, of which no class is known\n"


@pytest.mark.parametrize("share", [0.1, 0.5, 1 / 3, 0.9])
def test_quotas(share: float) -> None:
    """Against the rule itself: within one of each class's share, the sum is the share of all, a class keeps an image."""
    random = np.random.default_rng(0)
    counts = random.integers(0, 40, 500).tolist()
    found = quotas(counts, share, random.permutation(500).tolist())
    exact = Fraction(str(share))
    assert all(abs(quota - count * exact) < 1 or count * (1 - exact) < 1 for quota, count in zip(found, counts))
    assert all(0 <= quota <= max(0, count - 1) for quota, count in zip(found, counts))
    assert abs(sum(found) - sum(counts) * exact) <= Fraction(1, 2) or share == 0.9  # 0.9 of 2 would leave none
    assert quotas([30] * 4, 0.1, [0] * 4) == [3] * 4 and quotas([1, 0, 2, 3], 0.5, [0, 1, 2, 3]) == [0, 0, 1, 2]
    assert quotas([5] * 4, 0.5, [3, 0, 2, 1]) == [2, 3, 2, 3] and quotas([2, 2], 0.99, [0, 1]) == [1, 1]
    assert quotas([5, 13, 4], 0.3, [2, 1, 0]) == [2, 4, 1]  # 1.5, 3.9, 1.2, together 6.6: up where most is missing


def test_held_out(source: SampleIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "t.tar", (source.path.parent / "t.tar").read_bytes())
    index = built(tmp_path, "fall2011", tmp_path / "t.tar")
    made = subset(index, tmp_path / "half", "--hold-out", 0.5, "--hold-out-as", "test", "--seed", 7)
    assert made.split_names == ["train", "test"] and [len(made.ids(split)) for split in made.split_names] == [11, 11]
    train, test, before = contents(made, "train"), contents(made, "test"), contents(index, "train")
    assert train | test == before and not train.keys() & test.keys()
    counts = Counter(wnid for wnid, _ in test.values())
    assert counts["n02"] == counts["n05"] == 3 and {counts["n01"], counts["n09"]} == {2, 3}
    order = [index.name(id) for id in index.ids("train").tolist()]
    assert [made.name(id) for id in made.ids("test").tolist()] == [name for name in order if name in test]
    assert [made.name(id) for id in made.ids("train").tolist()] == [name for name in order if name in train]
    assert [made.name(id) for id in np.flatnonzero(made.samples["excluded"])] == ["n05/empty.JPEG"]  # in train, as it was
    assert made.header["splits"][0]["excluded"] == 1 and made.header["splits"][1]["excluded"] == 0
    cmyk = next(entry for entry in made.header["oddities"] if entry["reason"] == "cmyk")
    assert made.name(cmyk["id"]) == "n02/g.JPEG" and cmyk["split"] == ("test" if "n02/g.JPEG" in test else "train")
    assert made.derived[0]["chosen"] == "--hold-out 0.5 --hold-out-as test --seed 7"
    again = subset(index, tmp_path / "again", "--hold-out", 0.5, "--hold-out-as", "test", "--seed", 7)
    other = subset(index, tmp_path / "other", "--hold-out", 0.5, "--hold-out-as", "test", "--seed", 8)
    assert again.sha256 == made.sha256 and contents(other, "test") != test
    less = subset(index, tmp_path / "less", "--hold-out", 0.25, "--hold-out-as", "val", "--seed", 7)
    assert contents(less, "val").keys() < test.keys() and len(less.ids("val")) == 6  # 5.5 of 22
    three = subset(made, tmp_path / "three", "--hold-out", 0.2, "--hold-out-as", "val")
    assert three.split_names == ["train", "val", "test"] and contents(three, "test") == test  # val goes between
    assert contents(three, "train") | contents(three, "val") == train and len(three.derived) == 2
    assert three.derived[0] == made.derived[0] and three.derived[1]["index"] == made.sha256
    assert "n09" in {wnid for wnid, _ in contents(subset(made, tmp_path / "last", "--class-range", "3:4"), "test").values()}


def test_what_is_held_out_does_not_depend_on_the_other_rows(tmp_path: Path) -> None:
    """Rows in another order, or classes left out: of the same archive the same images; of a folder, by name."""
    files = {f"{wnid}/{i:02d}.jpg": jpeg(10 * n + i, 8, 8) for n, wnid in enumerate("abc") for i in range(8)}
    index = flat(tmp_path, files)
    ids = index.ids("train")
    held = set(ids[held_out(index, ids, 0.5, 1)].tolist())
    mixed = np.random.default_rng(0).permutation(ids)
    assert set(mixed[held_out(index, mixed, 0.5, 1)].tolist()) == held and len(held) == 12
    names = {index.name(id) for id in held}
    some = subset(subset(index, tmp_path / "some", "--class-range", "1:3"), tmp_path / "half", "--hold-out", 0.5, "--hold-out-as",
                  "val", "--seed", 1)
    assert {some.name(id) for id in some.ids("val")} == {name for name in names if name[0] != "a"}
    for name, data in files.items():
        save(tmp_path / "folder" / name, data)
    tree = built(tmp_path, "classes", tmp_path / "folder", "--force")
    held_names = {tree.name(id) for id in tree.ids("train")[held_out(tree, tree.ids("train"), 0.5, 1)]}
    save(tmp_path / "folder/a/000.jpg", jpeg(99))  # moves all others in names.bin
    save(tmp_path / "folder/a/001.jpg", jpeg(98))
    tree = built(tmp_path, "classes", tmp_path / "folder", "--force")
    later = {tree.name(id) for id in tree.ids("train")[held_out(tree, tree.ids("train"), 0.5, 1)]}
    assert {name for name in later if name[0] != "a"} == {name for name in held_names if name[0] != "a"}
    assert len(later) == 13 and len(held_names) == 12


def test_a_folder_of_images(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("val", 2)):
        for n, wnid in enumerate(["cat", "dog", "ant"]):
            for i in range(count):
                save(tmp_path / f"set/{split}/{wnid}/{i}.jpg", jpeg(10 * n + i, 8, 8))
    index = built(tmp_path, "classes", tmp_path / "set")
    made = subset(index, tmp_path / "out", "--class-range", "1:3", "--hold-out", 0.5, "--hold-out-as", "test")
    assert [len(made.ids(split)) for split in ("train", "val", "test")] == [6, 4, 6]
    found, before = everything(made), everything(index)
    assert {name.split("/", 1)[1] for name in found} == {name.split("/", 1)[1] for name in before if "/ant/" not in name}
    assert main(["verify", str(made.path), "--full"]) == 0
    os.rename(tmp_path / "set", tmp_path / "moved")
    moved = SampleIndex.load(made.path, tmp_path)  # its own name is gone: nothing to be found by it
    with pytest.raises(ValueError, match=r"archive \(=.*set\) is not there, nor in"):
        moved.read(0)
    (tmp_path / "in").mkdir()
    os.rename(tmp_path / "moved", tmp_path / "in/set")
    moved = SampleIndex.load(made.path, tmp_path / "in")
    assert everything(moved) == found and moved.file_path(0) == tmp_path / "in/set" / made.name(0)
    os.rename(tmp_path / "in/set", tmp_path / "set")
    (tmp_path / "set" / made.name(0)).write_bytes(b"")
    assert main(["verify", str(made.path), "--full", "--exclude"]) == 0
    assert SampleIndex.load(made.path).ids("train").tolist() == made.ids("train").tolist()[1:]


def test_every_verb_works_on_a_subset(source: SampleIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = subset(source, tmp_path / "out", "--class-range", "1:4")
    made = subset(made, tmp_path / "half", "--hold-out", 0.5, "--hold-out-as", "test")
    capsys.readouterr()
    assert main(["info", str(made.path)]) == 0
    said = capsys.readouterr().out
    assert said.count("derived   of ") == 2 and "test    9 images, 0 excluded" in said
    assert main(["info", str(made.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["derived"] == made.derived
    for how in ([], ["--full"], ["--scrub"]):
        assert main(["verify", str(made.path), *how, "--jobs", "1"]) == 0
        assert capsys.readouterr().out.startswith(f"ok: {len(made) - (how == ['--scrub'])} samples")
    assert main(["ls", str(made.path), "--split", "test", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 9
    for line in lines:
        assert line["member"].startswith(f"{line['wnid']}/") and made.classes[line["label"]].wnid == line["wnid"]
        assert made.read(line["id"]) == Path(line["archive"]).read_bytes()[line["offset"]:line["offset"] + line["size"]]
    id = lines[0]["id"]
    mark_excluded(made, {id: (made.name(id), "says the test")})
    again = SampleIndex.load(made.path)
    assert again.derived == made.derived and len(again.ids("test")) == 8
    third = subset(again, tmp_path / "third", "--min-images", 1)
    assert third.samples["excluded"].sum() == 2 and len(third.derived) == 3 and REASONS[third.samples["reason"][id]] == "damaged"


def test_archives_that_moved(source: SampleIndex, tmp_path: Path) -> None:
    """The subset is taken without them, and finds them like any index."""
    files = {f"{wnid}/{i}.jpg": jpeg(i, 8, 8) for wnid in "ab" for i in range(3)}
    index = flat(tmp_path, files)
    (tmp_path / "elsewhere").mkdir()
    os.rename(tmp_path / "c.tar", tmp_path / "elsewhere/c.tar")
    made = subset(index, tmp_path / "out", "--class-range", "1:2")
    with pytest.raises(ValueError, match=r"archive \(=.*c.tar\) is not there; name the folder that holds it"):
        made.find_archive(0)
    made = SampleIndex.load(made.path, tmp_path / "elsewhere")
    assert made.find_archive(0) == tmp_path / "elsewhere/c.tar"
    assert contents(made, "train").keys() == {f"b/{i}.jpg" for i in range(3)}


def test_measured_and_packed(tiny_set: TinySet, tmp_path: Path) -> None:
    """Half of the classes, half of their images held out: statistics and shards."""
    index = SampleIndex.load(tiny_set.index)
    made = subset(index, tmp_path / "out", "--class-range", "3:6", "--hold-out", 0.5, "--hold-out-as", "test")
    Stats.for_index(index, 76).save(stats_path(made.path, 76))
    with pytest.raises(ValueError, match="must belong to split train of the index as it is now"):
        Stats.for_index(made, 76)
    compute(made, "train", 76).save(stats_path(made.path, 76))
    options = ["--square-px", "76", "--jobs", "1", "--budget", "0.1"]
    assert pack_shards.main([str(made.path), str(tmp_path / "packed"), *options]) == 0
    packed = SampleIndex.load(tmp_path / "packed")
    assert np.array_equal(packed.samples["label"], made.samples["label"]) and packed.classes == made.classes
    assert packed.packed is not None and packed.packed["source"]["test"] == made.split_sha256("test") and packed.derived == []
    assert Stats.for_index(packed, 76).sha256 == Stats.for_index(made, 76).sha256


def test_packed_indexes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = write_packed(tmp_path / "packed", photographs(6), 3)
    message = refused(packed, tmp_path / "out", "--class-range", "0:2", capsys=capsys)
    assert "is packed, and its shards hold the labels and row numbers" in message and "take the subset of the index of" in message


@pytest.mark.parametrize("options, message", [
    ([], "subset (=all classes, nothing held out) would be the same index again; give --classes, --class-range"),
    (["--class-range", "0:5"], "--class-range (=0:5) must lie within 0:4, the classes of "),
    (["--class-range", "2:2"], "--class-range (=2:2) must lie within 0:4"),
    (["--class-range", "1-2"], "--class-range (=1-2) must be A:B, for classes A to B - 1"),
    (["--class-range", ":2"], "--class-range (=:2) must be A:B"),
    (["--class-range", "0:2", "--classes", "LIST"], "--class-range (=0:2) and --classes exclude each other; give one"),
    (["--hold-out", "0.5"], "--hold-out (=0.5) and --hold-out-as (=None) belong together; give both"),
    (["--hold-out-as", "val"], "--hold-out (=None) and --hold-out-as (=val) belong together"),
    *[(["--hold-out", share, "--hold-out-as", "val"], f"--hold-out (={float(share)}) must be a share between 0 and 1")
      for share in ("0", "1", "-0.5", "1.5", "nan")],
    (["--hold-out", "0.5", "--hold-out-as", "train"], "--hold-out-as (=train) must be val or test"),
    (["--hold-out", "0.5", "--hold-out-as", "val"], "--hold-out-as (=val) is a split of "),
    (["--min-images", "-1"], "--min-images (=-1) must not be negative"),
    (["--min-images", "1", "--seed", "-1"], "--seed (=-1) must not be negative")])
def test_what_is_refused(source: SampleIndex, tmp_path: Path, options: list[str], message: str,
                         capsys: pytest.CaptureFixture[str]) -> None:
    listed = str(save(tmp_path / "list.txt", b"n01\n"))
    assert message in refused(source, tmp_path / "out", *(listed if option == "LIST" else option for option in options),
                              capsys=capsys)


def test_empty_splits_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = flat(tmp_path, {name: jpeg(1) for name in ("train/a/1.jpg", "train/b/1.jpg", "train/b/2.jpg", "val/b/1.jpg")})
    message = refused(index, tmp_path / "out", "--class-range", "0:1", capsys=capsys)
    assert "split (=val) would be empty: no image of it is in a class that is kept; choose other classes, or build" in message
    message = refused(index, tmp_path / "out", "--hold-out", "0.1", "--hold-out-as", "test", capsys=capsys)
    assert "split (=test) would be empty: --hold-out (=0.1) of 3 training images, of which every class keeps one, is" in message
    rows = np.array(index.samples[3:])
    rows["split"] = 0
    write_index(tmp_path / "val", rows, classes=index.classes, archives=index.archives, splits=["val"], preset="classes",
                crc32=True)
    index = SampleIndex.load(tmp_path / "val")
    message = refused(index, tmp_path / "out", "--hold-out", "0.5", "--hold-out-as", "test", capsys=capsys)
    assert "split (=train) is not in the index" in message and "it has val" in message


def test_output(source: SampleIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    made = subset(source, out, "--class-range", "0:2")
    message = refused(source, out, "--class-range", "1:3", capsys=capsys)
    assert "holds an index already; give another name, or --force" in message
    save(out / "stats.npz", b"kept")
    again = subset(source, out, "--class-range", "1:3", "--force")
    assert again.sha256 != made.sha256 and (out / "stats.npz").exists() and len(os.listdir(out)) == 3
    os.symlink(source.path, tmp_path / "link")
    for same in (source.path, tmp_path / "link"):
        assert "must not be the index itself" in refused(source, same, "--class-range", "0:1", "--force", capsys=capsys)
    assert "exists and holds no index" in refused(source, tmp_path, "--class-range", "0:1", "--force", capsys=capsys)
    file = out / again.header["files"]["samples"]["file"]
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert main(["subset", str(out), "--out", str(tmp_path / "new"), "--class-range", "0:1"]) == 2
    assert f"array (={file}) of the index has SHA-256" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_headers_with_and_without_derivation(source: SampleIndex, tmp_path: Path) -> None:
    """An index of archives has no such key, so neither its hash nor an older reader's view of it changes."""
    assert "derived" not in source.header and source.derived == []
    made = subset(source, tmp_path / "out", "--class-range", "0:2")
    assert made.header["version"] == source.header["version"] == 1
    altered(made.path, {"derived": [{**made.derived[0], "chosen": "\x1b[2J"}]}, resign=False)
    with pytest.raises(ValueError, match="does not match its SHA-256"):
        SampleIndex.load(made.path)


def test_ranges_and_choices() -> None:
    assert read_range("0:50") == (0, 50)
    for text in ("", "5", "a:b", "1:2:3", "-1:2", "0:½"):
        with pytest.raises(ValueError, match=r"--class-range \(=.*\) must be A:B"):
            read_range(text)
    asked = Choices(class_range=(0, 2), min_images=3, hold_out=0.25, hold_out_as="val", seed=4)
    assert str(asked) == "--class-range 0:2 --min-images 3 --hold-out 0.25 --hold-out-as val --seed 4"
    assert str(dataclasses.replace(asked, hold_out=None, hold_out_as=None)) == "--class-range 0:2 --min-images 3"
