"""Decoded squares in memory: `Store`, base class of the caches, and `Layout`, how a square lies in a row, RGB or 4:2:0 planes.

A *packed crop* is what a crop needs of a square and nothing else, the same number of bytes wherever the crop lies: what travels
between devices. On a CPU squares are NumPy arrays, handled one by one by whatever thread wants one; on a GPU torch tensors,
handled together. B samples, N rows of a store (row p is the split's p-th id), S side of a square, c side of a crop."""
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.resident import yuv420 as yuv

KINDS = ("rgb", "yuv420")
Bytes = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int64]  # rows of a store
Crops = tuple[Rows, Rows, Rows]  # rows of the store, top and left of their crops; (B,) each


@dataclass(frozen=True)
class Layout:
    """The layout of a store's rows. Raises ValueError for another kind."""
    kind: str  # rgb, three planes of S² bytes; or yuv420, see `pipeline.resident.yuv420`: half as many
    square_px: int  # S
    crop_px: int  # c, at most S

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"data.resident (={self.kind}) must be one of {', '.join(KINDS)}; correct the recipe")

    @property
    def row_bytes(self) -> int:
        return 3 * self.square_px ** 2 if self.kind == "rgb" else yuv.row_bytes(self.square_px)

    @property
    def packed_bytes(self) -> int:
        return self.crop_px ** 2 * 3 if self.kind == "rgb" else self.crop_px ** 2 + 2 * yuv.window_px(self.crop_px) ** 2

    def encode(self, square: Bytes) -> Bytes:
        """(S, S, 3) uint8 → a row (row_bytes,) uint8."""
        planar = np.ascontiguousarray(square.transpose(2, 0, 1))
        return planar.reshape(-1) if self.kind == "rgb" else yuv.encode(planar)

    def encode_all(self, squares: Tensor) -> Tensor:
        """(B, S, S, 3) uint8 → rows (B, row_bytes) uint8, on the same device; the bits of `encode`."""
        planar = squares.permute(0, 3, 1, 2)
        return planar.contiguous().flatten(1) if self.kind == "rgb" else yuv.encode(planar)

    def crop(self, row: Bytes, top: int, left: int) -> Bytes:
        """RGB (3, c, c) uint8 of a row (row_bytes,): a view where the row is RGB."""
        if self.kind == "yuv420":
            return yuv.crop(row, self.square_px, top, left, self.crop_px)
        return row.reshape(3, self.square_px, self.square_px)[:, top:top + self.crop_px, left:left + self.crop_px]

    def pack(self, row: Bytes, top: int, left: int, packed: Bytes) -> None:
        """Write what a crop needs of a row (row_bytes,) into `packed` (packed_bytes,)."""
        if self.kind == "rgb":
            packed.reshape(3, self.crop_px, self.crop_px)[...] = self.crop(row, top, left)
            return
        y, chroma = yuv.planes(row, self.square_px)
        size, side = self.crop_px, yuv.window_px(self.crop_px)
        packed[:size ** 2].reshape(size, size)[...] = y[top:top + size, left:left + size]
        packed[size ** 2:].reshape(2, side, side)[...] = yuv.window(chroma, top, left, size)

    def pack_all(self, rows: Tensor, which: Tensor, top: Tensor, left: Tensor) -> Tensor:
        """Packed crops (B, packed_bytes) uint8 of rows `which` of (N, row_bytes) at (top, left), all (B,) int64; any device."""
        if self.kind == "rgb":
            return cut(rows.view(-1, 3, self.square_px, self.square_px), which, top, left, self.crop_px).flatten(1)
        y, chroma = yuv.planes(rows, self.square_px)
        packed = rows.new_empty(len(which), self.packed_bytes)
        packed_y, packed_chroma = self._planes(packed)
        packed_y.copy_(cut(y.unsqueeze(1), which, top, left, self.crop_px).squeeze(1))
        packed_chroma.copy_(yuv.windows(chroma, which, top, left, self.crop_px))
        return packed

    def unpack(self, packed: Tensor, top: Tensor, left: Tensor) -> Tensor:
        """RGB (B, 3, c, c) uint8 of packed crops (B, packed_bytes) at (top, left), (B,) int64: the bits of `crop`, anywhere."""
        if self.kind == "rgb":
            return packed.view(-1, 3, self.crop_px, self.crop_px)
        y, chroma = self._planes(packed)
        added = cut(yuv.addends(chroma), torch.arange(len(top), device=top.device), top % 2, left % 2, self.crop_px)
        return yuv.merge(y, added)

    def restored(self, squares: Tensor) -> Tensor:
        """RGB (B, 3, S, S) uint8 as it would come out of a store, of squares (B, S, S, 3) uint8, where c is S."""
        which = torch.arange(len(squares), device=squares.device)
        corner = torch.zeros_like(which)
        return self.unpack(self.pack_all(self.encode_all(squares), which, corner, corner), corner, corner)

    def _planes(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        size, side = self.crop_px, yuv.window_px(self.crop_px)
        return packed[..., :size ** 2].unflatten(-1, (size, size)), packed[..., size ** 2:].unflatten(-1, (2, side, side))


def cut(pixels: Tensor, which: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """(B, C, size, size): of each sample's row `which` of (N, C, H, W) the crop at (top, left); all (B,) int64 on the device."""
    if pixels.shape[2:] == (size, size):  # there is one place only, and whole rows are copied many times faster
        return pixels[which]
    windows = pixels.unfold(2, size, 1).unfold(3, size, 1)  # (N, C, places down, places across, size, size), a view
    return windows[which, :, top, left]


class Store(ABC):
    """Decoded squares in memory: `RamStore`, shared by the processes of a node, or `GpuStore`, spread over them. What is written
    out here is for a store of which every process has all rows."""
    layout: Layout
    note = ""  # what a person should know
    have: Bytes  # (N,) 1 where a row is known to be filled, whoever holds it; of a GpuStore the same in every process
    stored: Bytes  # (N,) 1 where this process knows that a row is filled, whether or not the others do
    rank = 0  # of this process among those that call `crops` together
    exchanges = False  # whether processes exchange crops, so that all must take the same batches at the same time

    def owned(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Which of these rows this process may fill."""
        return np.ones(len(rows), bool)

    def shards(self, shard: tuple[int, int]) -> list[tuple[int, int]]:
        """The shards, by rank, of the processes that call `crops` together; this one's is `shard`. Called once."""
        return [shard]

    def agree(self, rows: Rows, failed: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Which of the rows failed, (B,) bool, in any process that calls `crops` with this one: all ask for the same rows, and
        have filled their own or flag them in `failed`. From then on `have` knows the others."""
        return failed

    @abstractmethod
    def put(self, rows: Rows, squares: Tensor) -> None:
        """Fill rows (B,) from squares (B, S, S, 3) uint8. Raises RuntimeError when they cannot be written."""

    @abstractmethod
    def crops(self, wanted: Sequence[Crops]) -> Tensor | Sequence[Tensor]:
        """RGB crops for this process, (B, 3, c, c) uint8 on its device, or B views (3, c, c) uint8 made when asked for. `wanted`:
        the crops of each process, by rank; the same in all of them."""

    def seal(self) -> None:
        """There is nothing left to fill."""

    def close(self) -> None:
        """Finish what is under way; the squares stay."""
