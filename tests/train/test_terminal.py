"""Commands and what they are started from: encodings, pipes that close, Ctrl-C at any moment, libraries that are not there."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.runs import ALONE, ROOT, run, same, start

COMMANDS = [["tools/build_index.py"], ["-m", "train.main"], ["-m", "train.evaluate"], *(
    pytest.param(words, marks=pytest.mark.slow) for words in (
        ["tools/compute_stats.py"], ["tools/pack_shards.py"], ["tools/profile_pipeline.py"], ["tools/run_study.py"],
        ["-m", "train.export"], ["-m", "train.report"], ["-m", "tools.show"], ["-m", "tools.demo"], ["-m", "tools.bench"]))]
ASCII = {"PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "LC_ALL": "POSIX"}


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **environment})


def test_training_in_a_terminal_that_knows_ascii_only(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ASCII.items():
        monkeypatch.setenv(name, value)
    out, err = run(ALONE, recipe, tmp_path, "--train.epochs=1", "--machine.name=größe×2")
    assert "WARNING: sample" in out and "[ERROR]" not in err  # the decoder's own words of the image that is corrupt
    assert out.isascii() and "gr\\udcc3\\udcb6" in out and "\ntest on val, 24 images, 10 crops:\n" in out


def test_a_pipe_that_closes_does_not_end_training(recipe: Path, tmp_path: Path) -> None:
    """`train … | head -1`: the run is whole, and its other lines are in its log."""
    run(ALONE, recipe, tmp_path / "whole", "--machine.log_s=0.001")
    process = start(ALONE, recipe, tmp_path, "--machine.log_s=0.001")
    assert process.stdout is not None and process.stderr is not None
    first = process.stdout.readline()
    process.stdout.close()
    with process.stderr:
        err = process.stderr.read()
    assert process.wait(timeout=120) == 0, err
    log = (tmp_path / "small/console.log").read_text(encoding="utf-8")
    assert first.startswith(f"{tmp_path}/small: ") and "\ntest on val, 24 images, 10 crops:\n  err@1 " in log, log
    assert f"WARNING: output (=Broken pipe) goes on in {tmp_path}/small/console.log\n" in err
    same(tmp_path / "whole/small", tmp_path / "small")


@pytest.mark.parametrize("words", [["-m", "train.main", "--help"], ["-m", "train.evaluate", "--run", "x"],
                                   ["tools/build_index.py", "info", "x"]], ids=" ".join)
def test_a_full_disk_behind_a_pipe_and_closed_streams_are_no_traceback(words: list[str]) -> None:
    for redirection in (">/dev/full", ">&-", "2>&-", ">&- 2>&-", "2>/dev/full", "| true"):
        done = subprocess.run(["bash", "-c", f'set -o pipefail; "$@" {redirection}', "-", sys.executable, *words], cwd=ROOT,
                              capture_output=True, text=True, timeout=60)
        assert "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr
        full = [4] * (redirection == ">/dev/full")  # older versions of argparse raise what newer ones pass over
        assert done.returncode in (0, 2, *full), (redirection, done.returncode)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_ctrl_c_while_modules_are_imported_is_one_line_and_130(words: list[str]) -> None:
    """Its moment is drawn. The command is one that has to import all it needs."""
    seed = random.randrange(10 ** 6)
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED, str(seed), *words], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n"), seed


# Runs a command's file; at one of the modules that it imports, chosen by the seed, it gets the signal.
INTERRUPTED = """
import os, random, runpy, signal, sys
seed, *words = sys.argv[1:]
class Finder:
    left = random.Random(int(seed)).randrange(1, 12)
    def find_spec(self, name, path=None, target=None):
        self.left -= "train.exit_codes" in sys.modules and getattr(sys.modules["train.exit_codes"], "exit_now", None) is not None
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = [words[-1], "--config", "train/recipes/demo.yaml", "--run", "x", "x"]
if words[0] == "-m":
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)
else:
    sys.path.insert(0, "tools")
    runpy.run_path(words[0], run_name="__main__")
"""


@pytest.mark.parametrize("missing", ["nvidia", "torch"])
def test_a_library_that_is_missing_is_one_line(missing: str, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / f"{missing}.py").write_text("raise ModuleNotFoundError(f'No module named {__name__!r}', name=__name__)\n")
    done = command("-m", "train.main", "--config", str(recipe), PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 4 and done.stderr == (
        f"error: module (={missing}) cannot be imported (No module named '{missing}'); `alexnet doctor` says "
        "what is missing and how to install it\n")


def test_ctrl_c_at_any_moment_of_a_start_is_no_traceback(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # stderr says when the interpreter has come to our own code
    draw = random.Random(1)
    for number in range(3):
        process = start(ALONE, recipe, tmp_path / str(number))
        assert process.stderr is not None and any("train.exit_codes" in line for line in process.stderr)
        time.sleep(0.1 + 2 * draw.random())
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (130, 75) and "Traceback" not in err, (number, process.returncode, err)


def test_a_signal_of_the_memory_says_where_threads_were() -> None:
    """A mapped file that loses its disk: SIGBUS."""
    done = command("-c", "import os; from train.exit_codes import start_command; start_command(); os.kill(os.getpid(), 7)")
    assert done.returncode == -signal.SIGBUS and "Bus error" in done.stderr and 'File "<string>", line 1' in done.stderr


def test_what_a_decoder_writes_of_a_corrupt_image_does_not_reach_the_terminal() -> None:
    text = ("import os, sys; from train.exit_codes import start_command, run_command; start_command(decodes=True); "
            "os.write(2, b'\\x1b[0;31m[ERROR] \\x1b[0m[libjpeg_turbo_decoder] Could not decode\\nother\\nno end'); "
            "run_command(lambda argv: print('own', file=sys.stderr) or 3)")
    closed = "import os, sys; os.close(0); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"  # as <&- in a shell
    for words in ["-c", text], ["-c", closed, "-c", text]:
        done = command(*words)
        assert done.returncode == 3 and sorted(done.stderr.split("\n")) == ["no end", "other", "own"]


def test_much_text_for_a_reader_that_has_gone_is_no_error() -> None:
    """A write of more than the buffer holds fails, and leaves nothing that a later flush would fail with."""
    text = ("import sys; from train.exit_codes import *; start_command(); "
            "run_command(lambda argv: exit_code(lambda: [sys.stdout.write('x' * 10 ** 6) for _ in range(9)] and 0, ''))")
    done = subprocess.run(["bash", "-c", '"$@" | head -c 1 > /dev/null; exit ${PIPESTATUS[0]}', "-", sys.executable, "-c", text],
                          cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
