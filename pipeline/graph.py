"""The DALI graph, one for CPUs and GPUs. The only file that imports `nvidia.dali`.

Order, crops, reflections and lighting come in as tensors; DALI decodes, resamples and does the colour arithmetic. On a CPU
(`device_id=None`) only the region under the crop is decoded; on a GPU the decoder is `mixed`, argument tensors stay on the CPU.
B samples, S side of the output in pixels.
"""
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali.pipeline import Pipeline

from pipeline.config import LoaderConfig
from pipeline.geometry import Regions

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
        mean: (B, 3) float32, subtracted from every pixel.
        offsets: (B, 2) int32 place of the crop on the mean image; only read when the graph has one.
        mirror: (B,) int32, whether the crop (and so its piece of the mean image) is reflected.
    """
    encoded: list[Bytes]
    regions: Regions
    mean: npt.NDArray[np.float32]
    offsets: npt.NDArray[np.int32]
    mirror: npt.NDArray[np.int32]

    def row(self, row: int) -> "Inputs":
        """The inputs of one sample, as a batch of one."""
        one = slice(row, row + 1)
        regions = Regions(self.regions.anchor[one], self.regions.shape[one], self.regions.start[one], self.regions.end[one])
        return Inputs(self.encoded[one], regions, self.mean[one], self.offsets[one], self.mirror[one])


class Graph:
    """A built DALI pipeline that pulls `Inputs` from a source and gives pixels in the same order.

    Args:
        source: gives the inputs of one batch after the other; read ahead by `machine.prefetch` batches, in the caller's thread.
        batch: largest batch.
        side_px: side S of the output.
        raw: True gives the resampled pixels as they are, (B, S, S, 3) uint8; False (B, 3, S, S) float32, mean subtracted.
        mean_image: (3, H, W) float32, H, W >= S, or None; its crop at the sample's offset is subtracted too (paper §2).
        machine: prefetch and decoder settings.
        threads: DALI's worker threads.
        device_id: GPU, or None for the CPU.
    """

    def __init__(self, source: Iterator[Inputs], batch: int, side_px: int, *, raw: bool = False,
                 mean_image: npt.NDArray[np.float32] | None = None, machine: LoaderConfig, threads: int,
                 device_id: int | None) -> None:
        self._source = source
        self._failure: Exception | None = None
        self._alive: deque[Inputs] = deque()  # DALI reads them in place
        self._collected: Inputs | None = None
        self._device_id = device_id
        self._names = ["encoded", "anchor", "shape", "start", "end"]
        self._names += [] if raw else ["mean"]
        self._names += ["offsets", "mirror"] if mean_image is not None and not raw else []
        self._pipe: Any = Pipeline(batch_size=batch, num_threads=threads, device_id=device_id,
                                   prefetch_queue_depth=machine.prefetch, seed=0)
        with self._pipe:
            self._pipe.set_outputs(self._define(side_px, raw, mean_image, machine))
        self._pipe.build()

    def _define(self, side_px: int, raw: bool, mean_image: npt.NDArray[np.float32] | None, machine: LoaderConfig) -> Any:
        gpu = self._device_id is not None
        kinds = {"encoded": (types.UINT8, 1), "anchor": (types.INT32, 1), "shape": (types.INT32, 1), "start": (types.FLOAT, 1),
                 "end": (types.FLOAT, 1), "mean": (types.FLOAT, 1), "offsets": (types.INT32, 1), "mirror": (types.INT32, 0)}
        nodes = fn.external_source(source=self._pull, num_outputs=len(self._names), batch=True, no_copy=True,
                                   dtype=[kinds[name][0] for name in self._names],
                                   ndim=[kinds[name][1] for name in self._names])
        given = dict(zip(self._names, nodes, strict=True))
        # EXIF orientation would turn the pixels away from the index's width and height. The hints exist on GPUs only.
        hints: dict[str, Any] = {"hw_decoder_load": machine.hw_decoder_load, "jpeg_fancy_upsampling": True,
                                 "preallocate_width_hint": machine.preallocate_px,
                                 "preallocate_height_hint": machine.preallocate_px} if gpu else {}
        pixels = fn.decoders.image_slice(given["encoded"], start=given["anchor"], shape=given["shape"], axis_names="HW",
                                         output_type=types.RGB, adjust_orientation=False,
                                         device="mixed" if gpu else "cpu", **hints)
        pixels = fn.resize(pixels, size=(side_px, side_px), roi_start=given["start"], roi_end=given["end"],
                           interp_type=types.INTERP_LINEAR, antialias=True)
        if raw:
            return pixels
        images = fn.crop_mirror_normalize(pixels, mean=given["mean"], dtype=types.FLOAT, output_layout="CHW")
        if mean_image is not None:
            whole = types.Constant(np.ascontiguousarray(mean_image), device="gpu" if gpu else "cpu", layout="CHW")
            piece = fn.slice(whole, start=given["offsets"], shape=(side_px, side_px), axis_names="HW")
            images = images - fn.flip(piece, horizontal=given["mirror"])
        return images

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
        fields = {"encoded": inputs.encoded, "anchor": inputs.regions.anchor, "shape": inputs.regions.shape,
                  "start": inputs.regions.start, "end": inputs.regions.end, "mean": inputs.mean, "offsets": inputs.offsets,
                  "mirror": inputs.mirror}
        return tuple(fields[name] for name in self._names)

    def collect(self) -> torch.Tensor:
        """The next batch, on the graph's device, without a copy.

        Raises:
            DecodeError: some sample of this batch could not be decoded. The batches after it are not touched.
            StopIteration: the source has ended. What the source raised, if it failed.
        """
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
        return torch.from_dlpack(output.as_tensor())

    def close(self) -> None:
        """Free DALI's threads and buffers. Batches already collected stay valid: they own their memory."""
        self._pipe = None
        self._alive.clear()
        self._collected = None


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
