"""Small networks of the paper's eight layers, for tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from model.alexnet import AlexNet
from model.config import Conv, Full, LrnConfig, ModelConfig, PoolConfig

KERNELS, NEURONS = (8, 12, 16, 12, 8), (24, 20)
STD, BIAS = (0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.3, 0.3), (0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0)


def small(kernels: Sequence[int] = KERNELS, neurons: Sequence[int] = NEURONS, std: Sequence[float] = STD,
          bias: Sequence[float] = BIAS, **changes: Any) -> ModelConfig:
    """67 pixels, 7 classes, two towers, values at which every part matters: an LRN that divides visibly, dropout, initial values
    that are no noise. `changes` are fields of ModelConfig."""
    places: tuple[dict[str, Any], ...] = (
        {"px": 11, "stride": 4, "lrn": "after", "pool": True}, {"px": 5, "pad": 2, "lrn": "after", "pool": True},
        {"px": 3, "pad": 1, "sees": "both"}, {"px": 3, "pad": 1}, {"px": 3, "pad": 1, "pool": True})
    layers: dict[str, Any] = {f"conv{n}": Conv(kernels[n - 1], std=std[n - 1], bias=bias[n - 1], **place)
                              for n, place in enumerate(places, start=1)}
    layers |= {f"fc{n}": Full(neurons=neurons[n - 6], dropout=True, std=std[n - 1], bias=bias[n - 1]) for n in (6, 7)}
    layers["fc8"] = Full(std=std[7], bias=bias[7])
    values: dict[str, Any] = {"input_px": 67, "classes": 7, "towers": 2, "activation": "relu", "dropout": 0.5,
                              "lrn": LrnConfig(k=1.0, n=5, alpha=0.05, beta=0.75), "pool": PoolConfig(px=3, stride=2)}
    return ModelConfig(**{**values, "layers": layers, **changes})


def with_layers(config: ModelConfig, **changes: Any) -> ModelConfig:
    """The config with layers changed: a name to the keys that change, to None to take it away, or to a new layer whole."""
    layers = dict(config.layers)
    for name, change in changes.items():
        layers[name] = dataclasses.replace(layers[name], **change) if isinstance(change, dict) and name in layers else change
    return dataclasses.replace(config, layers=layers)


def tensors_of(model: ModelConfig, seed: int = 3) -> dict[str, torch.Tensor]:
    """Parameters with the initial values of a seed, by canonical name."""
    return {name: tensor.detach() for name, tensor in AlexNet(model, seed=seed).named_parameters()}
