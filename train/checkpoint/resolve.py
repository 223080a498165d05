"""Find the checkpoint that a path means, and load weights from it, to evaluate, export or fine-tune (`--resume` takes
`checkpoint.newest_good`): best or last of a run folder, or a checkpoint, a folder that train.export wrote, or a saved evaluation
itself. What is found is compared with its manifest before it is returned.

B images of a batch, S side of the resized image, c side of the crop, D neurons of the last hidden layer.
"""
import contextlib
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Collection, Iterator, Literal, Optional, Sequence

import numpy as np
import torch

from model.alexnet import AlexNet
from model.towers import tower_slice
from pipeline.files import file_sha256
from pipeline.index.header import ClassInfo
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.eval_loader import EvalLoader, square_loader
from pipeline.stats import Stats
from train import build
from train.checkpoint import checkpoint
from train.config import Config, ParallelConfig
from train.evaluate import predictions
from train.export import safetensors_io
from train.parallel.topology import Topology, process_group
from train.recipe import load
from train.run_folder import CHECKPOINTS, METRICS, check_never_saved

Kind = Literal["checkpoint", "exported", "evaluation"]
NETWORKS: tuple[Kind, ...] = ("checkpoint", "exported")
NAMES: dict[Kind, str] = {"checkpoint": "a checkpoint", "exported": "a network that train.export wrote",
                          "evaluation": "a saved evaluation"}


def warn_on_stderr(message: str) -> None:
    """Print a warning, if anybody listens."""
    with contextlib.suppress(OSError):
        print(f"warning: {message}", file=sys.stderr)


@dataclass(frozen=True)
class Resolved:
    """A checkpoint, exported network or saved evaluation on disk, verified."""
    path: Path  # its folder
    kind: Kind  # of a saved evaluation only the path is of use, to train.evaluate.predictions
    sha256: str  # hex, of its manifest, which holds those of its files: the identity of the weights

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
        return load(self.path / checkpoint.CONFIG)

    def inference_config(self, index: str | Path | None, archives: str | Path | None, device: Optional[str],
                         batch: Optional[int]) -> Config:
        """The recipe for inference by processes that each hold the whole network, with this data.index, machine.archives, .device
        and .test_batch; None: the run's. Raises ValueError when an exported network needs an index."""
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

    def load_weights(self, network: AlexNet, config: Config, topology: Topology,
                     layers: Optional[Collection[str]] = None) -> None:
        """Copy its weights, of all or of these `layers`, into a network or the tower of it that this process holds. Raises
        ValueError when a name or shape differs; nothing was copied then."""
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
    """Find and verify the checkpoint that `path`, a run folder or a folder of one of `kinds`, means. `which` of a run's: the
    validated one of lowest error ("best") or the newest that is whole ("last"). By `default` "best" is the last where none is
    validated. `name`: the option or recipe key that holds `path`, for messages. `warn` is called for each damaged checkpoint that
    is passed over. Raises ValueError when there is none, DamagedCheckpoint when its files are not those that were written."""
    kind: Kind = "checkpoint"
    if any((path / name).is_symlink() or (path / name).exists() for name in (CHECKPOINTS, METRICS)):
        path = _of_run(path, which, default, warn)
    elif which is not None:
        raise ValueError(f"--which (={which}) chooses among a run's checkpoints, and {path} is no run folder; leave it out")
    else:
        kind = _kind(path, kinds, name)
        if kind != "evaluation":
            (safetensors_io if kind == "exported" else checkpoint).verify(path)
    sha256 = file_sha256(path / (predictions.MANIFEST if kind == "evaluation" else checkpoint.MANIFEST))
    # Evaluations and reports name a checkpoint by the names of its run and itself, which the path must hold.
    return Resolved(Path(os.path.abspath(path)) if predictions.run_folder(path).name in ("", "..") else path, kind, sha256)


def _of_run(run: Path, which: Optional[str], default: str, warn: Callable[[str], None]) -> Path:
    root = run / CHECKPOINTS
    os.listdir(root)  # raises OSError: to be elsewhere, or not to be seen, is not to have none
    damaged: list[str] = []
    path = checkpoint.best(root, lambda path, problem: damaged.append(problem)) if (which or default) == "best" else None
    if path is not None:
        for problem in damaged:
            warn(problem)
        checkpoint.verify(path)
    elif which != "best":
        path = checkpoint.newest_good(root, warn)
    if path is None:
        if which != "best":
            check_never_saved(run)
        raise ValueError(f"run (={run}) has no {'validated ' if which == 'best' else ''}checkpoint yet; wait for its first, or "
                         "give another")
    return path


def _kind(path: Path, kinds: Sequence[Kind], name: str) -> Kind:
    manifests: dict[str, Kind] = {predictions.MANIFEST: "evaluation", safetensors_io.WEIGHTS: "exported",
                                  checkpoint.STATE: "checkpoint", checkpoint.MANIFEST: "checkpoint"}
    kind = next((kind for file, kind in manifests.items() if (path / file).is_file()), None)
    if kind is None or kind not in kinds:
        problem = "does not exist" if not path.exists() else f"is {NAMES[kind]}" if kind else "is not recognised"
        choices = ["a run folder", *(NAMES[accepted] for accepted in kinds)]
        raise ValueError(f"{name} (={path}) {problem}; give {', '.join(choices[:-1])} or {choices[-1]}")
    return kind


def find_pretrained(config: Config, resume: bool, warn: Callable[[str], None]) -> Optional[Resolved]:
    """Find what `init_from.checkpoint` of a recipe names (paper §6; of a run folder the best checkpoint, or else the newest).
    None when it is empty, or, before a resume, which mostly has its own, when nothing usable is there: else an error."""
    if not config.init_from.checkpoint:
        return None
    try:
        return resolve(Path(config.init_from.checkpoint), default="best", kinds=NETWORKS,
                       name="init_from.checkpoint", warn=warn)
    except (ValueError, OSError, RuntimeError):  # DamagedCheckpoint is one
        if not resume:
            raise
        return None


def load_pretrained(source: Optional[Resolved], network: AlexNet, config: Config, topology: Topology, index: SampleIndex) -> str:
    """Give the network these weights, but for the layers that `init_from.renew` names. A collective call. Returns a message
    that says what was done; empty for nothing. Raises ValueError when there is no checkpoint, though one is named, processes
    have found different ones, or a layer that is not renewed is not in it, has another shape there, or gives other classes."""
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
    path, stored = source.path, source.config().model.layers
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


def class_name(classes: Sequence[ClassInfo], label: int) -> str:
    """The first of a class's words; without words its wnid; "?" for no label, a number for a class that the index lacks."""
    if label < 0:
        return "?"
    if label >= len(classes):
        return f"class {label}"
    return classes[label].words.split(",")[0].strip() or classes[label].wnid


@dataclass(frozen=True)
class TrainedNetwork:
    """A network with the weights of a checkpoint, in eval mode, and the data set that it is shown."""
    source: Resolved
    config: Config  # of its run, with the index and machine settings given to `load_trained`
    index: SampleIndex
    stats: Stats  # whose mean is subtracted
    network: AlexNet
    topology: Topology

    @property
    def layer(self) -> str:
        """Name of the layer before the last, whose activation the features are: fc7 in the paper."""
        return [*self.config.model.convs, *self.config.model.fulls][-2]

    def loader(self, index: SampleIndex, split: str, ids: np.ndarray | None = None, *, pixels: bool = False,
               skip_corrupt: bool = False) -> EvalLoader:
        """Loader of a split in id order, or of `ids` in theirs; with `pixels` of the resized images themselves, (B, S, S, 3)
        uint8, without subtracting the mean. `skip_corrupt` leaves unreadable images out instead of raising SampleError."""
        device = self.topology.device
        return square_loader(index, split, self.config.data, self.config.machine.test_batch,
                             None if pixels else self.stats, machine=build.loader_config(self.config, self.topology), ids=ids,
                             skip_corrupt=skip_corrupt, device_id=device.index if device.type == "cuda" else None)

    def crops(self, loader: EvalLoader) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """(ids (B,), centre crops (B, c, c, 3) uint8) of each batch of a loader with `pixels`."""
        px = self.config.data.crop_px
        low = (self.config.data.square_px - px) // 2
        for batch in loader:
            yield batch.ids, batch.images[:, low:low + px, low:low + px].clone()  # the batch's memory is reused

    def features(self, loader: EvalLoader) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids (B,), features (B, D) float32) of each batch, of the centre crops. Computed in float32 whatever the run's
        precision: bfloat16 gives one query in 15 other neighbours of 50,000 images. Raises RuntimeError when not finite."""
        for batch in loader:
            with torch.no_grad():
                features = self.network.features(next(loader.crops(batch.images, 1)).contiguous()).float()
            if not torch.isfinite(features).all():
                raise RuntimeError(f"features (=NaN or infinite) of {self.source.path} must be finite; its weights are damaged, "
                                   "give an earlier checkpoint")
            yield batch.ids, features.cpu().numpy()


@contextlib.contextmanager
def load_trained(source: Resolved, *, index: str | Path | None = None, archives: str | Path | None = None,
                 device: Optional[str] = None, batch: Optional[int] = None) -> Iterator[TrainedNetwork]:
    """Load the network of a checkpoint, configured as in `Resolved.inference_config`; the process's device and group are released
    at the end of the `with`. Raises ValueError when the index has other classes, or there are several processes."""
    config = source.inference_config(index, archives, device, batch)
    machine = config.machine
    with process_group(towers=config.model.towers, parallel=config.parallel, device=machine.device, timeout_s=machine.timeout_s,
                       silence_s=machine.silence_s) as process:
        if not process.is_single:
            raise ValueError(f"processes (={process.world_size}) must be one; start it without torchrun")
        build.configure_torch(config, process)
        images = build.index(config)
        source.check_classes(images)
        network = build.network(config, process)
        source.load_weights(network, config, process)
        yield TrainedNetwork(source, config, images, source.stats(), network.eval(), process)
