"""The squares of a split in the memory of a node's GPUs: each holds its share, the crops of a batch are exchanged.

Row p lies with rank p mod n. Every rank can tell which rows every other rank trains on, so each knows what it sends and what it
gets, and a batch costs one exchange of crops, as uint8, and no message about it. The same on CPUs (gloo), where the tests run it.

N rows, B samples of a rank's batch, n ranks, c side of a crop.
"""
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.resident import capacity as room
from pipeline.resident.layout import Form

Places = npt.NDArray[np.int64]
Wanted = tuple[Places, Places, Places]  # rows of the store, top and left of their crops; (B,) each


class SpreadStore:
    """This rank's share of the squares, and the way to the others'.

    Args:
        rows: N.
        form: how a square lies in its row.
        device: of this rank.
        group: the node's processes, nobody else's group: its exchanges are in step with the batches. None: this process is alone.
        margin: bytes of a GPU left to the network.

    Attributes:
        rank, ranks: this process's place in the group, of how many.
        have: (N,) uint8, 1 where a row is known to be filled, whoever holds it: the same in every rank.
        stored: (N,) uint8, 1 where this rank has filled a row, whether or not the others know.

    Raises:
        RuntimeError: the share does not fit on the device.
    """

    def __init__(self, rows: int, form: Form, device: torch.device, group: dist.ProcessGroup | None = None, *,
                 margin: int = room.NETWORK_BYTES) -> None:
        self.form, self.rows, self._device, self._group = form, rows, device, group
        self.rank, self.ranks = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        if device.type == "cuda":
            room.check_device(form.kind, rows, form.row_bytes, self.ranks, torch.cuda.mem_get_info(device)[0], margin)
        else:
            room.check_memory(form.kind, rows, form.row_bytes)
        self.have, self.stored = np.zeros(rows, np.uint8), np.zeros(rows, np.uint8)
        self._pixels = torch.empty(len(range(self.rank, rows, self.ranks)), form.row_bytes, dtype=torch.uint8, device=device)

    def mine(self, places: Places) -> npt.NDArray[np.bool_]:
        """Which of the rows `places` this rank holds."""
        return places % self.ranks == self.rank

    def put(self, places: Places, squares: Tensor) -> None:
        """Fill rows `places` (B,) of this rank's from squares (B, S, S, 3) uint8."""
        self._pixels[self._index(places // self.ranks)] = self.form.encode_all(squares.to(self._device))
        self.stored[places] = 1

    def agree(self, places: Places, failed: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Which of the rows `places` failed; from now on `have` knows the others.

        All ranks ask for the same rows, and each has filled its own or flags them in `failed` (B,).
        """
        if self._group is not None:
            flags = torch.from_numpy(failed.astype(np.uint8)).to(self._device)
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
            failed = flags.cpu().numpy() == 1
        self.have[places[~failed]] = 1
        return failed

    def shards(self, shard: tuple[int, int]) -> list[tuple[int, int]]:
        """What every rank has as its `shard`, by rank; asked once."""
        if self._group is None:
            return [shard]
        own = torch.tensor(shard, dtype=torch.int64, device=self._device)
        found = [torch.empty_like(own) for _ in range(self.ranks)]
        dist.all_gather(found, own, group=self._group)
        return [(int(k), int(n)) for k, n in (pair.tolist() for pair in found)]

    def crops(self, wanted: Sequence[Wanted]) -> Tensor:
        """RGB crops (B, 3, c, c) uint8 of this rank's rows.

        Args:
            wanted: what each rank trains on, by rank; the same in all of them.
        """
        places, top, left = wanted[self.rank]
        parcels = self._sent(wanted)
        if self._group is not None:
            owners = places % self.ranks
            given = parcels.new_empty(len(places), self.form.parcel_bytes)
            dist.all_to_all_single(given, parcels, np.bincount(owners, minlength=self.ranks).tolist(),
                                   [int(self.mine(rows).sum()) for rows, _, _ in wanted], group=self._group)
            parcels = torch.empty_like(given)
            parcels[self._index(np.argsort(owners, kind="stable"))] = given  # they came rank by rank
        return self.form.unpack(parcels, self._index(top), self._index(left))

    def _sent(self, wanted: Sequence[Wanted]) -> Tensor:
        """The parcels this rank holds of what all ranks want, rank by rank."""
        kept = [self.mine(rows) for rows, _, _ in wanted]
        rows, top, left = (np.concatenate([values[keep] for values, keep in zip(column, kept, strict=True)])
                           for column in zip(*wanted, strict=True))
        return self.form.parcels(self._pixels, self._index(rows // self.ranks), self._index(top), self._index(left))

    def _index(self, values: Places) -> Tensor:
        return torch.from_numpy(values).to(self._device)

    def seal(self) -> None:
        """Nothing to do: this memory ends with the process."""

    def close(self) -> None:
        """Nothing to wait for."""
