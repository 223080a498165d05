"""What a test found, for people and as JSON: counts, errors, loss, 95% intervals; an ensemble beside its members."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, Sequence

import numpy as np

from pipeline.index.sample_index import SampleIndex
from train.evaluate.ensemble import Result, alone, five_best, together
from train.evaluate.probabilities import Evaluation
from train.evaluate.metrics import CHANCE
from train.evaluate import submission


def report(members: Sequence[Evaluation], asked: argparse.Namespace) -> None:
    """Print what came of the members, and of their mean when there are several; write a submission when one is asked for.

    Raises:
        ValueError: they have no labels, or the submission cannot be made.
    """
    first = members[0]
    if not first.labelled and asked.submission is None:
        raise ValueError(f"split (={first.split}) of {first.index} has images without a label, so there is nothing to count; "
                         "write predictions with --submission, or choose a split with ground truth")
    text: dict[str, Any] = {"split": first.split, "images": first.facts.images, "members": [], "ensemble": None}
    results = [alone(member) for member in members] if first.labelled else []
    for place, member in enumerate(members):
        entry: dict[str, Any] = {"checkpoint": member.checkpoint, "split": member.split, "views": member.facts.views,
                                 "evaluation": str(member.folder) if member.folder else None, "tested": member.tested}
        if results:
            entry |= _figures(results[place])
            stored = together([member]).score
            entry["saved_alone"] = {"top1_errors": stored.top1_errors, "top5_errors": stored.top5_errors}
        text["members"].append(entry)
    if len(members) == 1:
        text = {**text["members"][0], **text}
    elif results:
        whole = together(members)
        scores = [result.score for result in results]
        best = min(range(len(scores)), key=lambda k: (scores[k].top1_errors, scores[k].top5_errors, scores[k].loss))
        text["ensemble"] = {**_figures(whole), "best_member": best, "less_best_member": {
            name: {"difference": value, "interval": limits} for name, (value, limits) in whole.less(results[best]).items()}}
        results.append(whole)
    if asked.submission is not None:
        _submit(members, asked)
        text["submission"] = str(asked.submission)
    if asked.json:
        print(json.dumps(text))
    else:
        print("\n".join(_lines(members, text)))
    for name, other in alike(members):
        _tell(f"members {name} and {other} gave the same probabilities to the bit; if they are one network, give it once")
    for name, result in zip([member.name for member in members] + ["ensemble"], results):
        if result.score.at_chance:
            _tell(CHANCE if len(members) == 1 else f"{name}: {CHANCE}")


def alike(members: Sequence[Evaluation]) -> list[tuple[str, str]]:
    """Names of members, by pairs, whose probabilities are the same to the bit: copies, or one network trained or exported twice.
    `check_alike` refuses the same checkpoint only."""
    return [(one.name, other.name) for place, other in enumerate(members) for one in members[:place]
            if one.facts.views == other.facts.views and np.array_equal(one.probabilities, other.probabilities)]


def _figures(result: Result) -> dict[str, Any]:
    return {**result.score.as_dict(), "intervals": result.intervals()}


def _lines(members: Sequence[Evaluation], text: dict[str, Any]) -> list[str]:
    """For people."""
    first = members[0]
    views = sorted({member.facts.views for member in members})
    lines = [first.checkpoint] if len(members) == 1 else []
    lines.append(f"split {first.split}: {first.facts.images} images, {' or '.join(map(str, views))} view"
                 f"{'s' if views != [1] else ''} each")
    for member, entry in zip(members, text["members"]):
        if len(members) > 1:
            lines.append(f"{member.name}" + (f", {member.facts.views} view{'s' if member.facts.views > 1 else ''}"
                                             if len(views) > 1 else ""))
        if not first.labelled:
            lines.append("no labels, so no errors were counted")
        else:
            lines += _errors(entry)
            for key in ("top1_errors", "top5_errors"):
                if entry[key] != entry["saved_alone"][key]:
                    lines.append(f"(its probabilities as they are saved, in float16, would give {entry['saved_alone'][key]} "
                                 f"{key[:3]}-{key[3]} errors)")
        if member.folder:
            lines.append(f"{'saved in' if member.tested else 'no image was read: as saved in'} {member.folder}")
    if text["ensemble"]:
        entry = text["ensemble"]
        lines.append(f"ensemble of {len(members)}, probabilities averaged")
        lines += _errors(entry)
        against = {name: (value["difference"], *value["interval"]) for name, value in entry["less_best_member"].items()}
        lines.append(f"against its best member, {members[entry['best_member']].name}: "
                     + ", ".join(f"{label} {100 * against[name][0]:+.2f} points ({100 * against[name][1]:+.2f} to "
                                 f"{100 * against[name][2]:+.2f})" for name, label in (("top1", "top-1"), ("top5", "top-5")))
                     + ", loss {:+.4f} ({:+.4f} to {:+.4f})".format(*against["loss"]))
    if "submission" in text:
        lines.append(f"predictions in {text['submission']}")
    return lines


def _errors(entry: dict[str, Any]) -> list[str]:
    """Three lines of counts and errors, with their 95% intervals."""
    limits = entry["intervals"]
    return [f"top-{k} errors {entry[f'top{k}_errors']} of {entry['images']} = {entry[f'top{k}']:.2%} "
            f"(95% interval {limits[f'top{k}'][0]:.2%} to {limits[f'top{k}'][1]:.2%})" for k in (1, 5)] + \
        [f"loss {entry['loss']:.4f} ({limits['loss'][0]:.4f} to {limits['loss'][1]:.4f})"]


def _submit(members: Sequence[Evaluation], asked: argparse.Namespace) -> None:
    """Write the predictions of the members' mean."""
    first = members[0]
    index = SampleIndex.load(asked.index or first.index, asked.archives)
    if index.split_sha256(first.split) != first.facts.test_images:
        raise ValueError(f"index (={index.path}) has other images in split {first.split} than were tested; give the index "
                         "of those with --index")
    ids = submission.challenge_ids(index, asked.devkit)
    submission.check_numbering(index, first.split, _tell)
    submission.write(asked.submission, index, first.split, first.images["id"], five_best(members, len(ids)), ids, _tell)


def _tell(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
