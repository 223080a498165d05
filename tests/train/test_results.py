"""Steps whose results the host reads later (machine.sync_steps): the same bits as if each were read at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from pipeline.compute_stats import compute
from pipeline.loading.batch import Batch
from pipeline.loading.train_loader import TrainLoader
from pipeline.reading.quarantine import SampleError
from pipeline.stats import stats_path
from tests.helpers.disturbed_run import signal_at
from tests.helpers.recipes import write_recipe
from tests.helpers.runs import here, lines, same, watch
from tests.helpers.small_set import photographs, write_set
from train import build
from train.parallel.topology import Topology
from train.recipe import parse
from train.results import Flags, NotFinite, StepResult
from train.step import CaptureFailed, TrainStep

MILESTONE = ("--schedule.plateau=null", "--schedule.milestones=[{epoch: 1, lr: 1e-3, layer_rates: {conv1: 0}}]")
RUN = (*MILESTONE, "--train.epochs=2", "--train.batch=4")  # two epochs of 6 steps


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    blobs = photographs(26)
    index = write_set(folder / "set", blobs[:24], blobs[24:], classes=6)
    compute(index, "train", 76).save(stats_path(index.path, 76))
    return write_recipe(folder, index.path)


def batches(count: int, device: str = "cpu") -> Iterator[Batch]:
    random = torch.Generator().manual_seed(0)
    for step in range(count):
        images, labels = torch.randn(8, 3, 67, 67, generator=random) * 50, torch.randint(6, (8,), generator=random)
        yield Batch(images.to(device), labels.to(device), np.arange(8), np.zeros(8, np.int64), step)


def train(recipe: Path, sync_steps: int, spoilt: int = -1, *words: str,
          device: str = "cpu") -> tuple[list[StepResult], str, dict[str, torch.Tensor]]:
    """Results of 11 steps, of which the one number `spoilt` has an image of NaN; the error; weights and velocities at the end."""
    config = parse(["--config", str(recipe), *MILESTONE, f"--machine.sync_steps={sync_steps}", *words]).config
    build.configure_torch(config, Topology.single(device))
    step, found = TrainStep(config, Topology.single(device)), list[StepResult]()
    step.prepare()
    try:
        for batch in batches(11, device):
            if batch.step == spoilt:
                batch.images[3, 0, 5, 5] = float("nan")
            step(batch, epoch=batch.step // 6)
            for results in step.results(wait=batch.step in (8, 10)):
                found += results
        error = ""
    except NotFinite as failure:
        error = str(failure)
    return found, error, {name: tensor.clone() for name, tensor in step.tensors()[0].items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("words", [(), ("--parallel.accumulate=3", "--optimizer.lars={trust: 0.01, epsilon: 1e-8}")],
                         ids=["plain", "accumulated, LARS"])
def test_losses_and_weights_are_those_of_steps_read_at_once(recipe: Path, words: tuple[str, ...]) -> None:
    results, error, tensors = train(recipe, 1, -1, *words)
    assert error == "" and [result.step for result in results] == list(range(11)) and len({r.loss for r in results}) == 11
    for sync_steps in (2, 4):
        later, error, others = train(recipe, sync_steps, -1, *words)
        assert later == results and error == "" and equal(tensors, others)


@pytest.mark.parametrize("spoilt", [0, 4, 5, 6, 7, 10])
def test_what_is_not_finite_is_told_later_and_changes_no_weight(recipe: Path, spoilt: int) -> None:
    results, error, tensors = train(recipe, 1, spoilt)
    assert error.startswith(f"loss (=nan) at step {spoilt} with learning rate") and len(results) == spoilt
    later, its_error, others = train(recipe, 4, spoilt)
    assert later == results and its_error == error and equal(tensors, others)
    assert not any(tensor.isnan().any() for tensor in others.values())


def test_flags_are_those_of_their_step(recipe: Path) -> None:
    step = TrainStep(parse(["--config", str(recipe), "--machine.sync_steps=3"]).config, Topology.single())
    for batch in batches(3):
        step(batch, 0, lambda: Flags(stop=batch.step == 1, save_failed=batch.step == 2))
        assert not list(step.results(wait=False))
    assert [result.flags for result in next(step.results())] == [Flags(), Flags(stop=True), Flags(save_failed=True)]


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    here(recipe, runs, *RUN)
    return runs / "small"


def test_stopped_and_resumed_after_every_step(recipe: Path, whole: Path, tmp_path: Path) -> None:
    for step in range(1, 12):
        here(recipe, tmp_path, *RUN, "--machine.sync_steps=4", f"--machine.stop_after={step}", *["--resume"][:step - 1], code=75)
    here(recipe, tmp_path, *RUN, "--machine.sync_steps=4", "--resume")
    same(whole, tmp_path / "small")


@pytest.mark.parametrize("number", range(4))
def test_a_signal_stops_within_so_many_steps(recipe: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             number: int) -> None:
    with monkeypatch.context() as patch:
        watch(patch, lambda network: signal_at(network, True, number, signal.SIGINT))
        out, _ = here(recipe, tmp_path, *RUN, "--machine.sync_steps=4", "--machine.checkpoint_steps=3", code=75)
    assert f"stopped and saved at step {3 if number < 3 else 6}; resume with --resume" in out
    assert [line["step"] for line in lines(tmp_path / "small") if line["kind"] == "step"] == list(range(3 if number < 3 else 6))
    here(recipe, tmp_path, *RUN, "--machine.sync_steps=4", "--resume")
    same(whole, tmp_path / "small")


def test_when_the_loader_fails_the_steps_before_are_counted(recipe: Path, whole: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    original = TrainLoader.__next__

    def following(self: TrainLoader) -> Batch:
        if self.step == 3:
            raise SampleError(self.index, 0, "is broken on purpose")
        return original(self)
    with monkeypatch.context() as patch:
        patch.setattr(TrainLoader, "__next__", following)
        _, err = here(recipe, tmp_path, *RUN, "--machine.sync_steps=4", code=4)
    assert "is broken on purpose" in err
    assert list(lines(tmp_path / "small")) == list(lines(whole))[:3]


class Operations(TorchDispatchMode):
    """What is given to the device: operators, shapes, and the host's values in their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not str(func).startswith("profiler"):
            self.found.append(str(tree_map(lambda value: tuple(value.shape) if isinstance(value, torch.Tensor) else value,
                                           (str(func), args, kwargs))))
        return func(*args, **kwargs or {})


def test_the_step_takes_nothing_from_the_device_and_is_the_same_at_every_step(recipe: Path) -> None:
    """So it needs no synchronisation, and can be captured once. Its tensors have no values: to ask for one is an error. Learning
    rates, frozen layers, masks and the row of the ring change between the two epochs."""
    words = ("--optimizer.lars={trust: 0.01, epsilon: 1e-8}", "--parallel.accumulate=2", "--machine.sync_steps=4")
    step = TrainStep(parse(["--config", str(recipe), *MILESTONE, *words]).config,
                     replace(Topology.single(), device=torch.device("meta")))
    found = []
    for batch in batches(3, "meta"):
        with Operations() as operations:
            step(batch, epoch=batch.step // 2)
        found.append(operations.found)
    assert len(found[0]) > 100 and found[1] == found[2]  # in the first one velocities are made


def test_a_step_is_captured_on_one_gpu_only(recipe: Path, tmp_path: Path) -> None:
    _, err = here(recipe, tmp_path, "--machine.step=captured", code=2)
    assert err == "error: machine.step (=captured) needs a single process with a GPU, not 1 on cpu; use auto\n"


def test_a_capture_that_fails_leaves_an_eager_step(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise CaptureFailed("could not be captured")
    monkeypatch.setattr("train.step.CapturedStep", fail)
    given = next(iter(batches(1)))
    found = []
    for attempt in (False, True):
        step = TrainStep(parse(["--config", str(recipe)]).config, Topology.single("cpu"))
        if attempt:
            setattr(step, "_capturable", True)
            step.prepare()
        step(given, 0)
        found.append([result.loss for results in step.results() for result in results] + [p.sum().item() for p in
                                                                                          step.network.parameters()])
    assert found[0] == found[1], "nothing stays frozen"


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class TestOnAGpu:
    """What only a GPU shows: `pytest -m gpu`."""
    pytestmark = GPU

    @pytest.mark.parametrize("spoilt", [-1, 0, 5, 7])
    @pytest.mark.parametrize("words", [(), ("--machine.precision=bf16", "--machine.channels_last=true"),
                                       ("--optimizer.lars={trust: 0.01, epsilon: 1e-8}", "--parallel.accumulate=2"),
                                       ("--machine.kernels=torch",)], ids=str)
    def test_captured_and_eager_give_the_same_bits(self, recipe: Path, spoilt: int, words: tuple[str, ...]) -> None:
        expected = train(recipe, 1, spoilt, "--machine.step=eager", *words, device="cuda")
        assert ("at step" in expected[1]) == (spoilt >= 0) and len(expected[0]) == (spoilt if spoilt >= 0 else 11)
        for how, sync_steps in (("eager", 4), ("captured", 1), ("captured", 4)):
            found = train(recipe, sync_steps, spoilt, f"--machine.step={how}", *words, device="cuda")
            assert found[:2] == expected[:2] and equal(found[2], expected[2]), (how, sync_steps)

    @pytest.mark.parametrize("how", ["eager", "captured"])
    def test_nothing_synchronises(self, recipe: Path, how: str) -> None:
        config = parse(["--config", str(recipe), *MILESTONE, f"--machine.step={how}"]).config
        step, given = TrainStep(config, Topology.single("cuda")), list(batches(11, "cuda"))
        step.prepare()
        step(given[0], 0)
        try:
            torch.cuda.set_sync_debug_mode("error")
            for batch in given[1:]:
                step(batch, batch.step // 6)
                list(step.results(wait=False))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert [result.step for results in step.results() for result in results] == [8, 9, 10]

    def test_stopped_and_resumed(self, recipe: Path, tmp_path: Path) -> None:
        for name, how, stops in (("eager", "eager", ()), ("captured", "captured", ()), ("stopped", "captured", (2, 3, 7, 11))):
            words = [*RUN, "--machine.device=cuda", f"--machine.name={name}", f"--machine.step={how}"]
            for number, stop in enumerate(stops):
                here(recipe, tmp_path, *words, f"--machine.stop_after={stop}", *["--resume"][:number], code=75)
            out, _ = here(recipe, tmp_path, *words, *["--resume"][:len(stops)])
            assert f"step: {how}" in out
        same(tmp_path / "eager", tmp_path / "captured")
        same(tmp_path / "eager", tmp_path / "stopped")
