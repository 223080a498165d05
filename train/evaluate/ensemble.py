"""Ensembles: the mean of several networks' probabilities (paper §6). N images, K outputs of a network.

Everything is computed from what evaluations keep, so it is the same whether their networks were tested just now or long ago.
"""

import math
from dataclasses import dataclass
from typing import Any, Iterator, Sequence

import numpy as np

from train.evaluate.metrics import Score, label_losses, label_ranks, loss_interval, score, share_interval
from train.evaluate.predictions import SCALE, Evaluation, short

_ROWS = 1024  # images averaged at once


@dataclass(frozen=True)
class Result:
    """Rank (N,) and float64 probability (N,) of each image's label, of a network or an ensemble; `classes` is K."""

    ranks: np.ndarray
    probabilities: np.ndarray
    classes: int

    @property
    def score(self) -> Score:
        return score(self.ranks, self.probabilities, self.classes)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95% intervals of top-1 error, top-5 error and loss."""
        found = self.score
        return {"top1": share_interval(found.top1, found.images), "top5": share_interval(found.top5, found.images),
                "loss": loss_interval(label_losses(self.probabilities))}


def member_result(member: Evaluation) -> Result:
    """The result of one network: of its own float64 probabilities."""
    return Result(member.images["place"], member.images["probability"], member.key.outputs)


def ensemble_result(members: Sequence[Evaluation]) -> Result:
    """The result of the members' mean; of one member: what its float16 probabilities alone would give."""
    labels = np.array(members[0].images["label"], np.int64)
    ranks = np.concatenate([label_ranks(total, labels[rows]) for rows, total in _sums(members)])
    of_members = [member.images["probability"].tolist() for member in members]
    means = [math.fsum(of_image) / len(members) for of_image in zip(*of_members)]
    return Result(ranks, np.array(means), members[0].key.outputs)


def five_best(members: Sequence[Evaluation], classes: int) -> np.ndarray:
    """(N, 5) of the first `classes` classes, the most probable on average first; of equals the lower. Fewer where there are."""
    blocks = [np.argsort(-total[:, :classes], 1, kind="stable")[:, :5] for _, total in _sums(members)]
    return np.concatenate(blocks)


def _sums(members: Sequence[Evaluation]) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows, and sums of their probabilities (rows, K) float64, exact: so they are in order as the means are."""
    for first in range(0, members[0].key.images, _ROWS):
        rows = slice(first, first + _ROWS)
        yield rows, np.sum([member.probabilities[rows].astype(np.float64) for member in members], axis=0) / SCALE


def check_compatible(members: Sequence[Any]) -> None:
    """Raise ValueError unless all (each has `name` and `key`) are of the same images and classes, and no two of one network and
    number of crops."""
    first = members[0]
    rules = (("test_images", "test images", "give the same --index and --split for all"),
             ("classes", "classes", "the outputs of the two mean different things"),
             ("outputs", "outputs", "model.classes is another"))
    for number, member in enumerate(members):
        for key, what, advice in rules:
            value, expected = getattr(member.key, key), getattr(first.key, key)
            if value != expected:
                raise ValueError(f"{what} (={short(value)}) of {member.name} must be those of {first.name} "
                                 f"(={short(expected)}) to be averaged; {advice}")
        for other in members[:number]:
            if (member.key.checkpoint, member.key.views) == (other.key.checkpoint, other.key.views):
                raise ValueError(f"member (={member.name}) is given twice, also as {other.name}; give each network once")
