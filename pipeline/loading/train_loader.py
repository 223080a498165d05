"""The public face of training: an index becomes an `Iterator[Batch]`. (For tests: `pipeline.loading.eval_loader`.)

B samples of a batch, S side of the central square, crop the side the network sees.
"""
import contextlib
import itertools
from collections.abc import Generator, Iterator
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pipeline.decoding import geometry
from pipeline.loading.batch import Batch, Loader, one_ahead
from pipeline.decoding.normalize import Finish
from pipeline.config import DataConfig, LoaderConfig
from pipeline.rng import Purpose, bits
from pipeline.sampling.augment import Draws, draw, lighting_shift
from pipeline.decoding.dali import Inputs
from pipeline.index.sample_index import SampleIndex
from pipeline.monitor import Meter
from pipeline.reading.source import Bytes, Quarantine, SampleError
from pipeline.sampling.sampler import Ids, Sampler, epoch_of
from pipeline.stats import Stats
from pipeline.decoding.decoder import Prepared

_SUBSTITUTES = 100  # stand-ins tried for one sample; a healthy set needs one


def quarantine_budget(machine: LoaderConfig, samples: int) -> int:
    """How many of `samples` may be unreadable: the share in `machine`, rounded up."""
    return int(np.ceil(machine.quarantine_budget * samples))


class TrainLoader(Loader, Iterator[Batch]):
    """Training batches: shuffled, cropped, reflected, lit (paper §4.1), without end.

    Close it, or use it in a `with`: its threads and buffers go when it is closed, or with the process, not with the last
    reference.

    `for batch in loader` gives the batches of the current epoch, or what is left of it; the next `for` gives the next
    epoch. Reading ahead goes on across the boundary.

    Args:
        index, split: the samples; each needs a label.
        data: how an image becomes a crop.
        batch: global batch, over all ranks.
        seed: of order and draws.
        stats: mean and principal components of the training set.
        machine: threads and checks; never changes a pixel.
        shard: (k, n): this rank gets rows [k·batch/n, (k+1)·batch/n) of every global batch.
        device_id: GPU that decodes and holds the batches, or None for the CPU.
        quarantine: where unreadable samples are noted; by default bounded by `machine.quarantine_budget`, without a file.
        meter: measures the loader at work; by default one of its own, `meter`.

    Raises:
        ValueError: the split, batch or shard do not fit, see `Sampler`.
        RuntimeError: an archive is missing, or too many samples are unreadable.
    """

    def __init__(self, index: SampleIndex, split: str, data: DataConfig, batch: int, seed: int, stats: Stats, *,
                 machine: LoaderConfig = LoaderConfig(), shard: tuple[int, int] = (0, 1), device_id: int | None = None,
                 quarantine: Quarantine | None = None, meter: Meter | None = None) -> None:
        super().__init__(index, split, data, machine, device_id, meter)
        unlabelled = int((index.samples["label"][self._ids] < 0).sum())
        if unlabelled:
            raise ValueError(f"split (={split}) of {index.path} must have labels to train on; {unlabelled} samples have none")
        self._sampler = Sampler(self._ids, batch, seed, shard)
        self._seed, self._stats = seed, stats.expect(data.square_px)
        self._quarantine = quarantine or Quarantine(quarantine_budget(machine, len(self._ids)))
        self._step = 0
        self._end = self._sampler.steps(0).stop

    @property
    def note(self) -> str:
        """What a person should know before it begins; mostly nothing."""
        return ""

    @property
    def step(self) -> int:
        """Global batches consumed since the start of training."""
        return self._step

    @property
    def epoch(self) -> int:
        """Epoch of the next batch, from 0."""
        return epoch_of(self._step, len(self._ids), self._sampler.batch)

    def __len__(self) -> int:
        """Batches of the current epoch, consumed ones included; epochs may differ by one."""
        return len(self._sampler.steps(self.epoch))

    def __iter__(self) -> Self:
        self._end = self._sampler.steps(self.epoch).stop
        return self

    def __next__(self) -> Batch:
        if self._step >= self._end:
            raise StopIteration
        if self._ahead is None:
            self._ahead = self._start(self._produce(self._step))
        try:
            batch = self._next(self._ahead, self._step)
        except BaseException:
            self.close()  # what was read ahead is lost; whoever goes on starts again at the batch that failed
            raise
        self._step += 1
        return batch

    def _produce(self, first: int) -> Generator[Batch, None, None]:
        """All batches from step `first` on."""
        with contextlib.closing(self._colour(self.data.crop_px, self._mean_image())) as colour, \
                contextlib.closing(self._open(itertools.count(first), self._sampler.share, self.data.crop_px)) as stream:
            yield from one_ahead(self._begun(colour, *self._collect(stream)) for _ in itertools.count())

    def _mean_image(self) -> npt.NDArray[np.float32] | None:
        return None if self.data.mean == "channel" else self._stats.mean_image_chw

    def state_dict(self) -> dict[str, int | str]:
        """Cursor of the batches *consumed*, however many were read ahead, and what it is valid for."""
        return {"step": self._step, "seed": self._seed, "batch": self._sampler.batch, "samples": len(self._ids),
                "images": self.index.split_sha256(self.split), "split": self.split}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batches that `state` has seen. Any number of ranks may do so.

        Raises:
            ValueError: the state belongs to another seed, batch, split or index.
        """
        mine = self.state_dict()
        for key in ("seed", "batch", "split", "samples", "images"):
            if state[key] != mine[key]:
                raise ValueError(f"loader state {key} (={state[key]}) must equal this loader's (={mine[key]}); "
                                 "resume with the recipe and the index the run was started with")
        self.close()
        self._step = int(state["step"])
        self._end = self._sampler.steps(self.epoch).stop

    def _rooms(self, ids: Ids) -> tuple[geometry.Pairs, geometry.Pairs, geometry.Pairs]:
        """Resized sizes, first offset of the region, and the largest step away from it, (B, 2) each."""
        resized = geometry.resized(self._sizes(ids), self.data.square_px)
        if self.data.region == "full":
            return resized, np.zeros_like(resized), resized - self.data.crop_px
        return (resized, geometry.central(resized, self.data.square_px),
                np.full_like(resized, self.data.square_px - self.data.crop_px))

    def draws(self, ids: Ids, epochs: Ids) -> Draws:
        """The draws of samples `ids` in `epochs`, both (B,); what every rank and thread would draw for them."""
        return draw(self._seed, epochs, ids, self._rooms(ids)[2], mirror=self.data.mirror, lighting=self.data.lighting,
                    lighting_epochs=self.data.lighting_epochs)

    def _prepare(self, step: int) -> Prepared:
        origins, epochs = self._sampler.take(step)
        self._reader.announce(origins)
        ids, tries = origins.copy(), np.zeros_like(origins)
        views: list[Bytes] = []
        for row in range(len(ids)):
            try:
                views.append(self._reader.read(int(ids[row])))
            except SampleError as error:
                ids[row], tries[row], view = self._substitute(error, int(origins[row]), 0, int(epochs[row]), step)
                views.append(view)
        return self._assemble(step, ids, epochs, views, origins, tries)

    def _substitute(self, error: SampleError, origin: int, tries: int, epoch: int, step: int) -> tuple[int, int, Bytes]:
        """A readable stand-in for `origin`, how many it has had, and its bytes."""
        while True:
            candidate, tries = self._stand_in(error, origin, tries, epoch, step)
            try:
                return candidate, tries, self._reader.read(candidate)
            except SampleError as other:
                error = other

    def _stand_in(self, error: SampleError, origin: int, tries: int, epoch: int, step: int) -> tuple[int, int]:
        """The next stand-in for `origin` after `tries` of them, and its number. `error` is what the last one suffers from.

        The n-th stand-in is a function of (seed, epoch, origin, n), so the same comes out whenever, on whatever rank, and
        after whatever other samples the same one fails.
        """
        for attempt in range(tries, _SUBSTITUTES):
            place = bits(self._seed, Purpose.SUBSTITUTE, epoch, origin, attempt)[0] % np.uint64(len(self._ids))
            candidate = int(self._ids[int(place)])
            if candidate != origin:
                self._quarantine.add(self.index, error, epoch=epoch, step=step, substitute=candidate)
                return candidate, attempt + 1
        raise RuntimeError(f"sample {origin} has no readable stand-in among {_SUBSTITUTES}; the last one: {error}") from error

    def _mend(self, prepared: Prepared, row: int, reason: str) -> Prepared:
        ids, tries, views = prepared.ids.copy(), prepared.tries.copy(), list(prepared.inputs.encoded)
        error = SampleError(self.index, int(ids[row]), reason)
        ids[row], tries[row], views[row] = self._substitute(error, int(prepared.origins[row]), int(tries[row]),
                                                            int(prepared.epochs[row]), prepared.step)
        return self._assemble(prepared.step, ids, prepared.epochs, views, prepared.origins, tries)

    def _assemble(self, step: int, ids: Ids, epochs: Ids, views: list[Bytes], origins: Ids, tries: Ids) -> Prepared:
        drawn = self.draws(ids, epochs)
        resized, first, _ = self._rooms(ids)
        offsets = first + np.stack([drawn.top, drawn.left], axis=1)
        regions = geometry.regions(self._sizes(ids), resized, offsets, self.data.crop_px)
        return Prepared(step, ids, epochs, Inputs(views, regions), self._finish(drawn), origins, tries)

    def _finish(self, drawn: Draws, *, cut: bool = False) -> Finish:
        """What makes images of pixels: of crops, or (`cut`) of whole squares from which the crop is yet to be cut."""
        zeros = np.zeros_like(drawn.top)
        shift = lighting_shift(drawn.alphas, self._stats.eigenvalues, self._stats.eigenvectors)
        place = drawn.top, drawn.left, drawn.mirror
        if self.data.mean == "channel":
            shift -= self._stats.channel_mean
        elif self.data.mean == "image_center":
            middle = np.full_like(drawn.top, (self.data.square_px - self.data.crop_px) // 2)
            place = middle, middle, np.zeros_like(drawn.mirror)
        return Finish(drawn.top if cut else zeros, drawn.left if cut else zeros, drawn.mirror, *place, shift)
