"""The network of paper §3: sizes, what sees what, independence of how a batch is cut, and what it refuses."""
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.helpers.networks import small, with_layers

from model.alexnet import AlexNet, canonical_shapes, paper, parameter_count, shapes, output_sides

SMALL = small()


def images(count: int = 6, px: int = 67) -> torch.Tensor:
    return torch.randn(count, 3, px, px, generator=torch.Generator().manual_seed(2))


def test_the_papers_parameters() -> None:
    with torch.device("meta"):
        network = AlexNet(paper(), seed=1)
    assert {name: tuple(p.shape) for name, p in network.named_parameters()} == canonical_shapes(paper()) == {
        "conv1.weight": (96, 3, 11, 11), "conv1.bias": (96,), "conv2.weight": (256, 48, 5, 5), "conv2.bias": (256,),
        "conv3.weight": (384, 256, 3, 3), "conv3.bias": (384,), "conv4.weight": (384, 192, 3, 3), "conv4.bias": (384,),
        "conv5.weight": (256, 192, 3, 3), "conv5.bias": (256,), "fc6.weight": (4096, 9216), "fc6.bias": (4096,),
        "fc7.weight": (4096, 4096), "fc7.bias": (4096,), "fc8.weight": (1000, 4096), "fc8.bias": (1000,)}
    assert sum(p.numel() for p in network.parameters()) == parameter_count(paper()) == 60_965_224


def test_the_papers_shapes() -> None:
    expected = [("conv1", (96, 55, 55)), ("pool1", (96, 27, 27)), ("conv2", (256, 27, 27)), ("pool2", (256, 13, 13)),
                ("conv3", (384, 13, 13)), ("conv4", (384, 13, 13)), ("conv5", (256, 13, 13)), ("pool5", (256, 6, 6)),
                ("fc6", (4096,)), ("fc7", (4096,)), ("fc8", (1000,))]
    assert shapes(paper()) == expected
    # And as they really are, on a device that computes shapes only.
    seen: list[tuple[str, tuple[int, ...]]] = []
    with torch.device("meta"):
        network = AlexNet(paper(), seed=1).eval()
        for name, layer in network.named_children():
            layer.register_forward_hook(lambda _, __, y, name=name: seen.append((name, tuple(y.shape[1:]))))
        assert network(torch.empty(2, 3, 227, 227)).shape == (2, 1000)
    assert seen == [pair for pair in expected if not pair[0].startswith("pool")]


def test_the_papers_initial_values() -> None:
    network = AlexNet(with_layers(paper(10), fc6={"neurons": 16}, fc7={"neurons": 16}), seed=1)
    for name, p in network.named_parameters():
        if name.endswith("bias"):
            assert (p == (0.0 if name.split(".")[0] in ("conv1", "conv3", "fc8") else 1.0)).all(), name
        else:
            assert p.std().item() == pytest.approx(0.01, rel=0.2), name


def test_the_small_network_has_the_same_layers() -> None:
    assert [side for _, side in output_sides(SMALL)] == [15, 7, 7, 3, 3, 3, 3, 1]


def test_equals_plain_layers() -> None:
    """The whole network once more, of torch's own layers with torch's own grouping and normalisation."""
    config = replace(SMALL, dropout=0.0)
    network = AlexNet(config, seed=3).double()
    p = dict(network.named_parameters())
    x = images().double()

    def normalised(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([nn.LocalResponseNorm(5, alpha=5 * 0.05, beta=0.75, k=1.0)(half) for half in x.chunk(2, 1)], 1)

    def conv(x: torch.Tensor, n: int, **how: Any) -> torch.Tensor:
        return functional.relu(functional.conv2d(x, p[f"conv{n}.weight"], p[f"conv{n}.bias"], **how))

    y = functional.max_pool2d(normalised(conv(x, 1, stride=4)), 3, 2)
    y = functional.max_pool2d(normalised(conv(y, 2, padding=2, groups=2)), 3, 2)
    y = conv(conv(conv(y, 3, padding=1), 4, padding=1, groups=2), 5, padding=1, groups=2)
    y = functional.max_pool2d(y, 3, 2).flatten(1)
    for n in (6, 7):
        y = functional.relu(functional.linear(y, p[f"fc{n}.weight"], p[f"fc{n}.bias"]))
    expected = functional.linear(y, p["fc8.weight"], p["fc8.bias"])
    actual = network(x, step=0)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    labels = torch.arange(6)
    gradients = [torch.autograd.grad(functional.cross_entropy(out, labels), list(p.values())) for out in (actual, expected)]
    for name, ours, theirs in zip(p, *gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=lambda m: f"{name}: {m}")


def test_towers_meet_only_where_the_paper_says() -> None:
    network = AlexNet(SMALL, seed=3).eval()
    seen: dict[str, torch.Tensor] = {}
    for name, layer in network.named_children():
        layer.register_forward_hook(lambda _, __, y, name=name: seen.__setitem__(name, y.detach().clone()))
    with torch.no_grad():
        network(images())
        before = dict(seen)
        network.conv1.weight[4:] += 1.0  # type: ignore[index, operator]  # tower b's kernels
        network(images())
    halves = {name: [not torch.equal(*pair) for pair in zip(before[name].chunk(2, 1), seen[name].chunk(2, 1))] for name in seen}
    assert halves["conv1"] == halves["conv2"] == [False, True]
    assert halves["conv3"] == [True, True]


def test_one_tower_is_not_grouped() -> None:
    config = small((7, 9, 5, 3, 5), (11, 13), towers=1)
    network = AlexNet(config, seed=3)
    assert {name: tuple(p.shape) for name, p in network.named_parameters()} == canonical_shapes(config)
    assert canonical_shapes(config)["conv2.weight"] == (9, 7, 5, 5)
    network(images(), step=0).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


def test_rows_of_a_cut_batch() -> None:
    """A batch in pieces gives the logits and the gradients of the batch in one, dropout included."""
    network = AlexNet(SMALL, seed=3).double()
    x = images(6).double()
    whole = network(x, step=4)
    pieces = torch.cat([network(x[a:b], step=4, rows=(a, 6)) for a, b in ((0, 1), (1, 4), (4, 6))])
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-12)
    weights = torch.randn(whole.shape, dtype=torch.float64)
    a, b = (torch.autograd.grad((out * weights).sum(), list(network.parameters())) for out in (whole, pieces))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_words_stand_for_the_step() -> None:
    network = AlexNet(SMALL, seed=3)
    x = images(6)
    assert network.dropout_words(4).shape == (2, 4) and network.dropout_words(4).device.type == "cpu"
    assert torch.equal(network(x[2:5], words=network.dropout_words(4), rows=(2, 6)), network(x[2:5], step=4, rows=(2, 6)))
    assert not torch.equal(network(x, words=network.dropout_words(5)), network(x, step=4))
    with pytest.raises(ValueError, match=r"words \(=\(1, 4\) torch.int32\) must be \(2, 4\) int32"):
        network(x, words=network.dropout_words(4)[:1])


def test_step_chooses_the_masks_and_test_needs_none() -> None:
    network = AlexNet(SMALL, seed=3)
    x = images()
    assert torch.equal(network(x, step=4), network(x, step=4))
    assert not torch.equal(network(x, step=4), network(x, step=5))
    network.eval()
    assert torch.equal(network(x), network(x, step=4))


def test_global_generator_has_no_say() -> None:
    torch.manual_seed(1)
    a = AlexNet(SMALL, seed=3)(images(), step=0)
    torch.manual_seed(2)
    assert torch.equal(a, AlexNet(SMALL, seed=3)(images(), step=0))
    assert not torch.equal(a, AlexNet(SMALL, seed=4)(images(), step=0))


def test_channels_last_gives_the_same() -> None:
    # Float32: other kernels of oneDNN sum in another order, 1e-6 relative.
    plain, last = AlexNet(SMALL, seed=3), AlexNet(SMALL, seed=3)
    last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    a, b = plain(images(), step=0), last(images().to(memory_format=torch.channels_last), step=0)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_bfloat16_autocast(memory_format: torch.memory_format) -> None:
    network = AlexNet(SMALL, seed=3)
    exact = functional.cross_entropy(network(images(), step=0), torch.arange(6))
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(images().to(memory_format=memory_format), step=0)
        loss = functional.cross_entropy(logits, torch.arange(6))
    assert logits.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.03)
    gradients = [torch.autograd.grad(value, list(network.parameters())) for value in (exact, loss)]
    for name, a, b in zip(dict(network.named_parameters()), *gradients):
        # Eight layers of 8 significant bits each way: conv1's gradient, the last, has a cosine of 0.97, also without LRN.
        assert b.dtype == torch.float32 and functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.95, name


def test_refuses_other_images() -> None:
    with pytest.raises(ValueError, match=r"images \(=\(1, 3, 66, 67\)\) must be \(B, 3, 67, 67\); set data.crop_px"):
        AlexNet(SMALL, seed=3)(torch.zeros(1, 3, 66, 67), step=0)


def test_refuses_training_without_a_step() -> None:
    with pytest.raises(ValueError, match=r"step \(=None\) must be given in training; pass the global step"):
        AlexNet(SMALL, seed=3)(images())


@pytest.mark.parametrize("rows", [(3, 8), (-1, 8), (0, 5)])
def test_refuses_rows_outside_the_batch(rows: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"rows \(={rows[0]}, {rows[1]}\) do not hold a batch of 6"):
        AlexNet(SMALL, seed=3)(images(), step=0, rows=rows)


@pytest.mark.parametrize(("change", "message"), [
    ({"input_px": 66}, r"model.input_px \(=66\) leaves 2 px before pool5, less than its window of 3; use larger crops"),
    ({"input_px": 10}, r"model.input_px \(=10\) leaves 10 px before conv1, less than its window of 11"),
    ({"input_px": 0}, r"model.input_px \(=0\) must be positive"),
    ({"towers": 3}, r"model.towers \(=3\) must be 1 or 2"),
    ({"classes": 1}, r"model.classes \(=1\) must be 2 to 1048576"),
    ({"dropout": 1.0}, r"model.dropout \(=1.0\) must be in \[0, 0.95\]"),
])
def test_refuses_sizes_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        AlexNet(replace(SMALL, **change), seed=3)
