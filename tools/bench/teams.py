"""Teams of processes that train the same network, each in its way, and take turns.

The one concept: a team is the processes of one way to share a network (`Team`), started as torchrun would and kept alive; it
works only when told to, for some steps against the clock. Each process has one core to itself (process r the core r modulo their
number) and one thread; what carries its bytes to others must run on that core too.

A turn's figures are of the slowest process. Waiting is measured where the product waits: for activations (`Swap.wait`), for sums
of gradients (`Gradients.finish`, which puts small ones in their places too), for the loss of all (`Topology.total`).
"""
from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from train.config import Config, ParallelConfig

_ANSWER_S = 600.0
LINK_BYTES = (4, 1 << 18, 1 << 22, 1 << 24)  # of the messages whose travel is timed
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
    def towers(self) -> int:
        """Processes that hold one network together."""
        return 1 if self.apart or self.processes == 1 or self.parallel.towers == 1 else 2


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
class Turn:
    """Some steps of a process.

    Attributes:
        steps: how many.
        seconds: wall time.
        waits: seconds in which it stood and waited, by WAITS.
        cpu_s: CPU seconds of the process.
        carrying_s: those of its other threads, which carry bytes (and decode, where there is a loader).
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


@dataclass(frozen=True)
class LinkTimes:
    """Seconds of messages of LINK_BYTES that two processes exchange, and of sums (all-reduce) of as much."""

    exchange: tuple[float, ...]
    total: tuple[float, ...]


class _Clock:
    """Seconds spent in methods, by name: each is replaced by one that looks at the clock."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(WAITS, 0.0)

    def time(self, owner: type, method: str, name: str) -> None:
        original = getattr(owner, method)

        def timed(*arguments: Any) -> Any:
            begun = time.perf_counter()
            try:
                return original(*arguments)
            finally:
                self.seconds[name] += time.perf_counter() - begun
        setattr(owner, method, timed)


class _Mirror:
    """In place of model.tower_exchange.Swap: the other tower has sent already (the sizes are right, the values are not)."""

    def __init__(self, sent: Any, received: Any, tower: Any, tag: int) -> None:
        self._received = received.fill_(0.01)

    def wait(self) -> Any:
        """What is there."""
        return self._received


def _halve(where: Any) -> Any:
    """This process as tower a, its partner imagined."""
    from model import tower_exchange as meeting
    from train.parallel.topology import Topology

    setattr(meeting, "Swap", _Mirror)
    setattr(Topology, "all_reduce_sum", lambda self, values: list(values))
    return replace(where, tower_ranks=2)


def _link(where: Any) -> LinkTimes:
    """Time the way to the other process: the median of several messages of each size."""
    import torch
    import torch.distributed as dist

    from model.tower_exchange import Swap
    from model.towers import Tower

    tower = Tower(where.global_rank, 2, dist.group.WORLD)
    exchange: list[float] = []
    total: list[float] = []
    for size in LINK_BYTES:
        sent, received = (torch.ones(size // 4, device=where.device) for _ in range(2))
        ways: tuple[Callable[[], object], ...] = (lambda: Swap(sent, received, tower, 0).wait(), lambda: dist.all_reduce(sent))
        for found, work in zip((exchange, total), ways):
            times = []
            for _ in range(12):
                where.all_reduce_sum([0.0])  # both are here
                begun = time.perf_counter()
                work()
                if where.device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - begun)
            found.append(sorted(times)[len(times) // 2])
        sent.fill_(1.0)
    return LinkTimes(tuple(exchange), tuple(total))


def _steps(config: Config, where: Any, scratch: str | None) -> Callable[[bool, int], Iterator[object]]:
    """(overlap, batch) → steps without end: of noise; or of the recipe's loader and batch, given a folder for what it writes."""
    from tools.profile.network import NetworkStep

    networks = {overlap: NetworkStep(replace(config, parallel=replace(config.parallel, overlap=overlap)), where)
                for overlap in ((True, False) if where.world_size > 1 else (True,))}
    if scratch is None:
        return lambda overlap, batch: networks[overlap].synthetic(batch)

    from pathlib import Path

    from pipeline.loading.batch import Batch
    from pipeline.stats import Stats
    from train import build
    index = build.index(config, config.data.train_split)
    stats = Stats.for_index(index, config.data.square_px, config.data.train_split)
    batches = build.train_loader(config, where, index, stats, Path(scratch) / "quarantine.jsonl")

    def endless() -> Iterator[Batch]:
        while True:  # an iteration is an epoch
            yield from batches
    stream = endless()

    def fed(overlap: bool, batch: int) -> Iterator[object]:
        while True:
            yield networks[overlap](next(stream))
    return fed


def _serve(pipe: Connection, sharing: Sharing, rank: int, port: int, config: Config, loader: bool) -> None:
    """The process: take turns when told to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which ends its teams
    cores = sorted(os.sched_getaffinity(0))
    if config.machine.device != "cuda":
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", MKL_NUM_THREADS="1")  # before torch is imported
    if not sharing.apart and sharing.processes > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(sharing.processes),
                          LOCAL_WORLD_SIZE=str(sharing.processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        from model.tower_exchange import Swap
        from train.parallel.topology import Topology, process_group
        from train.parallel.gradients import Gradients

        clock = _Clock()
        clock.time(Swap, "wait", "activations")
        clock.time(Gradients, "finish", "gradients")
        clock.time(Topology, "all_reduce_sum", "loss")
        with tempfile.TemporaryDirectory() as scratch, process_group(
                towers=config.model.towers, device=config.machine.device, timeout_s=config.machine.timeout_s,
                parallel=config.parallel) as where:
            if sharing.half:
                where = _halve(where)
            steps = _steps(config, where, scratch if loader else None)
            running: dict[tuple[bool, int], Iterator[object]] = {}
            pipe.send(None)
            while (asked := pipe.recv()) is not None:
                if asked == "link":
                    pipe.send(_link(where))
                    continue
                overlap, batch, warm, count = asked
                work = running.setdefault((overlap, batch), steps(overlap, batch))
                for _ in range(warm):
                    next(work)
                where.all_reduce_sum([0.0])  # all are here
                waited, own, everybody, begun = dict(clock.seconds), time.thread_time(), time.process_time(), time.perf_counter()
                for _ in range(count):
                    next(work)
                seconds, cpu_s, own = time.perf_counter() - begun, time.process_time() - everybody, time.thread_time() - own
                pipe.send(Turn(count, seconds, {name: clock.seconds[name] - waited[name] for name in WAITS}, cpu_s, cpu_s - own))
    except EOFError:  # who told it what to do is gone
        pass
    except Exception as error:  # told to the other process, which says whose it is
        with suppress(OSError):
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))
    finally:
        pipe.close()


class Team:
    """The processes of one sharing, seen from outside.

    Args:
        sharing: the way.
        config: recipe; its batch is that of all processes together.
        loader: batches are the recipe's; else noise.

    Raises:
        RuntimeError: a process failed; with its message.
    """

    def __init__(self, sharing: Sharing, config: Config, loader: bool = False) -> None:
        self.sharing, self._batch = sharing, config.train.batch
        machine = replace(config.machine, torch_threads=1, threads=config.machine.threads or 1)
        config = replace(config, machine=machine, parallel=replace(sharing.parallel, feed=config.parallel.feed))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = int(free.getsockname()[1])
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(sharing.processes):
            pipe, other = context.Pipe()
            process = context.Process(target=_serve, args=(other, sharing, rank, port, config, loader),
                                      name=f"{sharing.name} {rank}", daemon=True)
            process.start()
            other.close()
            self._pipes.append(pipe)
            self._processes.append(process)
        try:
            self._answers(_ANSWER_S)
        except BaseException:
            self.close()
            raise

    def turn(self, steps: int, *, overlap: bool = True, batch: int = 0, warm: int = 1) -> list[Turn]:
        """Each process's turn: so many steps of a batch (0: the recipe's) of all together, after some that are not timed."""
        batch = batch or self._batch
        asked = (overlap, batch // self.sharing.processes if self.sharing.apart else batch, warm, steps)
        return self._ask(asked)

    def link(self) -> list[LinkTimes]:
        """What messages between two processes take."""
        return self._ask("link")

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()

    def _ask(self, asked: object) -> list[Any]:
        for pipe in self._pipes:
            pipe.send(asked)
        return self._answers(_ANSWER_S)

    def _answers(self, seconds: float) -> list[Any]:
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(seconds):
                raise RuntimeError(f"process {rank} of team {self.sharing.name} gave no answer for {seconds:.0f} s")
            try:
                answer = pipe.recv()
            except EOFError:
                self._processes[rank].join(5)
                code = self._processes[rank].exitcode
                raise RuntimeError(f"process {rank} of team {self.sharing.name} died (exit code {code})") from None
            if isinstance(answer, Exception):
                raise RuntimeError(f"process {rank} of team {self.sharing.name} failed: {answer}")
            answers.append(answer)
        return answers
