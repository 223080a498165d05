"""Initial weights from a trained network (`init_from` of a recipe): pre-training and fine-tuning (paper §6)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Optional

from model.alexnet import AlexNet
from pipeline.index.sample_index import SampleIndex
from train import build
from train.checkpoint.checkpoint import DamagedCheckpoint
from train.checkpoint.resolve import Resolved, resolve
from train.config import Config
from train.parallel.topology import Topology


@dataclass(frozen=True)
class Origin:
    """The checkpoint or exported network that `init_from` names, if any.

    Attributes:
        source: what it is, verified; None when the recipe names none, or, before a resume, which does not need it, when it is
            gone or damaged.
    """

    source: Optional[Resolved] = None

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of its manifest; empty without one."""
        return self.source.sha256 if self.source is not None else ""

    @classmethod
    def of(cls, config: Config, resume: bool, warn: Callable[[str], None]) -> Origin:
        """Find it: of a run folder the best checkpoint, or else the newest.

        Raises:
            ValueError: nothing is there. DamagedCheckpoint: it is not as it was written. Neither before a resume.
        """
        if not config.init_from.checkpoint:
            return cls()
        try:
            return cls(resolve(Path(config.init_from.checkpoint), default="best", kinds=("checkpoint", "exported"),
                               name="init_from.checkpoint", warn=warn))
        except (ValueError, DamagedCheckpoint):
            if not resume:
                raise
            return cls()

    def take(self, network: AlexNet, config: Config, where: Topology, index: SampleIndex) -> str:
        """Give the network these weights, but for the layers that `init_from.renew` names. Returns a message that says what was
        done; empty for nothing.

        Raises:
            ValueError: there is no checkpoint, though one is named, or processes have found different ones; or a layer is not in
                it, has another shape there, or gives other classes, and is not renewed.
        """
        if not config.init_from.checkpoint:
            return ""
        digests = set(where.gather_objects(self.sha256))  # each process has looked by itself
        if len(digests) > 1:
            raise ValueError(f"init_from.checkpoint (={config.init_from.checkpoint}) is not the same in all processes "
                             f"({', '.join(sorted(f'{digest[:16]}…' if digest else 'none' for digest in digests))}); name one "
                             "checkpoint that all of them see, or wait until its run has ended")
        if self.source is None:
            raise ValueError(f"init_from.checkpoint (={config.init_from.checkpoint}) is no longer there, or damaged, and "
                             "this run has no checkpoint of its own yet; put it back")
        return _load(self.source, network, config, where, index)


def _load(source: Resolved, network: AlexNet, config: Config, where: Topology, index: SampleIndex) -> str:
    renew, stored, path = config.init_from.renew, source.layers(), source.path
    kept = [name for name in config.model.layers if name not in renew]
    if not kept:
        raise ValueError(f"init_from.renew (={list(renew)}) leaves no layer to take from {path}; take layers out of it")
    for name in kept:
        if name not in stored:
            raise ValueError(f"layer (={name}) is not in {path}, only {', '.join(stored)}; add it to init_from.renew")
    last = config.model.last
    if last in kept and build.classes_sha256(index) != (classes := source.classes_sha256):
        raise ValueError(f"classes of the index (={index.path}) " + (
            f"are others, or in another order, than those of {path}" if classes else
            f"cannot be compared: {path} does not say which its are") + f"; add {last} to init_from.renew")
    try:
        source.load_weights(network, config, where, kept)
    except ValueError as error:
        raise ValueError(f"{str(error).rpartition(';')[0]}; add the layer to init_from.renew, or give a checkpoint of this "
                         "network") from None
    unused = [name for name in stored if name not in config.model.layers]
    return (f"weights of {', '.join(kept)} from {path}" + (f"; {', '.join(renew)} start anew" if renew else "")
            + (f"; its {', '.join(unused)} are not used" if unused else ""))
