"""Print the results of a test as text or JSON: counts, errors, loss, 95% intervals; an ensemble beside its members."""

import argparse
from typing import Any, Optional, Sequence

from pipeline.index.sample_index import SampleIndex
from train.checkpoint.resolve import warn_on_stderr
from train.cli import put_json
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
    results = [member_result(member) if first.labelled else None for member in members]
    together = ensemble_result(members) if first.labelled and len(members) > 1 else None
    report: dict[str, Any] = {"split": first.split, "images": first.key.images, "members": [
        {"checkpoint": member.checkpoint, "split": member.split, "views": member.key.views, "evaluation": str(member.folder),
         "tested": member.tested, **(_numbers(result) if result else {})} for member, result in zip(members, results)],
        "ensemble": _numbers(together) if together else None}
    if len(members) == 1:
        report = {**report["members"][0], **report}
    if args.submission is not None:
        _submit(members, args)
        report["submission"] = str(args.submission)
    if not put_json(args.json, report):
        print("\n".join(_lines(members, results, together, args)))
    for name, entry in zip([*(member.name for member in members), "ensemble"], [*report["members"], report["ensemble"]]):
        if entry and entry.get("at_chance"):
            warn_on_stderr(f"{name}: top-1 error is {CHANCE}")


def _numbers(result: Result) -> dict[str, Any]:
    return {**result.score.as_dict(), "intervals": result.intervals(), "at_chance": result.score.at_chance}


def _lines(members: Sequence[Evaluation], results: Sequence[Optional[Result]], together: Optional[Result],
           args: argparse.Namespace) -> list[str]:
    lines = [f"split {members[0].split}: {members[0].key.images} images"]
    for member, result in zip(members, results):
        lines.append(f"{member.checkpoint}, {member.key.views} crop{'s' if member.key.views > 1 else ''}")
        lines += _figures(result) if result else ["no labels, so no errors were counted"]
        lines.append(f"{'saved in' if member.tested else 'no image was read: as saved in'} {member.folder}")
    if together:
        lines += [f"ensemble of {len(members)}, probabilities averaged", *_figures(together)]
    if args.submission is not None:
        lines.append(f"predictions in {args.submission}")
    return lines


def _figures(result: Result) -> list[str]:
    """Errors and loss, with their 95% intervals."""
    low, high = result.intervals()["loss"]
    return [*result.score.lines(), f"loss {result.score.loss:.4f}, 95% interval {low:.4f} to {high:.4f}"]


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
