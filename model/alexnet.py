"""AlexNet (paper §3): eight layers, the whole network or one of its two towers.

One class. `tower=BOTH` holds everything in one process (`groups=2` in conv2, conv4 and conv5);
`Tower(rank, 2, group)` is one of a pair of processes, which exchange activations where a layer sees both towers. What each has:
  scheme towers   half of the rows of every parameter, and all images (the paper's);
  scheme weird    all convolutions, for half of the images, and half of the rows of the fully connected layers, for all of them
                  ("one weird trick", arXiv 1404.5997: most of the work is in the former, most of the weights in the latter).
All start from the same values and compute the same logits, loss and gradients.

Legend: B images of the pair (or of the one process), C channel (tower a's first), H row, W column, K classes.
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from model import initial
from model.config import LrnConfig, ModelConfig
from model.dropout import dropout
from model.lrn import local_response_norm
from model.meeting import Link, gather_logits, meet
from model.towers import BOTH, Tower, tower_shape


@dataclass(frozen=True)
class Conv:
    """One convolution of the table, always followed by a ReLU."""

    name: str
    kernel: int
    stride: int
    padding: int
    meets: bool   # sees the kernels of both towers
    lrn: bool     # response normalisation follows (if the configuration has it)
    pool: bool    # max pooling of 3×3, stride 2, follows (paper §3.4: overlapping)


@dataclass(frozen=True)
class Linear:
    """One fully connected layer of the table; all of them see both towers."""

    name: str
    last: bool    # the logits: no ReLU, no dropout


CONVS = (  # kernel stride pad  meets  lrn    pool
    Conv("conv1", 11, 4, 0, False, True, True),
    Conv("conv2", 5, 1, 2, False, True, True),
    Conv("conv3", 3, 1, 1, True, False, False),
    Conv("conv4", 3, 1, 1, False, False, False),
    Conv("conv5", 3, 1, 1, False, False, True),
)
LINEARS = (Linear("fc6", False), Linear("fc7", False), Linear("fc8", True))
LAYERS: tuple[Conv | Linear, ...] = (*CONVS, *LINEARS)
POOL, POOL_STRIDE = 3, 2


def paper(classes: int = 1000) -> ModelConfig:
    """The network of the paper (§3, §5), 60,965,224 parameters at 1000 classes."""
    return ModelConfig(input_px=227, classes=classes, channels=(96, 256, 384, 384, 256), hidden=(4096, 4096), towers=2,
                       dropout=0.5, lrn=LrnConfig(k=2.0, n=5, alpha=1e-4, beta=0.75), init_std=(0.01,) * 8,
                       init_bias=(0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0))


def sides(config: ModelConfig) -> list[tuple[str, int]]:
    """Side in pixels of the square output of conv1, pool1, … pool5: [("conv1", 55), ("pool1", 27), …].

    Raises ValueError naming the layer whose window no longer fits into its input.
    """
    result: list[tuple[str, int]] = []
    side = config.input_px

    def slide(name: str, kernel: int, stride: int, padding: int) -> int:
        if side + 2 * padding < kernel:
            raise ValueError(f"model.input_px (={config.input_px}) leaves {side} px before {name}, less than its "
                             f"window of {kernel}; use at least 67")
        return (side + 2 * padding - kernel) // stride + 1

    for conv in CONVS:
        side = slide(conv.name, conv.kernel, conv.stride, conv.padding)
        result.append((conv.name, side))
        if conv.pool:
            side = slide(f"pool{conv.name[-1]}", POOL, POOL_STRIDE, 0)
            result.append((f"pool{conv.name[-1]}", side))
    return result


def shapes(config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Output of every layer for one image, both towers together: [("conv1", (96, 55, 55)), … ("fc8", (K,))]."""
    channels = {str(number): count for number, count in enumerate(config.channels, start=1)}
    maps: list[tuple[str, tuple[int, ...]]] = []
    for name, side in sides(config):
        maps.append((name, (channels[name[-1]], side, side)))
    return maps + [("fc6", (config.hidden[0],)), ("fc7", (config.hidden[1],)), ("fc8", (config.classes,))]


def canonical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the whole network, in order. A tower's is `tower_shape(shape, tower)`."""
    result: dict[str, tuple[int, ...]] = {}
    inputs = 3
    for conv, outputs in zip(CONVS, config.channels):
        grouped = 1 if conv.meets or conv.name == "conv1" else config.towers
        result[f"{conv.name}.weight"] = (outputs, inputs // grouped, conv.kernel, conv.kernel)
        result[f"{conv.name}.bias"] = (outputs,)
        inputs = outputs
    inputs *= sides(config)[-1][1] ** 2
    for linear, outputs in zip(LINEARS, (*config.hidden, config.classes)):
        result[f"{linear.name}.weight"] = (outputs, inputs)
        result[f"{linear.name}.bias"] = (outputs,)
        inputs = outputs
    return result


def parameter_count(config: ModelConfig) -> int:
    """Number of weights and biases of the whole network."""
    return sum(math.prod(shape) for shape in canonical_shapes(config).values())


class AlexNet(nn.Module):
    """The network (paper §3), or the part of it that `tower` names.

    Parameters have their canonical names (conv1.weight … fc8.bias); `tower_of` says which rows of one are here.

    Args:
        seed: of initial values and dropout masks.
        tower: what this process holds.
        scheme: how a pair of processes shares the work; without effect for BOTH.
        overlap: compute while activations and gradients travel; changes no bit.

    Raises:
        ValueError: `tower` is one of two but the configuration has a single tower.
    """

    def __init__(self, config: ModelConfig, *, seed: int, tower: Tower = BOTH, scheme: Literal["towers", "weird"] = "towers",
                 overlap: bool = True) -> None:
        super().__init__()
        if tower.count > config.towers:
            raise ValueError(f"model.towers (={config.towers}) cannot be held by {tower.count} processes; use one "
                             f"process, or model.towers=2")
        self.config, self.seed, self.tower = config, seed, tower
        self.halves_images = scheme == "weird" and tower.count == 2
        self._links: dict[str, Link] = {}
        canonical = canonical_shapes(config)
        for position, layer in enumerate(LAYERS):
            shape = canonical[f"{layer.name}.weight"]
            held = self.tower_of(layer.name)
            rows, inputs = tower_shape(shape, held)[:2]
            # skip_init: torch would draw initial values which `fill` overwrites. It leaves the default device, so name it.
            if isinstance(layer, Conv):
                groups = 1 if layer.meets or position == 0 else config.towers // held.count
                module = nn.utils.skip_init(nn.Conv2d, inputs * groups, rows, layer.kernel, layer.stride, layer.padding,
                                            groups=groups, device=torch.get_default_device())
            else:
                module = nn.utils.skip_init(nn.Linear, inputs, rows, device=torch.get_default_device())
            initial.fill(module.weight, module.bias, seed=seed, name=layer.name, shape=shape,
                         std=config.init_std[position], bias_value=config.init_bias[position], tower=held)
            self.add_module(layer.name, module)
            if held.count == 2 and (isinstance(layer, Linear) or layer.meets):
                self._links[layer.name] = Link(layer.name, held, overlap)

    def tower_of(self, name: str) -> Tower:
        """Whose rows of a layer or parameter ("conv1.weight") this process holds: this tower's, or everybody's (BOTH)."""
        return BOTH if self.halves_images and name.startswith("conv") else self.tower

    def forward(self, images: torch.Tensor, step: int | None = None,
                rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Logits of all classes, on every process: (B, 3, H, W) float, mean subtracted → (B, K) float.

        In training, `step` (global, from 0) and `rows` = (first, total), the place of these B images in the global batch
        (default: they are all of it), choose the dropout masks. In scheme weird each process of a pair gives its half,
        (B/2, 3, H, W), tower a the first, and gets the logits of both. Raises ValueError on images of another size, on a
        missing step, and on rows outside the batch.
        """
        first_row = self._check(images, step, rows)
        x = images.to(self.get_parameter("conv1.weight").dtype)  # as they are, but for a network in float64
        for conv in CONVS:
            x = self._layer(conv.name, x)
            if conv.lrn and self.config.lrn is not None:
                # The window of channels never crosses from one tower into the other.
                groups = self.config.towers // self.tower_of(conv.name).count
                x = local_response_norm(x, self.config.lrn, groups=groups, relu=True)
            else:
                x = functional.relu(x, inplace=True)
            if conv.pool:
                x = functional.max_pool2d(x, POOL, POOL_STRIDE)
        x = x.flatten(1)
        for linear, size in zip(LINEARS, (*self.config.hidden, self.config.classes)):
            x = self._layer(linear.name, x)
            if linear.last:
                continue
            x = functional.relu(x, inplace=True)
            if self.training and step is not None:
                x = dropout(x, self.config.dropout, seed=self.seed, step=step, layer=linear.name, first_row=first_row,
                            first_column=self.tower.rows(size)[0])
        logits = gather_logits(x, self.config.classes, self.tower)
        # The softmax and the loss are not for half precision.
        return logits if logits.dtype == torch.float64 else logits.float()

    def _layer(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """A layer's product, with the other tower where it sees both."""
        layer, link = self.get_submodule(name), self._links.get(name)
        if link is None:
            result: torch.Tensor = layer(x)
            return result
        return meet(layer, x, link, "rows" if self.halves_images and name == LINEARS[0].name else "channels")

    def _check(self, images: torch.Tensor, step: int | None, rows: tuple[int, int] | None) -> int:
        """Refuse what would be silently wrong. Returns the first of the B rows in the global batch."""
        px = self.config.input_px
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, px, px):
            raise ValueError(f"images (={tuple(images.shape)}) must be (B, 3, {px}, {px}); set data.crop_px and "
                             f"model.input_px to the same size")
        if self.training and step is None:
            raise ValueError("step (=None) must be given in training; pass the global step, which chooses the dropout "
                             "masks, or call eval()")
        count = images.shape[0] * (2 if self.halves_images else 1)
        first, total = rows if rows is not None else (0, count)
        if first < 0 or first + count > total:
            raise ValueError(f"rows (={first}, {total}) do not hold a batch of {count}; give (first row, rows of the global "
                             "batch)")
        return first
