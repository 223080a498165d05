"""What a network is: the numbers of the paper's §3 that a recipe may state.

Imports nothing heavy, so a command line can be parsed with it.

Every field changes results, so none has a default: a recipe says them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional


@dataclass(frozen=True)
class LrnConfig:
    """Constants of local response normalisation, paper §3.3.

    Args:
        k: additive constant (paper: 2).
        n: adjacent channels in the window, odd (paper: 5).
        alpha: factor of the sum of squares, not divided by n (paper: 1e-4).
        beta: exponent (paper: 0.75).
    """

    k: float
    n: int
    alpha: float
    beta: float

    def __post_init__(self) -> None:
        if self.n < 1 or self.n % 2 == 0:
            raise ValueError(f"model.lrn.n (={self.n}) must be odd and positive; the paper uses 5")
        if self.k <= 0:
            raise ValueError(f"model.lrn.k (={self.k}) must be positive; the paper uses 2")


@dataclass(frozen=True)
class ModelConfig:
    """The eight-layer network of paper §3.5.

    Args:
        input_px: side of the square crop, pixels (227; 67 for the small network).
        classes: number of classes K.
        channels: kernels of conv1..conv5 over all towers (paper: 96, 256, 384, 384, 256).
        hidden: neurons of fc6 and fc7 over all towers (paper: 4096, 4096).
        towers: 2 (the paper) or 1 (the whole network in one tower).
        dropout: probability that a neuron of fc6, fc7 is silenced in training (paper: 0.5).
        lrn: response normalisation after conv1 and conv2, or null for none (paper §3.3).

        init_std: standard deviations of the initial weights of conv1..fc8 (paper §5: 0.01 each; the release
            has 0.03 in conv3..conv5; a small network needs larger ones).
        init_bias: initial biases of conv1..fc8 (paper §5: 0, 1, 0, 1, 1, 1, 1, 0).

    Raises:
        ValueError: a number that makes no network. That input_px fits the layers is checked by model.alexnet.sides.
    """

    input_px: int
    classes: int
    channels: tuple[int, ...]
    hidden: tuple[int, ...]
    towers: int
    dropout: float
    lrn: Optional[LrnConfig]
    init_std: tuple[float, ...]
    init_bias: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.towers not in (1, 2):
            raise ValueError(f"model.towers (={self.towers}) must be 1 or 2; the paper has 2")
        if self.classes < 2:
            raise ValueError(f"model.classes (={self.classes}) must be at least 2; count the classes of the index")
        if self.input_px < 1:
            raise ValueError(f"model.input_px (={self.input_px}) must be positive; the paper's network takes 227")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.dropout (={self.dropout}) must be in [0, 1); the paper uses 0.5")
        for key, count in (("channels", 5), ("hidden", 2), ("init_std", 8), ("init_bias", 8)):
            values = getattr(self, key)
            object.__setattr__(self, key, tuple(values))  # a list, as YAML has it, would make the config unhashable
            if len(values) != count:
                raise ValueError(f"model.{key} (={list(values)}) must have {count} numbers; give one per layer")
        for key in ("channels", "hidden"):
            if any(size < 1 or size % self.towers for size in getattr(self, key)):
                raise ValueError(f"model.{key} (={list(getattr(self, key))}) must be positive multiples of the "
                                 f"{self.towers} towers; round them")
        if min(self.init_std) < 0:
            raise ValueError(f"model.init_std (={list(self.init_std)}) must not be negative; give standard deviations")
