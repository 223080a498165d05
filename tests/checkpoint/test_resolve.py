"""One finder of checkpoints: run folders, checkpoints, exported networks and saved evaluations; which one; mistakes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from model.alexnet import AlexNet
from pipeline.files import file_sha256
from tests.conftest import TinySet
from tests.helpers.checkpoints import ALONE
from tests.helpers.trained_run import write_run
from train import build
from train.checkpoint import checkpoint
from train.checkpoint.resolve import Kind, Resolved, resolve

ANY: tuple[Kind, ...] = ("checkpoint", "exported", "evaluation")


@pytest.fixture(scope="module")
def run(tiny_set: TinySet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three checkpoints, of which the second is the best."""
    return write_run(tmp_path_factory.mktemp("resolve"), tiny_set, (0.5, 0.25, None))


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "copy")


def test_which_checkpoint_of_a_run(run: Path) -> None:
    paths = checkpoint.checkpoints(run / "checkpoints")
    expected = [Resolved(path, "checkpoint", file_sha256(path / "manifest.json")) for path in paths]
    assert resolve(run) == resolve(run, "last") == expected[2]
    assert resolve(run, "best") == resolve(run, default="best") == expected[1]
    assert resolve(run, "last", default="best") == expected[2] and resolve(paths[0]) == expected[0]
    assert expected[0].run == run and Resolved(run, "exported", "").run is None


def test_the_best_by_default_is_the_last_while_none_is_validated(copy: Path) -> None:
    for path in checkpoint.checkpoints(copy / "checkpoints")[:2]:
        shutil.rmtree(path)
    assert resolve(copy, default="best").path.name == "step-000000002"
    with pytest.raises(ValueError, match=r"run \(=.*copy\) has no validated checkpoint yet; wait for its first, or give another"):
        resolve(copy, "best")


def test_a_damaged_last_is_passed_over_with_a_warning_a_damaged_best_is_not(copy: Path,
                                                                            capsys: pytest.CaptureFixture[str]) -> None:
    first, best, last = checkpoint.checkpoints(copy / "checkpoints")
    (last / "stats.npz").unlink()
    warnings: list[str] = []
    assert resolve(copy, warn=warnings.append).path == resolve(copy).path == best
    assert warnings == [f"checkpoint file (={last / 'stats.npz'}) is missing; use another checkpoint"]
    assert capsys.readouterr().err == f"warning: {warnings[0]}\n"
    for path in (best, first):
        (path / "stats.npz").unlink()
    for path, which in ((best, None), (copy, "best")):
        with pytest.raises(checkpoint.DamagedCheckpoint, match=r"stats.npz\) is missing; use another"):
            resolve(path, which)
    with pytest.raises(checkpoint.DamagedCheckpoint, match="are damaged, all 3 of them; start another run"):
        resolve(copy, "last", warn=warnings.append)


def test_the_run_is_named_where_its_path_does_not_name_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    assert resolve(Path(".")).run == run
    monkeypatch.chdir(run.parent)
    assert resolve(Path("run")).run == Path("run")


def test_mistakes_are_named(run: Path, tmp_path: Path) -> None:
    step = checkpoint.checkpoints(run / "checkpoints")[0]
    for name, file in (("exported", "model.safetensors"), ("evaluation", "evaluation.json"), ("new/checkpoints", "")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / (file or "x")).write_bytes(b"")
    for path, which, message in (
            (tmp_path / "none", None, "checkpoint (={}) does not exist; give a run folder or a checkpoint"),
            (tmp_path, None, "checkpoint (={}) is not recognised; give a run folder or a checkpoint"),
            (step / "state.json", None, "checkpoint (={}) is not recognised; give a run folder or a checkpoint"),
            (step.parent, None, "checkpoint (={}) is not recognised; give a run folder or a checkpoint"),
            (tmp_path / "exported", None,
             "checkpoint (={}) is a network that train.export wrote; give a run folder or a checkpoint"),
            (tmp_path / "evaluation", None, "checkpoint (={}) is a saved evaluation; give a run folder or a checkpoint"),
            (tmp_path / "new", None, "run (={}) has no checkpoint yet; wait for its first, or give another"),
            (step, "best", "--which (=best) chooses among a run's checkpoints, and {} is no run folder; leave it out")):
        with pytest.raises(ValueError) as caught:
            resolve(path, which)
        assert str(caught.value) == message.format(path)
    with pytest.raises(ValueError, match=r"--checkpoint \(=.*\) is not recognised; give a run folder, a checkpoint, a network "
                                         r"that train.export wrote or a saved evaluation$"):
        resolve(tmp_path, kinds=ANY, name="--checkpoint")
    assert resolve(tmp_path / "evaluation", kinds=ANY).kind == "evaluation"


def test_what_a_checkpoint_says_of_itself_and_its_weights(run: Path) -> None:
    source = resolve(run, "best")
    config = source.config()
    network, expected = build.network(config, ALONE), dict(AlexNet(config.model, seed=1).named_parameters())
    before = network.fc8.weight.clone()
    source.load_weights(network, config, ALONE, ["conv1"])
    assert torch.equal(network.conv1.weight, 4 * expected["conv1.weight"]) and torch.equal(network.fc8.weight, before)
    source.load_weights(network, config, ALONE)
    assert torch.equal(network.fc8.weight, 4 * expected["fc8.weight"])
    assert source.classes_sha256 == checkpoint.read_state(source.path)["classes"]
    assert source.stats().sha256 and resolve(run).sha256 != source.sha256
