"""Train as a recipe says:

    python -m train.main --config train/recipes/X.yaml [--group.key=value …] [--resume] [--print_config]
    torchrun --nproc-per-node 2 -m train.main …          one tower per process
    torchrun --max-restarts 3 …                          goes on by itself, as with --resume, after a process has failed

Exit codes (under torchrun, which turns any of them but 0 into 1, they stand in its report):
    0   trained and tested
    2   a mistake in what was asked: recipe, command line, index, run folder; nothing was done
    3   the loss or a gradient was not finite; the update was not made
    4   the machine failed: disk, memory, GPU, an archive, another process, all checkpoints damaged; or it does not go on
    75  stopped by SIGTERM, Ctrl-C or machine.stop_after, and saved: go on with --resume
    130 interrupted by Ctrl-C before training began
A second Ctrl-C kills at once.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import TYPE_CHECKING, Sequence

if __name__ == "__main__":  # Ctrl-C while modules are imported ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from train.exit_codes import DONE, FAILED, INTERRUPTED, MISTAKE, NOT_FINITE, STOPPED, leave, recorded, speaks
from train.recipe import Request, parse

if TYPE_CHECKING:  # parsing a command line needs neither torch nor DALI
    from train.parallel.topology import Topology

ENDED = "ended"  # key in torchrun's store: the exit code of a run that must not be restarted


def run(request: Request, where: Topology) -> int:
    """Build the parts of a run, train, test."""
    from pipeline.stats import Stats
    from train import build, run_folder as folders
    from train.checkpoint import pretrained as initial_weights
    from train.console import Console
    from train.evaluate.metrics import CHANCE
    from train.parallel.pair_loader import Fed
    from train.parallel.failure import reported
    from train.parallel.gradients import Gradients
    from train.loop import Job, Stop, restore, test, train
    from train.optimizer import Schedule, build_optimizer
    from train.checkpoint.async_saver import AsyncSaver

    stop = Stop()
    stop.listen()
    config = request.config
    build.settle(config, where)
    console = Console(where.is_main, config.machine.log_s)
    index = build.index(config, config.data.train_split, config.data.validation_split, config.data.test_split)
    stats = Stats.for_index(index, config.data.square_px, config.data.train_split)
    network = build.network(config, where)
    schedule = Schedule(config.schedule, config.optimizer, config.train.batch)
    optimizer = build_optimizer(network, config.optimizer, schedule.layers, where.group("tower"))
    folder = folders.run_folder(config, request.recipe)
    mine = f"began {folder.resolve()}"
    again, = where.any_rank(request.resume or where.store.check([mine]))  # it has weights of its own by now, mostly
    origin = initial_weights.Origin.of(config, again, console.warn)
    taken = "" if again else origin.take(network, config, where, index)
    loader = build.train_loader(config, where, index, stats, folder / "quarantine.jsonl")
    tests = {split: build.test_loader(config, where, index, stats, split, keep=True)
             for split in dict.fromkeys((config.data.validation_split, config.data.test_split))}
    restarted, refused = False, ""
    if where.is_main:
        began = (folder / folders.CONFIG).exists()
        restarted = began and not request.resume and where.store.check([mine])  # not somebody else's run
        if not began:
            where.store.set(mine, "")
        try:
            folders.claim(folder, config, request.resume or restarted)
        except ValueError as error:
            refused = str(error)
    if refused := where.broadcast_object(refused):
        raise ValueError(refused)
    restarted, resume = where.any_rank(restarted, restarted or request.resume)
    metrics = folders.Metrics(folder / folders.METRICS, where.is_main)
    gradients = Gradients(network, where, config.parallel.overlap)
    saver = AsyncSaver(folder / folders.CHECKPOINTS, where, config.machine.keep_last, config.machine.timeout_s)
    job = Job(config, where, folder, index, stats, network, gradients, optimizer, schedule, loader, tests, metrics, console, stop,
              saver, origin.sha256)
    with contextlib.closing(console), contextlib.closing(metrics), contextlib.closing(loader), \
            contextlib.closing(saver), contextlib.ExitStack() as ending, reported():
        for tested in tests.values():
            ending.enter_context(tested)
        if restarted:
            console.say("restarted by torchrun: going on as with --resume")
        if resume and restore(job):
            taken = ""
        elif not taken:
            taken = origin.take(network, config, where, index)
        if resume and 0 < config.machine.stop_after <= loader.step:
            raise ValueError(f"machine.stop_after (={config.machine.stop_after}) must lie after step {loader.step}, where "
                             "this run stands: it counts from the start of training; raise it or leave it out")
        if where.is_main:
            folders.note_start(folder, resumed_at=loader.step, processes=where.world_size,
                               device=str(where.device), index=index.sha256, stats=stats.sha256,
                               fingerprint=config.fingerprint(), machine=config.as_dict()["machine"],
                               initial_weights=job.origin)
        console.say(f"{folder}: {len(index.ids(config.data.train_split))} images of {len(index.classes)} classes, "
                    f"{config.train.epochs} epochs, {job.steps} steps of {config.train.batch}, on {where.device}")
        if taken:
            console.say(taken)
        if loader.note:
            console.say(loader.note)
        if config.model.classes > len(index.classes):
            console.warn(f"model.classes (={config.model.classes}) is more than the {len(index.classes)} of the index; the "
                         "others have no images")
        finished = train(job)
        saver.wait()
        if told := job.feeding.sentence(config.machine, loader.threads, where.device.type == "cuda", config.data.tier,
                                        swaps=isinstance(loader, Fed)):
            console.say(told)
        score = test(job, config.data.test_split, config.train.test_views, "test") if finished else None
        if score is None:
            console.say(f"stopped and saved at step {loader.step}; go on with --resume")
            return STOPPED
        metrics.write("test", split=config.data.test_split, views=config.train.test_views, step=loader.step,
                      **score.as_dict())
        console.say(f"test ({config.data.test_split}, {score.images} images, {config.train.test_views} views): top-1 "
                    f"error {score.top1:.2%} ({score.top1_errors}), top-5 error {score.top5:.2%} ({score.top5_errors})")
        if score.at_chance:
            console.warn(CHANCE)
        return DONE


def _ending(request: Request, where: Topology) -> int:
    """`run`; and torchrun, which takes whatever ends for a fault, is told when it should not be started again."""
    try:
        code = run(request, where)
    except ValueError:
        _note_end(where, MISTAKE)
        raise
    if code == STOPPED:
        _note_end(where, STOPPED)
    return code


def _note_end(where: Topology, code: int) -> None:
    with contextlib.suppress(RuntimeError):  # torchrun has gone: nobody restarts
        where.store.set(ENDED, str(code))


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    try:
        request = parse(argv)
    except ValueError as error:
        return _fail(error, MISTAKE, speaks())
    from train.checkpoint.checkpoint import NotWritten
    from train.loop import NotFinite
    from train.parallel.failure import position_of
    from train.parallel.topology import process_group

    machine, is_main = request.config.machine, speaks()
    try:
        with process_group(towers=request.config.model.towers, parallel=request.config.parallel, device=machine.device,
                           timeout_s=machine.timeout_s, silence_s=machine.silence_s) as where:
            if where.store.check([ENDED]):
                code = int(where.store.get(ENDED))
                if is_main:
                    print(f"not started again by torchrun's --max-restarts: the run has ended with exit code {code}")
                return code
            return _ending(request, where)
    except NotFinite as error:
        return _fail(error, NOT_FINITE, is_main)
    except ValueError as error:
        return _fail(error, MISTAKE, is_main)
    except MemoryError as error:  # Python's own has no text
        return _fail(MemoryError(f"memory (={str(error) or 'used up'}) does not suffice; lower train.batch, "
                                 "machine.test_batch or machine.prefetch"), FAILED)
    except NotWritten as error:
        return _fail(error, FAILED, is_main)
    except (RuntimeError, OSError) as error:
        return _fail(error, FAILED, position=position_of(error))  # each process has its own failure to tell
    except KeyboardInterrupt:  # before the loop listens, or a second one
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _fail(error: Exception, code: int, speaks: bool = True, position: str = "") -> int:
    """Say what is wrong, without a traceback (with one under `python -X dev`)."""
    if sys.flags.dev_mode:
        raise error
    if speaks:
        print(f"error: {position}{error}\n", end="", file=sys.stderr)  # at once: processes share stderr
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    leave(recorded(main)(sys.argv[1:]))
