"""AlexNet (paper §3) and its variants: the layers of a `ModelConfig`, the whole network or one of its two towers.

One class. `tower=BOTH` holds everything in one process (`groups=2` in conv2, conv4 and conv5); `Tower(rank, 2, group)` is one of
a pair of processes, which exchange activations where a layer sees both towers. All start from the same values and compute the
same logits, loss and gradients. What each has:

  scheme towers   half of the rows of every parameter, and all images (the paper's);
  scheme weird    all convolutions, for half of the images, and half of the rows of the fully connected layers, for all of them
                  ("one weird trick", arXiv 1404.5997: most of the work is in the former, most of the weights in the latter).

Legend: B images of the pair (or of the one process), C channel (tower a's first), H row, W column, K classes."""
import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from model.init import init_layer
from model.config import Conv, Full, Kernels, LrnConfig, ModelConfig, PoolConfig, TowerConvs
from model.dropout import dropout, dropout_words
from model.lrn import local_response_norm, local_response_norm_pool
from model.tower_exchange import Link, gather_logits, two_tower_layer
from model.towers import BOTH, Tower, tower_shape


def paper(classes: int = 1000) -> ModelConfig:
    """The network of the paper (§3, §5), 60,965,224 parameters at 1000 classes."""
    return ModelConfig(
        input_px=227, classes=classes, towers=2, activation="relu", dropout=0.5, lrn=LrnConfig(k=2.0, n=5, alpha=1e-4, beta=0.75),
        pool=PoolConfig(px=3, stride=2),
        layers={"conv1": Conv(96, px=11, stride=4, lrn="after", pool=True, std=0.01, bias=0),
                "conv2": Conv(256, px=5, pad=2, lrn="after", pool=True, std=0.01, bias=1),
                "conv3": Conv(384, px=3, pad=1, sees="both", std=0.01, bias=0),
                "conv4": Conv(384, px=3, pad=1, std=0.01, bias=1),
                "conv5": Conv(256, px=3, pad=1, pool=True, std=0.01, bias=1),
                "fc6": Full(neurons=4096, dropout=True, std=0.01, bias=1),
                "fc7": Full(neurons=4096, dropout=True, std=0.01, bias=1),
                "fc8": Full(std=0.01, bias=0)})


def output_sides(config: ModelConfig) -> list[tuple[str, int]]:
    """Side in pixels of the square output of conv1, pool1, … pool5: [("conv1", 55), ("pool1", 27), …]. Raises ValueError
    naming the layer whose window no longer fits into its input."""
    result: list[tuple[str, int]] = []
    side = config.input_px

    def slide(name: str, window: int, stride: int, pad: int) -> int:
        if side + 2 * pad < window:
            raise ValueError(f"model.input_px (={config.input_px}) leaves {side} px before {name}, less than its "
                             f"window of {window}; use larger crops (the paper's layers need 67)")
        return (side + 2 * pad - window) // stride + 1

    for name, conv in config.convs.items():
        side = slide(name, conv.px, conv.stride, conv.pad)
        result.append((name, side))
        if conv.pool:
            name = f"pool{name.removeprefix('conv')}"
            side = slide(name, config.pool.px, config.pool.stride, 0)
            result.append((name, side))
    return result


def shapes(config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Output of every layer for one image, both towers together: [("conv1", (96, 55, 55)), … ("fc8", (K,))]."""
    kernels = {name.removeprefix("conv"): conv.kernels for name, conv in config.convs.items()}
    maps = [(name, (kernels[name.lstrip("convpl")], side, side)) for name, side in output_sides(config)]
    return [*maps, *((name, (full.neurons,)) for name, full in config.fulls.items())]


def canonical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the whole network, in order; a tower's is `tower_shape(shape, tower)`. The inputs of a layer
    that sees only its own tower are that tower's: all inputs divided by the towers."""
    result: dict[str, tuple[int, ...]] = {}
    inputs, split = 3, 1  # both towers see the whole image
    for name, conv in config.convs.items():
        parts = split if conv.sees == "own" else 1
        result[f"{name}.weight"] = (conv.kernels, inputs // parts, conv.px, conv.px)
        result[f"{name}.bias"] = (conv.kernels,)
        inputs, split = conv.kernels, config.towers
    inputs *= output_sides(config)[-1][1] ** 2
    for name, full in config.fulls.items():
        result[f"{name}.weight"] = (full.neurons, inputs // (split if full.sees == "own" else 1))
        result[f"{name}.bias"] = (full.neurons,)
        inputs = full.neurons
    return result


def parameter_count(config: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in canonical_shapes(config).values())


class GroupedLinear(nn.Linear):
    """Fully connected layer in two groups, as two towers that see only their own half of the features (release run 150). (B,
    2F) → (B, N): the first N/2 neurons (of an odd N the larger half) see the first F features."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        halves = zip(x.chunk(2, 1), self.weight.chunk(2), self.bias.chunk(2))
        return torch.cat([functional.linear(part, weight, bias) for part, weight, bias in halves], 1)


class AlexNet(nn.Module):
    """The network (paper §3), or the part of it that `tower` names. Parameters have their canonical names (conv1.weight …
    fc8.bias); `tower_of` says which rows of one are here.

    `seed`: of initial values and dropout masks. `scheme`: how a pair of processes shares the work; without effect for BOTH.
    `overlap`: compute while activations and gradients travel; changes no bit. `kernels`: see model/kernels. `fuse_pooling`: let
    one of them normalise and pool. `tower_convs`: of two towers in one process, `halves` keeps each one's maps in a tensor of its
    own, between dense convolutions; same parameters. Raises ValueError for one of two towers of a configuration with a single
    one, and for scheme weird with a fully connected layer that sees only its own tower."""

    def __init__(self, config: ModelConfig, *, seed: int, tower: Tower = BOTH, scheme: Literal["towers", "weird"] = "towers",
                 overlap: bool = True, kernels: Kernels = "auto", fuse_pooling: bool = True,
                 tower_convs: TowerConvs = "grouped") -> None:
        super().__init__()
        if tower.count > config.towers:
            raise ValueError(f"model.towers (={config.towers}) cannot be held by {tower.count} processes; use one "
                             f"process, or model.towers=2")
        self.config, self.seed, self.tower, self.kernels = config, seed, tower, kernels
        self._fuse_pooling, self._tower_convs = fuse_pooling, tower_convs
        self.halves_images = scheme == "weird" and tower.count == 2
        self._links: dict[str, Link] = {}
        self._first_full = next(iter(config.fulls))
        canonical = canonical_shapes(config)
        for name, layer in config.layers.items():
            if self.halves_images and isinstance(layer, Full) and layer.sees == "own":
                raise ValueError(f"model.layers.{name}.sees (=own) cannot be split in scheme weird; use parallel.scheme: towers")
            shape = canonical[f"{name}.weight"]
            held = self.tower_of(name)
            apart = layer.sees == "own" and config.towers == 2 and held.count == 1  # two towers side by side in one process
            rows, inputs = tower_shape(shape, held)[:2]
            # skip_init: torch would draw initial values which `init_layer` overwrites. It leaves the default device, so name it.
            if isinstance(layer, Conv):
                groups = 2 if apart and name != next(iter(config.layers)) else 1
                module = nn.utils.skip_init(nn.Conv2d, inputs * groups, rows, layer.px, layer.stride, layer.pad,
                                            groups=groups, device=torch.get_default_device())
            else:
                module = nn.utils.skip_init(GroupedLinear if apart else nn.Linear, inputs, rows,
                                            device=torch.get_default_device())
            init_layer(module.weight, module.bias, seed=seed, name=name, shape=shape, std=layer.std, bias_value=layer.bias,
                       tower=held)
            self.add_module(name, module)
            if held.count == 2 and config.crosses_towers(name):
                self._links[name] = Link(name, held, overlap)

    def tower_of(self, name: str) -> Tower:
        """Which tower's rows of a layer or parameter ("conv1.weight") this process holds: its own, or BOTH."""
        return BOTH if self.halves_images and name.startswith("conv") else self.tower

    def dropout_words(self, step: int) -> torch.Tensor:
        """What the dropout masks of a step are hashed from: (L, 4) int32 on the CPU, a row for each of the L layers with dropout
        (model/dropout.py). Copied to the network's device it stands for `step` in `forward`."""
        words = [dropout_words(self.seed, step, name) for name, full in self.config.fulls.items() if full.dropout]
        return torch.tensor(words, dtype=torch.int32, device="cpu").view(-1, 4)

    def forward(self, images: torch.Tensor, step: int | None = None, rows: tuple[int, int] | None = None,
                words: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of all classes, on every process: (B, 3, H, W) float, mean subtracted → (B, K) float. In training, `step`
        (global, from 0) and `rows` = (first, total), the place of these B images in the global batch (default: they are all of
        it), choose the dropout masks; `words`, `dropout_words(step)` on any device, replaces `step` with the same masks. With
        words on a GPU the pass needs nothing from the host and can be captured in a CUDA graph, for these `rows` and all steps.
        In scheme weird each process of a pair gives its half, (B/2, 3, H, W), tower a the first, and gets the logits of both.
        Raises ValueError on images or words of another size, on a missing step, and on rows outside the batch."""
        x = self._layer(self.config.last, self.features(images, step, rows, words))
        logits = gather_logits(x, self.config.classes, self.tower)
        # The softmax and the loss are not for half precision.
        return logits if logits.dtype == torch.float64 else logits.float()

    def features(self, images: torch.Tensor, step: int | None = None, rows: tuple[int, int] | None = None,
                 words: torch.Tensor | None = None) -> torch.Tensor:
        """Activations of the last hidden layer, of the neurons that this process holds: (B, 3, H, W) → (B, N), the paper's
        4096 of fc7 (figure 4). Arguments as in `forward`."""
        config, first_row = self.config, self._check(images, rows)
        words_left = self._words(step, words)
        x = images.to(next(self.parameters()).dtype)  # as they are, but for a network in float64
        maps = [x]
        for name, conv in config.convs.items():
            maps = self._convolution(name, maps)
            maps = [self._finish(name, conv, part, len(maps)) for part in maps]
        x = torch.cat([part.flatten(1) for part in maps], 1) if len(maps) == 2 else maps[0].flatten(1)
        for name, full in list(config.fulls.items())[:-1]:
            x = self._layer(name, x)
            relu = not full.linear and config.activation == "relu"
            if not full.linear and not relu:
                x = torch.tanh(x)
            if self.training and full.dropout:
                x = dropout(x, config.dropout, next(words_left), first_row=first_row,
                            first_column=self.tower.rows(full.neurons)[0], relu=relu, kernels=self.kernels)
            elif relu:
                x = functional.relu(x, inplace=True)
        return x

    def _activate(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(x, inplace=True) if self.config.activation == "relu" else torch.tanh(x)

    def _finish(self, name: str, conv: Conv, x: torch.Tensor, parts: int) -> torch.Tensor:
        """Activation, LRN and pooling of a convolution, in the order that its `lrn` says; x is one of so many `parts`."""
        config, relu = self.config, self.config.activation == "relu"
        groups = config.towers // self.tower_of(name).count // parts  # LRN windows do not cross from one tower into the other
        if config.lrn is None or conv.lrn == "none":
            x = self._activate(x)
        elif conv.lrn == "before":
            x = self._activate(local_response_norm(x, config.lrn, groups, kernels=self.kernels))
        else:
            x = x if relu else torch.tanh(x)
            if conv.pool and self._fuse_pooling:
                return local_response_norm_pool(x, config.lrn, config.pool, groups, relu, self.kernels)
            x = local_response_norm(x, config.lrn, groups, relu, self.kernels)  # a ReLU in the same pass over memory
        return functional.max_pool2d(x, config.pool.px, config.pool.stride) if conv.pool else x

    def _convolution(self, name: str, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """The convolution's result from that of the layer before, or from the images: in one tensor or, a tower each, in two."""
        layer = self.get_submodule(name)
        if self._tower_convs == "grouped" or self.config.towers == self.tower_of(name).count:
            return [self._layer(name, maps[0])]
        if len(maps) == 1 or self.config.layers[name].sees == "both":
            maps = [torch.cat(maps, 1) if len(maps) == 2 else maps[0]] * 2
        assert isinstance(layer, nn.Conv2d) and layer.bias is not None
        return [functional.conv2d(x, weight, bias, layer.stride, layer.padding)
                for x, weight, bias in zip(maps, layer.weight.chunk(2), layer.bias.chunk(2), strict=True)]

    def _layer(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The layer's convolution or product; exchanges activations with the other tower's process where it sees both."""
        layer, link = self.get_submodule(name), self._links.get(name)
        if link is None:
            result: torch.Tensor = layer(x)
            return result
        return two_tower_layer(layer, x, link, "rows" if self.halves_images and name == self._first_full else "channels")

    def _words(self, step: int | None, words: torch.Tensor | None) -> Iterator[torch.Tensor]:
        """(4,) int32 for each layer with dropout, in training; else nothing."""
        if not self.training:
            return iter(())
        if words is None:
            if step is None:
                raise ValueError("step (=None) must be given in training; pass the global step, which chooses the dropout "
                                 "masks, or call eval()")
            words = self.dropout_words(step)
        layers = sum(full.dropout for full in self.config.fulls.values())
        if tuple(words.shape) != (layers, 4) or words.dtype != torch.int32:
            raise ValueError(f"words (={tuple(words.shape)} {words.dtype}) must be ({layers}, 4) int32; pass dropout_words(step)")
        return iter(words.unbind())

    def _check(self, images: torch.Tensor, rows: tuple[int, int] | None) -> int:
        """Check the arguments of `forward`; the first of the B rows in the global batch."""
        px = self.config.input_px
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, px, px):
            raise ValueError(f"images (={tuple(images.shape)}) must be (B, 3, {px}, {px}); set data.crop_px and "
                             f"model.input_px to the same size")
        count = images.shape[0] * (2 if self.halves_images else 1)
        first, total = rows if rows is not None else (0, count)
        if first < 0 or first + count > total:
            raise ValueError(f"rows (={first}, {total}) do not hold a batch of {count}; give (first row, rows of the global "
                             "batch)")
        return first
