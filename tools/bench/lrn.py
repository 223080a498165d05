"""Time model.lrn against torch.nn.LocalResponseNorm, forward and backward, interleaved: `python tools/bench/lrn.py [--device
cuda]`.

Prints, for each shape and memory format, the medians in milliseconds and the ratio (and its range over the rounds). Both get
the ReLU before them: torch's as an operator, ours folded in. Windows do not cross the two towers. On a GPU ours is timed fused
and in chunks, as where Triton is missing.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

if not __package__:  # run as a file: tools/profile must not hide the standard library's `profile`
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.cli import guarded  # noqa: E402  # found by the line above

SHAPES = ((96, 55, 55), (256, 27, 27), (96, 15, 15))  # conv1's and conv2's maps at 227 pixels, conv1's at 67
LAYOUTS = ("contiguous_format", "channels_last")


def bench(shape: tuple[int, ...], layout: str, dtype: str, args: argparse.Namespace) -> None:
    """Print a line for each way of ours."""
    import torch
    from torch.nn import functional
    from torch.utils.benchmark import Timer

    from model import lrn
    from model.config import LrnConfig
    from tools.profile.measure import interleave, ratio, spread

    config = LrnConfig(k=2.0, n=5, alpha=1e-4, beta=0.75)
    generator = torch.Generator(args.device).manual_seed(1)
    kind: dict[str, Any] = {"dtype": getattr(torch, dtype), "memory_format": getattr(torch, layout)}
    x, grad = ((30 * torch.randn(shape, generator=generator, device=args.device)).to(**kind) for _ in range(2))
    b, c, h, w = shape

    def theirs(x: torch.Tensor) -> torch.Tensor:
        maps = functional.relu(x).reshape(b * 2, c // 2, h, w)
        return functional.local_response_norm(maps, config.n, config.alpha * config.n, config.beta, config.k).reshape(shape)

    def ours(x: torch.Tensor) -> torch.Tensor:
        return lrn.local_response_norm(x, config, groups=2, relu=True)

    def chunked(x: torch.Tensor) -> torch.Tensor:
        with mock.patch.object(lrn, "triton_kernels", lambda: None):
            return ours(x)

    def milliseconds(operator: Callable[[Any], Any]) -> float:
        names = {"operator": operator, "x": x.detach().requires_grad_(), "grad": grad}
        timer = Timer("operator(x).backward(grad)", globals=names, num_threads=args.threads)
        return timer.timeit(10 if args.device == "cuda" else 1).mean * 1e3  # waits for a GPU at the end; warms up

    ways = {"torch": theirs, "ours": ours} | ({"chunked": chunked} if args.device == "cuda" else {})
    times = interleave({way: partial(milliseconds, operator) for way, operator in ways.items()}, args.repeats)
    for way in list(ways)[1:]:
        speed = ratio(times["torch"], times[way])
        print(f"{str(shape):>20}  {layout:18}{dtype:10}{way:8}{spread(times['torch']).median:10.2f}"
              f"{spread(times[way]).median:10.2f}{speed.median:8.1f}   {speed.least:.1f} .. {speed.most:.1f}", flush=True)


def run(args: argparse.Namespace) -> None:
    """Measure and print. Raises ValueError."""
    for name in ("threads", "repeats", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} (={getattr(args, name)}) must be at least 1; give a positive number")
    import torch
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device (=cuda) needs a GPU that torch can use; leave it out to time the CPU")
    if args.device == "cpu" and args.dtype == "bfloat16":
        raise ValueError("--dtype (=bfloat16) is not in torch's LRN on a CPU; use float32, or --device cuda")
    print(f"torch {torch.__version__}, {args.threads} threads, median of {args.repeats}")
    print(f"{'shape':>20}  {'format':18}{'dtype':10}{'way':8}{'torch ms':>10}{'ours ms':>10}{'ratio':>8}   range")
    for shape in SHAPES:
        for layout in LAYOUTS:
            bench((args.batch, *shape), layout, args.dtype, args)


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit code: 0, or 2 with a message on stderr."""
    parser = argparse.ArgumentParser(description="Time LRN against torch.nn.LocalResponseNorm, forward and backward.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="torch threads, on a CPU")
    parser.add_argument("--repeats", type=int, default=5, help="rounds measured for each row")
    parser.add_argument("--batch", type=int, default=128, help="images")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16"))
    args = parser.parse_args(arguments)
    return guarded(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
