"""Nearest neighbours: exact against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers.figures import brute_force
from train.figures.neighbours import NO_ID, NearestNeighbours


def searched(queries: np.ndarray, ids: np.ndarray, rows: np.ndarray, count: int, own: np.ndarray,
             block: int) -> NearestNeighbours:
    nearest = NearestNeighbours(queries, count, own)
    for first in range(0, len(ids), block):
        nearest.add(ids[first:first + block], rows[first:first + block])
    return nearest


@pytest.mark.parametrize("kind", ["float", "bytes"])
@pytest.mark.parametrize("block", [1, 64, 1000])
def test_search_equals_brute_force(kind: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(block)
    monkeypatch.setattr("train.figures.neighbours._MOST", 1 << 11)  # several groups of queries
    monkeypatch.setattr("train.figures.neighbours._EXACT", 1 << 9)
    draw = random.integers(0, 256, (340, 48), np.uint8)
    if kind == "float":
        draw = random.standard_normal((340, 48)).astype(np.float32)
    rows, ids = draw[:300], random.permutation(1000)[:300].astype(np.int64)
    queries = np.concatenate([draw[300:], rows[:20]])
    own = np.concatenate([np.full(40, -1), ids[:20]])
    nearest = searched(queries, ids, rows, 6, own, block)
    wanted = brute_force(queries, ids, rows, 6, own)
    np.testing.assert_array_equal(nearest.ids, wanted[0])
    np.testing.assert_allclose(nearest.squares, wanted[1], rtol=1e-12)
    assert not (nearest.ids[40:] == ids[:20, None]).any()


def test_what_float32_cancels_is_compared_exactly() -> None:
    """Far from the origin the formula alone gives other neighbours; the search does not."""
    random = np.random.default_rng(0)
    rows = (1000 + 0.01 * random.standard_normal((500, 64))).astype(np.float32)
    queries = (1000 + 0.01 * random.standard_normal((20, 64))).astype(np.float32)
    ids, own = np.arange(500), np.full(20, -1)
    a, b = torch.from_numpy(queries), torch.from_numpy(rows)
    formula = (a.square().sum(1)[:, None] - 2 * a @ b.T + b.square().sum(1)).topk(6, largest=False).indices.numpy()
    wanted, squares = brute_force(queries, ids, rows, 6, own)
    assert (formula != wanted).any(1).mean() > 0.9, "the test would not see cancellation"
    nearest = searched(queries, ids, rows, 6, own, 128)
    np.testing.assert_array_equal(nearest.ids, wanted)
    np.testing.assert_allclose(nearest.squares, squares, rtol=1e-9)


@pytest.mark.parametrize("block", [3, 50])
def test_of_equally_near_rows_the_smaller_id_comes_first(block: int) -> None:
    rows = np.repeat(np.random.default_rng(1).standard_normal((5, 33)).astype(np.float32), 10, axis=0)  # each ten times
    ids = np.random.default_rng(2).permutation(50).astype(np.int64)
    own = ids[:50:10].copy()
    nearest = searched(rows[:50:10], ids, rows, 6, own, block)
    for query in range(5):
        twins = sorted(set(ids[query * 10:query * 10 + 10].tolist()) - {int(own[query])})
        assert nearest.ids[query].tolist() == twins[:6] and (nearest.squares[query] == 0).all()


def test_few_rows_leave_ranks_empty() -> None:
    nearest = searched(np.zeros((2, 3), np.float32), np.array([4, 9]), np.eye(2, 3, dtype=np.float32), 3, np.array([-1, 9]), 2)
    assert nearest.ids.tolist() == [[4, 9, NO_ID], [4, NO_ID, NO_ID]]
    assert nearest.squares.tolist() == [[1, 1, np.inf], [1, np.inf, np.inf]]


def test_search_refuses_what_does_not_fit() -> None:
    queries = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"neighbours \(=0\) must be at least 1; the paper shows 6"):
        NearestNeighbours(queries, 0, np.full(2, -1))
    with pytest.raises(ValueError, match=r"queries \(=\(2, 3\)\) must be \(Q, D\), with \(3,\) ids"):
        NearestNeighbours(queries, 1, np.full(3, -1))
    for rows in np.zeros((1, 4), np.float32), np.zeros((1, 3), np.uint8):
        with pytest.raises(ValueError, match=r"rows \(=.*\) must be \(1, 3\) float32, as the queries; give features of"):
            NearestNeighbours(queries, 1, np.full(2, -1)).add(np.array([0]), rows)
