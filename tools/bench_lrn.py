"""Time model.lrn against torch.nn.LocalResponseNorm, forward and backward, in one interleaved run.

    python tools/bench_lrn.py [--threads 1] [--repeats 5] [--batch 128]

Prints, for each shape and memory format, the medians in milliseconds and their ratio (and its range over the repeats).
Both get the ReLU before them: torch's as an operator, ours folded in. Windows do not cross the two towers.
"""
from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

SHAPES = ((96, 55, 55), (256, 27, 27), (96, 15, 15))


def measure(shape: tuple[int, int, int, int], layout: str, dtype: str, repeats: int) -> list[tuple[float, float]]:
    """Milliseconds of (torch's, ours), forward and backward, one pair a repeat, after one that warms up."""
    import torch
    from torch.nn import functional

    from model.config import LrnConfig
    from model.lrn import local_response_norm

    config = LrnConfig(k=2.0, n=5, alpha=1e-4, beta=0.75)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    generator = torch.Generator().manual_seed(1)
    x, g = (torch.randn(shape, generator=generator).mul_(30).to(getattr(torch, dtype), memory_format=memory_format)
            for _ in range(2))
    b, c, h, w = shape

    def theirs(x: Any) -> Any:
        maps = functional.relu(x).reshape(b * 2, c // 2, h, w)
        y = functional.local_response_norm(maps, config.n, config.alpha * config.n, config.beta, config.k)
        return y.reshape(shape)

    def milliseconds(ours: bool) -> float:
        leaf = x.detach().requires_grad_()
        start = time.perf_counter()
        (local_response_norm(leaf, config, groups=2, relu=True) if ours else theirs(leaf)).backward(g)
        return (time.perf_counter() - start) * 1000

    return [(milliseconds(False), milliseconds(True)) for _ in range(repeats + 1)][1:]


def main() -> int:
    parser = argparse.ArgumentParser(description="Time LRN against torch.nn.LocalResponseNorm, forward and backward.")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--repeats", type=int, default=5, help="pairs measured for each row")
    parser.add_argument("--batch", type=int, default=128, help="images")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16"))
    args = parser.parse_args()
    for name in ("threads", "repeats", "batch"):
        if getattr(args, name) < 1:
            print(f"--{name} (={getattr(args, name)}) must be at least 1; give a positive number", file=sys.stderr)
            return 2

    import torch
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {args.dtype}, median of {args.repeats}")
    print(f"{'shape':>20}  {'format':14}{'torch ms':>10}{'ours ms':>10}{'ratio':>8}   range")
    for shape in SHAPES:
        for layout in ("nchw", "channels_last"):
            pairs = measure((args.batch, *shape), layout, args.dtype, args.repeats)
            ratios = [theirs / ours for theirs, ours in pairs]
            theirs, ours = (statistics.median(column) for column in zip(*pairs))
            print(f"{str((args.batch, *shape)):>20}  {layout:14}{theirs:10.1f}{ours:10.1f}"
                  f"{statistics.median(ratios):8.1f}   {min(ratios):.1f} .. {max(ratios):.1f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without an install, too
    sys.exit(main())
