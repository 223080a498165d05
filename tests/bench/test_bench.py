"""The comparison with other loaders: its check can fail, its figures add up, it says what does not run, and it runs."""
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pipeline.index.sample_index import SampleIndex
from pipeline.config import LoaderConfig
from pipeline.compute_stats import compute
from tests.helpers.small_set import photographs, write_set
from tools.bench import __main__ as bench
from tools.bench import contenders as bench_peers, report as bench_report, rounds as bench_turns, sides as bench_sides
from tools.bench.report import Result
from tools.bench.sides import BY_NAME, SIDES
from tools.bench.rounds import Turn
from tools.bench.workload import CROP_PX, Material, NotAvailable, Running, Told, Work, difference, need, resized_size


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    return write_set(tmp_path_factory.mktemp("set"), photographs(10))


@pytest.fixture(scope="module")
def work(index: SampleIndex, tmp_path_factory: pytest.TempPathFactory) -> Work:
    scratch = tmp_path_factory.mktemp("scratch")
    compute(index, "train", 256, machine=LoaderConfig(threads=1)).save(scratch / "stats.npz")
    return Work(index.path, None, scratch / "stats.npz", scratch, batch=4, workers=1)


# --- the check of a first batch

def exact(material: Material) -> Told:
    """A batch made as the check makes it."""
    draws = np.array([[0, 29, 0, 0, 0, 0], [29, 0, 1, 5, -3, 2], [14, 15, 1, 0, 0, 0], [3, 4, 0, 1, 1, 1]], np.float32)
    arithmetic = bench_peers.Arithmetic(material)
    crops = [material.square(id)[int(d[0]):int(d[0]) + CROP_PX, int(d[1]):int(d[1]) + CROP_PX] for id, d in enumerate(draws)]
    return arithmetic.batch(np.stack(crops), np.arange(4), draws)


def test_the_check_passes_what_is_right_and_fails_what_is_not(work: Work) -> None:
    material = Material(work, "original")
    told = exact(material)
    assert difference(material, told, 4) < 1e-4
    images = told.images.numpy()
    assert difference(material, replace(told, images=images[:, :, :, ::-1]), 4) > 10          # reflected
    assert difference(material, replace(told, ids=np.array([1, 2, 3, 4])), 4) > 10            # other photographs
    assert difference(material, replace(told, images=images[:, ::-1]), 4) > 10                # blue for red
    draws = told.draws.copy()
    draws[:, 0] = 29 - draws[:, 0]
    assert difference(material, replace(told, draws=draws), 4) > 2                            # another place
    for wrong in (images[:3], images.astype(np.float64), images.transpose(0, 2, 3, 1)):
        with pytest.raises(RuntimeError, match=r"first batch \(=\(.*\) float(32|64)\) must be \(4, 3, 227, 227\) float32"):
            difference(material, replace(told, images=wrong), 4)


@pytest.mark.parametrize("name", ["pil", "torch", "opencv"])
def test_cuts_give_the_exact_pixels(work: Work, name: str) -> None:
    for module in {"pil": [], "torch": ["simplejpeg"], "opencv": ["simplejpeg", "cv2"]}[name]:
        pytest.importorskip(module)
    material, cut = Material(work, "original"), getattr(bench_peers, f"cut_{name}")
    for id in (3, 6, 9):        # 333×250, 600×401, 96×500
        crop = cut(material.read(id), 5, 17)
        assert crop.shape == (CROP_PX, CROP_PX, 3) and crop.dtype == np.uint8
        apart = np.abs(crop.astype(int) - material.square(id)[5:5 + CROP_PX, 17:17 + CROP_PX]).mean()
        assert apart < BY_NAME[name].tolerance


def test_a_file_that_is_no_jpeg_is_decoded_too(work: Work) -> None:
    pytest.importorskip("simplejpeg")
    from PIL import Image
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), (1, 2, 3)).save(buffer, "PNG")
    assert (bench_peers.decode(buffer.getvalue()) == (1, 2, 3)).all()
    assert resized_size((500, 375)) == (341, 256)


def test_decoded_squares_are_made_before_anybody_shares_them(work: Work) -> None:
    import pickle
    cutter = bench_peers.Cutter(Material(work, "original"), None)
    cutter.open()
    assert (work.scratch / "squares-original.npy").exists()
    crop = pickle.loads(pickle.dumps(cutter))(7, 3, 4)
    np.testing.assert_array_equal(crop, Material(work, "original").square(7)[3:3 + CROP_PX, 4:4 + CROP_PX])


def test_shards_for_webdataset_hold_the_original_bytes(work: Work, index: SampleIndex) -> None:
    material = Material(work, "original")
    found = {}
    for path in material.shards():
        with tarfile.open(path) as tar:
            found.update({member.name: tar.extractfile(member).read() for member in tar})       # type: ignore[union-attr]
    assert sorted(found) == [f"{id:08d}.{kind}" for id in range(10) for kind in ("cls", "jpg")]
    for id in range(10):
        assert found[f"{id:08d}.jpg"] == index.read(id) and material.id_of(index.read(id)) == id
        assert found[f"{id:08d}.cls"] == str(id % 5).encode()
    with pytest.raises(NotAvailable, match="there are no packed shards"):
        Material(work, "packed").ids


# --- turns

def test_what_was_read_ahead_is_used_up_before_the_clock() -> None:
    taken = []

    def batches() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    turn = bench_turns.take_turn(batches(), 4, 7, 1e-9)
    assert taken == list(range(8)) and turn.images == 4 and turn.seconds > 0 and turn.cpu_s >= 0
    assert turn.rate == 4 / turn.seconds and turn.cpu_ms == 250 * turn.cpu_s


def test_cpu_time_of_processes_below_is_counted() -> None:
    busy = "import time, sys\nwhile time.process_time() < 0.3: pass\nprint(flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"\n"
    found = bench_turns.tree(os.getpid())
    assert found[0] == os.getpid() and child.pid in found
    assert 0.3 <= bench_turns.cpu_s([child.pid]) < 5
    bench_turns.rest(child.pid)
    child.communicate()
    assert bench_turns.cpu_s([child.pid]) == 0


def test_a_busy_side_is_not_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_turns, "_REST_S", 0.3)
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        with pytest.raises(RuntimeError, match=r"processes \[\d+\] are busy 0 s after their turn, so that others cannot"):
            bench_turns.rest(child.pid)
    finally:
        child.kill()
        child.wait()


class Pipe:
    """The other end of a side's pipe: asks for one turn and notes what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.asks: list[Any] = [(1, 1e-9), None]

    def send(self, told: Any) -> None:
        self.told.append(told)

    def recv(self) -> Any:
        return self.asks.pop(0)

    def close(self) -> None:
        self.told.append("closed")


def served(monkeypatch: pytest.MonkeyPatch, work: Work, start: Any) -> list[Any]:
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")       # put back afterwards
    monkeypatch.setitem(bench_sides.BY_NAME, "made", bench_sides.Side("made", "made", "original", "peer", start))
    pipe = Pipe()
    bench_turns.serve(pipe, "made", work)       # type: ignore[arg-type]
    return pipe.told


def test_a_side_is_checked_then_takes_its_turns_and_is_closed(monkeypatch: pytest.MonkeyPatch, work: Work) -> None:
    told = exact(Material(work, "original"))
    closed: list[bool] = []
    running = Running(iter([told] * 5), lambda batch: batch, lambda: closed.append(True))
    ready, turn, end = served(monkeypatch, work, lambda work: running)
    assert ready[0] == "ready" and ready[1] < 1e-4 and turn[0] == "turn" and turn[1].images == 4 and closed == [True]
    wrong = replace(told, draws=told.draws + np.float32([0, 0, 0, 4, 4, 4]))
    (failed, why), end = served(monkeypatch, work, lambda work: Running(iter([wrong]), lambda batch: batch))
    assert failed == "failed" and why.startswith("RuntimeError: first batch lies 4.00 grey levels from the exact pixels, more")

    def missing(work: Work) -> Running:
        raise NotAvailable("x is not installed")

    assert served(monkeypatch, work, missing) == [("not available", "x is not installed"), "closed"]


def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(NotAvailable, match="^no_such_package is not installed$"):
        need("no_such_package.part")
    assert need("json") is json


# --- figures

def made(name: str, *rates: float, reason: str = "") -> Result:
    return Result(BY_NAME[name], tuple(Turn(int(rate), 1.0, rate / 500) for rate in rates), 0.1 if rates else None, reason)


FOUND = [made("archives", 900, 1000, 1200), made("pil", 400, 500, 480), made("torch", 800, 800, 800),
         made("decode", 2000, 2000, 1500), made("packed", 3000, 3300, 3100),
         made("packed_dataloader", 1000, 1000, 2000), made("packed_spdl", 1550, 1550, 1550),
         made("resident", 9000, 9000, 9000), made("memmap", 4500, 4500, 4500),
         made("memmap_spdl", reason="spdl is not installed")]


def test_ratios_are_of_medians_against_the_best_that_ran() -> None:
    found = {(ratio.over, ratio.under): ratio for ratio in bench_report.ratios(FOUND)}
    best = found["archives", "torch"]
    assert (best.value, best.least, best.most, best.aim, best.met) == (1.25, 1.125, 1.5, 1.15, True)
    assert best.by_cpu == 1.0           # made up: each used 2 ms an image
    assert found["archives", "decode"].value == 0.5 and found["archives", "decode"].met is False
    assert found["packed", "archives"].value == 3.1 and found["packed", "archives"].least == 3100 / 1200
    peer = found["packed", "packed_spdl"]
    assert (peer.value, peer.aim, peer.met) == (2.0, None, None) and ("packed", "packed_dataloader") not in found
    assert found["resident", "packed"].value == 9000 / 3100 and found["resident", "packed"].met is False
    assert found["resident", "memmap"].value == 2.0         # the best that ran
    assert bench_report.ratios([made("pil", 1), made("archives", reason="no")]) == []


def test_json_table_and_plot_tell_the_same(tmp_path: Path) -> None:
    found = json.loads(json.dumps(bench_report.as_json(FOUND, {"date": "2012-12-03"})))
    assert found["date"] == "2012-12-03" and found["hardware"]["cores"] >= 1 and found["versions"]["torch"]
    side = found["sides"][0]
    assert side["images_per_s"] == {"median": 1000, "min": 900, "max": 1200} and side["cpu_ms_per_image"] == 2.0
    assert side["turns"][0] == {"images": 900, "seconds": 1.0, "cpu_s": 1.8} and side["ran"] and side["reason"] is None
    assert found["sides"][-1]["reason"] == "spdl is not installed" and found["sides"][-1]["turns"] == []
    assert {(r["over"], r["under"]) for r in found["ratios"]} >= {("archives", "torch"), ("resident", "memmap")}
    text = io.StringIO()
    bench_report.show(FOUND, Console(file=text, width=160))
    table = text.getvalue()
    for words in ("1,000", "(900–1,200)", "spdl is not installed", "missed", "met", "0.50", "2.7", "files of 256 px"):
        assert words in table
    bench_report.plot(FOUND, "title", tmp_path / "a" / "plot.png")
    from PIL import Image
    with Image.open(tmp_path / "a" / "plot.png") as image:
        assert image.size[0] > 800


def test_sides_have_names_of_their_own_and_known_kinds() -> None:
    assert len(BY_NAME) == len(SIDES) and {side.data for side in SIDES} == set(bench_sides.DATA)
    assert {side.role for side in SIDES} == {"ours", "peer", "limit"}


# --- the command

@pytest.mark.parametrize("words, message", [
    (["--rounds", "0"], "--rounds (=0) must be at least 1; leave it out for the default"),
    (["--seconds", "0"], "--seconds (=0.0) must be above 0; "),
    (["--only", "archives,torchdata"], "side (=torchdata) is unknown; sides are archives, pil, "),
    (["--only", "pil", "--without", "pil"], "--without (=pil) must leave a side; "),
    (["/nonexistent", "--only", "pil"], "index (=/nonexistent) does not exist; ")])
def test_nonsense_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_missing_packages_that_it_needs_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench.main([]) == 2
    assert "pip install -e '.[plots]'" in capsys.readouterr().err


def test_packed_shards_of_other_photographs_are_refused(index: SampleIndex, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([str(index.path), "--only", "packed", "--batch", "4", "--packed", str(index.path)]) == 2
    assert f"--packed (={index.path}) must hold the photographs of {index.path}; give" in capsys.readouterr().err


def test_a_batch_larger_than_the_set_is_refused(index: SampleIndex, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([str(index.path), "--only", "pil"]) == 2
    assert capsys.readouterr().err == ("error: --batch (=64) must not exceed the 10 photographs; lower it, or give an index of "
                                       "more\n")


def test_pictures_are_drawn_without_an_index(tmp_path: Path) -> None:
    drawn = SampleIndex.load(bench.drawn_index(tmp_path, 4))
    sizes = drawn.samples[["width", "height"]]
    assert len(drawn.ids("train")) >= 4 and min(min(row) for row in sizes.tolist() if all(row)) >= 8


def test_ours_that_fails_ends_it_and_others_are_noted(monkeypatch: pytest.MonkeyPatch, work: Work) -> None:
    class Failing:
        def __init__(self, name: str, work: Work) -> None:
            raise RuntimeError(f"side {name} failed: why")

    monkeypatch.setattr(bench_turns, "Player", Failing)
    found = bench.measure(work, ["pil"], 1, 0.01)
    assert found[0].turns == () and found[0].reason == "side pil failed: why"
    with pytest.raises(RuntimeError, match="side archives failed: why"):
        bench.measure(work, ["pil", "archives"], 1, 0.01)


def test_it_runs(index: SampleIndex, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Our tiers and PIL, one short turn each, in their processes; nothing is left running and nothing but lines is said."""
    sides = ["archives", "packed", "resident", "pil"]
    code = bench.main([str(index.path), "--only", ",".join(sides), "--rounds", "1", "--seconds", "0.01", "--batch", "4",
                       "--workers", "1", "--out", str(tmp_path / "found"), "--scratch", str(tmp_path)])
    said = capfd.readouterr()
    assert code == 0, said.err
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert [side["name"] for side in found["sides"]] == sides and all(len(side["turns"]) == 1 for side in found["sides"])
    assert all(side["grey_levels_from_exact"] < 1 for side in found["sides"])
    assert found["work"]["photographs"] == 10 and found["command"].startswith("python tools/bench/__main__.py ")
    assert {(r["over"], r["under"]) for r in found["ratios"]} == {("archives", "pil"), ("packed", "archives"),
                                                                  ("resident", "packed")}
    assert (tmp_path / "found.png").exists() and "ours, tier resident" in said.out and "Traceback" not in said.err
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert bench_turns.tree(os.getpid()) == [os.getpid()] or all("resource_tracker" in words for words in left_running())


def left_running() -> list[str]:
    """Command lines of this process's children."""
    return [Path(f"/proc/{pid}/cmdline").read_text() for pid in bench_turns.tree(os.getpid())[1:]]
