"""Our loader against torch's DataLoader + PIL doing the same work: `python tools/bench_loader.py [INDEX]`.

The one concept: both read the same photographs in place, decode, bring the short side to 256, cut a random 227 crop out
of the central square, reflect half of them, add lighting noise, subtract the mean image and hand over
(64, 3, 227, 227) float32; both with two workers. They take turns, and before each turn of the clock what was read ahead
is used up, so that neither is paid for work done while the other was timed. Neither is followed by a network.

Legend: B batch, H rows, W columns.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    import torch

    from pipeline.config import DataConfig
    from pipeline.index import SampleIndex
    from pipeline.stats import Stats

BATCH, SQUARE_PX, CROP_PX, LIGHTING = 64, 256, 227, 0.1
AHEAD = 8       # batches used up before the clock starts: more than either side reads ahead


class PilDataset:
    """What one writes with torch and PIL: position → (crop (3, H, W) float32, label). Map-style, for a DataLoader."""

    def __init__(self, index: SampleIndex, split: str, stats: Stats) -> None:
        self.index, self.ids, self.stats = index, index.ids(split), stats

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        import io
        import numpy as np
        import torch
        from PIL import Image

        id = int(self.ids[position])
        image = Image.open(io.BytesIO(self.index.read(id))).convert("RGB")
        scale = SQUARE_PX / min(image.size)
        width, height = (max(SQUARE_PX, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = np.random.randint(0, SQUARE_PX - CROP_PX + 1, 2)
        x, y = (width - SQUARE_PX) // 2 + left, (height - SQUARE_PX) // 2 + top
        crop = np.asarray(image.crop((x, y, x + CROP_PX, y + CROP_PX)), np.float32)
        mean = self.stats.mean_image[top:top + CROP_PX, left:left + CROP_PX]
        alphas = np.random.normal(0, LIGHTING, 3) * np.sqrt(self.stats.eigenvalues)
        crop = crop - mean + (self.stats.eigenvectors @ alphas).astype(np.float32)
        if np.random.random() < 0.5:
            crop = crop[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1))), int(self.index.samples["label"][id])


def pil_batches(index: SampleIndex, stats: Stats, workers: int, count: int) -> Iterator[Any]:
    """`count` batches of the PIL side; asked for one more, it ends its workers."""
    from torch.utils.data import DataLoader, RandomSampler

    dataset = PilDataset(index, "train", stats)
    sampler = RandomSampler(dataset, num_samples=count * BATCH)
    # spawn: a process forked after DALI has started its threads may hang
    return iter(DataLoader(dataset, BATCH, sampler=sampler, num_workers=workers,   # type: ignore[arg-type]
                           multiprocessing_context="spawn"))


def our_batches(index: SampleIndex, stats: Stats, threads: int) -> Generator[Any, None, None]:
    """Batches of our loader, without end; closing it frees its threads."""
    from pipeline.config import LoaderConfig
    from pipeline.loader import TrainLoader

    machine = LoaderConfig(threads=threads, quarantine_budget=0.05)
    with TrainLoader(index, "train", data_config(), BATCH, 0, stats, machine=machine) as loader:
        while True:
            yield from loader


def data_config() -> DataConfig:
    """The paper's training crops."""
    from pipeline.config import DataConfig
    return DataConfig(region="square", square_px=SQUARE_PX, crop_px=CROP_PX, mirror=True, lighting=LIGHTING,
                      mean="image")


def turn(batches: Iterator[Any], count: int) -> float:
    """Images per second over `count` batches."""
    for _ in range(AHEAD):
        next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * BATCH / (time.perf_counter() - start)


def drawn_index(folder: Path, photographs: int) -> SampleIndex:
    """An index of `photographs` drawn pictures with short sides of 333 to 400 pixels, like those of ImageNet."""
    from pipeline.index import SampleIndex
    from tools import build_index, make_demo

    make_demo.make(folder / "archives", 0, 4, max(1, photographs // 4), 1, (333, 400))
    with contextlib.redirect_stdout(sys.stderr):
        code = build_index.main(["build", "classes", str(folder / "archives" / make_demo.TRAIN),
                                 "--out", str(folder / "index")])
    if code:
        raise RuntimeError(f"building the index of drawn pictures (={folder}) failed; its message is above")
    return SampleIndex.load(folder / "index")


def measure(index: SampleIndex, workers: int, rounds: int, batches: int) -> dict[str, Any]:
    """Take turns `rounds` times; images per second of both sides and the ratio of the medians."""
    from pipeline.config import LoaderConfig
    from pipeline.stats import compute

    stats = compute(index, "train", SQUARE_PX, machine=LoaderConfig(quarantine_budget=0.05))
    speeds: dict[str, list[float]] = {"ours": [], "pil": []}
    pil = pil_batches(index, stats, workers, rounds * (AHEAD + batches) + AHEAD)   # busy to the end of the last turn
    with contextlib.closing(our_batches(index, stats, workers)) as ours:
        for _ in range(rounds):
            for name, side in (("ours", ours), ("pil", pil)):
                speeds[name].append(turn(side, batches))
    # Idle workers end cleanly, unlike busy ones; and one that dies on its way out changes no figure.
    with contextlib.suppress(RuntimeError):
        for _ in pil:
            pass
    ratio = statistics.median(speeds["ours"]) / statistics.median(speeds["pil"])
    return {"photographs": len(index.ids("train")), "workers": workers, "batch": BATCH, "batches": batches,
            "images_per_s": speeds, "ratio": ratio}


def run(asked: argparse.Namespace) -> None:
    """Measure and print. Raises ValueError or RuntimeError."""
    from pipeline.index import SampleIndex

    for name in ("workers", "rounds", "batches", "photographs"):
        if getattr(asked, name) < 1:
            raise ValueError(f"--{name} (={getattr(asked, name)}) must be at least 1; leave it out for the default")
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise RuntimeError("Pillow is not installed, and it is the other side of this measurement; "
                           "pip install -e '.[demo]'") from None
    with tempfile.TemporaryDirectory() as folder:
        index = drawn_index(Path(folder), asked.photographs) if asked.index is None else SampleIndex.load(asked.index)
        found = measure(index, asked.workers, asked.rounds, asked.batches)
    if asked.json:
        print(json.dumps(found))
        return
    print(f"{found['photographs']} photographs, batch {BATCH}, {asked.workers} workers each, {asked.rounds} turns of "
          f"{asked.batches} batches")
    for name, label in (("ours", "TrainLoader (DALI)"), ("pil", "DataLoader + PIL")):
        speeds = found["images_per_s"][name]
        print(f"{label:20} {statistics.median(speeds):7.1f} img/s  (min {min(speeds):.1f}, max {max(speeds):.1f})")
    print(f"ratio of the medians {found['ratio']:.2f}")


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit code: 0, or 2 with a message on stderr."""
    parser = argparse.ArgumentParser(prog="bench_loader.py", description="Time our loader against DataLoader + PIL.")
    parser.add_argument("index", nargs="?", type=Path, metavar="INDEX", help="index to read (default: drawn pictures)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="threads of ours, processes of theirs (2)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each (5)")
    parser.add_argument("--batches", type=int, default=12, metavar="N", help="batches of a turn (12)")
    parser.add_argument("--photographs", type=int, default=96, metavar="N", help="to draw without an INDEX (96)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    from tools.command import guarded
    asked = parser.parse_args(arguments)
    return guarded(lambda: run(asked))


if __name__ == "__main__":
    sys.exit(main())
