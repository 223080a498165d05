"""What a GPU can do before anything is tuned: copies, the JPEG decoder, the network's step.

    python tools/bench/gpu.py --config train/recipes/alexnet_ilsvrc2012.yaml --index indexes/ilsvrc2012 [--json FILE]

- copies: device to device (bytes read and written), pinned host memory to the device, both of 1 GiB;
- decoder: regions of the index's images as training takes them, for shares of the hardware engine (machine.hw_decoder_load), on
  16 threads or those of --threads; the crops are not resized and not used;
- step: forward, backward and update of the recipe's network on noise (tools/profile/network.py), for batches, memory layouts and
  with or without machine.deterministic, in bf16.
Each figure is the median of --repeats turns of --seconds, with the smallest and the largest. Exit code 0, or 2 with a message.
"""
from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

LOADS = (0.0, 0.3, 0.5, 0.65, 0.8, 1.0)
BATCHES = (128, 256, 512)
COPIED = 1 << 30
PARTS = ("copies", "decoder", "steps")


def measured(step: Callable[[], float | int], wait: Callable[[], None], seconds: float, repeats: int) -> dict[str, float]:
    """Rate of `step` (which gives how much it did) in units a second: median, least and most of the turns."""
    step()
    rates = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        done, until = 0.0, start + seconds
        while time.perf_counter() < until:
            done += step()
        wait()
        rates.append(done / (time.perf_counter() - start))
    return {"median": statistics.median(rates), "least": min(rates), "most": max(rates)}


def copies(asked: argparse.Namespace) -> Iterator[tuple[str, dict[str, float]]]:
    """GB/s."""
    import torch

    device = torch.device("cuda")
    source, target = torch.empty(COPIED, dtype=torch.uint8, device=device), torch.empty(COPIED, dtype=torch.uint8, device=device)
    pinned = torch.empty(COPIED, dtype=torch.uint8, pin_memory=True)

    def copy(origin: Any, factor: int) -> float:
        target.copy_(origin, non_blocking=True)
        torch.cuda.synchronize()
        return factor * COPIED / 1e9

    for name, origin, factor in (("device to device, GB/s", source, 2), ("pinned host to device, GB/s", pinned, 1)):
        yield name, measured(lambda: copy(origin, factor), torch.cuda.synchronize, asked.seconds, asked.repeats)


def decoder(asked: argparse.Namespace) -> Iterator[tuple[str, dict[str, float]]]:
    """Images a second."""
    import torch

    from pipeline.config import LoaderConfig
    from pipeline.decoding.dali import DecodeGraph
    from pipeline.index.sample_index import SampleIndex
    from pipeline.loading.train_loader import TrainLoader
    from pipeline.parallel import cores
    from tools.profile.stages import make_ready
    from pipeline.stats import Stats
    from train.recipe import parse

    config = parse(["--config", str(asked.config)]).config
    index = SampleIndex.load(asked.index)
    batch, threads = min(256, len(index.ids("train"))), asked.threads or cores()
    stats = Stats.for_index(index, config.data.square_px, "train")
    machine = LoaderConfig(threads=threads)
    with closing(TrainLoader(index, "train", config.data.pixels(), batch, 0, stats, machine=machine, device_id=0)) as loader:
        ready, plan = make_ready(loader).prepared, loader.plan(batch, config.data.crop_px)
    for load in LOADS:
        machine = replace(machine, hw_decoder_load=load)
        inputs = itertools.cycle([one.inputs for one in ready])
        with closing(DecodeGraph(inputs, plan.batch, plan.side_px, resample=plan.resample, machine=machine, threads=threads,
                                 device_id=0)) as graph:
            def decode() -> float:
                count = len(graph.collect())
                torch.cuda.current_stream().synchronize()
                return count

            yield (f"decode, hardware share {load:g}, {threads} threads, img/s",
                   measured(decode, torch.cuda.synchronize, asked.seconds, asked.repeats))


def steps(asked: argparse.Namespace) -> Iterator[tuple[str, dict[str, float]]]:
    """Images a second."""
    import torch

    from tools.profile.network import NetworkStep
    from train.parallel.topology import process_group
    from train.recipe import parse

    with process_group(towers=1, device="cuda", timeout_s=600) as where:
        for batch, last, deterministic in itertools.product(BATCHES, (True, False), (False, True)):
            words = [f"--train.batch={batch}", f"--machine.channels_last={str(last).lower()}", "--machine.precision=bf16",
                     f"--machine.deterministic={str(deterministic).lower()}"]
            config = parse(["--config", str(asked.config), *words]).config
            name = f"step, batch {batch}, {'NHWC' if last else 'NCHW'}{', deterministic' if deterministic else ''}, img/s"
            made = NetworkStep(config, where).synthetic(batch)
            try:
                for _ in range(3):
                    next(made)
                yield name, measured(functools.partial(next, made), torch.cuda.synchronize, asked.seconds, asked.repeats)
            except RuntimeError as error:
                print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)


def run(asked: argparse.Namespace) -> None:
    """Measure what was asked for, and print it."""
    import torch

    if asked.only and "decoder" in asked.only and asked.index is None:
        raise ValueError("--index (=none) must name an index with statistics, whose images the decoder takes; give it")
    for name, value in (("--repeats", asked.repeats), ("--seconds", asked.seconds)):
        if value <= 0:
            raise ValueError(f"{name} (={value}) must be positive; leave it out")
    if not torch.cuda.is_available():
        raise ValueError("device (=cuda) is not there; run this on a machine with a GPU")
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "repeats": asked.repeats}
    print(f"{found['device']}, torch {torch.__version__}")
    for part in (copies, decoder, steps):
        if part.__name__ not in (asked.only or PARTS) or (part is decoder and asked.index is None):
            continue
        for name, figure in part(asked):
            found[name] = figure
            print(f"{name:60} {figure['median']:10,.0f} ({figure['least']:,.0f}–{figure['most']:,.0f})", flush=True)
    if asked.json is not None:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="bench_gpu.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, metavar="RECIPE")
    parser.add_argument("--index", type=Path, metavar="DIR", help="index with statistics; without it nothing is decoded")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="(default: all of them)")
    parser.add_argument("--threads", type=int, default=0, help="of the decoder (default: the cores)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn (default 1)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    asked = parser.parse_args(arguments)
    from tools.cli import guarded
    return guarded(lambda: run(asked))


if __name__ == "__main__":
    sys.exit(main())
