"""LRN and max pooling in one kernel: what LRN's kernel and torch's pooling give one after the other, NaN and ties included."""
import pytest
import torch
from torch.nn import functional

from model.alexnet import AlexNet
from model.config import Kernels, LrnConfig, PoolConfig
from model.lrn import local_response_norm, local_response_norm_pool
from tests.helpers.kernels import DEVICE, rounding  # noqa: F401 (a fixture)
from tests.helpers.networks import small

STRONG = LrnConfig(k=1.0, n=5, alpha=0.3, beta=0.75)  # a window that matters
PAPER = PoolConfig(px=3, stride=2)
pytestmark = pytest.mark.usefixtures("rounding")


def maps(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    return drawn.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


def pair(x: torch.Tensor, lrn: LrnConfig, pool: PoolConfig, groups: int, relu: bool,
         kernels: Kernels = "triton") -> torch.Tensor:
    return functional.max_pool2d(local_response_norm(x, lrn, groups, relu, kernels), pool.px, pool.stride)


def both_ways(x: torch.Tensor, lrn: LrnConfig = STRONG, pool: PoolConfig = PAPER, groups: int = 1,
              relu: bool = True) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Results and gradients: of the kernel, of the pair."""
    found = []
    for function in (lambda leaf: local_response_norm_pool(leaf, lrn, pool, groups, relu, kernels="triton"),
                     lambda leaf: pair(leaf, lrn, pool, groups, relu)):
        leaf = x.detach().clone().requires_grad_()
        y = function(leaf)
        found.append([y.detach(), *torch.autograd.grad(y, leaf, maps(*y.shape, dtype=x.dtype, seed=1))])
        assert (y.grad_fn.name() == "_LrnPoolBackward") == (len(found) == 1)
        assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in found[-1])
    return found[0], found[1]


@pytest.mark.parametrize("dtype, shape, groups, pool, lrn, relu", [
    (torch.float32, (1, 24, 7, 5), 2, PAPER, STRONG, True),    # every pixel is in a window
    (torch.float64, (1, 4, 24, 6), 1, PAPER, STRONG, False),  # 11 windows down, by two lanes; the last pixels are in none
    (torch.float64, (2, 6, 3, 3), 2, PAPER, LrnConfig(1.0, 7, 0.3, 0.6), True),  # one window; LRN's is wider than the channels
    (torch.float32, (2, 8, 6, 7), 1, PoolConfig(2, 2), STRONG, True),
    (torch.float32, (2, 8, 6, 7), 1, PoolConfig(2, 3), STRONG, True),
    (torch.float32, (1, 8, 6, 7), 1, PoolConfig(4, 1), STRONG, True)], ids=str)
def test_equals_the_two_one_after_the_other(dtype: torch.dtype, shape: tuple[int, int, int, int], groups: int, pool: PoolConfig,
                                            lrn: LrnConfig, relu: bool) -> None:
    (y, dx), (expected_y, expected_dx) = both_ways(maps(*shape, dtype=dtype), lrn, pool, groups, relu)
    assert torch.equal(y, expected_y) and y.dtype == dx.dtype == dtype
    torch.testing.assert_close(dx, expected_dx, rtol=1e-6, atol=1e-6)  # up to 16 gradients are added


def test_half_precision_rounds_its_results_alone() -> None:
    """The gradient is that of float64; compared after rounding, the largest of a window is often another one."""
    x = maps(2, 32, 9, 7, dtype=torch.bfloat16)
    (y, dx), (expected_y, other_dx) = both_ways(x, groups=2)
    assert torch.equal(y, expected_y) and dx.dtype == torch.bfloat16
    leaf, g = x.double().requires_grad_(), maps(*y.shape, dtype=torch.bfloat16, seed=1).double()
    exact, = torch.autograd.grad(pair(leaf, STRONG, PAPER, 2, True, kernels="torch"), leaf, g)
    torch.testing.assert_close(dx.double(), exact, rtol=1.2e-2, atol=1.2e-2)
    assert (other_dx.double() - exact).abs().max() > 0.1


def test_of_equal_maxima_the_first_is_taken() -> None:
    _, expected = found = both_ways(torch.ones_like(maps(1, 16, 7, 7)))
    assert all(map(torch.equal, *found))
    assert expected[1][:, :, ::2, ::2].count_nonzero() > 0  # windows begin there


def test_nan_is_not_hidden() -> None:
    x = maps(1, 16, 7, 7)
    x[0, 3, [2, 2, 3, 4], [2, 4, 3, 2]] = float("nan")  # several in a window
    (y, dx), expected = both_ways(x)
    assert y[0, 3].isnan().any() and not y[0, 8].isnan().any()
    torch.testing.assert_close([y, dx], expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("x, pool", [(maps(1, 8, 9, 9).contiguous(), PAPER), (maps(1, 8, 9, 9), PoolConfig(5, 2)),
                                     (maps(1, 8, 9, 9), PoolConfig(2, 5)), (maps(0, 8, 9, 9), PAPER)])
def test_what_the_kernel_is_not_made_for_is_done_one_after_the_other(x: torch.Tensor, pool: PoolConfig) -> None:
    y = local_response_norm_pool(x.requires_grad_(), STRONG, pool, relu=True, kernels="triton")
    assert y.grad_fn is not None and y.grad_fn.name() != "_LrnPoolBackward"
    assert torch.equal(y, pair(x, STRONG, pool, 1, True))


def test_keeps_its_input_and_a_byte_a_window() -> None:
    kept: list[torch.Tensor] = []
    x = maps(2, 8, 9, 9).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        local_response_norm_pool(x, STRONG, PAPER, kernels="triton")
    assert [t.data_ptr() for t in kept][0] == x.data_ptr() and [t.nbytes for t in kept][1:] == [2 * 8 * 4 * 4]


def test_a_network_normalises_and_pools_in_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    images, found = maps(1, 3, 67, 67), []
    for fused in (True, False):
        network = AlexNet(small(), seed=3, kernels="triton", fuse_pooling=fused).to(DEVICE, memory_format=torch.channels_last)
        calls: list[object] = []
        monkeypatch.setattr("model.alexnet.functional.max_pool2d", lambda *args: calls.append(args) or torch.max_pool2d(*args))
        found.append(network(images, step=0))
        monkeypatch.undo()
        assert len(calls) == (1 if fused else 3)  # conv5 has no LRN
    assert torch.equal(*found)
