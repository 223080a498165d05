"""Processes under train.parallel.failure's monitor, as torchrun starts them, without any collective."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from train.parallel import failure
from train.parallel.failure import enter_phase, monitored

SILENCE_S, TIMEOUT_S = 1.0, 2.0
STARTING = multiprocessing.get_context("forkserver")  # imports torch once for all of them
STARTING.set_forkserver_preload(["tests.helpers.monitored"])


def start(folder: Path, *deeds: str) -> list[BaseProcess]:
    """One process for each deed, all at step 17; they begin together."""
    processes: list[BaseProcess] = []
    for rank, deed in enumerate(deeds):
        (folder / str(rank)).mkdir()
        processes.append(STARTING.Process(target=run, args=(folder, rank, len(deeds), deed), daemon=True))
        processes[-1].start()
    return processes


def end(process: BaseProcess, folder: Path, rank: int, within_s: float) -> tuple[int | None, str]:
    """Exit code and stderr of a process; kills it when it has not ended in this time."""
    process.join(within_s)
    code = process.exitcode
    process.kill()
    return code, (folder / f"{rank}/stderr").read_text(encoding="utf-8")


def run(folder: Path, rank: int, world_size: int, deed: str) -> None:
    os.dup2(os.open(folder / f"{rank}/stderr", os.O_WRONLY | os.O_CREAT), 2)
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(folder / f"{rank}/error.json")
    failure.GRACE_S, failure.BACKSTOP_S = 1.0, 4.0
    with monitored(rank, world_size, TIMEOUT_S if "hang" in deed else 60.0, SILENCE_S):
        time.sleep(0.6 * (deed == "hang in load"))  # it is behind the others, but entered its phase last
        enter_phase("load", 17)
        while not all((folder / f"{other}/error.json").exists() for other in range(world_size)):
            time.sleep(0.01)
        time.sleep(0.2 * (deed != "hang in load"))
        do(deed)


def do(deed: str) -> None:
    if deed == "be killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif deed == "be suspended, no hang":
        os.kill(os.getpid(), signal.SIGTSTP)
        enter_phase("forward")
    elif deed == "be stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif deed == "raise":
        raise OSError("the disk is full")
    elif deed == "fail in a collective":
        enter_phase("forward")
        time.sleep(0.5)
        raise RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    elif deed == "wait in C":  # as in a driver: neither a signal nor Python gets through
        mutex = ctypes.create_string_buffer(64)
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
    elif deed == "hang with Python's lock":
        ctypes.PyDLL(None).sleep(60)
    elif deed == "hang in forward":
        enter_phase("forward")
        time.sleep(60)
    elif deed == "leave":
        return
    elif deed.startswith("work"):
        for _ in range(15):
            enter_phase("forward")
            time.sleep(0.2)
    else:
        time.sleep(60)
