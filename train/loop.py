"""Training loop: load a batch, step, log, save, stop; after each epoch validate, adjust the learning rate, save.

Everything it computes is a function of the recipe and the step number: a run may stop after any step and resume bit-exactly.
"""
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Iterator, Mapping, Optional

from pipeline.index.sample_index import SampleIndex
from pipeline.loading.batch import Batch
from pipeline.loading.eval_loader import EvalLoader
from pipeline.loading.train_loader import TrainLoader
from pipeline.reading.quarantine import SampleError
from pipeline.sampling.sampler import first_step
from pipeline.stats import Stats
from train import build
from train.checkpoint import checkpoint
from train.checkpoint.async_saver import AsyncSaver
from train.config import Config
from train.logs.console import Console, DataWait, ThroughputMeter
from train.evaluate.metrics import Score
from train.evaluate.predict import evaluate
from train.parallel.failure import enter_phase
from train.parallel.pair_loader import PairLoader
from train.parallel.topology import Topology
from train.recipe import dump
from train.results import Flags, StepResult
from train.run_folder import CHECKPOINTS, METRICS, QUARANTINE, UNSAVED, Metrics, check_never_saved, check_resumable
from train.step import TrainStep

SAME_SIGNAL_S = 1.0  # a second Ctrl-C sooner than this is the first one, passed on by torchrun


class StopRequest:
    """Whether SIGTERM, Ctrl-C or a closed terminal asked to save and stop. A second Ctrl-C kills."""

    def __init__(self) -> None:
        self.received = False
        self._since = 0.0

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self.handle)

    def handle(self, number: int, frame: Optional[FrameType]) -> None:
        now = time.monotonic()
        if self.received and number == signal.SIGINT and now - self._since > SAME_SIGNAL_S:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        if not self.received:
            self.received, self._since = True, now


@dataclass
class Progress:
    """The current epoch, from 0, and sums over its steps so far."""
    epoch: int = 0
    images: int = 0
    errors: int = 0
    loss: float = 0.0

    def add(self, images: int, errors: int, loss: float) -> None:
        self.images, self.errors, self.loss = self.images + images, self.errors + errors, self.loss + loss * images

    def means(self) -> tuple[float, float]:
        """(loss, top-1 error) over the epoch so far."""
        return self.loss / max(1, self.images), self.errors / max(1, self.images)


class Trainer:
    """Trains, validates and tests a network; saves the state of its run in `folder`, and restores it. Close it at the end.
    `tests`: loader by split. `initial_weights`: SHA-256 of the checkpoint that training begins with; empty for random ones."""

    def __init__(self, config: Config, topology: Topology, train_step: TrainStep, loader: TrainLoader | PairLoader,
                 tests: Mapping[str, EvalLoader], index: SampleIndex, stats: Stats, folder: Path, console: Console,
                 stop: StopRequest, initial_weights: str) -> None:
        self._config, self._topology, self._train_step, self._loader, self._tests = config, topology, train_step, loader, tests
        self._index, self._stats = index, stats
        self._console, self._stop, self.initial_weights = console, stop, initial_weights
        self._folder, self._checkpoints = folder, folder / CHECKPOINTS
        self._metrics = Metrics(folder / METRICS, topology.is_main)
        self._saver = AsyncSaver(self._checkpoints, topology, config.machine.keep_last, config.machine.timeout_s)
        self._progress, self._data_wait = Progress(), DataWait()
        self._samples = len(index.ids(config.data.train_split))
        self.steps = first_step(config.train.epochs, self._samples, config.train.batch)  # of the run

    @property
    def epoch(self) -> int:
        """The current one, from 0."""
        return self._progress.epoch

    def train(self) -> bool:
        """Train until the last epoch is validated; False when stopped, and saved, before."""
        self._metrics.log_to(self._config, self._loader.step, self._console.warn)
        while self._progress.epoch < self._config.train.epochs:
            throughput = ThroughputMeter(self._loader.monitor)
            score = self._validate() if self._train_epoch(throughput) else None
            if score is None:
                self._save()
                break
            self._finish_epoch(score, throughput)
        self._saver.wait()
        if summary := self._data_wait.summary(self._config.machine, self._loader.threads, self._topology.device.type == "cuda",
                                              self._config.data.tier, swaps=isinstance(self._loader, PairLoader)):
            self._console.print(summary)
        return self._progress.epoch == self._config.train.epochs

    def _train_epoch(self, throughput: ThroughputMeter) -> bool:
        """Train the rest of the current epoch: none of it after a resume into its validation. False when asked to stop."""
        loader, progress, machine = self._loader, self._progress, self._config.machine
        if loader.epoch > progress.epoch:
            return True
        self._train_step.network.train()
        enter_phase("load", loader.step)
        with self._data_wait.measured(loader.monitor):
            for batch in self._batches(throughput):
                self._train_step(batch, progress.epoch, lambda: Flags(self._stop.received, self._saver.failed))
                save = self._is_due(machine.checkpoint_steps, loader.step)
                ends = loader.epoch > progress.epoch or loader.step == machine.stop_after
                stop = self._count(self._train_step.results(wait=save or ends), throughput)
                if stop or loader.step == machine.stop_after:
                    self._count(self._train_step.results(), throughput)
                    return False
                if save and loader.epoch == progress.epoch:  # else after the validation
                    self._save()
                enter_phase("load", loader.step)
        return True

    def _batches(self, throughput: ThroughputMeter) -> Iterator[Batch]:
        """The rest of the epoch's batches. Before an error of the loader is raised, the steps before it are counted."""
        try:
            for batch in self._loader:
                self._data_wait.batch_arrived(self._loader.monitor)
                if notice := self._loader.quarantine.take_notice():
                    self._console.warn(notice)
                yield batch
        except Exception:
            self._count(self._train_step.results(), throughput)
            raise

    def _count(self, read: Iterator[list[StepResult]], throughput: ThroughputMeter) -> bool:
        """Count and log steps whose results were read. Whether to stop."""
        stop, batch = False, self._config.train.batch
        for results in read:
            if any(result.flags.save_failed for result in results):
                self._saver.wait()  # raises, in all processes
            throughput.add(len(results) * batch)
            for result in results:
                stop |= result.flags.stop
                self._progress.add(batch, result.errors, result.loss)
                self._log(result, throughput)
        return stop

    @staticmethod
    def _is_due(every: int, step: int) -> bool:
        """Whether something that happens every so many steps (0 for never) happens after so many."""
        return every > 0 and step % every == 0

    def _log(self, result: StepResult, throughput: ThroughputMeter) -> None:
        train, recent = self._config.train, throughput.recent()
        if self._is_due(self._config.machine.metrics_steps, result.step + 1):
            self._metrics.write("step", step=result.step, epoch=self._progress.epoch, lr=result.lr, loss=result.loss,
                                error=result.errors / train.batch, **recent.as_dict())
        left_s = (self.steps - result.step - 1) * train.batch / recent.images_per_s
        epoch = self._progress.epoch
        begin, end = (first_step(number, self._samples, train.batch) for number in (epoch, epoch + 1))
        self._console.step(f"{epoch + 1}/{train.epochs}", result.step, result.step + 1 - begin, end - begin,
                           *self._progress.means(), recent, left_s)

    def _validate(self) -> Optional[Score]:
        """The validation score; None when stopped."""
        try:
            return self._evaluate(self._config.data.validation_split, self._config.train.validate_views, "validation")
        except SampleError:  # raised in all processes. The epoch is not lost: a resume begins here
            self._save()
            raise

    def _evaluate(self, split: str, views: int, title: str) -> Optional[Score]:
        enter_phase("test", max(0, self._loader.step - 1))  # of the step that is done: the next one's phases come later
        loader = self._tests[split]
        try:
            return evaluate(self._train_step.network, loader, views, self._train_step.autocast, stop=lambda: self._stop.received,
                            progress=self._console.testing(title), topology=self._topology)
        finally:
            loader.close()  # frees its threads and decoder; it can be used again

    def _finish_epoch(self, score: Score, throughput: ThroughputMeter) -> None:
        """After an epoch's validation: log, adjust the learning rate, go to the next epoch, save if it is due."""
        epoch, epochs, step = self._progress.epoch, self._config.train.epochs, self._loader.step
        schedule, overall, (loss, error) = self._train_step.schedule, throughput.overall(), self._progress.means()
        lr = schedule.lr(step - 1, epoch)  # the optimizer has not been given it after a resume into a validation
        self._metrics.write("epoch", epoch=epoch, step=step, lr=lr, loss=loss, error=error, **overall.as_dict(),
                            seconds=round(throughput.seconds, 2), validation=score.as_dict())
        self._console.epoch(f"{epoch + 1}/{epochs}", loss, error, score, lr, overall)
        quarantined, new = self._loader.quarantine.count()
        if new:
            self._console.warn(f"training images in quarantine: {quarantined}, {new} of them new in this epoch; others stand in "
                               f"for them, see {self._folder / QUARANTINE}")
        if schedule.epoch_done(score.top1):
            self._console.print(f"validation error no longer improves: learning rate {schedule.lr(step, epoch + 1):g}")
        self._progress = Progress(epoch + 1)
        machine = self._config.machine
        if epoch + 1 == epochs or (epoch + 1) % machine.checkpoint_epochs == 0 or self._is_due(machine.checkpoint_steps, step):
            self._save(score)

    def test(self) -> Optional[Score]:
        """Test the trained network; None when stopped."""
        data, views = self._config.data, self._config.train.test_views
        score = self._evaluate(data.test_split, views, "test")
        if score is not None:
            self._metrics.write("test", split=data.test_split, views=views, step=self._loader.step, **score.as_dict())
        return score

    def _save(self, score: Optional[Score] = None) -> None:
        """Start a checkpoint of this moment; `score` when it is the end of a validated epoch."""
        loader = self._loader
        enter_phase("save", max(0, loader.step - 1))
        state = {"step": loader.step, "progress": asdict(self._progress), "loader": loader.state_dict(),
                 "schedule": self._train_step.schedule.state_dict(), "metrics_bytes": self._metrics.length(),
                 "fingerprint": self._config.fingerprint(), "sources": self._sources(),
                 "classes": build.classes_sha256(self._index), "validation_error": score.top1 if score else None}

        def attach(folder: Path) -> None:
            self._metrics.sync()  # the lines a checkpoint counts are on disk before it is
            (folder / checkpoint.CONFIG).write_text(dump(self._config), encoding="utf-8")
            self._stats.save(folder / checkpoint.STATS)

        name = checkpoint.checkpoint_name(loader.step, self._progress.epoch if score else None)
        self._saver.save(name, *self._train_step.tensors(), state, attach, self._note_saved)

    def _note_saved(self) -> None:
        """The run has had a checkpoint: from now on a folder without one is not that of a run which has not saved yet."""
        (self._folder / UNSAVED).unlink(missing_ok=True)

    def restore(self) -> bool:
        """Resume from the newest good checkpoint, renaming damaged ones that are newer; False when there is none yet. Raises
        ValueError when it is of another recipe, index or network, checkpoint.DamagedCheckpoint when all are damaged, RuntimeError
        when the run must have had some, OSError when they cannot be seen now."""
        newest = checkpoint.newest_good(self._checkpoints, self._console.warn) if self._topology.is_main else None
        if self._topology.is_main and newest is None:
            check_never_saved(self._folder)
        name = self._topology.broadcast_object(newest.name if newest else "")
        if not name:
            self._console.warn(f"{self._checkpoints} has no checkpoint yet; starting from step 0")
            self._metrics.truncate(0)
            return False
        path = self._checkpoints / name
        if self._topology.is_main:
            self._note_saved()  # a process killed right after its first checkpoint has not
        state = checkpoint.read_state(path, whole=True)
        progress = Progress(**state["progress"])
        check_resumable(self._config, path / checkpoint.CONFIG, epochs=progress.epoch + (progress.images > 0))
        self._check_sources({"initial weights": "", **state["sources"]})
        checkpoint.load(path, *self._train_step.tensors(), self._topology)
        try:
            self._loader.load_state_dict(state["loader"])
            self._train_step.schedule.load_state_dict(state["schedule"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"checkpoint file (={path / checkpoint.STATE}) is not as it is written ({error!r}); use another "
                             "checkpoint") from None
        self._progress = progress
        if missing := self._metrics.truncate(state["metrics_bytes"]):
            self._console.warn(f"{METRICS} lacks {missing} bytes that were written before {name}; reports will miss steps")
        if self._topology.is_main:
            checkpoint.set_aside(self._checkpoints, path, self._console.warn)
        self._console.print(f"resuming from {path} at step {state['step']}")
        return True

    def _check_sources(self, stored: dict[str, str]) -> None:
        named, weights = self._config.init_from.checkpoint, stored["initial weights"]
        if weights and self.initial_weights not in ("", weights) and (Path(named) / CHECKPOINTS).is_dir():
            self._console.warn(f"init_from.checkpoint (={named}) has another best checkpoint by now than the one this run began "
                               "with, which it no longer needs")
            self.initial_weights = weights
        self.initial_weights = self.initial_weights or weights  # the checkpoint they came from may be gone by now
        for name, sha256 in self._sources().items():
            if stored.get(name, "") != sha256:
                new, old = (f"{digest[:16]}…" if digest else "random" for digest in (sha256, stored.get(name, "")))
                raise ValueError(f"{name} (={new}) is not the one of this run (={old}); resume with the same "
                                 f"{'init_from.checkpoint' if name == 'initial weights' else 'index'}, or start another run with "
                                 "--machine.name")

    def _sources(self) -> dict[str, Any]:
        """Hashes of what a run's results come from, besides its recipe."""
        return {"training images": self._index.split_sha256(self._config.data.train_split),
                "stats": self._stats.sha256, "initial weights": self.initial_weights}

    def close(self) -> None:
        try:
            self._saver.close()
        finally:
            self._metrics.close()
