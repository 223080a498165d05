"""What tools/gpu_report.py finds out about the device and the network's step. Each function is a stage: it gives figures by name,
which are kept if it does not reach its end. The loader's stages: tools/bench/gpu_loader.py."""
from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch

from model.alexnet import canonical_shapes, shapes
from model.config import ModelConfig
from tools.bench.gpu_data import Job
from tools.bench.step import plain_steps
from tools.cli import hardware, versions
from tools.profile.measure import interleave, ratio, spread
from tools.profile.network import NetworkStep
from train import build
from train.config import Config
from train.parallel.topology import Topology, process_group

ROOT = Path(__file__).resolve().parents[2]
SMI = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit", "temperature.gpu",
       "memory.total", "memory.used", "utilization.gpu", "mig.mode.current", "ecc.mode.current", "persistence_mode")
SWITCHES = {"step": ("captured", "eager"), "kernels": ("triton", "torch")}  # of `machine`: how a step is computed
OTHERWISE = {"pooling apart": "fuse_pooling=false", "tower halves": "tower_convs=halves"}  # one of these, with the first of those
TESTS = {  # a name: words of pytest
    "kernels against their twins": ("tests/model", "tests/resident/test_device.py", "tests/train/test_optimizer.py", "-k",
                                    "kernels or device", "-m", "not slow"),
    "the rest of -m gpu": ("tests/gpu", "tests/resident", "-k", "not demo_recipe and not past_2_31", "-m", "gpu")}
EXACT = {"captured against eager, resumed, not finite": ("tests/train", "-m", "gpu")}
TOP = 25  # kernels of a trace


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- the device

def environment(job: Job) -> Iterator[tuple[str, Any]]:
    """Versions, machine, card; and what large products and copies reach, for the limits of docs/performance.md."""
    yield "versions", {"cuda": torch.version.cuda, **versions()}
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    yield "commit", commit.stdout.strip()
    yield "machine", hardware()
    device = torch.device(job.device)
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(0)
        yield "card", {"name": card.name, "memory_bytes": card.total_memory, "multiprocessors": card.multi_processor_count,
                       "capability": f"{card.major}.{card.minor}"}
        query = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
        smi = subprocess.run(query, capture_output=True, text=True)
        yield "nvidia_smi", dict(zip(SMI, smi.stdout.strip().split(", "))) if smi.returncode == 0 else smi.stdout.strip()
    else:
        yield "card", {"name": "CPU"}
    side, size = (256, 1 << 20) if job.small else (8192, 1 << 30)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    works: dict[str, tuple[float, Callable[[], object]]] = {
        "flop_s": (2 * side ** 3, lambda: a @ b), "bytes_s": (2 * size, lambda: target.copy_(source)),
        "host_to_device_bytes_s": (size, lambda: target.copy_(host, non_blocking=True))}
    yield "peaks", {name: amount * 1e3 / min(timed(work, device, job.seconds)) for name, (amount, work) in works.items()}


# --- time

def timed(step: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Milliseconds of each of the steps that fill so many seconds, by the device's own clock, on which it waits for nothing but
    its work. One more is made before."""
    def mark() -> Any:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    start = time.perf_counter()
    step()
    synchronize(device)
    marks = [mark()]
    for _ in range(max(3, min(5000, round(seconds / (time.perf_counter() - start))))):
        step()
        marks.append(mark())
    synchronize(device)
    pairs = itertools.pairwise(marks)
    return [a.elapsed_time(b) if device.type == "cuda" else 1e3 * (b - a) for a, b in pairs]


def figures(rounds: Sequence[Sequence[float]], batch: int) -> dict[str, Any]:
    """Images/s of the rounds; p50 and p99 of all steps, in ms."""
    p50, p99 = np.percentile([ms for turn in rounds for ms in turn], [50, 99]).tolist()
    return {"images_s": spread([1e3 * batch * len(turn) / sum(turn) for turn in rounds])._asdict(), "p50_ms": p50, "p99_ms": p99}


def synchronisations(step: Callable[[], object], device: torch.device, steps: int) -> dict[str, Any]:
    """How often a step makes the host wait for the device, as torch sees it, and where."""
    if device.type != "cuda":
        return {"per_step": None, "where": {}}
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(steps):
                step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [warning for warning in caught if "synchroniz" in str(warning.message)]
    where = Counter(f"{one.filename}:{one.lineno}" for one in found)
    return {"per_step": len(found) / steps, "where": dict(where.most_common(5))}


# --- the network's step

def switched() -> Iterator[tuple[str, list[str]]]:
    """Every combination of the switches, and the first with each other setting: name, settings."""
    combined = {", ".join(values): [f"--machine.{name}={value}" for name, value in zip(SWITCHES, values)]
                for values in itertools.product(*SWITCHES.values())}
    yield from combined.items()
    first, words = next(iter(combined.items()))
    for name, setting in OTHERWISE.items():
        yield f"{first}, {name}", [*words, f"--machine.{setting}"]


def our_steps(config: Config, topology: Topology) -> Iterator[int]:
    """The training loop's own steps on noise, without end."""
    return NetworkStep(config, topology, wait=False).synthetic()


def on_noise(make: Callable[[Config, Topology], Iterator[int]], config: Config, stack: ExitStack) -> Callable[[], object]:
    """A step, of those that `make` makes, after a few for warming up."""
    topology = stack.enter_context(process_group(towers=config.model.towers, device=config.machine.device, timeout_s=3600))
    build.configure_torch(config, topology)
    step = partial(next, make(config, topology))
    for _ in range(5):
        step()
    synchronize(topology.device)
    return step


def steps(job: Job) -> Iterator[tuple[str, Any]]:
    """Each combination of switches, and the plain network without and with torch.compile, interleaved, by batch."""
    device = torch.device(job.device)
    for batch in job.batches:
        with ExitStack() as stack:
            ways: dict[str, tuple[Callable[[Config, Topology], Iterator[int]], list[str]]] = {
                name: (our_steps, words) for name, words in switched()}
            for name, compiled in (("plain PyTorch", False), ("plain, torch.compile", True)):
                ways[name] = partial(plain_steps, compiled=compiled, wait=False), []
            if job.small:
                del ways["plain, torch.compile"]  # compiling takes a minute
            found, ready = dict[str, Any](), dict[str, Callable[[], object]]()
            for name, (make, words) in ways.items():
                print(f"batch {batch}: {name}", flush=True)
                try:
                    ready[name] = on_noise(make, job.config(*words, batch=batch), stack)
                except Exception as error:  # what cannot run is a figure too
                    found[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            turns = interleave({name: partial(timed, step, device, job.seconds) for name, step in ready.items()}, job.rounds)
            base = turns.get("plain PyTorch")
            for name, rounds in turns.items():
                found[name] = figures(rounds, batch)
                if base is not None:
                    found[name]["over_plain"] = ratio(list(map(fmean, base)), list(map(fmean, rounds)))._asdict()
            yield str(batch), found


def trace(job: Job) -> Iterator[tuple[str, Any]]:
    """Of one step: kernels by time, and time by layer, as the shapes of the operators' arguments tell it."""
    device = torch.device(job.device)
    activity = torch.profiler.ProfilerActivity
    for name, words in switched():
        print(name, flush=True)
        try:
            with ExitStack() as stack:
                config = job.config(*words)
                step = on_noise(our_steps, config, stack)
                with torch.profiler.profile(activities=[activity.CPU, *[activity.CUDA] * (device.type == "cuda")],
                                            record_shapes=True) as profiler:
                    start = time.perf_counter()
                    step()
                    synchronize(device)
                    wall_us = 1e6 * (time.perf_counter() - start)
            yield name, {"wall_us": wall_us, **_summary(profiler, config.model, device)}
        except Exception as error:
            yield name, {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def _summary(profiler: Any, model: ModelConfig, device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"

    def own_us(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    kernels = [event for event in profiler.key_averages()  # "#": what the optimizer calls its step
               if event.device_type == kind and own_us(event) > 0 and "#" not in event.key]
    layers: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.device_type == torch.autograd.DeviceType.CPU:  # an operator, with the kernels that it launched itself
            layers[_layer(event.input_shapes, model)] += own_us(event)
    top = sorted(kernels, key=own_us, reverse=True)
    return {"device_us": sum(map(own_us, kernels)), "launches": sum(event.count for event in kernels), "layers": layers,
            "kernels": [{"name": event.key[:120], "calls": event.count, "us": own_us(event)} for event in top[:TOP]]}


def _layer(arguments: Sequence[Any], model: ModelConfig) -> str:
    """The layer whose weights, or else whose maps, are among the shapes of an operator's arguments."""
    weights: dict[tuple[int, ...], str] = {shape: name.split(".")[0] for name, shape in canonical_shapes(model).items()
                                           if name.endswith("weight")}
    maps: dict[tuple[int, ...], str] = {}
    for name, shape in shapes(model):
        if name.startswith("conv"):
            maps[shape] = f"{maps[shape]}/{name}" if shape in maps else name
    found = [tuple(shape) for shape in arguments if shape and isinstance(shape[0], int)]
    named = [weights[shape] for shape in found if shape in weights]
    named += [weights[shape[::-1]] for shape in found if len(shape) == 2 and shape[::-1] in weights]  # transposed
    named += [maps[shape[1:]] for shape in found if shape[1:] in maps]
    return named[0] if named else "the rest"


# --- tests

def tests(job: Job) -> Iterator[tuple[str, Any]]:
    """Kernels against their twins, then a fast subset of `pytest -m gpu`."""
    for name, words in TESTS.items():
        yield name, pytest(job, words)


def exact(job: Job) -> Iterator[tuple[str, Any]]:
    """Bit for bit: captured against eager steps, stopped and resumed ones, and what is not finite."""
    for name, words in EXACT.items():
        yield name, pytest(job, words)


def pytest(job: Job, words: Sequence[str]) -> dict[str, Any]:
    """Numbers of tests by outcome, and what those that failed say. On a CPU they are collected only."""
    print(*words, flush=True)
    path = job.scratch / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={path}", *words]
    done = subprocess.run(command + ["--collect-only"] * (job.device == "cpu"), cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    if job.device == "cpu" or not path.exists():
        return {"exit_code": done.returncode, "output": done.stdout[-500:]}
    suite = next(ElementTree.parse(path).iter("testsuite"))
    counts: Mapping[str, int] = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = {f"{case.get('classname')}::{case.get('name')}": (fault.get("message") or "")[:300]
              for case in suite.iter("testcase") for fault in (*case.iter("failure"), *case.iter("error"))}
    return {**counts, "exit_code": done.returncode, "failed": failed}
