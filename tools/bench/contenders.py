"""The other sides of `tools/bench/__main__.py`: what an expert writes with other people's libraries, doing the same work.

The one concept: a *cut* turns the bytes of a photograph into the crop's pixels; an *engine* (torch's DataLoader,
webdataset, spdl's threads) runs cuts in two workers and hands over finished batches. Where workers are processes they send
uint8, a quarter of the bytes of floats, and the consumer does the colour arithmetic, which makes them faster than sending
floats (measured: docs/lab-log.md). Nothing is decoded less exactly than ours decodes it.

Legend: B batch, H row, W column; a draw is a row (top, left, mirror, red, green, blue), see `tools.bench.workload`.
"""
from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tools.bench.workload import CROP_PX, SQUARE_PX, Draws, Material, NotAvailable, Pixels, Running, Told, need, resized_size

if TYPE_CHECKING:
    import torch

Cut = Callable[[Any, int, int], Pixels]     # (bytes of a JPEG, top, left) → (crop, crop, 3) uint8, possibly a view


def one_thread() -> None:
    """Let the libraries' own threads be: a worker is one of two."""
    import torch
    torch.set_num_threads(1)
    try:
        need("cv2").setNumThreads(1)
    except NotAvailable:
        pass


# --- cuts

def decode(data: Any) -> Pixels:
    """(H, W, 3) of a JPEG by libjpeg-turbo, with the exact transforms; of another format by PIL."""
    try:
        pixels: Pixels = need("simplejpeg").decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
        return pixels
    except ValueError:
        from PIL import Image
        return np.array(Image.open(io.BytesIO(bytes(data))).convert("RGB"))


def _place(width: int, height: int, top: int, left: int) -> tuple[slice, slice]:
    """Rows and columns of a crop in a picture whose short side is S."""
    y, x = (height - SQUARE_PX) // 2 + top, (width - SQUARE_PX) // 2 + left
    return slice(y, y + CROP_PX), slice(x, x + CROP_PX)


def cut_pil(data: Any, top: int, left: int) -> Pixels:
    """PIL alone; of the resize only what the crop shows."""
    from PIL import Image
    image = Image.open(io.BytesIO(bytes(data))).convert("RGB")
    width, height = resized_size(image.size)
    rows, columns = _place(width, height, top, left)
    across, down = image.size[0] / width, image.size[1] / height
    box = (columns.start * across, rows.start * down, columns.stop * across, rows.stop * down)
    return np.asarray(image.resize((CROP_PX, CROP_PX), Image.Resampling.BILINEAR, box=box))


def cut_opencv(data: Any, top: int, left: int) -> Pixels:
    """simplejpeg and OpenCV, whose antialiased resize is the mean over areas."""
    cv2 = need("cv2")
    pixels = decode(data)
    size = resized_size((pixels.shape[1], pixels.shape[0]))
    resized: Pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return resized[_place(*size, top, left)]


def cut_torch(data: Any, top: int, left: int) -> Pixels:
    """simplejpeg and torch's antialiased resize of uint8: the fastest of those tried, and exact. Of 256-px data, no resize."""
    import torch
    pixels = decode(data)
    width, height = resized_size((pixels.shape[1], pixels.shape[0]))
    if pixels.shape[:2] != (height, width):
        planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        resized = torch.nn.functional.interpolate(planes, (height, width), mode="bilinear", antialias=True)
        pixels = resized[0].permute(1, 2, 0).numpy()
    return pixels[_place(width, height, top, left)]


def cut_spdl(data: Any, top: int, left: int) -> Pixels:
    """spdl's own decoder, FFmpeg: decode, scale and crop in one filter graph."""
    sio, simplejpeg = need("spdl.io"), need("simplejpeg")
    content = bytes(data)
    try:
        height, width = simplejpeg.decode_jpeg_header(content)[:2]
    except ValueError:      # one in thousands is CMYK or a PNG
        return cut_torch(data, top, left)
    size = resized_size((width, height))
    rows, columns = _place(*size, top, left)
    scale = "" if size == (width, height) else f"scale=w={size[0]}:h={size[1]}:flags=bilinear,"
    chain = f"{scale}crop=w={CROP_PX}:h={CROP_PX}:x={columns.start}:y={rows.start}:exact=1,format=pix_fmts=rgb24"
    pixels: Pixels = sio.to_numpy(sio.load_image(content, filter_desc=chain))
    return pixels


class Cutter:
    """(id, top, left) → crop: bytes through a cut, or a slice of decoded squares. Travels to workers."""

    def __init__(self, material: Material, cut: Cut | None) -> None:
        self.material, self.cut = material, cut
        self._squares: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Cutter, (self.material, self.cut)

    def open(self) -> None:
        """Make and open what is read, before there are several threads or processes that would."""
        self.material.read(int(self.material.ids[0]))
        if self.cut is None:
            # copy on write: torch warns of arrays it must not write to
            self._squares = np.load(self.material.squares(), mmap_mode="c")

    def __call__(self, id: int, top: int, left: int) -> Pixels:
        """(crop, crop, 3) uint8."""
        if self.cut is not None:
            return self.cut(self.material.read(id), top, left)
        if self._squares is None:
            self.open()
        row = int(np.searchsorted(self.material.ids, id))
        crop: Pixels = self._squares[row, top:top + CROP_PX, left:left + CROP_PX]
        return crop


class Arithmetic:
    """Crops to floats by torch, the fastest tried: copy, subtract the mean image's piece, add the noise.

    Buffers go round: a batch lasts until `lasting` more have been made.
    """

    def __init__(self, material: Material, lasting: int = 2) -> None:
        import torch
        self._mean = torch.from_numpy(material.stats.mean_image_chw)
        shape = (material.work.batch, 3, CROP_PX, CROP_PX)
        self._buffers = itertools.cycle([torch.empty(shape) for _ in range(lasting + 1)])

    def buffer(self) -> torch.Tensor:
        """(B, 3, crop, crop) to write to. Takes its turn safely from any thread."""
        return next(self._buffers)

    def row(self, out: torch.Tensor, crop: Pixels, draw: Sequence[float]) -> None:
        """One image: out (3, crop, crop)."""
        import torch
        top, left, mirror = (int(number) for number in draw[:3])
        pixels = torch.from_numpy(crop).permute(2, 0, 1)
        mean = self._mean[:, top:top + CROP_PX, left:left + CROP_PX]
        if mirror:
            out.copy_(pixels.flip(-1)).sub_(mean.flip(-1))
        else:
            out.copy_(pixels).sub_(mean)
        out.add_(out.new_tensor(draw[3:])[:, None, None])

    def batch(self, crops: npt.NDArray[np.uint8], ids: npt.NDArray[np.int64], draws: Draws) -> Told:
        """A batch of crops (B, crop, crop, 3)."""
        out = self.buffer()
        for row, crop, draw in zip(out, crops, draws.tolist()):
            self.row(row, crop, draw)
        return Told(out, ids, draws)


# --- engines

class Endless:
    """Random batches of ids without end, as a `batch_sampler`."""

    def __init__(self, ids: npt.NDArray[np.int64], batch: int) -> None:
        self._ids, self._batch = ids, batch

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng(0)
        while True:
            yield random.choice(self._ids, self._batch).tolist()


class CropDataset:
    """For torch's DataLoader: ids → a batch of crops (B, crop, crop, 3) uint8, their ids and draws."""

    def __init__(self, cutter: Cutter) -> None:
        self.cutter = cutter
        self.random: np.random.Generator | None = None

    def draws(self, count: int) -> Draws:
        """Of this worker."""
        if self.random is None:
            from torch.utils.data import get_worker_info
            info = get_worker_info()
            self.random = np.random.default_rng(info.seed if info else 0)
            one_thread()
        return self.cutter.material.draw(self.random, count)

    def __getitems__(self, ids: list[int]) -> tuple[Any, ...]:
        import torch
        draws = self.draws(len(ids))
        crops = np.empty((len(ids), CROP_PX, CROP_PX, 3), np.uint8)
        for crop, id, draw in zip(crops, ids, draws):
            crop[:] = self.cutter(id, int(draw[0]), int(draw[1]))
        return torch.from_numpy(crops), torch.tensor(ids), torch.from_numpy(draws)


class ItemDataset(CropDataset):
    """The same as one first writes it: an image at a time, floats, collated by torch."""

    __getitems__ = None     # type: ignore[assignment]   # torch then asks for items one by one

    def __getitem__(self, id: int) -> tuple[Any, ...]:
        import torch
        draw = self.draws(1)[0]
        if not hasattr(self, "arithmetic"):
            self.arithmetic = Arithmetic(self.cutter.material, 0)
        out = torch.empty(3, CROP_PX, CROP_PX)
        self.arithmetic.row(out, self.cutter(id, int(draw[0]), int(draw[1])), draw.tolist())
        return out, id, draw


def as_it_is(batch: Any) -> Any:
    """A collate function that leaves a batch alone."""
    return batch


def dataloader(cutter: Cutter, *, items: bool = False) -> Running:
    """torch's DataLoader with worker processes; `items`: floats of single images, else uint8 of batches."""
    from torch.utils.data import DataLoader
    work = cutter.material.work
    cutter.open()
    dataset = ItemDataset(cutter) if items else CropDataset(cutter)
    loader = DataLoader(dataset, batch_sampler=Endless(cutter.material.ids, work.batch),   # type: ignore[arg-type,var-annotated]
                        num_workers=work.workers, collate_fn=None if items else as_it_is, multiprocessing_context="spawn")
    return _finished(cutter.material, iter(loader), floats=items)


def _finished(material: Material, parts: Iterator[Any], *, floats: bool = False) -> Running:
    arithmetic = Arithmetic(material)

    def batches() -> Iterator[Told]:
        for pixels, ids, draws in parts:
            ids, draws = np.asarray(ids), np.asarray(draws)
            yield Told(pixels, ids, draws) if floats else arithmetic.batch(np.asarray(pixels), ids, draws)

    return Running(batches(), as_it_is)


class ShardCut:
    """For webdataset: a sample of a shard → (crop, id, draw). The id of the first batch's only, for the check."""

    def __init__(self, material: Material, cut: Cut) -> None:
        self.material, self.cut = material, cut
        self.random: np.random.Generator | None = None
        self.count = 0

    def __call__(self, sample: dict[str, Any]) -> tuple[Pixels, int, Draws]:
        if self.random is None:
            self.random = np.random.default_rng()
            one_thread()
        draw = self.material.draw(self.random, 1)[0]
        self.count += 1
        id = self.material.id_of(sample["jpg"]) if self.count <= self.material.work.batch else -1
        return self.cut(sample["jpg"], int(draw[0]), int(draw[1])), id, draw


def stacked(samples: Sequence[tuple[Pixels, int, Draws]]) -> tuple[Any, ...]:
    """Samples to a batch of torch tensors, which cross the processes in shared memory."""
    import torch
    crops, ids, draws = zip(*samples)
    return torch.from_numpy(np.stack(crops)), torch.tensor(ids), torch.from_numpy(np.stack(draws))


def webdataset(material: Material, cut: Cut) -> Running:
    """webdataset with worker processes, shards drawn again and again, a shuffle buffer."""
    wds = need("webdataset")
    work = material.work
    dataset = wds.WebDataset(material.shards(), resampled=True, shardshuffle=False, nodesplitter=None).shuffle(200)
    dataset = dataset.map(ShardCut(material, cut)).batched(work.batch, collation_fn=stacked, partial=False)
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=work.workers, multiprocessing_context="spawn")
    return _finished(material, iter(loader))


def spdl(cutter: Cutter) -> Running:
    """spdl's pipeline: threads of one process, each making whole batches, so that nothing crosses processes."""
    builder = need("spdl.pipeline").PipelineBuilder()
    if cutter.cut is cut_spdl:
        try:
            need("spdl.io.utils").get_ffmpeg_versions()
        except RuntimeError as error:       # its library is loaded at the first use
            raise NotAvailable(f"spdl.io cannot be loaded: it needs FFmpeg's shared libraries ({str(error)[:60]}…)") from None
    material, work = cutter.material, cutter.material.work
    one_thread()
    arithmetic = Arithmetic(material, lasting=2 * work.workers + 4)     # in work, in spdl's queues, and with the consumer
    random = np.random.default_rng(0)
    cutter.open()

    def source() -> Iterator[tuple[npt.NDArray[np.int64], Draws]]:
        while True:
            yield random.choice(material.ids, work.batch), material.draw(random, work.batch)

    def make(asked: tuple[npt.NDArray[np.int64], Draws]) -> Told:
        ids, draws = asked
        out = arithmetic.buffer()
        for row, id, draw in zip(out, ids.tolist(), draws.tolist()):
            arithmetic.row(row, cutter(id, int(draw[0]), int(draw[1])), draw)
        return Told(out, ids, draws)

    pipeline = builder.add_source(source()).pipe(make, concurrency=work.workers).add_sink(2).build(num_threads=work.workers)
    pipeline.start()
    return Running(iter(pipeline), as_it_is, pipeline.stop)


def whole_decode(material: Material) -> Running:
    """The limit: nothing but libjpeg-turbo's decode of whole files, into memory that is used again, in two threads."""
    simplejpeg = need("simplejpeg")
    work = material.work
    executor = ThreadPoolExecutor(work.workers)
    rows = material.index.samples[material.ids]
    largest = int((rows["height"].astype(np.int64) * rows["width"]).max()) * 3
    spaces = [np.empty(largest, np.uint8) for _ in range(work.workers + 3)]

    def make(ids: list[int], space: npt.NDArray[np.uint8]) -> None:
        for id in ids:
            try:
                simplejpeg.decode_jpeg(material.read(id), "RGB", fastdct=False, fastupsample=False, buffer=space)
            except ValueError:      # one in thousands is CMYK or a PNG
                decode(material.read(id))

    def batches() -> Iterator[None]:
        asked = Endless(material.ids, work.batch)
        under_way: list[Future[None]] = []
        for ids, space in zip(asked, itertools.cycle(spaces)):
            under_way.append(executor.submit(make, ids, space))
            if len(under_way) == len(spaces) - 1:
                yield under_way.pop(0).result()

    return Running(batches(), None, executor.shutdown)
