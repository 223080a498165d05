"""Batches made ahead of need, in a thread of its own, so that the consumer finds them ready."""
import atexit
import queue
import threading
from collections.abc import Generator
from typing import Generic, TypeVar

from pipeline.monitor import Meter

T = TypeVar("T")
_CLOSED = "this loader was closed, or iterated anew, while its batches were being taken; take them from one iterator at a time"


class Ahead(Generic[T]):
    """An iterator over what `produce` yields, in order, made by another thread.

    Args:
        produce: a generator; run in the thread, closed by `close`.
        depth: items that may wait finished, at least 1; 0 means no thread: the consumer runs the generator itself.
        meter: told when the thread is idle, and how many items were ready.
    """

    def __init__(self, produce: Generator[T, None, None], depth: int, meter: Meter) -> None:
        self._produce, self._depth, self._meter = produce, depth, meter
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if depth:
            # A daemon, so that a loader nobody closed does not keep the interpreter alive; it ends before the interpreter does.
            self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
            atexit.register(self.close)
            self._thread.start()

    def _run(self) -> None:
        failure: BaseException = StopIteration()
        try:
            for item in self._produce:
                self._meter.enter("idle")
                self._ready.put((item, None))
                del item  # the consumer alone decides how long it lives
                if self._stop.is_set():
                    return
        except BaseException as error:
            failure = error
        self._meter.enter("idle")
        self._ready.put((None, failure))

    def __iter__(self) -> "Ahead[T]":
        return self

    def __next__(self) -> T:
        """The next item. Raises what the generator raised, in its place; StopIteration at its end; RuntimeError when closed."""
        if not self._depth:
            if self._stop.is_set():
                raise RuntimeError(_CLOSED)
            self._meter.depth(0)
            try:
                return next(self._produce)
            finally:
                self._meter.enter("idle")
        self._meter.depth(self._ready.qsize())
        item, failure = self._ready.get()
        if failure is not None:
            self._ready.put((None, failure))  # whoever asks again is told again
            raise failure
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """Stop the thread, after the item it is at; what was ready is lost. Whoever waits for an item, or asks, is told so."""
        self._stop.set()
        thread = self._thread
        if thread is threading.current_thread():
            return  # the garbage collector ran in it; it ends after this item
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
        try:
            while True:
                self._ready.get_nowait()
        except queue.Empty:
            return
