"""Predict the classes of a split: softmax averaged over the centre crop or 10 crops (paper §4.1), every image exactly once.

B batch, K classes, N images of the split.
"""

from typing import Any, Callable, ContextManager, Iterator, Optional

import numpy as np
import torch
from torch import nn

from pipeline.index.sample_index import SampleIndex
from pipeline.loading.batch import Batch
from pipeline.loading.eval_loader import EvalLoader
from pipeline.reading.quarantine import SampleError
from train.evaluate.metrics import Score, label_ranks, score
from train.evaluate.predictions import IMAGE, SCALE
from train.parallel.failure import enter_phase
from train.parallel.topology import Topology

Autocast = Callable[[], ContextManager[Any]]
Take = Callable[[np.ndarray, np.ndarray], None]
_ROUNDS = 32  # batches of a process between two exchanges of results


class _Stopped(Exception):
    """Somebody asked to stop."""


def evaluate(network: nn.Module, loader: EvalLoader, crops: int, autocast: Autocast, stop: Callable[[], bool] = lambda: False,
             progress: Callable[[int, int], None] = lambda done, total: None,
             topology: Topology = Topology.single()) -> Optional[Score]:
    """Test a network on every image of a split; arguments and errors as for `predict`, ValueError for an image without a label.

    The score is the same in all processes, equal to the bit for any number of data ranks; None when somebody asked to stop.
    """
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    total = len(loader.index.ids(loader.split))
    if not predict(network, loader, crops, autocast, lambda *part: parts.append(part), stop=stop,
                   progress=lambda done: progress(done, total), topology=topology, keep=False):
        return None
    images = check_complete([images for images, _ in parts], loader.index, loader.split)
    if (images["label"] < 0).any():
        raise ValueError(f"split (={loader.split}) of {loader.index.path} has images without a label; choose a split with ground "
                         "truth")
    return score(images["place"], images["probability"], parts[0][1].shape[1])


def check_complete(parts: list[np.ndarray], index: SampleIndex, split: str) -> np.ndarray:
    """(N,) IMAGE of all parts. Raises RuntimeError unless they are the images of the split, each once, in id order."""
    images, ids = np.concatenate([np.zeros(0, IMAGE), *parts]), index.ids(split)
    if not np.array_equal(images["id"], ids):
        raise RuntimeError(f"images tested (={len(images)}, {len(np.unique(images['id']))} different) must be the {len(ids)} of "
                           f"split {split}, each once; report this, the counts would be wrong")
    return images


def predict(network: nn.Module, loader: EvalLoader, crops: int, autocast: Autocast, take: Take, *,
            stop: Callable[[], bool] = lambda: False, progress: Callable[[int], None] = lambda done: None,
            topology: Topology = Topology.single(), keep: bool = True) -> bool:
    """Show a network (images (B, 3, crop, crop) to logits (B, K)) the loader's resized images; False when somebody asked to stop.

    All processes call it together, each with a loader of its own batches. `crops` is 1 (centre) or 10 (corners and centre,
    and flipped), whose softmax outputs are averaged. `take` is called in every process with the rows of all, ordered by id:
    (M,) IMAGE and (M, K) float16, or (0, K) without `keep`. `stop` is asked before each batch: when true in any process, the
    test is given up in all. `progress` is called with the number of images done, by all processes. Raises SampleError in all
    processes when an image cannot be read, RuntimeError when a probability is not finite.
    """
    done = 0
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    training = network.training
    network.eval()
    try:
        with torch.no_grad():  # not inference_mode: what a layer keeps from here must serve training too
            for number, (batch, images) in enumerate(_rounds(loader, stop, topology), 1):
                if batch is not None:
                    probabilities = average_softmax(network, loader, batch, crops, autocast, topology)
                    packed, halves = image_rows(batch.ids, batch.labels, probabilities)
                    rows.append((packed, halves if keep else halves[:0]))
                done += images
                if number % _ROUNDS == 0:
                    _exchange(rows, take, topology)
                progress(done)
                enter_phase("test")
            _exchange(rows, take, topology)
    except _Stopped:
        return False
    finally:
        network.train(training)
    return True


def _exchange(rows: list[tuple[np.ndarray, np.ndarray]], take: Take, topology: Topology) -> None:
    """Call `take` with the rows of all processes, and empty the list."""
    of_ranks = topology.gather_objects(rows)[::topology.tower_ranks]  # both towers of a pair have the same
    if joined := [part for of_rank in of_ranks for part in of_rank]:
        images, probabilities = (np.concatenate(parts) for parts in zip(*joined))
        order = np.argsort(images["id"], kind="stable")
        take(images[order], probabilities[order] if len(probabilities) else probabilities)
    rows.clear()


def _rounds(loader: EvalLoader, stop: Callable[[], bool], topology: Topology) -> Iterator[tuple[Optional[Batch], int]]:
    """This process's batches, None when it has no more, with the number of images of this round in all processes.

    Processes have different numbers of batches, and a tower must not run without the other. So each round begins with an
    exchange: how many images each has, and whether any met an unreadable one (training saves then, in all) or was asked to stop.
    """
    batches = iter(loader)
    while True:
        batch, unreadable = None, None
        try:
            batch = next(batches, None)
        except SampleError as error:
            unreadable = (error.id, error.reason)
        images, failed, stopped = topology.all_reduce_sum([
            len(batch.ids) if batch is not None else 0, unreadable is not None, stop()])
        if failed:
            raise SampleError(loader.index, *next(filter(None, topology.gather_objects(unreadable))))
        if images == 0:
            return
        if stopped:
            raise _Stopped
        yield batch, int(images) // topology.tower_ranks


def average_softmax(network: nn.Module, loader: EvalLoader, batch: Batch, crops: int, autocast: Autocast,
                    topology: Topology = Topology.single()) -> torch.Tensor:
    """(B, K) float64: the softmax of a batch, averaged over the crops."""
    images = batch.images
    if halves := getattr(network, "halves_images", False):  # each process of the pair gives half of an even number
        images = torch.cat([images, images[-1:]]) if len(images) % 2 else images
        images = images.chunk(2)[topology.tower_rank]
    total = torch.zeros(())
    with autocast():
        for crop in loader.crops(images, crops):
            logits = network(crop.contiguous())[:len(batch.ids)] if halves else network(crop.contiguous())
            total = logits.double().softmax(1) + total.to(crop.device)
    return total / crops


def image_rows(ids: np.ndarray, labels: torch.Tensor, probabilities: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Pack a batch: (B,) IMAGE and (B, K) float16, of (B,) ids, (B,) labels and (B, K) float64. Raises as `label_ranks`."""
    exact, label = probabilities.cpu().numpy(), labels.cpu().numpy()
    known, column = label >= 0, np.maximum(label, 0)
    images = np.zeros(len(ids), IMAGE)
    images["id"], images["label"] = ids, label
    images["place"] = np.where(known, label_ranks(exact, column), -1)
    images["probability"] = np.where(known, np.take_along_axis(exact, column[:, None], 1)[:, 0], np.nan)
    return images, probabilities.mul(SCALE).half().cpu().numpy()
