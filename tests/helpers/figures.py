"""Neighbours by brute force, boxes that must not overlap, the command tools.show."""

from __future__ import annotations

from typing import Any

import numpy as np

from tools.show.__main__ import main


def show(*words: object) -> int:
    """Exit code of `python -m tools.show`."""
    return main([str(word) for word in words])


def brute_force(queries: np.ndarray, ids: np.ndarray, rows: np.ndarray, count: int,
                own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours one query at a time, in float64."""
    found, squares = [], []
    for query, self_id in zip(queries.astype(np.float64), own):
        distances = ((rows.astype(np.float64) - query) ** 2).sum(1)
        order = [place for place in np.lexsort((ids, distances)) if ids[place] != self_id][:count]
        found.append(ids[order])
        squares.append(distances[order])
    return np.array(found), np.array(squares)


def check_apart(boxes: list[Any], whole: Any) -> None:
    """No two boxes overlap, and all lie in the whole."""
    for number, box in enumerate(boxes):
        assert box.x0 >= whole.x0 and box.y0 >= whole.y0 and box.x1 <= whole.x1 and box.y1 <= whole.y1
        for other in boxes[:number]:
            assert box.x0 >= other.x1 or other.x0 >= box.x1 or box.y0 >= other.y1 or other.y0 >= box.y1, (box, other)
