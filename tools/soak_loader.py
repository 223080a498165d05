"""Many batches through a loader, watching for leaks: `python tools/soak_loader.py INDEX [--tier …] [--batches 100000]`.

The one concept: after a warm-up, a loader that runs for days must hold constant memory, file handles and threads. What is counted
is the process's own (anonymous) memory; mapped archives and resident squares belong to the page cache.
"""
from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@dataclass(frozen=True)
class Holdings:
    """What the process holds: KiB of anonymous memory, open file handles, threads."""
    memory_kib: int
    handles: int
    threads: int


def holdings() -> Holdings:
    """Now."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    found = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.startswith(("RssAnon", "Threads"))}
    return Holdings(int(found["RssAnon"]), len(os.listdir("/proc/self/fd")), int(found["Threads"]))


def least(marks: list[Holdings]) -> Holdings:
    """The least of each over `marks`: what is held for good. A file reopened or a pool made for one damaged image is no leak."""
    return Holdings(*(min(getattr(mark, name) for mark in marks) for name in ("memory_kib", "handles", "threads")))


def run(asked: argparse.Namespace) -> None:
    """Run the batches, print what is held at ten moments after the warm-up. Raises ValueError or RuntimeError."""
    for name in ("batches", "warm_up", "batch"):
        if getattr(asked, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} (={getattr(asked, name)}) must be at least 1; leave it out for the "
                             "default")
    import train  # noqa: F401 (before torch: it says how idle threads wait)
    from pipeline.config import DataConfig, LoaderConfig
    from pipeline.index.sample_index import SampleIndex
    from pipeline.stats import Stats
    from pipeline.tiers import train_loader

    index = SampleIndex.load(asked.index)
    data = DataConfig("square", asked.square_px, asked.crop_px, True, 0.1, "image")
    stats = Stats.for_index(index, asked.square_px)
    marks: list[Holdings] = []
    moments = {asked.warm_up + asked.batches * part // 10 for part in range(11)}
    start = time.perf_counter()
    machine = LoaderConfig(quarantine_budget=0.05, resident_folder=asked.folder)
    loader = train_loader(asked.tier, index, "train", data, asked.batch, 0, stats, resident=asked.resident, machine=machine)
    with loader:
        while loader.step < asked.warm_up + asked.batches:
            for _ in loader:
                if loader.step in moments:
                    marks.append(holdings())
                if loader.step >= asked.warm_up + asked.batches:
                    break
    seconds = time.perf_counter() - start
    first, last = least(marks[:3]), least(marks[-3:])
    grown_mib = (max(mark.memory_kib for mark in marks) - marks[0].memory_kib) / 1024
    found = {"tier": asked.tier, "batches": asked.batches, "batch": asked.batch, "warm_up": asked.warm_up,
             "seconds": round(seconds), "memory_mib_after_warm_up": round(marks[0].memory_kib / 1024, 1),
             "grown_mib": round(grown_mib, 2),
             "handles": [first.handles, last.handles], "threads": [first.threads, last.threads],
             "marks": [asdict(mark) for mark in marks]}
    if asked.json:
        print(json.dumps(found))
    else:
        print(f"tier {asked.tier}: {asked.batches} batches of {asked.batch} in {seconds:.0f} s after {asked.warm_up} of warm-up\n"
              f"memory {marks[0].memory_kib / 1024:.1f} MiB after the warm-up, at most {grown_mib:+.2f} MiB later\n"
              f"file handles {first.handles} → {last.handles}, threads {first.threads} → {last.threads}")
    if grown_mib > asked.limit_mib or last.handles > first.handles or last.threads > first.threads:
        raise RuntimeError(f"loader (=tier {asked.tier}) must hold constant memory (within {asked.limit_mib} MiB), handles and "
                           "threads; the figures are above")


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit code: 0, or 2 with a message: a mistake, or something grew."""
    parser = argparse.ArgumentParser(prog="soak_loader.py", description="Run many batches through a loader; watch for leaks.")
    parser.add_argument("index", type=Path, metavar="INDEX", help="index to read; its statistics must exist")
    parser.add_argument("--tier", default="archives", help="archives, packed, streamed or resident (archives)")
    parser.add_argument("--resident", default="rgb", help="form of tier resident: rgb or yuv420 (rgb)")
    parser.add_argument("--folder", default="", help="folder of tier resident's file (beside the index)")
    parser.add_argument("--batches", type=int, default=100_000, metavar="N", help="batches after the warm-up (100000)")
    parser.add_argument("--warm-up", type=int, default=20_000, metavar="N",
                        help="batches before anything is compared (20000): heaps take that long to settle")
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="images of a batch (8)")
    parser.add_argument("--square-px", type=int, default=256, metavar="PX", help="side of the square (256)")
    parser.add_argument("--crop-px", type=int, default=227, metavar="PX", help="side of the crop (227)")
    parser.add_argument("--limit-mib", type=float, default=4.0, metavar="MIB", help="growth that is still constant (4)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    from tools.cli import guarded
    asked = parser.parse_args(arguments)
    return guarded(lambda: run(asked))


if __name__ == "__main__":
    sys.exit(main())
