"""Runs a function over tasks in spawned processes, in order; Ctrl-C reaches the parent alone, which ends them."""
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

R = TypeVar("R")


class Progress:
    """Where long work reports to; this one shows nothing."""

    def expect(self, stage: str, total: int) -> None:
        """A stage begins that will see `total` bytes."""

    def advance(self, images: int, bytes: int) -> None:
        """So many more images and bytes are done."""


def cores() -> int:
    return len(os.sched_getaffinity(0))


def _end_with_parent() -> None:
    """In a worker: let it end when its parent is gone (kill -9 leaves no time to say goodbye), whatever it is doing."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def in_processes(function: Callable[..., R], tasks: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[R]:
    """`itertools.starmap(function, tasks)` in at most `jobs` spawned processes; in this process when one is enough.

    Raises what `function` raises (tasks not begun are dropped), RuntimeError when a process dies.
    """
    jobs = min(jobs, len(tasks))
    if jobs <= 1:
        yield from itertools.starmap(function, tasks)
        return
    others = set(multiprocessing.active_children())  # of whoever calls this
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _end_with_parent)
    # Spawned while SIGINT is ignored, the children ignore it for good: a Ctrl-C at the terminal reaches us alone.
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
    try:
        try:
            results = pool.map(function, *zip(*tasks))
        finally:
            if is_main:
                signal.signal(signal.SIGINT, handler)
        yield from results
    except (KeyboardInterrupt, GeneratorExit):  # a task may take minutes; killed, they lose nothing that is finished
        for child in set(multiprocessing.active_children()) - others:
            child.kill()
        raise
    except BrokenProcessPool:
        raise RuntimeError(f"worker processes (={jobs}) died, perhaps for want of memory; use fewer --jobs") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
