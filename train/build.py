"""The parts of a run, built from its config: torch's settings, index, loaders, network, and the tensors of a checkpoint."""
import contextlib
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, ContextManager, Optional

import numpy as np
import torch

from model.alexnet import AlexNet, canonical_shapes
from model.kernels import takes_triton
from model.towers import BOTH, Tower
from pipeline.compute_stats import find_or_compute
from pipeline.config import LoaderConfig
from pipeline.files import locked_folder
from pipeline.index import subset
from pipeline.index.header import read_header
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.eval_loader import EvalLoader
from pipeline.loading.train_loader import TrainLoader
from pipeline.process_pool import cores
from pipeline.progress import ProgressBar
from pipeline.reading.quarantine import Quarantine, quarantine_budget
from pipeline.stats import Stats
from pipeline.tiers import make_eval_loader, make_train_loader
from train.config import Config
from train.optimizer import PaperSGD
from train.parallel.pair_loader import PairLoader, loader_shard, pair_loader
from train.parallel.topology import Topology


def configure_torch(config: Config, topology: Topology) -> None:
    """Set threads, precision and determinism of this process."""
    torch.set_num_threads(config.machine.torch_threads or max(1, cores() // topology.local_ranks))
    if topology.device.type == "cuda":
        torch.backends.cudnn.deterministic = config.machine.deterministic
        torch.backends.cudnn.benchmark = not config.machine.deterministic
        torch.use_deterministic_algorithms(config.machine.deterministic)
        # It would also fill all new memory with NaN, at a cost; nothing here reads what it has not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        if with_precision(config, topology).machine.precision == "fp32":
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def loader_config(config: Config, topology: Topology) -> LoaderConfig:
    """The loader's settings. By default it gets all of this process's cores before a GPU, and a quarter of them beside a network
    on the CPU, which costs far more than its images."""
    own_cores = cores() // topology.local_ranks
    default = max(1, own_cores if topology.device.type == "cuda" else own_cores // 4)
    return replace(config.machine, threads=config.machine.threads or default)


def index(config: Config, *splits: str) -> SampleIndex:
    """The index of the recipe. Raises ValueError when it is none, has more classes than the network, or lacks one of these
    splits, an image's label or an archive."""
    config.data.check_index()
    found = SampleIndex.load(config.data.images, None if config.in_bucket else config.machine.archives or None)
    if found.packed is not None:
        _check_packed(config, found, found.packed)
    for split in dict.fromkeys(splits):
        rows = found.samples[found.ids(split)]
        unlabelled = int((rows["label"] < 0).sum())
        if len(rows) == 0 or unlabelled:
            what = f"has {unlabelled} images without a label" if unlabelled else "has no images"
            raise ValueError(f"split (={split}) of {config.data.images} {what}; build the index with its labels (a devkit, a "
                             "ground truth), or name another split in the recipe")
        if not (config.in_bucket and split == config.data.train_split):  # the loader asks the bucket; tests read files
            found.check_archives(split)
    if len(found.classes) > config.model.classes:
        raise ValueError(f"model.classes (={config.model.classes}) must be at least the {len(found.classes)} of the index "
                         f"{config.data.images}; set it in the recipe")
    return found


def hold_out(config: Config, say: Callable[[str], None]) -> Config:
    """The recipe itself; or, where its index has training images but no split `val` to validate on, with one derived from that
    index, in a folder within it, as `DIVISION` says: a share of each class's training images are `val` there. It is written
    once, by one process while others wait, and once more, beside the old one, when the index has changed. Raises ValueError
    when it cannot be, or when the index is a packed one."""
    if config.data.validation_split != "val":
        return config
    config.data.check_index()
    path = Path(config.data.images)
    _, header = read_header(path)
    splits = [split.name for split in header.splits]
    if "val" in splits or "train" not in splits:
        return config
    if header.packed is not None:
        raise ValueError(_packed_undivided(config))
    if config.data.images != config.data.index:  # the loader says that data.packed is no packed one
        return config
    original = SampleIndex.load(path, config.machine.archives or None)
    try:
        with locked_folder(path):
            out = subset.division_folder(path, original.sha256)
            if not subset.is_division(out, original.sha256):
                subset.derive(original, out, subset.DIVISION)
    except ValueError as error:
        raise ValueError(f"split (=val) is not in the index {path}, and {subset.DIVISION.hold_out:.0%} of its training images "
                         f"cannot be held out: {error}") from None
    found = SampleIndex.load(out, config.machine.archives or None)
    counts = np.bincount(found.samples["label"][found.ids("val")], minlength=len(found.classes))
    lacking = f"; classes that have none there: {np.count_nonzero(counts == 0)}" if (counts == 0).any() else ""
    say(f"{path} has no images for validation: {counts.sum():,} of {len(original.ids('train')):,} training images, "
        f"{subset.DIVISION.hold_out:.0%} of each class, are held out as val and not trained on{lacking}; index: {out}")
    if out != path / "hold-out":
        say(f"{path / 'hold-out'} is a division of {path} as it was before, or another one, and stays as it is: runs on it go on "
            f"with --data.index={path / 'hold-out'}")
    return replace(config, data=replace(config.data, index=str(out)))


def _packed_undivided(config: Config) -> str:
    """What is wrong with packed images without a split to validate on, and what to do."""
    data, first = config.data, ""
    index, out = Path(data.index if data.images != data.index else "INDEX"), f"{data.images}-divided"
    if (index / "index.json").is_file():
        content, header = read_header(index)
        if "val" not in [split.name for split in header.splits]:
            index, undivided = subset.division_folder(index, content["sha256"]), index
            if not (index / "index.json").is_file():
                first = f"`{subset.division_command(undivided, index)}`, "
    name = "data.index" if data.images == data.index else "data.packed"
    return (f"{name} (={data.images}) has no validation images (split val); pack an index that has them: {first}`alexnet "
            f"pack {index} -o {out} --square-px {data.square_px}`, then train with --data.index={index} --data.packed={out}")


def statistics(config: Config, found: SampleIndex) -> Stats:
    """The statistics of the training split, computed with a progress bar when they are missing."""
    with ProgressBar() as progress:
        return find_or_compute(found, config.data.square_px, config.data.train_split,
                               machine=replace(config.machine, threads=0), progress=progress)


def _check_packed(config: Config, found: SampleIndex, packed: dict[str, Any]) -> None:
    """Raise ValueError unless the packed images have the recipe's size and, if `data.index` exists, come from it as it is now."""
    if packed["square_px"] != config.data.square_px:
        raise ValueError(f"data.square_px (={config.data.square_px}) must be the {packed['square_px']} of the packed "
                         f"images in {config.data.images}; correct the recipe, or pack with --square-px {config.data.square_px}")
    if config.data.images == config.data.index or not (Path(config.data.index) / "index.json").is_file():
        return
    original = SampleIndex.load(config.data.index)
    for split, sha256 in packed.get("source", {}).items():
        if split not in original.split_names or original.split_sha256(split) != sha256:
            raise ValueError(f"data.packed (={found.path}) must hold the images of data.index (={original.path}), and its split "
                             f"{split} was packed from others; pack that index, or correct the recipe")


def classes_sha256(found: SampleIndex) -> str:
    """Hash of the class list in its order: what the network's outputs mean."""
    return hashlib.sha256("\n".join(entry.wnid for entry in found.classes).encode()).hexdigest()


def train_loader(config: Config, topology: Topology, found: SampleIndex, stats: Stats,
                 quarantine: Path) -> TrainLoader | PairLoader:
    """Training batches from the recipe's tier: this data rank's rows of each, the same in both towers. `quarantine`: file that
    lists unreadable images; further processes write to files beside it, and all count all of them."""
    data, machine = config.data, loader_config(config, topology)
    if config.train.batch > (count := len(found.ids(data.train_split))):
        raise ValueError(f"train.batch (={config.train.batch}) must not exceed the {count} images of split {data.train_split}; "
                         f"lower it: --train.batch={count} or less")
    budget = quarantine_budget(machine, count)
    in_gpu_memory = data.tier == "resident" and machine.resident_memory == "gpu"
    loader = make_train_loader(found, data.train_split, config.train.batch, data=data, tier=data.tier, seed=config.train.seed,
                               stats=stats, shard=loader_shard(config.parallel, topology, config.train.batch),
                               device=topology.device, return_batch=True, machine=machine, resident=data.resident,
                               window=data.window, lanes=data.lanes, store=config.machine.archives if config.in_bucket else "",
                               quarantine=Quarantine(budget, quarantine, process=topology.global_rank),
                               group=topology.node_group() if in_gpu_memory else None)
    return pair_loader(loader, config.parallel, topology)


def eval_loader(config: Config, topology: Topology, found: SampleIndex, stats: Stats, split: str, *,
                keep: bool = False) -> EvalLoader:
    """Every image of a split once, divided among the data ranks; both towers of a pair get the same. With `keep`
    tier resident keeps the images in memory, for repeated tests; else it decodes them each time."""
    return make_eval_loader(found, split, config.machine.test_batch, data=config.data, tier=config.data.tier, stats=stats,
                            shard=(topology.data_rank, topology.data_ranks), device=topology.device, return_batch=True,
                            machine=loader_config(config, topology), resident=config.data.resident, keep=keep)


def network(config: Config, topology: Topology) -> AlexNet:
    """The network, or this process's tower of it, with its initial values, on its device."""
    tower = BOTH if topology.tower_ranks == 1 else Tower(topology.tower_rank, topology.tower_ranks, topology.group("tower"))
    scheme = config.parallel.scheme if topology.tower_ranks == 2 else "towers"  # the same in one process
    takes_triton(config.machine.kernels, topology.device)  # raises where they are demanded and cannot run
    built = AlexNet(config.model, seed=config.train.seed, tower=tower, scheme=scheme, overlap=config.parallel.overlap,
                    kernels=config.machine.kernels, fuse_pooling=config.machine.fuse_pooling,
                    tower_convs=config.machine.tower_convs)
    built.to(topology.device, torch.float64 if config.machine.precision == "fp64" else torch.float32)
    if config.machine.channels_last:
        built.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return built


def parameters(built: AlexNet, config: Config,
               optimizer: Optional[PaperSGD] = None) -> tuple[dict[str, torch.Tensor], dict[str, tuple[int, ...]]]:
    """The tensors of a checkpoint, `weight.NAME` and, with an optimizer, `velocity.NAME`; and their canonical shapes."""
    canonical = canonical_shapes(config.model)
    named = dict(built.named_parameters())
    assert named.keys() == canonical.keys() and not list(built.buffers()), "a checkpoint would be incomplete"
    tensors = {f"weight.{name}": parameter.data for name, parameter in named.items()}
    if optimizer is not None:
        tensors |= {f"velocity.{name}": optimizer.velocity(parameter) for name, parameter in named.items()}
    return tensors, {name: canonical[name.split(".", 1)[1]] for name in tensors}


def with_precision(config: Config, topology: Topology) -> Config:
    """The recipe with machine.precision auto replaced by what that is on this device."""
    if config.machine.precision != "auto":
        return config
    if topology.device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        bf16 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return replace(config, machine=replace(config.machine, precision="bf16" if bf16 else "fp32"))


def autocast(config: Config, topology: Topology) -> Callable[[], ContextManager[Any]]:
    """The context of a forward pass: autocast to bfloat16, or nothing."""
    if with_precision(config, topology).machine.precision == "bf16":
        return lambda: torch.autocast(topology.device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext
