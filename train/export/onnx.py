"""The network as an ONNX graph, built from the layer table: a dozen kinds of nodes, no tracing.

    images   (N, 3, crop, crop) float32: RGB of 0–255, mean subtracted; N is free
    logits   (N, K) float32

Towers are groups of convolutions. LRN is ONNX's own operator, one for each tower, so that windows do not cross between them; it
divides alpha by n (ours does not), so it is given alpha·n. Fully connected layers whose towers are apart are two products.
"""
from typing import Any, Mapping

import numpy as np
import torch

from model.config import Full, LrnConfig, ModelConfig
from train.export.safetensors_io import library

OPSET, IR = 17, 8  # of 2022: runtimes since then read it, and it has every operator that is needed here
MOST = (1 << 31) - (1 << 20)  # bytes of a protobuf, with some for the graph


class _Graph:
    """Nodes and weights of a graph under construction. A value is known by the name of the node that gives it."""

    def __init__(self) -> None:
        self.onnx = library("onnx", "write model.onnx")
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def constant(self, name: str, array: np.ndarray) -> str:
        self.weights.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def add(self, kind: str, name: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def split(self, value: str, name: str, channels: int) -> list[str]:
        """The two halves of a value's channels."""
        halves = self.constant(f"{name}/halves", np.array([channels // 2, channels // 2], np.int64))
        names = [f"{name}/a", f"{name}/b"]
        self.nodes.append(self.onnx.helper.make_node("Split", [value, halves], names, name=f"{name}/apart", axis=1))
        return names

    def lrn(self, value: str, name: str, lrn: LrnConfig, channels: int, towers: int) -> str:
        """LRN of each tower."""
        constants = {"alpha": lrn.alpha * lrn.n, "beta": lrn.beta, "bias": lrn.k, "size": lrn.n}
        if towers == 1:
            return self.add("LRN", name, value, **constants)
        halves = self.split(value, name, channels)
        return self.add("Concat", name, *(self.add("LRN", f"{half}/normalised", half, **constants) for half in halves), axis=1)

    def product(self, value: str, name: str, full: Full, weight: np.ndarray, bias: np.ndarray, apart: bool, output: str) -> str:
        """A fully connected layer: of all inputs, or, where towers are `apart`, each tower's of its own."""
        if not apart:
            return self.add("Gemm", output, value, self.constant(f"{name}.weight", weight), self.constant(f"{name}.bias", bias),
                            transB=1)
        rows = -(-full.neurons // 2)  # of an odd number of classes tower a has the larger half
        parts = [self.add("Gemm", f"{half}/product", half, self.constant(f"{half}.weight", weight[part]),
                          self.constant(f"{half}.bias", bias[part]), transB=1)
                 for half, part in zip(self.split(value, name, 2 * weight.shape[1]), (slice(0, rows), slice(rows, None)))]
        return self.add("Concat", output, *parts, axis=1)


def onnx_model(config: ModelConfig, weights: Mapping[str, torch.Tensor], metadata: Mapping[str, str] = {}) -> bytes:
    """The bytes of a checked ONNX file of a network and its weights, canonical name → float32. Raises ValueError when they do
    not fit into one file, RuntimeError when onnx is not installed."""
    graph = _Graph()
    onnx = graph.onnx
    size = sum(tensor.numel() * 4 for tensor in weights.values())
    if size > MOST:
        raise ValueError(f"weights (={size} bytes) must be less than 2 GiB for one ONNX file; leave --onnx out")
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    activation, value = "Relu" if config.activation == "relu" else "Tanh", "images"
    for name, conv in config.convs.items():
        whole = conv.sees == "both" or name == next(iter(config.layers))  # both towers see the whole image
        weight, bias = (graph.constant(f"{name}.{part}", arrays[f"{name}.{part}"]) for part in ("weight", "bias"))
        value = graph.add("Conv", name, value, weight, bias, kernel_shape=[conv.px] * 2, strides=[conv.stride] * 2,
                          pads=[conv.pad] * 4, group=1 if whole else config.towers)
        if config.lrn is not None and conv.lrn == "before":
            value = graph.lrn(value, f"{name}/lrn", config.lrn, conv.kernels, config.towers)
        value = graph.add(activation, f"{name}/active", value)
        if config.lrn is not None and conv.lrn == "after":
            value = graph.lrn(value, f"{name}/lrn", config.lrn, conv.kernels, config.towers)
        if conv.pool:
            value = graph.add("MaxPool", f"{name}/pool", value, kernel_shape=[config.pool.px] * 2,
                              strides=[config.pool.stride] * 2)
    value = graph.add("Flatten", "features", value, axis=1)
    for name, full in config.fulls.items():
        value = graph.product(value, name, full, arrays[f"{name}.weight"], arrays[f"{name}.bias"],
                              config.towers == 2 and full.sees == "own", "logits" if name == config.last else name)
        if name != config.last and not full.linear:
            value = graph.add(activation, f"{name}/active", value)
    images, logits = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in (
        ("images", ["N", 3, config.input_px, config.input_px]), ("logits", ["N", config.classes])))
    made = onnx.helper.make_graph(graph.nodes, "AlexNet", [images], [logits], graph.weights,
                                  doc_string="images: RGB of 0-255, the training set's mean subtracted; see the model card.")
    model = onnx.helper.make_model(made, producer_name="alexnet-dali", ir_version=IR,
                                   opset_imports=[onnx.helper.make_opsetid("", OPSET)])
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    packed: bytes = model.SerializeToString()
    return packed
