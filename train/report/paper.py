"""What the paper reports, as data; and which of its experiments a recipe is.

Errors are percent, as printed, with ten crops. Where the authors' 2012 source release logs more digits than the paper prints, the
digits are the release's. A run is held against a row only when its data set (by its counts of classes and images), its network
(layer by layer) and its augmentation are those of the row: names of runs and recipes mean nothing here.
"""

from dataclasses import dataclass
from typing import Any, Mapping

FULL, FIVE, SEVEN, TUNED = "full", "five", "seven", "six_conv_fine_tuned"


@dataclass(frozen=True)
class DataSet:
    """A data set of the paper; None where the paper does not say it exactly."""

    title: str
    classes: int
    train: int | None  # images, before unreadable ones are excluded
    test: int | None  # images of the split that the errors are counted on


DATA_SETS = {
    "ilsvrc2010": DataSet("ILSVRC-2010", 1000, 1_261_406, 150_000),
    "ilsvrc2012": DataSet("ILSVRC-2012", 1000, 1_281_167, 50_000),
    "cifar10": DataSet("CIFAR-10", 10, 50_000, 10_000),
    "fall2009": DataSet("ImageNet Fall 2009", 10_184, None, None),
}
_EXCLUDED = 0.002  # share of the training images that may be missing, as unreadable


@dataclass(frozen=True)
class Row:
    """A result of the paper: errors in percent, None where it has none."""

    key: str  # a name of `experiment`; FIVE, the mean of five of FULL; SEVEN, of these and two of TUNED
    what: str
    data: str  # key of DATA_SETS, or ""
    on: str  # data set and split, in words
    top1: float | None
    top5: float | None
    source: str  # section of the paper, and run of the release


ROWS = (
    Row(FULL, "the network", "ilsvrc2010", "ILSVRC-2010 test", 37.47, 17.00, "§6, table 1; release 145"),
    Row("one_tower", "one tower, half of conv1 to conv4", "ilsvrc2010", "ILSVRC-2010 test", 39.17, 18.23,
        "§3.2; release 145-half"),
    Row(FULL, "the network", "ilsvrc2012", "ILSVRC-2012 val", 40.66, 18.21, "§6, table 2; release's log"),
    Row("plain_pool", "pooling that does not overlap", "ilsvrc2012", "ILSVRC-2012 val", 41.06, 18.51, "§3.4; release 147"),
    Row("no_lrn", "no response normalisation", "ilsvrc2012", "ILSVRC-2012 val", 42.03, 19.36, "§3.3; release 148"),
    Row("apart", "towers meet only at the softmax layer", "ilsvrc2012", "ILSVRC-2012 val", 41.83, 19.33, "release 150"),
    Row(FIVE, "5 networks averaged", "ilsvrc2012", "ILSVRC-2012 val", 38.1, 16.4, "§6, table 2"),
    Row(TUNED, "six convolutions, pre-trained on Fall 2011", "ilsvrc2012", "ILSVRC-2012 val", 38.99, 16.62,
        "§6, table 2; release 146-2012-2011"),
    Row(SEVEN, "2 such networks and the 5 averaged", "ilsvrc2012", "ILSVRC-2012 val", 36.7, 15.4, "§6, table 2"),
    Row("six_conv_linear", "six convolutions, 10,184 classes", "fall2009", "Fall 2009, half of it", 67.4, 40.9,
        "§6; release 146"),
)


@dataclass(frozen=True)
class Change:
    """What one change to the network does to its errors, as the paper (or the release) reports it."""

    what: str
    top1: str  # percentage points more error than the full network; "" where not reported
    top5: str
    source: str  # section of the paper, and run of the release
    touches: tuple[str, ...]  # beginnings of the keys of a recipe that the change is made with


# By name of `experiment`. Those without figures are common departures that the paper gives no figure for.
CHANGES = {
    "no_lrn": Change("no response normalisation", "+1.37", "+1.15", "§3.3; release 148",
                     ("model.lrn", "model.layers.conv1.lrn", "model.layers.conv2.lrn")),
    "plain_pool": Change("pooling that does not overlap", "+0.40", "+0.30", "§3.4; release 147", ("model.pool.",)),
    "one_tower": Change("one tower, half of conv1 to conv4", "+1.70", "+1.23", "§3.2, on ILSVRC-2010; release 145-half",
                        ("model.towers", "model.layers.")),
    "apart": Change("towers meet only at the softmax layer", "+1.17", "+1.12", "release 150",
                    ("model.layers.conv3.sees", "model.layers.fc6.", "model.layers.fc7.sees")),
    "no_lighting": Change("no PCA colour jitter (lighting)", "over +1", "", "§4.1", ("data.lighting",)),
    "no_layer": Change("a middle layer removed", "about +2", "", "§7", ("model.layers.",)),
    FIVE: Change("5 networks averaged", "−2.56", "−1.81", "§6, table 2", ()),
    "no_full": Change("a fully connected layer removed", "", "", "§7 speaks of convolutions only", ("model.layers.",)),
    "no_dropout": Change("no dropout", "", "", "§4.2, “substantial overfitting”", ("model.dropout",)),
    "no_mirror": Change("no horizontal flips", "", "", "§4.1", ("data.mirror",)),
    "tanh": Change("tanh in place of ReLU", "", "", "§3.1, figure 1", ("model.activation",)),
}
# Figure 1: a network of four layers on CIFAR-10, without regularisation; epochs to 25% training error, tanh over ReLU.
SOONER, TRAINING_ERROR = "about 6", 0.25

# The paper's layers (§3.5, figure 2), without their sizes.
_LAYERS: dict[str, dict[str, Any]] = {
    "conv1": {"px": 11, "stride": 4, "pad": 0, "lrn": "after", "pool": True},
    "conv2": {"px": 5, "stride": 1, "pad": 2, "lrn": "after", "pool": True, "sees": "own"},
    "conv3": {"px": 3, "stride": 1, "pad": 1, "lrn": "none", "pool": False, "sees": "both"},
    "conv4": {"px": 3, "stride": 1, "pad": 1, "lrn": "none", "pool": False, "sees": "own"},
    "conv5": {"px": 3, "stride": 1, "pad": 1, "lrn": "none", "pool": True, "sees": "own"},
    "fc6": {"dropout": True, "sees": "both"}, "fc7": {"dropout": True, "sees": "both"}, "fc8": {"sees": "both"}}
_SIZES = {"conv1": 96, "conv2": 256, "conv3": 384, "conv4": 384, "conv5": 256, "conv6": 256, "fc6": 4096, "fc7": 4096}
# One tower keeps conv5, fc6 and fc7 whole, "as otherwise it would have half the parameters" (release 145-half); that meet only
# at the softmax layer have an fc6 of 4096 each (release 150).
_VARIANT_SIZES = {"one_tower": {"conv1": 48, "conv2": 128, "conv3": 192, "conv4": 192}, "apart": {"fc6": 8192}}
# Six convolutions (release 146): which departures together are which experiment.
_SIX = {frozenset({"with conv6"}): "six_conv", frozenset({"with conv6", "starts from trained weights"}): TUNED,
        frozenset({"with conv6", "with fc9"}): "six_conv_linear"}
_ONES = ("conv2", "conv4", "conv5", "fc6", "fc7")  # layers whose biases begin at 1 (§5)
_DEFAULTS = {"stride": 1, "pad": 0, "lrn": "none", "pool": False, "dropout": False, "linear": False}


def data_set(classes: int | None, train: tuple[int, int] | None, test: int | None) -> str:
    """Key of DATA_SETS with so many classes, training images (least, most) and images tested (or validated), "" for another."""
    for key, known in DATA_SETS.items():
        fits = known.train is None or (train is not None and train[0] <= known.train
                                       and train[1] >= known.train * (1 - _EXCLUDED))
        if classes == known.classes and fits and known.test in (None, test):
            return key
    return ""


def experiment(config: Mapping[str, Any]) -> tuple[str, str]:
    """Which experiment a config (plain values) is: its name and the departure in words; ("", …) when it is none of the paper's.

    Names are FULL, those of CHANGES and of _SIX. Sizes (of layers, of the crop) do not count: see `paper_size`.
    """
    try:
        found = _departures(config)
    except (KeyError, TypeError, AttributeError):
        return "", "a recipe of another version"
    if not found:
        return FULL, "the network"
    names, words = {name for name, _ in found}, [words for _, words in found]
    return (names.pop() if len(names) == 1 else "") or _SIX.get(frozenset(words), ""), ", ".join(words)


def fine_tuned(config: Mapping[str, Any]) -> bool:
    """Whether training starts from the weights of another."""
    return bool((config.get("init_from") or {}).get("checkpoint"))


def paper_size(config: Mapping[str, Any], key: str) -> bool:
    """Whether a config of this experiment has the paper's numbers of kernels and neurons, its crop and the paper's strength of
    dropout and PCA colour jitter, where it has them."""
    return not _sizes(config, key)


def other_sizes(config: Mapping[str, Any], key: str) -> str:
    """In what a config of this experiment differs from the paper's besides its kind of layers, in words; "" for nothing."""
    try:
        layers = {name: layer for name, layer in config["model"]["layers"].items() if name in _LAYERS and layer}
        found = _sizes(config, key)
        if any((layer["std"], layer["bias"]) != (0.01, name in _ONES) for name, layer in layers.items()):
            found.append("initial weights or biases")
        return ", ".join(found)
    except (KeyError, TypeError, AttributeError):
        return ""


def _sizes(config: Mapping[str, Any], key: str) -> list[str]:
    """Sizes and strengths that are not the paper's, beside the paper's."""
    sizes, data, model = _SIZES | _VARIANT_SIZES.get(key, {}), config["data"], config["model"]
    found = []
    if (model["input_px"], data["square_px"], data["region"]) != (227, 256, "square"):
        whole = ", anywhere in the image" * (data["region"] == "full")
        found.append(f"crops of {model['input_px']} from {data['square_px']} px{whole} (227 from 256)")
    found += [f"{name} {value:g} ({usual})" for name, value, usual in (
        ("dropout", model["dropout"], 0.5), ("PCA colour jitter", data["lighting"], 0.1)) if value not in (0, usual)]
    layers = {name: layer.get("kernels", layer.get("neurons")) for name, layer in model["layers"].items()
              if layer is not None and name in sizes}
    other = {name: count for name, count in layers.items() if count != sizes[name]}
    if other:
        found.append(f"{', '.join(f'{name} {count}' for name, count in other.items())} kernels or neurons "
                     f"({', '.join(str(sizes[name]) for name in other)})")
    return found


def _departures(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name of the experiment or "", in words) for each way in which a config is not the paper's."""
    model, data = config["model"], config["data"]
    lrn, pool = model["lrn"], (model["pool"]["px"], model["pool"]["stride"])
    # Constants of the paper, or of the release, which divides alpha by n.
    usual_lrn = lrn is None or (lrn["k"], lrn["n"], lrn["beta"]) == (2, 5, 0.75) and lrn["alpha"] in (1e-4, 2e-5)
    layers = {name: layer for name, layer in model["layers"].items() if layer is not None}
    missing = [name for name in _LAYERS if name not in layers]
    kinds = {**dict.fromkeys(("conv2", "conv3", "conv4", "conv5"), "no_layer"), **dict.fromkeys(("fc6", "fc7"), "no_full")}
    found = [(kinds.get(name, "") if len(missing) == 1 else "", f"without {name}") for name in missing]
    found += [("", f"with {name}") for name in layers if name not in _LAYERS]
    found += [(key, words) for differs, key, words in (
        (model["towers"] == 1, "one_tower", "one tower"), (fine_tuned(config), "", "starts from trained weights"),
        (lrn is None, "no_lrn", "no LRN"),
        (not usual_lrn, "", "LRN " + ", ".join(f"{key}: {value}" for key, value in (lrn or {}).items())),
        (pool != (3, 2), "plain_pool" if pool[0] == pool[1] else "", f"pooling {pool[0]}×{pool[0]}, stride {pool[1]}"),
        (model["activation"] != "relu", "tanh" if model["activation"] == "tanh" else "", str(model["activation"])),
        (not model["dropout"], "no_dropout", "no dropout"), (not data["lighting"], "no_lighting", "no PCA colour jitter"),
        (not data["mirror"], "no_mirror", "no horizontal flips")) if differs]
    if not missing:  # neighbours of a layer that was taken away take over its pooling, normalisation and sight
        found += _layer_departures(layers, ignored=("sees",) * (model["towers"] == 1) + ("lrn",) * (lrn is None))
    return found


def _layer_departures(layers: Mapping[str, Mapping[str, Any]], ignored: tuple[str, ...]) -> list[tuple[str, str]]:
    """Departures of single layers."""
    changed: dict[str, Any] = {}
    for name, keys in _LAYERS.items():
        layer = {**_DEFAULTS, "sees": "both" if name.startswith("fc") else "own", **layers[name]}
        changed |= {f"{name}.{key}": layer[key] for key, value in keys.items() if layer[key] != value and key not in ignored}
    if changed == {f"{name}.sees": "own" for name in ("conv3", "fc6", "fc7")}:
        return [("apart", "towers meet only at the softmax layer")]
    if changed == {"conv1.lrn": "before"}:  # as the release ran it; the paper's figures are this network's
        return []
    if changed == {"conv1.lrn": "none", "conv2.lrn": "none"}:
        return [("no_lrn", "no LRN")]
    return [("", f"{key}: {value}") for key, value in changed.items()]
