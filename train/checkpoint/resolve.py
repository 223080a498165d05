"""Find the checkpoint that a user means: the one finder of every command.

A path may be a run folder (then `which` chooses among its checkpoints), a checkpoint folder, a folder that train.export wrote, or
a saved evaluation. What is found is compared with its manifest before it is returned.
"""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Collection, Literal, Optional, Sequence

import torch

from model.alexnet import AlexNet, canonical_shapes
from model.towers import tower_slice
from pipeline.stats import Stats
from train import build
from train.checkpoint import checkpoint
from train.config import Config
from train.evaluate import predictions
from train.export import safetensors_io
from train.parallel.topology import Topology
from train.recipe import load
from train.run_folder import CHECKPOINTS

Kind = Literal["checkpoint", "exported", "evaluation"]
NAMES: dict[Kind, str] = {"checkpoint": "a checkpoint", "exported": "a network that train.export wrote",
                          "evaluation": "a saved evaluation"}


@dataclass(frozen=True)
class Resolved:
    """A checkpoint, exported network or saved evaluation on disk, verified.

    Attributes:
        path: its folder.
        kind: which of the three it is. A saved evaluation has a path only: train.evaluate.predictions reads it.
    """

    path: Path
    kind: Kind

    @property
    def run(self) -> Optional[Path]:
        """The run folder it lies in; None when it does not lie in one."""
        return self.path.parent.parent if self.path.parent.name == CHECKPOINTS else None

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of its manifest, which holds those of its files: the identity of the weights."""
        return hashlib.sha256((self.path / checkpoint.MANIFEST).read_bytes()).hexdigest()

    @property
    def classes_sha256(self) -> Optional[str]:
        """Hash of the classes it was trained on, in order (`build.classes_sha256`); None where it does not say."""
        if self.kind == "exported":
            return safetensors_io.read_metadata(self.path / safetensors_io.WEIGHTS).get("classes_sha256")
        return str(checkpoint.read_state(self.path)["classes"])

    def config(self) -> Config:
        """The recipe it was trained with."""
        return load(self.path / checkpoint.CONFIG)

    def stats(self) -> Stats:
        """The training set's statistics, whose mean is subtracted from its images."""
        return Stats.load(self.path / checkpoint.STATS)

    def layers(self) -> tuple[str, ...]:
        """Names of the layers it has weights of."""
        if self.kind == "exported":
            return tuple(safetensors_io.read_model(self.path / safetensors_io.WEIGHTS).layers)
        return tuple(self.config().model.layers)

    def weights(self) -> dict[str, torch.Tensor]:
        """All its weights: canonical name → float32 on the CPU. Raises ValueError when they are not those of its recipe."""
        if self.kind == "exported":
            return safetensors_io.load_safetensors(self.path / safetensors_io.WEIGHTS)[1]
        shapes = {f"weight.{name}": shape for name, shape in canonical_shapes(self.config().model).items()}
        tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
        checkpoint.load(self.path, tensors, shapes, Topology.single(), all_of_it=False)
        return {name.removeprefix("weight."): tensor for name, tensor in tensors.items()}

    def load_weights(self, network: AlexNet, config: Config, topology: Topology,
                     layers: Optional[Collection[str]] = None) -> None:
        """Copy its weights into a network, or into the tower that this process holds.

        Args:
            network, config, topology: the network and what it was built from.
            layers: only these; by default all.

        Raises:
            ValueError: a name or shape differs; nothing was copied then.
        """
        tensors, shapes = build.parameters(network, config)
        wanted = {name: tensor for name, tensor in tensors.items() if layers is None or name.split(".")[1] in layers}
        if self.kind == "checkpoint":
            checkpoint.load(self.path, wanted, shapes, topology, all_of_it=False)
            return
        stored = self.weights()
        checkpoint.check_shapes({f"weight.{name}": tuple(tensor.shape) for name, tensor in stored.items()},
                                {name: shapes[name] for name in wanted}, self.path)
        for name, tensor in wanted.items():
            parameter = name.removeprefix("weight.")
            tensor.copy_(tower_slice(stored[parameter], network.tower_of(parameter)))


def warn_on_stderr(message: str) -> None:
    """Print a warning."""
    print(f"warning: {message}", file=sys.stderr)


def resolve(path: Path, which: Optional[str] = None, *, default: Literal["best", "last"] = "last",
            kinds: Sequence[Kind] = ("checkpoint",), name: str = "checkpoint",
            warn: Callable[[str], None] = warn_on_stderr) -> Resolved:
    """Find and verify the checkpoint that `path` means.

    Args:
        path: a run folder, or a folder of one of `kinds`.
        which: of a run's checkpoints, the validated one of lowest error ("best") or the newest that is whole ("last").
        default: which of them when `which` is None. Without a validated checkpoint, "best" is then the last.
        kinds: what is acceptable besides a run folder.
        name: what error messages call `path`: the option or recipe key that holds it.
        warn: called for each damaged checkpoint that is passed over.

    Raises:
        ValueError: there is no such checkpoint.
        DamagedCheckpoint: its files are not the ones that were written.
    """
    return resolve_all([path], which, default=default, kinds=kinds, name=name, warn=warn)[0]


def resolve_all(paths: Sequence[Path], which: Optional[str] = None, *, default: Literal["best", "last"] = "last",
                kinds: Sequence[Kind] = ("checkpoint",), name: str = "checkpoint",
                warn: Callable[[str], None] = warn_on_stderr) -> list[Resolved]:
    """`resolve` for several paths; `which` is refused unless one of them is a run folder."""
    is_run = [(path / CHECKPOINTS).is_dir() for path in paths]
    if which is not None and not any(is_run):
        raise ValueError(f"--which (={which}) chooses among a run's checkpoints; leave it out, or give a run folder")
    found = [_of_run(path, which, default, warn) if in_run else _folder(path, kinds, name) for path, in_run in zip(paths, is_run)]
    # Evaluations and reports name a checkpoint by the names of its run and itself, which the path must hold.
    return [replace(entry, path=Path(os.path.abspath(entry.path)))
            if predictions.run_folder(entry.path).name in ("", "..") else entry for entry in found]


def _of_run(run: Path, which: Optional[str], default: str, warn: Callable[[str], None]) -> Resolved:
    root = run / CHECKPOINTS
    path = checkpoint.best(root) if (which or default) == "best" else None
    if path is not None:
        checkpoint.verify(path)
    elif which != "best":
        path = checkpoint.newest_good(root, warn)
    if path is None:
        raise ValueError(f"run (={run}) has no {'validated ' if which == 'best' else ''}checkpoint yet; wait for its first, or "
                         "give another")
    return Resolved(path, "checkpoint")


def _folder(path: Path, kinds: Sequence[Kind], name: str) -> Resolved:
    kind = _kind(path)
    if kind is None or kind not in kinds:
        problem = "does not exist" if not path.exists() else f"is {NAMES[kind]}" if kind else "is something else"
        choices = ["a run folder", *(NAMES[accepted] for accepted in kinds)]
        raise ValueError(f"{name} (={path}) {problem}; give {', '.join(choices[:-1])} or {choices[-1]}")
    if kind == "checkpoint":
        checkpoint.verify(path)
    elif kind == "exported":
        safetensors_io.verify(path)
    return Resolved(path, kind)


def _kind(path: Path) -> Optional[Kind]:
    """What a folder holds; nothing of it is verified yet."""
    if (path / predictions.MANIFEST).is_file():
        return "evaluation"
    if (path / safetensors_io.WEIGHTS).is_file():
        return "exported"
    if (path / checkpoint.MANIFEST).is_file() or (path / checkpoint.STATE).is_file():
        return "checkpoint"
    return None
