"""The public face of training: an index becomes an `Iterator[Batch]`. (For tests: `pipeline.squares`.)

B samples of a batch, S side of the central square, crop the side the network sees.
"""
import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from pipeline import geometry
from pipeline.ahead import Ahead
from pipeline.colour import Colour, Finish
from pipeline.config import DataConfig, LoaderConfig
from pipeline.counter import Purpose, bits
from pipeline.draws import Draws, draw, lighting_shift
from pipeline.graph import Inputs
from pipeline.index import SampleIndex
from pipeline.meter import Meter
from pipeline.parallel import cores
from pipeline.reader import Bytes, Quarantine, Reader, SampleError
from pipeline.sampler import Ids, Sampler, epoch_of
from pipeline.stats import Stats
from pipeline.stream import GraphPlan, Prepared, Stream

_SUBSTITUTES = 100  # stand-ins tried for one sample; a healthy set needs one


@dataclass(frozen=True)
class Batch:
    """What a loader gives.

    Attributes:
        images: training (B, 3, crop, crop), tests (B, 3, S, S); float32, mean subtracted, on the loader's device.
        labels: (B,) int64 class indices on the same device; -1 where unknown.
        ids: (B,) int64 sample ids, after any substitution.
        epochs: (B,) int64 epoch of each sample (0 in tests).
        step: number of the batch: counted from the start of training, or of this pass.
    """
    images: torch.Tensor
    labels: torch.Tensor
    ids: Ids
    epochs: Ids
    step: int


class Pairs:
    """(images, labels) of each batch, for loops that expect what a DataLoader gives. Iterating again gives the next epoch.

    Args:
        loader: gives the batches.
        image: what is made of a batch's images.
    """

    def __init__(self, loader: "Loader", image: Callable[[torch.Tensor], torch.Tensor] = lambda images: images) -> None:
        self._loader, self._image = loader, image

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in self._loader:
            yield self._image(batch.images), batch.labels


def one_ahead(begun: Iterator[Callable[[], Batch]]) -> Generator[Batch, None, None]:
    """The batches that are begun, each waited for only when the next one is begun too, so that threads do not run dry.

    When the next one fails, those before it still come out.
    """
    waiting: Callable[[], Batch] | None = None
    while True:
        try:
            following = next(begun)
        except BaseException as failure:
            if waiting is not None:
                yield waiting()
            if isinstance(failure, StopIteration):
                return
            raise
        if waiting is not None:
            yield waiting()
        waiting = following


class Loader:
    """What training and tests share: reading, decoding, labels, device.

    On a CPU batches are made in a thread of their own, `machine.queue` of them ahead; on a GPU the device is ahead anyway.
    """

    def __init__(self, index: SampleIndex, split: str, data: DataConfig, machine: LoaderConfig, device_id: int | None,
                 meter: Meter | None) -> None:
        if device_id is not None and not torch.cuda.is_available():
            raise ValueError(f"device_id (={device_id}) needs a CUDA device, and torch sees none; leave it out to decode on "
                             "the CPU")
        self.index, self.split, self.data, self.machine = index, split, data, machine
        self.device = torch.device("cpu") if device_id is None else torch.device("cuda", device_id)
        self._device_id = device_id
        self._ids = index.ids(split)
        if len(self._ids) == 0:
            raise ValueError(f"split (={split}) of {index.path} must have samples; it has none, see build_index.py info")
        self._reader = Reader(index, check_crc=machine.check_crc)
        self.threads = machine.threads or cores()
        self._ahead: Ahead[Batch] | None = None
        self.meter = meter or Meter()

    def _sizes(self, ids: Ids) -> geometry.Pairs:
        rows = self.index.samples[ids]
        return np.stack([rows["height"], rows["width"]], axis=1).astype(np.int64)

    def _open(self, steps: Iterator[int], batch: int, side_px: int) -> Stream:
        """The stream of the batches `steps`: of at most `batch` samples, (B, side_px, side_px, 3) uint8."""
        self.meter.enter("decode")  # DALI is being started
        return Stream(steps, self._prepare, self._mend, self.plan(batch, side_px), self.meter)

    def plan(self, batch: int, side_px: int) -> GraphPlan:
        """The plan of a graph for batches of at most `batch` samples, (B, side_px, side_px, 3)."""
        sizes = self._sizes(self._ids)
        resample = bool((sizes != geometry.resized(sizes, self.data.square_px)).any())
        return GraphPlan(batch, side_px, resample, self.machine, self.threads, self._device_id)

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Batch]:
        raise NotImplementedError

    def pairs(self) -> Pairs:
        """(images, labels) instead of batches."""
        return Pairs(self)

    def _prepare(self, step: int) -> Prepared:
        raise NotImplementedError

    def _mend(self, prepared: Prepared, row: int, reason: str) -> Prepared:
        raise NotImplementedError

    def _colour(self, side_px: int, mean_image: npt.NDArray[np.float32] | None) -> Colour:
        return Colour(side_px, mean_image, threads=self.threads, device=self.device)

    def _collect(self, stream: Stream) -> tuple[Prepared, Sequence[torch.Tensor] | torch.Tensor]:
        """The stream's next batch as `_begun` wants it: rows for a CPU's threads, all of it for a GPU."""
        return stream.rows() if self._device_id is None else stream.collect()

    def _begun(self, colour: Colour, prepared: Prepared,
               pixels: Sequence[torch.Tensor] | torch.Tensor) -> Callable[[], Batch]:
        """Begin to make a batch of its uint8 pixels, B views (3, S, S) or (B, S, S, 3); gives what waits for it."""
        if isinstance(pixels, torch.Tensor):
            whole, finish = pixels.permute(0, 3, 1, 2), prepared.finish
            return lambda: self._finished(prepared, lambda: colour.whole(whole, finish))
        images = colour.begin(pixels, prepared.finish)
        return lambda: self._finished(prepared, images)

    def _finished(self, prepared: Prepared, images: Callable[[], torch.Tensor]) -> Batch:
        self.meter.enter("colour")
        with self.meter.span("colour", prepared.step):
            made = images()
        return self._batch(prepared.step, prepared.ids, prepared.epochs, made)

    def _batch(self, step: int, ids: Ids, epochs: Ids, images: torch.Tensor) -> Batch:
        self.meter.enter("copy")
        with self.meter.span("copy", step):
            labels = torch.from_numpy(self.index.samples["label"][ids].astype(np.int64)).to(self.device)
        return Batch(images, labels, ids, epochs, step)

    def _start(self, produce: Generator[Batch, None, None]) -> Ahead[Batch]:
        return Ahead(produce, self.machine.queue if self._device_id is None else 0, self.meter)

    def _next(self, ahead: Ahead[Batch], step: int) -> Batch:
        with self.meter.waiting(step, None if self._device_id is None else torch.cuda.current_stream(self._device_id)):
            return next(ahead)

    def close(self) -> None:
        """Free threads and buffers. The loader can be used again; it starts where it was."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


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
        return draw(self._seed, epochs, ids, self._rooms(ids)[2], mirror=self.data.mirror, lighting=self.data.lighting)

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
