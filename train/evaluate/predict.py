"""One pass of a network over a split: softmax averaged over one or ten views (paper §4.1), every image exactly once.

B batch, K classes.
"""

from __future__ import annotations

from typing import Any, Callable, ContextManager, Iterator, Optional

import numpy as np
import torch
from torch import nn

from pipeline.loading.batch import Batch
from pipeline.reading.source import SampleError
from pipeline.loading.eval_loader import TestLoader
from train.parallel.failure import enter_phase
from train.parallel.topology import Topology
from train.evaluate.metrics import Score, ranks, scored


def evaluate(network: nn.Module, loader: TestLoader, views: int, autocast: Callable[[], ContextManager[Any]],
             stop: Callable[[], bool] = lambda: False,
             progress: Callable[[int, int], None] = lambda done, total: None,
             where: Optional[Topology] = None) -> Optional[Score]:
    """Test a network on every image of a split. All processes call it together and get the same score, to the bit the same for
    any number of data ranks: each finds the places of its images' labels, and what is counted does not depend on their order.

    Args:
        network: images (B, 3, crop, crop) to logits (B, K); put into eval mode and back.
        loader: of whole squares; with `shard` (data_rank, data_ranks) the batches of this process.
        views: 1 (centre) or 10 (corners and centre, and mirrored); their softmax outputs are averaged.
        autocast: context in which the network runs.
        stop: asked before each batch; when true in any process, the test is given up in all and None comes back.
        progress: told of images done, by all processes, and in all.
        where: this process; None is one alone.

    Raises:
        SampleError: an image cannot be read; in all processes, whichever met it.
        ValueError: an image has no label (or, in the other processes, RuntimeError, as with all that loading fails of).
        RuntimeError: not every image came exactly once, or a probability is not finite.
    """
    total = len(loader.index.ids(loader.split))
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # of each batch: ids, places and probabilities of the labels
    classes = 0

    def take(batch: Batch, probabilities: torch.Tensor) -> None:
        nonlocal classes
        own = probabilities.gather(1, batch.labels[:, None])[:, 0]
        found.append((batch.ids, ranks(probabilities, batch.labels).cpu().numpy(), own.cpu().numpy()))
        classes = probabilities.shape[1]

    if not each_batch(network, loader, views, autocast, take, stop, lambda done: progress(done, total), where):
        return None
    if where is not None and where.data_ranks > 1:
        everyone = where.gather_objects((found, classes))[::where.tower_ranks]  # both towers of a pair have the same
        found, classes = [batch for part, _ in everyone for batch in part], max(number for _, number in everyone)
    ids, places, own = (np.concatenate(part) for part in zip(*found)) if found else (np.zeros(0, np.int64),) * 3
    order = np.argsort(ids)
    ids = ids[order]
    if not np.array_equal(ids, loader.index.ids(loader.split)):
        raise RuntimeError(f"images tested (={len(ids)}, {len(np.unique(ids))} different) must be the {total} of split "
                           f"{loader.split}, each once; report this, the counts would be wrong")
    return scored(places[order], own[order], classes)


def each_batch(network: nn.Module, loader: TestLoader, views: int, autocast: Callable[[], ContextManager[Any]],
               take: Callable[[Batch, torch.Tensor], None], stop: Callable[[], bool] = lambda: False,
               progress: Callable[[int], None] = lambda done: None, where: Optional[Topology] = None,
               labelled: bool = True) -> bool:
    """Show a network the loader's images; False when somebody asked to stop. All processes call it together.

    Args:
        network, loader, views, autocast, stop, where: as for `evaluate`.
        take: called with each batch of this process and its probabilities (B, K) float64.
        progress: told of images done, by all processes.
        labelled: an image without a label is an error.

    Raises:
        As `evaluate`, and what `take` raises.
    """
    done = 0
    training = network.training
    network.eval()
    try:
        with torch.no_grad():  # not inference_mode: what a layer keeps from here must serve training too
            for batch, images in _rounds(loader, stop, where, labelled):
                if batch is not None:
                    take(batch, _probabilities(network, loader, batch, views, autocast, where))
                done += images
                progress(done)
                enter_phase("test")
    except _Stopped:
        return False
    finally:
        network.train(training)
    return True


class _Stopped(Exception):
    """Somebody asked to stop."""


def _rounds(loader: TestLoader, stop: Callable[[], bool], where: Optional[Topology],
            labelled: bool) -> Iterator[tuple[Optional[Batch], int]]:
    """Batch after batch of this process (None when others still have one), with the images of all processes in this round.

    Before each round all agree that everyone has its batch: a process that has failed would leave the others waiting for ever.
    """
    batches = iter(loader)
    while True:
        batch, failure = None, None
        try:
            batch = next(batches, None)
            if labelled and batch is not None and int(batch.labels.min()) < 0:
                raise ValueError(f"split (={loader.split}) of {loader.index.path} has images without a label; choose a split "
                                 "with ground truth")
        except Exception as error:
            failure = error
        flags = [len(batch.ids) if batch is not None else 0, failure is not None, stop()]
        images, failed, stopped = where.all_reduce_sum(flags) if where is not None else flags
        if failed:
            raise _first_failure(failure, loader, where)
        if images == 0:
            return
        if stopped:
            raise _Stopped
        yield batch, int(images) // (where.tower_ranks if where is not None else 1)


def _first_failure(failure: Optional[Exception], loader: TestLoader, where: Optional[Topology]) -> Exception:
    """The failure that all processes raise: the one of the first that has any."""
    if where is None or where.is_single:
        assert failure is not None
        return failure
    sample = (failure.id, failure.reason) if isinstance(failure, SampleError) else None
    found = where.gather_objects((str(failure) or type(failure).__name__, sample) if failure is not None else None)
    rank = next(rank for rank, entry in enumerate(found) if entry is not None)
    if rank == where.global_rank and failure is not None:
        return failure
    text, sample = found[rank]
    return SampleError(loader.index, *sample) if sample else RuntimeError(f"process {rank} could not test its images: {text}")


def _probabilities(network: nn.Module, loader: TestLoader, batch: Batch, views: int,
                   autocast: Callable[[], ContextManager[Any]], where: Optional[Topology]) -> torch.Tensor:
    """(B, K) float64: the softmax of a batch, averaged over the views."""
    images = batch.images
    if halves := getattr(network, "halves_images", False):  # each process of the pair gives half of an even number
        assert where is not None
        images = torch.cat([images, images[-1:]]) if len(images) % 2 else images
        images = images.chunk(2)[where.tower_rank]
    total = torch.zeros(())
    with autocast():
        for view in loader.views(images, views):
            logits = network(view.contiguous())[:len(batch.ids)] if halves else network(view.contiguous())
            total = logits.double().softmax(1) + total.to(view.device)
    return total / views
