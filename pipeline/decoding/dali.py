"""The DALI pipelines: region decode of batches, and small ones for checking, packing and streaming. With `graph.py` all of
`nvidia.dali` is here.

Order and crops come in as tensors. On a GPU the whole graph of `graph.py` runs there; on a CPU DALI decodes as far as the crop
reaches, to uint8, and `pipeline.decoding.resize` resizes. B samples, S side of the output in pixels."""
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.tensors import TensorCPU, TensorListCPU

from pipeline.decoding.graph import DecodeSettings, columns, define
from pipeline.decoding.resize import Resizer, planar_crops, resize
from pipeline.sampling.batch_plan import BatchPlan, Bytes, Encoded

# nvimgcodecStatus_t: the codes that a damaged file gives.
_CODEC_FAILURES = {"nvImageCodec failure: '#3'": "its code stream is damaged",
                   "nvImageCodec failure: '#4'": "it is no supported image"}


class DecodeError(RuntimeError):
    """A batch that DALI could not decode. Names no sample: DALI does not. `reason` is short: "cannot be decoded …"."""

    def __init__(self, error: RuntimeError) -> None:
        super().__init__(str(error))
        lines = str(error).partition("encountered:")[2].splitlines()
        cause = next((line.strip() for line in lines if line.strip()), "")
        # DALI counts samples within its batch, which is no name of ours, and says when a pipeline is lost.
        detail = _CODEC_FAILURES.get(cause, "" if cause.startswith(("Failed to decode", "Current pipeline")) else cause)
        self.reason = "cannot be decoded" + (f" ({detail})" if detail else "")


def _encoded(plan: BatchPlan) -> Any:
    """The bytes of a plan as DALI takes them: a list of NumPy arrays costs its Python 10 µs an image, this 4."""
    tensors: Any = TensorListCPU  # its stub does not know `contiguous`
    return tensors(list(map(TensorCPU, plan.encoded)), contiguous=False)


class RegionPipeline:
    """A built DALI pipeline that pulls plans with their bytes and gives their pixels, RGB, in the same order. The plans are read
    ahead by `machine.prefetch` batches, in the collecting thread. DALI reads their bytes in place."""

    def __init__(self, plans: Iterator[BatchPlan], settings: DecodeSettings) -> None:
        self._plans, self._settings = plans, settings
        self._failure: Exception | None = None
        self._alive: deque[BatchPlan] = deque()
        self._collected: BatchPlan | None = None
        resizes = settings.resample and not (settings.in_dali or settings.decode_only or settings.inputs_only)
        self._resizer = Resizer(settings.side_px, settings.threads) if resizes else None
        self._pipe: Any = Pipeline(batch_size=settings.batch, num_threads=settings.threads, device_id=settings.device_id,
                                   prefetch_queue_depth=settings.machine.prefetch, seed=0)
        with self._pipe:
            inputs = {"encoded": (types.UINT8, 1, _encoded), **columns(settings)}
            kinds, dims, self._columns = zip(*inputs.values(), strict=True)
            nodes = dict(zip(inputs, fn.external_source(source=self._pull, num_outputs=len(inputs), batch=True, no_copy=True,
                                                        dtype=kinds, ndim=dims), strict=True))
            self._pipe.set_outputs(define("cpu" if settings.device_id is None else "gpu", settings, nodes))
        self._pipe.build()

    def _pull(self) -> tuple[Any, ...]:
        """DALI's callback. A failing source ends the stream here, so that the batches before it still come out."""
        if self._failure is not None:
            raise StopIteration
        try:
            plan = next(self._plans)
        except StopIteration:
            raise
        except Exception as failure:
            self._failure = failure
            raise StopIteration from failure
        self._alive.append(plan)
        return tuple(column(plan) for column in self._columns)

    def collect(self) -> torch.Tensor:
        """The next batch, (B, S, S, 3) uint8, or finished (B, 3, S, S), on the pipeline's device. Raises as `rows`."""
        output, plan = self._run()
        if self._resizer is not None:
            return self._resizer([torch.from_dlpack(image) for image in output], plan.regions)
        pixels, finish = torch.from_dlpack(output.as_tensor()), self._settings.finish
        if finish is None or pixels.dim() != 4:
            return pixels
        return (pixels.permute(0, 3, 1, 2) if finish.channels_last else pixels).to(finish.dtype)

    def rows(self) -> Sequence[torch.Tensor]:
        """The next batch as B views (3, S, S) uint8 in CPU memory, each to be used before the same thread asks for another.
        Raises DecodeError when a sample of this batch could not be decoded (the batches after it are not touched);
        StopIteration when the source has ended; and what the source raised, if it failed."""
        output, plan = self._run()
        if self._resizer is not None:
            return planar_crops([torch.from_dlpack(image) for image in output], plan.regions, self._settings.side_px)
        return list(torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2))

    def _run(self) -> tuple[Any, BatchPlan]:
        device_id = self._settings.device_id
        stream = None if device_id is None else torch.cuda.current_stream(device_id).cuda_stream
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
        # What DALI still reads lives as long as its pipe, whose callback holds this object. A failure's traceback would too.
        self._pipe = self._failure = None


class WholeImages:
    """Decodes whole images on the CPU, `batch` at most."""

    def __init__(self, batch: int, threads: int) -> None:
        self._pipe: Any = Pipeline(batch_size=batch, num_threads=threads, device_id=None, prefetch_queue_depth=1, seed=0)
        with self._pipe:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            pixels = fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False)
            self._pipe.set_outputs(pixels, pixels.shape())
        self._pipe.build()

    def _decode(self, encoded: list[Encoded]) -> Any:
        try:
            self._pipe.feed_input("encoded", encoded)
            return self._pipe.run()
        except RuntimeError as error:
            raise DecodeError(error) from error

    def sizes(self, encoded: list[Encoded]) -> npt.NDArray[np.int64]:
        """(B, 2) heights and widths of B images. Raises DecodeError when one does not decode; the next call works."""
        return np.asarray(self._decode(encoded)[1].as_array(), np.int64)[:, :2]

    def images(self, encoded: list[Encoded], sizes: npt.NDArray[np.int64], resized: npt.NDArray[np.int64]) -> list[Bytes]:
        """B images (H, W, 3) uint8 of `sizes` (B, 2), resized to `resized` (B, 2): those that `RegionPipeline` crops from. Raises
        as `sizes`."""
        scales = sizes / resized
        return [resize(torch.from_dlpack(image), (0, 0), size, scale).numpy().reshape(*size, 3)
                for image, size, scale in zip(self._decode(encoded)[0], resized.tolist(), scales.tolist(), strict=True)]


class ShardReader:
    """Ranges of bytes of tars, one after the other, read ahead in DALI's own threads by its WebDataset reader. `paths`: local,
    or ``s3://bucket/key`` (credentials and `AWS_ENDPOINT_URL` from the environment), in the order they are read;
    `index_paths`: for each its index file as wds2idx writes it, where a line is a range, needed until the first range is
    there. `ahead`: ranges read ahead, at least 1."""

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
        """The next range, (size,) uint8. After the last one it begins again. Raises RuntimeError with what DALI says, in one
        line, when it cannot read it; no later range will come then."""
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
