"""Exact nearest neighbours by Euclidean distance, over rows that pass by once, in blocks: features, or pixels.

Distances of a block to all queries come from one product of matrices, ‖a - b‖² = ‖a‖² - 2ab + ‖b‖², in float32. That cancels:
what is left of two large numbers may be wrong in its third digit. But by no more than a bound that is known, so every row that
may belong among a query's nearest is compared again, difference by difference in float64, and only those distances count. Of
equally near rows the one with the smaller id comes first.

Q queries, N rows in all, B of a block, D values of a row, k neighbours.
"""

from __future__ import annotations

import numpy as np
import torch

_UNIT = 2.0 ** -24  # relative rounding error of float32
_MOST = 1 << 24  # values of queries, and of distances, that are worked on at once
_EXACT = 1 << 19  # float64 values compared at once: they stay in a core's cache
NOBODY = np.iinfo(np.int64).max


class Nearest:
    """The k nearest rows of each query so far.

    Args:
        queries: (Q, D) float32, or uint8.
        count: k.
        own: (Q,) int64 id of each query among the rows, which is not its own neighbour; -1 where it is not among them.
        device: where the products are computed.

    Attributes:
        ids: (Q, k) int64, the nearest first; NOBODY where there are fewer rows.
        squares: (Q, k) float64 squared distances; infinite there.

    Raises:
        ValueError: k below 1, or queries and ids that do not fit.
    """

    def __init__(self, queries: np.ndarray, count: int, own: np.ndarray, device: torch.device = torch.device("cpu")) -> None:
        if count < 1:
            raise ValueError(f"neighbours (={count}) must be at least 1; the paper shows 6")
        if queries.ndim != 2 or own.shape != queries.shape[:1]:
            raise ValueError(f"queries (={queries.shape}) must be (Q, D), with {own.shape} ids of their own; give one for each")
        self._queries, self._own, self._device = queries, own, device
        self._lengths = np.sqrt(_squares(queries))
        self.ids = np.full((len(queries), count), NOBODY, np.int64)
        self.squares = np.full((len(queries), count), np.inf)

    def add(self, ids: np.ndarray, rows: np.ndarray) -> None:
        """Let a block of rows pass by. ids: (B,) int64, none of them seen before; rows: (B, D), of the queries' type."""
        if len(ids) == 0:
            return
        if rows.shape != (len(ids), self._queries.shape[1]) or rows.dtype != self._queries.dtype:
            raise ValueError(f"rows (={rows.shape} {rows.dtype}) must be ({len(ids)}, {self._queries.shape[1]}) "
                             f"{self._queries.dtype}, as the queries; give features of the same network")
        block, norms = self._on_device(rows), _squares(rows)
        at_once = max(1, min(_MOST // self._queries.shape[1], _MOST // len(ids)))
        for first in range(0, len(self._queries), at_once):
            some = slice(first, first + at_once)
            self._merge(some, ids, rows, *self._near(some, ids, block, norms))

    def _near(self, some: slice, ids: np.ndarray, block: torch.Tensor, norms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(query, place in the block) of all pairs that may be among the nearest, queries counted from `some`'s first."""
        count, lengths = self.ids.shape[1], self._lengths[some]
        # ‖a‖² is the same for all rows of a query, so it is left out: what is compared is ‖b‖² - 2ab.
        found = torch.addmm(torch.from_numpy(norms.astype(np.float32)).to(block.device), self._on_device(self._queries[some]),
                            block.T, alpha=-2)
        # γ_D ‖a‖‖b‖ for a product of D values added up in any order (Higham, Accuracy and Stability, §3.1), and the roundings of
        # the norm and of the difference.
        width, longest = self._queries.shape[1], float(np.sqrt(norms.max()))
        error = _UNIT / (1 - width * _UNIT) * (2 * (width + 2) * lengths * longest + 3 * longest ** 2)
        limit = self.squares[some, -1] - lengths ** 2
        if found.shape[1] > count:  # one more than k: a query may itself be among the rows
            nearest = found.topk(count + 1, largest=False).values[:, -1].double().cpu().numpy()
            limit = np.minimum(limit, nearest + error)
        # What float64 rounds in norms and distances is much less than 2^-29; nextafter is for the limit's own float32.
        limit = limit + error + 2.0 ** -29 * (lengths ** 2 + longest ** 2)
        limits = torch.from_numpy(np.nextafter(limit.astype(np.float32), np.float32(np.inf))).to(found.device)
        queries, places = (found <= limits[:, None]).nonzero().cpu().numpy().T
        others = ids[places] != self._own[some][queries]
        return queries[others], places[others]

    def _merge(self, some: slice, ids: np.ndarray, rows: np.ndarray, queries: np.ndarray, places: np.ndarray) -> None:
        """Compare pairs exactly and keep the k nearest of each query."""
        exact, step = np.empty(len(queries)), max(1, _EXACT // rows.shape[1])
        mine = self._queries[some]
        for first in range(0, len(queries), step):
            part = slice(first, first + step)
            difference = np.subtract(mine[queries[part]], rows[places[part]], dtype=np.float64)
            exact[part] = np.einsum("ij,ij->i", difference, difference)
        held, count = self.ids[some].shape
        who = np.concatenate([np.repeat(np.arange(held), count), queries])
        squares = np.concatenate([self.squares[some].ravel(), exact])
        named = np.concatenate([self.ids[some].ravel(), ids[places]])
        order = np.lexsort((named, squares, who))
        who = who[order]
        kept = order[np.arange(len(who)) - np.searchsorted(who, who) < count]
        self.squares[some], self.ids[some] = squares[kept].reshape(held, count), named[kept].reshape(held, count)

    def _on_device(self, rows: np.ndarray) -> torch.Tensor:
        """float32 on the device; bytes less 128, which changes no distance and makes norms, and so the error, small."""
        found = torch.from_numpy(np.ascontiguousarray(rows)).to(self._device)
        return found.float().sub_(128) if rows.dtype == np.uint8 else found


def _squares(rows: np.ndarray) -> np.ndarray:
    """(N,) float64 ‖row‖² of (N, D), of bytes less 128."""
    found = np.empty(len(rows))
    step = max(1, _EXACT // rows.shape[1])
    for first in range(0, len(rows), step):
        part = rows[first:first + step].astype(np.float64)
        if rows.dtype == np.uint8:
            part -= 128
        found[first:first + step] = np.einsum("ij,ij->i", part, part)
    return found


def agreement(labels: np.ndarray, neighbours: np.ndarray) -> tuple[float, float]:
    """Precision at k: the mean share of a query's neighbours that are of its class, and the standard error of that mean.

    Args:
        labels: (Q,) of the queries.
        neighbours: (Q, k) labels of their neighbours.
    """
    shares = (neighbours == labels[:, None]).mean(1)
    return float(shares.mean()), float(shares.std(ddof=1) / np.sqrt(len(shares))) if len(shares) > 1 else float("nan")
