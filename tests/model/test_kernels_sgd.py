"""The optimizer's Triton kernel: the bits of the same rule in torch."""

import pytest
import torch

from model.kernels import sgd
from tests.helpers.kernels import DEVICE, rounding  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("rounding")
SHAPES = ((8, 3, 5, 5), (700, 3), (4, 6, 3, 3), (1,))  # more than a program, less, and one in channels_last
RATE, DECAY = -0.01 * 1.37, -0.01 * 1.37 * 5e-4


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator) for shape in SHAPES]
    made[2] = made[2].to(memory_format=torch.channels_last)
    return [tensor.to(DEVICE) for tensor in made]


def update(w: list[torch.Tensor], v: list[torch.Tensor], grads: list[torch.Tensor], hold: bool) -> None:
    rate, decay, held = (torch.tensor(value, device=DEVICE) for value in (RATE, DECAY, hold))
    sgd.update(w, v, grads, momentum=0.9, rate=rate, decay=decay, hold=held)


def by_torch(parameters: list[torch.Tensor], velocities: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
    """The rule as PyTorch's own operators compute it, from numbers of the host."""
    torch._foreach_mul_(velocities, 0.9)
    torch._foreach_add_(velocities, parameters, alpha=DECAY)
    torch._foreach_add_(velocities, grads, alpha=RATE)
    torch._foreach_add_(parameters, velocities)


def test_same_bits_as_torch() -> None:
    (w, v), (w2, v2) = ((tensors(0), tensors(1)) for _ in range(2))
    for step in range(2):
        grads = tensors(2 + step)
        update(w, v, grads, False)
        by_torch(w2, v2, grads)
        for ours, theirs in zip(w + v, w2 + v2, strict=True):
            assert torch.equal(ours, theirs)


def test_held_nothing_is_written() -> None:
    w, v, grads = tensors(0), tensors(1), [torch.full_like(p, float("nan")) for p in tensors(2)]
    update(w, v, grads, True)
    assert all(torch.equal(now, before) for now, before in zip(w + v, tensors(0) + tensors(1), strict=True))


def test_gradients_of_another_format_or_precision() -> None:
    (w, v), (w2, v2) = ((tensors(0), tensors(1)) for _ in range(2))
    grads = [grad.bfloat16().contiguous() for grad in tensors(2)]
    assert grads[2].stride() != w[2].stride()
    update(w, v, grads, False)
    by_torch(w2, v2, [grad.float() for grad in grads])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(w + v, w2 + v2, strict=True))


def test_takes_dense_float32_only() -> None:
    assert sgd.takes(tensors(0))
    assert not sgd.takes([torch.zeros(3, dtype=torch.float64)]) and not sgd.takes([torch.zeros(4, 6)[:, ::2]])
