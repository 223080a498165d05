"""The two towers of the network: which rows of every parameter a process holds (paper §3.2, figure 2).

The paper puts half of the kernels of every layer on each of two GPUs. Written as one network on one device (`groups=2` in
conv2, conv4, conv5), *tower t holds rows [t·n/2, (t+1)·n/2) of every parameter*: the canonical parameter sharded along
dimension 0, in the convention of `torch.chunk` (and DTensor's Shard(0)) when n is odd. Activations that cross between them:
model/tower_exchange.py."""
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Tower:
    """Part `rank` of `count` of the network; `group` joins the processes of a pair (None: the default group). Raises
    ValueError when `count` is not 1 (everything in this process) or 2, or `rank` is not below it."""
    rank: int
    count: int
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if self.count not in (1, 2):
            raise ValueError(f"tower count (={self.count}) must be 1 (all in one process) or 2; the paper has two")
        if not 0 <= self.rank < self.count:
            raise ValueError(f"tower rank (={self.rank}) must be below {self.count}; count the towers from 0")

    def rows(self, size: int) -> tuple[int, int]:
        """Rows [start, stop) of this tower in a dimension of `size`; tower a gets the larger half (torch.chunk)."""
        step = -(-size // self.count)
        return min(self.rank * step, size), min((self.rank + 1) * step, size)


BOTH = Tower(0, 1)


def tower_slice(whole: torch.Tensor, tower: Tower) -> torch.Tensor:
    """This tower's rows of a canonical tensor (its first dimension): a view."""
    start, stop = tower.rows(whole.shape[0])
    return whole[start:stop]


def tower_shape(whole: tuple[int, ...], tower: Tower) -> tuple[int, ...]:
    """The shape of `tower_slice` of a tensor of shape `whole`."""
    start, stop = tower.rows(whole[0])
    return (stop - start, *whole[1:])
