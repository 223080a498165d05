"""Print the results of a test as text or JSON: counts, errors, loss, 95% intervals; an ensemble beside its members."""

import argparse
from typing import Any, Sequence

from train.checkpoint.resolve import warn_on_stderr
from train.cli import put_json
from train.evaluate.ensemble import Result, ensemble_result, member_result
from train.evaluate.metrics import CHANCE
from train.evaluate.predictions import Evaluation


def print_results(members: Sequence[Evaluation], args: argparse.Namespace) -> None:
    """Print the results of the members, and of their mean when there are several. Raises ValueError when they have no labels."""
    first = members[0]
    if not first.labelled:
        raise ValueError(f"split (={first.split}) of {first.index} has images without a label, so there is nothing to count; "
                         "choose a split with ground truth")
    results = [member_result(member) for member in members]
    together = ensemble_result(members) if len(members) > 1 else None
    report: dict[str, Any] = {"split": first.split, "images": first.key.images, "members": [
        {"checkpoint": member.checkpoint, "split": member.split, "views": member.key.views, "evaluation": str(member.folder),
         "tested": member.tested, **_numbers(result)} for member, result in zip(members, results)],
        "ensemble": _numbers(together) if together else None}
    if len(members) == 1:
        report = {**report["members"][0], **report}
    if not put_json(args.json, report):
        print(f"split {first.split}: {first.key.images} images")
        for member, result in zip(members, results):
            print(f"{member.checkpoint}, {member.key.views} crop{'s' if member.key.views > 1 else ''}")
            _print(result)
            print(f"{'saved in' if member.tested else 'no image was read: as saved in'} {member.folder}")
        if together:
            print(f"ensemble of {len(members)}, probabilities averaged")
            _print(together)
    for name, entry in zip([*(member.name for member in members), "ensemble"], [*report["members"], report["ensemble"]]):
        if entry and entry["at_chance"]:
            warn_on_stderr(f"{name}: top-1 error is {CHANCE}")


def _numbers(result: Result) -> dict[str, Any]:
    return {**result.score.as_dict(), "intervals": result.intervals(), "at_chance": result.score.at_chance}


def _print(result: Result) -> None:
    """Errors and loss, with their 95% intervals."""
    low, high = result.intervals()["loss"]
    print(*result.score.lines(), f"loss {result.score.loss:.4f}, 95% interval {low:.4f} to {high:.4f}", sep="\n")
