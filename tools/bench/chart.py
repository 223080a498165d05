"""The chart of `alexnet bench`, and of a file that it wrote (the README's):

    python -m tools.bench.chart docs/results/bench.json -o docs/assets/loaders.svg
"""
import argparse
import json
from pathlib import Path
from typing import Any

COLOURS = {"ours": "#c2571a", "peer": "#9fb0be"}
READS = {"original": "reading the original JPEGs", "packed": "reading 256-pixel JPEGs", "squares": "reading decoded squares",
         "decoded": "reading decoded squares"}


def draw(measured: dict[str, Any], source: str, path: Path) -> None:
    """A bar for each loader, a panel for each kind of files it reads; whiskers from the slowest round to the fastest."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    sides = [side for side in measured["sides"] if side["ran"] and side["role"] in COLOURS]
    kinds = list(dict.fromkeys(side["data"] for side in sides))
    panels = [sorted((side for side in sides if side["data"] == kind), key=lambda side: side["images_per_s"]["median"])
              for kind in kinds]
    figure = Figure(figsize=(8.4, 0.2 * sum(len(panel) + 1.2 for panel in panels) + 0.5), facecolor="white",
                    layout=ConstrainedLayoutEngine(hspace=0.01))
    axes = figure.subplots(len(kinds), 1, squeeze=False, gridspec_kw={"height_ratios": [len(panel) + 0.6 for panel in panels]})
    for axis, kind, panel in zip(axes[:, 0], kinds, panels):
        for row, side in enumerate(panel):
            speed = side["images_per_s"]
            axis.barh(row, speed["median"], height=0.74, color=COLOURS[side["role"]])
            axis.hlines(row, speed["min"], speed["max"], color="#444444", lw=0.8)
            axis.text(speed["max"], row, f"  {speed['median']:,.0f}", va="center", fontsize=7)
        axis.set_yticks(range(len(panel)), [side["label"] for side in panel], fontsize=7)
        for label, side in zip(axis.get_yticklabels(), panel):
            label.set_fontweight("bold" if side["role"] == "ours" else "normal")
        axis.set_xlim(0, 1.12 * max(side["images_per_s"]["max"] for side in panel))
        axis.set_xticks([])
        axis.tick_params(length=0)
        axis.set_title(READS.get(kind, f"reading {kind}"), loc="left", fontsize=8, pad=2)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    work, machine = measured["work"], measured["hardware"]
    figure.suptitle(f"Images per second, {machine['cores']} cores of {machine['cpu']}, {work['workers']} workers each, "
                    f"n = {work['rounds']}, {measured['date']} ({source})", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "chart"}):  # the same bytes from the same figures
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.chart", description=(__doc__ or "").split(":")[0])
    parser.add_argument("json", type=Path, metavar="JSON", help="what alexnet bench wrote")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="the chart, .svg or .png")
    args = parser.parse_args(argv)
    draw(json.loads(args.json.read_text(encoding="utf-8")), args.json.name, args.out)


if __name__ == "__main__":
    main()
