"""Configuration of a run: frozen dataclasses, one per group of a recipe, and the fingerprint that a resume compares.

Groups that change results have no defaults, so a recipe states every value; exceptions are keys added later, whose default is
the earlier behaviour. `machine` and `parallel` change speed only, have defaults, and are left out of the fingerprint, as are
paths. The docstrings are the text of `--help`. Imports nothing heavy, so that it answers at once.
"""
import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from model.config import Kernels, ModelConfig, TowerConvs, require
from pipeline.config import ADDED, LANES, WINDOW, DataConfig, LoaderConfig
from pipeline.index.header import read_header
from train.cli import DEVICES, is_device
from train.optimizer_config import OptimizerConfig, ScheduleConfig, check

# Not in the fingerprint: an index, a packed folder and a checkpoint are compared by their hashes.
PATHS = (("data", "index"), ("data", "packed"), ("init_from", "checkpoint"))
SPEED = ("machine", "parallel")  # groups that change no result


@dataclass(frozen=True, kw_only=True)
class Data(DataConfig):
    """Images: index, splits, tier, preprocessing and augmentation (paper §2, §4.1).

    Attributes:
        index: folder of the index (tools/build_index.py); a path, so not in the fingerprint.
        train_split: split trained on.
        validation_split: split whose error is measured after each epoch.
        test_split: split tested at the end; may be the validation split (ILSVRC2012 has no test labels).
        tier: source of training images: archives, as downloaded; packed, the 256-pixel JPEGs of tools/pack_shards.py; streamed,
            those read sequentially and shuffled within a window; resident, decoded images in memory.
        packed: folder written by tools/pack_shards.py, which tiers packed and streamed read instead of the index (tests too);
            empty: the index is that folder. A path, so not in the fingerprint.
        resident: tier resident: format of the images, rgb, or yuv420 of half the size and slightly different pixels.
        window: tier streamed: samples among which the order is shuffled.
        lanes: tier streamed: positions of an epoch that are read in parallel.
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
            check(self, f"data.{name}", getattr(self, name) >= 1, "must be at least 1; leave it out")
        check(self, "data.output", self.output == "float32",
              "must be float32 to train this network; machine.precision says in what it computes")

    @property
    def images(self) -> str:
        """Folder of the index that is read: `packed` if given and read by the tier."""
        return self.packed if self.packed and self.tier in ("packed", "streamed") else self.index

    def check_index(self) -> None:
        """Raise ValueError when there is no index in the folder that is read: it is not looked into."""
        if (Path(self.images) / "index.json").is_file():
            return
        if self.images != self.index:
            raise ValueError(f"data.packed (={self.images}) is no packed folder yet; write it with `alexnet pack {self.index} -o "
                             f"{self.images}`, all of its ranks to the end")
        read_header(Path(self.images))


@dataclass(frozen=True)
class InitConfig:
    """Initial weights from a checkpoint instead of random ones: fine-tuning (paper §6).

    Attributes:
        checkpoint: a checkpoint, a run folder (its best checkpoint, else its newest), or a folder written by train.export; empty
            for none. A path, so not in the fingerprint; a resume compares the checkpoint's hash.
        renew: layers that start from random values all the same: the last one for other classes, and those the checkpoint lacks.
    """
    checkpoint: str = ""
    renew: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "renew", tuple(self.renew))
        require(bool(self.checkpoint) or not self.renew, "init_from.renew", list(self.renew),
                "needs init_from.checkpoint; say where the other layers come from")


@dataclass(frozen=True)
class TrainConfig:
    """Epochs, batch size, seed, and crops per image in tests.

    Attributes:
        epochs: passes over the training split (paper: about 90).
        batch: images of one step, over all processes (paper: 128).
        seed: seed of order, augmentation, initial values and dropout.
        validate_views: crops per validation image after each epoch: 1 (centre) or 10 (paper §4.1).
        test_views: crops per test image at the end: 1 or 10.
    """
    epochs: int
    batch: int
    seed: int
    validate_views: int
    test_views: int

    def __post_init__(self) -> None:
        check(self, "train.epochs", 1 <= self.epochs <= 1_000_000, "must be at least 1, and no million; the paper has 90")
        check(self, "train.batch", self.batch >= 1, "must be at least 1; the paper has 128")
        check(self, "train.seed", 0 <= self.seed < 2 ** 63, "must be in [0, 2**63); choose another")
        for name in ("validate_views", "test_views"):
            check(self, f"train.{name}", getattr(self, name) in (1, 10),
                  "must be 1 (centre) or 10 (corners, centre and mirrors); choose one")


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes of torchrun share one run. Changes no result, up to the rounding of sums in another order.

    Attributes:
        towers: processes that hold one network together: 2, a tower each (paper §3.2); 1, each holds all of it. Further ones
            share the batch. 0 is 2 when the network has two towers and the number of processes is even, else 1.
        scheme: towers, or weird ("one weird trick", arXiv 1404.5997): every process has all convolutions and an equal share of
            the images, only the fully connected layers are split in towers.
        feed: how the two towers get the same images: split, each decodes half of them and they swap halves; replicate, each
            decodes all (faster on CPUs for packed and resident images).
        overlap: compute while activations and gradients are communicated.
        accumulate: micro-batches into which each process divides its images, to need less memory.
    """
    towers: Literal[0, 1, 2] = 0
    scheme: Literal["towers", "weird"] = "towers"
    feed: Literal["split", "replicate"] = "split"
    overlap: bool = True
    accumulate: int = 1

    def __post_init__(self) -> None:
        check(self, "parallel.accumulate", self.accumulate >= 1, "must be at least 1; 1 is no accumulation")
        if self.scheme == "weird":
            check(self, "parallel.towers", self.towers != 1,
                  "must be 2 in scheme weird, which splits the fully connected layers; or use parallel.scheme: towers")
            check(self, "parallel.accumulate", self.accumulate == 1, "must be 1 in scheme weird; or use parallel.scheme: towers")


@dataclass(frozen=True)
class MachineConfig(LoaderConfig):
    """Device, threads, folders, checkpoints and logging. Changes no result, up to rounding.

    Attributes:
        device: auto, cpu, cuda or cuda:N; auto takes a GPU when there is one.
        precision: fp32 is without TF32 on a GPU; bf16 is autocast, weights and velocity stay float32; fp64 is all float64;
            auto is bf16 where the device has arithmetic for it (a GPU since Ampere, a CPU with AVX512), else fp32.
        deterministic: on a GPU, use only kernels with reproducible results.
        kernels: auto takes Triton's on a GPU where they can be built; torch never, triton always.
        fuse_pooling: let one of Triton's kernels do LRN and the pooling after it, in channels_last; false: pooling is torch's.
        tower_convs: convolutions of two towers in one process: grouped, one of two groups; halves, two dense ones, so that each
            tower's maps are a tensor of their own up to the layer that sees both.
        step: eager, or captured: the whole step is one CUDA graph (one process with a GPU only: collectives stay out of graphs);
            auto: captured where it can be.
        sync_steps: steps between two synchronisations of host and device, which read losses, and stop or fail if need be; 0: 1 on
            a CPU, 4 on a GPU. metrics.jsonl has every step all the same.
        torch_threads: threads of the network on a CPU, per process; 0: the cores divided by the processes.
        archives: folder of archives that are no longer where the index says, or, tier streamed, s3://bucket/prefix; empty: none.
        runs: folder of run folders.
        name: name of the run folder; empty: the recipe's file name.
        checkpoint_steps: steps between two checkpoints, besides those at ends of epochs; 0 for none.
        checkpoint_epochs: epochs between two checkpoints at their ends, of which the best is kept; the last epoch has one.
        keep_last: checkpoints kept besides the best one.
        stop_after: stop (and save, exit code 75) after this many steps since the start of training; 0 for never.
        metrics_steps: steps between two lines of metrics.jsonl.
        test_batch: batch size of validation and test.
        timeout_s: seconds without progress after which the run ends, with the stacks of all threads.
        silence_s: seconds without progress after which a stopped (SIGSTOP) process of the same machine is killed.
        log_s: seconds between two lines when the output is no terminal.
        log_to: also write metrics for tensorboard (RUN/tensorboard) or wandb (RUN/wandb; offline unless WANDB_MODE is set).
    """
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "fp32"
    deterministic: bool = True
    kernels: Kernels = "auto"
    fuse_pooling: bool = True
    tower_convs: TowerConvs = "grouped"
    step: Literal["auto", "eager", "captured"] = "auto"
    sync_steps: int = 0
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
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "log_to", tuple(dict.fromkeys(self.log_to)))
        for name, low in (("sync_steps", 0), ("torch_threads", 0), ("checkpoint_steps", 0), ("checkpoint_epochs", 1),
                          ("keep_last", 1), ("stop_after", 0), ("metrics_steps", 1), ("test_batch", 1)):
            check(self, f"machine.{name}", getattr(self, name) >= low, f"must be at least {low}; raise it")
        check(self, "machine.device", is_device(self.device), f"must be {DEVICES}; correct it")
        check(self, "machine.sync_steps", self.sync_steps <= 1024, "must be at most 1024; a signal is heard only then")
        for name in ("timeout_s", "silence_s", "log_s"):
            check(self, f"machine.{name}", 0 < getattr(self, name) <= 1e7, "must be positive and at most 1e7; give seconds")
        check(self, "machine.torch_threads", self.torch_threads <= 1024, "must be at most 1024; 0 is one for each core")


@dataclass(frozen=True)
class Config:
    """All values of one run."""
    data: Data
    model: ModelConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    train: TrainConfig
    machine: MachineConfig = field(default_factory=MachineConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    init_from: InitConfig = field(default_factory=InitConfig)

    def __post_init__(self) -> None:
        layers = {"optimizer.layer_rates": self.optimizer.layer_rates, "init_from.renew": self.init_from.renew}
        layers |= {f"schedule.milestones[{number}].layer_rates": milestone.layer_rates
                   for number, milestone in enumerate(self.schedule.milestones)}
        for key, names in layers.items():
            for name in names:
                require(name in self.model.layers, key, name,
                        f"must name layers of the network: {', '.join(self.model.layers)}; correct it")
        check(self.model, "model.input_px", self.model.input_px == self.data.crop_px,
              f"must equal data.crop_px (={self.data.crop_px}); the network takes the crop whole")
        check(self.machine, "machine.archives", self.data.tier == "streamed" or not self.in_bucket,
              f"cannot be read by tier {self.data.tier}; use data.tier: streamed")

    def doubts(self, steps: int) -> list[str]:
        """What a run of so many steps says and will never use, as messages."""
        data, machine, epochs = self.data, self.machine, self.train.epochs
        unused = [("data.packed", data.packed, ("packed", "streamed")), ("data.resident", data.resident != "rgb", ("resident",)),
                  ("data.window", data.window != WINDOW, ("streamed",)), ("data.lanes", data.lanes != LANES, ("streamed",)),
                  ("machine.resident_memory", machine.resident_memory != "ram", ("resident",)),
                  ("machine.resident_folder", machine.resident_folder, ("resident",))]
        found = [f"{key} is of no use to data.tier: {data.tier}, only to {' and '.join(tiers)}" for key, is_set, tiers in unused
                 if is_set and data.tier not in tiers]
        if machine.tower_convs != "grouped" and self.model.towers == 1:
            found.append("machine.tower_convs is of no use to model.towers: 1, only to 2 in one process")
        rates = [self.optimizer.layer_rates, *(milestone.layer_rates for milestone in self.schedule.milestones)]
        if not any(each.get(name, int(number == 0)) for number, each in enumerate(rates) for name in self.model.layers):
            found.append("optimizer.layer_rates freezes every layer in every epoch: nothing is trained")
        if self.schedule.warmup_steps > steps:
            found.append(f"schedule.warmup_steps (={self.schedule.warmup_steps}) is more than the {steps} steps of the run, "
                         "which never reaches its learning rate")
        if late := [str(milestone.epoch) for milestone in self.schedule.milestones if milestone.epoch >= epochs]:
            found.append(f"schedule.milestones (epoch {', '.join(late)}) without effect: training ends after epoch {epochs}")
        return found

    @property
    def in_bucket(self) -> bool:
        """Whether the training shards lie in an object store."""
        return self.machine.archives.startswith("s3://")

    def as_dict(self) -> dict[str, Any]:
        """Plain values (tuples as lists), as in a YAML file; without the keys added later where they are at their defaults."""
        values = dict(json.loads(json.dumps(dataclasses.asdict(self))))
        for item in dataclasses.fields(self.data):
            if item.metadata == ADDED and getattr(self.data, item.name) == item.default:
                del values["data"][item.name]
        return values

    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that changes results: all groups except SPEED, without PATHS."""
        values = self.as_dict()
        for group in SPEED:
            del values[group]
        for group, name in PATHS:
            del values[group][name]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def changes(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Key → its old and new value, of the keys of two configs (`as_dict`) whose values differ; None where a key is not there."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted(old.keys() | new.keys()):
        name, before, after = f"{prefix}{key}", old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found |= changes(before, after, f"{name}.")
        elif before != after:
            found[name] = before, after
    return found


def changes_results(key: str) -> bool:
    """Whether a key is part of the fingerprint."""
    return key.partition(".")[0] not in SPEED and tuple(key.split(".")) not in PATHS


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Lines `key: theirs -> ours` of the keys whose values differ, without SPEED and PATHS."""
    return [f"{key}: {old} -> {new}" for key, (old, new) in changes(theirs, ours).items() if changes_results(key)]
