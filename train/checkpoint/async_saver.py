"""Checkpoints that are written while training goes on.

`Saver.save` copies the tensors and returns; a thread writes the copies (train/checkpoint/checkpoint.py), with a process group of
its own, so
that its collectives never come between those of training. No process waits for another: not even for the slowest disk.
One checkpoint is on its way at a time. `wait` says that it is there, everywhere, or raises what kept it from being written; so
does the next `save`. `failed` tells before.

Not dcp.async_save: its future ends before manifest, rename and pruning, which would need a thread, and a group, all the same.
"""

from __future__ import annotations

import dataclasses
import datetime
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Mapping, Optional, Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from train.checkpoint import checkpoint
from train.parallel.topology import Topology
from train.parallel.watchdog import of_a_collective


class Saver:
    """Writes the checkpoints of a run, one after the other. All processes make one together, and call it alike.

    Args:
        root: folder of the run's checkpoints.
        where: this process.
        keep_last: checkpoints kept besides the best one.
        timeout_s: seconds that one process waits for another inside a save.
    """

    def __init__(self, root: Path, where: Topology, keep_last: int, timeout_s: float) -> None:
        self._root, self._keep_last = root, keep_last
        self._gpu = where.device if where.device.type == "cuda" else None
        self._copies: dict[str, torch.Tensor] = {}
        self._thread: Optional[threading.Thread] = None
        self._failure: Optional[BaseException] = None
        self._group: Optional[dist.ProcessGroup] = None
        mesh = where.mesh
        if not where.is_alone:
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
            if self._gpu is not None:  # the copies lie in host memory
                # It only says who holds what: with a backend, it would make NCCL communicators that nobody uses.
                mesh = DeviceMesh("cpu", torch.arange(where.ranks).view(where.data_ranks, where.tower_ranks),
                                  mesh_dim_names=("data", "tower"), _init_backend=False)
        self._where = dataclasses.replace(where, device=torch.device("cpu"), mesh=mesh)

    def save(self, name: str, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, Sequence[int]],
             state: Mapping[str, Any], attach: Callable[[Path], None]) -> None:
        """A checkpoint of this moment, as in `checkpoint.save`; older ones are pruned when it is there.

        `state` and what `attach` reads must not change afterwards.

        Raises:
            RuntimeError: the one before could not be written.
        """
        self.wait()
        self._copy(tensors)
        arrived = torch.cuda.current_stream(self._gpu).record_event() if self._gpu is not None else None
        copies = {key: self._copies[key] for key in tensors}

        def write() -> None:
            try:
                if arrived is not None:
                    torch.cuda.set_device(self._gpu)  # a new thread begins with device 0, and torch looks at its streams
                    arrived.synchronize()
                saved = checkpoint.save(self._root, name, copies, shapes, state, attach, self._where, self._group)
                if self._where.is_main:
                    checkpoint.prune(self._root, self._keep_last, saved)
            except BaseException as error:
                self._failure = error

        # No daemon: Python would end such a thread in the middle of torch's C++, which aborts the process (exit code -6).
        self._thread = threading.Thread(target=write, name=f"save {name}")
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the last checkpoint could not be written; `wait` raises why, as soon as all processes know."""
        return self._failure is not None

    def wait(self) -> None:
        """Until the last checkpoint is there.

        Raises:
            RuntimeError: it could not be written, here or in another process; raised once.
        """
        self._join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Let what is on its way end; what it failed of is only said, because the run ends, perhaps with an error of its own.
        Of a process that was lost meanwhile the watchdog speaks."""
        self._join()
        if self._failure is not None and not of_a_collective(self._failure):
            print(f"error: {self._failure}", file=sys.stderr)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _copy(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Into host memory that is kept from one save to the next: new pages would cost as much as the copy."""
        for name, tensor in tensors.items():
            copy = self._copies.get(name)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=self._gpu is not None)
                self._copies[name] = copy
            copy.copy_(tensor.detach(), non_blocking=True)
