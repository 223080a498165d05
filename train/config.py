"""What a run is: frozen dataclasses, one per group of a recipe, and the fingerprint that a resume compares.

Two kinds of fields. Those that change results (`data`, `model`, `optimizer`, `schedule`, `train`) have no default, so a recipe
says them all, but for some that came later, whose default is what was before. Those of `machine` (threads, device, folders) and
`parallel` (how processes share the work) have one, change speed only, and are left out of the fingerprint, as are paths.
Reading recipes and command lines is train/recipe.py. Imports nothing heavy: `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal, Optional

from model.config import LAYER_NAME, ModelConfig
from pipeline.config import LANES, WINDOW, DataConfig, LoaderConfig

# Where things lie is not what they are: the index itself is compared by its hash.
PATHS = (("data", "index"), ("data", "packed"), ("init_from", "checkpoint"))
SPEED = ("machine", "parallel")  # groups that change no result


def _need(ok: bool, key: str, value: object, rule: str) -> None:
    """Raise `<key> (=value) <rule>` unless ok."""
    if not ok:
        raise ValueError(f"{key} (={value}) {rule}")


def _rates(rates: object, key: str) -> dict[str, float]:
    """Factors by layer, checked; whether the network has these layers is known to `Config` only."""
    if not isinstance(rates, dict):
        raise ValueError(f"{key} (={rates}) must map layers to factors; write {{conv1: 0.1}}")
    for name, factor in rates.items():
        _need(bool(LAYER_NAME.fullmatch(str(name))), key, name, "must name layers, such as conv1 or fc8; correct it")
        ok = isinstance(factor, (int, float)) and not isinstance(factor, bool) and math.isfinite(factor) and factor >= 0
        _need(ok, f"{key}.{name}", factor, "must be a factor of at least 0, which freezes the layer; correct it")
    return {name: float(factor) for name, factor in rates.items()}


@dataclass(frozen=True)
class Data(DataConfig):
    """The images: which index, which splits, and how a file becomes a crop (paper §2, §4.1).

    Attributes:
        index: folder of the index (tools/build_index.py); a path, so not part of the fingerprint.
        train_split: split trained on.
        validation_split: split whose error is measured each epoch.
        test_split: split tested with ten crops at the end; may be the validation split (ILSVRC2012 has no test labels).
        tier: where training images come from: archives, the files as downloaded; packed, the 256-pixel JPEGs that
            tools/pack_shards.py wrote; streamed, those read only forwards, shuffled within a window; resident, decoded squares in
            memory. One that is not said is archives.
        packed: folder that tools/pack_shards.py wrote, which tiers packed and streamed read (tests too) instead of the index;
            empty: the index is that folder. A path, so not part of the fingerprint.
        resident: form of tier resident's squares: rgb, or yuv420, half the size and not quite the same pixels.
        window: tier streamed: samples among which the order is shuffled.
        lanes: tier streamed: places of an epoch that are read from at once.
    """

    index: str
    train_split: str
    validation_split: str
    test_split: str
    tier: Literal["archives", "packed", "streamed", "resident"] = "archives"
    packed: str = ""
    resident: Literal["rgb", "yuv420"] = "rgb"
    window: int = WINDOW
    lanes: int = LANES

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("window", "lanes"):
            _need(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "must be at least 1; leave it out")

    @property
    def images(self) -> str:
        """Folder of the index that is read: the packed one for tiers that need it, where it is said."""
        return self.packed if self.packed and self.tier in ("packed", "streamed") else self.index

    def pixels(self) -> DataConfig:
        """The part that concerns the pipeline."""
        return DataConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(DataConfig)})


@dataclass(frozen=True)
class LarsConfig:
    """Layer-wise adaptive rates for large batches (You, Gitman, Ginsburg 2017, arXiv 1708.03888): the rate of a weight is
    multiplied by trust ‖w‖ / (‖g‖ + weight_decay ‖w‖ + epsilon), by 1 where a norm is 0. Biases keep theirs.

    Attributes:
        trust: trust coefficient (the paper's AlexNet: 0.001).
        epsilon: added to the denominator (1e-8).
    """

    trust: float
    epsilon: float

    def __post_init__(self) -> None:
        _need(self.trust > 0, "optimizer.lars.trust", self.trust, "must be positive; You et al. use 0.001")
        _need(self.epsilon >= 0, "optimizer.lars.epsilon", self.epsilon, "must not be negative; try 1e-8")


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule of paper §5: v <- momentum v - weight_decay lr w - lr g; w <- w + v.

    Attributes:
        lr: learning rate at the start (paper: 0.01).
        momentum: share of the velocity that is kept (paper: 0.9).
        weight_decay: of weights; biases have none (paper: 0.0005).
        bias_lr_factor: learning rate of biases over that of weights (release: 2).
        base_batch: batch for which the rates of `optimizer` and `schedule` were chosen: they are multiplied by train.batch /
            base_batch (linear scaling, Goyal et al. 2017, arXiv 1706.02677), to which schedule.warmup_steps climb from the
            unscaled rate; 0 for none.
        lars: layer-wise adaptive rates, for batches of thousands; null for none.
        layer_rates: layer → what its rate is multiplied with, from the start; 0 freezes it. {} for none.
    """

    lr: float
    momentum: float
    weight_decay: float
    bias_lr_factor: float
    base_batch: int = 0
    lars: Optional[LarsConfig] = None
    layer_rates: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_rates", _rates(self.layer_rates, "optimizer.layer_rates"))
        _need(self.lr > 0, "optimizer.lr", self.lr, "must be positive; the paper starts at 0.01")
        _need(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "must be in [0, 1); the paper uses 0.9")
        _need(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay,
              "must not be negative; the paper uses 0.0005")
        _need(self.bias_lr_factor > 0, "optimizer.bias_lr_factor", self.bias_lr_factor,
              "must be positive; the release uses 2")
        _need(self.base_batch >= 0, "optimizer.base_batch", self.base_batch, "must not be negative; 0 is no scaling")


@dataclass(frozen=True)
class Plateau:
    """Divide the learning rate when the validation error stops improving (paper §5: by 10, three times).

    Attributes:
        factor: what the rate is multiplied with (paper: 0.1).
        patience: epochs without improvement before a drop; the paper's was a human eye.
        min_delta: an improvement is a top-1 validation error lower by more than this, as a share (0.001 = 0.1 points).
        drops: most drops (paper: 3).
    """

    factor: float
    patience: int
    min_delta: float
    drops: int

    def __post_init__(self) -> None:
        _need(0 < self.factor < 1, "schedule.plateau.factor", self.factor, "must be in (0, 1); the paper uses 0.1")
        _need(self.patience >= 1, "schedule.plateau.patience", self.patience, "must be at least 1 epoch; try 5")
        _need(self.min_delta >= 0, "schedule.plateau.min_delta", self.min_delta, "must not be negative; try 0.001")
        _need(self.drops >= 0, "schedule.plateau.drops", self.drops, "must not be negative; the paper uses 3")


@dataclass(frozen=True)
class Milestone:
    """From this epoch on (counted from 0), this learning rate.

    Attributes:
        epoch: the first of these epochs.
        lr: the rate.
        layer_rates: layer → what its rate is multiplied with from here on, as in optimizer.layer_rates, of which the layers that
            are not named keep theirs (release run 145: conv1 slowed at epoch 68, frozen at 72).
    """

    epoch: int
    lr: float
    layer_rates: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_rates", _rates(self.layer_rates, "schedule.milestones.layer_rates"))
        _need(self.epoch >= 1, "schedule.milestones.epoch", self.epoch,
              "must be at least 1; epoch 0 has optimizer.lr")
        _need(self.lr > 0, "schedule.milestones.lr", self.lr, "must be positive; give the rate from that epoch on")


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves: by `plateau`, or by `milestones`, or (null and []) not at all.

    Attributes:
        plateau: drop when the validation error stops improving; null for none.
        milestones: epochs and rates, ascending; [] for none.
        warmup_steps: the rate climbs linearly to its value over this many first steps; 0, as in the paper, for none.
    """

    plateau: Optional[Plateau]
    milestones: tuple[Milestone, ...]
    warmup_steps: int

    def __post_init__(self) -> None:
        epochs = [milestone.epoch for milestone in self.milestones]
        _need(epochs == sorted(set(epochs)), "schedule.milestones", epochs, "must have ascending epochs; sort them")
        _need(self.plateau is None or not self.milestones, "schedule.milestones", epochs,
              "cannot be given together with schedule.plateau; make one of them null or []")
        _need(self.warmup_steps >= 0, "schedule.warmup_steps", self.warmup_steps, "must not be negative; 0 is none")


@dataclass(frozen=True)
class InitConfig:
    """Weights to start from instead of random ones: pre-training and fine-tuning (paper §6).

    Attributes:
        checkpoint: a checkpoint, a run folder (its best checkpoint, or else its newest), or a folder written by train.export;
            empty for none. A path, so not part of the fingerprint; a resume compares the file's hash.
        renew: layers that start from random values all the same: the softmax layer for other classes, and those that the
            checkpoint lacks.
    """

    checkpoint: str = ""
    renew: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "renew", tuple(self.renew))
        _need(bool(self.checkpoint) or not self.renew, "init_from.renew", list(self.renew),
              "needs init_from.checkpoint; say where the other layers come from")


@dataclass(frozen=True)
class TrainConfig:
    """How long, how many at once, and with which draws.

    Attributes:
        epochs: passes over the training split (paper: about 90).
        batch: images of one step over all processes (paper: 128).
        seed: of order, crops, lighting, initial values and dropout.
        validate_views: views per validation image each epoch: 1 (centre) or 10 (paper §4.1).
        test_views: views per test image at the end: 1 or 10.
    """

    epochs: int
    batch: int
    seed: int
    validate_views: int
    test_views: int

    def __post_init__(self) -> None:
        _need(self.epochs >= 1, "train.epochs", self.epochs, "must be at least 1; the paper has 90")
        _need(self.batch >= 1, "train.batch", self.batch, "must be at least 1; the paper has 128")
        _need(0 <= self.seed < 2 ** 63, "train.seed", self.seed, "must be in [0, 2**63); choose another")
        for name in ("validate_views", "test_views"):
            _need(getattr(self, name) in (1, 10), f"train.{name}", getattr(self, name),
                  "must be 1 (centre) or 10 (corners, centre and mirrors); choose one")


@dataclass(frozen=True)
class ParallelConfig:
    """How processes (torchrun) share one run. None of it changes results, up to the rounding of sums in another order.

    Attributes:
        towers: processes that hold one network together: 2, a tower each (paper §3.2), which exchange activations; 1, each holds
            all of it. Processes beyond that share the batch. 0 is 2 when the network has two towers and the processes are
            even in number, else 1.
        scheme: towers, or weird ("one weird trick", arXiv 1404.5997): every process has all convolutions and an equal share of
            the images, only the fully connected layers are split in towers.
        feed: how the two towers get the same images: split, each decodes half of them and they swap halves (from archives 1.2 to
            1.5 times as many on two cores); replicate, each decodes all (on CPUs the faster for packed and resident images).
        overlap: compute while activations and gradients travel.
        accumulate: pieces in which each process computes its images, one after the other, to need less memory.
    """

    towers: Literal[0, 1, 2] = 0
    scheme: Literal["towers", "weird"] = "towers"
    feed: Literal["split", "replicate"] = "split"
    overlap: bool = True
    accumulate: int = 1

    def __post_init__(self) -> None:
        _need(self.accumulate >= 1, "parallel.accumulate", self.accumulate, "must be at least 1; 1 is all images at once")
        _need(self.scheme == "towers" or self.towers != 1, "parallel.towers", self.towers,
              "must be 2 in scheme weird, which splits the fully connected layers; or use parallel.scheme: towers")
        _need(self.scheme == "towers" or self.accumulate == 1, "parallel.accumulate", self.accumulate,
              "must be 1 in scheme weird; or use parallel.scheme: towers")


@dataclass(frozen=True)
class MachineConfig(LoaderConfig):
    """Where and how fast. Up to rounding none of it changes results; bit for bit it must stay the same.

    Attributes:
        device: auto takes a GPU when there is one.
        precision: fp32 is full float32, without TF32 on a GPU; bf16 computes the network under autocast, while weights,
            velocity and loss stay float32; fp64 is all float64, to compare ways of computing.
        channels_last: memory layout of images and kernels.
        deterministic: on a GPU, only kernels that give the same bits each time.
        torch_threads: of the network on a CPU, per process; 0 means the cores divided by the processes.
        archives: folder to look for archives in when they are no longer where the index says; empty for none. For tier
            streamed also s3://bucket/prefix, under which the shards lie by their names.
        runs: folder of run folders.
        name: of the run folder; empty takes the recipe's file name.
        checkpoint_steps: save every so many steps, besides the ends of epochs; 0 for never.
        checkpoint_epochs: save at the end of every so many epochs, and of the last; the best checkpoint is the best of those. For
            epochs that are shorter than writing a checkpoint.
        keep_last: checkpoints kept besides the best one.
        stop_after: stop (and save, exit code 75) after this many steps since the start of training, not since a resume;
            0 for never.
        metrics_steps: a line of metrics.jsonl every so many steps (and every epoch).
        test_batch: images of one batch of validation and test.
        timeout_s: seconds a step, a batch of a test or a save may take at most; then every thread's stack is printed and the
            run ends.
        silence_s: seconds without a sign of life from another process after which it counts as dead and the run ends.
        log_s: seconds between two lines when the output is no terminal.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    channels_last: bool = False
    deterministic: bool = True
    torch_threads: int = 0
    archives: str = ""
    runs: str = "runs"
    name: str = ""
    checkpoint_steps: int = 0
    checkpoint_epochs: int = 1
    keep_last: int = 2
    stop_after: int = 0
    metrics_steps: int = 10
    test_batch: int = 128
    timeout_s: float = 600.0
    silence_s: float = 30.0
    log_s: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (("torch_threads", 0), ("checkpoint_steps", 0), ("checkpoint_epochs", 1), ("keep_last", 1),
                          ("stop_after", 0), ("metrics_steps", 1), ("test_batch", 1)):
            value = getattr(self, name)
            _need(value >= low, f"machine.{name}", value, f"must be at least {low}; raise it")
        for name in ("timeout_s", "silence_s", "log_s"):
            _need(getattr(self, name) > 0, f"machine.{name}", getattr(self, name), "must be positive; give seconds")

    def loader(self, threads: int) -> LoaderConfig:
        """The part that concerns the pipeline, with its number of threads decided."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(LoaderConfig)}
        return LoaderConfig(**{**values, "threads": threads})


@dataclass(frozen=True)
class Config:
    """One run, whole."""

    data: Data
    model: ModelConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    train: TrainConfig
    machine: MachineConfig = field(default_factory=MachineConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    init_from: InitConfig = field(default_factory=InitConfig)

    def __post_init__(self) -> None:
        said = {"optimizer.layer_rates": self.optimizer.layer_rates, "init_from.renew": self.init_from.renew}
        said |= {f"schedule.milestones[{place}].layer_rates": milestone.layer_rates
                 for place, milestone in enumerate(self.schedule.milestones)}
        for key, names in said.items():
            for name in names:
                _need(name in self.model.layers, key, name,
                      f"must name layers of the network: {', '.join(self.model.layers)}; correct it")
        _need(self.model.input_px == self.data.crop_px, "model.input_px", self.model.input_px,
              f"must equal data.crop_px (={self.data.crop_px}); the network takes the crop whole")
        _need(self.data.tier == "streamed" or not self.machine.archives.startswith("s3://"), "machine.archives",
              self.machine.archives, f"cannot be read by tier {self.data.tier}; use data.tier: streamed")

    def as_dict(self) -> dict[str, Any]:
        """Plain values only (tuples as lists), as they stand in a YAML file."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that changes results: all groups but those of SPEED, without paths."""
        values = self.as_dict()
        for group in SPEED:
            del values[group]
        for group, name in PATHS:
            del values[group][name]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def differences(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    """Keys whose values differ, groups of SPEED and paths left out, as `key: theirs -> ours` lines."""
    lines = []
    for key in sorted(ours.keys() | theirs.keys()):
        name = f"{prefix}{key}"
        if name in SPEED or tuple(name.split(".")) in PATHS:
            continue
        mine, other = ours.get(key), theirs.get(key)
        if isinstance(mine, dict) and isinstance(other, dict):
            lines += differences(mine, other, f"{name}.")
        elif mine != other:
            lines.append(f"{name}: {other} -> {mine}")
    return lines
