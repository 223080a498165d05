"""Test a network: softmax averaged over one or ten views (paper §4.1), every image exactly once, exact counts.

    python -m train.evaluate --run runs/NAME [--which best|last] [--views 10] [--split val] [--index DIR]
    python -m train.evaluate --checkpoint runs/NAME/checkpoints/step-… [--views 10]

Also under `torchrun --nproc-per-node N -m -- train.evaluate --run …` (the `--` keeps torchrun from reading --run as an option
of its own), however the network was trained: each process holds all of it and tests every N-th batch, with the same result to
the bit.
Exit codes: 0 done, 2 a mistake in what was asked, 4 the machine failed, 130 interrupted. B batch, K classes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, ContextManager, Iterator, Optional, Sequence

from train.ending import DONE, FAILED, INTERRUPTED, MISTAKE, leave, speaks

if TYPE_CHECKING:  # --help needs none of it
    import torch
    from torch import nn

    from pipeline.batches import Batch
    from pipeline.squares import TestLoader
    from train.distributed import Topology


@dataclass(frozen=True)
class Score:
    """What a test counted.

    Attributes:
        images: tested, each once.
        top1_errors, top5_errors: images whose label is not the most probable class; not among the five most probable.
        loss: mean of -log of the label's averaged probability.
        classes: of the network.
    """

    images: int
    top1_errors: int
    top5_errors: int
    loss: float
    classes: int

    @property
    def top1(self) -> float:
        """Share of top-1 errors."""
        return self.top1_errors / self.images

    @property
    def top5(self) -> float:
        """Share of top-5 errors."""
        return self.top5_errors / self.images

    @property
    def at_chance(self) -> bool:
        """No better than guessing, within three standard deviations: with a trained network, a sign of wrong labels."""
        chance = self.images / self.classes
        return self.images - self.top1_errors <= chance + 3 * math.sqrt(chance * (1 - 1 / self.classes))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a line of metrics.jsonl."""
        return {"images": self.images, "top1_errors": self.top1_errors, "top5_errors": self.top5_errors,
                "top1": self.top1, "top5": self.top5, "loss": self.loss}


CHANCE = ("top-1 error is at chance; if this network was trained, the labels are in another order than in its "
          "training: check the devkit and the class list with build_index.py info")


def ranks(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Place of each label among the classes, 0 the most probable; of equals the lower class comes first.

    Args:
        probabilities: (B, K).
        labels: (B,) int64.

    Returns:
        (B,) int64.

    Raises:
        RuntimeError: a probability is not finite (comparisons with it are false and would count as successes).
    """
    import torch

    if not torch.isfinite(probabilities).all():
        raise RuntimeError("probabilities (=NaN or infinite) must be finite; the weights are damaged, test an earlier "
                           "checkpoint")
    mine = probabilities.gather(1, labels[:, None])
    lower = torch.arange(probabilities.shape[1], device=labels.device)[None] < labels[:, None]
    return ((probabilities > mine) | ((probabilities == mine) & lower)).sum(1)


@dataclass(frozen=True)
class _Counts:
    """Of one batch: its number, top-1 and top-5 errors, sum of log probabilities of its labels."""

    number: int
    top1_errors: int
    top5_errors: int
    log: float


def evaluate(network: nn.Module, loader: TestLoader, views: int, autocast: Callable[[], ContextManager[Any]],
             stop: Callable[[], bool] = lambda: False,
             progress: Callable[[int, int], None] = lambda done, total: None,
             where: Optional[Topology] = None) -> Optional[Score]:
    """Test a network on every image of a split. All processes call it together and get the same score, to the bit the same for
    any number of data ranks: each counts its batches, and the counts are added in the order of the batches.

    Args:
        network: images (B, 3, crop, crop) to logits (B, K); put into eval mode and back.
        loader: of whole squares; with `shard` (data_rank, data_ranks) the batches of this process.
        views: 1 (centre) or 10 (corners and centre, and mirrored); their softmax outputs are averaged.
        autocast: context in which the network runs.
        stop: asked before each batch; when true in any process, the test is given up in all and None comes back.
        progress: told of images done, by all processes, and in all.
        where: this process; None is one alone.

    Raises:
        SampleError: an image cannot be read; in all processes, whichever met it.
        ValueError: an image has no label (or, in the other processes, RuntimeError, as with all that loading fails of).
        RuntimeError: not every image came exactly once, or a probability is not finite.
    """
    import numpy as np
    import torch

    total = len(loader.index.ids(loader.split))
    counts: list[_Counts] = []
    seen: list[np.ndarray] = []
    done = classes = 0
    training = network.training
    network.eval()
    try:
        with torch.no_grad():  # not inference_mode: what a layer keeps from here must serve training too
            for batch, images in _rounds(loader, stop, where):
                if batch is not None:
                    probabilities = _probabilities(network, loader, batch, views, autocast, where)
                    place = ranks(probabilities, batch.labels)
                    own = probabilities.gather(1, batch.labels[:, None]).clamp_min(torch.finfo(torch.float64).tiny)
                    counts.append(_Counts(batch.step, int((place >= 1).sum()), int((place >= 5).sum()), float(own.log().sum())))
                    seen.append(batch.ids)
                    classes = probabilities.shape[1]
                done += images
                progress(done, total)
                if where is not None:
                    where.watch.at("test", where.watch.step)
    except _Stopped:
        return None
    finally:
        network.train(training)
    if where is not None and where.data_ranks > 1:
        found = where.gather((counts, seen, classes))[::where.tower_ranks]  # both towers of a pair have the same
        counts, seen = [entry for part in found for entry in part[0]], [ids for part in found for ids in part[1]]
        classes = max(part[2] for part in found)
    ids = np.sort(np.concatenate(seen)) if seen else np.zeros(0, np.int64)
    if not np.array_equal(ids, loader.index.ids(loader.split)):
        raise RuntimeError(f"images tested (={len(ids)}, {len(np.unique(ids))} different) must be the {total} of split "
                           f"{loader.split}, each once; report this, the counts would be wrong")
    loss = 0.0
    for entry in sorted(counts, key=lambda entry: entry.number):
        loss -= entry.log
    return Score(len(ids), sum(entry.top1_errors for entry in counts), sum(entry.top5_errors for entry in counts),
                 loss / len(ids), classes)


class _Stopped(Exception):
    """Somebody asked to stop."""


def _rounds(loader: TestLoader, stop: Callable[[], bool], where: Optional[Topology]) -> Iterator[tuple[Optional[Batch], int]]:
    """Batch after batch of this process (None when others still have one), with the images of all processes in this round.

    Before each round all agree that everyone has its batch: a process that has failed would leave the others waiting for ever.
    """
    batches = iter(loader)
    while True:
        batch, failure = None, None
        try:
            batch = next(batches, None)
            if batch is not None and int(batch.labels.min()) < 0:
                raise ValueError(f"split (={loader.split}) of {loader.index.path} has images without a label; choose a split "
                                 "with ground truth")
        except Exception as error:
            failure = error
        flags = [len(batch.ids) if batch is not None else 0, failure is not None, stop()]
        images, failed, stopped = where.total(flags) if where is not None else flags
        if failed:
            raise _first_failure(failure, loader, where)
        if images == 0:
            return
        if stopped:
            raise _Stopped
        yield batch, int(images) // (where.tower_ranks if where is not None else 1)


def _first_failure(failure: Optional[Exception], loader: TestLoader, where: Optional[Topology]) -> Exception:
    """The failure that all processes raise: the one of the first that has any."""
    from pipeline.reader import SampleError

    if where is None or where.is_alone:
        assert failure is not None
        return failure
    sample = (failure.id, failure.reason) if isinstance(failure, SampleError) else None
    found = where.gather((str(failure) or type(failure).__name__, sample) if failure is not None else None)
    rank = next(rank for rank, entry in enumerate(found) if entry is not None)
    if rank == where.rank and failure is not None:
        return failure
    text, sample = found[rank]
    return SampleError(loader.index, *sample) if sample else RuntimeError(f"process {rank} could not test its images: {text}")


def _probabilities(network: nn.Module, loader: TestLoader, batch: Batch, views: int,
                   autocast: Callable[[], ContextManager[Any]], where: Optional[Topology]) -> torch.Tensor:
    """(B, K) float64: the softmax of a batch, averaged over the views."""
    import torch

    images = batch.images
    if halves := getattr(network, "halves_images", False):  # each process of the pair gives half of an even number
        assert where is not None
        images = torch.cat([images, images[-1:]]) if len(images) % 2 else images
        images = images.chunk(2)[where.tower_rank]
    total = torch.zeros(())
    with autocast():
        for view in loader.views(images, views):
            logits = network(view.contiguous())[:len(batch.ids)] if halves else network(view.contiguous())
            total = logits.double().softmax(1) + total.to(view.device)
    return total / views


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate", description="Test a trained network; prints exact counts. Exit codes: 0 done, "
        "2 a mistake in what was asked, 4 the machine failed.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, help="a run folder")
    which.add_argument("--checkpoint", type=Path, help="a checkpoint folder")
    parser.add_argument("--which", choices=("best", "last"), help="of the run's checkpoints (default last)")
    parser.add_argument("--index", help="index to test on (default: the run's)")
    parser.add_argument("--archives", help="folder to look for archives in")
    parser.add_argument("--split", help="split to test on (default: the recipe's test split)")
    parser.add_argument("--views", type=int, choices=(1, 10), help="views per image (default: the recipe's)")
    parser.add_argument("--batch", type=int, help="images of a batch (default: the recipe's)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to compute (default: the recipe's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


def run(asked: argparse.Namespace) -> None:
    """Load what was asked for, test it, print the counts."""
    from dataclasses import replace

    from pipeline.stats import Stats
    from train import build, checkpoint
    from train.config import ParallelConfig
    from train.distributed import topology
    from train.recipe import load

    folder = asked.run / "checkpoints" if asked.run else asked.checkpoint.parent
    if asked.checkpoint and asked.which:
        raise ValueError(f"--which (={asked.which}) chooses among a run's checkpoints; leave it out, or give --run")
    if not folder.is_dir() or (asked.checkpoint and not asked.checkpoint.is_dir()):
        raise ValueError(f"checkpoint folder (={asked.checkpoint or folder}) does not exist; give a run folder with "
                         "--run or a checkpoint of it with --checkpoint")
    path = asked.checkpoint
    if path is None:
        path = checkpoint.best(folder) if asked.which == "best" else checkpoint.newest_good(folder, warn)
    if path is None:
        kind = "validated checkpoint" if asked.which == "best" else "checkpoint"
        raise ValueError(f"run (={asked.run}) has no {kind} yet; wait for its first, or give another")
    checkpoint.verify(path)
    config = load(path / checkpoint.CONFIG)
    machine = replace(config.machine, **{name: value for name, value in
                                         (("archives", asked.archives), ("test_batch", asked.batch),
                                          ("device", asked.device)) if value is not None})
    config = replace(config, machine=machine, data=replace(config.data, index=asked.index or config.data.images, packed=""),
                     parallel=ParallelConfig(towers=1))
    split, views = asked.split or config.data.test_split, asked.views or config.train.test_views
    with topology(towers=config.model.towers, parallel=config.parallel, device=machine.device,
                  timeout_s=machine.timeout_s, silence_s=machine.silence_s) as where:
        build.settle(config, where)
        index = build.index(config, split)  # it need not have the others
        if build.classes_sha256(index) != checkpoint.read_state(path)["classes"]:
            raise ValueError(f"index (={config.data.images}) has other classes, or another order of them, than the one "
                             "the network was trained on; give an index of the same classes")
        network = build.network(config, where)
        tensors, shapes = build.parameters(network, config)
        checkpoint.load(path, tensors, shapes, where, all_of_it=False)
        loader = build.test_loader(config, where, index, Stats.load(path / checkpoint.STATS), split)
        try:
            score = evaluate(network, loader, views, build.autocast(config, where), where=where)
        finally:
            loader.close()
        assert score is not None  # nobody stopped it
        if not where.is_main:
            return
        if asked.json:
            print(json.dumps({"checkpoint": str(path), "split": split, "views": views, **score.as_dict()}))
        else:
            print(f"{path}\nsplit {split}: {score.images} images, {views} view{'s' if views > 1 else ''} each\n"
                  f"top-1 errors {score.top1_errors} of {score.images} = {score.top1:.2%}\n"
                  f"top-5 errors {score.top5_errors} of {score.images} = {score.top5:.2%}\nloss {score.loss:.4f}")
        if score.at_chance:
            warn(CHANCE)


def warn(message: str) -> None:
    """A warning on stderr."""
    print(f"warning: {message}", file=sys.stderr)


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    asked = arguments(argv)
    from train.watchdog import OtherFailed  # needs torch

    try:
        run(asked)
    except OtherFailed:  # it has been said who
        return FAILED
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
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return DONE


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
