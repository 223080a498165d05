"""A folder of class folders trained on in one command: classes from the index, a tenth held out, statistics when missing."""
import re
from pathlib import Path

import numpy as np
import pytest

from pipeline import DataConfig, make_eval_loader
from pipeline.index.sample_index import SampleIndex
from pipeline.index.subset import quotas
from pipeline.stats import Stats
from tests.helpers.recipes import write_recipe
from tests.helpers.runs import here, same
from tests.helpers.small_set import encode, picture
from tools import build_index, pack_shards
from train.evaluate.__main__ import main as evaluate_main
from train.recipe import load, parse

COUNTS = {"ant": 12, "bee": 9, "cat": 4, "dog": 1}
SHORT = ("--train.epochs=2", "--schedule.plateau=null")


def build(folder: Path, counts: dict[str, int], *options: str) -> Path:
    """Pictures of 41 to 90 pixels in class folders, and their index."""
    for name, count in counts.items():
        (folder / "images" / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            side = 41 + 7 * (number % 8)
            (folder / "images" / name / f"{number}.jpg").write_bytes(encode(picture(number + len(name), side, 90)))
    assert build_index.main(["build", "classes", str(folder / "images"), "--out", str(folder / "index"), *options]) == 0
    return folder / "index"


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return build(tmp_path, COUNTS)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path, classes="  classes: auto")


def test_one_command_trains_and_the_run_is_found_again(index: Path, recipe: Path, tmp_path: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    out, err = here(recipe, tmp_path / "runs", *SHORT, f"--data.index={index}")
    assert (f"{index} has no images for validation: 3 of 26 training images, 10% of each class, are held out as val and not "
            f"trained on; classes that have none there: 1; index: {index / 'hold-out'}") in out
    assert "23 images of 4 classes" in out and re.search("statistics: 100%.* 23 images", err)
    held = SampleIndex.load(index / "hold-out")
    train, val = held.ids("train"), held.ids("val")
    names = {held.name(id) for id in train.tolist()}, {held.name(id) for id in val.tolist()}
    assert not names[0] & names[1] and len(names[0] | names[1]) == 26
    assert np.bincount(held.samples["label"][val], minlength=4).tolist() == [1, 1, 1, 0]
    assert Stats.for_index(held, 76).count == 23 and not list(index.glob("stats*"))
    stored = load(tmp_path / "runs/small/config.yaml")
    assert (stored.model.classes, stored.data.index, stored.data.validation_split) == (4, str(index / "hold-out"), "val")
    before = (index / "hold-out/index.json").stat().st_mtime_ns
    here(recipe, tmp_path / "parts", *SHORT, f"--data.index={index}", "--machine.stop_after=3", code=75)
    _, err = here(recipe, tmp_path / "parts", *SHORT, f"--data.index={index}", "--resume")
    assert "statistics" not in err and (index / "hold-out/index.json").stat().st_mtime_ns == before
    same(tmp_path / "runs/small", tmp_path / "parts/small")
    capsys.readouterr()
    assert evaluate_main(["--run", str(tmp_path / "runs/small"), "--views", "1"]) == 0
    assert "split val: 3 images" in capsys.readouterr().out


def test_a_rebuilt_index_is_divided_anew(tmp_path: Path, recipe: Path) -> None:
    index = build(tmp_path, COUNTS)
    here(recipe, tmp_path / "runs", *SHORT, f"--data.index={index}")
    build(tmp_path, {**COUNTS, "dog": 10}, "--force")
    before = (index / "hold-out/index.json").read_bytes()
    out, err = here(recipe, tmp_path / "more", *SHORT, f"--data.index={index}")
    divided = index / f"hold-out-{SampleIndex.load(index).sha256[:8]}"
    assert f"4 of 35 training images, 10% of each class, are held out as val and not trained on; index: {divided}" in out
    assert f"stays as it is: runs on it go on with --data.index={index}/hold-out\n" in out
    assert re.search("statistics: 100%.* 31 images", err) and (index / "hold-out/index.json").read_bytes() == before
    assert load(tmp_path / "more/small/config.yaml").data.index == str(divided)


def test_packed_images_without_any_to_validate_on_name_the_remedy(index: Path, recipe: Path, tmp_path: Path) -> None:
    def pack(source: Path, out: Path) -> list[str]:
        assert pack_shards.main([str(source), "-o", str(out), "--square-px", "76"]) == 0
        return ["--data.tier=packed", f"--data.packed={out}"]

    words = pack(index, tmp_path / "packed")
    _, err = here(recipe, tmp_path / "runs", *SHORT, f"--data.index={index}", *words, code=2)
    held, out = index / "hold-out", tmp_path / "packed-divided"
    first = f"`alexnet index subset {index} -o {held} --hold-out 0.1 --hold-out-as val --seed 0 --hold-out-min 1`"
    assert err == (f"error: data.packed (={tmp_path}/packed) has no validation images (split val); pack an index that has them: "
                   f"{first}, `alexnet pack {held} -o {out} --square-px 76`, then train with --data.index={held} "
                   f"--data.packed={out}\n")
    assert build_index.main(first.strip("`").split()[2:]) == 0
    _, err = here(recipe, tmp_path / "runs", *SHORT, f"--data.index={index}", *words, code=2)
    assert f"that has them: `alexnet pack {held} " in err
    here(recipe, tmp_path / "runs", "--train.epochs=1", "--schedule.plateau=null", f"--data.index={held}", *pack(held, out))


def test_a_loader_for_a_split_that_is_not_there_says_where_it_is(index: Path) -> None:
    data = DataConfig(square_px=76, crop_px=67)
    with pytest.raises(ValueError, match=rf"has train; hold images out with `(.*)`, and use {index}/hold-out, for") as told:
        make_eval_loader(index, data=data)
    assert build_index.main(str(told.value).split("`")[1].split()[2:]) == 0
    with pytest.raises(ValueError, match=rf"it has train; use {index}/hold-out, which has, for training as well"):
        make_eval_loader(index, data=data)
    with make_eval_loader(index / "hold-out", data=data) as loader:
        assert len(loader) == 1
    assert not list(index.glob("stats*"))


@pytest.mark.parametrize("counts, options, message", [
    (COUNTS, ["--train.batch=24"], "train.batch (=24) must not exceed the 23 images of split train; lower it: --train.batch=23"),
    ({"a": 1, "b": 1}, [], "split (=val) is not in the index INDEX, and 10% of its training images cannot be held out: split "
     "(=val) would be empty"),
    ({"a": 9}, [], "data.index (=INDEX) has only one class, a; put the images of each class into a folder of its own"),
    (COUNTS, ["--data.validation_split=test"], "split (=test) is not in the index INDEX; it has train"),
    (COUNTS, ["--data.index=nowhere"], "data.index (=nowhere) does not exist; give --data.index=FOLDER, made with `alexnet index "
     "build`"),
    (COUNTS, ["--data.index=IMAGES"], "index (=IMAGES) is a folder of images, which an index is made of; make it with `alexnet "
     "index build classes IMAGES -o IMAGES.index`, and give IMAGES.index"),
])
def test_what_cannot_be_trained_on_is_said_in_a_line(tmp_path: Path, recipe: Path, counts: dict[str, int], options: list[str],
                                                     message: str) -> None:
    index = build(tmp_path, counts)
    options = [word.replace("IMAGES", str(tmp_path / "images")) for word in options]
    _, err = here(recipe, tmp_path / "runs", *SHORT, f"--data.index={index}", *options, code=2)
    message = message.replace("INDEX", str(index)).replace("IMAGES", str(tmp_path / "images"))
    assert message in err and "Traceback" not in err and err.count("error:") == 1


def test_the_shipped_recipe_takes_its_classes_from_the_index(index: Path) -> None:
    path = Path(__file__).resolve().parents[2] / "train/recipes/small.yaml"
    config = parse(["--config", str(path), f"--data.index={index}"]).config
    assert config.model.classes == 4 and config.fingerprint() == parse(
        ["--config", str(path), f"--data.index={index}", "--model.classes=4"]).config.fingerprint()


def test_shares_with_a_least_number() -> None:
    assert quotas([12, 9, 4, 1, 0], 0.1, [0, 1, 2, 3, 4], 1) == [1, 1, 1, 0, 0]
    assert quotas([100, 9, 4], 0.1, [0, 1, 2], 1) == [10, 1, 1] and quotas([100, 9, 4], 0.1, [0, 1, 2]) == [10, 1, 0]
    assert quotas([3, 2], 0.5, [0, 1], 5) == [2, 1]
