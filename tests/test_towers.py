"""One network in two processes equals the network in one: values, gradients, training, whatever is odd about the sizes."""
from dataclasses import replace
from pathlib import Path
from typing import Any
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.nn import functional

from model.alexnet import AlexNet, canonical_shapes
from model.config import LrnConfig, ModelConfig
from model.towers import BOTH, Tower, exchange, gather_logits, tower_shape, tower_slice

# Small, with values at which every part matters: an LRN that divides visibly, dropout, initial values that are no noise.
SMALL = ModelConfig(input_px=67, classes=7, channels=(8, 12, 16, 12, 8), hidden=(24, 20), towers=2, dropout=0.5,
                    lrn=LrnConfig(k=1.0, n=5, alpha=0.05, beta=0.75), init_std=(0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.3, 0.3),
                    init_bias=(0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0))
STEPS = 20
VARIANTS: dict[str, tuple[ModelConfig, torch.memory_format]] = {
    "odd classes": (SMALL, torch.contiguous_format),
    "even classes, channels_last": (replace(SMALL, classes=6), torch.channels_last),
    "no LRN, no dropout, 2 classes": (replace(SMALL, classes=2, lrn=None, dropout=0.0), torch.contiguous_format),
}


def train(config: ModelConfig, tower: Tower, memory_format: torch.memory_format) -> dict[str, Any]:
    """Logits, loss and gradients of step 0, and the parameters after some steps of SGD with momentum, in float64."""
    torch.set_num_threads(1)
    network = AlexNet(config, seed=5, tower=tower).double().to(memory_format=memory_format)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    result: dict[str, Any] = {}
    for step in range(STEPS):
        images = torch.randn(4, 3, 67, 67, generator=generator, dtype=torch.float64).to(memory_format=memory_format)
        labels = torch.randint(config.classes, (4,), generator=generator)
        optimizer.zero_grad()
        logits = network(images, step=step, rows=(2, 8))
        loss = functional.cross_entropy(logits, labels)
        loss.backward()
        if step == 0:
            result = {"logits": logits.detach(), "loss": loss.item(),
                      "gradients": {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}}
        optimizer.step()
    network.eval()
    with torch.no_grad():
        result["tested"] = network(images)
    return result | {"last loss": loss.item(), "parameters": {name: p.detach() for name, p in network.named_parameters()}}


def tower_process(rank: int, folder: Path) -> None:
    warnings.simplefilter("error")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        results = {name: train(config, Tower(rank, 2, dist.group.WORLD), memory_format)
                   for name, (config, memory_format) in VARIANTS.items()}
        x = torch.full((2, 3), rank + 1.0, requires_grad=True)
        weights = torch.arange(6.0)
        (exchange(x, Tower(rank, 2)) * weights * (rank + 1)).sum().backward()
        odd = torch.ones(1, 2 - rank, requires_grad=True)
        all_three = gather_logits(odd, 3, Tower(rank, 2))
        (all_three * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        results["exchange gradient"], results["gather gradient"] = {"value": x.grad}, {"value": odd.grad}
        with torch.autocast("cpu", torch.bfloat16):
            half = AlexNet(SMALL, seed=5, tower=Tower(rank, 2))
            loss = functional.cross_entropy(half(torch.ones(2, 3, 67, 67), step=0), torch.tensor([0, 1]))
        loss.backward()
        results["autocast"] = {"loss": loss.item(), "gradient": half.conv1.weight.grad}
        torch.save(results, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes found, tower a's first."""
    folder = tmp_path_factory.mktemp("towers")
    multiprocessing.spawn(tower_process, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


# Sums in another order: 1e-16 a term. Measured: below 1e-13 after the 20 steps; wrong by a factor of 2 would be 1e-2.
CLOSE = dict(rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_equal_one(pair: list[dict[str, Any]], variant: str) -> None:
    whole = train(VARIANTS[variant][0], BOTH, VARIANTS[variant][1])
    assert abs(whole["last loss"] - whole["loss"]) > 1e-3, "the steps must move the network for this test to mean anything"
    for half in (pair[0][variant], pair[1][variant]):
        for key in ("logits", "loss", "last loss", "tested"):
            torch.testing.assert_close(half[key], whole[key], **CLOSE)
    for key in ("gradients", "parameters"):
        assert whole[key].keys() == pair[0][variant][key].keys() == canonical_shapes(SMALL).keys()
        for name, expected in whole[key].items():
            halves = [half[variant][key][name] for half in pair]
            assert expected.abs().max() > 1e-6, f"{key} of {name} must not vanish"
            assert [h.shape for h in halves] == [c.shape for c in expected.chunk(2)]
            torch.testing.assert_close(torch.cat(halves), expected, msg=lambda m: f"{key} {name}: {m}", **CLOSE)


def test_dropout_was_on(pair: list[dict[str, Any]]) -> None:
    without = train(replace(SMALL, dropout=0.0), BOTH, torch.contiguous_format)
    assert (without["logits"] - pair[0]["odd classes"]["logits"]).abs().max() > 1e-2


def test_gradients_of_an_exchange_add(pair: list[dict[str, Any]]) -> None:
    # Tower t's loss weighs the six columns by 0..5 times t + 1: together 3 times.
    assert pair[0]["exchange gradient"]["value"].tolist() == [[0.0, 3.0, 6.0]] * 2
    assert pair[1]["exchange gradient"]["value"].tolist() == [[9.0, 12.0, 15.0]] * 2


def test_gradients_of_gathered_logits_do_not_add(pair: list[dict[str, Any]]) -> None:
    assert pair[0]["gather gradient"]["value"].tolist() == [[1.0, 2.0]]
    assert pair[1]["gather gradient"]["value"].tolist() == [[3.0]]


def test_bfloat16(pair: list[dict[str, Any]]) -> None:
    network = AlexNet(SMALL, seed=5)
    loss = functional.cross_entropy(network(torch.ones(2, 3, 67, 67), step=0), torch.tensor([0, 1]))
    loss.backward()
    assert pair[0]["autocast"]["loss"] == pair[1]["autocast"]["loss"] == pytest.approx(loss.item(), rel=0.05)
    gradient = torch.cat([half["autocast"]["gradient"] for half in pair])
    expected = network.get_parameter("conv1.weight").grad
    assert expected is not None
    # As in test_alexnet: eight layers of 8 significant bits each way.
    assert functional.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) > 0.95


@pytest.mark.parametrize("size", [2, 5, 6, 21841])
def test_rows_are_those_of_chunk(size: int) -> None:
    whole = torch.arange(size)
    for rank, part in enumerate(whole.chunk(2)):
        assert torch.equal(tower_slice(whole, Tower(rank, 2)), part)
        assert tower_shape((size, 3, 4), Tower(rank, 2)) == (len(part), 3, 4)
    assert BOTH.rows(size) == (0, size)


def test_a_slice_is_a_view() -> None:
    whole = torch.zeros(4, 2)
    tower_slice(whole, Tower(1, 2)).fill_(1.0)
    assert whole.sum(1).tolist() == [0, 0, 2, 2]


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"tower count \(=3\) must be 1 .* or 2"):
        Tower(0, 3)
    with pytest.raises(ValueError, match=r"tower rank \(=2\) must be below 2"):
        Tower(2, 2)
    with pytest.raises(ValueError, match=r"model.towers \(=1\) cannot be held by 2 processes; use one process"):
        AlexNet(replace(SMALL, towers=1), seed=1, tower=Tower(0, 2))
