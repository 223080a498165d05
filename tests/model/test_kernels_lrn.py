"""LRN's Triton kernels against torch's own in float64, as test_lrn.py does for the chunks."""
import pytest
import torch
from torch.nn import functional

from model.config import LrnConfig
from model.lrn import local_response_norm
from tests.helpers.kernels import DEVICE, rounding  # noqa: F401 (a fixture)

FORMATS = [torch.contiguous_format, torch.channels_last]
STRONG = LrnConfig(k=1.0, n=5, alpha=0.3, beta=0.75)  # a window that matters: at alpha = 1e-4 a wrong sum would hardly show
TOLERANCES = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}  # as in test_lrn.py
pytestmark = pytest.mark.usefixtures("rounding")


def maps(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3).to(dtype)


def both_ways(x: torch.Tensor, g: torch.Tensor, config: LrnConfig, groups: int, relu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """LRN of x by the kernels, and the gradient by it given that by the result, in the memory format of x."""
    leaf = x.detach().to(DEVICE).requires_grad_()
    y = local_response_norm(leaf, config, groups, relu, kernels="triton")
    dx, = torch.autograd.grad(y, leaf, g.to(DEVICE))
    return y.detach().cpu(), dx.cpu()


def exact(x: torch.Tensor, g: torch.Tensor, config: LrnConfig, groups: int, relu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by torch's operator in float64, whose alpha is divided by n."""
    leaf = x.double().contiguous().requires_grad_()
    b, c, h, w = x.shape
    rectified = functional.relu(leaf) if relu else leaf
    y = functional.local_response_norm(rectified.reshape(b * groups, c // groups, h, w), config.n, config.alpha * config.n,
                                       config.beta, config.k).reshape(x.shape)
    return y.detach(), torch.autograd.grad(y, leaf, g.double())[0]


def compare(shape: tuple[int, int, int, int], groups: int, config: LrnConfig, memory_format: torch.memory_format,
            dtype: torch.dtype, relu: bool) -> None:
    x, g = (maps(*shape, dtype=dtype, seed=seed).to(memory_format=memory_format) for seed in range(2))
    tolerance = TOLERANCES[dtype] * (1 if config.n < 15 else 2)  # 15 terms, not 9
    for result, expected in zip(both_ways(x, g, config, groups, relu), exact(x, g, config, groups, relu), strict=True):
        assert result.dtype == dtype and result.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_torchs_forward_and_backward(memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    compare((1, 48, 6, 5), 2, STRONG, memory_format, dtype, relu=True)  # 24 channels: 16 + 8 a lane in NCHW


@pytest.mark.slow
@pytest.mark.parametrize("shape, groups", [((1, 24, 13, 11), 1), ((2, 38, 3, 5), 2), ((3, 12, 1, 1), 2)])
@pytest.mark.parametrize("config, relu", [(STRONG, False), (LrnConfig(1.0, 7, 0.3, 0.6), True),
                                          (LrnConfig(1.0, 15, 0.3, 0.75), True), (LrnConfig(0.5, 1, 0.2, 0.75), False)], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_sizes_that_fill_no_block(shape: tuple[int, int, int, int], groups: int, config: LrnConfig, relu: bool,
                                  memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    """Pixels 128 + 15; channels 16 + 8, or an odd number of them; windows wider than the channels."""
    compare(shape, groups, config, memory_format, dtype, relu)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_odd_channels_and_a_window_wider_than_they(memory_format: torch.memory_format) -> None:
    compare((1, 14, 2, 3), 2, LrnConfig(1.0, 15, 0.3, 0.6), memory_format, torch.float64, relu=False)


@pytest.mark.parametrize("relu", [False, True])
def test_nan_is_not_hidden(relu: bool) -> None:
    # Channels 0..5 of 9, n = 5, see the sums that channel 1 is in; the window of 6 begins past them.
    x = maps(1, 9, 1, 1).abs()
    x[0, 1] = float("nan")
    y, dx = both_ways(x, torch.ones_like(x), STRONG, 1, relu)
    assert y.flatten().isnan().tolist() == [True] * 4 + [False] * 5
    assert dx.flatten().isnan().tolist() == [True] * 6 + [False] * 3


def test_strided_input_and_gradient() -> None:
    x, g = maps(2, 6, 4, 5)[:, :, ::2, 1:], maps(2, 6, 4, 2, seed=1).transpose(2, 3)
    for result, expected in zip(both_ways(x, g, STRONG, 1, False), exact(x, g, STRONG, 1, False), strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=3e-6, atol=3e-6)
