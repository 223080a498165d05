"""One run, called by train/main.py: build its parts, resume or begin, train, test; under torchrun resume after a restart."""
import contextlib
from pathlib import Path
from typing import ContextManager

from train import build, run_folder
from train.checkpoint.resolve import find_pretrained, load_pretrained
from train.config import Config
from train.logs.console import Console
from train.evaluate.metrics import CHANCE
from train.exit_codes import DONE, MISTAKE, STOPPED
from train.logs.loggers import check_installed
from train.loop import StopRequest, Trainer
from train.parallel.failure import reported
from train.parallel.topology import Topology
from train.recipe import CommandLine
from train.step import TrainStep

ENDED = "ended"  # key in torchrun's store: the exit code of a run that must not be restarted


def run(request: CommandLine, topology: Topology) -> int:
    """Train and test as requested, unless a start before has ended the run for good: torchrun (`--max-restarts`) restarts
    processes after any exit code but 0. Returns the exit code."""
    if topology.store.check([ENDED]):
        code = int(topology.store.get(ENDED))
        if topology.is_main:
            print(f"not started again by torchrun's --max-restarts: the run has ended with exit code {code}")
        return code
    try:
        code = train_and_test(request, topology)
    except ValueError:
        _record_end(topology, MISTAKE)
        raise
    if code == STOPPED:
        _record_end(topology, code)
    return code


def _record_end(topology: Topology, code: int) -> None:
    with contextlib.suppress(RuntimeError):  # torchrun has gone: nobody restarts
        topology.store.set(ENDED, str(code))


def train_and_test(request: CommandLine, topology: Topology) -> int:
    """Build the parts of a run, resume or begin it, train, test. Returns the exit code."""
    config, stop = build.with_precision(request.config, topology), StopRequest()
    check_installed(config)
    build.configure_torch(config, topology)
    folder = run_folder.folder_of(config, request.recipe)
    restarted = not request.resume and is_restarted(folder, topology)
    resume = request.resume or restarted
    with contextlib.ExitStack() as stack:
        console = stack.enter_context(contextlib.closing(
            Console(topology.is_main, config.machine.log_s, log=folder / run_folder.LOG)))
        config = build.hold_out(config, console.print)
        index = build.index(config, config.data.train_split, config.data.validation_split, config.data.test_split)
        stats = build.statistics(config, index)
        stop.listen()  # until here Ctrl-C ends the command at once
        train_step = TrainStep(config, topology)
        pretrained = find_pretrained(config, resume, console.warn)
        weights = "" if resume else load_pretrained(pretrained, train_step.network, config, topology, index)
        loader = stack.enter_context(contextlib.closing(
            build.train_loader(config, topology, index, stats, folder / run_folder.QUARANTINE)))
        tests = {split: stack.enter_context(contextlib.closing(
            build.eval_loader(config, topology, index, stats, split, keep=True)))
            for split in dict.fromkeys((config.data.validation_split, config.data.test_split))}
        stack.enter_context(claim(folder, config, resume, topology))
        trainer = stack.enter_context(contextlib.closing(
            Trainer(config, topology, train_step, loader, tests, index, stats, folder, console, stop,
                    pretrained.sha256 if pretrained is not None else "")))
        stack.enter_context(reported())
        if restarted:
            console.print("restarted by torchrun: resuming as with --resume")
        if resume and not trainer.restore():
            weights = load_pretrained(pretrained, train_step.network, config, topology, index)
        if resume and 0 < config.machine.stop_after <= loader.step:
            raise ValueError(f"machine.stop_after (={config.machine.stop_after}) must lie after step {loader.step}, where "
                             "this run stands: it counts from the start of training; raise it or leave it out")
        if topology.is_main:
            for line in run_folder.note_changes(folder, config, loader.step, trainer.epoch) if resume else []:
                console.print(f"changed from step {loader.step} on: {line}")
            run_folder.record_start(folder, resumed_at=loader.step, processes=topology.world_size,
                                    device=str(topology.device), index=index.sha256, stats=stats.sha256,
                                    fingerprint=config.fingerprint(), machine=config.as_dict()["machine"],
                                    initial_weights=trainer.initial_weights)
        console.print(f"{folder}: {len(index.ids(config.data.train_split))} images of {len(index.classes)} classes, "
                      f"{config.train.epochs} epoch{'s' * (config.train.epochs > 1)}, {trainer.steps} steps of "
                      f"{config.train.batch}, on {topology.device}")
        for message in filter(None, (weights, loader.note, train_step.prepare())):
            console.print(message)
        for message in config.doubts(trainer.steps):
            console.warn(message)
        if config.model.classes > len(index.classes):
            console.warn(f"model.classes (={config.model.classes}) is more than the {len(index.classes)} of the index; the "
                         "others have no images")
        score = trainer.test() if trainer.train() else None
        if score is None:
            console.print(f"stopped and saved at step {loader.step}; resume with --resume")
            return STOPPED
        views = config.train.test_views
        console.print(f"test on {config.data.test_split}, {score.images} images, {views} crop{'s' if views > 1 else ''}:")
        for line in score.lines():
            console.print(f"  {line}")
        if score.at_chance:
            console.warn(f"top-1 error is {CHANCE}")
        return DONE


def is_restarted(folder: Path, topology: Topology) -> bool:
    """Whether torchrun has restarted the processes of a run that began with this folder: then it resumes by itself."""
    return bool(topology.broadcast_object(
        topology.is_main and (folder / run_folder.CONFIG).exists() and topology.store.check([_key(folder)])))


def claim(folder: Path, config: Config, resume: bool, topology: Topology) -> ContextManager[object]:
    """Create the folder of a new run, and note it in torchrun's store for `is_restarted`; or check the one to resume. Returns its
    lock, to be held. Raises ValueError, in all processes, when it holds a run already, or none to resume, or one of another
    recipe, or somebody trains there."""
    error, settled = "", folder / run_folder.CONFIG
    held: ContextManager[object] = contextlib.nullcontext()
    if topology.is_main:
        try:
            if resume and not settled.exists():
                raise ValueError(f"run folder (={folder}) holds no run to resume; start it without --resume")
            if not resume:
                folder.mkdir(parents=True, exist_ok=True)
            held = run_folder.hold(folder)
            if resume:
                run_folder.check_resumable(config, settled)
            elif settled.exists():
                raise ValueError(f"run folder (={folder}) already holds a run; resume it with --resume, or give another "
                                 "--machine.name")
            else:
                topology.store.set(_key(folder), "")
                (folder / run_folder.CHECKPOINTS).mkdir(exist_ok=True)
                (folder / run_folder.UNSAVED).touch()
                run_folder.write_config(folder, config)
        except ValueError as refused:
            error = str(refused)
    if error := topology.broadcast_object(error):
        with held:
            raise ValueError(error)
    return held


def _key(folder: Path) -> str:
    return f"began {ascii(str(folder.resolve()))}"  # a path may hold bytes that are no text
