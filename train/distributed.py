"""How many processes there are, and what this one is. The only file that reads os.environ (torchrun's variables)
and, but for train/__init__.py, writes it.

`data_rank` says which slice of a batch a process gets, `tower_rank` which half of the network it holds. Today: one
process holds both towers, or two hold one each and see the same batch. More slices of data would join in `_place`.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from dataclasses import dataclass
from typing import Iterator, Optional

import torch
import torch.distributed as dist

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Topology:
    """The place of this process.

    Attributes:
        data_rank, data_ranks: which slice of each batch it gets, of how many.
        tower_rank, tower_ranks: which part of the network it holds, of how many; 1 means both towers.
        local_rank, local_ranks: which process of this machine it is, of how many.
        device: where its network lies.
    """

    data_rank: int
    data_ranks: int
    tower_rank: int
    tower_ranks: int
    local_rank: int
    local_ranks: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True in the one process that prints and writes."""
        return self.data_rank == 0 and self.tower_rank == 0

    @property
    def is_alone(self) -> bool:
        """True when there is one process only."""
        return self.data_ranks * self.tower_ranks == 1

    def node_group(self) -> Optional[dist.ProcessGroup]:
        """A process group of its own of the processes on this machine, or None for one process; all of them must ask.

        Raises:
            RuntimeError: there are processes on other machines too.
        """
        if self.is_alone:
            return None
        if self.local_ranks != self.data_ranks * self.tower_ranks:
            raise RuntimeError(f"processes (={self.data_ranks * self.tower_ranks}, {self.local_ranks} of them here) must be on "
                               "one machine to share images; use --machine.resident_memory=ram")
        return dist.new_group()

    def agree(self, *flags: bool) -> list[bool]:
        """Which flags are up in any process: the same answer in all of them, which all must ask."""
        if self.is_alone:
            return list(flags)
        device = self.device if dist.get_backend() == "nccl" else torch.device("cpu")
        votes = torch.tensor(flags, dtype=torch.int32, device=device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return [bool(vote) for vote in votes.tolist()]

    def share(self, text: str) -> str:
        """The main process's text, in every process."""
        if self.is_alone:
            return text
        box = [text]
        dist.broadcast_object_list(box, src=0, device=self.device if dist.get_backend() == "nccl" else None)
        return box[0]


def _environment() -> dict[str, int]:
    """torchrun's variables as numbers, or one process when it did not start us."""
    given = [name for name in VARIABLES if name in os.environ]
    if "WORLD_SIZE" not in given:
        return {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    if len(given) < len(VARIABLES):
        raise RuntimeError(f"environment (={', '.join(given)}) lacks {', '.join(set(VARIABLES) - set(given))}; start "
                           "with torchrun, or unset WORLD_SIZE")
    return {name: int(os.environ[name]) for name in VARIABLES}


def _place(world: int, rank: int, towers: int) -> tuple[int, int, int, int]:
    """(data_rank, data_ranks, tower_rank, tower_ranks) of one of `world` processes."""
    if world == 1:
        return 0, 1, 0, 1
    if world != 2:
        raise ValueError(f"processes (={world}) must be 1 or 2; a run is one process or a pair of towers "
                         "(torchrun --nproc-per-node 2)")
    if towers != 2:
        raise ValueError(f"model.towers (={towers}) must be 2 for 2 processes; start one process, or give two towers")
    return 0, 1, rank, 2


def _device(wanted: str, local_rank: int) -> torch.device:
    """The device of this process; `auto` takes a GPU of its own when there is one for it."""
    if wanted == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank < count:
        return torch.device("cuda", local_rank)
    if wanted == "cuda" or count:
        raise RuntimeError(f"machine.device (={wanted}) needs a GPU for local process {local_rank}, but there are "
                           f"{count}; start fewer processes or use --machine.device=cpu")
    return torch.device("cpu")


@contextlib.contextmanager
def topology(*, towers: int, device: str, timeout_s: float) -> Iterator[Topology]:
    """Join the process group, when there is one, and leave it at the end.

    Args:
        towers: of the model, 1 or 2.
        device: auto, cpu or cuda.
        timeout_s: after so many seconds without an answer from the other process, give up with an error.

    Raises:
        ValueError: a number of processes that makes no sense for the model.
        RuntimeError: no GPU for this process, or torchrun's variables are incomplete.
    """
    environment = _environment()
    world, rank, local_rank = (environment[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    placed = _place(world, rank, towers)
    chosen = _device(device, local_rank)
    if chosen.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts; deterministic cuBLAS asks for it
        torch.cuda.set_device(chosen)
    if world > 1:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", rank=rank, world_size=world,
                                timeout=datetime.timedelta(seconds=timeout_s),
                                device_id=chosen if chosen.type == "cuda" else None)
    try:
        yield Topology(*placed, local_rank, environment["LOCAL_WORLD_SIZE"], chosen)
    finally:
        if world > 1:
            dist.destroy_process_group()
