"""`Store`: protocol of a cache of decoded squares in memory; row p is the split's p-th id. N rows, B samples of a batch."""
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipeline.resident.layout import Layout

Rows = npt.NDArray[np.int64]  # rows of a store
Crops = tuple[Rows, Rows, Rows]  # rows of the store, top and left of their crops; (B,) each


class Store(Protocol):
    """Decoded squares in memory: `RamStore`, shared by the processes of a node, or `GpuStore`, spread over them.

    Attributes:
        layout: how a square lies in its row.
        note: what a person should know; mostly nothing.
        have: (N,) uint8, 1 where a row is known to be filled, whoever holds it; of a GpuStore the same in every process.
        stored: (N,) uint8, 1 where this process knows that a row is filled, whether or not the others do.
        rank: of this process among those that call `crops` together.
        exchanges: whether the processes exchange crops, so that all must take the same batches at the same time.
    """
    layout: Layout
    note: str
    have: npt.NDArray[np.uint8]
    stored: npt.NDArray[np.uint8]
    rank: int
    exchanges: bool

    def owned(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Which of these rows this process may fill."""

    def share(self, shard: tuple[int, int]) -> tuple[int, int]:
        """(k, n): when it is filled beforehand, the process with this `shard` of the batches fills the k-th of n parts."""

    def shards(self, shard: tuple[int, int]) -> list[tuple[int, int]]:
        """The shards, by rank, of the processes that call `crops` together; this one's is `shard`. Called once."""

    def put(self, rows: Rows, squares: Tensor) -> None:
        """Fill rows (B,) from squares (B, S, S, 3) uint8. Raises RuntimeError when they cannot be written."""

    def agree(self, rows: Rows, failed: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Which of the rows failed, (B,) bool, in any process: all ask for the same rows, and have filled their own or flag them
        in `failed`. From then on `have` knows the others."""

    def crops(self, wanted: Sequence[Crops]) -> Tensor | Sequence[Tensor]:
        """RGB crops for this process, (B, 3, c, c) uint8 on its device, or B views (3, c, c) uint8 made when asked for. `wanted`:
        the crops of each process, by rank; the same in all of them."""

    def seal(self) -> None:
        """There is nothing left to fill."""

    def close(self) -> None:
        """Finish what is under way; the squares stay."""
