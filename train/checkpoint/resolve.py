"""Find the checkpoint that a path means: best or last of a run folder, or a checkpoint, export or saved evaluation itself.

A path may be a run folder (then `which` chooses among its checkpoints), a checkpoint folder, a folder that train.export wrote, or
a saved evaluation. What is found is compared with its manifest before it is returned.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Collection, Literal, Optional, Sequence

from model.alexnet import AlexNet
from model.towers import tower_slice
from pipeline.files import file_sha256
from pipeline.index.sample_index import SampleIndex
from pipeline.stats import Stats
from train import build
from train.checkpoint import checkpoint
from train.config import Config, ParallelConfig
from train.evaluate import predictions
from train.export import safetensors_io
from train.parallel.topology import Topology
from train.recipe import load
from train.run_folder import CHECKPOINTS

Kind = Literal["checkpoint", "exported", "evaluation"]
NAMES: dict[Kind, str] = {"checkpoint": "a checkpoint", "exported": "a network that train.export wrote",
                          "evaluation": "a saved evaluation"}


def warn_on_stderr(message: str) -> None:
    """Print a warning."""
    print(f"warning: {message}", file=sys.stderr)


@dataclass(frozen=True)
class Resolved:
    """A checkpoint, exported network or saved evaluation on disk, verified.

    Attributes:
        path: its folder.
        kind: which of the three it is. Of a saved evaluation only the path is of use, to train.evaluate.predictions.
        sha256: SHA-256 (hex) of its manifest, which holds those of its files: the identity of the weights.
    """

    path: Path
    kind: Kind
    sha256: str

    @property
    def run(self) -> Optional[Path]:
        """The run folder it lies in; None when it does not lie in one."""
        return self.path.parent.parent if self.path.parent.name == CHECKPOINTS else None

    @property
    def classes_sha256(self) -> Optional[str]:
        """Hash of the classes it was trained on, in order (`build.classes_sha256`); None where it does not say."""
        if self.kind == "exported":
            return safetensors_io.read_metadata(self.path / safetensors_io.WEIGHTS).get("classes_sha256")
        return str(checkpoint.read_state(self.path)["classes"])

    def config(self) -> Config:
        """The recipe it was trained with."""
        return load(self.path / checkpoint.CONFIG)

    def inference_config(self, index: str | Path | None, archives: str | Path | None, device: Optional[str],
                         batch: Optional[int]) -> Config:
        """The recipe for inference by processes that each hold the whole network.

        Args:
            index, archives, device, batch: data.index, machine.archives, .device and .test_batch; None: the run's.

        Raises:
            ValueError: an exported network needs an index.
        """
        config = self.config()
        if self.kind == "exported" and not index and not Path(config.data.images).exists():
            raise ValueError(f"index (={config.data.images}) that {self.path} was trained on is not here, of its place only the "
                             "name was exported; give it with --index")
        given: dict[str, Any] = {"archives": archives and str(archives), "device": device, "test_batch": batch}
        return replace(config, parallel=ParallelConfig(towers=1),
                       machine=replace(config.machine, **{key: value for key, value in given.items() if value is not None}),
                       data=replace(config.data, index=str(index or config.data.images), packed=""))

    def check_classes(self, index: SampleIndex) -> None:
        """Raise ValueError when it was trained on other classes than those of an index; warn when it does not say which."""
        if self.classes_sha256 is None:
            warn_on_stderr(f"weights (={self.path}) do not say which classes theirs are; they are taken to be those of "
                           f"{index.path}, in its order")
        elif self.classes_sha256 != build.classes_sha256(index):
            raise ValueError(f"index (={index.path}) has other classes, or another order of them, than the one the network was "
                             "trained on; give an index of the same classes")

    def stats(self) -> Stats:
        """The training set's statistics, whose mean is subtracted from images."""
        return Stats.load(self.path / checkpoint.STATS)

    def layers(self) -> list[str]:
        """Names of the layers it has weights of."""
        if self.kind == "exported":
            return list(safetensors_io.read_model(self.path / safetensors_io.WEIGHTS).layers)
        return list(self.config().model.layers)

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
        tensors = {name: tensor for name, tensor in tensors.items() if layers is None or name.split(".")[1] in layers}
        if self.kind == "checkpoint":
            checkpoint.load(self.path, tensors, shapes, topology, partial=True)
            return
        _, stored = safetensors_io.load_safetensors(self.path / safetensors_io.WEIGHTS)
        checkpoint.check_shapes({f"weight.{name}": tuple(tensor.shape) for name, tensor in stored.items()},
                                {name: shapes[name] for name in tensors}, self.path)
        for name, tensor in tensors.items():
            parameter = name.removeprefix("weight.")
            tensor.copy_(tower_slice(stored[parameter], network.tower_of(parameter)))


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
    resolved = [_of_run(path, which, default, warn) if run else _folder(path, kinds, name) for path, run in zip(paths, is_run)]
    # Evaluations and reports name a checkpoint by the names of its run and itself, which the path must hold.
    return [replace(one, path=Path(os.path.abspath(one.path))) if predictions.run_folder(one.path).name in ("", "..") else one
            for one in resolved]


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
    return Resolved(path, "checkpoint", file_sha256(path / checkpoint.MANIFEST))


def _folder(path: Path, kinds: Sequence[Kind], name: str) -> Resolved:
    manifests: dict[str, Kind] = {predictions.MANIFEST: "evaluation", safetensors_io.WEIGHTS: "exported",
                                  checkpoint.STATE: "checkpoint", checkpoint.MANIFEST: "checkpoint"}
    kind = next((kind for file, kind in manifests.items() if (path / file).is_file()), None)
    if kind is None or kind not in kinds:
        problem = "does not exist" if not path.exists() else f"is {NAMES[kind]}" if kind else "is something else"
        choices = ["a run folder", *(NAMES[accepted] for accepted in kinds)]
        raise ValueError(f"{name} (={path}) {problem}; give {', '.join(choices[:-1])} or {choices[-1]}")
    if kind == "evaluation":
        return Resolved(path, kind, file_sha256(path / predictions.MANIFEST))
    (safetensors_io if kind == "exported" else checkpoint).verify(path)
    return Resolved(path, kind, file_sha256(path / checkpoint.MANIFEST))
