"""Variants of the network as plain config: each against the same thing once more in torch's own layers."""
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.helpers.networks import small, with_layers
from torch import nn
from torch.nn import functional

from model.alexnet import AlexNet, canonical_shapes, paper, parameter_count, shapes, output_sides
from model.config import Conv, Full, LrnConfig, ModelConfig, PoolConfig
from model.towers import Tower

SMALL = small()
OWN = {"sees": "own"}
VARIANTS: dict[str, ModelConfig] = {
    "paper": SMALL,
    "tanh": replace(SMALL, activation="tanh"),
    "no LRN": replace(SMALL, lrn=None),
    "LRN before ReLU": with_layers(SMALL, conv1={"lrn": "before"}),
    "LRN before tanh": replace(with_layers(SMALL, conv1={"lrn": "before"}), activation="tanh"),
    "LRN elsewhere": with_layers(SMALL, conv1={"lrn": "none"}, conv5={"lrn": "after"}),
    "release constants": replace(SMALL, lrn=LrnConfig(k=2.0, n=5, alpha=2e-5, beta=0.75)),
    "no overlap": replace(SMALL, pool=PoolConfig(px=2, stride=2)),
    "one tower": small(towers=1),
    "softmax only": with_layers(SMALL, conv3=OWN, fc6=OWN, fc7=OWN),
    "never": with_layers(SMALL, conv3=OWN, fc6=OWN, fc7=OWN, fc8=OWN),
    "conv4 meets": with_layers(SMALL, conv4={"sees": "both"}),
    "without conv3": with_layers(SMALL, conv3=None),
    "without conv1": with_layers(small(input_px=31), conv1=None),
    "without fc7": with_layers(SMALL, fc7=None),
    "only the softmax layer": with_layers(SMALL, fc6=None, fc7=None),
    "conv6": with_layers(small(input_px=99), conv6=Conv(8, px=3, pad=1, sees="both", std=0.1, bias=1)),
    "bottleneck": with_layers(SMALL, fc8=Full(neurons=10, linear=True, std=0.2, bias=0), fc9=Full(std=0.2, bias=0)),
}


def plain(config: ModelConfig, p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The network in torch's own layers, without dropout."""
    act = functional.relu if config.activation == "relu" else torch.tanh

    def lrn(x: torch.Tensor) -> torch.Tensor:
        assert config.lrn is not None
        norm = nn.LocalResponseNorm(config.lrn.n, alpha=config.lrn.n * config.lrn.alpha, beta=config.lrn.beta, k=config.lrn.k)
        return torch.cat([norm(part) for part in x.chunk(config.towers, 1)], 1)

    first = True
    for name, conv in config.convs.items():
        groups = 1 if first or conv.sees == "both" else config.towers
        x = functional.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], stride=conv.stride, padding=conv.pad, groups=groups)
        if config.lrn is not None and conv.lrn == "before":
            x = lrn(x)
        x = act(x)
        if config.lrn is not None and conv.lrn == "after":
            x = lrn(x)
        if conv.pool:
            x = functional.max_pool2d(x, config.pool.px, config.pool.stride)
        first = False
    x = x.flatten(1)
    for name, full in config.fulls.items():
        weight = p[f"{name}.weight"]
        if full.sees == "own" and config.towers == 2:
            rows = -(-weight.shape[0] // 2)
            weight = torch.block_diag(weight[:rows], weight[rows:])
        x = functional.linear(x, weight, p[f"{name}.bias"])
        if name != config.last and not full.linear:
            x = act(x)
    return x


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_plain_layers(name: str) -> None:
    config = replace(VARIANTS[name], dropout=0.0)
    network = AlexNet(config, seed=3).double()
    p = dict(network.named_parameters())
    assert {key: tuple(value.shape) for key, value in p.items()} == canonical_shapes(config)
    x = torch.randn(4, 3, config.input_px, config.input_px, generator=torch.Generator().manual_seed(2)).double()
    expected, actual = plain(config, p, x), network(x, step=0)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    labels = torch.arange(4)
    gradients = [torch.autograd.grad(functional.cross_entropy(out, labels), list(p.values())) for out in (actual, expected)]
    for key, ours, theirs in zip(p, *gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=lambda m: f"{key}: {m}")
        assert ours.abs().max() > 0, f"{key} learns nothing"


@pytest.mark.parametrize("name", [name for name, config in VARIANTS.items() if config.towers == 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_two_dense_halves_equal_grouped_convolutions(name: str, memory_format: torch.memory_format,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    config, found = VARIANTS[name], []
    px, labels = config.input_px, torch.arange(3)
    x = torch.randn(3, 3, px, px, generator=torch.Generator().manual_seed(2)).double().to(memory_format=memory_format)
    plain, groups = functional.conv2d, []

    def conv2d(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        assert x.is_contiguous(memory_format=memory_format) and weight.is_contiguous(memory_format=memory_format)
        groups.append(x.shape[1] // weight.shape[1])
        return plain(x, weight, *rest)

    monkeypatch.setattr(functional, "conv2d", conv2d)
    for convs in ("grouped", "halves"):
        groups.clear()
        network = AlexNet(config, seed=3, tower_convs=convs).double().to(memory_format=memory_format)
        logits = network(x, step=0)
        found.append([logits, *torch.autograd.grad(functional.cross_entropy(logits, labels), list(network.parameters()))])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert groups == [1, 1] * len(config.convs)


def test_what_a_tower_sees() -> None:
    """In the network whose towers never meet, nothing of tower b's kernels reaches tower a's logits."""
    network = AlexNet(VARIANTS["never"], seed=3).eval()
    x = torch.randn(2, 3, 67, 67, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before = network(x)
        network.get_parameter("conv1.weight")[4:] += 1.0
        after = network(x)
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.equal(before[:, 4:], after[:, 4:])  # 4 of the 7 are tower a's


def test_a_tower_holds_its_rows() -> None:
    """Shapes of one tower's parameters are its rows of the canonical ones, in every variant that has two."""
    for name, config in VARIANTS.items():
        if config.towers == 2:
            for rank in (0, 1):
                tower = Tower(rank, 2)
                with torch.device("meta"):
                    held = {key: tuple(p.shape) for key, p in AlexNet(config, seed=1, tower=tower).named_parameters()}
                for key, shape in canonical_shapes(config).items():
                    low, high = tower.rows(shape[0])
                    assert held[key] == (high - low, *shape[1:]), f"{name}: {key}"


def test_features_are_what_the_last_layer_sees() -> None:
    network = AlexNet(SMALL, seed=3).eval()
    x = torch.randn(2, 3, 67, 67, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        features = network.features(x)
        assert features.shape == (2, 20)
        torch.testing.assert_close(network.get_submodule("fc8")(features), network(x))


def test_sizes_of_the_papers_variants() -> None:
    six = with_layers(paper(), conv6=Conv(256, px=3, pad=1, sees="both", std=0.03, bias=1))
    assert output_sides(six)[-2:] == [("pool5", 6), ("conv6", 6)]
    assert parameter_count(six) == 60_965_224 + 256 * 256 * 9 + 256
    flat = replace(paper(), pool=PoolConfig(px=2, stride=2))
    # paper §3.4: of equal dimensions
    assert [side for _, side in output_sides(flat)] == [side for _, side in output_sides(paper())]
    assert dict(shapes(with_layers(paper(), conv5=None, conv4={"pool": True})))["pool4"] == (384, 6, 6)


def test_scheme_weird_refuses_layers_that_see_their_own_tower() -> None:
    with pytest.raises(ValueError, match=r"model.layers.fc6.sees \(=own\) cannot be split in scheme weird; use parallel.scheme"):
        AlexNet(VARIANTS["softmax only"], seed=1, tower=Tower(0, 2), scheme="weird")


@pytest.mark.parametrize(("layers", "message"), [
    ({"conv1": SMALL.layers["conv1"]}, r"model.layers \(=\['conv1'\]\) must end with a fully connected layer"),
    ({"fc8": SMALL.layers["fc8"]}, r"model.layers \(=\['fc8'\]\) must have a convolution; add conv1"),
    ({**SMALL.layers, "fc9": SMALL.layers["fc8"]}, r"model.layers.fc8.neurons \(=0\) must be a positive multiple"),
    ({**SMALL.layers, "pool1": {}}, r"model.layers \(=pool1\) must have names"),
    ([1, 2], r"model.layers \(=\[1, 2\]\) must map names to layers"),
])
def test_refuses_tables_that_make_no_network(layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, layers=layers)


def test_order_is_that_of_the_names() -> None:
    shuffled = replace(SMALL, layers=dict(reversed(SMALL.layers.items())))
    assert list(shuffled.layers) == list(SMALL.layers) and shuffled == SMALL and hash(shuffled) == hash(SMALL)
