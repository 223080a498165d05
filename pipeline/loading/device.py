"""Batches made on a CUDA stream of the loader's own and handed over by event: nothing here waits for a device, in any thread. (On
a CPU, streams and events do nothing.)"""
from collections.abc import Generator
from contextlib import closing
from typing import Any

import torch

from pipeline.loading.batch import Batch

Made = tuple[Batch, Any]  # and the event after which its tensors are there


class SideStream:
    """A stream of a device on which one thread makes batches while others, on theirs, take them."""

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
