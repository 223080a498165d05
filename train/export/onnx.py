"""The network as an ONNX graph, built from the layer table: a dozen kinds of nodes, no tracing.

    images         (N, 3, crop, crop) float32: RGB of 0–255, mean subtracted; N is free
    logits         (N, K) float32
    probabilities  (N, K) float32, their softmax, when asked for

Towers are groups of convolutions. LRN is ONNX's own operator, one for each tower, so that windows do not cross between them; it
divides alpha by n (ours does not), so it is given alpha·n. Fully connected layers whose towers are apart are two products. Needs
the extra `export` (onnx).
"""

from __future__ import annotations

from typing import Any, Mapping

import numpy as np
import torch

from model.config import Conv, Full, LrnConfig, ModelConfig

OPSET, IR = 17, 8  # of 2022: runtimes since then read it, and it has every operator that is needed here
MOST = (1 << 31) - (1 << 20)  # bytes of a protobuf, with some for the graph


class _Graph:
    """Nodes and weights of a graph under construction; `value` names what the last node gave."""

    def __init__(self, onnx: Any, value: str) -> None:
        self.onnx, self.value = onnx, value
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def constant(self, name: str, array: np.ndarray) -> str:
        """A weight; returns its name."""
        self.weights.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def add(self, kind: str, name: str, *inputs: str, **attributes: Any) -> None:
        """A node on the value (and further inputs), whose output is the value from now on."""
        self.nodes.append(self.onnx.helper.make_node(kind, [self.value, *inputs], [name], name=name, **attributes))
        self.value = name

    def apart(self, name: str, channels: int) -> list[str]:
        """The two halves of the value's channels."""
        halves = self.constant(f"{name}/halves", np.array([channels // 2, channels // 2], np.int64))
        names = [f"{name}/a", f"{name}/b"]
        self.nodes.append(self.onnx.helper.make_node("Split", [self.value, halves], names, name=f"{name}/apart", axis=1))
        return names

    def together(self, name: str, parts: list[str]) -> None:
        """Join parts along the channels."""
        self.nodes.append(self.onnx.helper.make_node("Concat", parts, [name], name=name, axis=1))
        self.value = name


def onnx_model(config: ModelConfig, weights: Mapping[str, torch.Tensor], *, softmax: bool = False,
               metadata: Mapping[str, str] = {}) -> bytes:
    """The bytes of a checked ONNX file.

    Args:
        config: the network.
        weights: canonical name → float32.
        softmax: give probabilities too.
        metadata: of the file.

    Raises:
        ValueError: the weights do not fit into one ONNX file. RuntimeError: onnx is not installed.
    """
    try:
        import onnx
        import onnx.checker
        import onnx.helper
        import onnx.numpy_helper
    except ImportError:
        raise RuntimeError("onnx (=not installed) is needed to write model.onnx; pip install onnx, or this package with its "
                           "extra export") from None
    size = sum(tensor.numel() * 4 for tensor in weights.values())
    if size > MOST:
        raise ValueError(f"weights (={size} bytes) must be less than 2 GiB for one ONNX file; leave --onnx out")
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    graph = _Graph(onnx, "images")
    for name, conv in config.convs.items():
        _convolution(graph, config, name, conv, arrays)
    graph.add("Flatten", "features", axis=1)
    for name, full in config.fulls.items():
        _product(graph, config, name, full, arrays, "logits" if name == config.last else name)
        if name != config.last and not full.linear:
            graph.add(_activation(config), f"{name}/active")
    outputs = ["logits"]
    if softmax:
        graph.add("Softmax", "probabilities", axis=1)
        outputs.append("probabilities")

    def value(name: str, *shape: int) -> Any:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", *shape])

    made = onnx.helper.make_graph(
        graph.nodes, "AlexNet", [value("images", 3, config.input_px, config.input_px)],
        [value(name, config.classes) for name in outputs], graph.weights,
        doc_string="images: RGB of 0-255, the training set's mean subtracted; see the model card.")
    model = onnx.helper.make_model(made, producer_name="alexnet-dali", ir_version=IR,
                                   opset_imports=[onnx.helper.make_opsetid("", OPSET)])
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    packed: bytes = model.SerializeToString()
    return packed


def _convolution(graph: _Graph, config: ModelConfig, name: str, conv: Conv, arrays: Mapping[str, np.ndarray]) -> None:
    """A convolution, its activation, LRN and pooling, in the layer's order."""
    whole = conv.sees == "both" or name == next(iter(config.layers))  # both towers see the whole image
    weight, bias = (graph.constant(f"{name}.{part}", arrays[f"{name}.{part}"]) for part in ("weight", "bias"))
    graph.add("Conv", name, weight, bias, kernel_shape=[conv.px] * 2, strides=[conv.stride] * 2, pads=[conv.pad] * 4,
              group=1 if whole else config.towers)
    if config.lrn is not None and conv.lrn == "before":
        _lrn(graph, f"{name}/lrn", config.lrn, conv.kernels, config.towers)
    graph.add(_activation(config), f"{name}/active")
    if config.lrn is not None and conv.lrn == "after":
        _lrn(graph, f"{name}/lrn", config.lrn, conv.kernels, config.towers)
    if conv.pool:
        graph.add("MaxPool", f"{name}/pool", kernel_shape=[config.pool.px] * 2, strides=[config.pool.stride] * 2)


def _lrn(graph: _Graph, name: str, lrn: LrnConfig, channels: int, towers: int) -> None:
    """LRN of each tower."""
    constants = {"alpha": lrn.alpha * lrn.n, "beta": lrn.beta, "bias": lrn.k, "size": lrn.n}
    if towers == 1:
        graph.add("LRN", name, **constants)
        return
    parts = []
    for half in graph.apart(name, channels):
        graph.value = half
        graph.add("LRN", f"{half}/normalised", **constants)
        parts.append(graph.value)
    graph.together(name, parts)


def _product(graph: _Graph, config: ModelConfig, name: str, full: Full, arrays: Mapping[str, np.ndarray], output: str) -> None:
    """A fully connected layer: of all inputs, or each tower's of its own."""
    weight, bias = arrays[f"{name}.weight"], arrays[f"{name}.bias"]
    if config.towers == 1 or full.sees == "both":
        graph.add("Gemm", output, graph.constant(f"{name}.weight", weight), graph.constant(f"{name}.bias", bias), transB=1)
        return
    rows = -(-full.neurons // 2)  # of an odd number of classes tower a has the larger half
    parts = []
    for half, part in zip(graph.apart(name, 2 * weight.shape[1]), (slice(0, rows), slice(rows, None))):
        graph.value = half
        graph.add("Gemm", f"{half}/product", graph.constant(f"{half}.weight", weight[part]),
                  graph.constant(f"{half}.bias", bias[part]), transB=1)
        parts.append(graph.value)
    graph.together(output, parts)


def _activation(config: ModelConfig) -> str:
    return "Relu" if config.activation == "relu" else "Tanh"
