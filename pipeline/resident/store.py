"""Decoded squares in memory: `Store`, base class of the caches, and `Layout`, how a square lies in a row, RGB or 4:2:0 planes.

On a CPU squares are NumPy arrays, handled one by one by whatever thread wants one; on a GPU torch tensors, handled together.
*Packed crops* are what crops need of their squares and nothing else, the same number of bytes wherever they lie: what travels
between devices. B samples, N rows of a store (row p is the split's p-th id), S side of a square, c side of a crop, P planes of
brightness: 3 (rgb) or 1 (yuv420)."""
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.decoding.transfer import to_device
from pipeline.resident import yuv420 as yuv

KINDS = ("rgb", "yuv420")
Bytes = npt.NDArray[np.uint8]
Marks = npt.NDArray[np.unsignedinteger]
Rows = npt.NDArray[np.int64]  # rows of a store
Crops = tuple[Rows, Rows, Rows]  # rows of the store, top and left of their crops; (B,) each


class Planes(NamedTuple):
    """Squares, or packed crops, on a device: uint8 planes, views of whatever holds them."""
    light: Tensor  # (M, P, S, S) of squares, (M, P, c, c) of packed crops
    chroma: Tensor | None  # yuv420: (M, 2, s, s) of squares, (M, 2, k, k) of packed crops, see `yuv420.kept_px`


class Located(NamedTuple):
    """Crops where they lie on a device: squares to cut them from, or packed."""
    planes: Planes
    rows: Rows  # (B,) which of the planes
    top: Rows  # (B,) place of the crop in its square, also of a packed one
    left: Rows  # (B,)


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
        return self.crop_px ** 2 * 3 if self.kind == "rgb" else self.crop_px ** 2 + 2 * self._kept_px ** 2

    @property
    def _kept_px(self) -> int:
        return yuv.kept_px(self.square_px, self.crop_px)

    @property
    def _count(self) -> int:
        return 3 if self.kind == "rgb" else 1

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

    def planes(self, rows: Tensor) -> Planes:
        """Views of squares, rows (N, row_bytes) uint8."""
        return self._split(rows, self.square_px, (self.square_px + 1) // 2)

    def packed(self, rows: Tensor) -> Planes:
        """Views of packed crops, rows (B, packed_bytes) uint8."""
        return self._split(rows, self.crop_px, self._kept_px)

    def _split(self, rows: Tensor, side: int, chroma_side: int) -> Planes:
        bytes_ = self._count * side ** 2
        light = rows[:, :bytes_].unflatten(1, (self._count, side, side))
        return Planes(light, None if self.kind == "rgb" else rows[:, bytes_:].unflatten(1, (2, chroma_side, chroma_side)))

    def packed_in(self, memory: Tensor, count: int) -> Planes:
        """Views, each of them contiguous, of so many packed crops in memory (count · packed_bytes,) uint8."""
        end, side = count * self._count * self.crop_px ** 2, self._kept_px
        light = memory[:end].view(count, self._count, self.crop_px, self.crop_px)
        return Planes(light, None if self.kind == "rgb" else memory[end:].view(count, 2, side, side))

    def pack(self, squares: Planes, out: Planes, which: Tensor, top: Tensor, left: Tensor) -> None:
        """Write packed crops of squares `which` at (top, left), all (B,) int64, to `packed_in` planes. On a CPU torch's threads
        do it, without the interpreter's lock."""
        cut(squares.light, which, top, left, self.crop_px, out.light)
        if squares.chroma is not None and out.chroma is not None:
            down, across = (yuv.kept_from(place, self.square_px, self.crop_px) for place in (top, left))
            cut(squares.chroma, which, down, across, self._kept_px, out.chroma)

    def rgb(self, planes: Planes, which: Tensor, top: Tensor, left: Tensor) -> Tensor:
        """RGB (B, 3, c, c) uint8 of squares or packed crops `which`, at (top, left) of their squares, all (B,) int64: the bits of
        `crop`, on any device."""
        if planes.light.shape[-1] == self.square_px:
            memory = planes.light.new_empty(len(which) * self.packed_bytes)
            crops = self.packed_in(memory, len(which))
            self.pack(planes, crops, which, top, left)
        else:
            crops = Planes(planes.light[which], None if planes.chroma is None else planes.chroma[which])
        if crops.chroma is None:
            return crops.light
        added = yuv.addends(yuv.windows(crops.chroma, top, left, self.square_px, self.crop_px))
        return yuv.merge(crops.light.squeeze(1), cut(added, torch.arange(len(top), device=top.device), top % 2, left % 2,
                                                     self.crop_px))

    def restored(self, squares: Tensor) -> Tensor:
        """RGB (B, 3, S, S) uint8 as it would come out of a store, of squares (B, S, S, 3) uint8, where c is S."""
        which = torch.arange(len(squares), device=squares.device)
        corner = torch.zeros_like(which)
        return self.rgb(self.planes(self.encode_all(squares)), which, corner, corner)


def cut(planes: Tensor, which: Tensor, top: Tensor, left: Tensor, size: int, out: Tensor | None = None) -> Tensor:
    """(B, C, size, size): of each sample's row `which` of (N, C, H, W) the crop at (top, left); all (B,) int64 on the device,
    `out` contiguous. One gather of lines: every place where one may begin counts as a row of a table whose rows overlap."""
    if planes.shape[2:] == (size, size):
        return torch.index_select(planes, 0, which, out=out)
    n, count, height, width = planes.shape
    steps = planes.stride()
    table = planes.as_strided((sum((extent - 1) * step for extent, step in zip(planes.shape, steps)) + 2 - size, size), (1, 1))
    first = which * steps[0] + top * steps[2] + left
    plane, line = (torch.arange(extent, device=which.device) * step for extent, step in ((count, steps[1]), (size, steps[2])))
    lines = (first[:, None, None] + plane[:, None] + line).flatten()
    if out is None:
        return table.index_select(0, lines).view(len(which), count, size, size)
    torch.index_select(table, 0, lines, out=out.view(-1, size))
    return out


class Store(ABC):
    """Decoded squares in memory: `RamStore`, shared by the processes of a node, or `GpuStore`, spread over them. What is written
    out here is for a store of which every process has all rows."""
    layout: Layout
    note = ""  # what a person should know
    have: Marks  # (N,) not 0 where a row is known to be filled, whoever holds it; of a GpuStore the same in every process
    stored: Marks  # (N,) not 0 where this process knows that a row is filled, whether or not the others do
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

    def check(self, rows: Rows) -> Rows:
        """Compare rows (B,) with their checksums, if this process has not yet. Gives those that hold other bytes than were put
        there; they are not filled any more."""
        return rows[:0]

    @abstractmethod
    def put(self, rows: Rows, squares: Tensor) -> None:
        """Fill rows (B,) from squares (B, S, S, 3) uint8. Raises RuntimeError when they cannot be written."""

    @abstractmethod
    def located(self, wanted: Sequence[Crops]) -> Located:
        """The crops for this process, on its device. `wanted`: the crops of each process, by rank; the same in all of them."""

    def crops(self, wanted: Sequence[Crops]) -> Tensor | Sequence[Tensor]:
        """RGB crops for this process, (B, 3, c, c) uint8, or B views (3, c, c) uint8 made when asked for; for a CPU."""
        planes, *places = self.located(wanted)
        return self.layout.rgb(planes, *to_device(planes.light.device, *places))

    def seal(self) -> None:
        """There is nothing left to fill."""

    def close(self) -> None:
        """Finish what is under way; the squares stay."""
