"""Caffe's weights as ours: which layout a file has is told by its shapes, all layers together, or refused.

             Caffe                        TensorFlow                   ours
  kernels    (out, in, rows, columns)     (rows, columns, in, out)     as Caffe's
  products   (out, in)                    (in, out)                    as Caffe's
  fc6 sees   maps, rows, columns (chw)    rows, columns, maps (hwc)    as Caffe's
  conv1 sees BGR                          BGR                          RGB
"""

from __future__ import annotations

from typing import Any, Literal, Mapping, Optional

import numpy as np
import torch

from model.alexnet import canonical_shapes, sides
from model.config import ModelConfig

Layers = Mapping[str, tuple[np.ndarray, np.ndarray]]
Shape = tuple[int, ...]
Layout = Literal["caffe", "tensorflow"]
Order = Literal["hwc", "chw"]
KERNEL, PRODUCT = (3, 2, 0, 1), (1, 0)  # what turns TensorFlow's axes into Caffe's


def layers_of(found: Any, config: ModelConfig, file: str) -> Layers:
    """Weights and biases of each layer of the network, as the file has them.

    Raises:
        ValueError: it is no dict of these layers.
    """
    if not isinstance(found, dict):
        raise ValueError(f"weights (={file}) hold a {type(found).__name__}, not a dict of layers; give a file that does")
    if {str(name) for name in found} != set(config.layers):
        raise ValueError(f"layers (={', '.join(sorted(map(str, found)))} in {file}) must be {', '.join(config.layers)}; give "
                         "another file, or the --recipe of its network")
    layers = {}
    for name in config.layers:
        pair = found[name]
        if isinstance(pair, dict):
            pair = [next((pair[key] for key in keys if key in pair), None)
                    for keys in (("weights", "weight", "W"), ("biases", "bias", "b"))]
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, np.ndarray) for part in pair):
            raise ValueError(f"{name} (in {file}) must be [weights, biases] or {{weights: …, biases: …}}, arrays of numbers; "
                             "give another file")
        layers[name] = pair[0], pair[1]
    return layers


def canonical(layers: Layers, config: ModelConfig, order: Optional[Order] = None, bgr: bool = True) -> dict[str, torch.Tensor]:
    """Caffe's weights as ours: canonical name → float32.

    Args:
        layers: name → (weights, biases), in either layout.
        config: the network.
        order: of the inputs of the first fully connected layer in the file; None: hwc beside TensorFlow's kernels, else chw.
        bgr: the first layer sees BGR in the file.

    Raises:
        ValueError: shapes that are those of no layout, or of both; naming them.
    """
    shapes = canonical_shapes(config)
    weights = {name: _squeezed(weight, len(shapes[f"{name}.weight"])) for name, (weight, _) in layers.items()}
    kernels = {name: weights[name] for name in config.convs}
    layout = _layout(kernels, {name: shapes[f"{name}.weight"] for name in kernels}, KERNEL)
    made = {name: weight.transpose(KERNEL) if layout == "tensorflow" else weight for name, weight in kernels.items()}
    if bgr:
        first = next(iter(made))
        made[first] = made[first][:, ::-1]
    order = order or ("hwc" if layout == "tensorflow" else "chw")
    made |= _products({name: weights[name] for name in config.fulls}, config, order)
    result = {}
    for name in config.layers:
        bias, wanted = layers[name][1], shapes[f"{name}.bias"]
        if bias.size != wanted[0] or max(bias.shape, default=0) != bias.size:
            raise ValueError(f"biases of {name} (={bias.shape}) must be {wanted}; give the --recipe of their network")
        for part, array in (("weight", made[name]), ("bias", bias.reshape(-1))):
            result[f"{name}.{part}"] = torch.from_numpy(np.array(array, np.float32, order="C"))
    return result


def _products(fulls: dict[str, np.ndarray], config: ModelConfig, order: Order) -> dict[str, np.ndarray]:
    """Weights of the fully connected layers as ours."""
    shapes = {name: shape for name in fulls if len(shape := canonical_shapes(config)[f"{name}.weight"]) == 2}
    first = next(iter(fulls))
    outputs, maps, side = shapes[first][0], list(config.convs.values())[-1].kernels, sides(config)[-1][1]
    if config.towers == 2 and config.fulls[first].sees == "own":
        raise ValueError(f"model.layers.{first}.sees (=own) is not so in Caffe's networks; give the recipe of one")
    if fulls[first].ndim == 4:  # written as a convolution over whole maps, which leaves no doubt about the order
        layout = _layout({first: fulls[first]}, {first: (outputs, maps, side, side)}, KERNEL)
        whole = fulls[first].transpose(KERNEL) if layout == "tensorflow" else fulls[first]
        flat, order = whole.reshape(outputs, -1), "chw"
        rest = {name: weight for name, weight in fulls.items() if name != first}
    else:
        flat, rest = None, fulls
    layout = _layout(rest, {name: shapes[name] for name in rest}, PRODUCT) if rest else "caffe"
    made = {name: weight.T if layout == "tensorflow" else weight for name, weight in rest.items()}
    if flat is not None:
        made[first] = flat
    if order == "hwc":
        made[first] = made[first].reshape(outputs, side, side, maps).transpose(0, 3, 1, 2).reshape(outputs, -1)
    return made


def _squeezed(weight: np.ndarray, dimensions: int) -> np.ndarray:
    """Without the leading 1s that old Caffe gave to whatever has fewer than four dimensions."""
    while weight.ndim > dimensions and weight.shape[0] == 1:
        weight = weight[0]
    return weight


def _layout(found: Mapping[str, np.ndarray], caffe: Mapping[str, Shape], axes: Shape) -> Layout:
    """Whose layout these arrays have, all of them. `axes` turns TensorFlow's into Caffe's.

    Raises:
        ValueError: neither's, or it could be either.
    """
    own = all(array.shape == caffe[name] for name, array in found.items())
    other = all(array.ndim == len(axes) and tuple(array.shape[axis] for axis in axes) == caffe[name]
                for name, array in found.items())
    said = ", ".join(f"{name} {array.shape}" for name, array in found.items())
    if own and other:
        raise ValueError(f"weights (={said}) have the same shapes in either layout, so theirs cannot be told; give a network "
                         "whose layers differ in size")
    if not own and not other:
        wanted = [f"{name} {shape} (Caffe) or {tuple(shape[axes.index(axis)] for axis in range(len(axes)))} (TensorFlow)"
                  for name, shape in caffe.items()]
        raise ValueError(f"weights (={said}) must be {', '.join(wanted)}, all in one layout; give the --recipe of their "
                         "network")
    return "caffe" if own else "tensorflow"
