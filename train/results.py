"""Results of training steps: the device writes them into a ring, and the host reads several at once, later.

A row of the ring (W,) float64: loss and errors of the global batch; whether anything was not finite; `Flags`; then, of each
process, its share of the loss and the norm of its gradient. On several processes it is the sum of theirs.
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from train.exit_codes import NOT_FINITE, CommonError
from train.parallel.failure import enter_phase
from train.parallel.topology import Topology

_ALONE = 5  # where what single processes give begins in a row


class NotFinite(CommonError):
    """The loss or a gradient is NaN or infinite; the update was not made."""
    code = NOT_FINITE


@dataclass(frozen=True)
class Flags:
    """What any process may ask of all at a step."""
    stop: bool = False
    save_failed: bool = False


@dataclass(frozen=True)
class StepResult:
    """What a step gave, the same in all processes."""
    step: int
    lr: float
    loss: float  # mean over the global batch
    errors: int  # misclassified images of the global batch
    flags: Flags  # true where they were in any process


@dataclass(frozen=True)
class _Begun:
    """What the host knows of a step when the device begins it."""
    step: int
    lr: float
    flags: Flags  # of this process


class ResultRing:
    """Results of the last `steps` steps. `frozen`: () bool on the device, True once a step was not finite. Steps are written by
    `write`, announced by `begun`, and read by `read`, in the same order."""

    def __init__(self, steps: int, topology: Topology) -> None:
        self._topology, self.steps = topology, steps
        on_gpu = topology.device.type == "cuda"
        self._rows = torch.zeros(steps, _ALONE + 2 * topology.world_size, dtype=torch.float64, device=topology.device)
        self._host = torch.empty(self._rows.shape, dtype=torch.float64, device="cpu", pin_memory=on_gpu)
        self._event = torch.cuda.Event(blocking=True) if on_gpu else None  # blocking: the loader's threads need the core
        self._begun: list[_Begun] = []  # steps whose rows are in the ring alone
        self._copied: list[_Begun] = []  # steps whose rows are being copied to the host
        self.frozen = torch.zeros((), dtype=torch.bool, device=topology.device)

    def write(self, row: torch.Tensor, result: torch.Tensor, flags: Callable[[], Flags]) -> None:
        """Write this process's `result` of a step, (3,): its share of the mean loss, how many of its images are misclassified,
        the norm of its gradient; into `row` ((1,) float64) of the ring, summed over all processes, which call this together. No
        synchronisation of host and device. From the first result on that is not finite in any process, `frozen` is True."""
        result, first = result.double(), _ALONE + 2 * self._topology.global_rank
        total = torch.zeros_like(self._rows[0])
        total[:2] = result[:2]
        total[2] = result.isfinite().all().logical_not()
        total[first:first + 2] = result[::2]
        if not self._topology.is_single:
            asked = flags()
            total[3:5].copy_(self._topology.pinned([asked.stop, asked.save_failed]), non_blocking=True)
            dist.all_reduce(total)
        self.frozen |= total[2] > 0
        self._rows.index_copy_(0, row.long(), total[None])

    def begun(self, step: int, lr: float, flags: Flags) -> None:
        """The device has been given this step. Its row is step modulo `steps`."""
        self._begun.append(_Begun(step, lr, flags))

    def read(self, wait: bool) -> Iterator[list[StepResult]]:
        """Results that were not read before, in lists of those that came together: of all steps begun (`wait`); or else, not to
        keep the device waiting, of `steps` steps when a further one has begun. Raises NotFinite in place of the first that is
        not finite."""
        wait = wait or self.steps == 1
        yield from self._finish_copy()
        if self._begun and (wait or len(self._begun) == self.steps):
            self._host.copy_(self._rows, non_blocking=True)
            if self._event is not None:
                self._event.record()
            self._copied, self._begun = self._begun, []
        if wait:
            yield from self._finish_copy()

    def _finish_copy(self) -> Iterator[list[StepResult]]:
        copied, self._copied = self._copied, []
        if copied and self._event is not None:
            enter_phase("device wait", copied[-1].step)  # a device that hangs shows here
            self._event.synchronize()
        results, rows, towers = [], self._host.tolist() if copied else [], self._topology.tower_ranks
        for begun in copied:
            loss, errors, broken, stop, save_failed, *alone = rows[begun.step % self.steps]
            if broken:
                break
            flags = begun.flags if self._topology.is_single else Flags(stop > 0, save_failed > 0)
            # both towers of a pair have counted the same images
            results.append(StepResult(begun.step, begun.lr, loss / towers, int(errors / towers), flags))
        if results:
            yield results
        if len(results) < len(copied):
            raise NotFinite(self._name_not_finite(begun, alone))

    def _name_not_finite(self, begun: _Begun, alone: list[float]) -> str:
        for rank, (loss, norm) in enumerate(zip(alone[::2], alone[1::2])):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                break
        what = f"norm of the gradient (={norm})" if math.isfinite(loss) else f"loss (={loss})"
        process = "" if self._topology.is_single else f" of process {rank}"
        return (f"{what}{process} at step {begun.step} with learning rate {begun.lr:g} is not finite; the update was not made: "
                "lower optimizer.lr and give another --machine.name")
