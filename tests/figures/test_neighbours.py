"""Nearest neighbours: exact against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers.figures import brute_force
from train.figures.neighbours import nearest


def searched(queries: np.ndarray, ids: np.ndarray, rows: np.ndarray, count: int, own: np.ndarray,
             block: int) -> tuple[np.ndarray, np.ndarray]:
    return nearest(queries, own, count, ((ids[first:first + block], rows[first:first + block])
                                         for first in range(0, len(ids), block)))


@pytest.mark.parametrize("kind", ["float", "bytes"])
@pytest.mark.parametrize("block", [1, 64, 1000])
def test_search_equals_brute_force(kind: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(block)
    monkeypatch.setattr("train.figures.neighbours._MOST", 1 << 11)  # several groups of queries
    draw = random.integers(0, 256, (340, 48), np.uint8)
    if kind == "float":
        draw = random.standard_normal((340, 48)).astype(np.float32)
    rows, ids = draw[:300], np.sort(random.permutation(1000)[:300]).astype(np.int64)
    queries = np.concatenate([draw[300:], rows[:20]])
    own = np.concatenate([np.full(40, -1), ids[:20]])
    found, squares = searched(queries, ids, rows, 6, own, block)
    wanted = brute_force(queries, ids, rows, 6, own)
    np.testing.assert_array_equal(found, wanted[0])
    np.testing.assert_allclose(squares, wanted[1], rtol=1e-9)
    assert not (found[40:] == ids[:20, None]).any()


def test_what_float32_cancels_is_compared_exactly() -> None:
    """Far from the origin the formula alone gives other neighbours; the search does not."""
    random = np.random.default_rng(0)
    rows = (1000 + 0.01 * random.standard_normal((500, 64))).astype(np.float32)
    queries = (1000 + 0.01 * random.standard_normal((20, 64))).astype(np.float32)
    ids, own = np.arange(500), np.full(20, -1)
    a, b = torch.from_numpy(queries), torch.from_numpy(rows)
    formula = (a.square().sum(1)[:, None] - 2 * a @ b.T + b.square().sum(1)).topk(6, largest=False).indices.numpy()
    wanted, exact = brute_force(queries, ids, rows, 6, own)
    assert (formula != wanted).any(1).mean() > 0.9, "the test would not see cancellation"
    found, squares = searched(queries, ids, rows, 6, own, 128)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_allclose(squares, exact, rtol=1e-5)


@pytest.mark.parametrize("block", [3, 50])
def test_of_equally_near_rows_the_smaller_id_comes_first(block: int) -> None:
    rows = np.tile(np.random.default_rng(1).integers(0, 256, (5, 33), np.uint8), (10, 1))  # each ten times
    ids, own = np.arange(50), np.arange(5)
    found, squares = searched(rows[:5], ids, rows, 6, own, block)
    for query in range(5):
        assert found[query].tolist() == [query + 5 * twin for twin in range(1, 7)]
        assert (squares[query] == 0).all()


def test_few_rows_leave_ranks_empty() -> None:
    rows = np.eye(2, 3, dtype=np.float32)
    found, squares = searched(np.zeros((2, 3), np.float32), np.array([4, 9]), rows, 3, np.array([-1, 9]), 2)
    assert found.tolist() == [[4, 9, -1], [4, -1, -1]]
    assert squares.tolist() == [[1, 1, np.inf], [1, np.inf, np.inf]]
