"""Losses of a run shared between processes in every way, to be compared with those of one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.helpers.runs import ALONE, finish, lines, start, ranks


@dataclass(frozen=True)
class Sharing:
    """A way to share one run: so many processes, and their settings of `parallel`."""

    name: str
    processes: int
    settings: tuple[str, ...] = ()


SINGLE = Sharing("single", 1)
SHARINGS = {sharing.name: sharing for sharing in (
    Sharing("towers", 2), Sharing("towers-replicate", 2, ("feed=replicate",)),
    Sharing("towers-no-overlap", 2, ("overlap=false",)), Sharing("towers-accumulate", 2, ("accumulate=2",)),
    Sharing("data", 2, ("towers=1",)), Sharing("weird", 2, ("scheme=weird",)),
    Sharing("towers-x-data", 4), Sharing("towers-x-data-replicate", 4, ("feed=replicate",)), Sharing("data-4", 4, ("towers=1",)),
    Sharing("weird-x-data", 4, ("scheme=weird",)))}


def losses(sharing: Sharing, recipe: Path, runs: Path, steps: int, *settings: str) -> list[float]:
    """The loss of each of the first `steps` steps of a recipe, shared in this way."""
    launcher = ALONE if sharing.processes == 1 else [*ranks(sharing.processes), *ALONE]
    out, _ = finish(start(launcher, recipe, runs, f"--machine.name={sharing.name}", f"--machine.stop_after={steps}", *settings,
                          *(f"--parallel.{setting}" for setting in sharing.settings)), code=75 if sharing.processes == 1 else 1)
    assert f"stopped and saved at step {steps}" in out
    found = [float(line["loss"]) for line in lines(runs / sharing.name) if line["kind"] == "step"]
    assert len(found) == steps
    return found


def largest_difference(shared: list[float], single: list[float]) -> float:
    """The largest relative difference of a step's loss."""
    return max(abs(one - other) / abs(other) for one, other in zip(shared, single, strict=True))
