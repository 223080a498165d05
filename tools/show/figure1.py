"""Figure 1 of the paper: training error by epoch, ReLU against tanh, each at the rate that trains fastest.

Of each group of runs (relu-…, tanh-…) the one is shown whose training error comes down to the target (25%) first; where none
does, the one that comes lowest. The training error is the mean over an epoch's steps during training, as in the authors' code;
where it crosses the target between two epochs is interpolated. Runs that diverged within their first epoch are listed, not drawn.
"""
from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from tools.study import lines
from train.recipe import load

GROUPS = ("relu", "tanh")


@dataclass(frozen=True)
class Curve:
    """A run: its learning rate, training error (share) after each epoch, minutes of training in all."""

    name: str
    lr: float
    errors: tuple[float, ...]
    minutes: float

    def epochs_to(self, target: float) -> Optional[float]:
        """Epochs until the training error is `target`, interpolated between two of them; None when it never is.

        The error of the n-th epoch is a mean over it, and stands for its end as in the paper's figure. Within the first epoch
        it cannot be told: then 1.
        """
        for epoch, error in enumerate(self.errors, start=1):
            if error <= target:
                before = self.errors[epoch - 2]
                return 1.0 if epoch == 1 else epoch - 1 + (before - target) / (before - error)
        return None

    @property
    def lowest(self) -> float:
        """The lowest training error; infinite before the first epoch's end."""
        return min(self.errors, default=float("inf"))


def read_curve(folder: Path) -> Curve:
    """The curve of a run folder, without any error when it has no whole epoch (it diverged, or has just begun)."""
    epochs = lines(folder, "epoch")
    return Curve(folder.name, load(folder / "config.yaml").optimizer.lr, tuple(epoch["error"] for epoch in epochs),
                 sum(epoch["seconds"] for epoch in epochs) / 60)


def read_groups(runs: Path, target: float) -> dict[str, list[Curve]]:
    """All curves of a study's folder by group, the best of each first, those without an epoch last.

    Raises:
        ValueError: a group has none with an epoch.
    """
    groups: dict[str, list[Curve]] = {}
    for group in GROUPS:
        curves = [read_curve(path.parent) for path in sorted(runs.glob(f"{group}-*/config.yaml"))]
        if not any(curve.errors for curve in curves):
            raise ValueError(f"runs (={runs}) hold no {group}-… with a whole epoch; run train/recipes/studies/figure1.yaml first")
        groups[group] = sorted(curves, key=lambda curve: (curve.epochs_to(target) or float("inf"), curve.lowest))
    return groups


def summary(groups: dict[str, list[Curve]], target: float) -> dict[str, Any]:
    """The figure's numbers as plain values. `at_least` stands in for `ratio` where no tanh came down to the target."""
    best = {group: curves[0] for group, curves in groups.items()}
    epochs = {group: curve.epochs_to(target) for group, curve in best.items()}
    relu, tanh = epochs["relu"], epochs["tanh"]
    at_least = len(best["tanh"].errors) / relu if relu and not tanh else 0.0
    return {"target": target, "ratio": tanh / relu if relu and tanh else None,
            "at_least": at_least if at_least > 1 else None,  # else it was stopped too soon to say anything
            "best": {group: {"run": curve.name, "lr": curve.lr, "epochs": epochs[group], "minutes": round(curve.minutes, 2),
                             "errors": [round(error, 4) for error in curve.errors]} for group, curve in best.items()},
            "search": {group: [{"lr": curve.lr, "epochs": curve.epochs_to(target),
                                "lowest": round(curve.lowest, 4) if curve.errors else None}
                               for curve in sorted(curves, key=lambda curve: curve.lr)] for group, curves in groups.items()}}


def draw(groups: dict[str, list[Curve]], target: float, out: Path) -> None:
    """Write the figure: the best of each group strong (solid and dashed, as in the paper), the others of the search faint."""
    from tools.show.sheet import Figure, save  # needs matplotlib

    figure = Figure(figsize=(7, 4.5), dpi=130, layout="tight")
    axes = figure.add_subplot()
    for group, colour, style, word in zip(GROUPS, ("#0072b2", "#d55e00"), ("-", "--"), ("ReLU", "tanh")):
        best, *others = [curve for curve in groups[group] if curve.errors]
        for curve in [*reversed(others), best]:
            axes.plot(range(1, len(curve.errors) + 1), [100 * error for error in curve.errors], style, color=colour,
                      linewidth=2 if curve is best else 1, alpha=1 if curve is best else 0.35,
                      label=f"{word}, learning rate {curve.lr:g}" if curve is best else None,
                      marker="." if len(curve.errors) == 1 else None)  # a line of one point cannot be seen
        if reached := best.epochs_to(target):
            axes.plot([reached], [100 * target], "o", color=colour)
            axes.annotate(f"{reached:.1f}", (reached, 100 * target), textcoords="offset points", xytext=(5, 6), color=colour)
    axes.axhline(100 * target, color="0.5", linewidth=0.8, linestyle=":")
    drawn = [curve for group in GROUPS for curve in groups[group] if curve.errors]
    axes.set(xlabel="epochs", ylabel="training error, %", ylim=(0, max(80, 102 * max(max(curve.errors) for curve in drawn))))
    axes.set_xlim(left=0)
    if len(drawn) > len(GROUPS):
        axes.plot([], [], color="0.5", linewidth=1, alpha=0.5, label="other rates tried")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, out)


def run(args: argparse.Namespace) -> None:
    """Read, draw, print. Raises ValueError; RuntimeError without matplotlib."""
    target = args.target
    if not 0 < target < 1:
        raise ValueError(f"--target (={target}) must be a share between 0 and 1; 0.25 is the paper's")
    groups = read_groups(args.runs, target)
    numbers = summary(groups, target)
    if args.out is not None:
        draw(groups, target, args.out)
    if args.json:
        print(json.dumps(numbers))
        return
    for group in GROUPS:
        for curve in groups[group]:
            reached = curve.epochs_to(target)
            print(f"{group}  lr {curve.lr:<8g} " + (
                "no whole epoch: it diverged, or has just begun" if not curve.errors else
                (f"{reached:5.1f} epochs to {target:.0%}" if reached else f"never at {target:.0%}, lowest {curve.lowest:.1%}")
                + f", {len(curve.errors)} epochs in {curve.minutes:.1f} minutes"))
    if numbers["ratio"]:
        print(f"ReLU gets there {numbers['ratio']:.1f} times sooner (paper: about 6)")
    elif numbers["at_least"]:
        print(f"ReLU gets there more than {numbers['at_least']:.1f} times sooner: tanh had not when it stopped (paper: about 6)")
