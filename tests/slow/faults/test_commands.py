"""Commands in processes of their own, whose imports count too: small limits, a bare environment, signals from the first moment.

Of all commands, in forked processes: test_every_command.py.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable

import pytest

from tests.conftest import TinySet
from tests.helpers.recipes import write_recipe
from tests.helpers.runs import ROOT
from tests.helpers.trained_run import write_run
from tests.helpers.trials import Row

Record = Callable[[str, object], None]


def trial(trials: Row, fault: str, words: list[str], codes: tuple[int, ...], before: Callable[[], None] | None = None,
          after_s: float | None = None, number: int = signal.SIGINT, needed: str = "", **environment: str) -> None:
    """Run a command; as expected: one of these exit codes, no traceback, at most one line of error, with `needed` in it."""
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=before, start_new_session=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment})
    if after_s is not None:
        time.sleep(after_s)
        process.send_signal(number)
    try:
        _, err = process.communicate(timeout=trials.limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        trials.outcomes["hang"] += 1
        trials.bad.append(f"hang: {fault}")
        return
    errors = [line for line in err.splitlines() if line.startswith("error: ")]

    def outcome() -> bool:
        if "Traceback" in err or len(errors) > 1 or process.returncode not in (*codes, 0):
            raise AssertionError(f"exit code {process.returncode}\n{err[-500:]}")
        if process.returncode and errors:
            assert needed in errors[0], errors[0]
            raise ValueError(errors[0])
        return True
    trials.trial(fault, outcome)


@pytest.mark.parametrize("count", [1, pytest.param(40, marks=pytest.mark.slow)])
def test_small_limits_and_a_bare_environment(tiny_set: TinySet, tmp_path: Path, count: int, record_property: Record) -> None:
    trials = Row("environment: limits, locale, no HOME")
    recipe = write_recipe(tmp_path, tiny_set.index, epochs="  epochs: 1")

    def limit(which: int, value: int) -> Callable[[], None]:
        return lambda: resource.setrlimit(which, (value, value))

    for number, draw in enumerate(trials.draws(count)):
        words = ["-m", "train.main", "--config", str(recipe), f"--machine.runs={tmp_path}/{number}"]
        kind = draw.choice(("files", "file size", "environment", "read-only"))
        if kind == "files":
            trial(trials, kind, words, (2, 4), limit(resource.RLIMIT_NOFILE, draw.randrange(20, 80)))
        elif kind == "file size":
            trial(trials, kind, words, (4,), limit(resource.RLIMIT_FSIZE, draw.randrange(1000, 100_000)))
        elif kind == "environment":
            trial(trials, kind, words, (), HOME="/nowhere", LC_ALL="POSIX", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", TERM="dumb",
                  COLUMNS="3", TZ="nonsense")
        else:
            trial(trials, kind, [*words[:-1], "--machine.runs=/proc/none"], (4,))
    trials.check(record_property)


@pytest.mark.slow
@pytest.mark.parametrize("count", [40])
def test_signals(tiny_set: TinySet, tmp_path: Path, count: int, record_property: Record) -> None:
    """SIGINT or SIGTERM at a moment that is drawn; what comes after resumes."""
    trials, draw = Row("signals: train, evaluate, export, report"), random.Random(1)
    run, recipe = write_run(tmp_path, tiny_set), write_recipe(tmp_path, tiny_set.index)
    for number in range(count):
        training = ["-m", "train.main", "--config", str(recipe), f"--machine.runs={tmp_path}/{number}"]
        for words, codes in ((training, (75, 130, -2)),
                             (["-m", "train.evaluate", "--run", str(run), "--save", f"{tmp_path}/saved"], (130, -2)),
                             (["-m", "train.export", str(run), "--out", str(tmp_path / f"out{number}")], (130, -2))):
            trial(trials, " ".join(words), words, codes, after_s=0.1 + 5 * draw.random())
        folder = tmp_path / str(number)
        if (folder / "small/config.yaml").exists():
            trial(trials, "resume", ["-m", "train.main", "--config", str(recipe), f"--machine.runs={folder}", "--resume"], ())
    trials.check(record_property)


@pytest.mark.parametrize("words", [["-m", "train.main"], ["-m", "tools.alexnet"], ["tools/build_index.py"]])
def test_ctrl_c_before_a_command_has_handlers(words: list[str], tmp_path: Path) -> None:
    """While its first modules are imported: no traceback."""
    (tmp_path / "sitecustomize.py").write_text("""\
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "train.exit_codes":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
""")
    done = subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
