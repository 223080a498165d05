"""Test a network: softmax averaged over one or ten views (paper §4.1), every image exactly once, exact counts.

    python -m train.evaluate --run runs/NAME [--which best|last] [--views 10] [--split val] [--index DIR]
    python -m train.evaluate --checkpoint runs/NAME/checkpoints/step-… [--views 10]

Also under `torchrun --nproc-per-node 2 -m -- train.evaluate --run …` (the `--` keeps torchrun from reading --run as an
option of its own): both processes see every image, each holds one tower.
Exit codes: 0 done, 2 a mistake in what was asked, 4 the machine failed, 130 interrupted. B batch, K classes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, ContextManager, Optional, Sequence

if TYPE_CHECKING:  # --help needs none of it
    import torch
    from torch import nn

    from pipeline.squares import TestLoader


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


def evaluate(network: nn.Module, loader: TestLoader, views: int, autocast: Callable[[], ContextManager[Any]],
             stop: Callable[[], bool] = lambda: False,
             progress: Callable[[int, int], None] = lambda done, total: None) -> Optional[Score]:
    """Test a network on every image of a loader's split.

    Args:
        network: images (B, 3, crop, crop) to logits (B, K); put into eval mode and back.
        loader: of whole squares.
        views: 1 (centre) or 10 (corners and centre, and mirrored); their softmax outputs are averaged.
        autocast: context in which the network runs.
        stop: asked before each batch; when true, the test is given up and None comes back.
        progress: told of images done and in all.

    Raises:
        ValueError: an image has no label.
        RuntimeError: not every image came exactly once, or a probability is not finite.
    """
    import numpy as np
    import torch

    expected = loader.index.ids(loader.split)
    seen: list[np.ndarray] = []
    top1 = top5 = done = 0
    loss, classes = 0.0, 0
    training = network.training
    network.eval()
    try:
        with torch.no_grad():  # not inference_mode: what a layer keeps from here must serve training too
            for batch in loader:
                if stop():
                    return None
                if int(batch.labels.min()) < 0:
                    raise ValueError(f"split (={loader.split}) of {loader.index.path} has images without a label; "
                                     "choose a split with ground truth")
                total = torch.zeros(())
                with autocast():
                    for view in loader.views(batch.images, views):
                        total = network(view.contiguous()).double().softmax(1) + total.to(view.device)
                probabilities = total / views
                place = ranks(probabilities, batch.labels)
                top1 += int((place >= 1).sum())
                top5 += int((place >= 5).sum())
                own = probabilities.gather(1, batch.labels[:, None]).clamp_min(torch.finfo(torch.float64).tiny)
                loss -= float(own.log().sum())
                classes = probabilities.shape[1]
                seen.append(batch.ids)
                done += len(batch.ids)
                progress(done, len(expected))
    finally:
        network.train(training)
    ids = np.sort(np.concatenate(seen)) if seen else np.zeros(0, np.int64)
    if not np.array_equal(ids, expected):
        raise RuntimeError(f"images tested (={len(ids)}, {len(np.unique(ids))} different) must be the {len(expected)} "
                           f"of split {loader.split}, each once; report this, the counts would be wrong")
    return Score(done, top1, top5, loss / done, classes)


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
    config = replace(config, machine=machine, data=replace(config.data, index=asked.index or config.data.images, packed=""))
    split, views = asked.split or config.data.test_split, asked.views or config.train.test_views
    with topology(towers=config.model.towers, parallel=config.parallel, device=machine.device,
                  timeout_s=machine.timeout_s) as where:
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
            score = evaluate(network, loader, views, build.autocast(config, where))
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
    try:
        run(asked)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"error: memory (={str(error) or 'used up'}) does not suffice; give a smaller --batch", file=sys.stderr)
        return 4
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
