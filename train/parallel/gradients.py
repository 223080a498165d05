"""All-reduce of gradients over the processes that hold the same parameters, overlapped with the backward pass.

A large gradient is sent as soon as it is complete; small ones (biases, conv1) are sent together. AlexNet's fully connected
layers, 94% of the bytes, are complete first, and its convolutions, 90% of the work, come after: nearly all is hidden.

Not DistributedDataParallel: it regroups its buckets after the first step, hence adds in another order there, and a run that is
resumed with more than two data ranks is no longer bit-exact (4 ranks: a fifth of the entries differ).
"""
from dataclasses import dataclass, field
from typing import Optional

import torch
import torch.distributed as dist

from model.alexnet import AlexNet
from train.parallel.topology import Topology

SMALL_BYTES = 1 << 20  # gradients below are copied into one tensor; others are sent where they lie


@dataclass
class _Bucket:
    """Parameters whose gradients are sent together in `group`."""
    group: dist.ProcessGroup
    parameters: list[torch.nn.Parameter] = field(default_factory=list)
    incomplete: int = 0
    flat: Optional[torch.Tensor] = None  # the gradients, when there are several
    work: Optional[dist.Work] = None

    def send(self) -> None:
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        assert len(grads) == len(self.parameters), "backward has missed a parameter"
        if len(grads) > 1:
            self.flat = torch.cat([grad.flatten() for grad in grads], out=self.flat)
        self.work = dist.all_reduce(grads[0] if len(grads) == 1 else self.flat, group=self.group, async_op=True)

    def receive(self) -> None:
        assert self.work is not None
        self.work.wait()
        self.work = None
        if len(self.parameters) > 1:
            assert self.flat is not None
            for parameter, total in zip(self.parameters, self.flat.split([p.numel() for p in self.parameters])):
                assert parameter.grad is not None
                parameter.grad.copy_(total.view_as(parameter.grad))


class GradientReducer:
    """Sums gradients over processes: of parameters that are split between towers over "data", of others over all. Each backward
    between `begin` and `finish` adds to them; those of the last one are sent, with `overlap` each as soon as it is complete, else
    all in `finish`, with the same sums."""

    def __init__(self, network: AlexNet, topology: Topology, overlap: bool) -> None:
        self._overlap, self._last = overlap, True
        self._parameters = list(network.parameters())
        self._norms: list[torch.Tensor] = []
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[torch.nn.Parameter, _Bucket] = {}
        small: dict[int, _Bucket] = {}
        for name, parameter in reversed(list(network.named_parameters())):  # as backward completes them
            parameter.register_post_accumulate_grad_hook(self._complete)
            in_both_towers = network.tower_of(name).count == 1 and topology.tower_ranks > 1
            group = dist.group.WORLD if in_both_towers else topology.group("data")
            if group is None:
                continue
            bucket = _Bucket(group)
            if parameter.numel() * parameter.element_size() >= SMALL_BYTES:
                self._buckets.append(bucket)
            else:
                bucket = small.setdefault(id(group), bucket)
            bucket.parameters.append(parameter)
            self._bucket_of[parameter] = bucket
        self._buckets += small.values()

    def begin(self, last: bool) -> None:
        """Before a backward; `last` when it completes the gradients of this step."""
        self._last, self._norms = last, []
        for bucket in self._buckets:
            bucket.incomplete = len(bucket.parameters)

    def _complete(self, parameter: torch.Tensor) -> None:
        bucket = self._bucket_of.get(parameter)  # type: ignore[call-overload]
        if not self._last or bucket is None:
            return
        assert parameter.grad is not None
        # Before it is summed, so that what is not finite is known by its process. The root of squares: the largest entry would be
        # 70 times slower to find on a CPU (no vector instructions), and a gradient whose squares overflow (1e19) is as lost.
        self._norms.append(torch.linalg.vector_norm(parameter.grad))
        bucket.incomplete -= 1
        if bucket.incomplete == 0 and self._overlap:
            bucket.send()

    def finish(self) -> torch.Tensor:
        """Wait for all sums. Returns the norm of this process's own gradient, before it was summed: a scalar tensor."""
        for bucket in self._buckets:
            if bucket.work is None:
                bucket.send()
        for bucket in self._buckets:
            bucket.receive()
        unsent = [parameter.grad for parameter in self._parameters
                  if parameter not in self._bucket_of and parameter.grad is not None]  # all norms in one launch
        return torch.linalg.vector_norm(torch.stack([*self._norms, *(torch._foreach_norm(unsent) if unsent else ())]))
