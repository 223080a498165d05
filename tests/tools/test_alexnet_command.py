"""The command alexnet: help, shared rules, former spellings, mistakes in one line; installed, beside a user's modules."""
from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.recipes import write_recipe
from tests.helpers.small_set import encode, picture
from tools import alexnet, doctor
from train import main as train_main
from train.cli import Parser, nearest
from train.recipe import keys

ROOT = Path(__file__).resolve().parents[2]


def parser_of(verb: str) -> Parser:
    """The command line of a verb, as `alexnet VERB --help` shows it."""
    found: Parser = importlib.import_module(alexnet.VERBS[verb][0]).parser(f"alexnet {verb}")
    return found


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its verbs."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers(inner)


@pytest.mark.parametrize("verb", alexnet.VERBS)
def test_every_help_has_the_same_shape(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name, an example, every default; --out, --json, --device, --which and --jobs look alike."""
    monkeypatch.setenv("COLUMNS", "80")
    for parser in parsers(parser_of(verb)):
        text = parser.format_help()
        assert text.startswith(f"usage: alexnet {verb}") and f"alexnet {verb}" in text.partition("\nexample")[2], text
        for action in parser._actions:
            options, help = action.option_strings, " ".join((action.help or "").split())
            if action.help == argparse.SUPPRESS or isinstance(action, argparse._SubParsersAction):
                continue
            if options and action.default not in (None, False, []) and action.dest != "help":
                assert "(default:" in " ".join(text.split()), (options, text)
            assert help, f"{options or action.dest} of {verb} says nothing"
            assert ("-o" in options) == ("--out" in options) and "--threads" not in options
            if "--json" in options and verb != "index":
                assert action.nargs == "?" and str(action.const) == "-"
            if "--which" in options:
                assert "(default: last)" in help


def test_the_help_of_train_is_one_screen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert alexnet.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 40 and "--help-config" in text and "docs/configuration.md" in text
    assert all(len(line) <= 80 for line in text.splitlines() if "alexnet train" not in line), text
    assert alexnet.main(["train", "--help-config"]) == 0
    text = capsys.readouterr().out
    assert "train.epochs  integer, must be stated\n    passes over the training split" in text
    assert "machine.prefetch  integer, default 2" in text and "model.lrn.k  number, must be stated" in text


def test_every_key_has_a_meaning() -> None:
    silent = [key.name for key in keys.keys() if not key.about]
    assert [name for name in silent if name.count(".") == 1 and not name.startswith("model.lrn")] == []


def test_recipes_are_listed_and_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # as `make demo` leaves it: no recipe
    assert alexnet.main(["train", "--list"]) == 0
    listed = capsys.readouterr().out
    assert len(listed.splitlines()) == len(list((ROOT / "train/recipes").glob("*.yaml"))) and "\ndemo " in listed
    assert alexnet.main(["train"]) == 2
    said = capsys.readouterr()
    assert said.out == listed and said.err == (
        "error: RECIPE (=none) must be given, such as demo; `alexnet train --list` lists what comes with this program\n")
    (tmp_path / "mine.yaml").write_text("extends: demo\ntrain: {epochs: 7}\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        alexnet.main(["train", "mine.yaml", "--print-config"])
    assert "epochs: 7" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [
    ("demo --train.epoch=3", "--train.epoch (=3) is no option; did you mean --train.epochs?"),
    ("demo --epoch=3", "--epoch (=3) is no option; did you mean --train.epochs?"),
    ("demo --lr=3", "--lr (=3) is no option; did you mean --optimizer.lr?"),
    ("demo --train.epochs=many", "train.epochs (=many on the command line) must be a whole number; correct it"),
    ("demo --optimizer.lr=fast", "optimizer.lr (=fast on the command line) must be a number; correct it"),
    ("demo --machine.device=gpu", "machine.device (=gpu) must be auto, cpu, cuda or cuda:N; correct it"),
    ("demo --data.index=nowhere", "index (=nowhere) does not exist; make one with `alexnet index build`"),
    ("dmo", "recipe (=dmo) does not exist; did you mean demo?"),
    ("train/recipes/dem.yaml", "recipe (=train/recipes/dem.yaml) does not exist; did you mean demo?"),
    (".", "recipe (=.) is no file; give a YAML file, or one of alexnet_"),
    ("empty.yaml", "recipe (=empty.yaml) is empty; begin with a line such as extends: demo, then what differs"),
    ("broken.yaml", "recipe (=broken.yaml) is no YAML: while parsing a flow sequence (line 2) did not find expected ',' or ']' "),
    ("british.yaml", "optimiser (={'lr': 0.1} in british.yaml, line 2) is no key that is known; did you mean optimizer?"),
    ("worded.yaml", "optimizer.lr (=fast in worded.yaml, line 3) must be a number; correct it"),
    ("demo tiny100", "recipe (=tiny100) is a second one beside demo; to lay it over that, write --config tiny100"),
    ("demo --resum", "--resum (=none) is no option; did you mean --resume?"),
])
def test_mistakes_of_train_are_one_line(words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("empty", "# nothing\n"), ("broken", "train:\n  epochs: [1\nx: 3\n"),
                       ("british", "extends: demo\noptimiser: {lr: 0.1}\n"),
                       ("worded", "extends: demo\noptimizer:\n  lr: fast\n")):
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    assert alexnet.main(["train", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_torchrun_reports_a_mistake_also_of_a_process_that_prints_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                       capsys: pytest.CaptureFixture[str]) -> None:
    """torchrun ends the process that prints when another has ended first."""
    report = tmp_path / "error.json"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    assert alexnet.main(["train", "demo", "--train.epoch=3"]) == 2 and capsys.readouterr().err == ""
    assert json.loads(report.read_text())["message"] == "--train.epoch (=3) is no option; did you mean --train.epochs?"


@pytest.mark.parametrize(("words", "message"), [
    ("trian", "verb (=trian) is none; did you mean train?"),
    ("index inf x", "VERB (=inf) must be one of build, subset, info, verify, ls, cat; did you mean info?"),
    ("index build photos -o x", "PRESET (=photos) must be one of ilsvrc2012, ilsvrc2010, fall2011, classes, webdataset; correct "
     "it; for a folder of classes: `alexnet index build classes FOLDER -o INDEX`"),
    ("eval", "RUN (=none) must be given; see alexnet eval --help"),
    ("eval runs/frist", "RUN (=runs/frist) does not exist; did you mean runs/first?"),
    ("eval x --vews 10", "--vews (=none) is no option; did you mean --views?"),
    ("eval x --views 5", "--views (=5) must be one of 1, 10; correct it"),
    ("eval x --batch many", "--batch (=many) must be a whole number; correct it"),
    ("eval x --device gpu", "--device (=gpu) must be auto, cpu, cuda or cuda:N; correct it"),
    ("stats x --device=cuda:99", "index (=x) does not exist"),
    ("stats x y", "argument (=y) is one too many; see alexnet stats --help"),
    ("pack x", "--out (=none) must name one folder for the shards; write pack INDEX -o FOLDER"),
    ("report x -o", "-o/--out (=none) must have a value (expected one argument); see alexnet report --help"),
    ("profile demo --threads 2", "--threads (=none) is no option; did you mean --"),
    ("study tiny5", "study (=tiny5) does not exist; did you mean tiny50?"),
])
def test_mistakes_of_other_verbs_are_one_line(words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/first").mkdir(parents=True)
    assert alexnet.main(words.split()) == 2
    error = capsys.readouterr().err
    assert f"error: {message}" in error.replace(f"{tmp_path}/", "") and error.count("\n") == 1


def test_what_was_typed_before_is_still_taken() -> None:
    def parsed(verb: str, words: str) -> argparse.Namespace:
        return parser_of(verb).parse_args(words.split())

    assert parsed("eval", "--run a b --save c --views 10") == parsed("eval", "a b -o c --views 10")
    assert parsed("eval", "--checkpoint=a --json") == parsed("eval", "--json a")
    assert str(parsed("eval", "--json s.json a").json) == "s.json" and str(parsed("eval", "--json - a").json) == "-"
    assert parsed("stats", "x --threads 3 --device 1") == parsed("stats", "x --jobs 3 --device cuda:1")
    assert parsed("show", "kernels --run a --out b.png") == parsed("show", "kernels a -o b.png")
    assert parsed("study", "s.yaml --runs there") == parsed("study", "s.yaml -o there")
    assert parsed("index", "info --json x") == parsed("index", "info x --json")
    settings = parser_of("profile").parse_settings("--config demo --machine.threads 4 --model --data.tier=packed".split())
    assert settings[0].recipe == "demo" and settings[1] == ["--machine.threads=4", "--data.tier=packed"]


def test_json_goes_to_stdout_or_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert alexnet.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["works"] is True
    assert alexnet.main(["doctor", "--json", str(tmp_path / "new" / "d.json")]) == 0
    assert json.loads((tmp_path / "new" / "d.json").read_text())["works"] is True
    assert "training would work" in capsys.readouterr().out


def test_nearest() -> None:
    assert nearest("train.epoch", ["schedule.milestones.epoch", "train.epochs"]) == "did you mean train.epochs?"
    assert nearest("optimizer.epochs", ["train.epochs"]) == "did you mean train.epochs?" and nearest("xyz", ["train"]) == ""
    with pytest.raises(ValueError, match=r"argument \(= \) is one too many; see p --help"):
        Parser(prog="p").parse_args([" "])
    with pytest.raises(ValueError, match=r"argument \(=b\) is one too many; see p --help"):
        Parser(prog="p").parse_args(["b"])


# --- doctor

def findings(found: Iterator[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in found}


def test_doctor_without_torch_or_dali(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert alexnet.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "✗  torch" in said.replace("✗ ", "✗  ").replace("✗   ", "✗  ") and "✗" in said and "cannot be imported" in said
    assert "pip install --force-reinstall torch" in said and "training would not work here; mend what is marked ✗" in said
    monkeypatch.setattr(doctor, "version", lambda name: "")
    found = findings(iter([*doctor.dali(), *doctor.gpus()]))
    assert all(finding.kind == "error" and finding.value == "not installed" for finding in found.values()) and len(found) == 2
    assert found["torch"].advice == "pip install torch, or pip install -e . for all of it"


def test_doctor_sees_a_cpu_build_beside_a_driver(tmp_path: Path) -> None:
    assert findings(doctor.gpus(tmp_path))["driver"].value == "no NVIDIA driver"
    path = tmp_path / "driver/nvidia/version"
    path.parent.mkdir(parents=True)
    path.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23\n")
    found = findings(doctor.gpus(tmp_path))
    assert found["driver"].value == "NVIDIA 580.95.05"
    import torch
    if torch.version.cuda is None:
        assert found["GPUs"].kind == "warning" and "install torch's CUDA build" in found["GPUs"].advice


def test_doctor_of_two_dalis_an_old_package_and_few_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: "1.0")
    assert "both nvidia-dali-cuda120 and nvidia-dali-cuda130" in next(doctor.dali()).value
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: ["numpy>=2.1", 'pillow; extra == "demo"'])
    monkeypatch.setattr(doctor.sys, "version_info", (3, 13))
    found = findings(doctor.software())
    assert (found["requirements"].kind, found["requirements"].advice) == ("error", "pip install 'numpy>=2.1'")
    assert found["extra demo"].kind == "ok"
    assert (found["python"].kind, found["python"].advice) == ("error", "use Python 3.11 or 3.12")
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda what: (256, 4096))
    assert findings(doctor.machine(tmp_path))["open files"].advice == "ulimit -n 4096"


# --- installed

@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which a copy of this tree is installed, with the packages that are here already."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    for name in ("pipeline", "model", "train", "tools"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
                    "--disable-pip-version-check", "--target", str(folder / "site"), str(source)], check=True)
    return folder / "site"


def test_installed_it_works_beside_a_users_own_modules(installed: Path, tmp_path: Path) -> None:
    for name in ("train.py", "pipeline.py", "model/__init__.py", "tools/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('this is the user\\'s own')\n", encoding="utf-8")
    for number in range(8):
        for split in ("train", "val"):
            path = tmp_path / "photos" / split / f"class{number % 2}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(picture(number, 90, 100)))
    write_recipe(tmp_path, "photos.index", classes="  classes: 2", epochs="  epochs: 1")
    program = [sys.executable, str(installed / "bin/alexnet")]
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}

    def run(*words: str, launcher: list[str] = [], code: int = 0) -> str:
        done = subprocess.run([*(launcher or program), *words], cwd=tmp_path, env=environment, capture_output=True, text=True,
                              timeout=120)
        assert done.returncode == code, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    assert run("--help").startswith("usage: alexnet VERB") and "alexnet 0.1.0" in run("--version")
    assert str(installed) in run("doctor")
    assert "demo " in run("train", "--list") and "usage: alexnet show" in run("show", "--help")
    assert "8 images" in run("index", "build", "classes", "photos", "-o", "photos.index", "--jobs", "2")
    run("stats", "photos.index", "--square-px", "76")
    torchrun = str(Path(sys.executable).parent / "torchrun")
    pair = [torchrun, "--standalone", "--nproc-per-node", "2", "--no-python", *program]
    run("train", "small.yaml", launcher=pair)
    assert '{"kind": "test"' in (tmp_path / "runs/small/metrics.jsonl").read_text(encoding="utf-8")


def test_a_gpu_that_is_not_there() -> None:
    import torch
    if torch.cuda.is_available():
        pytest.skip("there is one")
    from train.parallel.topology import process_group
    build = f"torch {torch.__version__} is a CPU build" if torch.version.cuda is None else "torch"
    for device in ("cuda", "cuda:1"):
        with pytest.raises(ValueError) as refused, process_group(towers=2, device=device, timeout_s=10.0):
            pass
        assert f"no CUDA GPU is visible ({build}" in str(refused.value) and "use --machine.device=cpu" in str(refused.value)


def test_an_index_that_is_not_there_is_said_before_torch_is_imported(tmp_path: Path) -> None:
    code = ("import sys; from train import main; code = main.main(['demo', '--data.index=nowhere']); "
            "sys.exit(code if 'torch' not in sys.modules and 'nvidia.dali' not in sys.modules else 9)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and done.stderr == "error: index (=nowhere) does not exist; make one with `alexnet index build`\n"
    assert train_main.parser().prog == "python -m train.main"
