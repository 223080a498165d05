"""`Loader`: what the loaders for training and for evaluation share, batches made ahead of need by a `Chain`."""
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Self

import torch

from pipeline.loading.batch import Batch, LoaderContext
from pipeline.loading.chain import Chain
from pipeline.loading.prefetch import Prefetcher


class Pairs:
    """(images, labels) of each batch, for loops that expect what a DataLoader gives. Iterating again gives the next epoch.
    `image` says what is made of a batch's images."""

    def __init__(self, loader: "Loader", image: Callable[[torch.Tensor], torch.Tensor] = lambda images: images) -> None:
        self._loader, self._image = loader, image

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return ((self._image(batch.images), batch.labels) for batch in self._loader)


class Loader(ABC):
    """Batches of a chain. Close it, or use it in a `with`: its threads and buffers go when it is closed, or with the process,
    not with the last reference."""

    def __init__(self, context: LoaderContext, chain: Chain) -> None:
        self.context, self.chain, self.monitor = context, chain, context.monitor
        self.index, self.split, self.data, self.machine = context.index, context.split, context.data, context.machine
        self.device, self.threads, self.labels, self.note = context.device, context.threads, context.labels, chain.note
        self.fill = chain.fill
        self._prefetcher: Prefetcher[Batch] | None = None

    def pairs(self) -> Pairs:
        return Pairs(self)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]: ...

    def _start(self, steps: range) -> Prefetcher[Batch]:
        self._prefetcher = Prefetcher(self.chain.batches(steps), self.chain.queue, self.monitor)
        return self._prefetcher

    def _next(self, prefetcher: Prefetcher[Batch], step: int) -> Batch:
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        with self.monitor.waiting(step, stream):
            return next(prefetcher)

    def close(self) -> None:
        """Free threads and buffers. The loader can be used again; it starts where it was."""
        prefetcher, self._prefetcher = self._prefetcher, None
        if prefetcher is not None:
            prefetcher.close()
        self.chain.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
