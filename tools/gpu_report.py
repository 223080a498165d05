"""Everything worth knowing about a GPU that is at hand for ten minutes, and a page of it (docs/performance.md):

    python tools/gpu_report.py --seconds 560 --json report.json --page report.html

Stages run one after the other, the most valuable first, each in a process of its own and with a deadline; the JSON is written
anew, in one piece, whenever one ends. A stage that fails, crashes or runs out of time leaves its error there, and what it had
found; the next one runs. `--device cpu` runs the same code at toy sizes, to see that it works: its figures mean nothing.
Exit codes: 0 done, whatever the stages found, 2 a mistake in what was asked, 130 interrupted.
"""
from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: tools/profile must not hide the standard library's `profile`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train.exit_codes import run_command, start_command  # noqa: E402

if __name__ == "__main__":
    start_command()

import argparse
import datetime
import importlib
import json
import multiprocessing
import os
import shlex
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tools.cli import guarded  # noqa: E402
from train.cli import Parser, positive  # noqa: E402

if TYPE_CHECKING:
    from tools.bench.gpu_data import Job

# Stages in their order: where the function is, and its deadline in seconds.
STAGES = {"data": ("gpu_data", 120), "environment": ("gpu", 40), "smoke": ("gpu_loader", 45), "tests": ("gpu", 90),
          "trace": ("gpu", 60), "steps": ("gpu", 180), "decoder": ("gpu_loader", 60), "tiers": ("gpu_loader", 120),
          "trainings": ("gpu_loader", 90), "exact": ("gpu", 100)}
LEAST_S = 5.0  # with less time left a stage is not begun
TAIL = 2000  # characters of a failed stage's output that are kept


def run_stage(name: str, job: Job, limit_s: float) -> dict[str, Any]:
    """Run a stage in a process of its own: its results, seconds, and error or None."""
    out, log, start = job.scratch / f"{name}.json", job.scratch / f"{name}.log", time.monotonic()
    process = multiprocessing.get_context("spawn").Process(target=stage, args=(name, job, out, log))
    process.start()
    assert process.pid is not None  # it has been started
    try:
        process.join(limit_s)
        code = process.exitcode
    finally:  # with all that it started
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    text = log.read_text(errors="replace").strip() if log.exists() else ""
    error = f"not done after {limit_s:.0f} s" if code is None else f"exit code {code}: {text.splitlines()[-1] if text else ''}"
    results = json.loads(out.read_text()) if out.exists() else {}
    return {"seconds": round(time.monotonic() - start, 1), "error": error if code != 0 else None,
            **({"output": text[-TAIL:]} if code != 0 else {}), "results": results}


def stage(name: str, job: Job, out: Path, log: Path) -> None:
    """In a stage's process: write each figure as soon as it is known."""
    os.setsid()
    with log.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)

    def work() -> None:
        from pipeline.files import write_json

        results: dict[str, Any] = {}
        function = getattr(importlib.import_module(f"tools.bench.{STAGES[name][0]}"), name)
        for key, value in function(job):
            results[key] = value
            write_json(out, results)

    sys.exit(guarded(work))


def measure(args: argparse.Namespace, command: Sequence[str]) -> dict[str, Any]:
    """Run the stages; the report, written after each of them."""
    import torch

    from pipeline.files import write_json
    from tools.bench.gpu_data import Job

    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device (=cuda) is not there; run this on a machine with a GPU, or with --device cpu to try it")
    start = time.monotonic()
    report: dict[str, Any] = {
        "command": shlex.join(["python", "tools/gpu_report.py", *command]), "device": device, "small": device == "cpu",
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "stages": {}}
    with tempfile.TemporaryDirectory(prefix="gpu-report-") as folder:
        job = Job(Path(folder), device, device == "cpu", args.index and args.index.absolute())
        for name, (_, limit_s) in STAGES.items():
            if args.only and name not in args.only:
                continue
            left = args.seconds - (time.monotonic() - start)
            report["stages"][name] = (run_stage(name, job, min(limit_s, left)) if left >= LEAST_S else
                                      {"seconds": 0, "error": f"not begun: {left:.0f} s were left", "results": {}})
            report["seconds"] = round(time.monotonic() - start, 1)
            write_json(args.json, report)
            print(f"{name}: {report['stages'][name]['seconds']:.0f} s, {report['stages'][name]['error'] or 'done'}", flush=True)
    return report


def run(args: argparse.Namespace, command: Sequence[str]) -> None:
    """Measure, write, draw. Raises ValueError or RuntimeError."""
    if args.render and not args.page:
        raise ValueError("--render needs --page; name the file to write")
    from pipeline.files import atomic_write, read_manifest

    if args.page:  # before the time is spent
        from tools.bench import gpu_page
    report = read_manifest(args.json) if args.render else measure(args, command)
    if args.page:
        for path, text in ((args.page, gpu_page.html(report)), (args.page.with_suffix(".md"), gpu_page.markdown(report))):
            with atomic_write(path) as file:
                file.write(text.encode())
        print(f"{args.page}, {args.page.with_suffix('.md')}")


def main(arguments: Sequence[str]) -> int:
    """The command. Returns its exit code."""
    parser = Parser(prog="gpu_report.py", description=__doc__,
                    example="python tools/gpu_report.py --json report.json --page report.html")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="the report, written after each stage")
    parser.add_argument("--page", type=Path, metavar="HTML", help="a page with plots, and its tables as Markdown beside it")
    parser.add_argument("--render", action="store_true", help="measure nothing: the page of the JSON that is there")
    parser.add_argument("--seconds", type=positive, default=560.0, metavar="S", help="for all of it")
    parser.add_argument("--index", type=Path, metavar="DIR", help="index of photographs (default: synthetic ones, made now)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto",
                        help="cpu: toy sizes; auto: a GPU if there is one")
    parser.add_argument("--only", nargs="+", choices=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)}; most need data")
    return guarded(lambda: run(parser.parse_args(arguments), arguments))


if __name__ == "__main__":
    run_command(main)
