"""One network in two processes equals the network in one: values, gradients, training, whatever is odd about the sizes."""
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from tests.helpers.exchanged import crossing
from tests.helpers.networks import small, with_layers

from model.alexnet import AlexNet, canonical_shapes
from model.config import Full, ModelConfig, TowerConvs
from model.tower_exchange import gather_logits
from model.towers import BOTH, Tower, tower_shape, tower_slice

SMALL = small()
STEPS = 20


@dataclass(frozen=True)
class Variant:
    """A way to train. `alike` names another that gives the same bits."""

    config: ModelConfig = SMALL
    memory_format: torch.memory_format = torch.contiguous_format
    scheme: Literal["towers", "weird"] = "towers"
    overlap: bool = True
    tower_convs: TowerConvs = "grouped"
    alike: str = ""


VARIANTS = {
    "odd classes": Variant(),
    "no overlap": Variant(overlap=False, alike="odd classes"),
    "even classes, channels_last": Variant(replace(SMALL, classes=6), torch.channels_last),
    "no LRN, no dropout, 2 classes": Variant(replace(SMALL, classes=2, lrn=None, dropout=0.0)),
    "softmax only": Variant(with_layers(SMALL, conv3={"sees": "own"}, fc6={"sees": "own"}, fc7={"sees": "own"})),
    "tanh, LRN before it, conv4 meets, bottleneck": Variant(replace(with_layers(
        SMALL, conv1={"lrn": "before"}, conv4={"sees": "both"}, fc8=Full(neurons=10, linear=True, std=0.2, bias=0),
        fc9=Full(std=0.2, bias=0)), activation="tanh")),
    "weird": Variant(scheme="weird"),
    "weird, no overlap": Variant(scheme="weird", overlap=False, alike="weird"),
    "weird, channels_last": Variant(memory_format=torch.channels_last, scheme="weird", tower_convs="halves"),
}


def train(variant: Variant, tower: Tower) -> dict[str, Any]:
    """Logits, loss and gradients of step 0, and the parameters after some steps of SGD with momentum, in float64."""
    torch.set_num_threads(1)
    config = variant.config
    network = AlexNet(config, seed=5, tower=tower, scheme=variant.scheme, overlap=variant.overlap,
                      tower_convs=variant.tower_convs).double()
    network.to(memory_format=variant.memory_format)  # type: ignore[call-overload]
    everybodys = [p for name, p in network.named_parameters() if network.tower_of(name) != tower]
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    result: dict[str, Any] = {}
    for step in range(STEPS):
        images = torch.randn(4, 3, 67, 67, generator=generator, dtype=torch.float64).to(memory_format=variant.memory_format)
        labels = torch.randint(config.classes, (4,), generator=generator)
        if network.halves_images:
            images = tower_slice(images, tower)
        optimizer.zero_grad()
        logits = network(images, step=step, rows=(2, 8))
        loss = functional.cross_entropy(logits, labels)
        loss.backward()
        for parameter in everybodys:
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
        if step == 0:
            result = {"logits": logits.detach(), "loss": loss.item(),
                      "gradients": {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}}
        optimizer.step()
    network.eval()
    with torch.no_grad():
        result["tested"] = network(images)
    return result | {"last loss": loss.item(), "parameters": {name: p.detach() for name, p in network.named_parameters()}}


class Messages(TorchDispatchMode):
    """Notes (layer, direction, dtype, elements) of each message sent."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, torch.dtype, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.c10d.send.default:
            (sent,), tag = args[0], args[3]
            self.seen.append((*crossing(tag), sent.dtype, sent.numel()))
        return function(*args, **(kwargs or {}))


def tower_process(rank: int, folder: Path) -> None:
    warnings.simplefilter("error")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        results: dict[str, Any] = {name: train(variant, Tower(rank, 2, dist.group.WORLD)) for name, variant in VARIANTS.items()}
        odd = torch.ones(1, 2 - rank, requires_grad=True)
        all_three = gather_logits(odd, 3, Tower(rank, 2))
        (all_three * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        results["gather gradient"] = odd.grad
        for scheme, memory_format in (("towers", torch.contiguous_format), ("weird", torch.channels_last)):
            half = AlexNet(SMALL, seed=5, tower=Tower(rank, 2), scheme=scheme)  # type: ignore[arg-type]
            half.to(memory_format=memory_format)  # type: ignore[call-overload]
            with Messages() as messages:
                with torch.autocast("cpu", torch.bfloat16):
                    images = torch.ones(2 if scheme == "towers" else 1, 3, 67, 67).to(memory_format=memory_format)
                    loss = functional.cross_entropy(half(images, step=0), torch.tensor([0, 1]))
                loss.backward()
            gradient = half.get_parameter("conv1.weight").grad
            assert gradient is not None
            if scheme == "weird":
                dist.all_reduce(gradient)
            results[f"autocast, {scheme}"] = {"loss": loss.item(), "gradient": gradient, "messages": messages.seen}
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
    whole = train(VARIANTS[variant], BOTH)
    assert abs(whole["last loss"] - whole["loss"]) > 1e-3, "the steps must move the network for this test to mean anything"
    for half in (pair[0][variant], pair[1][variant]):
        for key in ("logits", "loss", "last loss", "tested"):
            torch.testing.assert_close(half[key], whole[key], **CLOSE)
    for key in ("gradients", "parameters"):
        assert whole[key].keys() == pair[0][variant][key].keys() == canonical_shapes(VARIANTS[variant].config).keys()
        for name, expected in whole[key].items():
            halves = [half[variant][key][name] for half in pair]
            assert expected.abs().max() > 1e-6, f"{key} of {name} must not vanish"
            if VARIANTS[variant].scheme == "weird" and name.startswith("conv"):
                assert torch.equal(*halves), f"{key} of {name} must be the same in both"
                halves = halves[:1]
            else:
                assert [h.shape for h in halves] == [c.shape for c in expected.chunk(2)]
            torch.testing.assert_close(torch.cat(halves), expected, msg=lambda m: f"{key} {name}: {m}", **CLOSE)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if VARIANTS[name].alike])
def test_overlap_changes_no_bit(pair: list[dict[str, Any]], variant: str) -> None:
    for half in pair:
        torch.testing.assert_close(half[variant], half[VARIANTS[variant].alike], rtol=0.0, atol=0.0)


def test_dropout_was_on(pair: list[dict[str, Any]]) -> None:
    without = train(Variant(replace(SMALL, dropout=0.0)), BOTH)
    assert (without["logits"] - pair[0]["odd classes"]["logits"]).abs().max() > 1e-2


def test_gradients_of_gathered_logits_do_not_add(pair: list[dict[str, Any]]) -> None:
    assert pair[0]["gather gradient"].tolist() == [[1.0, 2.0]]
    assert pair[1]["gather gradient"].tolist() == [[3.0]]


@pytest.mark.parametrize("scheme", ["towers", "weird"])
def test_bfloat16(pair: list[dict[str, Any]], scheme: str) -> None:
    network = AlexNet(SMALL, seed=5)
    loss = functional.cross_entropy(network(torch.ones(2, 3, 67, 67), step=0), torch.tensor([0, 1]))
    loss.backward()
    halves = [half[f"autocast, {scheme}"] for half in pair]
    assert halves[0]["loss"] == halves[1]["loss"] == pytest.approx(loss.item(), rel=0.05)
    gradients = [half["gradient"] for half in halves]
    expected = network.get_parameter("conv1.weight").grad
    assert expected is not None
    # As in test_alexnet: eight layers of 8 significant bits each way.
    whole = torch.cat(gradients) if scheme == "towers" else gradients[0]
    assert functional.cosine_similarity(whole.flatten(), expected.flatten(), dim=0) > 0.95


@pytest.mark.parametrize("scheme", ["towers", "weird"])
def test_what_crosses_is_bfloat16_and_each_half_once(pair: list[dict[str, Any]], scheme: str) -> None:
    conv3 = {"conv3": 2 * 6 * 3 * 3} if scheme == "towers" else {}  # 2 images, 6 channels of 3×3 after pool2
    sizes = conv3 | {"fc6": 2 * 4, "fc7": 2 * 12, "fc8": 2 * 10}
    for rank, half in enumerate(pair):
        expected = [(name, "forward", torch.bfloat16, count) for name, count in sizes.items()]
        expected += [("logits", "forward", torch.bfloat16, 2 * (4 - rank))]
        expected += [(name, "backward", torch.bfloat16, count) for name, count in reversed(sizes.items())]
        assert half[f"autocast, {scheme}"]["messages"] == expected


def test_tower_of_says_what_is_split() -> None:
    tower = Tower(1, 2)
    names = {scheme: {name for name in canonical_shapes(SMALL) if AlexNet(SMALL, seed=1, tower=tower, scheme=scheme).tower_of(
        name) == tower} for scheme in ("towers", "weird")}  # type: ignore[arg-type]
    assert names["towers"] == set(canonical_shapes(SMALL))
    assert names["weird"] == {f"{layer}.{kind}" for layer in ("fc6", "fc7", "fc8") for kind in ("weight", "bias")}
    assert all(AlexNet(SMALL, seed=1, scheme="weird").tower_of(name) == BOTH for name in canonical_shapes(SMALL))


def test_weird_refuses_rows_outside_the_batch() -> None:
    network = AlexNet(SMALL, seed=1, tower=Tower(0, 2), scheme="weird")
    with pytest.raises(ValueError, match=r"rows \(=3, 8\) do not hold a batch of 6; give \(first row, rows of the global"):
        network(torch.zeros(3, 3, 67, 67), step=0, rows=(3, 8))


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
