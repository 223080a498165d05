"""The kernels of conv1 as the paper's figure 3: `python tools/show/kernels.py --run runs/NAME --out kernels.png`.

Tower a's kernels above, tower b's below, drawn by train/figures/kernels.py; under them, and printed, how much of each tower is
colour. In
the paper tower a is colour-agnostic and tower b colour-specific; which of the two it is, is up to the initial values.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from train.figures.kernels import conv1, sheet, stretch  # noqa: E402, F401 (the drawing itself; a page shows it too)


def run(asked: argparse.Namespace) -> None:
    """Find the checkpoint and draw. Raises ValueError or RuntimeError."""
    from train.checkpoint.resolve import resolve
    from train.figures.kernels import captioned, chroma_lines, need_matplotlib, tower_chroma

    need_matplotlib()
    path = resolve(asked.run or asked.checkpoint).path
    kernels, towers = conv1(path)
    found, chance = tower_chroma(kernels, towers)
    lines = chroma_lines(found, chance)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_bytes(captioned(sheet(kernels, towers), lines))
    if asked.json:
        print(json.dumps({"checkpoint": str(path), "kernels": len(kernels), "p": chance,
                          "towers": [dataclasses.asdict(entry) for entry in found]}))
    else:
        print("\n".join([f"{len(kernels)} kernels of {path} in {asked.out}", *lines]))


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit code: 0, or 2 with a message on stderr."""
    parser = argparse.ArgumentParser(prog="show_kernels.py",
                                     description="Write a PNG of conv1's kernels, a tower a block.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, metavar="DIR", help="run folder; its newest checkpoint is shown")
    which.add_argument("--checkpoint", type=Path, metavar="DIR", help="checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    from tools.cli import guarded
    asked = parser.parse_args(arguments)
    return guarded(lambda: run(asked))


if __name__ == "__main__":
    sys.exit(main())
