"""Data and tower ranks of this process, its device and process groups (torch.distributed, DeviceMesh).

A mesh ("data", "tower"): `data_rank` says which slice of a batch a process gets, `tower_rank` which half of the network it
holds. The two towers of a pair are neighbours, so they lie on one machine and on neighbouring GPUs.
"""
import contextlib
import datetime
import hashlib
import os
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Iterator, Optional, Self, Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from train.cli import visible_gpus
from train.config import ParallelConfig
from train.parallel import failure

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
POLL_S = 0.05
LATER_S = 10.0  # a collective gives up so much later than the monitor, which names the cause


@dataclass(frozen=True)
class Topology:
    """Ranks, process groups and device of this process, and reductions over all processes, which every process must call."""
    data_rank: int  # which slice of each batch it gets, of how many
    data_ranks: int
    tower_rank: int  # which part of the network it holds, of how many; 1 means both towers
    tower_ranks: int
    local_rank: int  # which process of this machine it is, of how many
    local_ranks: int
    device: torch.device  # where its network lies
    mesh: Optional[DeviceMesh] = None  # of all processes, dimensions "data" and "tower"; None for one process
    timeout: datetime.timedelta = datetime.timedelta(minutes=10)  # of collectives, also of groups that others make
    # torchrun's key-value store, which outlives a restart of the processes; of this process alone without torchrun.
    store: dist.Store = field(default_factory=dist.HashStore, compare=False, repr=False)

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> Self:
        """One process, which holds the whole network."""
        return cls(0, 1, 0, 1, 0, 1, torch.device(device))

    @property
    def global_rank(self) -> int:
        """This process's number among all, from 0; the towers of a pair are neighbours."""
        return self.data_rank * self.tower_ranks + self.tower_rank

    @property
    def world_size(self) -> int:
        return self.data_ranks * self.tower_ranks

    @property
    def is_main(self) -> bool:
        """True in the one process that prints and writes."""
        return self.global_rank == 0

    @property
    def is_single(self) -> bool:
        return self.world_size == 1

    def group(self, dimension: str) -> Optional[dist.ProcessGroup]:
        """The processes that differ from this one in "data" or in "tower" only; None where there is no other."""
        size = {"data": self.data_ranks, "tower": self.tower_ranks}[dimension]
        return self.mesh.get_group(dimension) if self.mesh is not None and size > 1 else None

    def node_group(self) -> Optional[dist.ProcessGroup]:
        """A new process group of the processes on this machine, or None for one process; a collective call."""
        if self.is_single:
            return None
        firsts = self.gather_objects(self.global_rank - self.local_rank)
        nodes = [[rank for rank, other in enumerate(firsts) if other == first] for first in sorted(set(firsts))]
        group: dist.ProcessGroup = dist.new_subgroups_by_enumeration(nodes, timeout=self.timeout)[0]
        return group

    def pinned(self, values: Sequence[float]) -> torch.Tensor:
        """Numbers as a tensor (N,) float64 on the CPU, from where a copy to the device makes nobody wait. (torch keeps its memory
        until such a copy is done.)"""
        return torch.tensor(values, dtype=torch.float64, pin_memory=self.device.type == "cuda")

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in float64."""
        if self.is_single:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(numbers)
        return list(numbers.tolist())

    def gather_objects(self, value: Any) -> list[Any]:
        """The value of every process (anything that can be pickled), by global rank."""
        if self.is_single:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """The main process's value, in every process."""
        if self.is_single:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]


@contextlib.contextmanager
def process_group(*, towers: int, device: str, timeout_s: float, silence_s: float = 30.0,
                  parallel: ParallelConfig = ParallelConfig()) -> Iterator[Topology]:
    """Join the process group, when there is one, and leave it at the end; meanwhile this process is monitored (failure.py).
    `towers` are the model's. Raises ValueError for a number of processes that makes no sense for the model, RuntimeError when
    there is no GPU for this process or torchrun's variables are incomplete."""
    rank, world_size, local_rank, local_ranks = _variables(*VARIABLES) if "WORLD_SIZE" in os.environ else (0, 1, 0, 1)
    coordinates = _coordinates(world_size, rank, local_ranks, towers, parallel)
    chosen = _device(device, local_rank, local_ranks)
    if chosen.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts; deterministic cuBLAS asks for it
        # Kernels of several communicators (data, tower, pair, all) must run in one order on all GPUs, or they may wait for each
        # other without end. NCCL (2.26 on) then takes the order in which the host begins them: one thread does, in all processes
        # in the same order, since the backward pass begins its own while this thread waits for it.
        os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
        torch.cuda.set_device(chosen)
    with failure.monitored(rank, world_size, timeout_s, silence_s):
        store, timeout, mesh = _store(rank, world_size, timeout_s), datetime.timedelta(seconds=timeout_s + LATER_S), None
        try:
            if world_size > 1:
                mesh = _mesh(chosen, store, rank, coordinates[1], coordinates[3], timeout)
            yield Topology(*coordinates, local_rank, local_ranks, chosen, mesh, timeout, store)
        finally:
            if world_size > 1 and dist.is_initialized():
                dist.destroy_process_group()


def _variables(*names: str) -> list[int]:
    if lacking := [name for name in names if name not in os.environ]:
        given = [name for name in VARIABLES if name in os.environ]
        raise RuntimeError(f"environment (={', '.join(given)}) lacks {', '.join(lacking)}; start with torchrun, or unset "
                           "WORLD_SIZE")
    return [int(os.environ[name]) for name in names]


def _coordinates(world_size: int, rank: int, local_ranks: int, towers: int,
                 parallel: ParallelConfig) -> tuple[int, int, int, int]:
    """(data_rank, data_ranks, tower_rank, tower_ranks). A single process holds both towers."""
    if world_size == 1:
        return 0, 1, 0, 1
    weird = parallel.scheme == "weird"
    apart = "--parallel.towers=1" + (" --parallel.scheme=towers" if weird else "")
    together = parallel.towers or (2 if weird or (towers == 2 and world_size % 2 == 0) else 1)
    if together == 2 and towers != 2:
        raise ValueError(f"model.towers (={towers}) must be 2 for two processes to hold a tower each; use "
                         f"{apart}, where processes only share the batch")
    if world_size % together:
        raise ValueError(f"processes (={world_size}) must be even in number for two towers each; start one more or fewer, or use "
                         f"{apart}")
    if local_ranks % together:
        raise ValueError(f"processes of this machine (={local_ranks}) must be even in number, so that no pair of towers lies on "
                         f"two machines; start one more or fewer on each, or use {apart}")
    return rank // together, world_size // together, rank % together, together


def _device(wanted: str, local_rank: int, local_ranks: int) -> torch.device:
    """The device of this process; `auto` takes a GPU of its own when there is one for it."""
    if wanted == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name, _, number = wanted.partition(":")
    if number and local_ranks > 1:
        raise ValueError(f"machine.device (={wanted}) is one GPU for {local_ranks} processes; write cuda: each takes its own")
    chosen = int(number or local_rank)
    if chosen < count:
        return torch.device("cuda", chosen)
    if name == "cuda" and not count:
        raise ValueError(f"machine.device (={wanted}) cannot be used: {visible_gpus()}; use --machine.device=cpu")
    if name == "cuda" or count:
        raise RuntimeError(f"machine.device (={wanted}) needs GPU {chosen} for local process {local_rank}, but there are "
                           f"{count}; start fewer processes or use --machine.device=cpu")
    return torch.device("cpu")


def _store(rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """The key-value store of all processes: torchrun's, or, started in another way, one that process 0 keeps."""
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if world_size == 1 and not by_torchrun:
        return dist.HashStore()
    port, = _variables("MASTER_PORT")
    return dist.TCPStore(os.environ.get("MASTER_ADDR", "localhost"), port, world_size, is_master=rank == 0 and not by_torchrun,
                         timeout=datetime.timedelta(seconds=timeout_s), wait_for_workers=False)


def agreed_prefix(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> str:
    """A name for this start of all processes, the same in all of them, that no earlier start has had; a collective call.

    torchrun's store outlives a restart, and torch's own keys (`env://`, torch 2.13) would be taken for new: the restart hangs.
    torchrun's count of restarts is no name, as it can differ between machines. So each process writes a new word and reads all;
    who has read the same words counts itself under their hash, which is the name once all are counted. Not all in time: error."""
    store.set(f"start/{rank}", uuid.uuid4().hex)
    keys, name, until = [f"start/{other}" for other in range(world_size)], "", time.monotonic() + timeout_s
    while time.monotonic() < until:
        if store.check(keys):
            read = hashlib.sha256(b" ".join(store.multi_get(keys))).hexdigest()
            counted = store.add(f"counted/{read}", int(read != name))
            name = read
            if counted == world_size:
                return name
        time.sleep(POLL_S)
    raise RuntimeError(f"processes (={world_size}) must all start within {timeout_s:g} s, and some have not; see what they, or "
                       "torchrun on their machines, said")


def _mesh(device: torch.device, store: dist.Store, rank: int, data_ranks: int, tower_ranks: int,
          timeout: datetime.timedelta) -> DeviceMesh:
    """Initialize torch.distributed; returns the mesh of all processes."""
    world_size = data_ranks * tower_ranks
    prefix = agreed_prefix(store, rank, world_size, timeout.total_seconds())
    # gloo beside NCCL: objects, and checkpoints written while training continues, travel between CPUs.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world_size,
                            store=dist.PrefixStore(prefix, store), timeout=timeout,
                            device_id=device if device.type == "cuda" else None)
    # init_device_mesh would give its groups torch's own timeouts.
    ranks = torch.arange(world_size).view(data_ranks, tower_ranks)
    groups = [dist.new_subgroups_by_enumeration(lists, timeout=timeout)[0] for lists in (ranks.t().tolist(), ranks.tolist())]
    return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=("data", "tower"))
