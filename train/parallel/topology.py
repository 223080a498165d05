"""How many processes there are, and what this one is. The only file that reads os.environ (torchrun's variables), but for
train/exit_codes.py, and, but for train/__init__.py, writes it.

A mesh ("data", "tower"): `data_rank` says which slice of a batch a process gets, `tower_rank` which half of the network it
holds. The two towers of a pair are neighbours, so they lie on one machine and on neighbouring GPUs.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from dataclasses import dataclass, field
from typing import Any, Iterator, Optional, Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from train.parallel.board import Board, attempt
from train.config import ParallelConfig
from train.parallel.watchdog import Watch, Watchdog

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
LATER_S = 10.0  # a collective gives up so much later than the watchdog, which has more to say
LINGER_S = 10.0  # that process 0 waits at the end for the others, when it keeps the store


@dataclass(frozen=True)
class Topology:
    """The place of this process.

    Attributes:
        data_rank, data_ranks: which slice of each batch it gets, of how many.
        tower_rank, tower_ranks: which part of the network it holds, of how many; 1 means both towers.
        local_rank, local_ranks: which process of this machine it is, of how many.
        device: where its network lies.
        mesh: of all processes, dimensions "data" and "tower"; None for one process.
        watch: told what this process is doing; watches over the others.
        timeout: of collectives, also of groups that others make.
        store: torchrun's, which outlives a restart; None without torchrun.
    """

    data_rank: int
    data_ranks: int
    tower_rank: int
    tower_ranks: int
    local_rank: int
    local_ranks: int
    device: torch.device
    mesh: Optional[DeviceMesh] = None
    watch: Watch = field(default_factory=Watch, compare=False, repr=False)
    timeout: datetime.timedelta = datetime.timedelta(minutes=10)
    store: Optional[dist.Store] = field(default=None, compare=False, repr=False)

    @property
    def rank(self) -> int:
        """This process's number among all, from 0; towers of a pair are neighbours."""
        return self.data_rank * self.tower_ranks + self.tower_rank

    @property
    def ranks(self) -> int:
        """How many processes there are."""
        return self.data_ranks * self.tower_ranks

    @property
    def is_main(self) -> bool:
        """True in the one process that prints and writes."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """True when there is one process only."""
        return self.ranks == 1

    def group(self, dimension: str) -> Optional[dist.ProcessGroup]:
        """The processes that differ from this one in "data" or in "tower" only; None where there is no other."""
        size = {"data": self.data_ranks, "tower": self.tower_ranks}[dimension]
        return self.mesh.get_group(dimension) if self.mesh is not None and size > 1 else None

    def node_group(self) -> Optional[dist.ProcessGroup]:
        """A process group of its own of the processes on this machine, or None for one process; all processes must ask."""
        if self.is_alone:
            return None
        firsts = self.gather(self.rank - self.local_rank)
        mine: Optional[dist.ProcessGroup] = None
        for first in sorted(set(firsts)):  # every process must take part in making every group
            made = dist.new_group([rank for rank, other in enumerate(firsts) if other == first], timeout=self.timeout)
            mine = made if first == self.rank - self.local_rank else mine
        return mine

    def agree(self, *flags: bool) -> list[bool]:
        """Which flags are up in any process: the same answer in all of them, which all must ask."""
        return list(flags) if self.is_alone else [total > 0 for total in self.total(flags)]

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in float64: the same in all of them, which all must ask."""
        if self.is_alone:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(numbers)
        found: list[float] = numbers.tolist()
        return found

    def gather(self, value: Any) -> list[Any]:
        """What each process gives (anything that can be pickled), in the order of their ranks; all must ask."""
        if self.is_alone:
            return [value]
        found: list[Any] = [None] * self.ranks
        dist.all_gather_object(found, value)
        return found

    def note(self, what: str, value: object = "yes") -> None:
        """Remember something for after a restart."""
        if self.store is not None:
            self.store.set(f"noted/{what}", str(value))

    def noted(self, what: str) -> str:
        """What was noted, perhaps before a restart; empty when nothing was."""
        key = f"noted/{what}"
        return self.store.get(key).decode() if self.store is not None and self.store.check([key]) else ""

    def share(self, text: str) -> str:
        """The main process's text, in every process."""
        if self.is_alone:
            return text
        box = [text]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
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


def _place(world: int, rank: int, local_ranks: int, towers: int, parallel: ParallelConfig) -> tuple[int, int, int, int]:
    """(data_rank, data_ranks, tower_rank, tower_ranks) of one of `world` processes. One alone always holds everything."""
    if world == 1:
        return 0, 1, 0, 1
    weird = parallel.scheme == "weird"
    apart = "--parallel.towers=1" + (" --parallel.scheme=towers" if weird else "")
    together = parallel.towers or (2 if weird or (towers == 2 and world % 2 == 0) else 1)
    if together == 2 and towers != 2:
        raise ValueError(f"model.towers (={towers}) must be 2 for two processes to hold a tower each; use "
                         f"{apart}, where processes only share the batch")
    if world % together:
        raise ValueError(f"processes (={world}) must be even in number for two towers each; start one more or fewer, or use "
                         f"{apart}")
    if local_ranks % together:
        raise ValueError(f"processes of this machine (={local_ranks}) must be even in number, so that no pair of towers lies on "
                         f"two machines; start one more or fewer on each, or use {apart}")
    return rank // together, world // together, rank % together, together


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


def _kept_by_torchrun() -> bool:
    """Whether torchrun keeps the store; else process 0 does, for as long as it lives."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _connect(rank: int, world: int, timeout_s: float) -> Optional[tuple[dist.TCPStore, dist.TCPStore]]:
    """Two connections to the store of the run, which torchrun keeps, or else process 0; None for a process that is alone."""
    if world == 1 and not _kept_by_torchrun():
        return None
    if lacking := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise RuntimeError(f"environment (={', '.join(VARIABLES)}) lacks {', '.join(lacking)}; start with torchrun, or unset "
                           "WORLD_SIZE")
    first, second = (dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, is_master=keeps,
                                   timeout=datetime.timedelta(seconds=timeout_s), wait_for_workers=False)
                     for keeps in (rank == 0 and not _kept_by_torchrun(), False))
    return first, second


@contextlib.contextmanager
def topology(*, towers: int, device: str, timeout_s: float, silence_s: float = 30.0,
             parallel: ParallelConfig = ParallelConfig()) -> Iterator[Topology]:
    """Join the process group, when there is one, and leave it at the end. Meanwhile processes watch over each other.

    Args:
        towers: of the model, 1 or 2.
        device: auto, cpu or cuda.
        timeout_s: a process that does not go on for so many seconds ends the run.
        silence_s: a process without a sign of life for so many seconds ends the run.
        parallel: how processes share the work.

    Raises:
        ValueError: a number of processes that makes no sense for the model.
        RuntimeError: no GPU for this process, or torchrun's variables are incomplete.
        OtherFailed: in place of the error of a collective, when another process was the cause.
    """
    environment = _environment()
    world, rank, local_rank, local_ranks = (environment[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK",
                                                                           "LOCAL_WORLD_SIZE"))
    placed = _place(world, rank, local_ranks, towers, parallel)
    chosen = _device(device, local_rank)
    if chosen.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts; deterministic cuBLAS asks for it
        torch.cuda.set_device(chosen)
    store, second = _connect(rank, world, timeout_s) or (None, None)
    name = attempt(store, rank, world, timeout_s) if store is not None and world > 1 else ""
    board = Board(dist.PrefixStore(f"watch/{name}", second)) if second is not None and world > 1 else None
    watch = Watchdog(rank, world, range(rank - local_rank, rank - local_rank + local_ranks), board,
                     timeout_s=timeout_s, silence_s=silence_s,
                     launcher=os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None)
    watch.start()
    orderly = world == 1  # one alone keeps nobody waiting, whatever its end
    try:
        with watch.telling():
            timeout = datetime.timedelta(seconds=timeout_s + LATER_S)
            group_store = dist.PrefixStore(f"group/{name}", store) if store is not None else None
            mesh = _join(chosen, group_store, rank, placed[1], placed[3], timeout)
            yield Topology(*placed, local_rank, local_ranks, chosen, mesh, watch, timeout, store)
        orderly = True
    finally:
        if dist.is_initialized() and world > 1:
            dist.destroy_process_group()
        if orderly:  # else it watches to the very end, which must come
            watch.close()
            until = time.monotonic() + LINGER_S
            while board is not None and rank == 0 and not _kept_by_torchrun() and not board.all_have_left(world):
                if time.monotonic() > until:
                    break
                time.sleep(0.05)


def _join(device: torch.device, store: Optional[dist.Store], rank: int, data_ranks: int, tower_ranks: int,
          timeout: datetime.timedelta) -> Optional[DeviceMesh]:
    """The mesh of all processes; None for one."""
    world = data_ranks * tower_ranks
    if world == 1 or store is None:
        return None
    # gloo beside NCCL: objects, and checkpoints written while training goes on, travel between CPUs.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world, store=store,
                            timeout=timeout, device_id=device if device.type == "cuda" else None)
    # init_device_mesh would give its groups torch's own timeouts, which end a run before the watchdog has spoken.
    places = torch.arange(world).view(data_ranks, tower_ranks)
    groups = [dist.new_subgroups_by_enumeration(lists, timeout=timeout)[0] for lists in (places.t().tolist(), places.tolist())]
    return DeviceMesh.from_group(groups, device.type, places, mesh_dim_names=("data", "tower"))
