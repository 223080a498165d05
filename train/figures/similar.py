"""Images and their nearest neighbours (paper figure 4, right): by what the network's last hidden layer makes of them, and, for
contrast, by their pixels, which "are often semantically different" however near.

Q queries, k neighbours, N images that are searched, D features, c side of a crop.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator, Sequence

import numpy as np

from pipeline.index.sample_index import SampleIndex
from pipeline.index.folders import LOOSE_SPLIT, index_of_files
from pipeline.reading.quarantine import SampleError
from train.figures.features import Features
from train.figures.neighbours import Nearest, agreement
from train.checkpoint.load_trained import TrainedNetwork

_BLOCK = 512  # crops compared at once
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Queries:
    """Images to find neighbours of.

    Attributes:
        names: (Q) for people: "val 50123", or a file's name.
        ids: (Q,) int64 in the index that is searched; -1 for a file.
        labels: (Q,) int64 classes; -1 unknown.
        crops: (Q, c, c, 3) uint8 centre crops.
        features: (Q, D) float32.
    """

    names: Sequence[str]
    ids: np.ndarray
    labels: np.ndarray
    crops: np.ndarray
    features: np.ndarray


def pick(index: SampleIndex, split: str, count: int, seed: int) -> np.ndarray:
    """(count,) ids of a split, drawn by `seed`, ascending. Raises ValueError when it has not so many."""
    ids = index.ids(split)
    if not 1 <= count <= len(ids):
        raise ValueError(f"images (={count}) must lie in 1..{len(ids)}, the images of split {split}; ask for that many")
    return np.sort(np.random.default_rng(seed).choice(ids, count, replace=False))


def split_of(index: SampleIndex, ids: Sequence[int]) -> list[str]:
    """Split of each id. Raises ValueError on one that is not there, or excluded, and on one that is given twice."""
    for place, id in enumerate(ids):
        if index.row(id)["excluded"]:
            raise ValueError(f"id (={id}) of {index.path} is excluded, so it is in no batch; give another")
        if id in ids[:place]:
            raise ValueError(f"id (={id}) is given twice; give it once")
    return [index.split_names[int(index.row(id)["split"])] for id in ids]


def from_index(trained: TrainedNetwork, ids: np.ndarray) -> Queries:
    """Images of the index that is searched."""
    index = trained.index
    splits = split_of(index, ids.tolist()) if len(ids) < 1000 else [index.split_names[s] for s in index.samples["split"][ids]]
    crops, features = _seen(trained, index, splits[0], ids)
    return Queries([f"{split} {id}" for split, id in zip(splits, ids)], ids, index.samples["label"][ids].astype(np.int64), crops,
                   features)


def from_files(trained: TrainedNetwork, files: Sequence[Path]) -> Queries:
    """Image files from anywhere. Raises ValueError naming one that cannot be read."""
    with tempfile.TemporaryDirectory() as scratch:
        index = index_of_files(files, Path(scratch))
        try:
            crops, features = _seen(trained, index, LOOSE_SPLIT, index.ids(LOOSE_SPLIT))
        except SampleError as error:
            raise ValueError(f"image (={files[error.id]}) cannot be decoded: {error.reason}; give another") from None
    nothing = np.full(len(files), -1)
    names = [file.name.encode("utf-8", "replace").decode() for file in files]  # a name need not be text
    return Queries(names, nothing, nothing, crops, features)


def _seen(trained: TrainedNetwork, index: SampleIndex, split: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Crops and features of images, in the order of `ids`."""
    with trained.loader(index, split, ids) as loader:
        features = np.concatenate([rows for _, rows in trained.features(loader)])
    return crops_of(trained, index, split, ids), features


def crops_of(trained: TrainedNetwork, index: SampleIndex, split: str, ids: np.ndarray) -> np.ndarray:
    """(N, c, c, 3) uint8 centre crops, in the order of `ids`."""
    with trained.loader(index, split, ids, pixels=True) as loader:
        return np.concatenate([crops.cpu().numpy() for _, crops in trained.crops(loader)])


def by_features(trained: TrainedNetwork, features: Features, queries: Queries, count: int, progress: Progress) -> Nearest:
    """The `count` nearest of the images of `features`, by these."""
    return _nearest(trained, features, queries, queries.features, count, features.blocks(), progress)


def by_pixels(trained: TrainedNetwork, features: Features, queries: Queries, count: int, progress: Progress) -> Nearest:
    """The `count` nearest of the same images, by the pixels of their centre crops, which are decoded once and not kept."""
    with trained.loader(trained.index, features.source.split, features.ids, pixels=True) as loader:
        rows = ((ids, crops.flatten(1).cpu().numpy()) for ids, crops in trained.crops(loader))
        return _nearest(trained, features, queries, queries.crops.reshape(len(queries.crops), -1), count, _joined(rows), progress)


def _nearest(trained: TrainedNetwork, features: Features, queries: Queries, mine: np.ndarray, count: int,
             blocks: Iterable[tuple[np.ndarray, np.ndarray]], progress: Progress) -> Nearest:
    total = len(features.ids)
    if not 1 <= count < total:
        raise ValueError(f"neighbours (={count}) must lie in 1..{total - 1}, for {features.path} has {total} images; the paper "
                         "shows 6")
    found, done = Nearest(mine, count, queries.ids, trained.topology.device), 0
    for ids, rows in blocks:
        found.add(ids, rows)
        done += len(ids)
        progress(done, total)
    return found


def _joined(blocks: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches joined to blocks that make a product of matrices worth while."""
    held: list[tuple[np.ndarray, np.ndarray]] = []
    for block in blocks:
        held.append(block)
        if sum(len(ids) for ids, _ in held) >= _BLOCK:
            yield np.concatenate([ids for ids, _ in held]), np.concatenate([rows for _, rows in held])
            held = []
    if held:
        yield np.concatenate([ids for ids, _ in held]), np.concatenate([rows for _, rows in held])


def agreeing(index: SampleIndex, queries: Queries, nearest: Nearest) -> tuple[float, float]:
    """Precision at k and its standard error, see `agreement`. Raises ValueError on queries without a label."""
    if (queries.labels < 0).any():
        raise ValueError(f"queries (={queries.names[int(np.argmin(queries.labels))]} …) must have labels to agree with; take "
                         "them from a split with ground truth")
    return agreement(queries.labels, index.samples["label"][nearest.ids].astype(np.int64))


def chance(index: SampleIndex, features: Features, queries: Queries) -> float:
    """Precision of neighbours drawn at random: the mean share of a query's class among all other images."""
    labels = index.samples["label"][features.ids]
    counts = np.bincount(labels[labels >= 0], minlength=len(index.classes))
    own = np.isin(queries.ids, features.ids)
    return float(((counts[queries.labels] - own) / (len(labels) - own)).mean())
