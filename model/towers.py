"""Which half of the network a process holds, and what crosses between the halves (paper §3.2, figure 2).

The paper puts half of the kernels of every layer on each of two GPUs. Written as one network on one device (`groups=2`
in conv2, conv4, conv5), *tower t holds rows [t·n/2, (t+1)·n/2) of every parameter*: the canonical parameter sharded
along dimension 0, in the convention of `torch.chunk` (and DTensor's Shard(0)) when n is odd.

Two things cross between the processes of a pair:
  exchange       activations, before conv3, fc6, fc7 and fc8. Forward: all-gather. Backward: every tower used the
                 whole, so the gradient of a half is the sum over the towers: reduce-scatter.
  gather_logits  after fc8. Every tower then computes the *same* loss, so the gradient of a half is that tower's own
                 slice; summing here would count the loss twice.
In one process both are the identity.

Legend: B batch, C channels of one tower, N channels of both, H row, W column.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

# All-gather with a reduce-scatter backward: torch's own autograd collective (gloo and NCCL). 2.13 renamed it.
_all_gather: Callable[..., torch.Tensor] = (getattr(functional, "all_gather_single_autograd", None)
                                            or functional.all_gather_tensor_autograd)


@dataclass(frozen=True)
class Tower:
    """Part `rank` of `count` of the network; `group` joins the processes of a pair (None: the default group).

    Raises ValueError when `count` is not 1 (everything in this process) or 2, or `rank` is not below it.
    """

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


def exchange(x: torch.Tensor, tower: Tower) -> torch.Tensor:
    """Activations of both towers, tower a's channels first: (B, C, ...) → (B, N, ...). Gradients add over towers."""
    if tower.count == 1:
        return x
    group = tower.group or dist.group.WORLD
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        nhwc = _all_gather(x.permute(0, 2, 3, 1), gather_dim=3, group=group)  # stays channels_last
        return nhwc.permute(0, 3, 1, 2)
    return _all_gather(x.contiguous(), gather_dim=1, group=group)


def gather_logits(part: torch.Tensor, size: int, tower: Tower) -> torch.Tensor:
    """All `size` logits from the parts of the towers: (B, size·/2) → (B, size). A tower's gradient is its own slice.

    The parts may differ by one column (an odd number of classes): they travel padded to the larger.
    """
    if tower.count == 1:
        return part
    widest = -(-size // tower.count)
    sent = torch.nn.functional.pad(part.detach(), (0, widest - part.shape[1]))
    with torch.no_grad():
        received = _all_gather(sent, gather_dim=1, group=tower.group or dist.group.WORLD)[:, :size]
    start, stop = tower.rows(size)
    # Our own columns come from `part`, so autograd leads exactly their gradient back; the others are constants.
    return torch.cat([received[:, :start], part, received[:, stop:]], dim=1)
