"""The DALI graph, one for CPUs and GPUs. The only file that imports `nvidia.dali`.

Order and crops come in as tensors; DALI decodes as far as the crop reaches, to uint8. On a GPU (`device_id`), with its `mixed`
decoder, it resamples there too (argument tensors stay on the CPU); on a CPU `pipeline.decoding.resize` does. Reflections, mean
and
lighting noise are `pipeline.decoding.normalize`'s.
B samples, S side of the output in pixels.
"""
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import tee
from typing import Any

import numpy as np
import numpy.typing as npt
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali.pipeline import Pipeline

from pipeline.config import LoaderConfig
from pipeline.decoding.geometry import Regions
from pipeline.decoding.resize import Crops, Resizer, resize

Bytes = npt.NDArray[np.uint8]


# nvimgcodecStatus_t: the codes that a damaged file gives.
_CODEC_FAILURES = {"nvImageCodec failure: '#3'": "its code stream is damaged",
                   "nvImageCodec failure: '#4'": "it is no supported image"}


class DecodeError(RuntimeError):
    """A batch that DALI could not decode. Names no sample: DALI does not. `reason` is short: "cannot be decoded …"."""

    def __init__(self, error: RuntimeError) -> None:
        super().__init__(str(error))
        said = next((line.strip() for line in str(error).partition("encountered:")[2].splitlines() if line.strip()), "")
        # DALI counts samples within its batch, which is no name of ours, and says when a pipeline is lost.
        detail = _CODEC_FAILURES.get(said, "" if said.startswith(("Failed to decode", "Current pipeline")) else said)
        self.reason = "cannot be decoded" + (f" ({detail})" if detail else "")


@dataclass(frozen=True)
class Inputs:
    """What the graph eats for B samples.

    Attributes:
        encoded: B byte views, each (size,) uint8, alive until the batch is collected (DALI reads them in place).
        regions: where to decode and sample.
    """
    encoded: list[Bytes]
    regions: Regions

    def row(self, row: int) -> "Inputs":
        """The inputs of one sample, as a batch of one."""
        return Inputs(self.encoded[row:row + 1], self.regions.row(row))


class Graph:
    """A built DALI pipeline that pulls `Inputs` from a source and gives (B, S, S, 3) uint8 pixels, RGB, in the same order.

    Args:
        source: gives the inputs of one batch after the other; read ahead by `machine.prefetch` batches, in the collecting thread.
        batch: largest batch.
        side_px: side S of the output.
        resample: False when every source has the output's scale already, so that the region decoded is the output.
        machine: prefetch and decoder settings.
        threads: DALI's worker threads.
        device_id: GPU, or None for the CPU.
    """

    def __init__(self, source: Iterator[Inputs], batch: int, side_px: int, *, resample: bool = True, machine: LoaderConfig,
                 threads: int, device_id: int | None) -> None:
        self._source = source
        self._failure: Exception | None = None
        self._alive: deque[Inputs] = deque()  # DALI reads them in place
        self._collected: Inputs | None = None
        self._device_id = device_id
        self._resample, self._side = resample, side_px
        self._resizer = Resizer(side_px, threads) if resample and device_id is None else None
        self._pipe: Any = Pipeline(batch_size=batch, num_threads=threads, device_id=device_id,
                                   prefetch_queue_depth=machine.prefetch, seed=0)
        with self._pipe:
            self._pipe.set_outputs(self._define(side_px, machine))
        self._pipe.build()

    def _define(self, side_px: int, machine: LoaderConfig) -> Any:
        gpu = self._device_id is not None
        kinds = [types.UINT8, types.INT32, types.INT32] + [types.FLOAT, types.FLOAT] * (self._resample and gpu)
        encoded, anchor, shape, *ends = fn.external_source(source=self._pull, num_outputs=len(kinds), batch=True, no_copy=True,
                                                           dtype=kinds, ndim=[1] * len(kinds))
        # EXIF orientation would turn the pixels away from the index's width and height. The hints exist on GPUs only.
        hints: dict[str, Any] = {"hw_decoder_load": machine.hw_decoder_load, "jpeg_fancy_upsampling": True,
                                 "preallocate_width_hint": machine.preallocate_px,
                                 "preallocate_height_hint": machine.preallocate_px} if gpu else {}
        pixels = fn.decoders.image_slice(encoded, start=anchor, shape=shape, axis_names="HW", output_type=types.RGB,
                                         adjust_orientation=False, device="mixed" if gpu else "cpu", **hints)
        if not ends:
            return pixels
        return fn.resize(pixels, size=(side_px, side_px), roi_start=ends[0], roi_end=ends[1],
                         interp_type=types.INTERP_LINEAR, antialias=True)

    def _pull(self) -> tuple[Any, ...]:
        """DALI's callback. A failing source ends the stream here, so that the batches before it still come out."""
        if self._failure is not None:
            raise StopIteration
        try:
            inputs = next(self._source)
        except StopIteration:
            raise
        except Exception as failure:
            self._failure = failure
            raise StopIteration from failure
        self._alive.append(inputs)
        regions = inputs.regions
        if self._resizer is not None:
            return inputs.encoded, np.zeros_like(regions.anchor), regions.reach
        ends = (regions.start, regions.end) if self._resample else ()
        return (inputs.encoded, regions.anchor, regions.shape, *ends)

    def collect(self) -> torch.Tensor:
        """The next batch, (B, S, S, 3) uint8 on the graph's device.

        Raises: see `rows`.
        """
        output, inputs = self._run()
        if self._resizer is not None:
            return self._resizer([torch.from_dlpack(image) for image in output], inputs.regions)
        return torch.from_dlpack(output.as_tensor())

    def rows(self) -> Sequence[torch.Tensor]:
        """The next batch as B views (3, S, S) uint8 in CPU memory, each to be used before the same thread asks for another.

        Raises:
            DecodeError: some sample of this batch could not be decoded. The batches after it are not touched.
            StopIteration: the source has ended. What the source raised, if it failed.
        """
        output, inputs = self._run()
        if self._resizer is not None:
            return Crops([torch.from_dlpack(image) for image in output], inputs.regions, self._side)
        return list(torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2))

    def _run(self) -> tuple[Any, Inputs]:
        stream = None if self._device_id is None else torch.cuda.current_stream(self._device_id).cuda_stream
        try:
            (output,) = self._pipe.run(stream)
        except StopIteration:
            if self._failure is not None:
                raise self._failure from None
            raise
        except RuntimeError as error:
            self._alive.popleft()
            raise DecodeError(error) from error
        # Kept until the next batch is collected: on a GPU the copy of its bytes may still be under way.
        self._collected = self._alive.popleft()
        return output, self._collected

    def close(self) -> None:
        """Free DALI's threads and buffers. Batches already collected stay valid: they own their memory."""
        if self._resizer is not None:
            self._resizer.close()
        # What DALI still reads lives as long as its pipe, whose callback holds this graph. A failure's traceback would too.
        self._pipe = self._failure = None


class SizeProbe:
    """Decodes whole images strictly, on the CPU, and gives only their sizes.

    Args:
        batch: largest batch.
        threads: DALI's worker threads.
    """

    def __init__(self, batch: int, threads: int) -> None:
        self._pipe: Any = Pipeline(batch_size=batch, num_threads=threads, device_id=None, prefetch_queue_depth=1, seed=0)
        with self._pipe:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            pixels = fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False)
            self._pipe.set_outputs(pixels.shape())
        self._pipe.build()

    def sizes(self, encoded: list[Bytes]) -> npt.NDArray[np.int64]:
        """(B, 2) heights and widths of B images.

        Raises:
            DecodeError: one of them does not decode; the next call works.
        """
        try:
            self._pipe.feed_input("encoded", encoded)
            (shapes,) = self._pipe.run()
        except RuntimeError as error:
            raise DecodeError(error) from error
        return np.asarray(shapes.as_array(), np.int64)[:, :2]


class DecodeGraph(Graph):
    """`Graph` cut off after the decoder, for measuring; gives the shapes of what was decoded, (B, 3) int64, not the pixels."""

    def __init__(self, source: Iterator[Inputs], batch: int, side_px: int, *, resample: bool = True, machine: LoaderConfig,
                 threads: int, device_id: int | None) -> None:
        super().__init__(source, batch, side_px, resample=resample and device_id is None, machine=machine, threads=threads,
                         device_id=device_id)
        if self._resizer is not None:
            self._resizer.close()
            self._resizer = _Shapes()

    def rows(self) -> Sequence[torch.Tensor]:
        return list(self.collect())

    def _define(self, side_px: int, machine: LoaderConfig) -> Any:
        pixels = super()._define(side_px, machine)
        return pixels.shape() if self._resizer is None else pixels


class _Shapes(Resizer):
    """In the place of a resizer: gives the shapes of decoded images."""

    def __init__(self) -> None:
        """No threads."""

    def __call__(self, decoded: Sequence[torch.Tensor], regions: Regions) -> torch.Tensor:
        return torch.tensor([image.shape for image in decoded])

    def close(self) -> None:
        """Nothing is held."""


class ResizeGraph:
    """The other half of `Graph` on a GPU, for measuring: pixels that are decoded already, resized. (On a CPU it is `Resizer`.)

    Args:
        source: gives, without end, B regions (H, W, 3) uint8 on the GPU and where they lie; all stay alive.
        batch, side_px, machine, threads, device_id: as for `Graph`; None, for tests: NumPy arrays on the CPU.
    """

    def __init__(self, source: Iterator[tuple[list[Any], Regions]], batch: int, side_px: int, *, machine: LoaderConfig,
                 threads: int, device_id: int | None) -> None:
        self._device_id = device_id
        pixels, regions = tee(source)
        self._pipe: Any = Pipeline(batch_size=batch, num_threads=threads, device_id=device_id,
                                   prefetch_queue_depth=machine.prefetch, seed=0)
        with self._pipe:
            images = fn.external_source(source=(given for given, _ in pixels), batch=True, no_copy=True, dtype=types.UINT8,
                                        ndim=3, layout="HWC", device="cpu" if device_id is None else "gpu")
            start, end = fn.external_source(source=((where.start, where.end) for _, where in regions), num_outputs=2, batch=True,
                                            no_copy=True, dtype=types.FLOAT, ndim=1)
            self._pipe.set_outputs(fn.resize(images, size=(side_px, side_px), roi_start=start, roi_end=end,
                                             interp_type=types.INTERP_LINEAR, antialias=True))
        self._pipe.build()

    def collect(self) -> torch.Tensor:
        """The next batch, (B, S, S, 3) uint8."""
        stream = None if self._device_id is None else torch.cuda.current_stream(self._device_id).cuda_stream
        (output,) = self._pipe.run(stream)
        return torch.from_dlpack(output.as_tensor())

    def close(self) -> None:
        """Free DALI's threads and buffers."""
        self._pipe = None


class ShardReader:
    """Ranges of bytes of tars, one after the other, read ahead in DALI's own threads by its WebDataset reader.

    Args:
        paths: tars, in the order they are read: local paths, or ``s3://bucket/key`` (credentials and `AWS_ENDPOINT_URL` from the
            environment).
        index_paths: for each its index file as wds2idx writes it; a line is a range. Needed until the first range is there.
        ahead: ranges read ahead, at least 1.
    """

    def __init__(self, paths: list[str], index_paths: list[str], ahead: int) -> None:
        self._pipe: Any = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1, seed=0)
        with self._pipe:
            # Plain reads: a file that is cut under a memory map ends the process. lazy_init: opening the tars would hold the GIL.
            self._pipe.set_outputs(fn.readers.webdataset(paths=paths, index_paths=index_paths, ext=["jpg"],
                                                         missing_component_behavior="error", dont_use_mmap=True,
                                                         lazy_init=True, prefetch_queue_depth=ahead))
        self._pipe.build()
        self._pipe.schedule_run()

    def next(self) -> Bytes:
        """The next range, (size,) uint8. After the last one it begins again.

        Raises:
            RuntimeError: DALI cannot read it; no later range will come. In one line what DALI says.
        """
        try:
            (output,) = self._pipe.outputs()
            self._pipe.schedule_run()
        except RuntimeError as error:
            raise RuntimeError(" ".join(str(error).partition("encountered:")[2].split("Current pipeline")[0].split())
                               or str(error)) from error
        view: Bytes = torch.from_dlpack(output.as_tensor()).numpy()[0]
        return view

    def close(self) -> None:
        """Stop reading. Ranges already given stay valid: they own their memory."""
        self._pipe = None


class WholeImages:
    """Decodes whole images and resizes each to a size of its own, on the CPU; pixels as `Graph` would crop from them.

    Args:
        batch: largest batch.
        threads: DALI's worker threads.
    """

    def __init__(self, batch: int, threads: int) -> None:
        self._pipe: Any = Pipeline(batch_size=batch, num_threads=threads, device_id=None, prefetch_queue_depth=1, seed=0)
        with self._pipe:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            self._pipe.set_outputs(fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False))
        self._pipe.build()

    def images(self, encoded: list[Bytes], sizes: npt.NDArray[np.int64], resized: npt.NDArray[np.int64]) -> list[Bytes]:
        """B images (H, W, 3) uint8 of `sizes` (B, 2), resized to `resized` (B, 2).

        Raises:
            DecodeError: one of them does not decode; the next call works.
        """
        try:
            self._pipe.feed_input("encoded", encoded)
            (output,) = self._pipe.run()
        except RuntimeError as error:
            raise DecodeError(error) from error
        scales = sizes / resized
        return [resize(torch.from_dlpack(image), (0, 0), size, scale).numpy().reshape(*size, 3)
                for image, size, scale in zip(output, resized.tolist(), scales.tolist(), strict=True)]
