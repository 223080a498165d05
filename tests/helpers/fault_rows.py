"""Counted, seeded fault trials: a row is one kind of fault; each trial damages something anew and looks at what comes of it.

A trial's outcome is "" (as expected: an error of one line, or the very result of before), or "silent …", "traceback …", "hang …".
`count` runs trials of a row; `Tally` is its line of the table.
"""
import contextlib
import io
import json
import random
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.compute_stats import compute
from pipeline.files import file_sha256
from pipeline.index.header import content_sha256
from pipeline.index.sample_index import SampleIndex
from pipeline.index.tar import open_tar, walk
from pipeline.loading.batch import Batch
from pipeline.stats import Stats
from tests.helpers.digests import digest, take
from tests.helpers.indexes import file_entry, train_tar
from tests.helpers.resident_loader import loader
from tests.helpers.small_set import encode, photographs, picture, write_set
from tools import build_index, pack_shards

LIMIT_S = 60  # of one trial
Trial = Callable[[random.Random], str]


@dataclass
class Tally:
    """Outcomes of the trials of a row."""
    row: str
    tried: int = 0
    wrong: list[str] = field(default_factory=list)  # outcomes, with the number of the trial

    def __str__(self) -> str:
        kinds = [sum(kind in line for line in self.wrong) for kind in (": silent", ": traceback", ": hang")]
        return f"| {self.row} | {self.tried} | {self.tried - len(self.wrong)} | " + " | ".join(map(str, kinds)) + " |"


class Hang(BaseException):
    """A trial that does not end."""


def count(row: str, trial: Trial, trials: int, seed: int) -> Tally:
    """Run trials; the n-th one depends on `row`, `seed` and n alone."""
    def over(*_: object) -> None:
        raise Hang

    tally = Tally(row)
    before = signal.signal(signal.SIGALRM, over)
    try:
        for number in range(trials):
            signal.alarm(LIMIT_S)
            try:
                outcome = trial(random.Random(f"{row} {seed} {number}"))
            except Hang:
                outcome = f"hang of more than {LIMIT_S} s"
            except Exception:
                outcome = f"traceback {traceback.format_exc()}"
            signal.alarm(0)
            tally.tried += 1
            if outcome:
                tally.wrong.append(f"{number}: {outcome}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return tally


def command(main: Callable[[list[str]], int], *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, run in this process: what escapes it is a traceback."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(map(str, words)))
    for stream in (out, err):
        stream.flush()
    return code, *(stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]


def is_refused(code: int, err: str) -> bool:
    """Whether a command ended as for a user's mistake or the world's: exit 2 and one line."""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    return code == 2 and len(errors) == 1 and "Traceback" not in err


@contextlib.contextmanager
def damaged(path: Path, change: Callable[[bytearray], object]) -> Iterator[None]:
    """A file with other bytes, then as before."""
    whole = path.read_bytes()
    data = bytearray(whole)
    change(data)
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(whole)


def flip(chance: random.Random, first: int = 0, stop: int | None = None) -> Callable[[bytearray], None]:
    """Flip one bit of bytes [first, stop)."""
    def change(data: bytearray) -> None:
        data[chance.randrange(first, stop or len(data))] ^= 1 << chance.randrange(8)

    return change


def _loads_as(index: SampleIndex) -> str:
    """Whether `info` refuses the index, or it is what it was."""
    code, _, err = command(build_index.main, "info", index.path)
    if is_refused(code, err):
        return ""
    again = SampleIndex.load(index.path)
    same = code == 0 and again.sha256 == index.sha256 and np.array_equal(again.samples, index.samples)
    return "" if same else f"silent: exit {code}, {err}"


def index_rows(folder: Path) -> Iterator[tuple[str, Trial]]:
    """Faults of an index: its header, its rows, both also with right hashes."""
    index = write_set(folder / "set", photographs(9), photographs(3))
    header, rows = index.path / "index.json", index.path / "samples.npy"
    start = rows.read_bytes().index(b"\n") + 1

    def flipped(path: Path, first: int = 0, stop: int | None = None) -> Trial:
        def trial(chance: random.Random) -> str:
            with damaged(path, flip(chance, first, stop)):
                return _loads_as(index)

        return trial

    def resigned(chance: random.Random) -> str:
        """Another value somewhere in the header, and a right hash: no traceback, whatever comes of it."""
        content = json.loads(header.read_text())
        _mutate(content, chance)
        content["sha256"] = content_sha256(content)
        text = json.dumps(content).encode()
        with damaged(header, lambda data: data.__setitem__(slice(None), text)):
            for verb in ("info", "ls", "verify"):
                code, _, err = command(build_index.main, verb, index.path)
                if code not in (0, 1) and not is_refused(code, err):
                    return f"traceback: {verb}: exit {code}, {err}"
        return ""

    def rehashed(chance: random.Random) -> str:
        """A flip in the header of samples.npy, with a right hash in index.json."""
        with damaged(rows, flip(chance, 0, start)):
            content = {**json.loads(header.read_text()), "files": file_entry(rows)}
            text = json.dumps({**content, "sha256": content_sha256(content)}).encode()
            with damaged(header, lambda data: data.__setitem__(slice(None), text)):
                code, _, err = command(build_index.main, "info", index.path)
                same = code == 0 and np.array_equal(SampleIndex.load(index.path).samples, index.samples)
                return "" if same or is_refused(code, err) else f"silent: exit {code}, {err}"

    yield "index.json, a bit", flipped(header)
    yield "index.json, a value with a right hash", resigned
    yield "samples.npy, a bit of its header", flipped(rows, 0, start)
    yield "samples.npy, a bit of its header with a right hash", rehashed
    yield "samples.npy, a bit of its rows", flipped(rows, start)


def _mutate(content: Any, chance: random.Random) -> None:
    """Replace, or remove, one value somewhere below."""
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = chance.choice(keys)
        below = content[key]
        if isinstance(below, (dict, list)) and below and chance.random() < 0.8:
            content = below
            continue
        if key in ("magic", "version", "sha256"):
            continue
        if isinstance(content, dict) and chance.random() < 0.2:
            del content[key]
        else:
            content[key] = chance.choice([None, -5, 0, 1, 1 << 70, 1.5, float("nan"), True, "", "../x", "\ud800", [], {}, [[]]])
        return


def stats_rows(folder: Path) -> Iterator[tuple[str, Trial]]:
    """Faults of a file of statistics."""
    random_stats = np.random.default_rng(0)
    stats = Stats(random_stats.random((24, 24, 3)).astype(np.float32), np.zeros(3, np.float32), np.ones(3), np.eye(3), 9,
                  {4: "cannot be decoded"}, "f" * 64, "train")
    path = folder / "stats.npz"
    stats.save(path)

    def same() -> bool:
        again = Stats.load(path)
        return again.sha256 == stats.sha256 and all(vars(again)[name] == vars(stats)[name]
                                                    for name in ("count", "skipped", "index", "split"))

    def trial(change: Callable[[random.Random], Callable[[bytearray], object]]) -> Trial:
        def run(chance: random.Random) -> str:
            with damaged(path, change(chance)):
                try:
                    return "" if same() else "silent: other statistics"
                except ValueError as error:
                    return "" if str(error).count("\n") == 0 else f"traceback: {error}"

        return run

    yield "statistics, a bit", trial(flip)
    yield "statistics, cut", trial(lambda chance: lambda data: data.__delitem__(slice(chance.randrange(len(data)), None)))


def archive_rows(folder: Path) -> Iterator[tuple[str, Trial]]:
    """Faults of archives: their headers and ends before they are indexed, their images after."""
    path = folder / "t.tar"
    train_tar(path)
    words = ["build", "fall2011", path, "--out", folder / "index", "--jobs", 1]
    assert command(build_index.main, *words)[0] == 0
    index = SampleIndex.load(folder / "index")
    headers = []
    with open_tar(path) as source:
        for outer in walk(source):
            headers += [outer.header, *(member.header for member in walk(source, outer.offset, outer.offset + outer.size))]

    def built(change: Callable[[bytearray], object]) -> str:
        with damaged(path, change):
            code, _, err = command(build_index.main, *words, "--force")
            same = code == 0 and np.array_equal(SampleIndex.load(index.path).samples, index.samples)
            command(build_index.main, *words, "--force")
            return "" if same or is_refused(code, err) else f"silent: exit {code}, {err}"

    def header(chance: random.Random) -> str:
        first = chance.choice(headers)
        return built(flip(chance, first, first + 512))

    def cut(chance: random.Random) -> str:
        return built(lambda data: data.__delitem__(slice(chance.randrange(len(data) - 1024), None)))

    def image(chance: random.Random) -> str:
        command(build_index.main, *words, "--force")
        id = chance.randrange(len(index))
        first = int(index.samples["offset"][id])
        with damaged(path, flip(chance, first, first + int(index.samples["size"][id]))):
            code, out, err = command(build_index.main, "verify", index.path, "--full", "--jobs", 1)
        named = [int(line.split()[2]) for line in out.splitlines() if line.startswith("damaged: sample")]
        return "" if code == 1 and named == [id] else f"silent: exit {code}, {named} for {id}, {err}"

    yield "tar, a bit of a header", header
    yield "tar, cut", cut
    yield "JPEG in a tar, a bit", image


def packed_rows(folder: Path) -> Iterator[tuple[str, Trial]]:
    """Faults of a packed folder: the same command fails, or writes the same bytes again."""
    blobs = [encode(picture(i, 60, 70)) for i in range(12)]
    index = write_set(folder / "set", blobs[:11] + [blobs[11][:500]])
    out, kept = folder / "out", folder / "kept"
    words = [index.path, out, "--square-px", 32, "--shard-images", 6, "--budget", 0.1, "--jobs", 1]
    assert command(pack_shards.main, *words)[0] == 0
    shutil.copytree(out, kept)
    files = sorted(path.name for path in kept.iterdir())

    def trial(chance: random.Random) -> str:
        name = chance.choice(files)
        with damaged(out / name, flip(chance)):
            code, said, err = command(pack_shards.main, *words)
            same = code == 0 and all(_says_the_same(out / file, kept / file) for file in files)
        for file in files:
            shutil.copyfile(kept / file, out / file)
        return "" if is_refused(code, err) or same else f"silent: {name}: exit {code}, {said}, {err}"

    yield "packed folder, a bit", trial


def resident_rows(folder: Path) -> Iterator[tuple[str, Trial]]:
    """A resident file: the batches of an epoch are as they were, damaged rows are decoded again and named."""
    index = write_set(folder / "set", photographs(12))
    stats = compute(index, "train", 76)

    def epoch(kind: str, step: int) -> list[Batch]:
        with loader(index, stats, folder / "resident", kind, batch=4) as train:
            train.load_state_dict({**train.state_dict(), "step": step})
            return take(train, 3)

    for kind in ("rgb", "yuv420"):
        before, expected = epoch(kind, 0), epoch(kind, 3)  # the second comes out of the file
        path, = (folder / "resident").glob(f"*-{kind}-*.squares")
        whole = path.read_bytes()
        assert b"\0\0\0\0" not in whole[4096:4096 + 4 * 12] and len(before) == 3

        def trial(chance: random.Random, kind: str = kind, path: Path = path, whole: bytes = whole,
                  expected: str = digest(expected)) -> str:
            first = chance.choice((0, 4096, 8192, 8192, 8192))  # of the header, the marks, the rows
            last = {0: 4096, 4096: 4096 + 4 * 12, 8192: len(whole)}[first]
            with damaged(path, flip(chance, first, last)):
                same = digest(epoch(kind, 3)) == expected
                mended = path.read_bytes()[4096:] == whole[4096:]
            path.write_bytes(whole)
            return "" if same and mended else f"silent: batches {same}, file {mended}"

        yield f"resident file ({kind}), a bit", trial


def _says_the_same(path: Path, kept: Path) -> bool:
    """Whether a file has the bytes that were written; of JSON whether all that is hashed is right (not where an index says its
    archives lay, which are looked for beside it first; nor the name of the key of a hash)."""
    if not path.exists() or path.suffix != ".json" or file_sha256(path) == file_sha256(kept):
        return path.exists() and file_sha256(path) == file_sha256(kept)
    found, wanted = json.loads(path.read_bytes()), json.loads(kept.read_bytes())
    if path.name == "index.json":
        return content_sha256(found) == content_sha256(wanted)
    return all(found.get(key) == value for key, value in wanted.items() if key != "own_sha256")


def all_rows(folder: Path) -> Iterator[tuple[str, Trial]]:
    for make in (index_rows, stats_rows, archive_rows, packed_rows, resident_rows):
        (folder / make.__name__).mkdir()
        yield from make(folder / make.__name__)
