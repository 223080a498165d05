"""`Loader`, base class of the loaders, and `Chain`, its stages, each an iterator over the one before."""
import itertools
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from threading import Thread
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from pipeline.decoding.graph import DecodeSettings
from pipeline.decoding.decoder import Decoder, Pixels
from pipeline.decoding.normalize import Normalizer
from pipeline.loading.batch import Batch, LoaderContext
from pipeline.loading.prefetch import Prefetcher, SideStream, ahead_in_threads, one_ahead
from pipeline.reading.quarantine import Policy, SampleError
from pipeline.reading.source import Source
from pipeline.sampling.batch_plan import BatchPlan


class Chain(ABC):
    """What makes batches: a `DecodingChain`, or a `pipeline.resident.chain.ResidentChain`, whose store takes the place of reading
    and decoding."""
    stages: tuple[str, ...]  # names of those that `until` can end after, in order; they are the monitor's
    queue: int  # finished batches that may wait for the consumer; 0: it makes them itself
    note = ""  # what a person should know before it begins

    @abstractmethod
    def batches(self, steps: range) -> Generator[Batch, None, None]:
        """The batches of these steps; what the stages hold is freed when the generator is closed."""

    def until(self, stage: str, steps: range) -> Generator[object, None, None]:
        """The stages up to and including `stage`, to measure them: they run at once as in `batches`, and what the last one makes
        of each step comes out."""
        assert stage == self.stages[-1]
        return self.batches(steps)

    def fill(self) -> None:
        """Load into memory now what else the first epoch would."""

    def close(self) -> None:
        """Finish what is under way outside of `batches`."""


class DecodingChain(Chain):
    """A `Chain` that reads and decodes every sample:

        steps ─plan→ BatchPlan ─read→ with its bytes ─decode→ and pixels ─normalize→ Batch

    `plan` is called in the reading threads; `policy` is for corrupt samples; `mean_image` (3, S, S) or None, see `Normalizer`;
    `raw`: no normalizing, images are the pixels (B, S, S, 3) uint8; `convert` changes pixels (B, S, S, 3) uint8 before they are
    normalized, giving (B, 3, S, S)."""
    stages: tuple[str, ...] = ("read", "decode", "normalize")  # on a GPU the graph of DALI does what the last one does

    def __init__(self, context: LoaderContext, plan: Callable[[int], BatchPlan], source: Source, policy: Policy,
                 settings: DecodeSettings, mean_image: npt.NDArray[np.float32] | None = None, *, raw: bool = False,
                 convert: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        self.context, self.plan, self.source, self.settings, self.queue = context, plan, source, settings, context.machine.queue
        self.normalizer = partial(context.normalizer, settings.side_px, mean_image)
        if context.device_id is not None and not raw and convert is None:
            self.settings, self.stages = replace(settings, finish=context.finish(mean_image)), ("read", "decode")
        self.policy, self._raw, self._convert = policy, raw, convert
        self._undecodable: dict[int, str] = {}  # id → reason; these are not decoded again

    def read(self, steps: Iterable[int]) -> Generator[BatchPlan, None, None]:
        """The stage "read": plans with their bytes, made in `machine.read_threads` threads."""
        steps = iter(steps)
        first = next(steps, None)
        if first is None:
            return
        threads = self.context.machine.read_threads
        with self.source.open(first), \
                closing(ahead_in_threads(self._read, itertools.chain([first], steps), threads, "reader")) as plans:
            yield from plans

    def _read(self, step: int) -> BatchPlan:
        with self.context.monitor.span("read", step):
            plan = self.plan(step)
            plan = replace(plan, encoded=self.source.read_batch(plan.ids, plan.epochs))
            while SampleError in (kinds := list(map(type, plan.encoded))):
                row = kinds.index(SampleError)
                plan = self._replace(plan, row, plan.encoded[row])
            return plan

    def _without_undecodable(self, plan: BatchPlan) -> BatchPlan:
        """A plan that was read, without the samples known to be undecodable: as it would be after decoding them again."""
        row = 0
        while self._undecodable and row < len(plan.ids):
            if (reason := self._undecodable.get(id := int(plan.ids[row]))) is None:
                row += 1
            else:
                plan = self._replace(plan, row, SampleError(self.context.index, id, reason))
        return plan

    def recover(self, plan: BatchPlan, row: int, reason: str) -> BatchPlan:
        """A plan that was read, without the sample of `row`, which cannot be decoded."""
        id = int(plan.ids[row])
        plan = self._replace(plan, row, SampleError(self.context.index, id, reason))
        self._undecodable[id] = reason  # not before: the policy may refuse
        return plan

    def _replace(self, plan: BatchPlan, row: int, error: SampleError) -> BatchPlan:
        """A plan that was read, with another sample in `row`, or none."""
        encoded = plan.encoded[:row] + plan.encoded[row + 1:]
        (pool,) = self.source.pools(plan.origins[row:row + 1], plan.epochs[row:row + 1])
        while True:
            plan = self.policy(plan, row, error, pool)
            if len(plan.ids) == len(encoded):
                return replace(plan, encoded=encoded)
            try:
                encoded.insert(row, pool.read(int(plan.ids[row])))
                return replace(plan, encoded=encoded)
            except SampleError as other:
                error = other

    def decode(self, steps: Iterable[int]) -> Generator[tuple[BatchPlan, Pixels], None, None]:
        """The stages up to "decode": plans and pixels, as `Decoder` gives them."""
        whole = self._raw or self._convert is not None
        with closing(self.read(steps)) as plans, \
                closing(Decoder(map(self._without_undecodable, plans), self.settings, self.recover, self.context.monitor,
                                whole=whole)) as decoder:
            for item in decoder:
                self.source.release(item[0].step)
                yield item
                del item  # the pixels: while the next ones are decoded, whoever took them decides how long they live

    def batches(self, steps: Iterable[int]) -> Generator[Batch, None, None]:
        if self.settings.finish is not None:  # what is decoded is finished
            with closing(self.decode(steps)) as decoded:
                for plan, images in decoded:
                    yield self.context.batch(plan.step, plan.ids, plan.epochs, images)  # type: ignore[arg-type]  # a tensor
                    del images
            return
        with closing(self.normalizer()) as normalizer, closing(self.decode(steps)) as decoded:
            yield from one_ahead(itertools.starmap(partial(self._begin, normalizer), decoded))

    def _begin(self, normalizer: Normalizer, plan: BatchPlan, pixels: Any) -> Callable[[], Batch]:
        step, ids, epochs = plan.step, plan.ids, plan.epochs
        if self._raw:
            return partial(self.context.batch, step, ids, epochs, pixels)
        pixels = pixels if self._convert is None else self._convert(pixels)
        return partial(self.context.normalized, step, ids, epochs, normalizer.begin(pixels, plan.augmentation))

    def until(self, stage: str, steps: Iterable[int]) -> Generator[object, None, None]:
        """Gives plans with their bytes, plans and pixels, or batches."""
        return {"read": self.read, "decode": self.decode, "normalize": self.batches}[stage](steps)


def _free(prefetcher: Prefetcher[Any], chain: Chain) -> None:
    prefetcher.close()
    chain.close()


class Loader(ABC):
    """Batches of a chain: (images, labels), or with `return_batch` a `Batch`. Threads and decoders start with the first batch,
    not before: a CUDA graph must be captured while none are at work (DALI, freeing memory, waits for the whole device), before
    that or after `close`. Close it, or use it in a `with`: one that is dropped is closed too, but in its own time. It works in
    the process that made it only: threads do not outlive a fork; what takes batches raises RuntimeError elsewhere."""
    _prefetcher: Prefetcher[Any] | None = None

    def __init__(self, context: LoaderContext, chain: Chain, return_batch: bool) -> None:
        self.context, self.chain, self.monitor, self.return_batch = context, chain, context.monitor, return_batch
        self.index, self.split, self.data, self.machine = context.index, context.split, context.data, context.machine
        self.device, self.threads, self.labels, self.note = context.device, context.threads, context.labels, chain.note
        self.fill = chain.fill
        self._process = os.getpid()
        # Where nothing is made ahead, the consumer's own stream will do.
        self._side = SideStream(self.device) if self.device.type == "cuda" and chain.queue else None

    def path(self, id: int) -> str:
        """Where a sample lies: the path of its file, or of its archive followed by its name in it."""
        return self.index.location(id)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[Any]: ...

    def check_process(self) -> None:
        """Raises RuntimeError in another process than the one that made it."""
        if os.getpid() != self._process:
            raise RuntimeError(f"loader of process {self._process} cannot be used in process {os.getpid()}, forked from it, "
                               "where its threads are not; make one there, in a process that was spawned")

    def _start(self, steps: range) -> Prefetcher[Any]:
        self._prefetcher = self.ahead(self.chain.batches(steps))
        return self._prefetcher

    def ahead(self, batches: Generator[Batch, None, None]) -> Prefetcher[Any]:
        """What `take` takes batches from: made ahead of need by a thread, on a GPU on a stream of its own."""
        return Prefetcher(batches if self._side is None else self._side.made(batches), self.chain.queue, self.monitor)

    def take(self, prefetcher: Prefetcher[Any], step: int) -> Batch:
        """The next batch, for this thread's current stream; the wait for it is counted as one for batch `step`."""
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        with self.monitor.waiting(step, stream, on_device=self.chain.stages[-1]):
            made = next(prefetcher)
            return made if self._side is None else self._side.take(made)

    def close(self) -> None:
        """Free threads and buffers. The loader can be used again; it starts where it was."""
        if os.getpid() != self._process:
            return  # its threads and buffers are the other process's
        prefetcher, self._prefetcher = self._prefetcher, None
        if prefetcher is not None:
            prefetcher.close()
        self.chain.close()

    def __del__(self) -> None:
        # The garbage collector may run anywhere, also in a thread that closing would wait for, or with a lock that it needs.
        prefetcher = self._prefetcher
        # Where the interpreter ends, threads are closed already, and a new one would be waited for without end.
        if prefetcher is not None and os.getpid() == self._process and not sys.is_finalizing():
            with suppress(RuntimeError):
                Thread(target=_free, args=(prefetcher, self.chain), name="closer", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
