"""Several networks as one: the mean of their probabilities (paper §6). N images, K outputs, M members.

Everything is computed from what evaluations keep, so it is the same whether its members were tested just now or long ago.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Iterator, Protocol, Sequence

import numpy as np
import torch

from train.evaluate.bootstrap import interval
from train.evaluate.probabilities import SCALE, Evaluation, Facts
from train.evaluate.metrics import Score, losses, ranks, scored

_ROWS = 1024  # at once


@dataclass(frozen=True)
class Result:
    """Of each image, what a network or an ensemble made of it: (N,) places and float64 probabilities of the labels."""

    places: np.ndarray
    own: np.ndarray
    classes: int

    @property
    def score(self) -> Score:
        """Exact counts and loss."""
        return scored(self.places, self.own, self.classes)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95% intervals of top-1 error, top-5 error and loss."""
        return {name: interval(values) for name, values in self._values().items()}

    def less(self, other: Result) -> dict[str, tuple[float, tuple[float, float]]]:
        """How far this one lies above another in top-1 error, top-5 error and loss, image by image, with 95% intervals."""
        mine, theirs = self._values(), other._values()
        return {name: (float((mine[name] - theirs[name]).mean()), interval(mine[name] - theirs[name])) for name in mine}

    def _values(self) -> dict[str, np.ndarray]:
        return {"top1": (self.places >= 1).astype(np.int64), "top5": (self.places >= 5).astype(np.int64),
                "loss": losses(self.own)}


def alone(member: Evaluation) -> Result:
    """The result of one network: of its own float64 probabilities."""
    return Result(member.images["place"], member.images["probability"], member.facts.outputs)


def together(members: Sequence[Evaluation]) -> Result:
    """The result of an ensemble; of one member: what its saved probabilities alone would give."""
    labels = torch.from_numpy(np.array(members[0].images["label"], np.int64))
    places = np.concatenate([ranks(torch.from_numpy(total), labels[rows]).numpy() for rows, total in _sums(members)])
    own = [member.images["probability"].tolist() for member in members]
    return Result(places, np.array([math.fsum(of_image) / len(members) for of_image in zip(*own)]), members[0].facts.outputs)


def five_best(members: Sequence[Evaluation], classes: int) -> np.ndarray:
    """(N, 5) of the first `classes` classes, the most probable on average first; of equals the lower. Fewer where there are."""
    found = []
    for _, total in _sums(members):
        total, best = total[:, :classes], []
        for _ in range(min(5, classes)):
            best.append(total.argmax(1))  # the first of equals
            total[np.arange(len(total)), best[-1]] = -1
        found.append(np.stack(best, 1))
    return np.concatenate(found)


def _sums(members: Sequence[Evaluation]) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows, and sums of their probabilities (rows, K) float64, exact: so they are in order as the means are."""
    for first in range(0, members[0].facts.images, _ROWS):
        rows = slice(first, first + _ROWS)
        total = np.zeros((1, 1))
        for member in members:
            total = total + member.probabilities[rows].astype(np.float64)
        yield rows, total / SCALE


class Member(Protocol):
    """A network that was tested or is to be."""

    @property
    def name(self) -> str: ...

    @property
    def facts(self) -> Facts: ...


def check_alike(members: Sequence[Member]) -> None:
    """Raise ValueError unless all are of the same images and classes, each of another network or other views."""
    first = members[0]
    rules = (("test_images", "test images", "give the same --index and --split for all"),
             ("classes", "classes", "the outputs of the two mean different things"),
             ("outputs", "outputs", "model.classes is another"))
    for place, member in enumerate(members):
        for key, what, advice in rules:
            mine, theirs = getattr(member.facts, key), getattr(first.facts, key)
            if mine != theirs:
                raise ValueError(f"{what} (={_short(mine)}) of {member.name} must be those of {first.name} (={_short(theirs)}) "
                                 f"to be averaged; {advice}")
        for other in members[:place]:
            if (member.facts.checkpoint, member.facts.views) == (other.facts.checkpoint, other.facts.views):
                raise ValueError(f"member (={member.name}) is given twice, also as {other.name}; give each network once")


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) else str(value)
