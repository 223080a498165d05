"""From a config to the parts of a run: index, statistics, loaders, network, and the tensors a checkpoint holds."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any, Callable, ContextManager, Optional

import torch

from model.alexnet import AlexNet, canonical_shapes
from model.towers import BOTH, Tower
from pipeline import tiers
from pipeline.config import LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.train_loader import TrainLoader
from pipeline.reading.quarantine import quarantine_budget
from pipeline.parallel import cores
from pipeline.reading.quarantine import Quarantine
from pipeline.sampling.sampler import Ids
from pipeline.loading.eval_loader import EvalLoader
from pipeline.stats import Stats
from train.parallel import pair_loader as feed
from train.config import Config
from train.parallel.pair_loader import Fed
from train.parallel.topology import Topology
from train.optimizer import PaperSGD


def settle(config: Config, where: Topology) -> None:
    """Threads, precision and determinism of this process."""
    torch.set_num_threads(config.machine.torch_threads or max(1, cores() // where.local_ranks))
    if where.device.type == "cuda":
        torch.backends.cudnn.deterministic = config.machine.deterministic
        torch.backends.cudnn.benchmark = not config.machine.deterministic
        torch.use_deterministic_algorithms(config.machine.deterministic)
        # It would also fill all new memory with NaN, at a cost; nothing here reads what it has not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        if config.machine.precision == "fp32":
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def loader_config(config: Config, where: Topology) -> LoaderConfig:
    """The loader's settings; left open, its threads are a quarter of the cores beside a network on the CPU (which costs
    far more than its images), and all of them before a GPU."""
    mine = max(1, cores() // where.local_ranks)
    return config.machine.loader(config.machine.threads or (mine if where.device.type == "cuda" else max(1, mine // 4)))


def index(config: Config, *splits: str) -> SampleIndex:
    """The index of the recipe, of which these splits will be read.

    Raises:
        ValueError: it is no index, lacks a split, an image's label or an archive, or has more classes than the network.
    """
    if config.data.images != config.data.index and not (Path(config.data.images) / "index.json").is_file():
        raise ValueError(f"data.packed (={config.data.images}) is no packed folder yet; write it with `python "
                         f"tools/pack_shards.py {config.data.index} {config.data.images}`, all of its ranks to the end")
    found = SampleIndex.load(config.data.images, None if in_bucket(config) else config.machine.archives or None)
    if found.packed is not None and found.packed["square_px"] != config.data.square_px:
        raise ValueError(f"data.square_px (={config.data.square_px}) must be the {found.packed['square_px']} of the packed "
                         f"images in {config.data.images}; correct the recipe, or pack with --square-px {config.data.square_px}")
    if config.data.images != config.data.index and (Path(config.data.index) / "index.json").is_file():
        _same_images(SampleIndex.load(config.data.index), found)
    for split in dict.fromkeys(splits):
        rows = found.samples[found.ids(split)]
        unlabelled = int((rows["label"] < 0).sum())
        if len(rows) == 0 or unlabelled:
            what = f"has {unlabelled} images without a label" if unlabelled else "has no images"
            raise ValueError(f"split (={split}) of {config.data.images} {what}; build the index with its labels (a devkit, a "
                             "ground truth), or name another split in the recipe")
        if not (in_bucket(config) and split == config.data.train_split):  # the loader asks the bucket; tests read files
            found.check_archives(split)
    if len(found.classes) > config.model.classes:
        raise ValueError(f"model.classes (={config.model.classes}) must be at least the {len(found.classes)} of the index "
                         f"{config.data.images}; set it in the recipe")
    return found


def _same_images(original: SampleIndex, packed: SampleIndex) -> None:
    """Raise ValueError when `packed` was not made from `original` (as it is now; only named when it is there)."""
    for split, source in (packed.packed or {}).get("source", {}).items():
        if split not in original.split_names or original.split_sha256(split) != source:
            raise ValueError(f"data.packed (={packed.path}) must hold the images of data.index (={original.path}), and its split "
                             f"{split} was packed from others; pack that index, or correct the recipe")


def in_bucket(config: Config) -> bool:
    """Whether the training shards lie in an object store."""
    return config.machine.archives.startswith("s3://")


def classes_sha256(found: SampleIndex) -> str:
    """Hash of the class list in its order: what the network's outputs mean."""
    return hashlib.sha256("\n".join(entry.wnid for entry in found.classes).encode()).hexdigest()


def train_loader(config: Config, where: Topology, found: SampleIndex, stats: Stats,
                 quarantine: Path) -> TrainLoader | Fed:
    """Training batches, from the recipe's tier: this data rank's rows of each, the same in both towers. `quarantine`: file
    that lists unreadable images; each process adds to one of its own beside it, and all count what all of them list.

    Raises:
        ValueError: the index is not of the kind the tier reads. RuntimeError: what does not fit into memory.
    """
    machine = loader_config(config, where)
    budget = quarantine_budget(machine, len(found.ids(config.data.train_split)))
    data = config.data
    shared = data.tier == "resident" and config.machine.resident_memory == "gpu"
    made = tiers.train_loader(data.tier, found, data.train_split, data.pixels(), config.train.batch, config.train.seed, stats,
                              resident=data.resident, window=data.window, lanes=data.lanes,
                              store=config.machine.archives if in_bucket(config) else "", machine=machine,
                              shard=feed.shard(config.parallel, where, config.train.batch), device_id=_device_id(where),
                              quarantine=Quarantine(budget, quarantine, process=where.global_rank),
                              group=where.node_group() if shared else None)
    return feed.fed(made, config.parallel, where)


def test_loader(config: Config, where: Topology, found: SampleIndex, stats: Stats, split: str, *,
                keep: bool = False, ids: Optional[Ids] = None) -> EvalLoader:
    """Every image of a split once over the data ranks; both towers of a pair get the same. `keep`: it is tested again and again,
    so tier resident keeps its squares; else they are read if a run has kept all of them, and never stored. The images are the
    same. `ids`: only these samples, in this order.

    Raises:
        RuntimeError: what does not fit into memory.
    """
    return tiers.eval_loader(config.data.tier, found, split, config.data.pixels(), config.machine.test_batch, stats,
                             resident=config.data.resident, keep=keep, machine=loader_config(config, where),
                             shard=(where.data_rank, where.data_ranks), device_id=_device_id(where), ids=ids)


def network(config: Config, where: Topology) -> AlexNet:
    """The network, or this process's tower, with its initial values, on its device."""
    tower = BOTH if where.tower_ranks == 1 else Tower(where.tower_rank, where.tower_ranks, where.group("tower"))
    scheme = config.parallel.scheme if where.tower_ranks == 2 else "towers"  # one process has it all in either
    made = AlexNet(config.model, seed=config.train.seed, tower=tower, scheme=scheme, overlap=config.parallel.overlap)
    made.to(where.device, torch.float64 if config.machine.precision == "fp64" else torch.float32)
    if config.machine.channels_last:
        made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return made


def parameters(made: AlexNet, config: Config,
               optimizer: Optional[PaperSGD] = None) -> tuple[dict[str, torch.Tensor], dict[str, tuple[int, ...]]]:
    """What a checkpoint holds: `weight.NAME` and, with an optimizer, `velocity.NAME`; and their canonical shapes."""
    canonical = canonical_shapes(config.model)
    named = dict(made.named_parameters())
    assert named.keys() == canonical.keys() and not list(made.buffers()), "a checkpoint would miss something"
    tensors = {f"weight.{name}": parameter.data for name, parameter in named.items()}
    if optimizer is not None:
        tensors |= {f"velocity.{name}": optimizer.velocity(parameter) for name, parameter in named.items()}
    return tensors, {name: canonical[name.split(".", 1)[1]] for name in tensors}


def autocast(config: Config, where: Topology) -> Callable[[], ContextManager[Any]]:
    """The context of a forward pass: bfloat16 where it is safe, or nothing."""
    if config.machine.precision == "bf16":
        return lambda: torch.autocast(where.device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext


def _device_id(where: Topology) -> Optional[int]:
    return where.device.index if where.device.type == "cuda" else None
