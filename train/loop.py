"""The loop: batch, forward, backward, stop?, update, save; after each epoch: validate, schedule, save.

Everything it computes is a function of the recipe and the step, so it can be cut at any step and go on with the same
bits.
"""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Optional

import torch
from torch.nn import functional

from model.alexnet import AlexNet
from pipeline.loading.batch import Batch
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.train_loader import TrainLoader
from pipeline.reading.quarantine import SampleError
from pipeline.sampling.sampler import first_step
from pipeline.loading.eval_loader import EvalLoader
from pipeline.monitor import RECORDED
from pipeline.stats import Stats
from train import build
from train.checkpoint import checkpoint
from train.config import Config
from train.console import Console, Pace, Rates, Row
from train.parallel.failure import enter_phase
from train.parallel.topology import Topology
from train.evaluate.metrics import Score
from train.evaluate.predict import evaluate
from train.parallel.pair_loader import Fed
from train.feeding import Feeding
from train.parallel.gradients import Gradients
from train.optimizer import PaperSGD, Schedule, set_lr
from train.recipe import dump, load
from train.run_folder import CHECKPOINTS, Metrics, check_sources
from train.checkpoint.async_saver import AsyncSaver

_AGAIN_S = 1.0  # a second Ctrl-C sooner than this is the same one, passed on by torchrun


class NotFinite(RuntimeError):
    """The loss or a gradient is NaN or infinite; the update was not made."""


class Stop:
    """Whether somebody asked to stop (SIGTERM or Ctrl-C). A second Ctrl-C kills."""

    def __init__(self) -> None:
        self.wanted = False
        self._since = 0.0

    def listen(self) -> None:
        """Take the signals over."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: Optional[FrameType]) -> None:
        now = time.monotonic()
        if self.wanted and number == signal.SIGINT and now - self._since > _AGAIN_S:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        if not self.wanted:
            self.wanted, self._since = True, now


@dataclass
class Progress:
    """How far the epoch is: its number, and sums over its steps so far."""

    epoch: int = 0
    images: int = 0
    errors: int = 0
    loss: float = 0.0

    def add(self, images: int, errors: int, loss: float) -> None:
        """A batch of so many images, so many of them wrong, with this mean loss."""
        self.images, self.errors, self.loss = self.images + images, self.errors + errors, self.loss + loss * images

    def means(self) -> tuple[float, float]:
        """(loss, top-1 error) over the epoch so far."""
        return self.loss / max(1, self.images), self.errors / max(1, self.images)


@dataclass
class Job:
    """All parts of a run. Built by train/main.py."""

    config: Config
    where: Topology
    folder: Path
    index: SampleIndex
    stats: Stats
    network: AlexNet
    gradients: Gradients
    optimizer: PaperSGD
    schedule: Schedule
    loader: TrainLoader | Fed
    tests: dict[str, EvalLoader]  # of the splits that are tested
    metrics: Metrics
    console: Console
    stop: Stop
    saver: AsyncSaver
    origin: str = ""  # hash of the checkpoint whose weights training began with; empty: random ones
    progress: Progress = field(default_factory=Progress)
    feeding: Feeding = field(default_factory=Feeding)

    @property
    def root(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / CHECKPOINTS

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return first_step(self.config.train.epochs, len(self.index.ids(self.config.data.train_split)),
                          self.config.train.batch)


def train(job: Job) -> bool:
    """Train until the last epoch is validated; False when stopped (and saved) before."""
    while job.progress.epoch < job.config.train.epochs:
        rates = Rates()
        if job.loader.epoch == job.progress.epoch:
            with job.feeding.watch(job.loader.monitor):
                finished = train_epoch(job, rates)
            if not finished:
                save(job)
                return False
        try:
            score = test(job, job.config.data.validation_split, job.config.train.validate_views, "validation")
        except SampleError:  # in every process alike, whichever met it. The epoch is not lost: --resume goes on here
            save(job)
            raise
        if score is None:
            save(job)
            return False
        finish_epoch(job, score, rates)
    return True


def train_epoch(job: Job, rates: Rates) -> bool:
    """The rest of the current epoch, step by step; False when it was stopped between two steps.

    Raises:
        NotFinite: before the update, naming step and learning rate.
    """
    machine, progress = job.config.machine, job.progress
    size = job.config.train.batch
    total = len(job.loader)
    first = job.loader.step - progress.images // size
    job.network.train()
    enter_phase("load", job.loader.step)
    batches = iter(job.loader)
    waits = job.loader.monitor.waits
    while (batch := next(batches, None)) is not None:
        job.feeding.arrived(job.loader.monitor)
        lr = job.schedule.lr(batch.step, progress.epoch)
        set_lr(job.optimizer, lr, job.schedule.layer_rates(progress.epoch))

        loss, wrong, norm = gradient(job, batch)
        own_loss, own_norm, errors = torch.stack([loss, norm, wrong]).tolist()
        finite = math.isfinite(own_loss) and math.isfinite(own_norm)
        value, errors, broken, stop, unsaved = job.where.all_reduce_sum([own_loss, errors, not finite, job.stop.wanted,
                                                                         job.saver.failed])
        value, errors = value / job.where.tower_ranks, errors / job.where.tower_ranks  # both towers of a pair have them
        if broken:
            raise NotFinite(culprit(job, own_loss, own_norm, batch.step, lr))
        if unsaved:
            job.saver.wait()  # raises, in all processes
        enter_phase("update", batch.step)
        job.optimizer.step()

        progress.add(size, int(errors), value)
        before, waits = waits, job.loader.monitor.waits
        rates.add(size, waits.since(before))
        done, pace = job.loader.step, rates.recent()
        if done % machine.metrics_steps == 0:
            job.metrics.write("step", step=batch.step, epoch=progress.epoch, lr=lr, loss=value,
                              error=errors / size, **paced(pace))
        left_s = (job.steps - done) * size / pace.images_per_s
        job.console.step(progress.epoch, job.config.train.epochs, done - first, total, batch.step, *progress.means(),
                         rates, left_s)
        if stop or done == machine.stop_after:
            return False
        if machine.checkpoint_steps and done % machine.checkpoint_steps == 0 and job.loader.epoch == progress.epoch:
            save(job)
        enter_phase("load", done)
    return True


def gradient(job: Job, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Forward and backward of one batch, in pieces. The gradients are then those of the global batch's mean loss.

    Returns:
        This process's share of the mean loss, how many of its images are wrong, and the norm of its gradient: scalars.
    """
    parallel, size = job.config.parallel, job.config.train.batch
    autocast = build.autocast(job.config, job.where)
    row = job.where.data_rank * len(batch.labels)  # of the global batch
    loss = torch.zeros((), device=job.where.device)
    wrong = torch.zeros((), device=job.where.device)
    job.optimizer.zero_grad(set_to_none=True)
    images, labels = batch.images.tensor_split(parallel.accumulate), batch.labels.tensor_split(parallel.accumulate)
    for piece, (seen, right) in enumerate(zip(images, labels)):
        enter_phase("forward", batch.step)
        with autocast():
            logits = job.network(seen, step=batch.step, rows=(row, size))
        part = functional.cross_entropy(logits, right, reduction="sum") / size
        enter_phase("backward", batch.step)
        job.gradients.begin(last=piece == parallel.accumulate - 1)
        part.backward()
        row += len(right)
        loss = loss + part.detach()
        wrong += (logits.detach().argmax(1) != right).sum()
    return loss, wrong, job.gradients.finish()


def culprit(job: Job, loss: float, norm: float, step: int, lr: float) -> str:
    """What is not finite, and in which process: all of them ask together."""
    for rank, (its_loss, its_norm) in enumerate(job.where.gather_objects((loss, norm))):
        found = f"loss (={its_loss})" if not math.isfinite(its_loss) else f"norm of the gradient (={its_norm})"
        if not (math.isfinite(its_loss) and math.isfinite(its_norm)):
            break
    whose = "" if job.where.is_single else f" of process {rank}"
    return (f"{found}{whose} at step {step} with learning rate {lr:g} is not finite; the update was not made: lower optimizer.lr "
            "and give another --machine.name")


def test(job: Job, split: str, views: int, what: str) -> Optional[Score]:
    """Test the network on a split; None when stopped meanwhile."""
    enter_phase("test", max(0, job.loader.step - 1))  # of the step that is done: the next one's phases come later
    loader = job.tests[split]
    try:
        return evaluate(job.network, loader, views, build.autocast(job.config, job.where),
                        stop=lambda: job.stop.wanted, progress=job.console.testing(what), topology=job.where)
    finally:
        loader.close()  # its threads and decoder; it is used again


def paced(pace: Pace) -> dict[str, Any]:
    """What metrics.jsonl says of a pace: `waited` is the share of the time, `waited_for` divides it by cause."""
    return {"images_per_s": round(pace.images_per_s, 2), "waited": round(pace.waited, 4),
            "waited_for": {RECORDED[cause]: round(share, 4) for cause, share in pace.causes.items()}}


def finish_epoch(job: Job, score: Score, rates: Rates) -> None:
    """An epoch is trained and validated: note it, move the schedule, go to the next, save."""
    epoch, epochs, (loss, error) = job.progress.epoch, job.config.train.epochs, job.progress.means()
    pace, seconds = rates.overall()
    lr = job.schedule.lr(job.loader.step - 1, epoch)  # the optimizer's is the start's when resumed into a validation
    job.metrics.write("epoch", epoch=epoch, step=job.loader.step, lr=lr, loss=loss, error=error,
                      **paced(pace), seconds=round(seconds, 2), validation=score.as_dict())
    job.console.row(Row(epoch, epochs, loss, error, score.top1, score.top5, lr, pace.images_per_s, pace.waited, seconds))
    if job.schedule.epoch_done(score.top1):
        lr = job.schedule.lr(job.loader.step, epoch + 1)
        job.console.say(f"validation error no longer improves: learning rate {lr:g}")
    job.progress = Progress(epoch + 1)
    machine, step = job.config.machine, job.loader.step
    if epoch + 1 == epochs or (epoch + 1) % machine.checkpoint_epochs == 0 or (
            machine.checkpoint_steps and step % machine.checkpoint_steps == 0):  # which train_epoch leaves to the epoch's end
        save(job, score)


def save(job: Job, score: Optional[Score] = None) -> None:
    """A checkpoint of this moment; with a score when it is the end of a validated epoch."""
    enter_phase("save", max(0, job.loader.step - 1))
    tensors, shapes = build.parameters(job.network, job.config, job.optimizer)
    state = {"step": job.loader.step, "progress": asdict(job.progress), "loader": job.loader.state_dict(),
             "schedule": job.schedule.state_dict(), "metrics_bytes": job.metrics.length(),
             "fingerprint": job.config.fingerprint(), "sources": sources(job),
             "classes": build.classes_sha256(job.index), "validation_error": score.top1 if score else None}

    def attach(folder: Path) -> None:
        job.metrics.sync()  # a checkpoint is not there before the lines it counts
        (folder / checkpoint.CONFIG).write_text(dump(job.config), encoding="utf-8")
        job.stats.save(folder / checkpoint.STATS)

    name = checkpoint.checkpoint_name(job.loader.step, job.progress.epoch if score else None)
    job.saver.save(name, tensors, shapes, state, attach)


def restore(job: Job) -> bool:
    """Go on from the newest good checkpoint; False, and from the start, saying so, when there is none yet. Newer ones, which are
    damaged, are set aside.

    Raises:
        ValueError: it is of another recipe, index or network.
        checkpoint.DamagedCheckpoint: all are damaged.
    """
    chosen = checkpoint.newest_good(job.root, job.console.warn) if job.where.is_main else None
    name = job.where.broadcast_object(chosen.name if chosen else "")
    if not name:
        job.console.warn(f"{job.root} has no checkpoint yet; starting from step 0")
        job.metrics.cut(0)
        return False
    path = job.root / name
    state = checkpoint.read_state(path)
    theirs = load(path / checkpoint.CONFIG).fingerprint()  # not the one noted then: settings may have come since, with defaults
    if theirs != job.config.fingerprint():
        raise ValueError(f"fingerprint (={job.config.fingerprint()[:16]}…) is not that of {path} (={theirs[:16]}…); resume with "
                         "the same recipe, or give another --machine.name")
    began = {"initial weights": "", **state["sources"]}
    named, weights = job.config.init_from.checkpoint, began["initial weights"]
    if weights and job.origin not in ("", weights) and (Path(named) / CHECKPOINTS).is_dir():
        job.console.warn(f"init_from.checkpoint (={named}) has another best checkpoint by now than the one this run began with, "
                         "which it no longer needs")
        job.origin = weights
    job.origin = job.origin or weights  # the checkpoint they come from may be gone by now
    check_sources(began, sources(job))
    tensors, shapes = build.parameters(job.network, job.config, job.optimizer)
    checkpoint.load(path, tensors, shapes, job.where)
    job.loader.load_state_dict(state["loader"])
    job.schedule.load_state_dict(state["schedule"])
    job.progress = Progress(**state["progress"])
    job.metrics.cut(state["metrics_bytes"])
    if job.where.is_main:
        checkpoint.set_aside(job.root, path, job.console.warn)
    job.console.say(f"resuming from {path} at step {state['step']}")
    return True


def sources(job: Job) -> dict[str, Any]:
    """Hashes of what the pixels, and the first weights, come from."""
    return {"training images": job.index.split_sha256(job.config.data.train_split), "stats": job.stats.sha256,
            "initial weights": job.origin}
