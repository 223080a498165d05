"""The stages of a loader that decodes, in the order of the data: plan, read, decode, normalize. B samples, S side of a square."""
import itertools
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.decoding.dali import GraphSettings
from pipeline.decoding.decoder import Decoder, Pixels
from pipeline.decoding.normalize import Normalizer
from pipeline.loading.batch import Batch, LoaderContext
from pipeline.loading.prefetch import ahead_in_threads, one_ahead
from pipeline.reading.quarantine import Policy
from pipeline.reading.source import BatchReader, Source
from pipeline.sampling.batch_plan import BatchPlan


class DecodingChain:
    """A `Chain` that reads and decodes every sample:

        steps ─plan→ BatchPlan ─read→ with its bytes ─decode→ and pixels ─normalize→ Batch

    Args:
        context: settings, device, monitor.
        plan: step → plan of the batch, without its bytes; called in the reading threads.
        source: of the bytes.
        policy: for corrupt samples.
        graph: settings of the DALI graph.
        mean_image: (3, S, S) to be subtracted, or None, see `Normalizer`.
        raw: no normalizing: images are the pixels (B, S, S, 3) uint8.
        convert: changes pixels (B, S, S, 3) uint8 before they are normalized, giving (B, 3, S, S); by default nothing does.
    """
    stages: tuple[str, ...] = ("read", "decode", "normalize")
    note = ""
    filled = 0, 0

    def __init__(self, context: LoaderContext, plan: Callable[[int], BatchPlan], source: Source, policy: Policy,
                 graph: GraphSettings, mean_image: npt.NDArray[np.float32] | None = None, *, raw: bool = False,
                 convert: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        self.context, self.plan, self.source, self.graph = context, plan, source, graph
        self.reader = BatchReader(context.index, source, policy)
        self.queue = context.machine.queue if context.device_id is None else 0
        self._mean_image, self._raw, self._convert = mean_image, raw, convert

    def read(self, steps: Iterable[int]) -> Generator[BatchPlan, None, None]:
        """The stage "read": plans with their bytes, made in `machine.read_threads` threads."""
        monitor, steps = self.context.monitor, iter(steps)
        first = next(steps, None)
        if first is None:
            return

        def read(step: int) -> BatchPlan:
            with monitor.span("read", step):
                return self.reader.read(self.plan(step))

        with self.source.open(first), closing(ahead_in_threads(read, itertools.chain([first], steps),
                                                               self.context.machine.read_threads, "reader")) as plans:
            yield from plans

    def decode(self, steps: Iterable[int]) -> Generator[tuple[BatchPlan, Pixels], None, None]:
        """The stages up to "decode": plans and pixels, as `Decoder` gives them."""
        with closing(self.read(steps)) as plans, \
                closing(Decoder(plans, self.graph, self.reader.recover, self.context.monitor,
                                whole=self._raw or self._convert is not None)) as decoder:
            for item in decoder:
                self.source.release(item[0].step)
                yield item
                del item  # the pixels: while the next ones are decoded, whoever took them decides how long they live

    def normalizer(self) -> Normalizer:
        """What makes images of this chain's pixels."""
        context = self.context
        return Normalizer(self.graph.side_px, self._mean_image, centered=context.data.mean == "image_center",
                          threads=context.threads, device=context.device)

    def batches(self, steps: Iterable[int]) -> Generator[Batch, None, None]:
        """All stages."""
        with closing(self.normalizer()) as normalizer, closing(self.decode(steps)) as decoded:
            yield from one_ahead(itertools.starmap(partial(self._begin, normalizer), decoded))

    def _begin(self, normalizer: Normalizer, plan: BatchPlan, pixels: Any) -> Callable[[], Batch]:
        step, ids, epochs = plan.step, plan.ids, plan.epochs
        if self._raw:
            return partial(self.context.batch, step, ids, epochs, pixels)
        pixels = pixels if self._convert is None else self._convert(pixels)
        return partial(self.context.normalized, step, ids, epochs, normalizer.begin(pixels, plan.augmentation))

    def until(self, stage: str, steps: Iterable[int]) -> Generator[object, None, None]:
        """The stages up to `stage`: gives plans with their bytes, plans and pixels, or batches."""
        return {"read": self.read, "decode": self.decode, "normalize": self.batches}[stage](steps)

    def fill(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Nothing is kept in memory."""

    def close(self) -> None:
        """Nothing is held outside of `batches`."""
