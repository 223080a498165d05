"""Watchdogs of several processes, without any collective: each main thread sleeps as if it hung in one."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Iterator, Optional

import pytest
import torch.distributed as dist

from tests.helpers.runs import ROOT
from train.parallel import watchdog
from train.parallel.board import Beat, Board, Failure, Process, Slate, attempt
from train.parallel.topology import topology
from train.parallel.watchdog import OtherFailed, Watch, Watchdog, _Lapse

BORN = multiprocessing.get_context("forkserver")  # imports torch once for all of them
BORN.set_forkserver_preload(["tests.parallel.test_watchdog"])
SILENCE_S, STILL_S = 1.5, 1.5


def keep(port: "multiprocessing.Queue[int]") -> None:
    """A process with the store, as torchrun has it."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port.put(store.port)
    signal.pause()


def member(rank: int, ranks: int, port: int, folder: Path, deed: str, machine: str) -> None:
    """One of the watched. It says `up` when it has met the others, and does its deed at step 17."""
    os.dup2(os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT), 2)
    if machine:
        ours = Process.this
        setattr(Process, "this", lambda *words: replace(ours(*words), machine=machine))
    watchdog.END_S, watchdog.CLOSE_S = 1.0, 2.5
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    watch = Watchdog(rank, ranks, range(ranks), Board(store), silence_s=SILENCE_S, timeout_s=STILL_S if "still" in deed else 60)
    watch.start()
    while watch._strangers:
        time.sleep(0.01)
    watch.at("load", 17)
    (folder / f"{rank}.up").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
        watch.at("load", 17)
    try:
        with watch.telling():
            do(deed, watch)
    except OtherFailed:
        os._exit(4)
    except ValueError:
        time.sleep(60)  # it cannot end


def do(deed: str, watch: Watchdog) -> None:
    """What a member of the herd does."""
    if deed == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif deed == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif deed == "leave":
        watch.close()
        return
    elif deed == "fail":
        raise ValueError("value (=7) is odd; take another")
    elif deed == "collective":
        raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1")
    elif deed == "sleep a while":
        time.sleep(2.0)
        watch.close()
        return
    elif deed != "be still":
        watch.at("forward", 17)
    time.sleep(60)


def alone_with_the_other(rank: int, port: int) -> None:
    """One of two that nobody launched; process 0 is the first to be done, and keeps the store."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    with topology(towers=2, device="cpu", timeout_s=30) as where:
        time.sleep(1.2 * rank)
        where.watch.at("test", 3)


class Herd:
    """Processes, what they do, how they end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        port: "multiprocessing.Queue[int]" = BORN.Queue()
        self.keeper = BORN.Process(target=keep, args=(port,), daemon=True)
        self.keeper.start()
        self.port = port.get(timeout=60)
        self.all: list[BaseProcess] = []

    def begin(self, *deeds: str, machines: Optional[list[str]] = None) -> None:
        """Start them, let them meet, then let them do as they are told."""
        for rank, deed in enumerate(deeds):
            machine = machines[rank] if machines else ""
            process = BORN.Process(target=member, args=(rank, len(deeds), self.port, self.folder, deed, machine), daemon=True)
            process.start()
            self.all.append(process)
        until = time.monotonic() + 120
        while not all((self.folder / f"{rank}.up").exists() for rank in range(len(deeds))):
            said = [file.read_text(encoding="utf-8") for file in self.folder.glob("*.err")]
            assert time.monotonic() < until and all(process.is_alive() for process in self.all), said
            time.sleep(0.01)
        time.sleep(watchdog.TICK_S * 1.5)  # so that their last sign of life says where they are
        (self.folder / "go").touch()

    def end(self, rank: int, within_s: float) -> tuple[Optional[int], str]:
        """Exit code and stderr of one of them."""
        self.all[rank].join(within_s)
        return self.all[rank].exitcode, (self.folder / f"{rank}.err").read_text(encoding="utf-8")


@pytest.fixture
def herd(tmp_path: Path) -> Iterator[Herd]:
    made = Herd(tmp_path)
    yield made
    for process in (*made.all, made.keeper):
        process.kill()
        process.join()


def test_a_killed_one_is_named_by_all_at_once_with_its_step(herd: Herd) -> None:
    herd.begin("hang", "kill", "hang")
    for rank in (0, 2):
        code, err = herd.end(rank, 6)
        assert code == 4
        assert err == (f"error: process 1 (pid {herd.all[1].pid} on {os.uname().nodename}) was killed at step 17 in load: it "
                       f"ended without a word, as after kill -9, a crash, or for want of memory; "
                       f"this process ({rank}) ends at step 17; go on with --resume\n")


def test_a_failure_is_told_in_its_own_words_and_a_failed_collective_names_the_cause(herd: Herd) -> None:
    """Process 1 does not end by itself after its failure: it is ended too."""
    herd.begin("hang", "fail", "collective")
    for rank in (0, 2):
        code, err = herd.end(rank, 6)
        assert code == 4 and err.count("\n") == 1
        assert " failed at step 17 in load: value (=7) is odd; take another; this process (" in err
    assert herd.end(1, 6) == (4, "error: this process (1) failed at step 17 in load: value (=7) is odd; take another; go on "
                                 "with --resume\n")


def test_a_stopped_one_is_named_with_its_state_and_killed(herd: Herd) -> None:
    herd.begin("hang", "stop")
    code, err = herd.end(0, SILENCE_S + 6)
    assert code == 4 and f"given no sign of life for {SILENCE_S:g} s and is stopped (state T) at step 17 in load; this" in err
    assert "stacks of process 0 (pid" in err and "in member" in err and "watchdog.py" in err, "every thread's"
    assert herd.end(1, 1)[0] == -signal.SIGKILL


def test_on_other_machines_silence_and_not_a_pid_is_what_counts(herd: Herd) -> None:
    """Each on a machine of its own; 1 and 2 stop, so it is 0 that must notice, and 3 that must hear of it."""
    herd.begin("hang", "stop", "stop", "hang", machines=list("abcd"))
    for rank in (0, 3):
        code, err = herd.end(rank, SILENCE_S + 6)
        assert code == 4 and f"error: process 1 (pid {herd.all[1].pid} on " in err
        assert f" has given no sign of life for {SILENCE_S:g} s at step 17 in load; this process ({rank}) ends" in err
    assert all(herd.all[rank].is_alive() for rank in (1, 2)), "a pid of another machine means nothing here"


def test_who_does_not_go_on_is_named_and_not_who_waits_for_it(herd: Herd) -> None:
    herd.begin("still", "be still")
    for rank, named in ((0, f"process 1 (pid {herd.all[1].pid} on {os.uname().nodename})"), (1, "this process (1)")):
        code, err = herd.end(rank, STILL_S + 7)
        assert code == 4 and f"error: {named} has not gone on for {STILL_S:g} s at step 17 in load" in err
        assert f"stacks of process {rank} (pid" in err and "in member" in err


def test_who_has_left_in_order_is_not_missed(herd: Herd) -> None:
    herd.begin("sleep a while", "leave", "sleep a while")
    for rank in range(3):
        assert herd.end(rank, 8) == (0, "")


def test_a_store_that_hangs_keeps_nobody_from_noticing(herd: Herd) -> None:
    assert herd.keeper.pid is not None
    herd.begin("hang", "hang", "hang")
    os.kill(herd.keeper.pid, signal.SIGSTOP)
    time.sleep(1.0)
    herd.all[1].kill()
    for rank in (0, 2):
        code, err = herd.end(rank, 7)
        assert code == 4 and f"process 1 (pid {herd.all[1].pid} on " in err and " was killed at step 17 in forward: " in err


def test_a_store_that_is_gone_ends_all(herd: Herd) -> None:
    herd.begin("hang", "hang")
    herd.keeper.kill()
    ends = [herd.end(rank, 7) for rank in range(2)]
    assert [code for code, _ in ends] == [4, 4]
    said = [f"error: this process ({rank}) has lost torchrun's store at step 17 in forward: " in err
            for rank, (_, err) in enumerate(ends)]
    assert any(said) and all(told or f"process {1 - rank} (pid " in ends[rank][1] for rank, told in enumerate(said)), ends


def test_without_torchrun_process_0_keeps_the_store_until_all_have_left() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pair = [BORN.Process(target=alone_with_the_other, args=(rank, port), daemon=True) for rank in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(30)
    assert [process.exitcode for process in pair] == [0, 0]


def test_a_process_without_its_launcher_ends(tmp_path: Path) -> None:
    """A launcher that starts a watched process and is killed."""
    launched = ("import os, time; from train.parallel.watchdog import Watchdog; "
                "w = Watchdog(0, 1, [0], None, timeout_s=60, silence_s=9, "
                "launcher=os.getppid()); w.start(); print(os.getpid(), flush=True); time.sleep(60)")
    launching = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    launcher = subprocess.Popen([sys.executable, "-c", launching, launched], cwd=ROOT, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True)
    assert launcher.stdout is not None and launcher.stderr is not None
    with launcher.stdout, launcher.stderr:
        int(launcher.stdout.readline())
        launcher.kill()
        launcher.wait()
        began = time.monotonic()
        assert f"this process (0) has lost its launcher (torchrun, pid {launcher.pid}) at step 0" in launcher.stderr.read()
    assert time.monotonic() - began < 6


def test_alone_an_error_is_its_own_affair() -> None:
    watch = Watchdog(0, 1, [0], None, timeout_s=60, silence_s=9)
    watch.start()
    with pytest.raises(RuntimeError, match="gloo"), watch.telling():
        raise RuntimeError("gloo")
    watch.close()
    assert watch._failure is None and not any(thread.is_alive() for thread in watch._threads)
    with pytest.raises(ValueError), Watch().telling():
        raise ValueError


def test_while_it_is_stopped_itself_nothing_goes_by(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    lapse = _Lapse()
    for moment, ended, seconds in ((0.5, False, 0.5), (1.0, False, 1.0), (3600.0, False, 2.0), (3600.5, True, 0.0),
                                   (3601.0, False, 0.5)):
        now[0] = moment
        assert lapse.seconds(ended) == pytest.approx(seconds)


def test_a_pid_that_is_used_again_is_not_taken_for_the_process() -> None:
    me = Process.this(0)
    os.close(me.handle())
    assert me.state() in ("R", "S")
    other = replace(me, started=me.started - 1)
    assert other.state() == ""
    with pytest.raises(ProcessLookupError):
        other.handle()


def test_a_slate_outlives_its_writer() -> None:
    script = ("import dataclasses, json, time; from train.parallel.board import Process, Slate; "
              "slate = Slate(); slate.write('update', 9); "
              "print(json.dumps(dataclasses.asdict(Process.this(3, slate.handle))), flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        process = Process(**json.loads(writer.stdout.readline()))
        handle = Slate.of(process)
        writer.kill()
        writer.wait()
    assert Slate.read(handle) == Beat(0, "update", 9)
    os.close(handle)
    with pytest.raises(OSError):
        Slate.of(process)


def test_the_first_failure_on_the_board_holds() -> None:
    board = Board(dist.HashStore())
    me = Process.this(2)
    assert board.failed() is None and board.process(2) is None and board.last_beat(2) == Beat() and not board.has_left(2)
    first = Failure(me, "failed", Beat(4, "save", 3), "disk (=/x) is full; make room")
    assert board.fail(first) == first and board.fail(replace(first, how="was killed")) == first and board.failed() == first
    board.introduce(me)
    board.leave(2)
    board.beat(2, Beat(5, "test", 4))
    assert board.process(2) == me and board.has_left(2) and board.last_beat(2) == Beat(5, "test", 4)
    assert Beat(1, "load", 5).place < Beat(9, "forward", 5).place < Beat(0, "start", 6).place


def test_every_start_has_a_name_of_its_own_and_all_processes_agree_on_it() -> None:
    """Whatever the starts before have left in the store, and whoever comes late."""
    store = dist.HashStore()
    names: list[dict[int, str]] = []
    for late in (0, 2, 1):
        found: dict[int, str] = {}

        def start(rank: int) -> None:
            time.sleep(0.2 * (rank == late))
            found[rank] = attempt(store, rank, 3, 20.0)
        threads = [threading.Thread(target=start, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        names.append(found)
    assert [len(set(found.values())) for found in names] == [1, 1, 1] and all(len(found) == 3 for found in names)
    assert len({name for found in names for name in found.values()}) == 3
    with pytest.raises(RuntimeError, match=r"processes \(=3\) must all start within 0.2 s, and some have not"):
        attempt(store, 1, 3, 0.2)
