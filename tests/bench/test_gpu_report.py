"""tools/gpu_report.py at toy sizes on the CPU: stages give figures, one that fails is noted, the page shows all."""
from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tools import gpu_report
from tools.bench import gpu, gpu_data, gpu_loader, gpu_page
from tools.bench.gpu_data import Job
from train.main import main as train_main


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("report"), "cpu", True)


@pytest.fixture(scope="module")
def report(job: Job) -> dict[str, Any]:
    """A report of all stages but pytest's, run in this process."""
    with pytest.MonkeyPatch.context() as patch:  # here Triton's kernels would run in its interpreter, for minutes
        patch.setattr(gpu, "SWITCHES", gpu.SWITCHES | {"kernels": ("torch",)})
        stages = {name: {"seconds": 1.0, "error": None, "results": dict(getattr(module, name)(job))} for module, name in (
            (gpu_data, "data"), (gpu, "environment"), (gpu, "trace"), (gpu, "steps"), (gpu_loader, "decoder"),
            (gpu_loader, "tiers"))}
    stages["exact"] = {"seconds": 100.0, "error": "not done after 100 s", "results": {}}
    found = {"command": "c", "device": "cpu", "small": True, "started": "2012-12-03", "seconds": 9, "stages": stages}
    return dict(json.loads(json.dumps(found)))


def test_steps_tiers_and_decoders_have_their_figures(report: dict[str, Any]) -> None:
    found = {name: stage["results"] for name, stage in report["stages"].items()}
    assert found["data"]["420"]["images"] == found["data"]["packed"]["images"] == 20
    assert found["data"]["420"]["mean_bytes"] < found["data"]["444"]["mean_bytes"]
    assert all(found["environment"]["peaks"][name] > 0 for name in ("flop_s", "bytes_s", "host_to_device_bytes_s"))
    steps = found["steps"]["8"]
    assert steps["eager, torch"]["images_s"]["median"] > 0 < steps["plain PyTorch"]["p50_ms"] <= steps["plain PyTorch"]["p99_ms"]
    for name in ("captured, torch", "captured, torch, pooling apart", "captured, torch, tower halves"):
        assert "machine.step (=captured)" in steps[name]["error"] and name in found["trace"]
    layers = found["trace"]["eager, torch"]["layers"]
    assert {"conv1", "conv2", "conv3", "fc6", "fc7", "fc8"} <= layers.keys()
    for tier in ("archives, 420", "archives, 444", "packed", "resident in RAM"):
        one = found["tiers"][tier]
        assert one["alone"]["median"] > 0 and 0 <= one["stall"] < 1 and one["synchronisations"]["per_step"] is None
    assert len(found["decoder"]) == 8 and all(one["images_s"]["median"] > 0 for one in found["decoder"].values())


def test_the_log_names_the_decoder_of_each_image(report: dict[str, Any], job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DALI_NVIMGCODEC_LOG_LEVEL", "3")
    first = next(gpu_loader.ways(job, (0.65,)))
    monkeypatch.setattr(gpu_loader, "ways", lambda *given: [first])
    (name, one), = gpu_loader.smoke(job)
    assert name == "420, whole, fancy, load 0.65" and one["images"] == 8 and one["error"] is None
    assert one["decoders"].keys() == {"libjpeg_turbo_decoder"} and one["decoders"]["libjpeg_turbo_decoder"] % 8 == 0


def test_a_training_by_the_command(report: dict[str, Any], job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(words: list[str]) -> tuple[int, str]:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = train_main(words)
        return code, said.getvalue().strip().splitlines()[-1]

    monkeypatch.setattr(gpu_loader, "command", command)
    (_, training), = gpu_loader.trainings(job)
    assert training["steps"] == 1 and training["images_s"]["median"] > 0


def test_page_and_markdown(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(report))
    assert gpu_report.main(["--json", str(tmp_path / "r.json"), "--render", "--page", str(tmp_path / "p.html")]) == 0
    page, text = (path.read_text() for path in (tmp_path / "p.html", tmp_path / "p.md"))
    assert page.count("<figure>") == 4 and "<script" not in page
    for words in ("not done after 100 s", "no figure here means", "eager, torch", "resident in RAM",
                  "420, region, plain, load 0.65", "aten::"):
        assert words in page and words in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1
    assert gpu_report.main(["--json", str(tmp_path / "none.json"), "--render", "--page", str(tmp_path / "p.html")]) == 2


def test_a_cards_limit_and_its_share() -> None:
    peaks = {"flop_s": 790e12, "bytes_s": 4.3e12, "host_to_device_bytes_s": 5.5e10}
    step = {"images_s": {"median": 56_004.0, "least": 56_000.0, "most": 57_000.0}, "p50_ms": 4.0, "p99_ms": 4.04}
    report = {"small": False, "device": "cuda", "command": "c", "started": "", "seconds": 1, "stages": {
        "environment": {"seconds": 1, "error": None, "results": {"peaks": peaks}},
        "steps": {"seconds": 1, "error": None, "results": {"256": {"captured, triton": step}}}}}
    assert "| captured, triton | 256 | 56,004 (56,000–57,000) | 50% | – | 4.00 | 4.04 | 1.010 |" in gpu_page.markdown(report)


def test_a_stage_that_fails_or_takes_too_long_leaves_what_it_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.json"
    assert gpu_report.main(["--device", "cpu", "--json", str(out), "--only", "decoder", "environment"]) == 0
    found = json.loads(out.read_text())["stages"]
    assert found["environment"]["error"] is None and found["environment"]["results"]["card"] == {"name": "CPU"}
    assert found["decoder"]["error"].startswith("exit code 2: error: index (=") and found["decoder"]["results"] == {}
    late = gpu_report.run_stage("data", Job(tmp_path, "cpu", True), 0.3)
    assert late["error"] == "not done after 0 s" and late["results"] == {}
    assert gpu_report.main(["--device", "cpu", "--json", str(out), "--only", "data", "--seconds", "1"]) == 0
    assert json.loads(out.read_text())["stages"]["data"]["error"].startswith("not begun: ")
    capsys.readouterr()
    for words, message in ((["--seconds", "0"], "--seconds (=0) must be a number above 0"),
                           (["--render"], "--render needs --page")):
        assert gpu_report.main(["--json", str(out), *words]) == 2
        assert f"error: {message}" in capsys.readouterr().err


def test_the_stages_last_no_longer_than_they_are_given() -> None:
    before_the_tests = [limit_s for name, (_, limit_s) in gpu_report.STAGES.items()]
    assert sum(before_the_tests[:6]) < 560  # what is most valuable always gets its turn
