"""The public face of training: an index becomes an `Iterator[Batch]`. (For tests: `pipeline.squares`.)

B samples of a batch, S side of the central square, crop the side the network sees.
"""
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from pipeline import geometry
from pipeline.config import DataConfig, LoaderConfig
from pipeline.counter import Purpose, bits
from pipeline.draws import Draws, draw, lighting_shift
from pipeline.graph import Inputs
from pipeline.index import SampleIndex
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


class Loader:
    """What training and tests share: reading, labels, device, the stream."""

    def __init__(self, index: SampleIndex, split: str, data: DataConfig, machine: LoaderConfig, device_id: int | None) -> None:
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
        self._stream: Stream | None = None

    def _sizes(self, ids: Ids) -> geometry.Pairs:
        rows = self.index.samples[ids]
        return np.stack([rows["height"], rows["width"]], axis=1).astype(np.int64)

    def _plan(self, batch: int, side_px: int, *, raw: bool = False,
              mean_image: npt.NDArray[np.float32] | None = None) -> GraphPlan:
        return GraphPlan(batch, side_px, raw, mean_image, self.machine, self.machine.threads or cores(), self._device_id)

    def _batch(self, prepared: Prepared, images: torch.Tensor) -> Batch:
        labels = torch.from_numpy(self.index.samples["label"][prepared.ids].astype(np.int64)).to(self.device)
        return Batch(images, labels, prepared.ids, prepared.epochs, prepared.step)

    def close(self) -> None:
        """Free threads and buffers. The loader can be used again; it starts where it was."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def quarantine_budget(machine: LoaderConfig, samples: int) -> int:
    """How many of `samples` may be unreadable: the share in `machine`, rounded up."""
    return int(np.ceil(machine.quarantine_budget * samples))


class TrainLoader(Loader, Iterator[Batch]):
    """Training batches: shuffled, cropped, reflected, lit (paper §4.1), without end.

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

    Raises:
        ValueError: the split, batch or shard do not fit, see `Sampler`.
        RuntimeError: an archive is missing, or too many samples are unreadable.
    """

    def __init__(self, index: SampleIndex, split: str, data: DataConfig, batch: int, seed: int, stats: Stats, *,
                 machine: LoaderConfig = LoaderConfig(), shard: tuple[int, int] = (0, 1), device_id: int | None = None,
                 quarantine: Quarantine | None = None) -> None:
        super().__init__(index, split, data, machine, device_id)
        unlabelled = int((index.samples["label"][self._ids] < 0).sum())
        if unlabelled:
            raise ValueError(f"split (={split}) of {index.path} must have labels to train on; {unlabelled} samples have none")
        self._sampler = Sampler(self._ids, batch, seed, shard)
        self._seed, self._stats = seed, stats.expect(data.square_px)
        self._quarantine = quarantine or Quarantine(quarantine_budget(machine, len(self._ids)))
        self._step = 0
        self._end = self._sampler.steps(0).stop

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
        if self._stream is None:
            image = self.data.mean != "channel"
            plan = self._plan(len(self._sampler.take(0)[0]), self.data.crop_px,
                              mean_image=self._stats.mean_image_chw if image else None)
            first = self._step
            self._stream = Stream(itertools.count(first), self._prepare, self._mend, plan)
        try:
            prepared, images = self._stream.collect()
        except BaseException:
            self.close()  # what was read ahead is lost; whoever goes on starts again at the batch that failed
            raise
        self._step += 1
        return self._batch(prepared, images)

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
        """A readable stand-in for `origin`, how many it has had, and its bytes.

        The n-th stand-in is a function of (seed, epoch, origin, n), so the same comes out whenever, on whatever rank, and
        after whatever other samples the same one fails.
        """
        for attempt in range(tries, _SUBSTITUTES):
            place = bits(self._seed, Purpose.SUBSTITUTE, epoch, origin, attempt)[0] % np.uint64(len(self._ids))
            candidate = int(self._ids[int(place)])
            if candidate == origin:
                continue
            self._quarantine.add(self.index, error, epoch=epoch, step=step, substitute=candidate)
            try:
                return candidate, attempt + 1, self._reader.read(candidate)
            except SampleError as other:
                error = other
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
        offsets = np.stack([drawn.top, drawn.left], axis=1)
        regions = geometry.regions(self._sizes(ids), resized, first + offsets, self.data.crop_px, drawn.mirror)
        mean = -lighting_shift(drawn.alphas, self._stats.eigenvalues, self._stats.eigenvectors)
        mirror = drawn.mirror
        if self.data.mean == "channel":
            mean += self._stats.channel_mean
        elif self.data.mean == "image_center":
            offsets = np.full_like(offsets, (self.data.square_px - self.data.crop_px) // 2)
            mirror = np.zeros_like(mirror)
        inputs = Inputs(views, regions, mean, offsets.astype(np.int32), mirror.astype(np.int32))
        return Prepared(step, ids, epochs, inputs, origins, tries)
