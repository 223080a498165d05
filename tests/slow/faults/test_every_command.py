"""Every command killed, interrupted, on a full disk, with small limits, and twice at once: the same command then gives what it
gives undisturbed, nothing under way is left, no process lives on, and what failed says so in a line."""
from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline.files import file_sha256, is_temporary
from tests.conftest import TinySet
from tests.helpers.disks import mounted_disk
from tests.helpers.forked_commands import Ended, Server, server
from tests.helpers.recipes import write_recipe
from tests.helpers.small_set import encode, picture
from tests.helpers.trained_run import write_run
from tests.helpers.trials import Row
from tools.demo.dataset import DEVKIT, TRAIN, VAL

Record = Callable[[str, object], None]
KILLED, ENDED = -signal.SIGKILL, -signal.SIGTERM
# Files with the time, or with the length of one that has it: two undisturbed runs may be alike by chance.
TIMED = (".html", "state.json", "manifest.json", ".metadata", "config.yaml", ".jsonl")


@dataclass
class Bench:
    """The commands, each as words in which OUT stands for a folder, and what an undisturbed run of each leaves there."""
    server: Server
    folder: Path
    set: TinySet
    words: dict[str, list[str]]
    files: dict[str, dict[str, str]] = field(default_factory=dict)  # command → file → SHA-256, "" where no two runs are alike
    seconds: dict[str, float] = field(default_factory=dict)

    def of(self, name: str, out: Path) -> list[str]:
        """A command line, and what has to be there before."""
        out.mkdir(parents=True, exist_ok=True)
        if "OUT/index" in self.words[name] and not (out / "index").exists():
            shutil.copytree(self.set.index, out / "index", ignore=shutil.ignore_patterns("stats*"))
        return [word.replace("OUT", str(out)) for word in self.words[name]]

    def measured(self, name: str) -> float:
        """Seconds of an undisturbed run; the first time it is run, twice."""
        if name not in self.files:
            trees = []
            for number in range(2):
                out = self.folder / f"{name.replace(' ', '-')}-{number}" / "out"
                began = time.monotonic()
                ended = self.server.run(*self.of(name, out))
                self.seconds[name] = time.monotonic() - began
                assert ended.code in (0, 1) and not ended.errors, (name, ended)
                trees.append(tree(out))
            assert trees[0].keys() == trees[1].keys(), (name, trees[0].keys() ^ trees[1].keys())
            self.files[name] = {path: digest if trees[1][path] == digest and not path.endswith(TIMED) else ""
                                for path, digest in trees[0].items()}
        return self.seconds[name]

    def again(self, name: str, out: Path) -> str:
        """Run the same command where a disturbed one has been; how what is there then differs from what there should be."""
        words = self.of(name, out)
        if name.startswith("train") and any(out.glob("small*/config.yaml")):
            words.append("--resume")
        ended = self.server.run(*words)
        finished = ended.code == 2 and (" already; " in ended.err or "exists already" in ended.err)  # by the one before
        if (ended.code not in (0, 1) or ended.errors) and not finished:
            return f"the same command again: exit code {ended.code}, {ended.err[-600:]}"
        found = tree(out)
        wrong = [path for path, digest in self.files[name].items() if found.get(path) != digest and (digest or path not in found)]
        more = [path for path in found if path not in self.files[name] and path != "small/metrics-replaced.jsonl"]
        return f"different after it: {wrong}, more: {more}" if wrong or more else ""


def tree(folder: Path) -> dict[str, str]:
    """File → SHA-256; lock files, which stay, have none."""
    return {str(path.relative_to(folder)): file_sha256(path) for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.endswith("lock")}


def temporaries(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob(".*.tmp") if is_temporary(path)]


@pytest.fixture(scope="module")
def bench(tiny_set: TinySet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("every_command")
    (folder / "once").mkdir()
    index, run = str(tiny_set.index), str(write_run(folder / "once", tiny_set))
    recipe = str(write_recipe(folder, index, epochs="  epochs: 2"))
    for number in range(12):
        (folder / f"photos/train/{number % 3}").mkdir(parents=True, exist_ok=True)
        (folder / f"photos/train/{number % 3}/{number}.jpg").write_bytes(encode(picture(number, 80, 90)))
    (folder / "study.yaml").write_text(f"runs:\n  - {{name: one, recipe: {recipe}, seeds: [1]}}\n")
    pack = ["pack", index, "--square-px", "76", "--shard-images", "20", "--budget", "0.1", "--jobs", "1"]
    steps = ["--machine.runs=OUT", "--machine.checkpoint_steps=3"]
    words = {
        "index build": ["index", "build", "ilsvrc2012", "--train", f"{tiny_set.folder}/{TRAIN}", "--val",
                        f"{tiny_set.folder}/{VAL}", "--devkit", f"{tiny_set.folder}/{DEVKIT}", "-o", "OUT/ix", "--jobs", "2"],
        "index build classes": ["index", "build", "classes", f"{folder}/photos", "-o", "OUT/ix", "--jobs", "1"],
        "index subset": ["index", "subset", index, "-o", "OUT/few", "--class-range", "0:3", "--hold-out", "0.2",
                         "--hold-out-as", "test"],
        "index verify": ["index", "verify", "OUT/index", "--scrub", "--exclude", "--jobs", "1"],
        "stats": ["stats", "OUT/index", "--square-px", "76", "--jobs", "1"],
        "pack": [*pack, "-o", "OUT/packed"],
        "train": ["train", recipe, *steps],
        "train, resident": ["train", recipe, "--data.tier=resident", "--machine.resident_folder=OUT/resident", *steps],
        "train, streamed": ["train", recipe, "--data.tier=streamed", f"--data.packed={folder}/packed", "--data.window=16",
                            "--data.lanes=2", *steps],
        "eval": ["eval", run, "-o", "OUT/saved", "--json", "OUT/figures.json"],
        "export": ["export", run, "-o", "OUT/network"],
        "report": ["report", f"{folder}/trained/small", "-o", "OUT/report.html"],
        "show batch": ["show", "batch", recipe, "-o", "OUT/batch.png"],
        "show kernels": ["show", "kernels", run, "-o", "OUT/kernels.png"],
        "show top5": ["show", "top5", run, "-o", "OUT/top5.png"],
        "show similar build": ["show", "similar", "build", run, "-o", "OUT/features"],
        "profile": ["profile", recipe, "--seconds", "0.05", "--repeats", "1", "--json", "OUT/profile.json", "--trace",
                    "OUT/trace.json"]}
    with server(folder / "server") as one:
        made = Bench(one, folder, tiny_set, words)
        for command in ([*pack, "-o", f"{folder}/packed"], ["train", recipe, f"--machine.runs={folder}/trained"]):
            ended = one.run(*command)
            assert ended.code == 0, ended
        yield made


def several(quick: int, long: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("count", [quick, pytest.param(long, marks=pytest.mark.slow)])


def disturbed(trials: Row, bench: Bench, name: str, fault: str, out: Path, ended: Ended, codes: tuple[int, ...],
              needed: tuple[str, ...] = ("",), repair: Callable[[], object] = lambda: None) -> None:
    """Count a trial: how a disturbed command has ended, and what the same command does then."""
    def outcome() -> bool:
        if ended.code is None:
            trials.outcomes["hang"] += 1
            trials.bad.append(f"hang: {name}: {fault}: {ended.err[-500:]}")
            raise ValueError("counted as a hang")
        broken = "Traceback" in ended.err + ended.out or len(ended.errors) > 1
        if broken or ended.code not in (*codes, 0, 1) or ended.code in (2, 4) and len(ended.errors) != 1:
            raise AssertionError(f"exit code {ended.code}\n{ended.err[-700:]}")
        if ended.errors and not any(words in ended.errors[0] for words in needed):
            raise AssertionError(f"without {needed}: {ended.errors[0]}")
        if ended.code not in (KILLED, ENDED) and (left := temporaries(out)):
            raise AssertionError(f"left: {left}, exit code {ended.code}, {ended.err}")
        repair()
        if difference := bench.again(name, out):
            trials.bad.append(f"silent: {name}: {fault}, exit code {ended.code}: {difference}")
            return False
        if left := temporaries(out):
            raise AssertionError(f"left at last: {left}")
        return True
    trials.trial(f"{name}: {fault}", outcome)


def drawn(trials: Row, bench: Bench, count: int) -> Iterator[tuple[random.Random, str, Path]]:
    """So many draws: all commands in turn, in an order that is drawn."""
    names = sorted(bench.words)
    random.Random(trials.name).shuffle(names)
    for number, draw in enumerate(trials.draws(count)):
        out = bench.folder / trials.name.partition(":")[0].replace(" ", "-") / "out"
        yield draw, names[number % len(names)], out
        shutil.rmtree(out, ignore_errors=True)


@several(1, 102)
def test_kill_9(bench: Bench, count: int, record_property: Record) -> None:
    trials = Row("kill -9: every command")
    for draw, name, out in drawn(trials, bench, count):
        after_s = bench.measured(name) * draw.random()
        command = bench.server.start(*bench.of(name, out))
        time.sleep(after_s)
        command.signal(signal.SIGKILL)
        disturbed(trials, bench, name, f"after {after_s:.3f} s", out, command.wait(60), (KILLED,))
    trials.check(record_property)


@several(1, 85)
def test_signals(bench: Bench, count: int, record_property: Record) -> None:
    trials = Row("SIGINT, SIGTERM: every command")
    for draw, name, out in drawn(trials, bench, count):
        after_s, number = bench.measured(name) * draw.random(), draw.choice((signal.SIGINT, signal.SIGTERM))
        command = bench.server.start(*bench.of(name, out))
        time.sleep(after_s)
        command.signal(number)
        disturbed(trials, bench, name, f"{number.name} after {after_s:.3f} s", out, command.wait(60),
                  (75, 130, -signal.SIGINT) if number == signal.SIGINT else (75, ENDED))
    trials.check(record_property)


@several(1, 85)
def test_a_full_disk(bench: Bench, tmp_path: Path, count: int, record_property: Record) -> None:
    trials = Row("disk full: every command")
    with mounted_disk(tmp_path / "disk", "3m") as disk:
        for draw, name, _ in drawn(trials, bench, count):
            bench.measured(name)
            needs = sum(path.stat().st_size for path in (bench.folder / f"{name.replace(' ', '-')}-0").rglob("*"))
            out, fill = disk / "out", disk / "fill"
            words = bench.of(name, out)
            free = 3 * 2 ** 20 - sum(path.stat().st_size for path in disk.rglob("*"))
            left = int(draw.random() * min(needs, 2_900_000)) if draw.random() < 0.7 else draw.randrange(2) * 4096
            fill.write_bytes(bytes(max(0, free - left - 65536)))
            disturbed(trials, bench, name, f"{left} bytes left", out, bench.server.run(*words), (2, 4), ("is full", " free"),
                      repair=lambda: (fill.unlink(), shutil.rmtree(out)) if needs > 2_500_000 else fill.unlink())
            shutil.rmtree(out, ignore_errors=True)
            fill.unlink(missing_ok=True)
    trials.check(record_property)


@several(1, 85)
def test_small_limits(bench: Bench, count: int, record_property: Record) -> None:
    """Few descriptors, small files, a folder that is read-only, 64 kB of /dev/shm, one core."""
    trials = Row("limits: every command")
    for draw, name, out in drawn(trials, bench, count):
        bench.measured(name)
        words = bench.of(name, out)
        kind = draw.choice(("descriptors", "file size", "read-only", "shm", "one core"))
        if kind == "descriptors":
            value = draw.randrange(12, 90)
            ended, codes = bench.server.run(*words, limits={resource.RLIMIT_NOFILE: value}), (2, 4)
            kind = f"{value} {kind}"
        elif kind == "file size":
            value = draw.randrange(1000, 200_000)
            ended, codes = bench.server.run(*words, limits={resource.RLIMIT_FSIZE: value}), (2, 4)
            kind = f"{kind} {value}"
        elif kind == "read-only":
            ended, codes = bench.server.run(*words, read_only=[str(out)]), (2, 4)
        elif kind == "shm":
            ended, codes = bench.server.run(*words, shm_kb=64), ()
        else:
            ended, codes = bench.server.run(*words, cores=1), ()
        disturbed(trials, bench, name, kind, out, ended, codes)
    trials.check(record_property)


@several(1, 51)
def test_twice_at_once(bench: Bench, count: int, record_property: Record) -> None:
    trials = Row("two at once: every command")
    for draw, name, out in drawn(trials, bench, count):
        after_s = bench.measured(name) * draw.random() ** 2
        words = bench.of(name, out)
        first = bench.server.start(*words)
        time.sleep(after_s)
        second = bench.server.start(*words)
        for which, ended in [("the first", first.wait(120)), ("the second", second.wait(120))]:
            disturbed(trials, bench, name, f"{which} of two, {after_s:.3f} s apart", out, ended, (2, 4))
    trials.check(record_property)


@several(1, 60)
def test_files_changed_while_training(bench: Bench, count: int, record_property: Record) -> None:
    """An archive, index, statistics, shard, resident file, checkpoint or note is damaged, cut, removed or replaced under a run:
    it trains on or stops in a line. With all put back, as far as it was there before, --resume ends."""
    trials = Row("files changed while training")
    for number, draw in enumerate(trials.draws(count)):
        out = bench.folder / f"changed-{number}"
        shutil.copytree(bench.set.folder, out / "set")
        shutil.copytree(bench.folder / "packed", out / "packed")
        tier = draw.choice(("archives", "packed", "streamed", "resident"))
        words = ["train", *bench.words["train"][1:2], f"--machine.runs={out}/runs", "--train.epochs=4", "--data.window=16",
                 "--machine.checkpoint_steps=4", f"--data.index={out}/set/index", f"--machine.archives={out}/set",
                 f"--data.tier={tier}", f"--machine.resident_folder={out}/resident", "--machine.timeout_s=30"]
        words += [f"--data.packed={out}/packed", "--machine.archives="] if tier in ("packed", "streamed") else []
        command = bench.server.start(*words)
        deadline = time.monotonic() + 60
        while not (out / "runs/small/metrics.jsonl").exists() and time.monotonic() < deadline and command.runs():
            time.sleep(0.01)
        time.sleep(draw.random())
        files = [path for path in sorted(out.rglob("*")) if path.is_file()]
        path = draw.choice([path for path in files if path.relative_to(out).parts[0] == draw.choice(("set", "runs", "packed"))
                            or path.suffix == ".squares"] or files)
        kept = path.read_bytes() if path.exists() else b""
        fault = f"{tier}: {path.relative_to(out)} {change(path, draw)}"
        ended = command.wait(120)

        def outcome() -> bool:
            if ended.code is None:
                trials.outcomes["hang"] += 1
                trials.bad.append(f"hang: {fault}: {ended.err[-500:]}")
                raise ValueError("counted as a hang")
            if "Traceback" in ended.err or ended.code not in (0, 2, 4) or ended.code and len(ended.errors) != 1:
                raise AssertionError(f"exit code {ended.code}\n{ended.err[-700:]}")
            if "runs" not in path.relative_to(out).parts:
                path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
                path.write_bytes(kept)
            again = bench.server.run(*words, *(["--resume"] if (out / "runs/small/config.yaml").exists() else []))
            if "Traceback" in again.err or again.code not in (0, 2, 4) or again.code and len(again.errors) != 1:
                raise AssertionError(f"afterwards {again.code}\n{again.err[-700:]}")
            return "runs" in path.relative_to(out).parts or again.code == 0
        trials.trial(fault, outcome)
        shutil.rmtree(out)
    trials.check(record_property)


def change(path: Path, draw: random.Random) -> str:
    """Change a file in place, or put another in its place."""
    kind = draw.choice(("flip", "cut", "emptied", "removed", "a folder now", "replaced"))
    data = bytearray(path.read_bytes() or b"x")
    if kind == "flip":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        with open(path, "r+b") as file:
            file.write(data)
    elif kind in ("cut", "emptied"):
        os.truncate(path, draw.randrange(len(data)) if kind == "cut" else 0)
    elif kind == "replaced":
        (path.parent / "new").write_bytes(draw.randbytes(len(data)))
        os.replace(path.parent / "new", path)
    else:
        path.unlink()
        if kind == "a folder now":
            path.mkdir()
    return kind
