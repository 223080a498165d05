"""Initial weights and biases (paper §5): a function of (seed, parameter name) for any number of processes.

A tensor is drawn for the canonical one-device network and then cut, so one process, either of two, a CPU and a GPU
start from identical values. Weights come from N(0, std), biases are constant: in the paper 1 where ReLUs should start
with positive inputs (conv2, conv4, conv5, fc6, fc7), otherwise 0."""
import hashlib

import torch

from model.towers import Tower, tower_slice


def normal(seed: int, name: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
    """The canonical initial value of weight `name`: (shape) float32 on the CPU, drawn from N(0, std)."""
    digest = hashlib.sha256(f"initial/{seed}/{name}".encode()).digest()
    # 63 bits: manual_seed takes a signed 64-bit integer.
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)


@torch.no_grad()
def init_layer(weight: torch.Tensor, bias: torch.Tensor, *, seed: int, name: str, shape: tuple[int, ...], std: float,
               bias_value: float, tower: Tower) -> None:
    """Set one layer's parameters in place: this tower's rows of the canonical weight of `shape`. Tensors on the meta device
    have no values and are left alone."""
    if not weight.is_meta:
        weight.copy_(tower_slice(normal(seed, f"{name}.weight", shape, std), tower))
    bias.fill_(bias_value)
