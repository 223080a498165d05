"""Teams of processes that train one network, each in its way (`Sharing`), started as torchrun would and kept alive between turns.

Each process has one core to itself (rank r the core r modulo their number) and one thread; what carries its bytes to others
must run on that core too. A turn's figures are of the slowest process. Waiting is measured where the product waits: for
activations (`Swap.wait`), for all-reduces of gradients (`GradientReducer.finish`, which puts small ones in their places too), for
the loss of all ranks (`Topology.all_reduce_sum`).
"""
from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import Any
from unittest import mock

import torch

from model import tower_exchange
from model.tower_exchange import Swap
from tools.bench.workers import Workers
from tools.profile.measure import interleave, ratio
from tools.profile.network import NetworkStep
from tools.scaling import traffic
from train.config import Config, ParallelConfig
from train.parallel.gradients import GradientReducer
from train.parallel.topology import Topology, process_group

WAITS = ("activations", "gradients", "loss")


@dataclass(frozen=True)
class Sharing:
    """A way to share a network.

    Attributes:
        name: as in tables.
        processes: how many.
        parallel: their settings.
        apart: they share nothing: each trains a network of its own on its part of the batch. What the cores could give.
        half: one process holds tower a; what tower b would send is there at once. What two GPUs could give, where there is one.
    """
    name: str
    processes: int
    parallel: ParallelConfig = ParallelConfig()
    apart: bool = False
    half: bool = False

    @property
    def alone(self) -> bool:
        """No process exchanges anything."""
        return self.apart or self.processes == 1

    @property
    def towers(self) -> int:
        """Processes that hold one network together."""
        return 1 if self.alone or self.parallel.towers == 1 else 2


SHARINGS = {sharing.name: sharing for sharing in (
    Sharing("one", 1),
    Sharing("apart", 2, apart=True),
    Sharing("towers", 2, ParallelConfig(towers=2)),
    Sharing("data", 2, ParallelConfig(towers=1)),
    Sharing("weird", 2, ParallelConfig(scheme="weird")),
    Sharing("towers-x-data", 4, ParallelConfig(towers=2)),
    Sharing("half", 1, half=True),
)}


@dataclass(frozen=True)
class RankTurn:
    """Some steps of one process.

    Attributes:
        steps, seconds: how many, and the wall time.
        waits: seconds of waiting, by WAITS.
        cpu_s: CPU seconds of the process.
        carrying_s: those of its other threads, which carry bytes.
    """
    steps: int
    seconds: float
    waits: dict[str, float]
    cpu_s: float
    carrying_s: float

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.seconds / self.steps


class Team:
    """The processes of one sharing, seen from outside.

    Args:
        sharing: the way.
        config: recipe; its batch is that of all processes together.

    Raises:
        RuntimeError: a process failed; with its message.
    """

    def __init__(self, sharing: Sharing, config: Config) -> None:
        count, machine = sharing.processes, replace(config.machine, torch_threads=1, threads=config.machine.threads or 1)
        train = replace(config.train, batch=config.train.batch // count if sharing.apart else config.train.batch)
        config = replace(config, machine=machine, train=train, parallel=replace(sharing.parallel, feed=config.parallel.feed))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        variables = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = [{} if sharing.alone else variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        self._workers = Workers(f"team {sharing.name}", member, [(sharing, rank, config) for rank in range(count)],
                                environment)

    def turn(self, steps: int, overlap: bool = True) -> list[RankTurn]:
        """Each process's turn: so many steps, after one that is not timed."""
        return self._workers.call(take_turn, steps, overlap)

    def close(self) -> None:
        """End the processes."""
        self._workers.close()


# --- in a process of a team

@dataclass
class Member:
    """A process of a team: by overlap its steps without end, and its waits so far."""
    topology: Topology
    steps: dict[bool, Iterator[object]]
    waits: dict[str, float] = field(default_factory=lambda: dict.fromkeys(WAITS, 0.0))


@contextmanager
def member(sharing: Sharing, rank: int, config: Config) -> Iterator[Member]:
    """Join the team and build the network."""
    if config.machine.device != "cuda":
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    with ExitStack() as stack:
        topology = stack.enter_context(process_group(towers=config.model.towers, device=config.machine.device,
                                                     timeout_s=3600, parallel=config.parallel))
        if sharing.half:
            stack.enter_context(mock.patch.object(tower_exchange, "Swap", _Imagined))
            stack.enter_context(mock.patch.object(Topology, "all_reduce_sum", lambda self, values: list(values)))
            topology = replace(topology, tower_ranks=2)
        steps: dict[bool, Iterator[object]] = {}
        for overlap in (True, False) if topology.world_size > 1 else (True,):
            network = NetworkStep(replace(config, parallel=replace(config.parallel, overlap=overlap)), topology)
            steps[overlap] = network.synthetic()
        own = Member(topology, steps)
        for owner, method, name in ((Swap, "wait", "activations"), (GradientReducer, "finish", "gradients"),
                                    (Topology, "all_reduce_sum", "loss")):
            stack.enter_context(mock.patch.object(owner, method, _timed(getattr(owner, method), own.waits, name)))
        yield own


def _timed(method: Any, seconds: dict[str, float], name: str) -> Any:
    """The method, adding its wall time to `seconds`."""
    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*arguments)
        finally:
            seconds[name] += time.perf_counter() - start
    return timed


class _Imagined:
    """In place of model.tower_exchange.Swap: the other tower has sent already (the sizes are right, the values are not)."""

    def __init__(self, sent: torch.Tensor, received: torch.Tensor, tower: Any, tag: int) -> None:
        self._received = received.fill_(0.01)

    def wait(self) -> torch.Tensor:
        """What was received."""
        return self._received


def take_turn(own: Member, steps: int, overlap: bool) -> RankTurn:
    """So many steps, after one that is not timed, begun by all processes at once."""
    work = own.steps[overlap]
    next(work)
    own.topology.all_reduce_sum([0.0])
    waits, own_cpu, cpu, start = dict(own.waits), time.thread_time(), time.process_time(), time.perf_counter()
    for _ in range(steps):
        next(work)
    seconds, cpu, own_cpu = time.perf_counter() - start, time.process_time() - cpu, time.thread_time() - own_cpu
    return RankTurn(steps, seconds, {name: own.waits[name] - waits[name] for name in WAITS}, cpu, cpu - own_cpu)


# --- ways, and what they measure

@dataclass(frozen=True)
class Way:
    """What takes turns: a sharing, with overlap or without."""
    sharing: Sharing
    overlap: bool

    @property
    def name(self) -> str:
        """As in tables."""
        return self.sharing.name + ("" if self.overlap else ", no overlap")


@dataclass(frozen=True)
class Result:
    """A way's turns.

    Attributes:
        way: which.
        batch: images of a step, of all processes together.
        rounds: turns by round, then by process.
        sent: bytes that a process sends in a step, computed: activations, gradients.
    """
    way: Way
    batch: int
    rounds: Sequence[Sequence[RankTurn]]
    sent: tuple[int, int]

    @property
    def step_s(self) -> list[float]:
        """Seconds of a step in each round: those of the slowest process."""
        return [max(turn.step_s for turn in turns) for turns in self.rounds]

    def share(self, part: Callable[[RankTurn], float]) -> float:
        """A part of the time, as a share: mean of the processes, median of the rounds."""
        return median(fmean(part(turn) / turn.seconds for turn in turns) for turns in self.rounds)

    def as_json(self, base: Result) -> dict[str, Any]:
        """Everything."""
        speed = ratio(base.step_s, self.step_s)
        return {"name": self.way.name, "processes": self.way.sharing.processes, "overlap": self.way.overlap,
                "images_per_s": [self.batch / seconds for seconds in self.step_s], "step_s": self.step_s,
                "cpu_s": [sum(turn.cpu_s / turn.steps for turn in turns) for turns in self.rounds],
                "ratio": {"median": speed.median, "smallest": speed.least, "largest": speed.most},
                "waits": {name: self.share(lambda turn: turn.waits[name]) for name in WAITS},
                "carrying": self.share(lambda turn: turn.carrying_s),
                "sent_bytes": {"activations": self.sent[0], "gradients": self.sent[1]},
                "sent_bytes_per_s": sum(self.sent) / median(self.step_s)}


def ways(names: Sequence[str]) -> list[Way]:
    """Each way with overlap, and without it where anything is exchanged.

    Raises:
        ValueError: a name that is none.
    """
    for name in names:
        if name not in SHARINGS:
            raise ValueError(f"--ways (={name}) must be among {', '.join(SHARINGS)}; correct the command line")
    chosen = [SHARINGS[name] for name in dict.fromkeys(["one", *names])]
    return [Way(sharing, overlap) for sharing in chosen for overlap in ((True,) if sharing.alone else (True, False))]


def measure(config: Config, chosen: Sequence[Way], rounds: int, seconds: float) -> list[Result]:
    """Start the teams, then let the ways take turns of some seconds, interleaved.

    Raises:
        RuntimeError: a process failed.
    """
    teams: dict[str, Team] = {}
    try:
        for sharing in dict.fromkeys(way.sharing for way in chosen):
            print(f"starting {sharing.name}", file=sys.stderr, flush=True)
            teams[sharing.name] = Team(sharing, config)

        def turn_of(way: Way) -> Callable[[], list[RankTurn]]:
            team = teams[way.sharing.name]
            step_s = max(turn.step_s for turn in team.turn(1, way.overlap))  # a first turn, not counted
            return lambda: team.turn(max(1, round(seconds / step_s)), way.overlap)
        turns = interleave({way.name: turn_of(way) for way in chosen}, rounds)
    finally:
        for team in teams.values():
            team.close()
    return [Result(way, config.train.batch, turns[way.name], sent(way.sharing, config)) for way in chosen]


def sent(sharing: Sharing, config: Config) -> tuple[int, int]:
    """Bytes that a process sends in a step, computed: (activations, gradients)."""
    if sharing.alone:
        return 0, 0
    scheme = "data" if sharing.towers == 1 else sharing.parallel.scheme
    bytes_ = traffic(config.model, scheme, config.machine.precision, pairs=sharing.processes // 2)
    pair_batch = config.train.batch * sharing.towers // sharing.processes
    return pair_batch * sum(bytes_.crossings.values()), round(sum(bytes_.gradients.values()))
