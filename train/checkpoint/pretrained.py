"""Initial weights from a trained network (`init_from` of a recipe): pre-training and fine-tuning (paper §6)."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Optional

from model.alexnet import AlexNet
from pipeline.index.sample_index import SampleIndex
from train import build
from train.checkpoint.checkpoint import DamagedCheckpoint
from train.checkpoint.resolve import Resolved, resolve
from train.config import Config
from train.parallel.topology import Topology


def find_pretrained(config: Config, resume: bool, warn: Callable[[str], None]) -> Optional[Resolved]:
    """Find what `init_from.checkpoint` names (of a run folder the best checkpoint, or else the newest); None when it is empty,
    or, before a resume, which mostly has weights of its own, when nothing usable is there.

    Raises:
        ValueError: nothing is there. DamagedCheckpoint: it is not as it was written. Neither before a resume.
    """
    if not config.init_from.checkpoint:
        return None
    try:
        return resolve(Path(config.init_from.checkpoint), default="best", kinds=("checkpoint", "exported"),
                       name="init_from.checkpoint", warn=warn)
    except (ValueError, OSError, DamagedCheckpoint):
        if not resume:
            raise
        return None


def load_pretrained(source: Optional[Resolved], network: AlexNet, config: Config, topology: Topology, index: SampleIndex) -> str:
    """Give the network these weights, but for the layers that `init_from.renew` names. A collective call. Returns a message that
    says what was done; empty for nothing.

    Raises:
        ValueError: there is no checkpoint, though one is named, or processes have found different ones; or a layer is not in it,
            has another shape there, or gives other classes, and is not renewed.
    """
    name, renew, last = config.init_from.checkpoint, config.init_from.renew, config.model.last
    if not name:
        return ""
    digests = set(topology.gather_objects(source.sha256 if source is not None else ""))  # each process has looked by itself
    if len(digests) > 1:
        raise ValueError(f"init_from.checkpoint (={name}) is not the same in all processes "
                         f"({', '.join(sorted(f'{digest[:16]}…' if digest else 'none' for digest in digests))}); name one "
                         "checkpoint that all of them see, or wait until its run has ended")
    if source is None:
        raise ValueError(f"init_from.checkpoint (={name}) is no longer there, or damaged, and this run has no checkpoint of its "
                         "own yet; put it back")
    path, stored = source.path, source.layers()
    kept = [layer for layer in config.model.layers if layer not in renew]
    if not kept:
        raise ValueError(f"init_from.renew (={list(renew)}) leaves no layer to take from {path}; take layers out of it")
    for layer in kept:
        if layer not in stored:
            raise ValueError(f"layer (={layer}) is not in {path}, only {', '.join(stored)}; add it to init_from.renew")
    classes = source.classes_sha256
    if last in kept and build.classes_sha256(index) != classes:
        raise ValueError(f"classes of the index (={index.path}) " + (
            f"are others, or in another order, than those of {path}" if classes else
            f"cannot be compared: {path} does not say which its are") + f"; add {last} to init_from.renew")
    try:
        source.load_weights(network, config, topology, kept)
    except ValueError as error:
        raise ValueError(f"{str(error).rpartition(';')[0]}; add the layer to init_from.renew, or give a checkpoint of this "
                         "network") from None
    unused = [layer for layer in stored if layer not in config.model.layers]
    return (f"weights of {', '.join(kept)} from {path}" + (f"; {', '.join(renew)} start anew" if renew else "")
            + (f"; its {', '.join(unused)} are not used" if unused else ""))
