"""One training step: forward, loss, backward, gradient all-reduce, check for NaN and infinity, optimizer update.

The host begins steps and reads their results later (train/results.py). So the step is a function of tensors on the device alone:
images, labels, and the host's numbers, such as learning rates; on a GPU it is captured as one CUDA graph (machine.step). A result
that is not finite freezes the weights there: when the host reads it, they are still those of the last good step.
"""
from collections.abc import Callable, Iterator
from typing import Optional

import torch
from torch.nn import functional

from pipeline.loading.batch import Batch
from train import build
from train.config import Config
from train.optimizer import Schedule, build_optimizer, set_lr
from train.parallel.failure import enter_phase
from train.parallel.gradients import GradientReducer
from train.parallel.topology import Topology
from train.results import Flags, ResultRing, StepResult

SYNC_STEPS = 4  # by default, on a GPU
WARM_UP = 3  # steps before a capture, in which libraries choose algorithms and Triton compiles


class TrainStep:
    """The network, its optimizer and learning rate schedule, and the step that updates them."""

    def __init__(self, config: Config, topology: Topology) -> None:
        self.network = build.network(config, topology)
        self.schedule = Schedule(config.schedule, config.optimizer, config.train.batch)
        self.optimizer = build_optimizer(self.network, config.optimizer, self.schedule.layers, topology.group("tower"))
        self.autocast = build.autocast(config, topology)
        self._config, self._topology = config, topology
        self._gradients = GradientReducer(self.network, topology, config.parallel.overlap)
        on_gpu = topology.device.type == "cuda"
        self._ring = ResultRing(config.machine.sync_steps or (SYNC_STEPS if on_gpu else 1), topology)
        self._capturable = on_gpu and topology.is_single
        self._captured: Optional[CapturedStep] = None
        if config.machine.step == "captured" and not self._capturable:
            raise ValueError(f"machine.step (=captured) needs a single process with a GPU, not {topology.world_size} on "
                             f"{topology.device.type}; use auto")

    def prepare(self) -> str:
        """Capture the step, if it is to be. Changes no weight. Call it before the loader gives a batch: DALI frees tensors in a
        thread of its own, which synchronises the device, and would end the process during a capture. Returns what a person should
        know, or nothing."""
        failure = ""
        device, batch, px = self._topology.device, self._config.train.batch, self._config.model.input_px
        if self._capturable and self._config.machine.step != "eager":
            self.network.train()
            last = torch.channels_last if self._config.machine.channels_last else torch.contiguous_format
            images = torch.zeros(batch, 3, px, px, device=device).contiguous(memory_format=last)
            labels = torch.zeros(batch, dtype=torch.int64, device=device)
            self._ring.frozen.fill_(True)
            try:
                self._captured = CapturedStep(self._compute, images, labels, self._numbers(0).to(device))
            except CaptureFailed as error:
                if self._config.machine.step == "captured":
                    raise
                failure = f", as it {error}"
            finally:
                self._ring.frozen.fill_(False)
        if device.type != "cuda":
            return ""
        how = "captured as a CUDA graph" if self._captured else f"eager{failure}" if self._capturable else (
            f"eager: what {self._topology.world_size} processes exchange is not captured")
        return f"step: {how}; results are read every {self._ring.steps} steps"

    def __call__(self, batch: Batch, epoch: int, flags: Callable[[], Flags] = Flags) -> None:
        """Begin to update the network by this process's rows of a global batch. All processes call it together. `flags` is called
        after the backward pass; what it gives travels with the sums of loss and errors, and costs no communication of its own."""
        lr = self.schedule.lr(batch.step, epoch)
        set_lr(self.optimizer, lr, self.schedule.layer_rates(epoch))
        numbers = self._numbers(batch.step)
        if self._captured is not None:
            enter_phase("captured step")
            self._captured(batch.images, batch.labels, numbers)
        else:
            self._compute(batch.images, batch.labels, numbers.to(self._topology.device, non_blocking=True), flags)
        self._ring.begun(batch.step, lr, flags())

    def results(self, wait: bool = True) -> Iterator[list[StepResult]]:
        """Results not given before, in lists of those that were read together: of all steps begun (`wait`), or of those that can
        be had without keeping the device waiting. Raises NotFinite in place of the first that is not finite, in all processes,
        naming step and learning rate."""
        return self._ring.read(wait)

    def tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, tuple[int, ...]]]:
        """Weights and velocities as a checkpoint holds them, and their canonical shapes."""
        return build.parameters(self.network, self._config, self.optimizer)

    def _numbers(self, step: int) -> torch.Tensor:
        """What the host decides of a step, float64, pinned: row of the ring, `PaperSGD.rates`, words of the dropout masks."""
        words = self.network.dropout_words(step).flatten().tolist()
        return self._topology.pinned([step % self._ring.steps, *self.optimizer.rates(), *words])

    def _compute(self, images: torch.Tensor, labels: torch.Tensor, numbers: torch.Tensor,
                 flags: Callable[[], Flags] = Flags) -> None:
        """The step on the device: it takes no value from there. `numbers`: as `_numbers` gives them."""
        row, rates, words = numbers.tensor_split([1, 1 + len(self.optimizer.rates())])
        result = self._forward_backward(images, labels, words.to(torch.int32).view(-1, 4))
        self._ring.write(row, result, flags)
        enter_phase("update")
        self.optimizer.step(rates, self._ring.frozen)

    def _forward_backward(self, images: torch.Tensor, labels: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Compute the gradients of the global batch's mean loss, in micro-batches. Returns (3,): this process's share of the mean
        loss, how many of its images are misclassified, the norm of its gradient."""
        pieces, size, device = self._config.parallel.accumulate, self._config.train.batch, self._topology.device
        row = self._topology.data_rank * len(labels)  # of the global batch
        loss, errors = torch.zeros((), device=device), torch.zeros((), device=device)
        self.optimizer.zero_grad(set_to_none=True)
        for piece, (some, theirs) in enumerate(zip(images.tensor_split(pieces), labels.tensor_split(pieces))):
            enter_phase("forward")
            with self.autocast():
                logits = self.network(some, rows=(row, size), words=words)
            piece_loss = functional.cross_entropy(logits, theirs, reduction="sum") / size
            enter_phase("backward")
            self._gradients.begin(last=piece == pieces - 1)
            piece_loss.backward()
            row += len(theirs)
            loss = loss + piece_loss.detach()
            errors += (logits.detach().argmax(1) != theirs).sum()
        return torch.stack([loss, errors, self._gradients.finish()])


class CaptureFailed(RuntimeError):
    """The step is none that a CUDA graph can hold."""


class CapturedStep:
    """`compute`, a function of tensors on a GPU, as a CUDA graph. `inputs`: its own, into which each call's are copied."""

    def __init__(self, compute: Callable[..., None], *inputs: torch.Tensor) -> None:
        self._inputs, self._graph = inputs, torch.cuda.CUDAGraph()
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                compute(*inputs)
        current.wait_stream(stream)
        try:
            with torch.cuda.graph(self._graph):
                compute(*inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CaptureFailed(f"could not be captured ({str(error).splitlines()[0]}); use --machine.step=eager") from error

    def __call__(self, *inputs: torch.Tensor) -> None:
        """Begin the step with other inputs, of the same shapes, on the GPU or in pinned memory."""
        for own, given in zip(self._inputs, inputs, strict=True):
            assert own.shape == given.shape, f"{tuple(given.shape)} is not the captured {tuple(own.shape)}"
            own.copy_(given, non_blocking=True)
        self._graph.replay()
