"""Work done ahead of need, in order: in a pool of threads (`ahead_in_threads`), or by one thread (`Prefetcher`).

On a GPU that thread works on a CUDA stream of its own (`SideStream`), from which batches are handed over by event: nothing there
waits for a device."""
import atexit
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Any, TypeVar

import torch

from pipeline.loading.batch import Batch
from pipeline.monitor import Monitor

S = TypeVar("S")
T = TypeVar("T")
Made = tuple[Batch, Any]  # and the event after which its tensors are there
_CLOSED = "this loader was closed, or iterated anew, while its batches were being taken; take them from one iterator at a time"


def ahead_in_threads(function: Callable[[S], T], items: Iterable[S], threads: int, name: str) -> Generator[T, None, None]:
    """`map(function, items)` in threads, as many items ahead as there are threads; 0 threads: in the caller's, when asked."""
    if not threads:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads, name)
    waiting: deque[Future[T]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def one_ahead(begun: Iterator[Callable[[], T]]) -> Generator[T, None, None]:
    """The results of what is begun, each waited for only when the next one is begun too, so that threads do not run dry. When
    the next one fails, those before it still come out."""
    waiting: Callable[[], T] | None = None
    while True:
        try:
            following = next(begun)
        except BaseException as failure:
            if waiting is not None:
                yield waiting()
            if isinstance(failure, StopIteration):
                return
            raise
        if waiting is not None:
            yield waiting()
        waiting = following


class Prefetcher(Iterator[T]):
    """An iterator over what the generator `produce` yields, in order, made by another thread, and closed by `close`. `depth`:
    items that may wait finished; 0 means no thread: the consumer runs the generator itself. `monitor` is told when the
    thread is idle."""

    def __init__(self, produce: Generator[T, None, None], depth: int, monitor: Monitor) -> None:
        self._produce, self._depth, self._monitor = produce, depth, monitor
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._stop, self._process = threading.Event(), os.getpid()
        self._thread: threading.Thread | None = None
        self._closing = threading.Lock()
        if depth:
            # A daemon, so that a loader nobody closed does not keep the interpreter alive; it ends before the interpreter does.
            self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
            atexit.register(self.close)
            self._thread.start()

    def _run(self) -> None:
        failure: BaseException = StopIteration()
        try:
            for item in self._produce:
                self._monitor.enter("idle")
                self._ready.put((item, None))
                del item  # the consumer alone decides how long it lives
                if self._stop.is_set():
                    return
        except BaseException as error:
            failure = error
        self._monitor.enter("idle")
        self._ready.put((None, failure))

    def __next__(self) -> T:
        """The next item. Raises what the generator raised, in its place; StopIteration at its end; RuntimeError when closed."""
        if not self._depth:
            if self._stop.is_set():
                raise RuntimeError(_CLOSED)
            try:
                return next(self._produce)
            finally:
                self._monitor.enter("idle")
        item, failure = self._ready.get()
        if failure is not None:
            self._ready.put((None, failure))  # whoever asks again gets it again
            raise failure
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """Stop the thread, after the item it is at; what was ready is lost. Whoever waits for an item, or asks, is told so."""
        if os.getpid() != self._process:
            return  # forked: there is no thread here, and its locks may be held for ever
        self._stop.set()
        thread = self._thread
        if thread is threading.current_thread():
            return  # the garbage collector ran in it; it ends after this item
        with self._closing:  # the thread that closes what was dropped, and the interpreter's end, may come at once
            thread = self._thread
            if thread is not None:
                while thread.is_alive():
                    self._drain()
                    thread.join(timeout=0.01)
                self._drain()
                self._ready.put((None, RuntimeError(_CLOSED)))
                self._thread = None
                atexit.unregister(self.close)
            self._produce.close()

    def _drain(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._ready.get_nowait()


class SideStream:
    """A stream of a device on which one thread makes batches while others, on theirs, take them. (On a CPU, streams and events do
    nothing.)"""

    def __init__(self, device: torch.device) -> None:
        self._module: Any = torch.get_device_module(device)
        self._device = device
        self._stream = self._module.Stream(device)

    def made(self, batches: Generator[Batch, None, None]) -> Generator[Made, None, None]:
        """The batches, made on this stream by whatever thread asks for them, each after what the thread that calls this has
        begun on its own stream. Closes them."""
        self._stream.wait_stream(self._module.current_stream(self._device))
        return self._made(batches)

    def _made(self, batches: Generator[Batch, None, None]) -> Generator[Made, None, None]:
        with closing(batches):
            while True:
                with self._module.stream(self._stream):  # not across the yield: another thread may be the one that closes this
                    batch = next(batches, None)
                    event = self._stream.record_event()
                if batch is None:
                    return
                yield batch, event
                del batch

    def take(self, made: Made) -> Batch:
        """The batch, for use on this thread's current stream, which waits for it."""
        batch, event = made
        stream = self._module.current_stream(self._device)
        stream.wait_event(event)
        for tensor in (batch.images, batch.labels):
            if tensor.is_cuda:
                # torch gives their memory to nobody else before this stream is done with it. (DALI's own waits for the device.)
                tensor.record_stream(stream)
        return batch
