"""The images that tools/gpu_report.py works on: synthetic photographs of a realistic size, in 4:2:0 and in 4:4:4, and packed.

Few are drawn, and each is many samples of the index, so that an epoch is long; a reader finds them in the processor's cache more
often than those of ImageNet.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from pipeline.compute_stats import find_or_compute
from pipeline.config import LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.index.writer import write_index
from pipeline.process_pool import cores, in_processes
from tools import build_index, pack_shards
from tools.demo import dataset, images
from train.config import Config
from train.recipe import parse

RECIPES = Path(__file__).resolve().parents[2] / "train" / "recipes"
MOST = 65536  # images of an index that is given: they are packed, and kept in memory


@dataclass(frozen=True)
class Job:
    """What the stages are given."""
    scratch: Path  # folder for all that is made
    device: str  # cuda or cpu
    small: bool  # toy sizes, which show that it runs
    index: Path | None = None  # instead of synthetic photographs

    @property
    def batches(self) -> tuple[int, ...]:
        return (8,) if self.small else (256, 128, 512)

    @property
    def seconds(self) -> float:
        """Of a turn."""
        return 0.02 if self.small else 0.5

    @property
    def rounds(self) -> int:
        return 1 if self.small else 5

    @property
    def kinds(self) -> dict[str, Path]:
        """Indexes of original images, by their chroma."""
        return {"given": self.index} if self.index else {kind: self.scratch / kind for kind in ("420", "444")}

    @property
    def packed(self) -> Path:
        return self.scratch / "packed"

    def config(self, *words: str, batch: int = 0) -> Config:
        """The paper's network (small: the demo's), as fast as its settings make it, on the first kind of images."""
        recipe = RECIPES / ("demo.yaml" if self.small else "alexnet_ilsvrc2012.yaml")
        precision = "bf16" if self.device == "cuda" else "fp32"
        given = [f"--data.index={next(iter(self.kinds.values()))}", f"--train.batch={batch or self.batches[0]}",
                 f"--machine.device={self.device}", f"--machine.precision={precision}", "--machine.channels_last=true",
                 "--machine.deterministic=false", "--optimizer.lr=1e-4", f"--machine.runs={self.scratch / 'runs'}",
                 f"--machine.resident_folder={self.scratch / 'resident'}", "--machine.quarantine_budget=0.05"]
        given += ["--machine.threads=1", "--machine.torch_threads=1"] * self.small
        return parse(["--config", str(recipe), *given, *words]).config


def data(job: Job) -> Iterator[tuple[str, Any]]:
    """Draw, index, compute statistics, pack."""
    square_px = job.config().data.square_px
    if job.index is None:
        drawn, repeats, sides = (12, 2, (90, 100)) if job.small else (256, 64, (333, 500))
        tasks = [(drawn, number, sides) for number in range(drawn)]
        files = list(in_processes(_photograph, tasks, 1 if job.small else cores()))
        for number, kind in enumerate(job.kinds):
            _index(job.kinds[kind], [(name, encoded[number]) for name, *encoded in files], repeats)
    for kind, path in job.kinds.items():
        index = SampleIndex.load(path)
        count = len(index.ids("train"))
        if count > MOST:
            raise ValueError(f"--index (={path}) has {count:,} training images, more than {MOST:,}; give one of fewer, which "
                             "`alexnet index subset` derives")
        find_or_compute(index, square_px, machine=LoaderConfig(quarantine_budget=0.05))
        sizes = index.samples["size"][index.ids("train")]
        yield kind, {"images": count, "mean_bytes": float(sizes.mean()), "folder": str(path)}
    if pack_shards.main([str(next(iter(job.kinds.values()))), str(job.packed), "--square-px", str(square_px), "--budget", "0.05",
                         "--jobs", "1" if job.small else "0"]):
        raise RuntimeError("packing failed; its message is above")
    packed = SampleIndex.load(job.packed)
    yield "packed", {"images": len(packed.ids("train")), "mean_bytes": float(packed.samples["size"][packed.ids("train")].mean())}


def _photograph(count: int, number: int, sides: tuple[int, int]) -> tuple[str, bytes, bytes]:
    """(name, JPEG in 4:2:0, in 4:4:4); one of six is a validation image."""
    colour, shape = images.classes(4)[number % 4]
    picture = images.render(0, colour, shape, number, sides)
    name = f"{'val' if number >= count - count // 6 else 'train'}/{colour} {shape}/{number}.jpg"
    encoded = [simplejpeg.encode_jpeg(picture, quality=92, colorsubsampling=chroma) for chroma in ("420", "444")]
    return name, encoded[0], encoded[1]


def _index(folder: Path, files: list[tuple[str, bytes]], repeats: int) -> None:
    """Write a tar of the files beside `folder`, and in this an index in which each training image comes `repeats` times."""
    path = folder.with_suffix(".tar")
    with path.open("wb") as file:
        dataset.write_tar(file, files)
    once = folder.with_suffix(".once")
    if build_index.main(["build", "classes", str(path), "--out", str(once), "--jobs", "1"]):
        raise RuntimeError(f"building the index of {path} failed; its message is above")
    index = SampleIndex.load(once)
    train, val = (np.asarray(index.samples[index.split_rows(split)]) for split in ("train", "val"))
    write_index(folder, np.concatenate([np.tile(train, repeats), val]), classes=index.classes, archives=index.archives,
                splits=index.split_names, preset="classes", crc32=True)
