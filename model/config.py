"""Configuration of the network: towers, layers, pooling, LRN and dropout (paper §3), as a recipe states it.

Imports nothing heavy, so that a command line can be parsed without torch. The layers are a mapping from name to configuration,
so that a recipe which extends another changes, adds or removes (null) single ones. They are sorted by name: convolutions by
number, then fully connected layers."""
import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Literal, Mapping, Optional, Union, get_args

MOST = 1 << 20  # kernels, neurons, classes, pixels
LAYER_NAME = re.compile(r"(conv|fc)[1-9][0-9]?")
Sees = Literal["own", "both"]
Norm = Literal["none", "after", "before"]
Activation = Literal["relu", "tanh"]
Kernels = Literal["auto", "torch", "triton"]  # model/kernels
TowerConvs = Literal["grouped", "halves"]


def require(ok: bool, key: str, value: object, rule: str) -> None:
    """Raise ValueError `<key> (=value) <rule>` unless ok."""
    if not ok:
        raise ValueError(f"{key} (={value}) {rule}")


@dataclass(frozen=True)
class LrnConfig:
    """Constants of local response normalisation, paper §3.3.

    Args:
        k: additive constant (paper: 2).
        n: adjacent channels in the window, odd (paper: 5).
        alpha: factor of the sum of squares, not divided by n (paper: 1e-4; the release's 1e-4 is divided by its 5: 2e-5).
        beta: exponent (paper: 0.75)."""
    k: float
    n: int
    alpha: float
    beta: float

    def __post_init__(self) -> None:
        require(self.n >= 1 and self.n % 2 == 1, "model.lrn.n", self.n, "must be odd and positive; the paper uses 5")
        require(self.k > 0, "model.lrn.k", self.k, "must be positive; the paper uses 2")
        require(self.alpha >= 0, "model.lrn.alpha", self.alpha, "must not be negative; the paper uses 1e-4")


@dataclass(frozen=True)
class PoolConfig:
    """Max pooling (paper §3.4). 3 and 2, the paper's, overlap; 2 and 2 do not.

    Args:
        px: side of the window, pixels (paper: 3).
        stride: pixels from one window to the next (paper: 2)."""
    px: int
    stride: int

    def __post_init__(self) -> None:
        require(self.px >= 1, "model.pool.px", self.px, "must be at least 1; the paper uses 3")
        require(self.stride >= 1, "model.pool.stride", self.stride, "must be at least 1; the paper uses 2")


@dataclass(frozen=True)
class Conv:
    """One convolution, always followed by the activation (paper §3.5).

    Args:
        kernels: number of them over all towers.
        px: side of a kernel, pixels.
        std: initial weights are drawn from N(0, std) (paper §5).
        bias: initial bias, constant.
        stride: pixels from one place of the kernel to the next.
        pad: zero padding on each side, pixels.
        sees: the maps of its own tower, or of both (paper figure 2); conv1 sees the image in any case.
        lrn: response normalisation: none, after the activation (paper), or before it (release run 145, conv1).
        pool: max pooling follows."""
    kernels: int
    px: int
    std: float
    bias: float
    stride: int = 1
    pad: int = 0
    sees: Sees = "own"
    lrn: Norm = "none"
    pool: bool = False


@dataclass(frozen=True)
class Full:
    """One fully connected layer. The last one of a network gives the logits: no activation, no dropout.

    Args:
        std: initial weights are drawn from N(0, std) (paper §5).
        bias: initial bias, constant.
        neurons: number of them over all towers; left out of the last layer, which has one for each class.
        sees: the neurons of both towers, or of its own.
        dropout: model.dropout of its neurons are zeroed in training (paper §4.2).
        linear: no activation follows (the release's layer before a softmax of very many classes)."""
    std: float
    bias: float
    neurons: int = 0
    sees: Sees = "both"
    dropout: bool = False
    linear: bool = False


Layer = Union[Conv, Full]


@dataclass(frozen=True)
class ModelConfig:
    """The network of paper §3.5 and its variants.

    Args:
        input_px: side of the square crop, pixels (227; at least 67 for the paper's layers).
        classes: number of classes K; in a recipe also auto, the number of the index's classes.
        towers: 2 (the paper) or 1 (the whole network in one tower).
        activation: relu (paper §3.1) or tanh.
        dropout: probability that a neuron of a layer with dropout is silenced in training (paper: 0.5).
        lrn: constants of response normalisation, or null for none (paper §3.3).
        pool: max pooling after the layers that have it (paper §3.4).
        layers: name → layer; null takes a layer away. Names are conv1, conv2, … and fc1, fc2, …

    Raises:
        ValueError: a number that makes no network. That input_px fits the layers is checked by model.alexnet.output_sides."""
    input_px: int
    classes: int
    towers: int
    activation: Activation
    dropout: float
    lrn: Optional[LrnConfig]
    pool: PoolConfig
    layers: dict[str, Any] = field(hash=False)

    def __post_init__(self) -> None:
        require(self.towers in (1, 2), "model.towers", self.towers, "must be 1 or 2; the paper has 2")
        require(2 <= self.classes <= MOST, "model.classes", self.classes, f"must be 2 to {MOST}; count the classes of the index")
        require(1 <= self.input_px <= MOST, "model.input_px", self.input_px, "must be positive; the paper's network takes 227")
        require(self.activation in get_args(Activation), "model.activation", self.activation,
                "must be relu or tanh; the paper has relu")
        require(0.0 <= self.dropout <= 0.95, "model.dropout", self.dropout, "must be in [0, 0.95]; the paper uses 0.5")
        require(isinstance(self.layers, Mapping), "model.layers", self.layers, "must map names to layers; give a dict")
        object.__setattr__(self, "layers", _in_order(self.layers))
        fulls = [name for name in self.layers if name.startswith("fc")]
        require(bool(fulls), "model.layers", list(self.layers), "must end with a fully connected layer, the softmax's; add fc8")
        require(len(fulls) < len(self.layers), "model.layers", list(self.layers), "must have a convolution; add conv1")
        for name, layer in self.layers.items():
            for key, low in (("kernels", 1), ("px", 1), ("stride", 1), ("pad", 0), ("neurons", 0)):
                value = getattr(layer, key, low)
                require(low <= value <= MOST, f"model.layers.{name}.{key}", value, f"must be {low} to {MOST}; correct it")
            require(layer.std >= 0, f"model.layers.{name}.std", layer.std, "must be no negative deviation; the paper has 0.01")
            if name == fulls[-1]:
                require(layer.neurons == 0, f"model.layers.{name}.neurons", layer.neurons, "must be left out of the last layer, "
                        "which has one for each class; or add the layer that follows")
                continue
            key, size = ("kernels", layer.kernels) if isinstance(layer, Conv) else ("neurons", layer.neurons)
            require(size >= 1 and size % self.towers == 0, f"model.layers.{name}.{key}", size,
                    f"must be a positive multiple of the {self.towers} towers; round it")
            require(layer.std > 0, f"model.layers.{name}.std", layer.std, "must be positive in all layers but the last: neurons "
                    "that begin alike stay alike; the paper has 0.01")

    @property
    def convs(self) -> dict[str, Conv]:
        return {name: layer for name, layer in self.layers.items() if isinstance(layer, Conv)}

    @property
    def fulls(self) -> dict[str, Full]:
        """The fully connected layers, in order; `neurons` of the last is the number of classes."""
        found = {name: layer for name, layer in self.layers.items() if isinstance(layer, Full)}
        last = list(found)[-1]
        return found | {last: dataclasses.replace(found[last], neurons=self.classes)}

    @property
    def last(self) -> str:
        return list(self.layers)[-1]

    def crosses_towers(self, name: str) -> bool:
        """Whether a layer sees the maps or neurons of two towers (paper: conv3, fc6, fc7, fc8)."""
        return self.towers == 2 and self.layers[name].sees == "both" and name != next(iter(self.layers))


def layer_kind(name: str) -> type[Conv] | type[Full]:
    """What a layer of this name is. Raises ValueError for a name that no layer has."""
    require(bool(LAYER_NAME.fullmatch(name)), "model.layers", name, "must have names conv1 … conv99 and fc1 … fc99; rename it")
    return Conv if name.startswith("conv") else Full


def _in_order(layers: Mapping[str, Any]) -> dict[str, Layer]:
    """The layers by number, convolutions first, without those that are null; a mapping holds a layer's fields."""
    kinds = {name: layer_kind(name) for name in layers}
    ordered = sorted(layers, key=lambda name: (name.startswith("fc"), int(name.lstrip("convf"))))
    return {name: kinds[name](**layers[name]) if isinstance(layers[name], Mapping) else layers[name]
            for name in ordered if layers[name] is not None}
