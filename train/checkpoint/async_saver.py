"""Checkpoints written in a thread while training continues: `AsyncSaver.save` copies the tensors to host memory and returns; a
thread writes the copies, with a process group of its own, so that its collectives never mix with those of training. No process
waits for another, not even for the slowest disk. One checkpoint is written at a time.

Not dcp.async_save: its future ends before manifest, rename and pruning, which would need a thread and a group all the same.
"""
import contextlib
import dataclasses
import datetime
import sys
from concurrent import futures
from pathlib import Path
from typing import Any, Callable, Mapping, Optional, Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from train.checkpoint import checkpoint
from train.parallel.failure import is_collective_error
from train.parallel.topology import Topology


class AsyncSaver:
    """Writes the checkpoints of a run into `root`, one after the other, and keeps the best and the last `keep_last`. All
    processes make one together, and call it alike; one waits for another inside a save for up to `timeout_s`."""

    def __init__(self, root: Path, topology: Topology, keep_last: int, timeout_s: float) -> None:
        self._root, self._keep_last = root, keep_last
        self._gpu = topology.device if topology.device.type == "cuda" else None
        self._copies: dict[str, torch.Tensor] = {}
        # Its thread is no daemon: Python would end such a one inside torch's C++, which aborts the process (exit code -6).
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="save")
        self._pending: Optional[futures.Future[None]] = None
        self._group: Optional[dist.ProcessGroup] = None
        mesh = topology.mesh
        if not topology.is_single:
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
            if self._gpu is not None:  # the copies lie in host memory
                # This mesh only says who holds what: with a backend, it would make NCCL communicators that nobody uses.
                mesh = DeviceMesh("cpu", torch.arange(topology.world_size).view(topology.data_ranks, topology.tower_ranks),
                                  mesh_dim_names=("data", "tower"), _init_backend=False)
        self._topology = dataclasses.replace(topology, device=torch.device("cpu"), mesh=mesh)

    def save(self, name: str, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, Sequence[int]],
             state: Mapping[str, Any], attach: Callable[[Path], None],
             written: Callable[[], object] = lambda: None) -> None:
        """Start a checkpoint of this moment, as in `checkpoint.save`; when it is there, `written` is called in the main process
        and older ones are pruned. `state` and what `attach` reads must not change afterwards. Raises RuntimeError when the last
        one could not be written."""
        self.wait()
        self._copy(tensors)
        copied = torch.cuda.current_stream(self._gpu).record_event() if self._gpu is not None else None
        copies = {key: self._copies[key] for key in tensors}

        def write() -> None:
            if copied is not None:
                torch.cuda.set_device(self._gpu)  # a new thread begins with device 0, and torch looks at its streams
                copied.synchronize()
            saved = checkpoint.save(self._root, name, copies, shapes, state, attach, self._topology, self._group)
            if self._topology.is_main:
                written()
                try:
                    checkpoint.prune(self._root, self._keep_last, saved)
                except OSError as error:  # on NFS a file of one that is being read cannot be removed
                    with contextlib.suppress(OSError):
                        print(f"warning: old checkpoints (={self._root}) could not all be removed ({error.strerror}); they stay "
                              "until a later save can", file=sys.stderr)

        self._pending = self._thread.submit(write)

    @property
    def failed(self) -> bool:
        """Whether the last checkpoint could not be written; `wait` raises the reason."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Wait until the last checkpoint is written. Raises RuntimeError, once, when it could not be, here or elsewhere."""
        if self._pending is not None:
            futures.wait([self._pending])
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Let a save under way finish. Its failure is printed, not raised: the run ends, perhaps with an error of its own."""
        self._thread.shutdown()
        error = self._pending.exception() if self._pending is not None else None  # a lost process: training's collectives say so
        if error is not None and not is_collective_error(error):
            print(f"warning: {error}", file=sys.stderr)  # beside the one error of the run

    def _copy(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy to host memory that is kept from one save to the next: new pages would cost as much as the copy."""
        for name, tensor in tensors.items():
            copy = self._copies.get(name)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=self._gpu is not None)
                self._copies[name] = copy
            copy.copy_(tensor.detach(), non_blocking=True)
