"""Images and their nearest neighbours (paper figure 4, right): by the network's last hidden layer, and, for contrast, by their
pixels, which "are often semantically different" however near.

Q queries, k neighbours, N images that are searched, B of a block, D values of a row, c side of a crop.
"""

from dataclasses import dataclass
from typing import Iterable, Iterator, Sequence

import numpy as np
import torch

from pipeline.index.sample_index import SampleIndex
from train.checkpoint.resolve import TrainedNetwork
from train.evaluate.metrics import share_interval
from train.figures.features import Features, Progress

_BLOCK = 256  # crops compared at once
_MOST = 1 << 24  # values of queries, and of distances, that are worked on at once
Block = tuple[np.ndarray, np.ndarray]  # ids (B,), rows (B, D)


@dataclass(frozen=True)
class Queries:
    """Images to find neighbours of."""

    ids: np.ndarray  # (Q,) int64 in the index that is searched
    labels: np.ndarray  # (Q,) int64 classes; -1 unknown
    crops: np.ndarray  # (Q, c, c, 3) uint8 centre crops
    features: np.ndarray  # (Q, D) float32

    @classmethod
    def of(cls, trained: TrainedNetwork, split: str, ids: np.ndarray) -> "Queries":
        """Images of a split of the index."""
        with trained.loader(trained.index, split, ids) as loader:
            features = np.concatenate([rows for _, rows in trained.features(loader)])
        labels = trained.index.samples["label"][ids].astype(np.int64)
        return cls(ids, labels, centre_crops(trained, split, ids), features)


def chosen_ids(index: SampleIndex, split: str, count: int, seed: int,
               ids: Sequence[int] | None) -> tuple[np.ndarray, list[str]]:
    """(Q,) these ids, or `count` of a split drawn by `seed`, ascending; and their splits, whose archives are there.

    Raises ValueError when a split has not so many, and on an id that is not there, is excluded or is given twice.
    """
    for number, id in enumerate(ids or ()):
        if index.row(id)["excluded"]:
            raise ValueError(f"id (={id}) of {index.path} is excluded, so it is in no batch; give another")
        if ids and id in ids[:number]:
            raise ValueError(f"id (={id}) is given twice; give it once")
    if ids:
        found = np.array(ids, np.int64)
    else:
        known = index.ids(split)
        if not 1 <= count <= len(known):
            raise ValueError(f"images (={count}) must lie in 1..{len(known)}, the images of split {split}; ask for that many")
        found = np.sort(np.random.default_rng(seed).choice(known, count, replace=False))
    splits = [index.split_names[number] for number in index.samples["split"][found]]
    for used in set(splits):
        index.check_archives(used)
    return found, splits


def centre_crops(trained: TrainedNetwork, split: str, ids: np.ndarray) -> np.ndarray:
    """(N, c, c, 3) uint8, in the order of `ids`."""
    with trained.loader(trained.index, split, ids, pixels=True) as loader:
        return np.concatenate([crops.cpu().numpy() for _, crops in trained.crops(loader)])


def nearest(queries: np.ndarray, own_ids: np.ndarray, count: int, blocks: Iterable[Block],
            device: torch.device = torch.device("cpu")) -> tuple[np.ndarray, np.ndarray]:
    """(Q, k) ids of the rows nearest to each query (Q, D), the nearest first, and their squared distances; -1 where rows are few.

    The rows pass by once, in blocks of ascending ids. A query is not its own neighbour: `own_ids` (Q,) are those among the rows.
    Distances are Euclidean, in float64: exact for bytes, of which the smaller id comes first where they are equally near.
    """
    def double(rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows)).to(device).double()

    own = torch.from_numpy(own_ids).to(device)
    best_ids = torch.full((len(queries), count), -1, device=device)
    best = torch.full((len(queries), count), torch.inf, dtype=torch.float64, device=device)
    for ids, rows in blocks:
        block, block_ids = double(rows), torch.from_numpy(ids).to(device)
        at_once = max(1, _MOST // max(queries.shape[1], len(ids)))
        for first in range(0, len(queries), at_once):
            part = slice(first, first + at_once)
            asked = double(queries[part])
            # ‖a - b‖² = ‖a‖² - 2ab + ‖b‖² cancels; float64 leaves enough digits: of float32 rows at least seven, of bytes all.
            squares = torch.addmm(asked.square().sum(1)[:, None] + block.square().sum(1), asked, block.T, alpha=-2).clamp_(0)
            squares[block_ids == own[part, None]] = torch.inf
            sorted_squares, order = torch.cat([best[part], squares], 1).sort(dim=1, stable=True)
            candidates = torch.cat([best_ids[part], block_ids.expand(len(asked), -1)], 1)
            best[part], best_ids[part] = sorted_squares[:, :count], candidates.gather(1, order[:, :count])
    return best_ids.cpu().numpy(), best.cpu().numpy()


def search(trained: TrainedNetwork, features: Features, queries: Queries, count: int, by_pixels: bool,
           progress: Progress) -> np.ndarray:
    """(Q, k) ids of the `count` nearest of the images of `features`: by these, or by the pixels of their centre crops, which are
    decoded once and not kept. Raises ValueError when there are not so many."""
    total = len(features.ids)
    if not 1 <= count < total:
        raise ValueError(f"neighbours (={count}) must lie in 1..{total - 1}, for {features.path} has {total} images; the paper "
                         "shows 6")

    def blocks() -> Iterator[Block]:
        done = 0
        for ids, rows in _pixels(trained, features) if by_pixels else features.blocks():
            yield ids, rows
            done += len(ids)
            progress(done, total)

    of_queries = queries.crops.reshape(len(queries.crops), -1) if by_pixels else queries.features
    return nearest(of_queries, queries.ids, count, blocks(), trained.topology.device)[0]


def _pixels(trained: TrainedNetwork, features: Features) -> Iterator[Block]:
    """(ids, rows) of all, in blocks that make a product of matrices worth while."""
    ids, rows = [], []
    with trained.loader(trained.index, features.source.split, features.ids, pixels=True) as loader:
        for batch_ids, crops in trained.crops(loader):
            ids.append(batch_ids)
            rows.append(crops.flatten(1).cpu().numpy())
            if sum(map(len, ids)) >= _BLOCK or batch_ids[-1] == features.ids[-1]:
                yield np.concatenate(ids), np.concatenate(rows)
                ids, rows = [], []


def precision(labels: np.ndarray, neighbours: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Precision at k: the mean share of queries' (labels (Q,)) neighbours (labels (Q, k)) that are of their class, and its 95%
    interval over queries: that of as many independent images as would vary as much."""
    shares = (neighbours == labels[:, None]).mean(1)
    mean, variance = float(shares.mean()), float(shares.var() / max(1, len(shares) - 1))
    return mean, share_interval(mean, max(len(shares), mean * (1 - mean) / variance) if variance else len(shares))
