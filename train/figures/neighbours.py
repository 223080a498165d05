"""Exact nearest neighbours by Euclidean distance, over rows that pass by once, in blocks: features, or pixels.

Distances of a block to all queries come from one product of matrices, ‖a - b‖² = ‖a‖² - 2ab + ‖b‖², in float32. That cancels:
what is left of two large numbers may be wrong in its third digit. But by no more than a known bound, so every row that may belong
among a query's nearest is compared again, difference by difference in float64, and only those distances count. Of equally near
rows the one with the smaller id comes first.

Q queries, N rows in all, B of a block, D values of a row, k neighbours.
"""

from __future__ import annotations

import numpy as np
import torch

_UNIT = 2.0 ** -24  # relative rounding error of float32
_MOST = 1 << 24  # values of queries, and of distances, that are worked on at once
_EXACT = 1 << 19  # float64 values compared at once: they stay in a core's cache
NO_ID = np.iinfo(np.int64).max


class NearestNeighbours:
    """The k nearest rows of each query so far.

    Args:
        queries: (Q, D) float32, or uint8.
        count: k.
        own_ids: (Q,) int64 id of each query among the rows, which is not its own neighbour; -1 where it is not among them.
        device: where the products are computed.

    Attributes:
        ids: (Q, k) int64, the nearest first; NO_ID where there are fewer rows.
        squares: (Q, k) float64 squared distances; infinite there.

    Raises:
        ValueError: k below 1, or queries and ids that do not fit.
    """

    def __init__(self, queries: np.ndarray, count: int, own_ids: np.ndarray,
                 device: torch.device = torch.device("cpu")) -> None:
        if count < 1:
            raise ValueError(f"neighbours (={count}) must be at least 1; the paper shows 6")
        if queries.ndim != 2 or own_ids.shape != queries.shape[:1]:
            raise ValueError(f"queries (={queries.shape}) must be (Q, D), with {own_ids.shape} ids of their own; give one for "
                             "each")
        self._queries, self._own_ids, self._device = queries, own_ids, device
        self._norms = np.sqrt(_squared_norms(queries))
        self.ids = np.full((len(queries), count), NO_ID, np.int64)
        self.squares = np.full((len(queries), count), np.inf)

    def add(self, ids: np.ndarray, rows: np.ndarray) -> None:
        """Compare a block of rows with all queries. ids: (B,) int64, none seen before; rows: (B, D), of the queries' type."""
        if len(ids) == 0:
            return
        if rows.shape != (len(ids), self._queries.shape[1]) or rows.dtype != self._queries.dtype:
            raise ValueError(f"rows (={rows.shape} {rows.dtype}) must be ({len(ids)}, {self._queries.shape[1]}) "
                             f"{self._queries.dtype}, as the queries; give features of the same network")
        block, squared_norms = self._on_device(rows), _squared_norms(rows)
        at_once = max(1, min(_MOST // self._queries.shape[1], _MOST // len(ids)))
        for first in range(0, len(self._queries), at_once):
            part = slice(first, first + at_once)
            self._merge(part, ids, rows, *self._candidates(part, ids, block, squared_norms))

    def _candidates(self, part: slice, ids: np.ndarray, block: torch.Tensor,
                    squared_norms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(query, row of the block) of all pairs that may be among the nearest, queries counted from `part`'s first."""
        count, norms = self.ids.shape[1], self._norms[part]
        # ‖a‖² is the same for all rows of a query, so it is left out: what is compared is ‖b‖² - 2ab.
        distances = torch.addmm(torch.from_numpy(squared_norms.astype(np.float32)).to(block.device),
                                self._on_device(self._queries[part]), block.T, alpha=-2)
        # γ_D ‖a‖‖b‖ for a product of D values added up in any order (Higham, Accuracy and Stability, §3.1), and the roundings of
        # the norm and of the difference.
        width, longest = self._queries.shape[1], float(np.sqrt(squared_norms.max()))
        error = _UNIT / (1 - width * _UNIT) * (2 * (width + 2) * norms * longest + 3 * longest ** 2)
        limit = self.squares[part, -1] - norms ** 2
        if distances.shape[1] > count:  # one more than k: a query may itself be among the rows
            nearest = distances.topk(count + 1, largest=False).values[:, -1].double().cpu().numpy()
            limit = np.minimum(limit, nearest + error)
        # What float64 rounds in norms and distances is much less than 2^-29; nextafter is for the limit's own float32.
        limit = limit + error + 2.0 ** -29 * (norms ** 2 + longest ** 2)
        limits = torch.from_numpy(np.nextafter(limit.astype(np.float32), np.float32(np.inf))).to(distances.device)
        queries, rows = (distances <= limits[:, None]).nonzero().cpu().numpy().T
        others = ids[rows] != self._own_ids[part][queries]
        return queries[others], rows[others]

    def _merge(self, part: slice, ids: np.ndarray, rows: np.ndarray, of_query: np.ndarray, of_row: np.ndarray) -> None:
        """Compare pairs exactly and keep the k nearest of each query."""
        exact, step = np.empty(len(of_query)), max(1, _EXACT // rows.shape[1])
        queries = self._queries[part]
        for first in range(0, len(of_query), step):
            pairs = slice(first, first + step)
            difference = np.subtract(queries[of_query[pairs]], rows[of_row[pairs]], dtype=np.float64)
            exact[pairs] = np.einsum("ij,ij->i", difference, difference)
        total, count = self.ids[part].shape
        query = np.concatenate([np.repeat(np.arange(total), count), of_query])
        squares = np.concatenate([self.squares[part].ravel(), exact])
        neighbour = np.concatenate([self.ids[part].ravel(), ids[of_row]])
        order = np.lexsort((neighbour, squares, query))
        query = query[order]
        kept = order[np.arange(len(query)) - np.searchsorted(query, query) < count]
        self.squares[part], self.ids[part] = squares[kept].reshape(total, count), neighbour[kept].reshape(total, count)

    def _on_device(self, rows: np.ndarray) -> torch.Tensor:
        """float32 on the device; bytes less 128, which changes no distance and makes norms, and so the error, small."""
        values = torch.from_numpy(np.ascontiguousarray(rows)).to(self._device)
        return values.float().sub_(128) if rows.dtype == np.uint8 else values


def _squared_norms(rows: np.ndarray) -> np.ndarray:
    """(N,) float64 ‖row‖² of (N, D), of bytes less 128."""
    squared = np.empty(len(rows))
    step = max(1, _EXACT // rows.shape[1])
    for first in range(0, len(rows), step):
        part = rows[first:first + step].astype(np.float64)
        if rows.dtype == np.uint8:
            part -= 128
        squared[first:first + step] = np.einsum("ij,ij->i", part, part)
    return squared
