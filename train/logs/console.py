"""Console output of a run: a progress bar in a terminal, plain lines elsewhere, one table row per epoch, and at the end one line
that says whether computing or the loader limited training. Only one process prints.
"""
import contextlib
import os
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Callable, Iterator, Optional

from rich.console import Console as Terminal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.config import LoaderConfig
from pipeline.monitor import METRIC_NAMES, REMEDIES, STAGES, Monitor, Usage, Waits, cause_of, headroom, remedies, usage
from train.evaluate.metrics import FEW_CLASSES, Score
from train.exit_codes import CONTROLS

RECENT_STEPS = 50  # over which the displayed throughput is taken
SMALL_WAIT, LARGE_WAIT = 0.01, 0.1  # shares of the time: below, data wait needs no advice; from there on, data limits training
BAR_S = 0.1  # between two updates of the progress bar
BAR_LEAST, BAR_MOST = 6, 40  # characters
CELL = 7  # characters of a cell of the table, at least


@dataclass(frozen=True)
class Throughput:
    """Images per second, the share of the time spent waiting for data, and its division by cause (one of STAGES)."""
    images_per_s: float
    waited: float
    causes: dict[str, float]

    @property
    def rate(self) -> str:
        """Images per second for a person."""
        return f"{self.images_per_s:.1f}" if self.images_per_s < 1000 else f"{self.images_per_s:.0f}"

    def __str__(self) -> str:
        cause = f" ({cause_of(self.causes)})" if self.waited >= 0.005 else ""
        return f"{self.rate} img/s  data wait {self.waited:.1%}{cause}"

    def as_dict(self) -> dict[str, Any]:
        """Rounded, for a line of metrics.jsonl."""
        return {"images_per_s": round(self.images_per_s, 2), "waited": round(self.waited, 4),
                "waited_for": {METRIC_NAMES[cause]: round(share, 4) for cause, share in self.causes.items()}}


class ThroughputMeter:
    """Throughput of training steps, over the recent ones and over all. `monitor` is the loader's, whose waits are counted."""

    def __init__(self, monitor: Monitor, now: Callable[[], float] = time.perf_counter) -> None:
        self._monitor, self._now = monitor, now
        self._start = (now(), 0, monitor.waits)
        self._ends = deque([self._start], maxlen=RECENT_STEPS + 1)  # of steps: time, images and waits so far

    def add(self, images: int) -> None:
        """A step of so many images has ended."""
        self._ends.append((self._now(), self._ends[-1][1] + images, self._monitor.waits))

    def recent(self) -> Throughput:
        return _throughput(self._ends[0], self._ends[-1])

    def overall(self) -> Throughput:
        return _throughput(self._start, self._ends[-1])

    @property
    def seconds(self) -> float:
        return self._ends[-1][0] - self._start[0]


def _throughput(start: tuple[float, int, Waits], end: tuple[float, int, Waits]) -> Throughput:
    seconds, waits = max(end[0] - start[0], 1e-9), end[2].since(start[2])
    return Throughput((end[1] - start[1]) / seconds, min(1.0, waits.seconds / seconds),
                      {stage: min(1.0, getattr(waits, stage) / seconds) for stage in STAGES})


class Console:
    """Everything a run prints on stdout. Not `enabled`, in all processes but the main one, it prints nothing. Whether `stream` is
    a terminal decides between a progress bar and plain lines, `log_s` seconds apart. Output never ends a run: when nobody reads
    it any more (`… | head`) or it cannot be written, the rest goes to the file `log`."""

    def __init__(self, enabled: bool, log_s: float, stream: Optional[IO[str]] = None, log: Path = Path(os.devnull)) -> None:
        self._enabled, self._log_s, self._stream, self._log = enabled, log_s, stream or sys.stdout, log
        self._last_shown_s, self._has_header = -float("inf"), False
        terminal = Terminal(file=self._stream, highlight=False)
        self._live = Live(console=terminal, transient=True, auto_refresh=False) if enabled and terminal.is_terminal else None

    def print(self, text: str) -> None:
        """A line, above the live one."""
        if not self._enabled:
            return
        text = text.translate(CONTROLS)
        if self._live is not None:
            try:
                self._live.console.print(Text(text))
                return
            except OSError as error:
                self._divert(error)
        try:
            print(text, file=self._stream, flush=True)
        except OSError as error:
            self._divert(error)

    def _divert(self, error: OSError) -> None:
        """Let the stream write into the log, what it still holds included; but not what it holds of the live line of a terminal
        that is gone: plain lines follow."""
        if self._live is not None:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
            self.close()
        try:
            file = open(self._log, "ab")
        except OSError:  # the run folder is not there yet
            file = open(os.devnull, "wb")
        with file:
            os.dup2(file.fileno(), self._stream.fileno())
        with contextlib.suppress(OSError):
            print(f"WARNING: output (={error.strerror}) goes on in {self._log}", file=sys.stderr, flush=True)
            self._stream.flush()

    def warn(self, text: str) -> None:
        self.print(f"WARNING: {text}")

    def step(self, epoch: str, step: int, done: int, total: int, loss: float, error: float, throughput: Throughput,
             left_s: float) -> None:
        """Progress of an epoch (`1/90`) after a training step; loss and error are means over the epoch so far."""
        if self._is_due():
            left = duration(left_s)
            self._show(f"epoch {epoch}", done, total,
                       f"step {step} ({done}/{total})  train loss {loss:.4f}  train err@1 {error:.1%}  {throughput}  ETA {left}",
                       f"{done:{len(str(total))}}/{total}  loss {loss:.4f}  err@1 {error:.1%}  {throughput}  ETA {left}",
                       f"{done / total:4.0%} loss {loss:.3f} err@1 {error:.1%} {throughput.rate} img/s wait "
                       f"{throughput.waited:.1%} ETA {left}", f"{done / total:4.0%} loss {loss:.3f} ETA {left}")

    def testing(self, title: str) -> Callable[[int, int], None]:
        """A function that shows the progress of a test, given images done and in all."""
        def show(done: int, total: int) -> None:
            if self._is_due():
                self._show(title, done, total, f"{done}/{total} images")
        self._last_shown_s = time.monotonic()  # a short test needs no line
        return show

    def epoch(self, epoch: str, loss: float, error: float, validation: Score, lr: float, throughput: Throughput) -> None:
        """A table row of an epoch (`1/90`), under its header; errors are shares, `lr` is the rate it was trained with."""
        cells = {"epoch": epoch, "train loss": f"{loss:.4f}", "train err@1": f"{error:.2%}",
                 "val loss": f"{validation.loss:.4f}", "val err@1": f"{validation.top1:.2%}",
                 "val err@5": f"{validation.top5:.2%}", "lr": f"{lr:.3g}", "img/s": throughput.rate,
                 "data wait": f"{throughput.waited:.1%}"}
        if validation.classes < FEW_CLASSES:
            del cells["val err@5"]
        widths = [max(CELL, len(name)) for name in cells]
        lines = [list(cells)]
        if self._live is not None and sum(widths) + 2 * len(widths) > self._live.console.width:  # the names in two lines
            lines = [[name.rpartition(" ")[0] for name in cells], [name.rpartition(" ")[2] for name in cells]]
            widths = [CELL] * len(cells)
        for line in [*([] if self._has_header else lines), list(cells.values())]:
            self.print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))
        self._has_header = True

    def close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(OSError):  # the terminal is gone
                live.stop()

    def _is_due(self) -> bool:
        """Whether to show progress now."""
        now = time.monotonic()
        if not self._enabled or now - self._last_shown_s < (self._log_s if self._live is None else BAR_S):
            return False
        self._last_shown_s = now
        return True

    def _show(self, title: str, done: int, total: int, plain: str, *beside: str) -> None:
        """A plain line; or a bar, and the first of the texts `beside` it (default: `plain`) for which there is room."""
        if self._live is None:
            return self.print(f"{title}  {plain}")
        room, texts = self._live.console.width - len(title) - 2, beside or (plain,)
        text = next((text for text in texts if len(text) + BAR_LEAST <= room), texts[-1])
        line = Table.grid(padding=(0, 1, 0, 0))
        for _ in range(3):
            line.add_column(no_wrap=True)
        line.add_row(Text(title), ProgressBar(total, done, width=max(1, min(BAR_MOST, room - len(text)))), Text(text))
        try:
            self._live.start()
            self._live.update(line, refresh=True)
        except OSError as error:
            self._divert(error)


def duration(seconds: float) -> str:
    """`1:02:03`, or `2d 03h`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours < 24 else f"{hours // 24}d {hours % 24:02}h"


@dataclass
class DataWait:
    """What the loop waited for its loader, and how busy the loader's threads were, during training without validation."""
    waits: Waits = field(default_factory=Waits)
    used: Usage = field(default_factory=Usage)
    _start: tuple[Waits, Usage] = (Waits(), Usage())
    _has_batch: bool = False

    @contextlib.contextmanager
    def measured(self, monitor: Monitor) -> Iterator[None]:
        self._start = monitor.waits, usage(monitor)
        try:
            yield
        finally:
            waits, used = self._start
            self.waits = self.waits.plus(monitor.waits.since(waits))
            self.used = self.used.plus(usage(monitor).since(used))

    def batch_arrived(self, monitor: Monitor) -> None:
        """The first batch of a run is not counted: until then the loader has been starting."""
        if not self._has_batch:
            self._has_batch, self._start = True, (monitor.waits, usage(monitor))

    def summary(self, machine: LoaderConfig, threads: int, on_gpu: bool, tier: str = "archives", swaps: bool = False) -> str:
        """The line, with headroom or advice for a loader of so many decoding `threads`; empty when nothing was trained. `on_gpu`:
        decoding is on a GPU, whose headroom the CPU's threads do not show. `swaps`: half of each batch comes from another
        process, and waiting for it counts as copying."""
        if self.used.time <= 0 or not self.waits.batches:
            return ""
        share = min(1.0, self.waits.seconds / self.used.time)
        if share < SMALL_WAIT:
            room = "" if on_gpu else f"the loader could deliver {headroom(self.used, machine, threads).times:.1f}× more; "
            return f"compute-bound: {room}data wait {share:.1%}"
        cause = self.waits.cause
        advice = ("try --parallel.feed=replicate" if swaps and cause == "copy" else
                  "; or ".join(REMEDIES[remedy] for remedy in remedies(tier, cause)))
        shares = {stage: getattr(self.waits, stage) / self.waits.seconds for stage in STAGES}
        shares["other"] = max(0.0, 1 - sum(shares.values()))
        parts = ", ".join(f"{stage} {part:.0%}" for stage, part in shares.items() if part >= 0.005)
        bound = "data-bound" if share >= LARGE_WAIT else "mostly compute-bound"
        return f"{bound}: data wait {share:.1%} ({parts}); {advice}; see `alexnet profile RECIPE`"
