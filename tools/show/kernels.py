"""The filters of conv1 (paper figure 3) with how much of each tower's is colour, as a PNG and in text."""

import argparse

from pipeline.files import atomic_write
from train.checkpoint.resolve import NETWORKS, resolve
from train.figures.kernels import chroma_lines, conv1, png, sheet


def run(args: argparse.Namespace) -> None:
    """Draw the kernels of a checkpoint. Raises ValueError or RuntimeError."""
    path = resolve(args.run, args.which, kinds=NETWORKS, name="RUN").path
    kernels, towers = conv1(path)
    lines = chroma_lines(kernels, towers)
    picture = png(sheet(kernels, towers))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.out) as file:
        file.write(picture)
    print("\n".join([f"{len(kernels)} kernels of {path} in {args.out}", *lines]))
