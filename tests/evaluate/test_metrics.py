"""Metrics: ranks with ties, chance; intervals against the binomial distribution."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from train.evaluate.metrics import Score, label_ranks, loss_interval, share_interval


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
    assert not Score(45, 21, 0, 0.0, 3).at_chance and Score(45, 26, 0, 0.0, 3).at_chance  # 32.9% to 60.9%; 43.3% to 71.0%


@pytest.mark.parametrize("count, of", [(0, 300), (1, 300), (247, 300), (300, 300), (0, 1), (20_330, 50_000)])
def test_intervals_of_shares_are_wilsons(count: int, of: int) -> None:
    expected = binomtest(count, of).proportion_ci(0.95, method="wilson")
    low, high = share_interval(count / of, of)
    assert (low, high) == pytest.approx(tuple(expected), abs=1e-12) and 0 <= low <= count / of <= high <= 1 and low < high


@pytest.mark.parametrize("share", [0.001, 0.01, 0.4])
def test_intervals_hold_the_true_share_about_as_often_as_they_say(share: float) -> None:
    """Of 300 images; normal ones hold 0.001 in 26% of all draws."""
    counts = np.arange(301)
    holds = [low <= share <= high for low, high in (share_interval(count / 300, 300) for count in counts)]
    assert 0.93 < binom.pmf(counts, 300, share)[holds].sum() < 0.97


def test_the_interval_of_a_loss() -> None:
    losses = np.random.default_rng(0).exponential(2.0, 10_000)
    assert loss_interval(losses) == pytest.approx((losses.mean() - 0.0392, losses.mean() + 0.0392), abs=1e-3)
    assert loss_interval(np.array([0.0, 0.0, 9.0])) == (0.0, pytest.approx(7.8, abs=0.01))
