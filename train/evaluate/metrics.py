"""Metrics of a test: rank of the label, top-1 and top-5 error, loss, 95% bootstrap intervals. N images, K classes."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

CHANCE = ("top-1 error is at chance; if this network was trained, the labels are in another order than in its "
          "training: check the devkit and the class list with build_index.py info")
LEVEL = 0.95  # of intervals
_GRID = 1 << 17  # points of the distribution of a resample's sum
_STEPS = 1 << 12  # grid steps in a standard deviation of that sum: the grid reaches 16 of them to either side


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
        """No better than guessing, within three standard deviations: with a trained network, a sign of wrong labels."""
        chance = self.images / self.classes
        return self.images - self.top1_errors <= chance + 3 * math.sqrt(chance * (1 - 1 / self.classes))

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


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of values (N,), N ≥ 1, over images, in the limit of infinitely many resamples.

    A resample draws N of the N images with replacement. Its sum has a known distribution: that of one image's value convolved
    with itself N times, which is a power of its Fourier transform. So no resample is drawn, and there is no seed. Differences
    between two networks are means too, of each image's difference, so what both find hard does not widen their interval. Integers
    (errors, differences of errors) are treated exactly, others to about 1/4096 of the standard error.
    """
    count, values = len(values), values.astype(np.float64)
    deviation = float(values.std()) * math.sqrt(count)  # of the sum
    if deviation == 0:
        return float(values[0]), float(values[0])
    exact = bool((values == np.rint(values)).all()) and deviation < _STEPS
    origin, step = (0.0, 1.0) if exact else (float(values.mean()), deviation / _STEPS)
    positions = (values - origin) / step
    below = np.floor(positions)
    share, cell = positions - below, below.astype(np.int64)  # a value between two grid points is divided, which keeps the mean
    one = np.bincount(cell % _GRID, 1 - share, _GRID) + np.bincount((cell + 1) % _GRID, share, _GRID)
    of_sum = np.fft.irfft(np.fft.rfft(one / count) ** count, _GRID)  # of the sum modulo the grid
    first = round(float(positions.sum())) - _GRID // 2
    cumulative = np.cumsum(np.roll(of_sum, -(first % _GRID)))
    low, high = (first + int(np.searchsorted(cumulative, tail)) for tail in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return origin + step * low / count, origin + step * high / count
