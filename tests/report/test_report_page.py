"""The page of a report: broken runs, mistakes, escaping, real runs, a real browser."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import pytest

from pipeline.files import file_sha256, json_line
from tests.conftest import TinySet
from tests.helpers.checkpoints import save
from tests.helpers.recipes import write_recipe
from tests.helpers.reports import PNG, checked, report, small, write_run
from tests.helpers.runs import here, inside
from train.evaluate.__main__ import main as evaluate_main
from train.report.compare import ensembles
from train.report.groups import group
from train.report.runs import NoRun, read_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return small(tmp_path_factory.mktemp("recipe"))


# --- broken runs

def cut(run: Path) -> None:
    (run / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes()[:-20])


def spoil(line: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        path = run / "metrics.jsonl"
        path.write_text(line + "\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    return change


@pytest.mark.parametrize("change, told", [
    (cut, "metrics.jsonl ends within a line: the run is writing it, or was killed"),
    (spoil("\x00\x80 rubbish"), "metrics.jsonl: 1 line cannot be read"),
    (spoil('[1]\n{"kind": "epoch", "epoch": "two"}\n{"kind": "test", "images": 0}\n' + "[" * 100_000),
     "metrics.jsonl: 2 lines cannot be read"),
    (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl is missing"),
    (lambda run: (run / "metrics.jsonl").write_bytes(b""), "no epoch yet"),
    (lambda run: (run / "versions.jsonl").unlink(), "versions.jsonl is missing"),
    (lambda run: ((run / "versions.jsonl").unlink(), (run / "versions.jsonl").mkdir()),
     "versions.jsonl cannot be read (Is a directory)"),
    (lambda run: (run / "versions.jsonl").write_text('{"git": 3, "command": "x", "time": "y", "torch": [1]}\n{"time": 1e300}\n'),
     "tested"),
    (lambda run: shutil.rmtree(run / "checkpoints"), "tested"),
    (lambda run: (run / "checkpoints" / "step-1").mkdir(), "tested"),
    (lambda run: (run / "evaluations" / "x").mkdir(parents=True), "evaluation"),
    (lambda run: (run / "evaluations").write_text("no folder"), ""),
    (spoil('{"kind": "epoch", "time": 1, "epoch": 7, "step": 1, "validation": [], "waited_for": 3, "lr": "high"}'), "tested"),
])
def test_broken_runs_are_shown_as_far_as_they_can_be(tmp_path: Path, base: dict[str, Any], change: Callable[[Path], None],
                                                     told: str) -> None:
    run = write_run(tmp_path / "run", base)
    change(run)
    assert told in checked(report(tmp_path / "r.html", run)[0]).text


def test_files_that_changed_since_they_were_written_are_named(tmp_path: Path, base: dict[str, Any]) -> None:
    """By one bit, or cut at the end of a line: what is shown is not taken for what was written."""
    run = write_run(tmp_path / "run", base)
    config, metrics, versions = (run / name for name in ("config.yaml", "metrics.jsonl", "versions.jsonl"))
    whole = b"".join(map(json_line, map(json.loads, metrics.read_bytes().splitlines())))
    start = json_line({**json.loads(versions.read_bytes()), "config_sha256": file_sha256(config)})
    metrics.write_bytes(whole)
    versions.write_bytes(start)
    saved = save(run / "checkpoints", 27, 0.5, metrics_bytes=len(whole))
    assert read_run(run).problems == ()
    state = saved / "state.json"
    for path, data, told in (
            (metrics, whole.replace(b'"top1": 0.4', b'"top1": 0.5'), "metrics.jsonl: 1 line cannot be read, or is damaged"),
            (metrics, whole[:whole.rfind(b"{")], "bytes that were written before the newest checkpoint"),
            (versions, start.replace(b'"torch": "2"', b'"torch": "3"'), "versions.jsonl: 1 line cannot be read, or is damaged"),
            (versions, b"", "versions.jsonl tells of no start"),
            (config, config.read_bytes().replace(b"0.01", b"0.11"), "config.yaml is not as the last start wrote it"),
            (state, state.read_bytes().replace(b"0.5", b"0.4"), "state.json) has SHA-256")):
        before = path.read_bytes()
        assert data != before
        path.write_bytes(data)
        assert any(told in problem for problem in read_run(run).problems), (told, read_run(run).problems)
        path.write_bytes(before)


def test_a_run_without_epochs_is_in_no_legend(tmp_path: Path, base: dict[str, Any]) -> None:
    runs = []
    for rate in (0.1, 0.2, 0.3):
        changed = copy.deepcopy(base)
        changed["optimizer"]["lr"] = rate
        runs.append(write_run(tmp_path / f"rate-{rate}", changed))
    cut_off = (runs[1] / "metrics.jsonl").read_text(encoding="utf-8").partition("\n")[0]
    (runs[1] / "metrics.jsonl").write_text(cut_off + "\n", encoding="utf-8")
    legends = report(tmp_path / "r.html", *runs)[0].split('<p class="legend">')[1:3]
    assert [[f"rate-{rate}" in legend.partition("</p>")[0] for rate in (0.1, 0.2, 0.3)] for legend in legends] == [[1, 0, 1]] * 2


def damaged_checkpoint(run: Path) -> None:
    path = run / "checkpoints" / "step-000000027-epoch-0003"
    path.mkdir()
    (path / "state.json").write_text('{"format": 1, "step": 27, "validation_error": 0.5, '
                                     '"loader": {"samples": 72, "images": "h"}}')
    (path / "manifest.json").write_text('{"format": 1, "files": {}}')


def test_a_damaged_checkpoint_costs_only_its_kernels(tmp_path: Path, base: dict[str, Any]) -> None:
    run = write_run(tmp_path / "run", base)
    damaged_checkpoint(run)
    page = checked(report(tmp_path / "r.html", run)[0])
    assert "run: kernels cannot be shown: checkpoint file (=" in page.text and "is not in the manifest" in page.text
    assert "Results on nowhere (6 classes, 72 training images)" in page.tables, "the checkpoint knows the number exactly"


@pytest.mark.parametrize("text", ["", "a: 1", "data: [1", "\x00", "train: {epochs: 1}\ntrain: {epochs: 1}",
                                  "{data: {}, model: {}, optimizer: {}, schedule: {}, train: {epochs: x, seed: 1}}"])
def test_what_is_no_run_is_left_out_by_name(tmp_path: Path, base: dict[str, Any], text: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(NoRun, match=r"run \(=.*other\) has a config.yaml that .*; "):
        read_run(other)
    (other / "config.yaml").unlink()
    (other / "config.yaml").mkdir()  # what the system says of it has the remedy of that
    with pytest.raises(NoRun, match=r"folder \(=.*config.yaml\) is a folder, not a file; give a file"):
        read_run(other)
    (other / "config.yaml").rmdir()
    (other / "config.yaml").write_text(text, encoding="utf-8")
    (other / "manifest.json").write_text("{}", encoding="utf-8")
    with pytest.raises(NoRun, match=r"run \(=.*other\) is a checkpoint or an exported network; name run folders"):
        read_run(other)
    page, said = report(tmp_path / "r.html", write_run(tmp_path / "run", base), other)
    assert "warning: run (=" in said and "left out: run (=" in checked(page).text
    assert "error: run (=" in report(tmp_path / "r.html", other, code=2)[1]


def test_mistakes_are_one_line_and_leave_the_old_page(tmp_path: Path, base: dict[str, Any]) -> None:
    run, out = write_run(tmp_path / "run", base), tmp_path / "r.html"
    out.write_text("old", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    for words, told in (((tmp_path / "none",), "does not exist; give a run folder, such as runs/demo"),
                        ((tmp_path / "empty",), "holds no config.yaml; name run folders"),
                        ((out,), "is not a folder; name run folders")):
        said = report(out, *words, code=2)[1]
        assert said.startswith("error: ") and told in said and said.count("\n") == 1, said
        assert out.read_text(encoding="utf-8") == "old"
    assert "is a folder; name a file in it" in report(tmp_path, run, code=2)[1]
    report(out, run, run, tmp_path / "run" / ".." / "run", tmp_path)  # the last is the folder of this run
    assert out.read_text(encoding="utf-8") != "old" and not list(tmp_path.glob(".*.tmp"))
    assert read_run(run).name == "run" and ">1 run, of 1 recipe; made " in out.read_text(encoding="utf-8"), "each run once"


def test_help_imports_neither_torch_nor_matplotlib() -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "train.report", "--help"], cwd=ROOT, capture_output=True,
                          text=True)
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "import time:" in line}
    assert done.returncode == 0 and "RUN" in done.stdout and "argparse" in imported
    assert not imported & {"torch", "nvidia.dali", "scipy", "matplotlib", "yaml"}


def test_a_page_needs_no_matplotlib(tmp_path: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "<svg" in report(tmp_path / "r.html", write_run(tmp_path / "run", base))[0]


# --- the page

NASTY = "<script>alert(1)<!-- & \"quoted\" 'x' $\\frac{ </style> _"


def test_everything_is_escaped(tmp_path: Path, base: dict[str, Any]) -> None:
    config = copy.deepcopy(base)
    config["data"]["index"] = "/indexes/<b>bold</b>&amp;"
    config["data"]["test_split"] = "<img src=x onerror=alert(1)>"
    first = write_run(tmp_path / NASTY.replace("/", ""), config)
    other = copy.deepcopy(config)
    other["optimizer"]["lr"] = 0.5
    second = write_run(tmp_path / "_$$</svg>", other)
    third = write_run(tmp_path / os.fsdecode(b"bytes-\xff\xfe"), base, 3)
    start = json.loads((first / "versions.jsonl").read_text())
    start |= {"device": "<i>gpu</i>", "git": {"commit": "<u>"}, "command": ["<s>"]}
    (first / "versions.jsonl").write_text(json.dumps(start) + "\n")
    page = report(tmp_path / "r.html", first, second, third)[0]
    found = checked(page)
    assert not found.tags & {"i", "u", "s"} and "<b>bold" not in page
    for shown in (NASTY.replace("/", ""), "<i>gpu</i>", "<u>"):
        assert shown in found.text, shown


def test_the_page_shows_all_there_is(tmp_path: Path, base: dict[str, Any]) -> None:
    run = write_run(tmp_path / "run", base)
    page = report(tmp_path / "r.html", run)[0]
    found = checked(page)
    for shown in ("c" * 40, "i" * 64, "s" * 64, "f" * 64, "validation_split: val", "cpu", "2027-01-15 08:00 UTC"):
        assert shown in found.text, shown
    for shown in ("loss", "err@1, %", "learning rate", "data wait, % of time"):
        assert f'role="img" aria-label="{shown} by epoch"' in page, shown
    assert "<title>epoch 2\ntrain: 70%\nvalidation: 60%</title>" in page and "decode: 3%" in found.text


def test_a_run_in_its_first_epoch_says_so(tmp_path: Path, base: dict[str, Any]) -> None:
    page = report(tmp_path / "r.html", write_run(tmp_path / "run", base, errors=(), test=None))[0]
    assert "in its first epoch" in checked(page).text and "nothing is trained yet" in page and "<svg" not in page


# --- real runs

@pytest.fixture(scope="module")
def trained(tiny_set: TinySet, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds of one epoch, each with a saved test."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder, tiny_set.index, epochs="  epochs: 1", test_views="  test_views: 1")
    for seed in (1, 2):
        here(recipe, folder, f"--train.seed={seed}", f"--machine.name=tiny-s{seed}")
    runs = [folder / "tiny-s1", folder / "tiny-s2"]
    inside(evaluate_main, ["--checkpoints", *map(str, runs), "--views", "10"], 0)
    return runs


def test_real_runs_with_kernels_and_their_average(tmp_path: Path, tiny_set: TinySet, trained: list[Path]) -> None:
    page = report(tmp_path / "r.html", *trained)[0]
    found = checked(page)
    assert page.count('alt="8 kernels of conv1" src="data:image/png;base64,iVBORw0KGgo') == 1
    assert f"tiny, seed {1 if 'tiny, seed 1, step' in found.text else 2}, step-" in found.text and "tower a above" in found.text
    plain, averaged = found.rows(f"Results on index (6 classes, {tiny_set.train} training images)")
    assert plain["recipe"] == "tiny at chance" and averaged["recipe"] == "tiny, 2 networks averaged"
    assert averaged["test"] == "10 crops"
    one, problems = ensembles(group([read_run(run) for run in trained]))
    assert not problems and one[0].members == 2 and averaged["test err@1, %"] == f"{100 * one[0].top1:.2f}"
    rows = {row["change"]: row for row in found.rows("Changes to the network")}
    assert rows["2 networks averaged (tiny)"]["paper top-1, points"] == "−2.56"


def test_the_average_is_the_one_of_evaluate(trained: list[Path]) -> None:
    out, _ = inside(evaluate_main, ["--checkpoints", *map(str, trained), "--views", "10", "--json"], 0)
    told = json.loads(out)["ensemble"]
    one, = ensembles(group([read_run(run) for run in trained]))[0]
    assert (one.top1, one.top5) == (told["top1"], told["top5"])


def test_a_damaged_evaluation_is_named(tmp_path: Path, trained: list[Path]) -> None:
    run = shutil.copytree(trained[0], tmp_path / "copy")
    file = next((run / "evaluations").glob("*/probabilities.npy"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "probabilities.npy) has SHA-256 " in checked(report(tmp_path / "r.html", run)[0]).text


def test_kernels_have_the_stored_shape(trained: list[Path]) -> None:
    from train.figures.kernels import conv1, png, sheet

    weights, towers = conv1(sorted((trained[0] / "checkpoints").glob("step-*"))[-1])
    assert weights.shape == (8, 3, 11, 11) and towers == 2 and np.isfinite(weights).all() and weights.std() > 0
    assert png(sheet(weights, towers)).startswith(PNG)


# --- a browser

PROBE = """<script>
for (const part of document.querySelectorAll("details")) part.open = true;
const wide = [...document.querySelectorAll("body *")].filter(
  e => !e.closest(".scroll, pre, svg") && e.getBoundingClientRect().right > innerWidth + 0.5);
parent.postMessage({width: innerWidth, scroll: document.documentElement.scrollWidth,
  wide: wide.map(e => e.outerHTML.slice(0, 80)),
  resources: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
  broken: [...document.images].filter(e => !e.naturalWidth).length, images: document.images.length,
  charts: [...document.querySelectorAll(".chart > svg")].map(e => e.getBoundingClientRect().width),
  boxes: [...document.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth).length,
  ink: getComputedStyle(document.body).color, back: getComputedStyle(document.body).backgroundColor}, "*");
</script></body>"""
FRAME = """<!DOCTYPE html><title>frame</title><body><script>
onmessage = event => document.body.dataset.found = JSON.stringify(event.data);
</script><iframe src="page.html" style="border:0;width:%dpx;height:800px"></iframe>"""


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    return found


def browse(chromium: str, folder: Path, page: str, width: int) -> dict[str, Any]:
    """What a page looks like in a window of this width, all details open; fails on anything that its console says."""
    folder.mkdir()
    allowed = page.replace("style-src 'unsafe-inline'", "style-src 'unsafe-inline'; script-src 'unsafe-inline'")  # for the probe
    (folder / "page.html").write_text(allowed.replace("</body>", PROBE), encoding="utf-8")
    (folder / "frame.html").write_text(FRAME % width, encoding="utf-8")
    done = subprocess.run([chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                           "--disable-background-networking", "--disable-component-update", "--disable-sync",
                           "--enable-logging=stderr", "--virtual-time-budget=3000", "--hide-scrollbars",
                           "--window-size=1280,900", f"--user-data-dir={folder / 'profile'}", "--dump-dom",
                           (folder / "frame.html").as_uri()], capture_output=True, text=True, timeout=100)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert done.returncode == 0 and not said, done.stderr
    assert 'data-found="' in done.stdout, done.stdout[:2000] + done.stderr
    seen: dict[str, Any] = json.loads(unescape(done.stdout.split('data-found="')[1].split('"')[0]))
    return seen


@pytest.fixture(scope="module")
def full_page(tmp_path_factory: pytest.TempPathFactory, trained: list[Path], base: dict[str, Any]) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("full")
    other = copy.deepcopy(base)
    other["model"]["lrn"] = None
    runs = [write_run(folder / ("a_name_that_is_rather_long_and_has_no_blanks" + "x" * 60), base),
            write_run(folder / "no_lrn", other)]
    yield report(folder / "r.html", *trained, *runs)[0]


@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_browser(tmp_path: Path, chromium: str, full_page: str, width: int) -> None:
    seen = browse(chromium, tmp_path / "b", full_page, width)
    assert seen["width"] == width and seen["scroll"] == width and seen["wide"] == [], "the page scrolls sideways"
    assert seen["resources"] == [] and seen["broken"] == 0 and seen["images"] >= 1
    assert len(seen["charts"]) >= 7 and min(seen["charts"]) > 250 and max(seen["charts"]) <= width
    assert (seen["ink"], seen["back"]) == ("rgb(27, 28, 29)", "rgb(255, 255, 255)")
    assert width > 390 or seen["boxes"] >= 3, "tables scroll in their own boxes"


def test_the_browser_would_find_what_is_wrong(tmp_path: Path, chromium: str, full_page: str) -> None:
    """The probes above see an overflow, a request and a script that the policy stops."""
    wide = full_page.replace("<main>", '<main><div style="width:700px">wide</div>')
    assert browse(chromium, tmp_path / "wide", wide, 390)["scroll"] > 390
    with pytest.raises(AssertionError, match="Content Security Policy"):
        browse(chromium, tmp_path / "load", full_page.replace("<main>", '<main><img alt="" src="http://192.0.2.1/x.png">'), 390)
