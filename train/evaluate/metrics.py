"""Metrics of a test: rank of the label, top-1 and top-5 error, loss, 95% intervals. N images, K classes."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

CHANCE = ("at chance: no better than guessing; train longer, on more images, or with another learning rate; if it did learn in "
          "training, compare classes and labels of the index with `alexnet index info`")
FEW_CLASSES = 10  # with fewer, the error of the five best says little, and is not shown
_NORMAL = 1.959963984540054  # 97.5% of a normal distribution lie below so many standard deviations


@dataclass(frozen=True)
class Score:
    """Counts and loss of a test; top1 and top5 are the errors as shares."""

    images: int  # tested, each once
    top1_errors: int  # images whose label is not the most probable class
    top5_errors: int  # not among the five most probable
    loss: float  # mean of -log of the label's averaged probability
    classes: int  # K

    @property
    def top1(self) -> float:
        return self.top1_errors / self.images

    @property
    def top5(self) -> float:
        return self.top5_errors / self.images

    @property
    def at_chance(self) -> bool:
        """Whether the 95% interval of its error reaches that of guessing: with a trained network, a sign of wrong labels."""
        return share_interval(self.top1, self.images)[1] >= 1 - 1 / self.classes

    def lines(self) -> list[str]:
        """A line for each error, with its interval; of top 5 where it says something."""
        errors = {1: self.top1_errors} | ({5: self.top5_errors} if self.classes >= FEW_CLASSES else {})
        return [f"err@{k} {share_text(count, self.images)}" for k, count in errors.items()]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a line of metrics.jsonl."""
        return {"images": self.images, "top1_errors": self.top1_errors, "top5_errors": self.top5_errors,
                "top1": self.top1, "top5": self.top5, "loss": self.loss}


def label_ranks(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N,) int64 rank of each label (N,) among probabilities (N, K), 0 the most probable; of equals the lower class comes first.

    Raises RuntimeError when a probability is not finite (comparisons with it are false and would count as successes).
    """
    if not np.isfinite(probabilities).all():
        raise RuntimeError("probabilities (=NaN or infinite) must be finite; the weights are damaged, test an earlier "
                           "checkpoint")
    of_label = np.take_along_axis(probabilities, labels[:, None], 1)
    lower = np.arange(probabilities.shape[1])[None] < labels[:, None]
    return np.asarray(((probabilities > of_label) | ((probabilities == of_label) & lower)).sum(1))


def label_losses(probabilities: np.ndarray) -> np.ndarray:
    """(N,) float64: -log of each label's probability (N,), which may have underflown to 0."""
    return -np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))


def score(ranks: np.ndarray, probabilities: np.ndarray, classes: int) -> Score:
    """The score of N images from the ranks (N,) and the float64 probabilities (N,) of their labels, in any order."""
    return Score(len(ranks), int((ranks >= 1).sum()), int((ranks >= 5).sum()),
                 math.fsum(label_losses(probabilities).tolist()) / len(ranks), classes)


def share_interval(share: float, count: float) -> tuple[float, float]:
    """95% interval of a share of `count` independent images: Wilson's score interval (1927), which has a width also where none
    or all of them are counted, and lies within [0, 1]."""
    square = _NORMAL ** 2 / count
    centre, half = share + square / 2, _NORMAL * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return (0.0 if share == 0 else (centre - half) / (1 + square)), (1.0 if share == 1 else (centre + half) / (1 + square))


def loss_interval(losses: np.ndarray) -> tuple[float, float]:
    """95% interval of the mean of losses (N,) over images, in the normal approximation; a loss is at least 0."""
    mean, half = float(losses.mean()), _NORMAL * float(losses.std()) / math.sqrt(len(losses))
    return max(0.0, mean - half), mean + half


def share_text(count: int, of: int) -> str:
    """As in `0.67% (2/300), 95% interval 0.18% to 2.39%`."""
    low, high = share_interval(count / of, of)
    return f"{count / of:.2%} ({count:,}/{of:,}), 95% interval {low:.2%} to {high:.2%}"
