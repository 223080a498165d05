"""The training loader of tier resident that tests/resident uses; as a script it fills a store slowly, to be killed meanwhile."""
import sys
import time
from pathlib import Path

import numpy as np
import torch

from pipeline.config import DataConfig, LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.loader import Loader
from pipeline.loading.train_loader import TrainLoader
from pipeline.resident import yuv420
from pipeline.resident.ram_store import RamStore
from pipeline.resident.store import Rows
from pipeline.stats import Stats
from tests.helpers.loaders import train_loader

SMALL = DataConfig(region="square", square_px=76, crop_px=67, mirror=True, lighting=0.1, mean="image")


def loader(index: SampleIndex, stats: Stats, folder: Path, resident: str = "rgb", *, data: DataConfig = SMALL, batch: int = 8,
           memory: str = "ram", kernels: str = "auto", **options: object) -> TrainLoader:
    machine = LoaderConfig(threads=2, resident_folder=str(folder), resident_memory=memory, kernels=kernels)
    return train_loader("resident", index, "train", data, batch, 7, stats, resident=resident, machine=machine,
                        **options)  # type: ignore[arg-type]


def filled(loader: Loader) -> tuple[int, int]:
    """Squares that its store has, and has room for."""
    have = loader.chain.store.have  # type: ignore[attr-defined]
    return int(np.count_nonzero(have)), len(have)


def yuv_decoded(rows: yuv420.Pixels, square_px: int) -> yuv420.Pixels:
    """Rows (…, row_bytes) uint8 → RGB squares (…, 3, S, S) uint8."""
    return yuv420.crop(rows, square_px, 0, 0, square_px)


if __name__ == "__main__":
    put = RamStore.put

    def slowly(store: RamStore, rows: Rows, squares: torch.Tensor) -> None:  # else all of so few are there at once
        for row in range(len(rows)):
            put(store, rows[row:row + 1], squares[row:row + 1])
            print("row", flush=True)
            time.sleep(0.02)

    RamStore.put = slowly  # type: ignore[method-assign]
    photos = SampleIndex.load(sys.argv[1])
    for _ in loader(photos, Stats.for_index(photos, 76), Path(sys.argv[2])):
        pass
