"""Initial weights from a trained network: pre-training and fine-tuning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from model.alexnet import AlexNet
from model.towers import Tower
from pipeline.index.sample_index import SampleIndex
from tests.conftest import TinySet
from tests.helpers.checkpoints import ALONE
from tests.helpers.disturbed_run import fails_at
from tests.helpers.recipes import write_recipe
from tests.helpers.runs import here, pair, same, watch, weights
from train import build
from train.checkpoint import checkpoint
from train.parallel import topology as distributed
from train.checkpoint.checkpoint import DamagedCheckpoint
from train.config import Config
from train.parallel.topology import Topology
from train.checkpoint.resolve import find_pretrained, load_pretrained, resolve
from train.run_folder import UNSAVED
from train.recipe import dump, parse

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
FROZEN = f"--optimizer.layer_rates={{{', '.join(f'{name}: 0' for name in LAYERS)}}}"


@pytest.fixture(scope="module")
def recipe(tiny_set: TinySet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), tiny_set.index, epochs="  epochs: 2")


@pytest.fixture
def index(tiny_set: TinySet) -> SampleIndex:
    return SampleIndex.load(tiny_set.index)


def read(recipe: Path, *argv: str) -> Config:
    return parse(["--config", str(recipe), *argv]).config


def network_of(config: Config) -> dict[str, torch.Tensor]:
    """Parameters as a run of this config begins with, by canonical name."""
    return {name: p.detach() for name, p in AlexNet(config.model, seed=config.train.seed).named_parameters()}


def write(root: Path, config: Config, index: SampleIndex, step: int = 1, error: float | None = 0.5, classes: str = "",
          dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint of the run folder `root`: the weights that `network_of` gives, as train.loop saves them."""
    tensors, shapes = build.parameters(AlexNet(config.model, seed=config.train.seed).to(dtype), config)
    state = {"step": step, "validation_error": error, "classes": classes or build.classes_sha256(index)}

    def attach(folder: Path) -> None:
        (folder / checkpoint.CONFIG).write_text(dump(config), encoding="utf-8")
        (folder / checkpoint.STATS).write_bytes(b"123")
    name = checkpoint.checkpoint_name(step, None if error is None else step)
    return checkpoint.save(root / "checkpoints", name, tensors, shapes, state, attach, ALONE)


@pytest.fixture
def source(recipe: Path, index: SampleIndex, tmp_path: Path) -> Path:
    """A checkpoint with the weights of seed 7."""
    return write(tmp_path / "source", read(recipe, "--train.seed=7"), index)


def take(config: Config, index: SampleIndex, resume: bool = False) -> tuple[dict[str, torch.Tensor], str, list[str]]:
    """The network's parameters after `load_pretrained`, what it says, and the warnings."""
    warned: list[str] = []
    network = build.network(config, ALONE)
    said = load_pretrained(find_pretrained(config, resume, warned.append), network, config, ALONE, index)
    return {name: p.detach() for name, p in network.named_parameters()}, said, warned


# --- weights from a checkpoint

def test_kept_layers_are_the_checkpoints_and_renewed_ones_are_drawn(recipe: Path, source: Path, index: SampleIndex) -> None:
    config = read(recipe, f"--init_from.checkpoint={source}", "--init_from.renew=[fc7, fc8]")
    found, said, _ = take(config, index)
    theirs, drawn = network_of(read(recipe, "--train.seed=7")), network_of(config)
    for name, value in found.items():
        renewed = name.split(".")[0] in ("fc7", "fc8")
        assert torch.equal(value, (drawn if renewed else theirs)[name]), name
        assert renewed or name.endswith("bias") or not torch.equal(value, drawn[name]), "the test would not see random ones"
    assert said == f"weights of conv1, conv2, conv3, conv4, conv5, fc6 from {source}; fc7, fc8 start anew"


def test_without_a_checkpoint_nothing_is_taken(recipe: Path, index: SampleIndex) -> None:
    config = read(recipe)
    found, said, _ = take(config, index)
    assert said == "" and find_pretrained(config, False, pytest.fail) is None
    assert all(torch.equal(value, network_of(config)[name]) for name, value in found.items())


def test_of_a_run_folder_the_best_or_else_the_newest(recipe: Path, index: SampleIndex, tmp_path: Path) -> None:
    run = tmp_path / "run"
    paths = [write(run, read(recipe, f"--train.seed={step}"), index, step, None) for step in (1, 2)]
    config = read(recipe, f"--init_from.checkpoint={run}")
    assert find_pretrained(config, False, pytest.fail) == resolve(paths[1])
    paths += [write(run, read(recipe, f"--train.seed={step}"), index, step, error)
              for step, error in ((3, 0.2), (4, 0.4), (5, None))]
    origin = find_pretrained(config, False, pytest.fail)
    assert origin == resolve(paths[2]) and len(origin.sha256) == 64
    found, said, _ = take(config, index)
    assert torch.equal(found["conv1.weight"], network_of(read(recipe, "--train.seed=3"))["conv1.weight"])
    assert str(paths[2]) in said
    one = find_pretrained(read(recipe, f"--init_from.checkpoint={paths[2]}"), False, pytest.fail)
    assert one == origin and one != find_pretrained(read(recipe, f"--init_from.checkpoint={paths[3]}"), False, pytest.fail)


def test_a_damaged_newest_is_passed_over_loudly(recipe: Path, index: SampleIndex, tmp_path: Path) -> None:
    good, bad = (write(tmp_path / "run", read(recipe), index, step, None) for step in (1, 2))
    (bad / "state.json").write_text("{}", encoding="utf-8")
    _, said, warned = take(read(recipe, f"--init_from.checkpoint={tmp_path / 'run'}"), index)
    assert str(good) in said and len(warned) == 1 and f"checkpoint file (={bad}/state.json) has 2 bytes" in warned[0]


def test_another_dtype_is_rounded(recipe: Path, index: SampleIndex, tmp_path: Path) -> None:
    path = write(tmp_path / "run", read(recipe, "--train.seed=7"), index, dtype=torch.float64)
    found, _, _ = take(read(recipe, f"--init_from.checkpoint={path}"), index)
    assert found["fc6.weight"].dtype == torch.float32
    assert torch.equal(found["fc6.weight"], network_of(read(recipe, "--train.seed=7"))["fc6.weight"])


def test_layers_more_and_fewer(recipe: Path, source: Path, index: SampleIndex) -> None:
    added = ["--model.layers.conv6={kernels: 8, px: 1, std: 0.1, bias: 0}", f"--init_from.checkpoint={source}"]
    with pytest.raises(ValueError, match=r"layer \(=conv6\) is not in .*, only conv1, .*, fc8; add it to init_from.renew$"):
        take(read(recipe, *added), index)
    found, said, _ = take(read(recipe, *added, "--init_from.renew=[conv6]"), index)
    assert said.endswith("; conv6 start anew") and found["conv6.weight"].shape == (8, 4, 1, 1)
    found, said, _ = take(read(recipe, "--model.layers.conv3=null", f"--init_from.checkpoint={source}"), index)
    assert said.endswith(f"from {source}; its conv3 are not used") and "conv3.weight" not in found


def test_other_shapes_are_named(recipe: Path, source: Path, index: SampleIndex) -> None:
    at = f"--init_from.checkpoint={source}"
    for words, message in (
            (["--model.layers.conv3.kernels=32"], r"weight.conv3.bias \(=\(32,\) here\) is \(16,\) in "),
            (["--model.towers=1"], r"weight.conv2.weight \(=\(16, 8, 5, 5\) here\) is \(16, 4, 5, 5\) in "),
            (["--model.classes=7"], r"weight.fc8.bias \(=\(7,\) here\) is \(6,\) in ")):
        with pytest.raises(ValueError, match=f"{message}.*; add the layer to init_from.renew, or give a checkpoint of this"):
            take(read(recipe, at, *words), index)
    take(read(recipe, at, "--model.classes=7", "--init_from.renew=[fc8]"), index)
    take(read(recipe, at, "--model.layers.conv3.kernels=32", "--init_from.renew=[conv3, conv4]"), index)


def test_other_classes_need_a_new_last_layer(recipe: Path, index: SampleIndex, tmp_path: Path) -> None:
    """As many classes, but other ones: no shape tells."""
    path = write(tmp_path / "run", read(recipe), index, classes="0" * 64)
    at = f"--init_from.checkpoint={path}"
    with pytest.raises(ValueError, match=r"classes of the index \(=.*\) are others, or in another order, than those .*; add"):
        take(read(recipe, at, "--init_from.renew=[fc7]"), index)
    assert take(read(recipe, at, "--init_from.renew=[fc8]"), index)[1].endswith("; fc8 start anew")


def test_no_layer_left_to_take(recipe: Path, source: Path, index: SampleIndex) -> None:
    with pytest.raises(ValueError, match=r"init_from.renew \(=\['conv1', .*'fc8'\]\) leaves no layer to take from .*; take"):
        take(read(recipe, f"--init_from.checkpoint={source}", f"--init_from.renew=[{', '.join(LAYERS)}]"), index)


def test_a_damaged_checkpoint_is_refused(recipe: Path, source: Path, index: SampleIndex) -> None:
    data = bytearray((source / "__0_0.distcp").read_bytes())
    data[1000] ^= 4
    (source / "__0_0.distcp").write_bytes(data)
    for path in (source, source.parent.parent):
        with pytest.raises(DamagedCheckpoint, match=r"__0_0.distcp\) has SHA-256 \w+…, was written with \w+…; use another"):
            take(read(recipe, f"--init_from.checkpoint={path}"), index)
    config = read(recipe, f"--init_from.checkpoint={source}")
    assert find_pretrained(config, True, pytest.fail) is None, "a resume has its own"
    with pytest.raises(ValueError, match=r"init_from.checkpoint \(=.*\) is no longer there, or damaged, and this run has no "
                       "checkpoint of its own yet; put it back"):
        take(config, index, resume=True)


def test_processes_that_found_different_checkpoints_do_not_begin(recipe: Path, source: Path, index: SampleIndex,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Each looks by itself: of a run under way one may have seen its best checkpoint before, another after a better one."""
    monkeypatch.setattr(Topology, "gather_objects", lambda self, value: [value, "f" * 64])
    with pytest.raises(ValueError, match=r"init_from.checkpoint \(=.*\) is not the same in all processes \(\w{16}…, f{16}…\); "):
        take(read(recipe, f"--init_from.checkpoint={source}"), index)
    take(read(recipe), index)


def export(folder: Path, config: Config, classes: str) -> Path:
    """What train.export writes, so far as it is read here."""
    pytest.importorskip("safetensors")
    from train.export import safetensors_io as exported

    folder.mkdir()
    facts = {"classes_sha256": classes} if classes else {}
    (folder / exported.WEIGHTS).write_bytes(exported.pack(config, network_of(config), facts))
    (folder / checkpoint.CONFIG).write_text(dump(config), encoding="utf-8")
    exported.write_manifest(folder)
    return folder


def test_an_exported_network_is_as_good_as_a_checkpoint(recipe: Path, index: SampleIndex, tmp_path: Path) -> None:
    """In one process, and a half in each of two; refused for the same reasons."""
    first = read(recipe, "--train.seed=7")
    folder = export(tmp_path / "out", first, build.classes_sha256(index))
    config = read(recipe, f"--init_from.checkpoint={folder}", "--init_from.renew=[fc7]")
    found, said, _ = take(config, index)
    theirs, drawn = network_of(first), network_of(config)
    assert said == f"weights of conv1, conv2, conv3, conv4, conv5, fc6, fc8 from {folder}; fc7 start anew"
    assert all(torch.equal(value, (drawn if name.startswith("fc7") else theirs)[name]) for name, value in found.items())
    origin = find_pretrained(config, False, pytest.fail)
    halves = []
    for rank in range(2):
        half = AlexNet(config.model, seed=config.train.seed, tower=Tower(rank, 2))
        load_pretrained(origin, half, config, ALONE, index)
        halves.append(dict(half.named_parameters()))
    for name, value in found.items():
        assert torch.equal(torch.cat([half[name].detach() for half in halves]), value), name
    with pytest.raises(ValueError, match=r"weight.fc6.bias \(=\(20,\) here\) is \(18,\) in .*/out; add the layer to"):
        take(read(recipe, f"--init_from.checkpoint={folder}", "--model.layers.fc6.neurons=20"), index)
    for name, classes, message in (
            ("other", "0" * 64, "are others, or in another order, than those of .*/other; add fc8 to init_from.renew"),
            ("none", "", "cannot be compared: .*/none does not say which its are; add fc8 to init_from.renew")):
        export(tmp_path / name, first, classes)
        with pytest.raises(ValueError, match=message):
            take(read(recipe, f"--init_from.checkpoint={tmp_path / name}"), index)
        take(read(recipe, f"--init_from.checkpoint={tmp_path / name}", "--init_from.renew=[fc8]"), index)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(RuntimeError, match=r"exported file \(=.*model.safetensors\) has SHA-256"):
        take(config, index)
    assert find_pretrained(config, True, pytest.fail) is None


# --- runs

@pytest.fixture(scope="module")
def tuned(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run of two epochs that began with the best checkpoint of another, fc8 renewed; and its words."""
    runs = tmp_path_factory.mktemp("runs")
    here(recipe, runs, "--machine.name=first", "--train.seed=5")
    words = [f"--init_from.checkpoint={runs / 'first'}", "--init_from.renew=[fc8]"]
    out, _ = here(recipe, runs, *words)
    best = checkpoint.best(runs / "first" / "checkpoints")
    assert f"weights of conv1, conv2, conv3, conv4, conv5, fc6, fc7 from {best}; fc8 start anew\n" in out
    return runs / "small", words


def test_a_run_begins_with_these_weights(recipe: Path, tuned: tuple[Path, list[str]], tmp_path: Path) -> None:
    """In one process, and in two of which each takes its half: with every layer frozen they are still there after a step."""
    first = checkpoint.best(tuned[0].parent / "first" / "checkpoints")
    assert first is not None
    theirs = {name: torch.empty(p.shape) for name, p in network_of(read(recipe)).items()}
    checkpoint.load(first, {f"weight.{name}": value for name, value in theirs.items()},
                    {f"weight.{name}": tuple(value.shape) for name, value in theirs.items()}, ALONE, partial=True)
    drawn = network_of(read(recipe))
    for start, name in ((here, "one"), (pair, "two")):
        out, _ = start(recipe, tmp_path, *tuned[1], FROZEN, f"--machine.name={name}", "--machine.stop_after=1", code=75)
        assert out.count(f"from {first}; fc8 start anew") == 1
        found = weights(tmp_path / name)
        for key, value in theirs.items():
            assert torch.equal(found[f"weight.{key}"], drawn[key] if key.startswith("fc8") else value), (name, key)
    note = json.loads((tmp_path / "one" / "versions.jsonl").read_text(encoding="utf-8"))
    assert note["initial_weights"] == checkpoint.read_state(checkpoint.checkpoints(tmp_path / "one" / "checkpoints")[-1])[
        "sources"]["initial weights"] == find_pretrained(read(recipe, *tuned[1]), False, pytest.fail).sha256


def test_a_resume_needs_the_checkpoint_no_more_but_takes_no_other(recipe: Path, tuned: tuple[Path, list[str]], source: Path,
                                                                  tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    shutil.copytree(tuned[0].parent / "first", gone)
    words = [f"--init_from.checkpoint={gone}", "--init_from.renew=[fc8]"]
    out, _ = here(recipe, tmp_path, *words, "--machine.stop_after=4", code=75)
    assert "start anew" in out
    _, err = here(recipe, tmp_path, "--resume", f"--init_from.checkpoint={source}", words[1], code=2)
    assert "error: initial weights (=" in err and "…) is not the one of this run (=" in err
    assert "; resume with the same init_from.checkpoint, or start another run with --machine.name" in err
    _, err = here(recipe, tmp_path, "--resume", words[0], code=2)
    assert "recipe (=init_from.renew: ['fc8'] in the run, [] now) is not the one of" in err
    shutil.rmtree(gone)
    out, _ = here(recipe, tmp_path, *words, "--resume")
    assert "at step 4" in out and "start anew" not in out
    same(tuned[0], tmp_path / "small")
    _, err = here(recipe, tmp_path, *words, "--machine.name=new", code=2)
    assert f"error: init_from.checkpoint (={gone}) does not exist; " in err and not (tmp_path / "new").exists()


def test_a_restart_by_torchrun_needs_the_checkpoint_no_more(recipe: Path, tuned: tuple[Path, list[str]], tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Its store remembers that the run began. Where the first start came to no checkpoint, nothing begins at random instead."""
    store = distributed.dist.HashStore()
    monkeypatch.setattr(distributed, "_store", lambda *words: store)
    gone = tmp_path / "gone"
    shutil.copytree(tuned[0].parent / "first", gone)
    words = [f"--init_from.checkpoint={gone}", "--init_from.renew=[fc8]"]
    for step, code in ((0, 4), (4, 4)):
        with monkeypatch.context() as patch:
            watch(patch, lambda network: fails_at(network, step))
            here(recipe, tmp_path, *words, "--machine.checkpoint_steps=1", code=code)
    shutil.rmtree(gone)
    out, _ = here(recipe, tmp_path, *words)
    assert "restarted by torchrun: resuming as with --resume" in out and "at step 4\n" in out and "start anew" not in out
    same(tuned[0], tmp_path / "small")
    for path in checkpoint.checkpoints(tmp_path / "small" / "checkpoints"):
        shutil.rmtree(path)
    (tmp_path / "small" / UNSAVED).touch()  # as if it had never come to one
    _, err = here(recipe, tmp_path, *words, code=2)
    assert f"error: init_from.checkpoint (={gone}) is no longer there, or damaged, and this run has no checkpoint of" in err


def test_a_resume_is_indifferent_to_a_run_folder_that_went_on(recipe: Path, tuned: tuple[Path, list[str]], index: SampleIndex,
                                                              tmp_path: Path) -> None:
    """Its best checkpoint is another by now, and the one that was taken may have been pruned."""
    moving = tmp_path / "moving"
    shutil.copytree(tuned[0].parent / "first", moving)
    words = [f"--init_from.checkpoint={moving}", "--init_from.renew=[fc8]"]
    here(recipe, tmp_path, *words, "--machine.stop_after=4", code=75)
    write(moving, read(recipe, "--train.seed=9"), index, 99, 0.0)
    out, _ = here(recipe, tmp_path, *words, "--resume")
    assert f"WARNING: init_from.checkpoint (={moving}) has another best checkpoint by now" in out
    same(tuned[0], tmp_path / "small")
    begun = [checkpoint.read_state(path)["sources"]["initial weights"]
             for path in checkpoint.checkpoints(tmp_path / "small" / "checkpoints")]
    assert set(begun) == {find_pretrained(read(recipe, *tuned[1]), False, pytest.fail).sha256}


def test_a_run_that_has_no_checkpoint_yet_takes_the_weights_again(recipe: Path, tuned: tuple[Path, list[str]],
                                                                  tmp_path: Path) -> None:
    here(recipe, tmp_path, *tuned[1], "--machine.stop_after=2", code=75)
    for path in checkpoint.checkpoints(tmp_path / "small" / "checkpoints"):
        shutil.rmtree(path)
    (tmp_path / "small" / UNSAVED).touch()  # as if it had never come to one
    _, err = here(recipe, tmp_path, f"--init_from.checkpoint={tmp_path}/x", tuned[1][1], "--resume", code=2)
    assert f"error: init_from.checkpoint (={tmp_path}/x) is no longer there, or damaged, and this run has no checkpoint of" in err
    out, _ = here(recipe, tmp_path, *tuned[1], "--resume")
    assert "has no checkpoint yet; starting from step 0" in out and "fc8 start anew" in out
    same(tuned[0], tmp_path / "small")


def test_a_refused_start_leaves_nothing_behind(recipe: Path, tuned: tuple[Path, list[str]], source: Path,
                                               tmp_path: Path) -> None:
    (source / "stats.npz").write_bytes(b"")
    for words, code, message in (
            (["--init_from.checkpoint=/nowhere"], 2, "error: init_from.checkpoint (=/nowhere) does not exist; give a"),
            ([tuned[1][0], "--model.layers.fc6.neurons=20"], 2, "error: weight.fc6.bias (=(20,) here) is (18,) in "),
            ([tuned[1][0], "--model.classes=7"], 2, "; add the layer to init_from.renew, or give a checkpoint of this network"),
            ([tuned[1][0], f"--init_from.renew=[{', '.join(LAYERS)}]"], 2, "leaves no layer to take from"),
            (["--init_from.renew=[fc8]"], 2, "needs init_from.checkpoint; say where the other layers come from"),
            ([f"--init_from.checkpoint={source}"], 4, "stats.npz) has 0 bytes, was written with 3; use another checkpoint")):
        out, err = here(recipe, tmp_path / "runs", *words, code=code)
        assert message in err and "Traceback" not in err and err.count("\n") == 1, err
        assert not (tmp_path / "runs").exists()
    here(recipe, tmp_path / "runs", *tuned[1], "--machine.stop_after=1", code=75)
