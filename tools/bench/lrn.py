"""Time model.lrn against torch.nn.LocalResponseNorm, forward and backward, interleaved.

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
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.cli import guarded  # noqa: E402  # found by the line above

SHAPES = ((96, 55, 55), (256, 27, 27), (96, 15, 15))
GPU_SHAPES = ((96, 55, 55), (256, 27, 27))  # conv1's and conv2's maps at 227 pixels
CALLS = 10                                  # in a CUDA graph
Operator = Callable[[Any], Any]


def prepare(shape: tuple[int, ...], layout: str, dtype: str, device: str) -> tuple[Any, Any, Operator, Operator]:
    """An input and a gradient, and the operators to compare: torch's and ours."""
    import torch
    from torch.nn import functional

    from model.config import LrnConfig
    from model.lrn import local_response_norm

    config = LrnConfig(k=2.0, n=5, alpha=1e-4, beta=0.75)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    generator = torch.Generator(device).manual_seed(1)
    x, grad = (torch.randn(shape, generator=generator, device=device).mul_(30).to(getattr(torch, dtype),
                                                                                  memory_format=memory_format)
               for _ in range(2))
    b, c, h, w = shape

    def theirs(x: Any) -> Any:
        maps = functional.relu(x).reshape(b * 2, c // 2, h, w)
        y = functional.local_response_norm(maps, config.n, config.alpha * config.n, config.beta, config.k)
        return y.reshape(shape)

    return x, grad, theirs, lambda x: local_response_norm(x, config, groups=2, relu=True)


# --- on a CPU

def cpu_ms(operator: Operator, x: Any, grad: Any) -> float:
    """Milliseconds of one forward and backward pass."""
    leaf = x.detach().requires_grad_()
    start = time.perf_counter()
    operator(leaf).backward(grad)
    return (time.perf_counter() - start) * 1000


def bench_cpu(batch: int, dtype: str, threads: int, repeats: int) -> None:
    """Print a line for each shape and layout."""
    import torch

    from tools.profile.measure import interleave, ratio, spread

    torch.set_num_threads(threads)
    print(f"torch {torch.__version__}, {threads} threads, {dtype}, median of {repeats}")
    print(f"{'shape':>20}  {'format':14}{'torch ms':>10}{'ours ms':>10}{'ratio':>8}   range")
    for shape in ((batch, *shape) for shape in SHAPES):
        for layout in ("nchw", "channels_last"):
            x, grad, theirs, ours = prepare(shape, layout, dtype, "cpu")
            times = interleave({"torch": partial(cpu_ms, theirs, x, grad), "ours": partial(cpu_ms, ours, x, grad)}, repeats + 1)
            torch_ms, ours_ms = times["torch"][1:], times["ours"][1:]  # the first warms up
            speed = ratio(torch_ms, ours_ms)
            print(f"{str(shape):>20}  {layout:14}{spread(torch_ms).median:10.1f}{spread(ours_ms).median:10.1f}"
                  f"{speed.median:8.1f}   {speed.least:.1f} .. {speed.most:.1f}", flush=True)


# --- on a GPU

def capture(x: Any, grad: Any, operator: Operator, alive: list[Any]) -> tuple[Any, Any]:
    """CUDA graphs of CALLS forward and of CALLS backward passes. What they read, and no graph owns, is put into `alive`: its
    memory would be given back, to the driver even, when the next graph is captured."""
    import torch

    leaf, stream = x.detach().requires_grad_(), torch.cuda.Stream()
    graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a backward pass runs on its forward's stream: one stream for all
        for _ in range(2):           # compiles and warms up
            y = operator(leaf)
            torch.autograd.grad(y, leaf, grad, retain_graph=True)
    torch.cuda.synchronize()
    with torch.cuda.graph(graphs[0], stream=stream):
        for _ in range(CALLS):
            operator(leaf)
    with torch.cuda.graph(graphs[1], stream=stream):
        for _ in range(CALLS):
            torch.autograd.grad(y, leaf, grad, retain_graph=True)
    alive += [leaf, y]
    return graphs


def gpu_ms(graphs: tuple[Any, Any]) -> tuple[float, float]:
    """Milliseconds of one (forward, backward) pass."""
    import torch

    milliseconds = []
    for graph in graphs:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        milliseconds.append(start.elapsed_time(end) / CALLS)
    return milliseconds[0], milliseconds[1]


def bench_gpu(batch: int, dtypes: Sequence[str], repeats: int) -> None:
    """Print a line for each shape, layout, type and way."""
    import torch

    from model import lrn
    from tools.profile.measure import interleave, spread

    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, median of {repeats}"
          + ("" if lrn.triton_kernels() is not None else "; no fused way here: Triton, or what it builds with, is missing"))
    print(f"{'shape':>20}  {'format':14}{'dtype':10}{'way':8}{'forward ms':>11}{'GB/s':>7}{'backward ms':>13}{'GB/s':>7}")
    for shape in ((batch, *shape) for shape in GPU_SHAPES):
        for layout in ("channels_last", "nchw"):
            for dtype in dtypes:
                x, grad, theirs, ours = prepare(shape, layout, dtype, "cuda")
                graphs, alive = {}, list[Any]()
                with contextlib.suppress(NotImplementedError):  # torch's lacks some types on some devices
                    graphs["torch"] = capture(x, grad, theirs, alive)
                with mock.patch.object(lrn, "triton_kernels", lambda: None):
                    graphs["chunked"] = capture(x, grad, ours, alive)
                if lrn.triton_kernels() is not None:
                    graphs["fused"] = capture(x, grad, ours, alive)
                times = interleave({way: partial(gpu_ms, pair) for way, pair in graphs.items()}, repeats + 1)
                megabytes = math.prod(shape) * getattr(torch, dtype).itemsize / 1e6
                for way, pairs in times.items():
                    forward, backward = (spread(column).median for column in zip(*pairs[1:]))
                    print(f"{str(shape):>20}  {layout:14}{dtype:10}{way:8}{forward:11.4f}{2 * megabytes / forward:7.0f}"
                          f"{backward:13.4f}{3 * megabytes / backward:7.0f}", flush=True)


def run(args: argparse.Namespace) -> None:
    """Measure and print. Raises ValueError."""
    for name in ("threads", "repeats", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} (={getattr(args, name)}) must be at least 1; give a positive number")
    if args.device == "cpu":
        if args.dtype == "bfloat16":
            raise ValueError("--dtype (=bfloat16) is not in torch's LRN on a CPU; use float32, or --device cuda")
        bench_cpu(args.batch, args.dtype or "float32", args.threads, args.repeats)
        return
    import torch
    if not torch.cuda.is_available():
        raise ValueError("--device (=cuda) needs a GPU that torch can use; leave it out to time the CPU")
    bench_gpu(args.batch, (args.dtype,) if args.dtype else ("bfloat16", "float32"), args.repeats)


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit code: 0, or 2 with a message on stderr."""
    parser = argparse.ArgumentParser(description="Time LRN against torch.nn.LocalResponseNorm, forward and backward.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="torch threads, on a CPU")
    parser.add_argument("--repeats", type=int, default=5, help="pairs measured for each row")
    parser.add_argument("--batch", type=int, default=128, help="images")
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16"),
                        help="default: float32 on a CPU, bfloat16 and float32 on a GPU")
    args = parser.parse_args(arguments)
    return guarded(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
