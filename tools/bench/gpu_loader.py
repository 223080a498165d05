"""What tools/gpu_report.py finds out about decoder, loader and whole trainings; stages as in tools/bench/gpu.py."""
from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from pipeline.decoding.dali import RegionPipeline
from pipeline.loading.loader import DecodingChain
from pipeline.loading.train_loader import TrainLoader
from pipeline.monitor import STAGES
from pipeline.stats import Stats
from tools.bench.gpu import ROOT, figures, synchronisations, timed
from tools.bench.gpu_data import Job
from tools.profile.measure import interleave, ratio, spread
from tools.profile.network import NetworkStep
from tools.profile.stages import arrived
from tools.study import lines
from train import build
from train.config import Config
from train.exit_codes import STOPPED
from train.parallel.topology import Topology, process_group
from train.recipe import dump

LOADS = (0.65, 0.0, 0.3, 1.0)
DECODED = re.compile(r"^(?!.*(?:create|regist)).*?(\w+_decoder)\b")  # neither made nor registered: at work


def open_loader(config: Config, topology: Topology, stack: ExitStack) -> TrainLoader:
    """The training loader of a config, filled."""
    index = build.index(config, "train")
    quarantine = Path(config.machine.runs) / "quarantine.jsonl"
    loader = build.train_loader(config, topology, index, Stats.for_index(index, config.data.square_px), quarantine)
    assert isinstance(loader, TrainLoader)  # there is one process
    stack.enter_context(closing(loader)).fill()
    return loader


def packed_words(job: Job) -> list[str]:
    return ["--data.tier=packed", f"--data.packed={job.packed}"]


# --- the decoder

def ways(job: Job, loads: tuple[float, ...]) -> Iterator[tuple[str, Config]]:
    """Name and config of every way to decode. Regions come last: if their decoder crashes, the rest is known."""
    sources = {kind: [f"--data.index={path}"] for kind, path in job.kinds.items()} | {"packed": packed_words(job)}
    for whole, fancy, load, kind in itertools.product(("whole", "region"), (True, False), loads, sources):
        if fancy or kind not in ("444", "packed"):  # without chroma of another size there is nothing to interpolate
            yield f"{kind}, {whole}, {'fancy' if fancy else 'plain'}, load {load:g}", job.config(
                *sources[kind], f"--machine.gpu_decode={whole}", f"--machine.fancy_upsampling={str(fancy).lower()}",
                f"--machine.hw_decoder_load={load}")


@contextmanager
def decoding(config: Config) -> Iterator[tuple[TrainLoader, RegionPipeline]]:
    """DALI's decoder alone over some batches again and again."""
    with ExitStack() as stack:
        topology = stack.enter_context(process_group(towers=config.model.towers, device=config.machine.device, timeout_s=3600))
        loader = open_loader(config, topology, stack)
        chain = cast(DecodingChain, loader.chain)
        read = stack.enter_context(closing(chain.read(range(min(4, len(loader))))))
        plans = [replace(plan, encoded=[memoryview(bytes(view)) for view in plan.encoded]) for plan in read]  # kept longer
        changed = replace(chain.settings, decode_only=True)
        yield loader, stack.enter_context(closing(RegionPipeline(itertools.cycle(plans), changed)))


def smoke(job: Job) -> Iterator[tuple[str, Any]]:
    """A batch or two decoded in every way, and what nvImageCodec's log says of which decoder took the images."""
    os.environ["DALI_NVIMGCODEC_LOG_LEVEL"] = "3"
    for name, config in ways(job, (0.65,)):
        print(name, flush=True)
        with tempfile.TemporaryFile() as log:
            error = None
            kept = os.dup(2)
            os.dup2(log.fileno(), 2)
            try:
                with decoding(config) as (loader, pipeline):
                    images = arrived(loader, len(pipeline.collect()))
            except RuntimeError as failure:
                images, error = 0, " ".join(str(failure).split())[:300]
            finally:
                os.dup2(kept, 2)
                os.close(kept)
            log.seek(0)
            lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in log.read().decode(errors="replace").splitlines()]
        used = Counter(match.group(1) for line in lines if (match := DECODED.search(line)))
        warned = [line for line in lines if "[WARN" in line or "[ERROR" in line]
        yield name, {"images": images, "error": error, "decoders": dict(used), "warnings": list(dict.fromkeys(warned))[:5],
                     "log": [line for line in lines if DECODED.search(line)][:12]}


def decoder(job: Job) -> Iterator[tuple[str, Any]]:
    """Images/s of the decoder alone; crops are neither resized nor used."""
    for name, config in ways(job, LOADS[:1] if job.small else LOADS):
        print(name, flush=True)
        try:
            with decoding(config) as (loader, pipeline):
                rounds = [timed(lambda: arrived(loader, len(pipeline.collect())), loader.device, job.seconds)
                          for _ in range(min(3, job.rounds))]
            yield name, figures(rounds, config.train.batch)
        except RuntimeError as error:
            yield name, {"error": " ".join(str(error).split())[:300]}


# --- loader and network

def tier_words(job: Job) -> dict[str, list[str]]:
    """Settings of each tier, by its name."""
    resident, gpu = ["--data.tier=resident"], "--machine.resident_memory=gpu"
    found = {f"archives, {kind}": [f"--data.index={path}"] for kind, path in job.kinds.items()} | {
        "packed": packed_words(job), "resident in RAM": resident,
        "streamed": ["--data.tier=streamed", f"--data.packed={job.packed}"]}
    if job.device == "cuda":
        found = {"resident in GPU memory": [*resident, gpu],
                 "resident in GPU memory, yuv420": [*resident, gpu, "--data.resident=yuv420"], **found}
    if job.small:
        del found["streamed"]
    return found


def tiers(job: Job) -> Iterator[tuple[str, Any]]:
    """Each tier alone, and feeding the network, beside the network on synthetic batches; interleaved."""
    config = job.config()
    with process_group(towers=config.model.towers, device=config.machine.device, timeout_s=3600) as topology:
        # Captured before there is a loader, whose DALI threads would end the process.
        network, synthetic = (NetworkStep(config, topology, wait=False) for _ in range(2))
        on_noise = synthetic.synthetic()
        for name, words in tier_words(job).items():
            print(name, flush=True)
            try:
                with ExitStack() as stack:
                    yield name, _tier(job, open_loader(job.config(*words), topology, stack), network, on_noise)
            except Exception as error:
                yield name, {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def _tier(job: Job, loader: TrainLoader, network: NetworkStep, on_noise: Iterator[int]) -> dict[str, Any]:
    device, batch, machine = loader.device, loader.sampler.share, loader.machine
    batches = itertools.chain.from_iterable(itertools.repeat(loader))  # one iterator: a loader has one at a time
    seconds, waited = 0.0, Counter[str]()

    def step() -> None:
        network(next(batches))

    def together() -> list[float]:
        nonlocal seconds
        for _ in range(machine.queue + machine.prefetch + machine.read_threads + 2):  # what was made ahead
            step()
        before = loader.monitor.waits
        found = timed(step, device, job.seconds)
        waits = loader.monitor.waits.since(before)
        seconds += sum(found) / 1e3
        waited.update({stage: getattr(waits, stage) for stage in ("seconds", *STAGES)})
        return found

    turns = interleave({"alone": lambda: timed(lambda: arrived(loader, len(next(batches).ids)), device, job.seconds),
                        "synthetic": lambda: timed(lambda: next(on_noise), device, job.seconds), "together": together},
                       2 if job.small else 3)
    rates = {key: [1e3 * batch * len(turn) / sum(turn) for turn in rounds] for key, rounds in turns.items()}
    return {"alone": spread(rates["alone"])._asdict(), "synthetic": spread(rates["synthetic"])._asdict(),
            **figures(turns["together"], batch), "of_synthetic": ratio(rates["together"], rates["synthetic"])._asdict(),
            "stall": waited["seconds"] / seconds, "causes": {stage: waited[stage] / seconds for stage in STAGES if waited[stage]},
            "synchronisations": synchronisations(step, device, 4 if job.small else 40)}


# --- trainings, by the command

def command(words: list[str]) -> tuple[int, str]:
    """Run train.main: exit code, last line of its output."""
    done = subprocess.run([sys.executable, "-m", "train.main", *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return done.returncode, (done.stdout.strip().splitlines() or [""])[-1]


def trainings(job: Job) -> Iterator[tuple[str, Any]]:
    """Whole trainings, metrics and checkpoint included: images/s of the second half of the steps, and waiting at their end."""
    recipe, steps = job.scratch / "recipe.yaml", 2 if job.small else 300
    recipe.write_text(dump(job.config()))
    words = tier_words(job)
    for number, name in enumerate(list(words)[:1] if job.small else words):
        print(name, flush=True)
        code, says = command(["--config", str(recipe), *words[name], f"--machine.name={number}", f"--machine.stop_after={steps}",
                              "--machine.metrics_steps=1"])
        if code != STOPPED:
            yield name, {"error": f"exit code {code}: {says}"}
            continue
        half = lines(job.scratch / "runs" / str(number), "step")[-steps // 2:]
        yield name, {"steps": len(half), "images_s": spread([line["images_per_s"] for line in half])._asdict(),
                     "waited": half[-1].get("waited")}
