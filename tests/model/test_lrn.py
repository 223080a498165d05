"""LRN on a CPU: by hand, against a slow loop, against torch's own, and its gradient. Its kernels: test_kernels_lrn.py."""
import pytest
import torch
from torch.nn import functional

from model import lrn
from model.config import LrnConfig
from model.lrn import local_response_norm

PAPER = LrnConfig(k=2.0, n=5, alpha=1e-4, beta=0.75)
STRONG = LrnConfig(k=1.0, n=5, alpha=0.3, beta=0.75)  # a window that matters: at alpha = 1e-4 a wrong sum would hardly show
CONFIGS = [PAPER, STRONG, LrnConfig(0.5, 1, 0.2, 0.75), LrnConfig(1.0, 3, 0.2, 0.5), LrnConfig(2.0, 9, 0.1, 0.6)]
FORMATS = [torch.contiguous_format, torch.channels_last]
# Float32: sums of 9 terms and a power, a few of 2^-24 relative each. The halves round only their output: 2^-9 and 2^-12
# of it, and of gradients up to 10.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}


def maps(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def loop(x: torch.Tensor, config: LrnConfig, groups: int = 1) -> torch.Tensor:
    """The formula of paper §3.3, channel by channel."""
    result = torch.empty_like(x)
    size = x.shape[1] // groups
    for i in range(x.shape[1]):
        first = i // size * size
        window = range(max(first, i - config.n // 2), min(first + size - 1, i + config.n // 2) + 1)
        s = config.k + config.alpha * sum(x[:, j] ** 2 for j in window)
        result[:, i] = x[:, i] / s ** config.beta
    return result


def torchs(x: torch.Tensor, config: LrnConfig, groups: int = 1) -> torch.Tensor:
    """torch's operator, whose alpha is divided by n; one group of channels per image."""
    b, c, h, w = x.shape
    maps = x.reshape(b * groups, c // groups, h, w)
    y = functional.local_response_norm(maps, config.n, config.alpha * config.n, config.beta, config.k)
    return y.reshape(x.shape)


def test_by_hand() -> None:
    # Channels 1, 2, 3 with n = 3, k = 1, alpha = 0.5, beta = 1: the sums are 1+4, 1+4+9 and 4+9.
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).view(1, 3, 1, 1)
    y = local_response_norm(x, LrnConfig(k=1.0, n=3, alpha=0.5, beta=1.0)).flatten()
    assert y.tolist() == pytest.approx([1 / 3.5, 2 / 8.0, 3 / 7.5], abs=1e-15)


def test_by_hand_constants_of_the_paper() -> None:
    # One pixel of 100 in all of 5 channels: the middle one sees all five, 2 + 1e-4·5·10⁴ = 7; the first sees three.
    y = local_response_norm(torch.full((1, 5, 1, 1), 100.0, dtype=torch.float64), PAPER).flatten()
    assert y[2].item() == pytest.approx(100 / 7**0.75, rel=1e-14)
    assert y[0].item() == pytest.approx(100 / 5**0.75, rel=1e-14)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_equals_the_loop(config: LrnConfig, groups: int) -> None:
    x = maps(2, 12, 3, 4)
    torch.testing.assert_close(local_response_norm(x, config, groups), loop(x, config, groups), rtol=1e-13, atol=0)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_equals_torchs_forward_and_backward(config: LrnConfig, relu: bool, memory_format: torch.memory_format,
                                            dtype: torch.dtype) -> None:
    x = maps(5, 24, 7, 6, dtype=dtype).to(memory_format=memory_format).requires_grad_()
    g = maps(5, 24, 7, 6, dtype=dtype, seed=1)
    y = local_response_norm(x, config, groups=2, relu=relu)
    y.backward(g)
    wide = x.detach().double().contiguous().requires_grad_()
    expected = torchs(functional.relu(wide) if relu else wide, config, groups=2)
    expected.backward(g.double())
    assert x.grad is not None and wide.grad is not None
    assert (y.dtype, x.grad.dtype) == (dtype, dtype)
    assert y.is_contiguous(memory_format=memory_format) and x.grad.is_contiguous(memory_format=memory_format)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("relu", [False, True])
def test_gradcheck(config: LrnConfig, memory_format: torch.memory_format, relu: bool) -> None:
    x = maps(2, 6, 2, 2).to(memory_format=memory_format).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: local_response_norm(x, config, 2, relu), x)


def test_gradient_of_a_gradient_is_refused() -> None:
    x = maps(1, 4, 2, 2).requires_grad_()
    g, = torch.autograd.grad(local_response_norm(x, STRONG).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice .*once_differentiable"):
        g.sum().backward()


def test_window_does_not_cross_towers() -> None:
    x = maps(1, 12, 2, 2)
    x.requires_grad_()
    y = local_response_norm(x, STRONG, groups=2)
    y[:, :6].sum().backward()
    assert x.grad is not None
    assert x.grad[:, :6].abs().min() > 0 and x.grad[:, 6:].abs().max() == 0
    halves = [local_response_norm(half, STRONG) for half in x.detach().chunk(2, dim=1)]
    assert torch.equal(y.detach(), torch.cat(halves, dim=1))
    assert not torch.allclose(y.detach(), local_response_norm(x.detach(), STRONG))


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, memory_format: torch.memory_format) -> None:
    def both(chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        monkeypatch.setattr(lrn, "CHUNK", chunk)
        x = maps(7, 10, 5, 3, dtype=torch.float32).to(memory_format=memory_format).requires_grad_()
        y = local_response_norm(x, STRONG, groups=2, relu=True)
        y.backward(maps(7, 10, 5, 3, dtype=torch.float32, seed=1))
        assert x.grad is not None
        return y.detach(), x.grad

    whole = both(1 << 20)
    for chunk in (1, 16, 170, 333):  # one map, few maps, a last chunk that is shorter
        assert all(torch.equal(a, b) for a, b in zip(both(chunk), whole))


def test_strided_input_and_gradient() -> None:
    x = maps(4, 6, 8, 9)
    cut, whole = x[:, :, ::2, 1:].requires_grad_(), x[:, :, ::2, 1:].clone().requires_grad_()
    g = maps(4, 6, 8, 4, seed=1).transpose(2, 3)
    local_response_norm(cut, STRONG).backward(g)
    torchs(whole, STRONG).backward(g)
    assert cut.grad is not None and whole.grad is not None
    torch.testing.assert_close(cut.grad, whole.grad)


def test_empty_batch() -> None:
    x = maps(0, 6, 3, 3).requires_grad_()
    local_response_norm(x, STRONG, 2).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 6, 3, 3)


def test_keeps_nothing_but_its_input() -> None:
    kept: list[torch.Tensor] = []
    x = maps(2, 8, 5, 5).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        local_response_norm(x, STRONG, 2)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_nan_is_not_hidden() -> None:
    x = maps(1, 6, 1, 1)
    x[0, 1] = float("nan")
    assert local_response_norm(x, STRONG, relu=True)[0, 1].isnan().all()


def test_nan_is_not_hidden_in_the_gradient() -> None:
    # Channels 0..5 of 9, n = 5, see the sums that channel 1 is in; the window of 6 begins past them.
    x = maps(1, 9, 1, 1)
    x[0, 1] = float("nan")
    x.requires_grad_()
    local_response_norm(x, STRONG).sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().isnan().tolist() == [True] * 6 + [False] * 3


def test_channels_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"input of LRN \(=\(2, 5, 3, 3\)\) must be .* with C a multiple of 2 groups"):
        local_response_norm(maps(2, 5, 3, 3), PAPER, groups=2)


def test_config_errors() -> None:
    with pytest.raises(ValueError, match=r"model.lrn.n \(=4\) must be odd and positive"):
        LrnConfig(2.0, 4, 1e-4, 0.75)
    with pytest.raises(ValueError, match=r"model.lrn.alpha \(=-0.1\) must not be negative"):
        LrnConfig(k=2.0, n=5, alpha=-0.1, beta=0.75)  # sums below zero have no power
    with pytest.raises(ValueError, match=r"model.lrn.k \(=0.0\) must be positive"):
        LrnConfig(0.0, 5, 1e-4, 0.75)
