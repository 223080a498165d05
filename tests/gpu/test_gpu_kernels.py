"""Response normalisation on a GPU: its Triton kernels, alone and with the pooling after it, and what goes another way."""
from typing import Any

import pytest
import torch
from torch.nn import functional

from model.config import Kernels, LrnConfig, PoolConfig
from model.kernels import what_is_missing
from model.lrn import local_response_norm, local_response_norm_pool

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_response_normalisation_equals_the_cpus(layout: torch.memory_format) -> None:
    lrn = LrnConfig(2.0, 5, 1e-4, 0.75)
    x = torch.randn(4, 32, 15, 15).mul_(50).contiguous(memory_format=layout)
    results = []
    for device in ("cpu", "cuda"):
        there = x.detach().to(device).requires_grad_()
        y = local_response_norm(there, lrn, groups=2, relu=True)
        y.backward(torch.ones_like(y))
        assert there.grad is not None
        results.append((y.detach().cpu(), there.grad.cpu()))
    for here, there in zip(*results, strict=True):
        assert torch.allclose(here, there, rtol=1e-5, atol=1e-4)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Opens the fused way of LRN alone; the list names the passes that go through it."""
    from model.kernels import lrn as module

    assert what_is_missing() is None
    taken: list[str] = []
    launch = module._launch

    def counted(kernel: Any, *rest: Any) -> None:
        taken.append(kernel.__name__)
        launch(kernel, *rest)

    monkeypatch.setattr(module, "_launch", counted)
    return taken


def normalised(x: torch.Tensor, g: torch.Tensor, lrn: LrnConfig, groups: int = 2,
               relu: bool = True, kernels: Kernels = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """LRN of x and, given the gradient by it, that by x."""
    leaf = x.detach().requires_grad_()
    y = local_response_norm(leaf, lrn, groups, relu, kernels)
    return y.detach(), torch.autograd.grad(y, leaf, g)[0]


def drawn(*shape: int, dtype: torch.dtype, layout: torch.memory_format, seed: int = 0) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    return values.to(dtype).contiguous(memory_format=layout)


STRONG = LrnConfig(1.0, 5, 0.3, 0.75)  # a window that matters
LAYOUTS = [torch.contiguous_format, torch.channels_last]
# As in tests/model/test_lrn.py: float32 rounds over a window, a power and the GPU's roots; the halves round their results.
LRN_TOLERANCES = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}


@pytest.mark.parametrize("shape, groups, n, beta, relu", [
    ((3, 96, 13, 11), 2, 5, 0.75, True),   # the network's: 48 channels, 16 bytes of them a lane; 143 pixels fill no block
    ((2, 38, 9, 5), 2, 7, 0.6, False),     # 19 channels: one a lane
    ((5, 20, 1, 1), 1, 3, 0.75, True),     # one pixel: the two formats are one
    ((2, 12, 16, 16), 1, 1, 0.6, True),    # a shift of whole blocks
    ((2, 12, 3, 7), 2, 15, 0.75, False)])  # a window wider than the channels
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", LRN_TOLERANCES, ids=str)
def test_fused_response_normalisation_equals_float64_on_the_cpu(
        fused: list[str], shape: tuple[int, int, int, int], groups: int, n: int, beta: float, relu: bool,
        layout: torch.memory_format, dtype: torch.dtype) -> None:
    lrn = LrnConfig(1.0, n, 0.3, beta)
    x, g = (drawn(*shape, dtype=dtype, layout=layout, seed=seed) for seed in range(2))
    expected = normalised(x.double(), g.double(), lrn, groups, relu)
    found = normalised(x.cuda(), g.cuda(), lrn, groups, relu)
    assert fused == ["_forward", "_backward"]
    tolerance = LRN_TOLERANCES[dtype] * (1 if n < 15 else 2)
    for here, there in zip(expected, found, strict=True):
        assert there.dtype == dtype and there.is_contiguous(memory_format=layout)
        torch.testing.assert_close(there.cpu().double(), here, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_fused_response_normalisation_lets_nan_through(fused: list[str], layout: torch.memory_format) -> None:
    x = drawn(1, 9, 1, 2, dtype=torch.float32, layout=layout)
    x[0, 1, 0, 0] = float("nan")
    expected = normalised(x, torch.ones_like(x), STRONG, groups=1)
    found = normalised(x.cuda(), torch.ones_like(x).cuda(), STRONG, groups=1)
    for here, there in zip(expected, found, strict=True):
        assert here.isnan().any() and torch.equal(here.isnan(), there.cpu().isnan())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_fused_response_normalisation_of_misaligned_maps(fused: list[str], layout: torch.memory_format) -> None:
    """The kernels load 16 bytes at once only where those lie so."""
    x, g = (drawn(4, 32, 5, 5, dtype=torch.bfloat16, layout=layout, seed=seed).cuda() for seed in range(2))
    aside = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].as_strided(x.shape, x.stride()).copy_(x)
    assert aside.data_ptr() % 4 == 2
    for one, other in zip(normalised(x, g, STRONG), normalised(aside, g, STRONG), strict=True):
        assert torch.equal(one, other)


def test_fused_response_normalisation_allocates_its_results_alone(fused: list[str]) -> None:
    x, g = (drawn(8, 96, 27, 27, dtype=torch.bfloat16, layout=torch.channels_last, seed=seed).cuda() for seed in range(2))
    normalised(x, g, STRONG)
    leaf = x.requires_grad_()

    def grown(since: int) -> int:
        return int(torch.cuda.memory_stats()["requested_bytes.all.peak"]) - since

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    y = local_response_norm(leaf, STRONG, 2, relu=True)
    assert grown(before) == x.nbytes
    dx, = torch.autograd.grad(y, leaf, g)
    assert grown(before) == 2 * x.nbytes == y.nbytes + dx.nbytes


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_fused_response_normalisation_in_a_cuda_graph(fused: list[str], layout: torch.memory_format) -> None:
    """Captured on a stream of its own, with the values of one batch, and replayed on another's."""
    (x, g), (other_x, other_g) = ([drawn(4, 96, 13, 13, dtype=torch.bfloat16, layout=layout, seed=seed).cuda() for seed in pair]
                                  for pair in ((0, 1), (2, 3)))
    expected = normalised(other_x, other_g, STRONG)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        normalised(x, g, STRONG)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        found = normalised(x, g, STRONG)
    x.copy_(other_x)
    g.copy_(other_g)
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_fused_response_normalisation_past_2_31_elements(fused: list[str], layout: torch.memory_format) -> None:
    images = 2**31 // (96 * 55 * 55) + 2
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    x = torch.empty(images, 96, 55, 55, dtype=torch.bfloat16, device="cuda", memory_format=layout).normal_(0, 3)
    assert x.numel() > 2**31
    for whole, last in zip(normalised(x, x, STRONG), normalised(x[-2:], x[-2:], STRONG), strict=True):
        assert torch.equal(whole[-2:], last)


def test_response_normalisation_without_triton_takes_the_chunks(fused: list[str]) -> None:
    x, g = (drawn(2, 32, 9, 7, dtype=torch.float64, layout=torch.channels_last, seed=seed) for seed in range(2))
    for here, there in zip(normalised(x, g, STRONG), normalised(x.cuda(), g.cuda(), STRONG, kernels="torch"), strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-13, atol=1e-13)
    assert fused == []


def test_response_normalisation_over_more_channels_than_the_kernels_unroll_takes_the_chunks(fused: list[str]) -> None:
    x, g = (drawn(2, 80, 3, 3, dtype=torch.float64, layout=torch.channels_last, seed=seed) for seed in range(2))
    for n, passes in ((31, ["_forward", "_backward"]), (33, [])):
        lrn = LrnConfig(1.0, n, 0.3, 0.75)
        fused.clear()
        for here, there in zip(normalised(x, g, lrn), normalised(x.cuda(), g.cuda(), lrn), strict=True):
            torch.testing.assert_close(there.cpu(), here, rtol=1e-12, atol=1e-12)
        assert fused == passes


def test_fused_response_normalisation_on_the_second_gpu(fused: list[str]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, g = (drawn(2, 32, 9, 7, dtype=torch.float32, layout=torch.channels_last, seed=seed).cuda() for seed in range(2))
    assert torch.cuda.current_device() == 0
    for first, second in zip(normalised(x, g, STRONG), normalised(x.to("cuda:1"), g.to("cuda:1"), STRONG), strict=True):
        assert second.device.index == 1 and torch.equal(first.cpu(), second.cpu())


POOL = PoolConfig(3, 2)


def pooled(x: torch.Tensor, g: torch.Tensor, fuse: bool = True, kernels: Kernels = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """LRN and pooling of x, in one kernel or in two, and, given the gradient by the result, that by x."""
    leaf = x.detach().requires_grad_()
    if fuse:
        y = local_response_norm_pool(leaf, STRONG, POOL, 2, True, kernels)
    else:
        y = functional.max_pool2d(local_response_norm(leaf, STRONG, 2, True, kernels), POOL.px, POOL.stride)
    assert y.grad_fn is not None and (y.grad_fn.name() == "_LrnPoolBackward") == fuse
    return y.detach(), torch.autograd.grad(y, leaf, g)[0]


def map_and_gradient(count: int, channels: int, px: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x, g = (drawn(count, channels, side, side, dtype=dtype, layout=torch.channels_last, seed=seed + number)
            for number, side in enumerate((px, (px - 3) // 2 + 1)))
    return x, g


@pytest.mark.parametrize("channels, px", [(96, 55), (256, 27), (96, 16)])  # conv1's, conv2's; pixels that no window reaches
@pytest.mark.parametrize("dtype", LRN_TOLERANCES, ids=str)
def test_pooling_in_the_kernel_equals_float64_on_the_cpu(channels: int, px: int, dtype: torch.dtype) -> None:
    x, g = map_and_gradient(2, channels, px, dtype)
    y, dx = pooled(x.cuda(), g.cuda())
    assert y.dtype == dx.dtype == dtype and all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, dx))
    assert torch.equal(y, pooled(x.cuda(), g.cuda(), fuse=False)[0])
    for here, there in zip(pooled(x.double(), g.double(), fuse=False, kernels="torch"), (y, dx), strict=True):
        far = (there.cpu().double() - here).abs() > LRN_TOLERANCES[dtype] * (1 + here.abs())
        assert far.double().mean() < 1e-4  # of two values nearly alike the other may be the larger


def test_pooling_in_the_kernel_allocates_its_results_and_a_byte_a_window() -> None:
    x, g = (tensor.cuda() for tensor in map_and_gradient(8, 96, 27, torch.bfloat16))
    pooled(x, g)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    y, dx = pooled(x, g)
    assert torch.cuda.memory_stats()["requested_bytes.all.peak"] - before == y.nbytes + y.numel() + dx.nbytes


def test_pooling_in_the_kernel_in_a_cuda_graph() -> None:
    (x, g), (other_x, other_g) = (map_and_gradient(4, 96, 13, torch.bfloat16, seed) for seed in (0, 2))
    x, g, other_x, other_g = (tensor.cuda() for tensor in (x, g, other_x, other_g))
    expected = pooled(other_x, other_g)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        pooled(x, g)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        found = pooled(x, g)
    x.copy_(other_x)
    g.copy_(other_g)
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_pooling_in_the_kernel_past_2_31_elements() -> None:
    images = 2**31 // (96 * 55 * 55) + 2
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    x, g = (torch.empty(images, 96, px, px, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last).normal_(0, 3)
            for px in (55, 27))
    for whole, last in zip(pooled(x, g), pooled(x[-2:], g[-2:]), strict=True):
        assert torch.equal(whole[-2:], last)
