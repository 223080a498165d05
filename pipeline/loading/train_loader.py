"""The loader for training: endless, with epochs and a cursor; `pipeline.tiers.make_train_loader` makes it."""
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Self

from pipeline.loading.batch import LoaderContext
from pipeline.loading.loader import Chain, Loader
from pipeline.reading.quarantine import Quarantine
from pipeline.sampling.batch_plan import CropPlanner
from pipeline.sampling.sampler import Sampler


class TrainLoader(Loader, Iterator[Any]):
    """Training batches: shuffled, cropped, flipped, colour-jittered (paper §4.1), without end. Raises ValueError when a sample
    has no label. `for batch in loader` gives the batches of the current epoch, or what is left of it; the next `for` gives the
    next epoch. Prefetching crosses the boundary."""

    def __init__(self, context: LoaderContext, chain: Chain, sampler: Sampler, planner: CropPlanner,
                 quarantine: Quarantine, return_batch: bool = True) -> None:
        super().__init__(context, chain, return_batch)
        unlabelled = int((context.index.samples["label"][context.ids] < 0).sum())
        if unlabelled:
            raise ValueError(f"split (={self.split}) of {self.index.path} needs labels to train on; {unlabelled} have none")
        self.sampler, self.planner, self.quarantine = sampler, planner, quarantine
        self.step = 0  # global batches consumed since the start of training
        self._end = sampler.steps(0).stop

    @property
    def epoch(self) -> int:
        """Epoch of the next batch, from 0."""
        return self.sampler.epoch(self.step)

    def __len__(self) -> int:
        """Batches of the current epoch, consumed ones included. Every batch is full: the last of an epoch holds the first samples
        of the next one, so epochs may differ by one batch."""
        return len(self.sampler.steps(self.epoch))

    def __iter__(self) -> Self:
        self.check_process()
        self._end = self.sampler.steps(self.epoch).stop
        return self

    def __next__(self) -> Any:
        self.check_process()
        if self.step >= self._end:
            raise StopIteration
        prefetcher = self._prefetcher or self._start(range(self.step, sys.maxsize))
        try:
            batch = self.take(prefetcher, self.step)
        except BaseException:
            self.close()  # what was prefetched is lost; the next call starts again at the batch that failed
            raise
        self.step += 1
        return batch if self.return_batch else (batch.images, batch.labels)

    def state_dict(self) -> dict[str, int | str]:
        """Cursor of the batches *consumed*, however many were prefetched, and what it is valid for."""
        sampler = self.sampler
        return {"step": self.step, "seed": sampler.seed, "batch": sampler.batch, "samples": len(sampler.ids),
                "images": self.index.split_sha256(self.split), "split": self.split,
                **self.data.added_digest(), **sampler.settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume after the batches that `state` has seen, on any number of ranks. Raises ValueError when it belongs to another
        seed, batch, split or index, or to an order with other settings, or is no such state."""
        self.check_process()
        expected = self.state_dict()
        if not isinstance(state, Mapping):
            raise ValueError(f"loader state (={state!r}) must be a mapping; give what state_dict returned")
        if missing := sorted(expected.keys() - state.keys() - {"data"}):
            raise ValueError(f"loader state (={', '.join(sorted(state)) or 'empty'}) must have {', '.join(missing)}; give what "
                             "state_dict returned")
        step = state["step"]
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 1 << 53:
            raise ValueError(f"loader state step (={step!r}) must be a whole number, at least 0, below 2^53; give what "
                             "state_dict returned")
        for key, own in {"data": "", **expected}.items():
            if key != "step" and state.get(key, "") != own:
                raise ValueError(f"loader state {key} (={state.get(key, '')}) must equal this loader's (={own}); make the "
                                 "loader with the index and arguments (in training: the recipe) of the one that was saved")
        self.close()
        self.step = step
        self._end = self.sampler.steps(self.epoch).stop
