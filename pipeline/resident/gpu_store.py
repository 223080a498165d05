"""`GpuStore`: the squares of a split in the memory of a node's GPUs; each holds its share, the crops of a batch are exchanged.

Row p lies with rank p mod n. Every rank can tell which rows every other rank trains on, so each knows what it sends and what it
gets, and a batch costs one exchange of crops, as uint8, and no message about it. The same on CPUs (gloo), where the tests run it.
N rows, B samples of a rank's batch, n ranks, c side of a crop."""
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.decoding.transfer import to_device
from pipeline.resident.capacity import check_device, check_memory
from pipeline.resident.store import Crops, Layout, Located, Rows, Store


class GpuStore(Store):
    """This rank's share of N (`count`) squares, and the way to the others'. Raises RuntimeError when it does not fit on
    `device`. `group`: the node's processes, nobody else's group: its exchanges are in step with the batches. None: this
    process is alone."""

    def __init__(self, count: int, layout: Layout, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        self.layout, self.exchanges, self._device, self._group = layout, group is not None, device, group
        self.rank, self._ranks = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        if device.type == "cuda":
            check_device(layout.kind, count, layout.row_bytes, self._ranks, torch.cuda.mem_get_info(device)[0])
        else:
            check_memory(layout.kind, count, layout.row_bytes)
            self.note = ("machine.resident_memory (=gpu) has no GPU here: the processes hold the images and exchange crops; ram "
                         "would be faster")
        self.have, self.stored = np.zeros(count, np.uint8), np.zeros(count, np.uint8)
        own = len(range(self.rank, count, self._ranks))
        self._pixels = torch.empty(own, layout.row_bytes, dtype=torch.uint8, device=device)

    def owned(self, rows: Rows) -> npt.NDArray[np.bool_]:
        return rows % self._ranks == self.rank

    def shards(self, shard: tuple[int, int]) -> list[tuple[int, int]]:
        if self._group is None:
            return [shard]
        own = torch.tensor(shard, dtype=torch.int64, device=self._device)
        found = [torch.empty_like(own) for _ in range(self._ranks)]
        dist.all_gather(found, own, group=self._group)
        return [(int(k), int(n)) for k, n in (pair.tolist() for pair in found)]

    def put(self, rows: Rows, squares: Tensor) -> None:
        self._pixels[to_device(self._device, rows // self._ranks)[0]] = self.layout.encode_all(squares.to(self._device))
        self.stored[rows] = 1

    def agree(self, rows: Rows, failed: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        if self._group is not None:
            flags = torch.from_numpy(failed.astype(np.uint8)).to(self._device)
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
            failed = flags.cpu().numpy() == 1
        self.have[rows[~failed]] = 1
        return failed

    def located(self, wanted: Sequence[Crops]) -> Located:
        rows, top, left = wanted[self.rank]
        squares = self.layout.planes(self._pixels)
        if self._group is None:
            return Located(squares, rows, top, left)
        kept = [self.owned(others) for others, _, _ in wanted]
        held = [np.concatenate([values[keep] for values, keep in zip(column, kept, strict=True)])
                for column in zip(*wanted, strict=True)]
        which, *places = to_device(self._device, held[0] // self._ranks, *held[1:])
        packed = self.layout.packed_in(self._pixels.new_empty(len(which) * self.layout.packed_bytes), len(which))
        self.layout.pack(squares, packed, which, *places)
        parcels = torch.cat([plane.flatten(1) for plane in packed if plane is not None], dim=1)
        owners = rows % self._ranks
        received = parcels.new_empty(len(rows), self.layout.packed_bytes)
        dist.all_to_all_single(received, parcels, np.bincount(owners, minlength=self._ranks).tolist(),
                               [int(keep.sum()) for keep in kept], group=self._group)
        arrived = np.argsort(np.argsort(owners, kind="stable"))  # they came rank by rank
        return Located(self.layout.packed(received), arrived, top, left)
