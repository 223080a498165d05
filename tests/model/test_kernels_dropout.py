"""The kernels of ReLU and dropout: the bits of their twin in torch, and a whole network on them."""
import pytest
import torch
from torch.nn import functional

from model.alexnet import AlexNet
from model.dropout import dropout, dropout_words
from tests.helpers.kernels import DEVICE, rounding  # noqa: F401 (a fixture)
from tests.helpers.networks import small

pytestmark = pytest.mark.usefixtures("rounding")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p, shape", [(0.5, (11, 300)), (0.4, (16, 256)), (0.9, (3, 5))])  # rows and columns that fill no program
def test_same_bits_as_torch(dtype: torch.dtype, p: float, shape: tuple[int, int]) -> None:
    words = torch.tensor(dropout_words(1, 2**40, "fc6"), dtype=torch.int32)
    x, g = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(2))
    results = []
    for kernels, device in (("torch", torch.device("cpu")), ("triton", DEVICE)):
        leaf = x.to(device, copy=True).requires_grad_()
        y = dropout(leaf * 1, p, words.to(device), first_row=120, first_column=2048, relu=True, kernels=kernels)
        dx, = torch.autograd.grad(y, leaf, g.to(device))
        results.append((y.detach().cpu(), dx.cpu()))
    for twin, kernel in zip(*results, strict=True):
        assert kernel.dtype == dtype and torch.equal(twin, kernel)
    assert (results[0][0] > 0).any() and (results[0][0] == 0).any()


def test_nan_is_not_hidden() -> None:
    words = torch.tensor(dropout_words(1, 0, "fc6"), dtype=torch.int32, device=DEVICE)
    x = torch.full((4, 8), float("nan"), device=DEVICE, requires_grad=True)
    y = dropout(x * 1, 0.5, words, first_row=0, first_column=0, relu=True, kernels="triton")
    y.sum().backward()
    assert x.grad is not None and y.isnan().all() and (x.grad == 2).all()


def test_a_networks_step_on_kernels_equals_torchs() -> None:
    """LRN with ReLU, dropout with ReLU; with words in place of the step. In float32: their roots and sums round otherwise."""
    config = small()
    x = torch.randn(2, 3, 67, 67, generator=torch.Generator().manual_seed(0))
    found = []
    for kernels, device in (("torch", torch.device("cpu")), ("triton", DEVICE)):
        network = AlexNet(config, seed=3, kernels=kernels).to(device).to(memory_format=torch.channels_last)
        logits = network(x.to(device), words=network.dropout_words(7).to(device), rows=(4, 8))
        functional.cross_entropy(logits, torch.tensor([0, 5], device=device)).backward()
        found.append([logits.detach().cpu(), *(p.grad.cpu() for p in network.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) == 17
    for twin, kernel in zip(*found):
        torch.testing.assert_close(kernel, twin, rtol=1e-4, atol=1e-6)
