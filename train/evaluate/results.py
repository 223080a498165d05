"""Print the results of a test as text or JSON: counts, errors, loss, 95% intervals; an ensemble beside its members."""

import argparse
import json
from typing import Any, Sequence

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
    report: dict[str, Any] = {"split": first.split, "images": first.key.images, "members": [
        {"checkpoint": member.checkpoint, "split": member.split, "views": member.key.views, "evaluation": str(member.folder),
         "tested": member.tested, **(_numbers(member_result(member)) if first.labelled else {})} for member in members],
        "ensemble": _numbers(ensemble_result(members)) if first.labelled and len(members) > 1 else None}
    if len(members) == 1:
        report = {**report["members"][0], **report}
    if args.submission is not None:
        _submit(members, args)
        report["submission"] = str(args.submission)
    print(json.dumps(report) if args.json else "\n".join(_lines(members, report)))
    for name, entry in zip([*(member.name for member in members), "ensemble"], [*report["members"], report["ensemble"]]):
        if entry and entry.get("at_chance"):
            warn_on_stderr(f"{name}: {CHANCE}")


def _numbers(result: Result) -> dict[str, Any]:
    return {**result.score.as_dict(), "intervals": result.intervals(), "at_chance": result.score.at_chance}


def _lines(members: Sequence[Evaluation], report: dict[str, Any]) -> list[str]:
    lines = [f"split {report['split']}: {report['images']} images"]
    for member, entry in zip(members, report["members"]):
        lines.append(f"{member.checkpoint}, {entry['views']} crop{'s' if entry['views'] > 1 else ''}")
        lines += _errors(entry) if member.labelled else ["no labels, so no errors were counted"]
        lines.append(f"{'saved in' if member.tested else 'no image was read: as saved in'} {member.folder}")
    if entry := report["ensemble"]:
        lines += [f"ensemble of {len(members)}, probabilities averaged", *_errors(entry)]
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
