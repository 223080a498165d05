"""Test networks: one or ten views of every image, exact counts with 95% intervals; several together as an ensemble.

    python -m train.evaluate --run runs/NAME [--which best|last] [--views 10] [--split val] [--index DIR]
    python -m train.evaluate --checkpoints runs/A runs/B/checkpoints/step-… runs/C/evaluations/… weights/D [--views 10]
    python -m train.evaluate --run runs/NAME --split test --submission predictions.txt --devkit ILSVRC2012_devkit_t12.tar.gz

All probabilities are saved as they come (train/evaluate/predictions.py), by default in the run's folder `evaluations`. So the
same command goes
on after whatever cut it off, answers without a look at an image when all was tested before, and saved evaluations can be averaged
where there is neither checkpoint nor data nor GPU.

Also under `torchrun --nproc-per-node N -m -- train.evaluate --run …` (the `--` keeps torchrun from reading --run as an option
of its own), however the networks were trained: each process holds all of one and tests every N-th batch, with the same result to
the bit.
Exit codes: 0 done, 2 a mistake in what was asked, 4 the machine failed, 130 interrupted. N images.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Sequence

from train.exit_codes import DONE, FAILED, INTERRUPTED, MISTAKE, leave, speaks
from train.evaluate.metrics import CHANCE, Score, ranks  # noqa: F401 (can be had from here too)

if TYPE_CHECKING:  # --help needs none of it
    from pipeline.index.sample_index import SampleIndex
    from pipeline.sampling.sampler import Ids
    from train.config import Config
    from train.parallel.topology import Topology
    from train.evaluate.probabilities import Evaluation, Facts, Made, Memory
    from train.evaluate.predictions import Folder

EVALUATIONS = "evaluations"


def __getattr__(name: str) -> Any:
    """`evaluate` can be had from here too; imported when asked for, as it needs torch."""
    if name != "evaluate":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from train.evaluate.predict import evaluate

    return evaluate


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate", description="Test trained networks, alone and as an ensemble; prints exact counts with "
        "95% intervals. Goes on where it was cut off. Exit codes: 0 done, 2 a mistake in what was asked, 4 the machine failed.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, nargs="+", metavar="FOLDER", help="run folders")
    which.add_argument("--checkpoint", "--checkpoints", type=Path, nargs="+", metavar="FOLDER",
                       help="checkpoint folders; run folders; folders of train.export; saved evaluations, which "
                       "need no image")
    parser.add_argument("--which", choices=("best", "last"), help="of a run's checkpoints (default last)")
    parser.add_argument("--index", help="index to test on (default: the run's)")
    parser.add_argument("--archives", help="folder to look for archives in")
    parser.add_argument("--split", help="split to test on (default: the recipe's test split)")
    parser.add_argument("--views", type=int, choices=(1, 10), help="views per image (default: the recipe's)")
    parser.add_argument("--batch", type=int, help="images of a batch (default: the recipe's)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to compute (default: the recipe's)")
    keep = parser.add_mutually_exclusive_group()
    keep.add_argument("--save", type=Path, metavar="FOLDER", help="folder for folders of saved probabilities (default: "
                      "evaluations in the run's)")
    keep.add_argument("--no-save", action="store_true", help="save no probabilities, use no saved ones")
    parser.add_argument("--submission", type=Path, metavar="FILE", help="write the five best classes of each image, as the "
                        "ILSVRC challenges want them; the split need not have labels then")
    parser.add_argument("--devkit", type=Path, metavar="FILE", help="the challenge's devkit, which has the classes' IDs, for "
                        "--submission")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class _Plan:
    """What is to be tested: a checkpoint or an exported folder, on what."""

    path: Path
    config: Config
    split: str
    index: SampleIndex
    facts: Facts

    @property
    def name(self) -> str:
        """What to call it."""
        from train.evaluate.probabilities import called

        return called(self.path)


def run(asked: argparse.Namespace) -> None:
    """Test what was asked for, or find it tested; print the counts."""
    from pipeline.index.devkit import read_devkit
    from train.evaluate import predictions as saved
    from train.evaluate.ensemble import check_alike
    from train.evaluate.outcome import report

    if bool(asked.submission) != bool(asked.devkit):
        raise ValueError(f"--submission (={asked.submission}) and --devkit (={asked.devkit}) go together: the devkit has the "
                         "classes' IDs; give both or neither")
    if asked.submission:  # mistakes that should not wait for the end of the test
        if not asked.submission.absolute().parent.is_dir():
            raise ValueError(f"submission (={asked.submission}) cannot be written, its folder does not exist; give another "
                             "--submission")
        read_devkit(asked.devkit)
    members = [saved.load(path) if (path / saved.MANIFEST).is_file() else _plan(path, asked) for path in _members(asked)]
    check_alike(members)
    if networks := [entry for entry in members if isinstance(entry, _Plan)]:
        from train.parallel.topology import process_group

        config = networks[0].config
        with process_group(towers=config.model.towers, parallel=config.parallel, device=config.machine.device,
                           timeout_s=config.machine.timeout_s, silence_s=config.machine.silence_s) as where:
            members = [_tested(entry, asked, where) if isinstance(entry, _Plan) else entry for entry in members]
    if speaks():
        report([entry for entry in members if not isinstance(entry, _Plan)], asked)


def _members(asked: argparse.Namespace) -> list[Path]:
    """Checkpoints, exported folders and saved evaluations that are meant, all but the last verified."""
    from train.checkpoint import checkpoint
    from train.evaluate import predictions as saved
    from train.export import safetensors_io as weights
    from train.evaluate.probabilities import run_folder

    found: list[Path] = []
    runs = 0
    for given in asked.run or asked.checkpoint:
        folder = given / "checkpoints"
        if (given / saved.MANIFEST).is_file() and not asked.run:
            found.append(given)
        elif asked.run or folder.is_dir():
            runs += 1
            _exists(folder)
            path = checkpoint.best(folder) if asked.which == "best" else checkpoint.newest_good(folder, warn)
            if path is None:
                kind = "validated checkpoint" if asked.which == "best" else "checkpoint"
                raise ValueError(f"run (={given}) has no {kind} yet; wait for its first, or give another")
            if asked.which == "best":
                checkpoint.verify(path)
            found.append(path)
        else:
            _exists(given)
            if not any((given / name).exists() for name in (checkpoint.MANIFEST, checkpoint.STATE, weights.WEIGHTS)):
                raise ValueError(f"folder (={given}) is no run, checkpoint, exported network or saved evaluation; give one")
            (weights if weights.is_exported(given) else checkpoint).verify(given)
            found.append(given)
    if asked.which and not runs:
        raise ValueError(f"--which (={asked.which}) chooses among a run's checkpoints; leave it out, or give --run")
    # What it is called, and where it is saved, need the run's name: `--run .` has none.
    return [Path(os.path.abspath(path)) if run_folder(path).name in ("", "..") else path for path in found]


def _exists(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"checkpoint folder (={folder}) does not exist; give a run folder with --run, or with --checkpoint a "
                         "checkpoint of it, or a folder that train.export wrote")


def _plan(path: Path, asked: argparse.Namespace) -> _Plan:
    """The recipe of a checkpoint or exported folder as the command line changes it, and the images to test on."""
    from dataclasses import replace

    from pipeline.files import file_sha256
    from train import build
    from train.checkpoint import checkpoint
    from train.export import safetensors_io as weights
    from train.config import ParallelConfig
    from train.evaluate.probabilities import Facts
    from train.recipe import load

    config = load(path / checkpoint.CONFIG)
    machine = replace(config.machine, **{name: value for name, value in
                                         (("archives", asked.archives), ("test_batch", asked.batch),
                                          ("device", asked.device)) if value is not None})
    config = replace(config, machine=machine, data=replace(config.data, index=asked.index or config.data.images, packed=""),
                     parallel=ParallelConfig(towers=1))
    split = asked.split or config.data.test_split
    if weights.is_exported(path) and not asked.index and not Path(config.data.images).exists():
        raise ValueError(f"index (={config.data.images}) that {path} was trained on is not here, of its place only the name was "
                         "exported; give it with --index")
    index = _index(config, split, asked.submission is not None)
    classes = build.classes_sha256(index)
    if (trained := _classes(path)) is None:
        warn(f"weights (={path}) do not say which classes theirs are; they are taken to be those of {index.path}, in its order")
    elif classes != trained:
        raise ValueError(f"index (={config.data.images}) has other classes, or another order of them, than the one "
                         "the network was trained on; give an index of the same classes")
    return _Plan(path, config, split, index,
                 Facts(file_sha256(path / checkpoint.MANIFEST), index.split_sha256(split), classes, len(index.ids(split)),
                       config.model.classes, asked.views or config.train.test_views, config.machine.precision))


def _classes(path: Path) -> Optional[str]:
    """Hash of the classes of a checkpoint or exported folder; None where it has none."""
    from train.checkpoint import checkpoint
    from train.export import safetensors_io as weights

    if weights.is_exported(path):
        return weights.read_metadata(path / weights.WEIGHTS).get("classes_sha256")
    return str(checkpoint.read_state(path)["classes"])


def _index(config: Config, split: str, unlabelled: bool) -> SampleIndex:
    """The index to test on; it need not have the other splits, nor, when it may be unlabelled, labels."""
    from train import build

    if not unlabelled:
        return build.index(config, split)
    index = build.index(config)
    if not len(index.ids(split)):
        raise ValueError(f"split (={split}) of {index.path} has no images; name another with --split")
    index.check_archives(split)
    return index


def _tested(plan: _Plan, asked: argparse.Namespace, where: Topology) -> Evaluation:
    """The evaluation of one checkpoint, saved or made now. All processes call it together; the main one's is whole."""
    import torch

    from train import build
    from train.evaluate.probabilities import Evaluation, Made, Memory, device_name
    from train.evaluate.predictions import Folder, load

    build.settle(plan.config, where)
    ids = plan.index.ids(plan.split)
    made = Made(device_name(where.device), torch.__version__, plan.config.machine.test_batch)
    folder, whole, lock = (None, False, -1) if asked.no_save else _claimed(plan, made, asked.save, where)
    try:
        if folder is not None and whole:
            return load(folder)
        store = Memory(ids, plan.index.samples["label"][ids], plan.facts.outputs) if folder is None else Folder(folder, ids)
        with contextlib.closing(store):
            remaining = store.remaining(made.batch)
            if len(remaining) < len(ids) and where.is_main:
                warn(f"going on with {folder}: {len(ids) - len(remaining)} of {len(ids)} images were tested before", "note")
            if len(remaining):
                _fill(plan, store, remaining, where)
            images, probabilities = store.finish(where)
    finally:
        if lock >= 0:
            os.close(lock)
    return Evaluation(**_about(plan), facts=plan.facts, images=images, probabilities=probabilities, folder=folder,
                      tested=len(remaining))


def _about(plan: _Plan) -> dict[str, str]:
    return {"checkpoint": str(plan.path), "split": plan.split, "index": str(plan.index.path)}


def _claimed(plan: _Plan, made: Made, save: Optional[Path], where: Topology) -> tuple[Optional[Path], bool, int]:
    """`saved.claim` by the main process, for all; without a folder when none was asked for and none can be written."""
    from train.evaluate.probabilities import run_folder
    from train.evaluate.predictions import NotSaved, claim

    run, ids = run_folder(plan.path), plan.index.ids(plan.split)
    name = f"{plan.path.name}-{plan.split}-{plan.facts.views}view{'s' if plan.facts.views > 1 else ''}"
    base = save / f"{run.name}-{name}" if save else run / EVALUATIONS / name
    found: dict[str, Any] = {}
    lock = -1
    if where.is_main:
        try:
            folder, whole, lock = claim(base, plan.facts, made, ids, plan.index.samples["label"][ids], _about(plan), warn)
            found = {"folder": str(folder), "whole": whole}
        except NotSaved as error:
            found = {"error": str(error), "mistake": False}
            if not save:
                warn(f"{str(error).partition(';')[0]}; the test goes on, its probabilities are not saved")
                found = {"folder": "", "whole": False}
        except (ValueError, RuntimeError) as error:
            found = {"error": str(error), "mistake": isinstance(error, ValueError)}
    found = json.loads(where.broadcast_object(json.dumps(found)))
    if "error" in found:
        raise (ValueError if found["mistake"] else RuntimeError)(found["error"])
    return Path(found["folder"]) if found["folder"] else None, found["whole"], lock


def _fill(plan: _Plan, store: Memory | Folder, remaining: Ids, where: Topology) -> None:
    """Test the remaining images with the network of a checkpoint or exported folder."""
    from pipeline.stats import Stats
    from train import build
    from train.checkpoint import checkpoint
    from train.export import safetensors_io as weights
    from train.console import Console
    from train.evaluate.predict import each_batch

    config = plan.config
    network = build.network(config, where)
    if weights.is_exported(plan.path):
        network.load_state_dict(weights.load_safetensors(plan.path / weights.WEIGHTS)[1])
    else:
        tensors, shapes = build.parameters(network, config)
        checkpoint.load(plan.path, tensors, shapes, where, all_of_it=False)
    loader = build.test_loader(config, where, plan.index, Stats.load(plan.path / checkpoint.STATS), plan.split, ids=remaining)
    console = Console(where.is_main, config.machine.log_s, sys.stderr)
    show, before = console.testing(f"testing {plan.path.name}"), plan.facts.images - len(remaining)
    unlabelled = bool((plan.index.samples["label"][plan.index.ids(plan.split)] < 0).any())
    with contextlib.closing(console), contextlib.closing(loader):
        each_batch(network, loader, plan.facts.views, build.autocast(config, where),
                   lambda batch, probabilities: store.take(batch.ids, batch.labels, probabilities),
                   progress=lambda done: show(before + done, plan.facts.images), where=where, labelled=not unlabelled)


def warn(message: str, kind: str = "warning") -> None:
    """A line on stderr."""
    print(f"{kind}: {message}", file=sys.stderr)


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    asked = arguments(argv)
    try:
        run(asked)
    except ValueError as error:
        if speaks():
            print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except MemoryError as error:
        print(f"error: memory (={str(error) or 'used up'}) does not suffice; give a smaller --batch", file=sys.stderr)
        return FAILED
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted" + ("" if asked.no_save else "; what was tested is saved, the same command goes on"), file=sys.stderr)
        return INTERRUPTED
    return DONE


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
