"""`Decoder`: decodes batches in order; a sample that fails to decode is found and taken out by the policy. B samples."""
import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from pipeline.decoding.dali import DecodeError, RegionPipeline
from pipeline.decoding.graph import DecodeSettings
from pipeline.monitor import Monitor, decoder_threads, threads
from pipeline.sampling.batch_plan import BatchPlan

Pixels = torch.Tensor | Sequence[torch.Tensor]


class Decoder(Iterator[tuple[BatchPlan, Pixels]]):
    """Gives each of the `plans` (with their bytes, maybe without end) with its pixels: `whole`, what `RegionPipeline.collect`
    gives, as always on a GPU; else B views (3, S, S) uint8, each to be used before the same thread asks for another. Batches of
    which nothing is left are passed over. `recover`: (plan, row, reason) → the plan without that row's sample, which cannot be
    decoded; may raise instead."""

    def __init__(self, plans: Iterator[BatchPlan], settings: DecodeSettings, recover: Callable[[BatchPlan, int, str], BatchPlan],
                 monitor: Monitor, *, whole: bool = False) -> None:
        self._plans, self._settings, self._recover, self._monitor = plans, settings, recover, monitor
        self._rows = not whole and not settings.in_dali
        self._waiting: deque[BatchPlan] = deque()  # pulled by DALI, not yet collected
        monitor.enter("decode")  # DALI is being started
        self._before: set[int] | None = threads()
        self._pipeline = RegionPipeline(self._pull(), settings)

    def _pull(self) -> Iterator[BatchPlan]:
        self._monitor.enter("read")
        for plan in self._plans:
            if len(plan.ids):
                self._waiting.append(plan)
                self._monitor.enter("decode")
                yield plan
                self._monitor.enter("read")
        self._monitor.enter("decode")

    def __next__(self) -> tuple[BatchPlan, Pixels]:
        """The next batch. Raises StopIteration when none is left, and whatever the plans or `recover` raise, in its place."""
        while True:
            self._monitor.enter("decode")
            try:
                with self._monitor.span("decode", self._waiting[0].step if self._waiting else -1):
                    pixels: Any = self._pipeline.rows() if self._rows else self._pipeline.collect()
            except DecodeError as error:
                plan, pixels = self._one_by_one(self._waiting.popleft(), error)
                if not len(plan.ids):
                    continue
                pixels = list(pixels.permute(0, 3, 1, 2)) if self._rows else pixels
            else:
                plan = self._waiting.popleft()
                if self._before is not None:
                    self._monitor.decoders |= decoder_threads(self._before)
                    self._before = None
            return plan, pixels

    def _one_by_one(self, plan: BatchPlan, error: DecodeError) -> tuple[BatchPlan, Any]:
        """Decode sample by sample: DALI does not say which one failed, and has lost the whole batch."""
        slot: list[BatchPlan] = []
        pixels: list[torch.Tensor] = []
        recovered = False
        settings = replace(self._settings, batch=1, machine=replace(self._settings.machine, prefetch=1))
        with contextlib.closing(RegionPipeline(iter(slot.pop, None), settings)) as single:
            while len(pixels) < len(plan.ids):
                slot.append(plan.rows([len(pixels)]))
                try:
                    pixels.append(single.collect().clone())
                except DecodeError as failure:
                    plan, recovered = self._recover(plan, len(pixels), failure.reason), True
        if not recovered:
            raise error  # every sample decodes alone: the fault lies elsewhere
        return plan, torch.cat(pixels) if pixels else torch.empty(0)

    def close(self) -> None:
        """Free the pipeline; whoever made the plans closes them."""
        self._pipeline.close()
