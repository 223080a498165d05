"""tools/profile_pipeline.py: a whole profile of the small set, its files, its exit codes, its errors."""
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import LoaderConfig
from tools.profile.measure import Figures
from pipeline.monitor import Event
from tools.profile.verdict import Measured, Setup, verdict
from tests.conftest import TinySet
from tests.helpers.recipes import write_recipe
from tools import profile_pipeline
from tools.profile import report as profile_report
from tools.profile.report import Profile

SHORT = ["--seconds", "0.02", "--repeats", "1"]


def profile(**more: Any) -> Profile:
    stages = tuple(Figures(name, (rate, rate * 1.2), (cpu,), 2, size) for name, rate, cpu, size in (
        ("crc", 9e4, 0.01, 0.0), ("read", 8e4, 0.01, 1e5), ("decode", 900, 1.0, 1e5), ("normalize", 9e3, 0.1, 0.0)))
    whole = Figures("loader", (700.0, 800.0), (1.2,), 2, 0.0, (60.0, 70.0, 80.0, 99.0), 0.99,
                    {"read": 0.0, "decode": 0.9, "normalize": 0.1, "copy": 0.0})
    measured = Measured(stages, whole, 1000.0, Figures("together", (690.0,), (1.2,), waited=0.3, causes={"decode": 1.0}))
    setup = Setup("archives", LoaderConfig(threads=2), 2, False, 300, 256, True, 25 << 30)
    return Profile("a set", 64, measured, setup, verdict(measured, setup), stages[:3], need_from="as stated", **more)


def test_a_whole_profile(tiny_set: TinySet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, tiny_set.index)
    out = {name: tmp_path / "out" / f"p.{name}" for name in ("json", "trace")}
    code = profile_pipeline.main(["--config", str(recipe), "--model", "--cold", "--machine.device=cpu", *SHORT,
                                  "--fail-below", "1e-9", "--json", str(out["json"]), "--trace", str(out["trace"])])
    said = capsys.readouterr()
    assert code == 0, said.err
    for words in ("stages, each alone", "CPU ms an image: the stages", "end to end", "start-up included", "headroom",
                  "host ceiling:", "together:", "verdict:", "advice, to paste into the recipe:"):
        assert words in said.out
    found = json.loads(out["json"].read_text())
    assert [stage["name"] for stage in found["stages"]] == ["read", "crc", "decode", "normalize", "hand-over"]
    assert [stage["name"] for stage in found["cumulative"]] == ["read", "crc", "decode", "normalize"]
    assert found["cpu_ms"]["remainder"] == pytest.approx(found["cpu_ms"]["loader"] - found["cpu_ms"]["stages"])
    assert found["need"] > 0 and found["met"] == pytest.approx(found["together"]["rate"] / found["need"])
    assert found["headroom"] == pytest.approx(found["loader"]["rate"] / found["need"]) and found["batch"] == 8
    host = found["host"]
    assert host["ceiling"] == pytest.approx(1e6 / (host["cpu_us"] - host["bytes_us"] - host["dali_us"]))
    assert host["dali_us"] > 0 and 0 < host["ceiling"] < 1e6
    assert found["verdict"]["sentence"] in " ".join(said.out.split())
    assert isinstance(yaml.safe_load(found["verdict"]["advice_yaml"]), dict | None)
    events = json.loads(out["trace"].read_text())["traceEvents"]
    assert {"read", "decode", "normalize", "copy", "wait"} <= {event["name"] for event in events if event["ph"] == "X"}


def test_exit_code_1_when_the_loader_cannot_feed_the_need(tiny_set: TinySet, tmp_path: Path,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, tiny_set.index)
    with recipe.open("a", encoding="utf-8") as file:
        file.write(f"  resident_folder: {tmp_path / 'squares'}\n")
    code = profile_pipeline.main(["--config", str(recipe), "--need", "1e9", "--fail-below", "0.99", "--batch", "4",
                                  "--machine.threads=1", "--tier", "resident", *SHORT])
    said = capsys.readouterr()
    assert code == 1 and "below --fail-below (=0.99)" in said.err and "tier resident" in said.out and "limits" in said.out


@pytest.mark.parametrize(("arguments", "said"), [
    ([], "RECIPE (=none) must be given, or --index INDEX"),
    (["--index", "x", "--fail-below", "0.9"], "--fail-below (=0.9) needs a need to compare with"),
    (["--index", "x", "--machine.prefetch=0"], "machine.prefetch (=0) must be at least 1"),
    (["--index", "x", "--threads", "2"], "--threads"),
    (["--index", "x", "--need", "-5"], "--need (=-5) must be a number above 0"),
    (["--index", "x", "--seconds", "nan"], "--seconds (=nan) must be a number above 0"),
    (["--index", "nowhere"], "does not exist; make one with `alexnet index build`"),
    (["--config", "nowhere.yaml"], "nowhere.yaml"),
])
def test_mistakes(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile_pipeline.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_mistakes_about_the_data(tiny_set: TinySet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(write_recipe(tmp_path, tiny_set.index))
    assert profile_pipeline.main(["--config", recipe, "--tier", "packed"]) == 2
    assert "tier (=packed) needs packed images" in capsys.readouterr().err


def test_help_loads_neither_torch_nor_dali() -> None:
    done = subprocess.run([sys.executable, "tools/profile_pipeline.py", "--help"], capture_output=True, text=True, timeout=60,
                          cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == 0 and "--fail-below" in done.stdout and "130 Ctrl-C" in " ".join(done.stdout.split())
    heavy = subprocess.run([sys.executable, "-c", "import sys; from tools import profile_pipeline as p; p.parser(); "
                            "print([m for m in ('torch', 'nvidia.dali', 'matplotlib', 'rich') if m in sys.modules])"],
                           capture_output=True, text=True, timeout=60, cwd=Path(__file__).resolve().parents[2])
    assert heavy.stdout.strip() == "[]"


# The report

def test_trace_is_of_the_trace_event_format() -> None:
    events = [Event("decode", "loader", 10.5, 10.75, 1), Event("read", "reader_0", 10.25, 10.5, 0),
              Event("read", "reader_1", 10.3, 10.4, 1)]
    made = json.loads(json.dumps(profile_report.trace(events)))
    assert made["displayTimeUnit"] == "ms"
    tracks = {line["tid"]: line["args"]["name"] for line in made["traceEvents"] if line["name"] == "thread_name"}
    assert sorted(tracks.values()) == ["loader", "reader_0", "reader_1"]
    complete = [line for line in made["traceEvents"] if line["ph"] == "X"]
    assert [line["ts"] for line in complete] == sorted(line["ts"] for line in complete) and complete[0]["ts"] == 0
    for line in complete:
        assert line.keys() == {"name", "cat", "ph", "ts", "dur", "pid", "tid", "args"} and line["tid"] in tracks
    decode = next(line for line in complete if line["name"] == "decode")
    assert (decode["ts"], decode["dur"], decode["args"], tracks[decode["tid"]]) == (
        pytest.approx(0.25e6), pytest.approx(0.25e6), {"step": 1}, "loader")


def test_tables_say_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    profile_report.show(profile(cold_note="1 file, 3 MB dropped", cold=profile().measured.loader), sys.stdout)
    said = " ".join(capsys.readouterr().out.split())
    for words in ("80,000…96,000", "700…800", "stages 1.120, end to end 1.200, remainder +0.080", "cold: 1 file, 3 MB dropped",
                  "headroom 0.75×", "(690…690), 0.69 of the need; stall 30.0%", "decode limits", "tier: packed"):
        assert words in said, words


def test_tables_keep_their_figures_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    profile_report.show(profile(), screen := Terminal())
    tables = screen.getvalue().partition("need:")[0]
    assert "80,000…96,000" in tables and "700…800" in tables and max(map(len, tables.splitlines())) <= 80
    assert "decode 90%, normalize 10%\n" in tables


def test_met_is_the_share_of_the_need() -> None:
    assert profile().measured.met == pytest.approx(0.69)
