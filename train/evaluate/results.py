"""Print the results of a test as text or JSON: counts, errors, loss, 95% intervals; an ensemble beside its members."""

import argparse
import itertools
import json
from typing import Any, Sequence

import numpy as np

from pipeline.index.sample_index import SampleIndex
from train.checkpoint.resolve import warn_on_stderr
from train.evaluate import submission
from train.evaluate.ensemble import Result, ensemble_result, five_best, member_result
from train.evaluate.metrics import CHANCE
from train.evaluate.predictions import Evaluation


def print_results(members: Sequence[Evaluation], args: argparse.Namespace) -> None:
    """Print the results of the members, and of their mean when there are several; write a submission when one is asked for.
    Raises ValueError when they have no labels, or the submission cannot be made."""
    first = members[0]
    if not first.labelled and args.submission is None:
        raise ValueError(f"split (={first.split}) of {first.index} has images without a label, so there is nothing to count; "
                         "write predictions with --submission, or choose a split with ground truth")
    report: dict[str, Any] = {"split": first.split, "images": first.key.images, "members": [], "ensemble": None}
    results = [member_result(member) for member in members] if first.labelled else []
    for number, member in enumerate(members):
        entry: dict[str, Any] = {"checkpoint": member.checkpoint, "split": member.split, "views": member.key.views,
                                 "evaluation": str(member.folder) if member.folder else None, "tested": member.tested}
        report["members"].append(entry | (_numbers(results[number]) if results else {}))
    if len(members) == 1:
        report = {**report["members"][0], **report}
    elif results:
        mean = ensemble_result(members)
        scores = [result.score for result in results]
        best = min(range(len(scores)), key=lambda k: (scores[k].top1_errors, scores[k].top5_errors, scores[k].loss))
        report["ensemble"] = {**_numbers(mean), "best_member": best, "less_best_member": {
            name: {"difference": value, "interval": limits} for name, (value, limits) in mean.minus(results[best]).items()}}
        results.append(mean)
    if args.submission is not None:
        _submit(members, args)
        report["submission"] = str(args.submission)
    print(json.dumps(report) if args.json else "\n".join(_lines(members, report)))
    for one, other in itertools.combinations(members, 2):  # `check_compatible` has refused the same checkpoint only
        if one.key.views == other.key.views and np.array_equal(one.probabilities, other.probabilities):
            warn_on_stderr(f"members {one.name} and {other.name} gave the same probabilities to the bit; if they are one network,"
                           " give it once")
    for name, result in zip([member.name for member in members] + ["ensemble"], results):
        if result.score.at_chance:
            warn_on_stderr(CHANCE if len(members) == 1 else f"{name}: {CHANCE}")


def _numbers(result: Result) -> dict[str, Any]:
    return {**result.score.as_dict(), "intervals": result.intervals()}


def _crops(count: int) -> str:
    return f"{count} crop{'s' if count > 1 else ''}"


def _lines(members: Sequence[Evaluation], report: dict[str, Any]) -> list[str]:
    first, several = members[0], len(members) > 1
    counts = sorted({member.key.views for member in members})
    lines = [] if several else [first.checkpoint]
    lines.append(f"split {first.split}: {first.key.images} images, {' or '.join(map(_crops, counts))} each")
    for member, entry in zip(members, report["members"]):
        if several:
            lines.append(member.name + (f", {_crops(member.key.views)}" if len(counts) > 1 else ""))
        if not first.labelled:
            lines.append("no labels, so no errors were counted")
        else:
            lines += _errors(entry)
        if member.folder:
            lines.append(f"{'saved in' if member.tested else 'no image was read: as saved in'} {member.folder}")
    if entry := report["ensemble"]:
        lines += [f"ensemble of {len(members)}, probabilities averaged", *_errors(entry)]
        parts = []
        for name, less in entry["less_best_member"].items():
            form, scale = ("loss {:+.4f}{} ({:+.4f} to {:+.4f})", 1) if name == "loss" else (
                name.replace("p", "p-") + " {:+.2f}{} ({:+.2f} to {:+.2f})", 100)
            low, high = less["interval"]
            parts.append(form.format(scale * less["difference"], " points" * (scale > 1), scale * low, scale * high))
        lines.append(f"against its best member, {members[entry['best_member']].name}: {', '.join(parts)}")
    if "submission" in report:
        lines.append(f"predictions in {report['submission']}")
    return lines


def _errors(entry: dict[str, Any]) -> list[str]:
    """Three lines of counts and errors, with their 95% intervals."""
    limits = entry["intervals"]
    return [f"top-{k} errors {entry[f'top{k}_errors']} of {entry['images']} = {entry[f'top{k}']:.2%} "
            f"(95% interval {limits[f'top{k}'][0]:.2%} to {limits[f'top{k}'][1]:.2%})" for k in (1, 5)] + \
        [f"loss {entry['loss']:.4f} ({limits['loss'][0]:.4f} to {limits['loss'][1]:.4f})"]


def _submit(members: Sequence[Evaluation], args: argparse.Namespace) -> None:
    """Write the predictions of the members' mean."""
    first = members[0]
    index = SampleIndex.load(args.index or first.index, args.archives)
    if index.split_sha256(first.split) != first.key.test_images:
        raise ValueError(f"index (={index.path}) has other images in split {first.split} than were tested; give the index "
                         "of those with --index")
    ids = submission.challenge_ids(index, args.devkit)
    submission.check_numbering(index, first.split, warn_on_stderr)
    submission.write(args.submission, index, first.split, first.images["id"], five_best(members, len(ids)), ids, warn_on_stderr)
