"""Where weights come from when they do not start at random: a checkpoint of another run, or what train.export writes (paper §6:
pre-training, fine-tuning)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Optional

import torch

from model.alexnet import AlexNet
from model.towers import tower_slice
from pipeline.index.sample_index import SampleIndex
from train import build
from train.checkpoint import checkpoint
from train.export import safetensors_io as weights
from train.config import Config
from train.parallel.topology import Topology
from train.recipe import load
from train.run_folder import CHECKPOINTS


@dataclass(frozen=True)
class Origin:
    """The checkpoint that `init_from` names, if any.

    Attributes:
        path: its folder, verified; None when there is none, or (before a resume, which does not need it) no longer, or damaged.
        sha256: what it is: SHA-256 (hex) of its manifest, which holds those of its files; empty without one.
    """

    path: Optional[Path] = None
    sha256: str = ""

    @classmethod
    def of(cls, config: Config, resume: bool, warn: Callable[[str], None]) -> Origin:
        """Look for it: of a run folder the best checkpoint, or else the newest.

        Raises:
            ValueError: nothing is there, unless this is a resume. checkpoint.DamagedCheckpoint, weights.DamagedWeights: it is not
                as it was written.
        """
        if not config.init_from.checkpoint:
            return cls()
        path = Path(config.init_from.checkpoint)
        try:
            path = _checkpoint(path, warn)
            (weights if _exported(path) else checkpoint).verify(path)
        except (ValueError, checkpoint.DamagedCheckpoint, weights.DamagedWeights):
            if not resume:
                raise
            return cls()
        return cls(path, hashlib.sha256((path / checkpoint.MANIFEST).read_bytes()).hexdigest())

    def take(self, network: AlexNet, config: Config, where: Topology, index: SampleIndex) -> str:
        """Give the network these weights, but for the layers that `init_from.renew` names. Says in words what was done.

        Raises:
            ValueError: there is no checkpoint, though one is named, or processes have found different ones; or a layer is not in
                it, has another shape there, or gives other classes, and is not renewed.
        """
        if config.init_from.checkpoint and len(found := set(where.gather(self.sha256))) > 1:  # each has looked by itself
            raise ValueError(f"init_from.checkpoint (={config.init_from.checkpoint}) is not the same in all processes "
                             f"({', '.join(sorted(f'{digest[:16]}…' if digest else 'none' for digest in found))}); name one "
                             "checkpoint that all of them see, or wait until its run has ended")
        if self.path is not None:
            return _take(self.path, network, config, where, index)
        if config.init_from.checkpoint:
            raise ValueError(f"init_from.checkpoint (={config.init_from.checkpoint}) is no longer there, or damaged, and "
                             "this run has no checkpoint of its own yet; put it back")
        return ""


def _checkpoint(path: Path, warn: Callable[[str], None]) -> Path:
    if (path / CHECKPOINTS).is_dir():
        found = checkpoint.best(path / CHECKPOINTS) or checkpoint.newest_good(path / CHECKPOINTS, warn)
        if found is None:
            raise ValueError(f"init_from.checkpoint (={path}) is a run without a checkpoint yet; wait for its first")
        path = found
    if not (path / checkpoint.MANIFEST).is_file():
        raise ValueError(f"init_from.checkpoint (={path}) is no checkpoint; give a run folder, or a folder of its checkpoints")
    return path


def _exported(path: Path) -> bool:
    return (path / weights.WEIGHTS).is_file()


@torch.no_grad()
def _take(path: Path, network: AlexNet, config: Config, where: Topology, index: SampleIndex) -> str:
    whole: dict[str, torch.Tensor] = {}
    if _exported(path):
        theirs, whole = weights.load_safetensors(path / weights.WEIGHTS)
        classes = weights.read_metadata(path / weights.WEIGHTS).get("classes_sha256", "")
    else:
        theirs, classes = load(path / checkpoint.CONFIG).model, str(checkpoint.read_state(path)["classes"])
    renew = config.init_from.renew
    kept = [name for name in config.model.layers if name not in renew]
    if not kept:
        raise ValueError(f"init_from.renew (={list(renew)}) leaves no layer to take from {path}; take layers out of it")
    for name in kept:
        if name not in theirs.layers:
            raise ValueError(f"layer (={name}) is not in {path}, only {', '.join(theirs.layers)}; add it to init_from.renew")
    last = config.model.last
    if last in kept and build.classes_sha256(index) != classes:
        raise ValueError(f"classes of the index (={index.path}) " + (
            f"are others, or in another order, than those of {path}" if classes else
            f"cannot be compared: {path} does not say which its are") + f"; add {last} to init_from.renew")
    tensors, shapes = build.parameters(network, config)
    chosen = {name: tensor for name, tensor in tensors.items() if name.split(".")[1] in kept}
    try:
        if whole:
            _copy(whole, chosen, shapes, network, path)
        else:
            checkpoint.load(path, chosen, shapes, where, all_of_it=False)
    except ValueError as error:
        raise ValueError(f"{str(error).rpartition(';')[0]}; add the layer to init_from.renew, or give a checkpoint of this "
                         "network") from None
    gone = [name for name in theirs.layers if name not in config.model.layers]
    return (f"weights of {', '.join(kept)} from {path}" + (f"; {', '.join(renew)} start anew" if renew else "")
            + (f"; its {', '.join(gone)} are not used" if gone else ""))


def _copy(whole: dict[str, torch.Tensor], chosen: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]], network: AlexNet,
          path: Path) -> None:
    """This process's rows of whole tensors. Raises ValueError as `checkpoint.load`, before any is filled."""
    for name in sorted(chosen):
        if (stored := tuple(whole[name.removeprefix("weight.")].shape)) != shapes[name]:
            raise ValueError(f"{name} (={shapes[name]} here) is {stored} in {path}; load it with the recipe it was written with")
    for name, tensor in chosen.items():
        tensor.copy_(tower_slice(whole[name.removeprefix("weight.")], network.tower_of(name.removeprefix("weight."))))
