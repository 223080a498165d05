"""FFCV as a side of `tools/bench/__main__.py`: the same JPEG bytes, or decoded squares, in a .beton; its own decoder and threads.

The one concept: FFCV compiles a pipeline of operations with numba and runs it over a batch in threads. Its C library decodes
and, of larger pictures, resizes a rectangle of whole pixels (OpenCV, area); the colour arithmetic is one fused operation,
as FFCV's guide to custom transforms would have it. What is drawn comes from a table by the photograph's number, so that the
first batch can be checked: the work is that of drawing anew.

Legend: B batch, H row, W column, N photographs; a draw is a row (top, left, mirror, red, green, blue).
"""
from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench.workload import CROP_PX, SQUARE_PX, Material, Running, Told, need

_DRAWS = 4096   # rows of the table; numba compiles it in


class Bytes:
    """What the writer reads: position → (JPEG bytes or square, label position)."""

    def __init__(self, material: Material, raw: bool) -> None:
        self.material = material
        self.squares = np.load(material.squares(), mmap_mode="r") if raw else None

    def __len__(self) -> int:
        return len(self.material.ids)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        if self.squares is not None:
            return np.array(self.squares[position]), position
        return int(self.material.ids[position]), position


def beton(material: Material, raw: bool) -> Path:
    """The .beton of these photographs, written when it is not there: JPEG bytes as they are, or squares."""
    path = material.work.scratch / f"{material.data}{'-raw' if raw else ''}.beton"
    if path.exists():
        return path
    images, writer, fields = need("ffcv.fields.rgb_image"), need("ffcv.writer"), need("ffcv.fields")

    class AsTheyAre(images.RGBImageField):      # type: ignore[name-defined]
        """Writes the bytes that are there; FFCV's own field would encode anew."""

        def encode(self, destination: Any, id: int, malloc: Callable[[int], tuple[int, Any]]) -> None:
            content, row = material.read(id), material.index.samples[id]
            if not content[:2].tobytes() == b"\xff\xd8":
                raise RuntimeError(f"sample {id} is no JPEG, which FFCV cannot read; leave FFCV out with --without")
            destination["mode"] = images.IMAGE_MODES["jpg"]
            destination["height"], destination["width"] = row["height"], row["width"]
            destination["data_ptr"], storage = malloc(len(content))
            storage[:] = content

    field = images.RGBImageField(write_mode="raw") if raw else AsTheyAre()
    partial = path.with_suffix(".tmp")
    # The field is a class made here, which a forked process has too; of threads there are none yet.
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("fork", force=True)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):   # its progress bar
        writer.DatasetWriter(str(partial), {"image": field, "position": fields.IntField()},
                             num_workers=1).from_indexed_dataset(Bytes(material, raw))
    multiprocessing.set_start_method(method, force=True)
    os.replace(partial, path)
    return path


def ffcv(material: Material, raw: bool = False) -> Running:
    """FFCV's loader in random order. `raw`: decoded squares instead of JPEG."""
    work = material.work
    os.environ["NUMBA_NUM_THREADS"] = str(work.workers)
    need("ffcv")
    loaders, decoders, images = need("ffcv.loader"), need("ffcv.fields.decoders"), need("ffcv.fields.rgb_image")
    compiler, allocation = need("ffcv.pipeline.compiler").Compiler, need("ffcv.pipeline.allocation_query").AllocationQuery
    transforms, library = need("ffcv.transforms"), need("ffcv.libffcv")
    operation = need("ffcv.pipeline.operation").Operation
    path = beton(material, raw)
    table = material.draw(np.random.default_rng(0), _DRAWS)
    tops, lefts = table[:, 0].astype(np.int64), table[:, 1].astype(np.int64)
    mirrors, shifts = table[:, 2] > 0, np.ascontiguousarray(table[:, 3:])
    mean = material.stats.mean_image_chw

    class Crop(images.SimpleRGBImageDecoder):   # type: ignore[name-defined]
        """Bytes → (crop, crop, 3) uint8."""

        def declare_state_and_memory(self, previous: Any) -> tuple[Any, Any]:
            largest = int((self.metadata["width"].astype(np.int64) * self.metadata["height"]).max()) * 3
            shape, kind = (CROP_PX, CROP_PX, 3), np.dtype("<u1")
            return (replace(previous, jit_mode=True, shape=shape, dtype=kind),
                    (allocation(shape, kind), allocation((largest,), kind)))

        def generate_code(self) -> Callable[..., Any]:
            read, each = self.memory_read, compiler.get_iterator()
            imdecode, resize = compiler.compile(library.imdecode), compiler.compile(library.resize_crop)
            jpeg = images.IMAGE_MODES["jpg"]

            def crop(positions: Any, memory: Any, metadata: Any, storage: Any) -> Any:
                out, spaces = memory
                for at in each(len(positions)):
                    position = positions[at]
                    field = metadata[position]
                    content = read(field["data_ptr"], storage)
                    height, width = np.uint32(field["height"]), np.uint32(field["width"])
                    draw = position % _DRAWS
                    if field["mode"] == jpeg:
                        imdecode(content, spaces[at], height, width, height, width, 0, 0, 1, 1, False, False)
                        pixels = spaces[at][:3 * height * width].reshape(height, width, 3)
                    else:
                        pixels = content.reshape(height, width, 3)
                    short = min(height, width)
                    top, left = tops[draw], lefts[draw]
                    if height == SQUARE_PX and width == SQUARE_PX:
                        lines, to = pixels.reshape(SQUARE_PX, 3 * SQUARE_PX), out[at].reshape(CROP_PX, 3 * CROP_PX)
                        for y in range(CROP_PX):
                            to[y] = lines[top + y, 3 * left:3 * (left + CROP_PX)]
                    else:
                        scale = short / SQUARE_PX
                        side = np.int64(np.round(CROP_PX * scale))
                        first = min(np.int64(np.round((height - short) / 2 + top * scale)), np.int64(height) - side)
                        begin = min(np.int64(np.round((width - short) / 2 + left * scale)), np.int64(width) - side)
                        resize(pixels, first, first + side, begin, begin + side, out[at])
                return out[:len(positions)]

            crop.is_parallel = True     # type: ignore[attr-defined]
            return crop

    class Colour(operation):                    # type: ignore[misc,valid-type]
        """(crop, crop, 3) uint8 → (3, crop, crop) float32: reflection, mean image, lighting noise."""

        def declare_state_and_memory(self, previous: Any) -> tuple[Any, Any]:
            shape, kind = (3, CROP_PX, CROP_PX), np.dtype("<f4")
            return replace(previous, jit_mode=True, shape=shape, dtype=kind), allocation(shape, kind)

        def generate_code(self) -> Callable[..., Any]:
            each = compiler.get_iterator()

            def colour(crops: Any, out: Any, positions: Any) -> Any:
                for at in each(len(positions)):
                    draw = positions[at] % _DRAWS
                    top, left, shift = tops[draw], lefts[draw], shifts[draw]
                    for c in range(3):
                        for y in range(CROP_PX):
                            if mirrors[draw]:
                                for x in range(CROP_PX):
                                    there = CROP_PX - 1 - x
                                    out[at, c, y, x] = (np.float32(crops[at, y, there, c]) - mean[c, top + y, left + there]
                                                        + shift[c])
                            else:
                                for x in range(CROP_PX):
                                    out[at, c, y, x] = np.float32(crops[at, y, x, c]) - mean[c, top + y, left + x] + shift[c]
                return out[:len(positions)]

            colour.is_parallel = True       # type: ignore[attr-defined]
            colour.with_indices = True      # type: ignore[attr-defined]
            return colour

    loader = loaders.Loader(str(path), batch_size=work.batch, num_workers=work.workers, os_cache=True,
                            custom_fields={"image": images.RGBImageField},
                            order=loaders.OrderOption.RANDOM, drop_last=True,
                            pipelines={"image": [Crop(), Colour(), transforms.ToTensor()],
                                       "position": [decoders.IntDecoder(), transforms.ToTensor()]})

    def batches() -> Iterator[Any]:
        while True:
            yield from loader

    def told(batch: Any) -> Told:
        positions = np.asarray(batch[1]).reshape(-1)
        return Told(batch[0], material.ids[positions], table[positions % _DRAWS])

    return Running(batches(), told)
