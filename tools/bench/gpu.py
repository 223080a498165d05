"""What a GPU can do before anything is tuned: copies, the JPEG decoder, response normalisation, the network's step.

    python -m tools.bench.gpu --config train/recipes/alexnet_ilsvrc2012.yaml --index indexes/ilsvrc2012 [--json FILE]

- copies: device to device (bytes read and written), pinned host memory to the device, both of 1 GiB;
- decoder: regions of the index's images as training takes them, for shares of the hardware engine (machine.hw_decoder_load), on
  --threads threads (0: one a core); the crops are not resized and not used;
- lrn: ReLU and response normalisation, forward and backward, ours against torch's, of conv1's and conv2's maps in bf16;
- steps: forward, backward and update of the recipe's network on noise (tools/profile/network.py), for batches, memory layouts and
  with or without machine.deterministic, in bf16.
Each figure is the median of --repeats turns of --seconds, with the smallest and the largest. Exit code 0, or 2 with a message.
"""
from __future__ import annotations

from train.exit_codes import run_command, start_command

if __name__ == "__main__":
    start_command()

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.cli import guarded

if TYPE_CHECKING:
    from tools.profile.measure import Spread

LOADS = (0.0, 0.3, 0.5, 0.65, 0.8, 1.0)
BATCHES = (128, 256, 512)
COPIED = 1 << 30
LRN_BATCH, LRN_SHAPES = 256, ((96, 55, 55), (256, 27, 27))


def rates(work: Callable[[], float], args: argparse.Namespace) -> Spread:
    """Units a second over the rounds; `work` gives how many it did, once the device is done with them."""
    from tools.profile.measure import spread

    def turn() -> float:
        start, done = time.perf_counter(), 0.0
        while time.perf_counter() < start + args.seconds:
            done += work()
        return done / (time.perf_counter() - start)

    work()  # warms up
    return spread([turn() for _ in range(args.repeats)])


def copies(args: argparse.Namespace) -> Iterator[tuple[str, Spread]]:
    import torch

    source, target = (torch.empty(COPIED, dtype=torch.uint8, device="cuda") for _ in range(2))
    pinned = torch.empty(COPIED, dtype=torch.uint8, pin_memory=True)

    def copy(origin: torch.Tensor, factor: int) -> float:
        target.copy_(origin, non_blocking=True)
        torch.cuda.synchronize()
        return factor * COPIED / 1e9

    yield "device to device, GB/s", rates(lambda: copy(source, 2), args)
    yield "pinned host to device, GB/s", rates(lambda: copy(pinned, 1), args)


def decoder(args: argparse.Namespace) -> Iterator[tuple[str, Spread]]:
    from pipeline.config import LoaderConfig
    from pipeline.decoding.dali import RegionPipeline
    from pipeline.index.sample_index import SampleIndex
    from pipeline.process_pool import cores
    from pipeline.stats import Stats
    from pipeline.tiers import train_loader
    from tools.profile.stages import arrived, ready
    from train.recipe import parse

    data = parse(["--config", str(args.config)]).config.data
    index = SampleIndex.load(args.index)
    batch, machine = min(256, len(index.ids("train"))), LoaderConfig(threads=args.threads or cores())
    stats = Stats.for_index(index, data.square_px, "train")
    tier = "archives" if index.packed is None else "packed"
    with train_loader(tier, index, "train", data, batch, 0, stats, machine=machine, device_id=0) as loader:
        plans, settings = [plan for plan, _ in ready(loader)], loader.context.decoding(loader.context.ids, batch, data.crop_px)
    for load in LOADS:
        changed = replace(settings, machine=replace(machine, hw_decoder_load=load), decode_only=True)
        with closing(RegionPipeline(itertools.cycle(plans), changed)) as pipeline:
            def decode() -> float:
                return arrived(loader, len(pipeline.collect()))

            yield f"decode, hardware share {load:g}, {machine.threads} threads, img/s", rates(decode, args)


def lrn(args: argparse.Namespace) -> Iterator[tuple[str, Spread]]:
    import torch
    from torch.nn import functional

    from model.config import LrnConfig
    from model.lrn import local_response_norm

    config = LrnConfig(k=2.0, n=5, alpha=1e-4, beta=0.75)

    def theirs(x: torch.Tensor) -> torch.Tensor:  # windows do not cross the two towers
        maps = functional.relu(x).unflatten(1, (2, -1)).flatten(0, 1)
        return functional.local_response_norm(maps, config.n, config.alpha * config.n, config.beta, config.k).reshape(x.shape)

    ours = partial(local_response_norm, config=config, groups=2, relu=True)
    for shape, layout in itertools.product(LRN_SHAPES, (torch.contiguous_format, torch.channels_last)):
        x, grad = (torch.randn((LRN_BATCH, *shape), device="cuda").bfloat16().to(memory_format=layout) for _ in range(2))
        x.requires_grad_()

        def both_ways(operator: Callable[[torch.Tensor], torch.Tensor]) -> float:
            torch.autograd.grad(operator(x), x, grad)
            torch.cuda.synchronize()
            return LRN_BATCH

        for name, operator in (("torch", theirs), ("ours", ours)):
            yield f"lrn, {name}, {shape}, {str(layout).split('.')[-1]}, img/s", rates(lambda: both_ways(operator), args)


def steps(args: argparse.Namespace) -> Iterator[tuple[str, Spread]]:
    from tools.profile.network import NetworkStep
    from train.parallel.topology import process_group
    from train.recipe import parse

    with process_group(towers=1, device="cuda", timeout_s=3600) as topology:
        for batch, last, deterministic in itertools.product(BATCHES, (True, False), (False, True)):
            words = [f"--train.batch={batch}", f"--machine.channels_last={str(last).lower()}", "--machine.precision=bf16",
                     f"--machine.deterministic={str(deterministic).lower()}"]
            config = parse(["--config", str(args.config), *words]).config
            name = f"step, batch {batch}, {'NHWC' if last else 'NCHW'}{', deterministic' if deterministic else ''}, img/s"
            try:
                synthetic = NetworkStep(config, topology).synthetic()
                for _ in range(3):
                    next(synthetic)
                yield name, rates(lambda: next(synthetic), args)
            except RuntimeError as error:
                print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)


PARTS = {"copies": copies, "decoder": decoder, "lrn": lrn, "steps": steps}


def run(args: argparse.Namespace) -> None:
    if args.only and "decoder" in args.only and args.index is None:
        raise ValueError("--index (=none) must name an index with statistics, whose images the decoder takes; give it")
    for name in ("repeats", "seconds"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name} (={getattr(args, name)}) must be positive; leave it out")
    import torch

    from pipeline.files import write_json

    if not torch.cuda.is_available():
        raise ValueError("device (=cuda) is not there; run this on a machine with a GPU")
    figures: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "repeats": args.repeats}
    print(f"{figures['device']}, torch {torch.__version__}")
    for part in args.only or [part for part in PARTS if part != "decoder" or args.index is not None]:
        for name, figure in PARTS[part](args):
            figures[name] = figure._asdict()
            print(f"{name:60} {figure.median:10,.0f} ({figure.least:,.0f}–{figure.most:,.0f})", flush=True)
    if args.json is not None:
        write_json(args.json, figures)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, metavar="RECIPE")
    parser.add_argument("--index", type=Path, metavar="DIR", help="index with statistics; without it nothing is decoded")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="(default: all of them)")
    parser.add_argument("--threads", type=int, default=0, help="of the decoder (default: the cores)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn (default 1)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    return guarded(lambda: run(args))


if __name__ == "__main__":
    run_command(main)
