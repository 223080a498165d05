"""Ensembles: averages against a plain loop, ties, order; what may be averaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from train.evaluate.ensemble import check_compatible, ensemble_result, five_best, member_result
from train.evaluate.predict import image_rows
from train.evaluate.predictions import Evaluation, Key

KEY = Key("a" * 64, "i" * 64, "c" * 64, 3000, 12, 1, "fp32")


def evaluation(probabilities: np.ndarray, labels: np.ndarray, letter: str = "a") -> Evaluation:
    images, halves = image_rows(np.arange(len(labels)), torch.from_numpy(labels), torch.from_numpy(probabilities))
    key = replace(KEY, checkpoint=letter * 64, images=len(labels), outputs=probabilities.shape[1])
    return Evaluation(f"runs/{letter}/checkpoints/last", "val", "indexes/x", key, images, halves, Path("x"), len(labels))


def drawn(count: int = 3000, classes: int = 12, members: int = 3) -> tuple[list[Evaluation], np.ndarray, list[np.ndarray]]:
    """Members with some skill and many equal probabilities."""
    random = np.random.default_rng(0)
    labels = random.integers(0, classes, count)
    tables = []
    for _ in range(members):
        scores = random.integers(0, 4, (count, classes)).astype(np.float64)
        scores[np.arange(count), labels] += random.integers(0, 3, count)
        tables.append(np.exp(scores) / np.exp(scores).sum(1, keepdims=True))
    return [evaluation(table, labels, letter) for table, letter in zip(tables, "abcdefg")], labels, tables


def test_an_ensemble_against_a_plain_loop() -> None:
    members, labels, tables = drawn()
    found = ensemble_result(members)
    best = five_best(members, 12)
    for row in range(len(labels)):
        total = [sum(int(float(member.probabilities[row, k]) * 2 ** 24) for member in members) for k in range(12)]  # exact
        order = sorted(range(12), key=lambda k: (-total[k], k))
        assert found.ranks[row] == order.index(labels[row]) and best[row].tolist() == order[:5], row
        assert found.probabilities[row] == pytest.approx(np.mean([table[row, labels[row]] for table in tables]), rel=1e-15)
    score = found.score
    assert 0 < score.top5_errors < score.top1_errors < min(member_result(member).score.top1_errors for member in members)
    assert score.loss == pytest.approx(-np.log(np.mean([t[np.arange(3000), labels] for t in tables], 0)).mean(), rel=1e-12)


def test_order_changes_no_bit_and_one_is_itself() -> None:
    members, _, _ = drawn(members=5)
    one, other = ensemble_result(members), ensemble_result(members[::-1])
    assert np.array_equal(one.ranks, other.ranks) and np.array_equal(one.probabilities, other.probabilities)
    assert ensemble_result(members[:1]).score == member_result(members[0]).score


def test_float16_merges_neighbours_and_the_counts_of_one_network_are_still_exact() -> None:
    labels = np.array([1, 1])
    table = np.array([[0.5 - 1e-5, 0.5 + 1e-5, 0.0], [0.5, 0.5, 0.0]])
    member = evaluation(table, labels)
    assert member_result(member).ranks.tolist() == [0, 1] and ensemble_result([member]).ranks.tolist() == [1, 1]


def test_a_label_that_float16_has_lost_still_has_its_loss() -> None:
    member = evaluation(np.array([[1 - 1e-20, 1e-20]]), np.array([1]))
    assert member.probabilities[0, 1] == 0 and ensemble_result([member, member]).score.loss == pytest.approx(46.05, abs=0.01)


def test_intervals_of_an_ensemble_hold_its_score() -> None:
    whole = ensemble_result(drawn()[0])
    for name, (low, high) in whole.intervals().items():
        assert low < getattr(whole.score, name) < high, name


def test_what_cannot_be_averaged_is_named() -> None:
    a, b = drawn()[0][:2]
    check_compatible([a, b])
    for change, message in [({"test_images": "j" * 64}, r"test images \(=jjjj.*\) of b/last must be those of a/last \(=iiii"),
                            ({"classes": "d" * 64}, r"classes \(=dddd.*\) of b/last must be those of a/last .*mean diff"),
                            ({"outputs": 13}, r"outputs \(=13\) of b/last must be those of a/last \(=12\) to be averaged"),
                            ({"checkpoint": "a" * 64}, r"member \(=b/last\) is given twice, also as a/last; give each network")]:
        with pytest.raises(ValueError, match=message):
            check_compatible([a, replace(b, key=replace(b.key, **change))])
    check_compatible([a, replace(a, key=replace(a.key, views=10))])
