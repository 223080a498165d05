"""Images and their nearest neighbours (paper figure 4, right): by the network's last hidden layer, and, for contrast, by their
pixels, which "are often semantically different" however near.

Q queries, k neighbours, N images that are searched, D features, c side of a crop.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Sequence

import numpy as np

from pipeline.index.folders import LOOSE_SPLIT, index_of_files
from pipeline.index.sample_index import SampleIndex
from pipeline.reading.quarantine import SampleError
from train.checkpoint.load_trained import TrainedNetwork
from train.figures.features import Features, Progress
from train.figures.neighbours import NearestNeighbours

_BLOCK = 512  # crops compared at once


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


def random_ids(index: SampleIndex, split: str, count: int, seed: int) -> np.ndarray:
    """(count,) ids of a split, drawn by `seed`, ascending. Raises ValueError when it has not so many."""
    ids = index.ids(split)
    if not 1 <= count <= len(ids):
        raise ValueError(f"images (={count}) must lie in 1..{len(ids)}, the images of split {split}; ask for that many")
    return np.sort(np.random.default_rng(seed).choice(ids, count, replace=False))


def splits_of(index: SampleIndex, ids: Sequence[int]) -> list[str]:
    """Split of each id. Raises ValueError on one that is not there, or excluded, and on one that is given twice."""
    for number, id in enumerate(ids):
        if index.row(id)["excluded"]:
            raise ValueError(f"id (={id}) of {index.path} is excluded, so it is in no batch; give another")
        if id in ids[:number]:
            raise ValueError(f"id (={id}) is given twice; give it once")
    return [index.split_names[int(index.row(id)["split"])] for id in ids]


def queries_from_index(trained: TrainedNetwork, ids: np.ndarray) -> Queries:
    """Queries of images of the index that is searched, valid ids."""
    index = trained.index
    splits = [index.split_names[split] for split in index.samples["split"][ids]]
    crops, features = _crops_and_features(trained, index, splits[0], ids)
    return Queries([f"{split} {id}" for split, id in zip(splits, ids)], ids, index.samples["label"][ids].astype(np.int64), crops,
                   features)


def queries_from_files(trained: TrainedNetwork, files: Sequence[Path]) -> Queries:
    """Queries of image files from anywhere. Raises ValueError naming one that cannot be read."""
    with tempfile.TemporaryDirectory() as scratch:
        index = index_of_files(files, Path(scratch))
        try:
            crops, features = _crops_and_features(trained, index, LOOSE_SPLIT, index.ids(LOOSE_SPLIT))
        except SampleError as error:
            raise ValueError(f"image (={files[error.id]}) cannot be decoded: {error.reason}; give another") from None
    unknown = np.full(len(files), -1)
    names = [file.name.encode("utf-8", "replace").decode() for file in files]  # a name need not be text
    return Queries(names, unknown, unknown, crops, features)


def _crops_and_features(trained: TrainedNetwork, index: SampleIndex, split: str,
                        ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of images, in the order of `ids`."""
    with trained.loader(index, split, ids) as loader:
        features = np.concatenate([rows for _, rows in trained.features(loader)])
    return centre_crops(trained, index, split, ids), features


def centre_crops(trained: TrainedNetwork, index: SampleIndex, split: str, ids: np.ndarray) -> np.ndarray:
    """(N, c, c, 3) uint8, in the order of `ids`."""
    with trained.loader(index, split, ids, pixels=True) as loader:
        return np.concatenate([crops.cpu().numpy() for _, crops in trained.crops(loader)])


def search(trained: TrainedNetwork, features: Features, queries: Queries, count: int, by_pixels: bool,
           progress: Progress) -> NearestNeighbours:
    """The `count` nearest of the images of `features`: by these, or by the pixels of their centre crops, which are decoded once
    and not kept. Raises ValueError when there are not so many."""
    total, done = len(features.ids), 0
    if not 1 <= count < total:
        raise ValueError(f"neighbours (={count}) must lie in 1..{total - 1}, for {features.path} has {total} images; the paper "
                         "shows 6")
    of_queries = queries.crops.reshape(len(queries.crops), -1) if by_pixels else queries.features
    nearest = NearestNeighbours(of_queries, count, queries.ids, trained.topology.device)
    for ids, rows in _pixels(trained, features) if by_pixels else features.blocks():
        nearest.add(ids, rows)
        done += len(ids)
        progress(done, total)
    return nearest


def _pixels(trained: TrainedNetwork, features: Features) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, rows) of all, in blocks that make a product of matrices worth while."""
    ids, rows = [], []
    with trained.loader(trained.index, features.source.split, features.ids, pixels=True) as loader:
        for batch_ids, crops in trained.crops(loader):
            ids.append(batch_ids)
            rows.append(crops.flatten(1).cpu().numpy())
            if sum(map(len, ids)) >= _BLOCK or batch_ids[-1] == features.ids[-1]:
                yield np.concatenate(ids), np.concatenate(rows)
                ids, rows = [], []


def precision(labels: np.ndarray, neighbours: np.ndarray) -> tuple[float, float]:
    """Precision at k: the mean share of a query's neighbours that are of its class, and the standard error of that mean (NaN for
    one query).

    Args:
        labels: (Q,) of the queries.
        neighbours: (Q, k) labels of their neighbours.
    """
    shares = (neighbours == labels[:, None]).mean(1)
    return float(shares.mean()), float(shares.std(ddof=1) / np.sqrt(len(shares))) if len(shares) > 1 else float("nan")


def chance_precision(index: SampleIndex, features: Features, queries: Queries) -> float:
    """Precision of neighbours drawn at random: the mean share of a query's class among all other images."""
    labels = index.samples["label"][features.ids]
    counts = np.bincount(labels[labels >= 0], minlength=len(index.classes))
    own = np.isin(queries.ids, features.ids)
    return float(((counts[queries.labels] - own) / (len(labels) - own)).mean())
