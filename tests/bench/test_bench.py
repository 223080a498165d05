"""The comparison with other loaders: its check can fail, its figures add up, it says what does not run, and it runs."""
import io
import json
import os
import pickle
import sys
import tarfile
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pipeline.index.sample_index import SampleIndex
from pipeline.config import LoaderConfig
from pipeline.compute_stats import compute
from tests.helpers.small_set import photographs, write_set
from tools.bench import __main__ as bench, chart, crops, report as bench_report, rounds
from tools.bench.contenders import CONTENDERS, KINDS, Contender
from tools.bench.crops import CROP_PX, Cropper, Normalize
from tools.bench.rounds import Result
from tools.bench.workers import NotAvailable
from tools.bench.workload import Augmented, Photographs, Running, Task, difference, need, resized_size
from tools.profile.measure import Spread, Turn, Workload, process_tree


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    return write_set(tmp_path_factory.mktemp("set"), photographs(10))


@pytest.fixture(scope="module")
def work(index: SampleIndex, tmp_path_factory: pytest.TempPathFactory) -> Task:
    scratch = tmp_path_factory.mktemp("scratch")
    compute(index, "train", 256, machine=LoaderConfig(threads=1)).save(scratch / "stats.npz")
    return Task(index.path, None, scratch / "stats.npz", scratch, batch=4, workers=1)


# --- the check of a first batch

def exact(material: Photographs) -> Augmented:
    """A batch made as the check makes it."""
    parameters = np.array([[0, 29, 0, 0, 0, 0], [29, 0, 1, 5, -3, 2], [14, 15, 1, 0, 0, 0], [3, 4, 0, 1, 1, 1]], np.float32)
    images = [material.resized(id)[top:top + CROP_PX, left:left + CROP_PX]
              for id, (top, left) in enumerate(parameters[:, :2].astype(int).tolist())]
    return Normalize(material).batch(np.stack(images), np.arange(4), parameters)


def test_the_check_passes_what_is_right_and_fails_what_is_not(work: Task) -> None:
    material = Photographs(work, "original")
    batch = exact(material)
    assert difference(material, batch) < 1e-4
    images = batch.images.numpy()
    assert difference(material, replace(batch, images=images[:, :, :, ::-1])) > 10          # flipped
    assert difference(material, replace(batch, ids=np.array([1, 2, 3, 4]))) > 10            # other photographs
    assert difference(material, replace(batch, images=images[:, ::-1])) > 10                # blue for red
    parameters = batch.parameters.copy()
    parameters[:, 0] = 29 - parameters[:, 0]
    assert difference(material, replace(batch, parameters=parameters)) > 2         # another place
    for wrong in (images[:3], images.astype(np.float64), images.transpose(0, 2, 3, 1)):
        with pytest.raises(RuntimeError, match=r"first batch \(=\(.*\) float(32|64)\) must be \(4, 3, 227, 227\) float32"):
            difference(material, replace(batch, images=wrong))


@pytest.mark.parametrize("name", ["pil", "torch"])
def test_crop_functions_give_the_exact_pixels(work: Task, name: str) -> None:
    material, crop_of = Photographs(work, "original"), getattr(crops, f"crop_{name}")
    for id in (3, 6, 9):        # 333×250, 600×401, 96×500
        crop = crop_of(material.read(id), (5, 17))
        assert crop.shape == (CROP_PX, CROP_PX, 3) and crop.dtype == np.uint8
        apart = np.abs(crop.astype(int) - material.resized(id)[5:5 + CROP_PX, 17:17 + CROP_PX]).mean()
        assert apart < rounds.TOLERANCE


@pytest.mark.parametrize("name", ["pil", "torch"])
def test_boxes_of_the_peers_are_resized_exactly(work: Task, name: str) -> None:
    """Those that parameters name and those drawn from a seed; the check of the batch sees another box."""
    material = Photographs(replace(work, work="random_resized"), "original")
    parameters = np.array([[5, 9, 1, 40, 30, 0], [0, 0, 0, 0, 0, 8], [0, 0, 1, 0, 0, 9], [1, 2, 0, 200, 190, 0]], np.float32)
    cropper, ids = Cropper(material, name), np.array([3, 6, 9, 7])
    crops_ = np.stack([cropper(id, numbers) for id, numbers in zip(ids.tolist(), parameters.tolist())])
    batch = Normalize(material).batch(crops_, ids, parameters)
    assert batch.images.shape == (4, 3, 224, 224) and difference(material, batch) < rounds.TOLERANCE
    assert difference(material, replace(batch, parameters=parameters[:, [1, 0, 2, 3, 4, 5]] + 2)) > 3


def test_a_file_that_is_no_jpeg_is_decoded_too(work: Task) -> None:
    pytest.importorskip("simplejpeg")
    from PIL import Image
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), (1, 2, 3)).save(buffer, "PNG")
    assert (crops.decode(buffer.getvalue()) == (1, 2, 3)).all()
    assert resized_size((500, 375)) == (341, 256)


def test_resized_images_are_made_before_anybody_shares_them(work: Task) -> None:
    cropper = Cropper(Photographs(work, "original"), None)
    assert (work.scratch / "resized-original.npy").exists()
    crop = pickle.loads(pickle.dumps(cropper))(7, (3, 4))
    np.testing.assert_array_equal(crop, Photographs(work, "original").resized(7)[3:3 + CROP_PX, 4:4 + CROP_PX])


def test_shards_for_webdataset_hold_the_original_bytes(work: Task, index: SampleIndex) -> None:
    pytest.importorskip("webdataset")
    material = Photographs(work, "original")
    found = {}
    for path in material.shards():
        with tarfile.open(path) as tar:
            found.update({member.name: tar.extractfile(member).read() for member in tar})       # type: ignore[union-attr]
    assert sorted(found) == [f"{id:08d}.{kind}" for id in range(10) for kind in ("cls", "jpg")]
    for id in range(10):
        assert found[f"{id:08d}.jpg"] == index.read(id) and material.id_of(index.read(id)) == id
        assert found[f"{id:08d}.cls"] == str(id % 5).encode()
    with pytest.raises(NotAvailable, match="there are no packed shards"):
        Photographs(work, "packed").ids


# --- turns

def test_a_contender_is_checked_then_takes_its_turns_and_is_closed(monkeypatch: pytest.MonkeyPatch, work: Task) -> None:
    batch = exact(Photographs(work, "original"))
    closed: list[bool] = []

    def contend(running: Running) -> AbstractContextManager[tuple[Workload, float | None]]:
        monkeypatch.setitem(CONTENDERS, "made", Contender("made", "made", "original", "peer", lambda task: running))
        return rounds.started("made", work)

    with contend(Running(iter([batch] * 12), lambda batch: batch, lambda: closed.append(True))) as ready:
        turn, levels = rounds.take_turn(ready, 1e-9)
        assert levels is not None and levels < 1e-4 and turn.images == 8 and not closed
    assert closed == [True]
    wrong = replace(batch, parameters=batch.parameters + np.float32([0, 0, 0, 4, 4, 4]))
    with pytest.raises(RuntimeError, match="^first batch lies 4.00 grey levels from the exact pixels, more"):
        with contend(Running(iter([wrong]), lambda batch: batch, lambda: closed.append(True))):
            pass
    assert closed == [True, True]
    monkeypatch.setattr(rounds, "wait_idle", lambda limit: False)
    with pytest.raises(RuntimeError, match="^still busy 30 s after its turn, so that others cannot be timed$"):
        with contend(Running(iter([batch]), None)):
            pass


def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(NotAvailable, match="^no_such_package is not installed$"):
        need("no_such_package.part")
    assert need("json") is json


# --- figures

def made(name: str, *rates: float, reason: str = "") -> Result:
    return Result(CONTENDERS[name], tuple(Turn(int(rate), 1.0, rate / 500) for rate in rates), 0.1 if rates else None, reason)


FOUND = [made("archives", 900, 1000, 1200), made("pil", 400, 500, 480), made("torch", 800, 800, 800),
         made("decode", 2000, 2000, 1500), made("packed", 3000, 3300, 3100),
         made("packed_dataloader", 1000, 1000, 2000), made("packed_webdataset", 1550, 1550, 1550),
         made("resident", 9000, 9000, 9000), made("memmap", 4500, 4500, 4500),
         made("memmap_spdl", reason="spdl is not installed")]


def test_ratios_are_of_medians_against_the_best_that_ran() -> None:
    found = {(ratio.over, ratio.under): ratio for ratio in bench_report.ratios(FOUND)}
    best = found["archives", "torch"]
    assert best.value == Spread(1.25, 1.125, 1.5) and best.by_cpu == 1.0  # made up: each used 2 ms an image
    assert found["archives", "decode"].value.median == 0.5
    assert found["packed", "packed_webdataset"].value.median == 2.0 and ("packed", "packed_dataloader") not in found
    assert found["resident", "memmap"].value.median == 2.0  # the best that ran
    assert bench_report.ratios([made("pil", 1), made("archives", reason="no")]) == []


def test_json_table_and_plot_tell_the_same(tmp_path: Path) -> None:
    found = json.loads(json.dumps(bench_report.as_json(FOUND, {"date": "2012-12-03"})))
    assert found["date"] == "2012-12-03" and found["hardware"]["cores"] >= 1 and found["versions"]["torch"]
    side = found["sides"][0]
    assert side["images_per_s"] == {"median": 1000, "min": 900, "max": 1200} and side["cpu_ms_per_image"] == 2.0
    assert side["turns"][0] == {"images": 900, "seconds": 1.0, "cpu_s": 1.8} and side["ran"] and side["reason"] is None
    assert found["sides"][-1]["reason"] == "spdl is not installed" and found["sides"][-1]["turns"] == []
    assert {(r["over"], r["under"]) for r in found["ratios"]} == {
        ("archives", "torch"), ("archives", "decode"), ("packed", "packed_webdataset"), ("resident", "memmap")}
    text = io.StringIO()
    bench_report.show(FOUND, Console(file=text, width=160))
    table = text.getvalue()
    for words in ("1,000", "(900–1,200)", "spdl is not installed", "files of 256 px",
                  "ours, tier archives: 0.50 (0.45–0.80) of libjpeg-turbo, whole decode"):
        assert words in table
    work = {"work": {"workers": 2, "rounds": 3}}
    chart.draw(found | work, "source", tmp_path / "plot.png")
    from PIL import Image
    with Image.open(tmp_path / "plot.png") as image:
        assert image.size[0] > 800


def test_contenders_are_of_known_kinds() -> None:
    assert {contender.data for contender in CONTENDERS.values()} == set(KINDS)
    assert {contender.role for contender in CONTENDERS.values()} == {"ours", "peer", "limit"}


# --- the command

@pytest.mark.parametrize("words, message", [
    (["--rounds", "0"], "--rounds (=0) must be at least 1; "),
    (["--seconds", "0"], "--seconds (=0) must be a number above 0; "),
    (["--only", "archives,torchdata"], "contender (=torchdata) is unknown; contenders are archives, pil, "),
    (["MISSING", "--only", "pil"], "index (=MISSING) does not exist; ")])
def test_nonsense_is_refused(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "missing")
    assert bench.main([word.replace("MISSING", missing) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message.replace("MISSING", missing) in error and error.count("\n") == 1


def test_missing_packages_that_it_needs_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench.main([]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_packed_shards_of_other_photographs_are_refused(index: SampleIndex, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([str(index.path), "--only", "packed", "--batch", "4", "--packed", str(index.path)]) == 2
    assert f"--packed (={index.path}) must hold the photographs of {index.path}; give" in capsys.readouterr().err


def test_a_batch_larger_than_the_set_is_refused(index: SampleIndex, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([str(index.path), "--only", "pil"]) == 2
    assert capsys.readouterr().err == ("error: --batch (=64) must not exceed the 10 photographs; lower it, or give an index of "
                                       "more\n")


def test_synthetic_photographs_without_an_index(tmp_path: Path) -> None:
    drawn = SampleIndex.load(bench.synthetic_index(tmp_path, 4))
    sizes = drawn.samples[["width", "height"]]
    assert len(drawn.ids("train")) >= 4 and min(min(row) for row in sizes.tolist() if all(row)) >= 8


def test_ours_that_fails_ends_it_and_others_are_noted(monkeypatch: pytest.MonkeyPatch, work: Task) -> None:
    def failing(name: str, *given: object) -> None:
        raise RuntimeError(f"{name} failed: why")

    monkeypatch.setattr(rounds, "Workers", failing)
    found = rounds.measure(work, ["pil"], 1, 0.01)
    assert found[0].turns == () and found[0].reason == "contender pil failed: why"
    with pytest.raises(RuntimeError, match="contender archives failed: why"):
        rounds.measure(work, ["pil", "archives"], 1, 0.01)


def test_a_peer_that_fails_in_its_turn_is_noted_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, work: Task) -> None:
    """A corrupt image may come late: then the peer ends, and what it did before does not count."""
    class Contending:
        def __init__(self, name: str, *given: object) -> None:
            self.name, self.turns = name, 0

        def call(self, *given: object) -> list[tuple[Turn, float]]:
            self.turns += 1
            if self.name == failing and self.turns == 2:
                raise RuntimeError(f"{self.name} failed: sample 23 (=cut.JPEG) is cut")
            return [(Turn(4, 1.0, 1.0), 0.1)]

        def close(self) -> None:
            pass

    monkeypatch.setattr(rounds, "Workers", Contending)
    failing = "contender pil"
    peer, other, ours = rounds.measure(work, ["pil", "torch", "archives"], 3, 0.01)
    assert (peer.turns, peer.difference, peer.reason) == ((), None, "contender pil failed: sample 23 (=cut.JPEG) is cut")
    assert len(other.turns) == len(ours.turns) == 3 and not other.reason
    failing = "contender archives"
    with pytest.raises(RuntimeError, match="^contender archives failed: sample 23 "):
        rounds.measure(work, ["pil", "archives"], 3, 0.01)


def test_it_runs(index: SampleIndex, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Our tiers and PIL, one short turn each, in their processes; nothing is left running and nothing but lines is said."""
    sides = ["archives", "packed", "resident", "pil"]
    code = bench.main([str(index.path), "--only", ",".join(sides), "--rounds", "1", "--seconds", "0.01", "--batch", "4",
                       "--workers", "1", "--out", str(tmp_path / "found")])
    said = capfd.readouterr()
    assert code == 0, said.err
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert [side["name"] for side in found["sides"]] == sides and all(len(side["turns"]) == 1 for side in found["sides"])
    assert all(side["grey_levels_from_exact"] < 1 for side in found["sides"])
    assert found["work"]["photographs"] == 10 and found["command"].startswith("python -m tools.bench ")
    assert {(r["over"], r["under"]) for r in found["ratios"]} == {("archives", "pil")}
    assert (tmp_path / "found.png").exists() and "ours, tier resident" in said.out and "Traceback" not in said.err
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert process_tree(os.getpid()) == [os.getpid()] or all("resource_tracker" in words for words in left_running())


def left_running() -> list[str]:
    """Command lines of this process's children."""
    return [Path(f"/proc/{pid}/cmdline").read_text() for pid in process_tree(os.getpid())[1:]]
