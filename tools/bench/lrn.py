"""Time model.lrn against torch.nn.LocalResponseNorm, forward and backward, in one interleaved run.

    python tools/bench/lrn.py [--threads 1] [--repeats 5] [--batch 128]
    python tools/bench/lrn.py --device cuda [--repeats 5] [--batch 128]

Prints, for each shape and memory format, the medians in milliseconds and their ratio (and its range over the repeats).
Both get the ReLU before them: torch's as an operator, ours folded in. Windows do not cross the two towers.
On a GPU it times three ways, forward and backward apart: torch's; ours in chunks, as where Triton is missing; ours fused.
Each is captured in a CUDA graph of CALLS calls and timed by CUDA events, so no time of the host is in it. GB/s is that of
the bytes which must move (x and y forward; x and both gradients backward) whatever a way moves in truth: how close it is
to the memory's limit. A tensor that fits the L2 cache can exceed that limit.
"""
from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

SHAPES = ((96, 55, 55), (256, 27, 27), (96, 15, 15))
GPU_SHAPES = ((96, 55, 55), (256, 27, 27))  # conv1's and conv2's maps at 227 pixels
CALLS = 10                                  # in a CUDA graph
Operator = Callable[[Any], Any]


def make(shape: tuple[int, int, int, int], layout: str, dtype: str, device: str) -> tuple[Any, Any, Operator, Operator]:
    """An input and a gradient, and the operators to compare: torch's and ours."""
    import torch
    from torch.nn import functional

    from model.config import LrnConfig
    from model.lrn import local_response_norm

    config = LrnConfig(k=2.0, n=5, alpha=1e-4, beta=0.75)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    generator = torch.Generator(device).manual_seed(1)
    x, g = (torch.randn(shape, generator=generator, device=device).mul_(30).to(getattr(torch, dtype),
                                                                               memory_format=memory_format)
            for _ in range(2))
    b, c, h, w = shape

    def theirs(x: Any) -> Any:
        maps = functional.relu(x).reshape(b * 2, c // 2, h, w)
        y = functional.local_response_norm(maps, config.n, config.alpha * config.n, config.beta, config.k)
        return y.reshape(shape)

    return x, g, theirs, lambda x: local_response_norm(x, config, groups=2, relu=True)


def measure(shape: tuple[int, int, int, int], layout: str, dtype: str, repeats: int) -> list[tuple[float, float]]:
    """Milliseconds of (torch's, ours), forward and backward, one pair a repeat, after one that warms up."""
    x, g, theirs, ours = make(shape, layout, dtype, "cpu")

    def milliseconds(operator: Operator) -> float:
        leaf = x.detach().requires_grad_()
        start = time.perf_counter()
        operator(leaf).backward(g)
        return (time.perf_counter() - start) * 1000

    return [(milliseconds(theirs), milliseconds(ours)) for _ in range(repeats + 1)][1:]


def capture(x: Any, g: Any, operator: Operator, alive: list[Any]) -> tuple[Any, Any]:
    """CUDA graphs of CALLS forward and of CALLS backward passes. What they read, and no graph owns, is put into `alive`: its
    memory would be given back, to the driver even, when the next graph is captured."""
    import torch

    leaf, stream = x.detach().requires_grad_(), torch.cuda.Stream()
    graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a backward pass runs on its forward's stream: one stream for all
        for _ in range(2):           # compiles and warms up
            y = operator(leaf)
            torch.autograd.grad(y, leaf, g, retain_graph=True)
    torch.cuda.synchronize()
    with torch.cuda.graph(graphs[0], stream=stream):
        for _ in range(CALLS):
            operator(leaf)
    with torch.cuda.graph(graphs[1], stream=stream):
        for _ in range(CALLS):
            torch.autograd.grad(y, leaf, g, retain_graph=True)
    alive += [leaf, y]
    return graphs


def measure_gpu(shape: tuple[int, int, int, int], layout: str, dtype: str, repeats: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds of one (forward, backward) pass of each way; the ways take turns."""
    import torch

    from model import lrn

    x, g, theirs, ours = make(shape, layout, dtype, "cuda")
    graphs: dict[str, tuple[Any, Any]] = {}
    alive: list[Any] = []
    with contextlib.suppress(NotImplementedError):  # torch's lacks some types on some devices
        graphs["torch"] = capture(x, g, theirs, alive)
    with mock.patch.object(lrn, "fused", lambda: None):
        graphs["chunked"] = capture(x, g, ours, alive)
    if lrn.fused() is not None:
        graphs["fused"] = capture(x, g, ours, alive)
    found: dict[str, list[list[float]]] = {way: [[], []] for way in graphs}
    for _ in range(repeats + 1):
        for way, passes in graphs.items():
            for graph, times in zip(passes, found[way]):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / CALLS)
    return {way: (statistics.median(forward[1:]), statistics.median(backward[1:]))
            for way, (forward, backward) in found.items()}


def bench_gpu(batch: int, dtypes: Sequence[str], repeats: int) -> None:
    import torch

    from model import lrn

    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, median of {repeats}"
          + ("" if lrn.fused() is not None else "; no fused way here: Triton, or what it builds with, is missing"))
    print(f"{'shape':>20}  {'format':14}{'dtype':10}{'way':8}{'forward ms':>11}{'GB/s':>7}{'backward ms':>13}{'GB/s':>7}")
    for shape in GPU_SHAPES:
        for layout in ("channels_last", "nchw"):
            for dtype in dtypes:
                megabytes = batch * math.prod(shape) * getattr(torch, dtype).itemsize / 1e6
                for way, (forward, backward) in measure_gpu((batch, *shape), layout, dtype, repeats).items():
                    print(f"{str((batch, *shape)):>20}  {layout:14}{dtype:10}{way:8}{forward:11.4f}{2 * megabytes / forward:7.0f}"
                          f"{backward:13.4f}{3 * megabytes / backward:7.0f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Time LRN against torch.nn.LocalResponseNorm, forward and backward.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="torch threads, on a CPU")
    parser.add_argument("--repeats", type=int, default=5, help="pairs measured for each row")
    parser.add_argument("--batch", type=int, default=128, help="images")
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16"),
                        help="default: float32 on a CPU, bfloat16 and float32 on a GPU")
    args = parser.parse_args()
    for name in ("threads", "repeats", "batch"):
        if getattr(args, name) < 1:
            print(f"--{name} (={getattr(args, name)}) must be at least 1; give a positive number", file=sys.stderr)
            return 2

    import torch
    if args.device == "cuda":
        if not torch.cuda.is_available():
            print("--device (=cuda) needs a GPU that torch can use; leave it out to time the CPU", file=sys.stderr)
            return 2
        bench_gpu(args.batch, (args.dtype,) if args.dtype else ("bfloat16", "float32"), args.repeats)
        return 0
    dtype = args.dtype or "float32"
    if dtype == "bfloat16":
        print("--dtype (=bfloat16) is not in torch's LRN on a CPU; use float32, or --device cuda", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {dtype}, median of {args.repeats}")
    print(f"{'shape':>20}  {'format':14}{'torch ms':>10}{'ours ms':>10}{'ratio':>8}   range")
    for shape in SHAPES:
        for layout in ("nchw", "channels_last"):
            pairs = measure((args.batch, *shape), layout, dtype, args.repeats)
            ratios = [theirs / ours for theirs, ours in pairs]
            theirs, ours = (statistics.median(column) for column in zip(*pairs))
            print(f"{str((args.batch, *shape)):>20}  {layout:14}{theirs:10.1f}{ours:10.1f}"
                  f"{statistics.median(ratios):8.1f}   {min(ratios):.1f} .. {max(ratios):.1f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without an install, too
    sys.exit(main())
