"""What a test counts: the places of the labels, and from them errors and loss. B batch, K classes, N images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch


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


def losses(own: np.ndarray) -> np.ndarray:
    """(N,) float64: -log of each label's probability, which may have underflown to 0."""
    import numpy as np

    return -np.log(np.maximum(own, np.finfo(np.float64).tiny))


def scored(places: np.ndarray, own: np.ndarray, classes: int) -> Score:
    """The score of N images, the same for any order of them.

    Args:
        places: (N,) of the labels, as `ranks` gives.
        own: (N,) float64 probabilities of the labels.
        classes: of the network.
    """
    return Score(len(places), int((places >= 1).sum()), int((places >= 5).sum()),
                 math.fsum(losses(own).tolist()) / len(places), classes)
