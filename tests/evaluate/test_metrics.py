"""Metrics: ranks with ties, chance; intervals against the binomial distribution."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from train.evaluate.metrics import Score, label_ranks, mean_interval


def test_ranks_by_hand() -> None:
    probabilities = np.array([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.2, 0.2, 0.6], [1 / 3] * 3])
    assert label_ranks(probabilities, np.array([0, 2, 0, 1, 2])).tolist() == [0, 2, 1, 2, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_ranks_refuse_what_is_not_finite(bad: float) -> None:
    with pytest.raises(RuntimeError, match=r"probabilities .* must be finite; the weights are damaged"):
        label_ranks(np.array([[0.5, bad]]), np.array([1]))


def test_labels_in_another_order_are_at_chance() -> None:
    """A perfect network, and the same with the labels permuted as a wrong ILSVRC2012_ID map would."""
    labels = np.arange(50_000) % 1000
    permuted = np.random.default_rng(0).permutation(1000)[labels]
    assert not Score(50_000, 0, 0, 0.0, 1000).at_chance
    assert Score(50_000, int((labels != permuted).sum()), 0, 0.0, 1000).at_chance
    assert not Score(50_000, 49_800, 0, 0.0, 1000).at_chance  # 0.4% right, where chance is 0.1%


@pytest.mark.parametrize("share", [0.01, 0.4, 0.9])
def test_intervals_of_errors_are_nearly_binomial(share: float) -> None:
    wrong = (np.arange(50_000) < round(share * 50_000)).astype(np.int64)
    expected = binom.ppf([0.025, 0.975], 50_000, share) / 50_000
    assert mean_interval(wrong) == pytest.approx(tuple(expected), abs=2e-5)


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert mean_interval(np.full(7, 2.5)) == (2.5, 2.5)
