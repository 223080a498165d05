"""Where images come from, by name: the tier a recipe chooses in one line. All give the same samples the same draws.

- ``archives``: region decode straight from the files as they were downloaded.
- ``packed``: the same from the 256-pixel JPEGs that tools/pack_shards.py wrote, in any order.
- ``streamed``: packed shards read only forwards, shuffled within a window; local or s3://.
- ``resident``: decoded squares in memory, filled from an index of either kind while the first epoch trains, or is tested.
"""
from typing import TYPE_CHECKING, Any

from pipeline.config import LANES, WINDOW, DataConfig, LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.train_loader import TrainLoader
from pipeline.monitor import Meter
from pipeline.reading.source import Quarantine
from pipeline.sampling.sampler import Ids
from pipeline.loading.eval_loader import TestLoader
from pipeline.stats import Stats

if TYPE_CHECKING:
    import torch.distributed as dist

TIERS = ("archives", "packed", "streamed", "resident")


def check(tier: str, index: SampleIndex) -> None:
    """Whether an index is of the kind a tier reads.

    Raises:
        ValueError: it is not, or there is no such tier.
    """
    if tier not in TIERS:
        raise ValueError(f"data.tier (={tier}) must be one of {', '.join(TIERS)}; correct the recipe")
    if tier == "archives" and index.packed is not None:
        raise ValueError(f"data.tier (=archives) must name what the index is: {index.path} holds packed images; write "
                         "data.tier: packed (or streamed, or resident)")
    if tier in ("packed", "streamed") and index.packed is None:
        raise ValueError(f"data.tier (={tier}) needs packed images, and {index.path} is an index of archives; run `python "
                         f"tools/pack_shards.py {index.path} OUT` and give OUT as data.packed")


def train_loader(tier: str, index: SampleIndex, split: str, data: DataConfig, batch: int, seed: int, stats: Stats, *,
                 resident: str = "rgb", window: int = WINDOW, lanes: int = LANES, store: str = "",
                 machine: LoaderConfig = LoaderConfig(), shard: tuple[int, int] = (0, 1), device_id: int | None = None,
                 quarantine: Quarantine | None = None, group: "dist.ProcessGroup | None" = None,
                 meter: Meter | None = None) -> TrainLoader:
    """The loader of a tier.

    Args:
        tier: one of TIERS.
        resident: tier resident: ``rgb`` or ``yuv420``, see `ResidentLoader`.
        window, lanes, store: tier streamed, see `StreamedLoader`.
        group: tier resident in GPU memory: the node's processes, among which the squares are shared out.
        The rest as for `TrainLoader`.

    Raises:
        ValueError: the index is not of the kind the tier reads; whatever the loader's own class raises.
    """
    check(tier, index)
    common: dict[str, Any] = {"machine": machine, "shard": shard, "device_id": device_id, "quarantine": quarantine,
                              "meter": meter}
    if tier == "resident":
        from pipeline.resident.train_loader import ResidentLoader
        return ResidentLoader(index, split, data, batch, seed, stats, resident=resident, group=group, **common)
    if tier == "streamed":
        from pipeline.loading.streamed_loader import StreamedLoader
        return StreamedLoader(index, split, data, batch, seed, stats, window=window, lanes=lanes, store=store, **common)
    return TrainLoader(index, split, data, batch, seed, stats, **common)


def test_loader(tier: str, index: SampleIndex, split: str, data: DataConfig, batch: int, stats: Stats, *, resident: str = "rgb",
                keep: bool = True, machine: LoaderConfig = LoaderConfig(), shard: tuple[int, int] = (0, 1),
                device_id: int | None = None, ids: Ids | None = None, meter: Meter | None = None) -> TestLoader:
    """The loader of a tier's test images. In all tiers but resident it reads the index.

    Args:
        tier: one of TIERS.
        resident, keep: tier resident, see `ResidentTestLoader`.
        The rest as for `TestLoader`.

    Raises:
        ValueError: there is no such tier; whatever the loader's own class raises.
    """
    if tier not in TIERS:
        raise ValueError(f"data.tier (={tier}) must be one of {', '.join(TIERS)}; correct the recipe")
    common: dict[str, Any] = {"machine": machine, "shard": shard, "device_id": device_id, "ids": ids, "meter": meter}
    if tier == "resident":
        from pipeline.resident.eval_loader import ResidentTestLoader
        return ResidentTestLoader(index, split, data, batch, stats, resident=resident, keep=keep, **common)
    return TestLoader(index, split, data, batch, stats, **common)


test_loader.__test__ = False  # type: ignore[attr-defined]  # not a test case, whatever its name
