"""The DALI graph that makes finished images of encoded ones: decode, resize, subtract the mean, flip, add the colour jitter.

On a GPU all of it runs on the device. `define` is one function of the backend, so the same graph runs with CPU operators, where
tests hold its arithmetic to `Normalizer`: equal to the bit from uint8 pixels on. The pixels before that differ from the CPU
path's by the resize: DALI's adds up in another order (a grey level here and there) and repeats the image's outermost pixels where
torch's shortens the filter (more, at the image's edge). B samples, S side of the output, M of the mean image, in pixels."""
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt
import nvidia.dali as dali
import nvidia.dali.fn as fn
import nvidia.dali.types as types

from pipeline.config import LoaderConfig
from pipeline.decoding.normalize import Finish
from pipeline.sampling.batch_plan import BatchPlan

_TYPES = {"float32": types.FLOAT, "float16": types.FLOAT16, "bfloat16": types.FLOAT, "uint8": types.UINT8}
# DALI's type, dimensions of a sample, and what gives the (B, …) array of a plan.
Column = tuple[types.DALIDataType, int, Callable[[BatchPlan], npt.NDArray[Any]]]


@dataclass(frozen=True)
class DecodeSettings:
    """What is decoded, and how."""
    batch: int  # largest
    side_px: int  # side S of the output
    resample: bool  # False when every image has the output's scale already, so that the region decoded is the output
    machine: LoaderConfig
    threads: int  # DALI's worker threads
    device_id: int | None  # GPU, or None for the CPU
    decode_only: bool = False  # end after the decoder, to measure it: shapes, (B, 3) int64, come out
    inputs_only: bool = False  # take all inputs and decode nothing, to measure what feeds the decoder: they come out as numbers
    finish: Finish | None = None  # None: uint8 pixels
    boxed: bool = False  # regions are boxes, each resized to the output as if it were an image of its own

    @property
    def in_dali(self) -> bool:
        """Whether all is done in DALI's graph. Else DALI decodes, and torch and NumPy do the rest, faster on a CPU."""
        return self.device_id is not None or self.finish is not None

    @cached_property
    def by_region(self) -> bool:
        """Whether only the region under the crop is decoded, or the whole image. A GPU's decoder of regions is reported to
        crash with DALI's build for CUDA 13 (nvImageCodec 0.9, its issue 55)."""
        choice = self.machine.gpu_decode
        return not self.in_dali or choice == "region" or choice == "auto" and dali.__cuda_version__ < 13000

    @property
    def decoder(self) -> str:
        """Name of what decodes: equal names, equal pixels, but for what `by_sample` says."""
        machine = self.machine
        if self.device_id is None:
            return "cpu"
        return (f"gpu-{'region' if self.by_region else 'whole'}-{'fancy' if machine.fancy_upsampling else 'plain'}-"
                f"{machine.hw_decoder_load:g}")

    def by_sample(self) -> "DecodeSettings":
        """These settings, with a decoder that depends on the sample alone. A share of the hardware engine between 0 and 1 goes
        to the first images of each batch that it can decode, so an image's pixels could depend on its neighbours."""
        return replace(self, machine=replace(self.machine, hw_decoder_load=float(ceil(self.machine.hw_decoder_load))))


def columns(settings: DecodeSettings) -> dict[str, Column]:
    """What `define` needs of a plan besides its bytes."""
    resizes, finish = settings.resample and settings.in_dali and not settings.decode_only, settings.finish
    found: dict[str, Column] = {}
    if settings.resample and not settings.in_dali:  # from the image's corner on, see pipeline/decoding/resize.py
        found = {"anchor": (types.INT32, 1, lambda plan: plan.regions.first),
                 "shape": (types.INT32, 1, lambda plan: plan.regions.reach)}
    elif settings.by_region or settings.boxed:
        found = {"anchor": (types.INT32, 1, lambda plan: plan.regions.anchor),
                 "shape": (types.INT32, 1, lambda plan: plan.regions.shape)}
    elif not settings.resample:
        found = {"anchor": (types.INT32, 1, lambda plan: plan.regions.anchor)}
    if resizes and (settings.by_region or settings.boxed):
        found |= {"start": (types.FLOAT, 1, lambda plan: plan.regions.start),
                  "end": (types.FLOAT, 1, lambda plan: plan.regions.end)}
    elif resizes:
        found |= {"start": (types.FLOAT, 1, lambda plan: (plan.regions.anchor + plan.regions.start).astype(np.float32)),
                  "end": (types.FLOAT, 1, lambda plan: (plan.regions.anchor + plan.regions.end).astype(np.float32))}
    if finish is not None:
        found |= {"mirror": (types.INT32, 0, lambda plan: plan.augmentation.mirror.astype(np.int32)),
                  "minus_shift": (types.FLOAT, 1, lambda plan: -plan.augmentation.shift)}
    if finish is not None and finish.mean_image is not None:
        found["place"] = (types.INT32, 1, partial(_place, settings.side_px if finish.centered else None))
    return found


def _place(centered_px: int | None, plan: BatchPlan) -> npt.NDArray[np.int32]:
    """(B, 2) where a crop's piece of `_table` begins."""
    chosen = plan.augmentation
    top, left = (chosen.top, chosen.left) if centered_px is None else (chosen.mirror * centered_px, np.zeros_like(chosen.left))
    return np.stack([top, left], axis=1).astype(np.int32)


def define(backend: str, settings: DecodeSettings, given: dict[str, Any]) -> Any:
    """Add the graph to the pipeline under construction. `backend`: gpu or cpu; `given`: CPU nodes of `encoded` bytes and of
    `columns`. Gives (S, S, 3) uint8; or finished (3, S, S), channels_last (S, S, 3), of the type wanted, float32 for bfloat16,
    which DALI lacks."""
    machine, side, finish = settings.machine, settings.side_px, settings.finish
    if settings.inputs_only:
        return fn.cat(*(fn.reshape(fn.cast(node, dtype=types.INT64), shape=[-1])
                        for node in [given["encoded"].shape(), *list(given.values())[1:]]))
    # EXIF orientation would turn the pixels away from the index's width and height. The rest exists on GPUs only.
    options: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False, "device": "cpu"}
    if backend == "gpu":
        options |= {"device": "mixed", "hw_decoder_load": machine.hw_decoder_load,
                    "jpeg_fancy_upsampling": machine.fancy_upsampling, "preallocate_width_hint": machine.preallocate_px,
                    "preallocate_height_hint": machine.preallocate_px}
    if settings.by_region:
        pixels = fn.decoders.image_slice(given["encoded"], start=given["anchor"], shape=given["shape"], axis_names="HW",
                                         **options)
    else:
        pixels = fn.decoders.image(given["encoded"], **options)
        if "anchor" in given:
            pixels = fn.slice(pixels, start=given["anchor"], shape=given.get("shape", [side, side]), axis_names="HW")
    if settings.decode_only:
        return pixels.shape()
    if "start" in given:
        pixels = fn.resize(pixels, size=(side, side), roi_start=given["start"], roi_end=given["end"],
                           interp_type=types.INTERP_LINEAR, antialias=True)
    if finish is None:
        return pixels
    if finish.mean_image is not None:
        # A constant: it goes to the device once, not with each batch.
        table = types.Constant(_table(finish, side), device=backend, layout="HWC")
        pixels = pixels - fn.slice(table, start=given["place"], shape=[side, side], axis_names="HW")
    # The flip comes last, of pixels and mean together: it costs nothing here, and flipped crops are the same pixels exactly.
    scaling: dict[str, Any] = {} if finish.factor is None else {"std": (1 / finish.factors()).ravel().tolist()}
    return fn.crop_mirror_normalize(pixels, mirror=given["mirror"], mean=given["minus_shift"], dtype=_TYPES[finish.output],
                                    output_layout="HWC" if finish.channels_last else "CHW", **scaling)


def _table(finish: Finish, side_px: int) -> npt.NDArray[np.float32]:
    """The mean image, (M, M, 3). Centred: (2·S, S, 3), its central piece, and below it the same flipped for crops that will be
    flipped, so that the piece itself is not."""
    assert finish.mean_image is not None
    mean = finish.mean_image.transpose(1, 2, 0)
    if finish.centered:
        low = (len(mean) - side_px) // 2
        central = mean[low:low + side_px, low:low + side_px]
        mean = np.concatenate([central, central[:, ::-1]])
    return np.ascontiguousarray(mean)
