"""Data tiers: archives, packed, streamed or resident (`data.tier`); all give the same samples the same augmentation.

- ``archives``: region decode straight from the files as they were downloaded.
- ``packed``: the same from the 256-pixel JPEGs that tools/pack_shards.py wrote, in any order.
- ``streamed``: packed shards read only forwards, shuffled within a window; local or s3://.
- ``resident``: decoded squares in memory, filled from an index of either kind while the first epoch trains, or is evaluated.
"""
import torch.distributed as dist

from pipeline.config import LANES, WINDOW, DataConfig, LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.batch import LoaderContext
from pipeline.loading.loader import Chain, DecodingChain
from pipeline.loading.eval_loader import EvalLoader, Evaluation
from pipeline.loading.train_loader import TrainLoader
from pipeline.monitor import Monitor
from pipeline.reading.quarantine import Quarantine, StandIns, quarantine_budget
from pipeline.reading.shard_source import ShardSource
from pipeline.reading.source import ArchiveSource, Source
from pipeline.resident.chain import eval_chain, train_chain
from pipeline.sampling.batch_plan import BlockPlanner, CropPlanner
from pipeline.sampling.sampler import Ids, Sampler, WindowSampler
from pipeline.stats import Stats

TIERS = ("archives", "packed", "streamed", "resident")


def check(tier: str, index: SampleIndex | None = None) -> None:
    """Raises ValueError when there is no such tier, or the index is not of the kind it reads."""
    if tier not in TIERS:
        raise ValueError(f"data.tier (={tier}) must be one of {', '.join(TIERS)}; correct the recipe")
    if index is None:
        return
    if tier == "archives" and index.packed is not None:
        raise ValueError(f"data.tier (=archives) must name what the index is: {index.path} holds packed images; write "
                         "data.tier: packed (or streamed, or resident)")
    if tier in ("packed", "streamed") and index.packed is None:
        raise ValueError(f"data.tier (={tier}) needs packed images, and {index.path} is an index of archives; run `python "
                         f"tools/pack_shards.py {index.path} OUT` and give OUT as data.packed")


def train_loader(tier: str, index: SampleIndex, split: str, data: DataConfig, batch: int, seed: int, stats: Stats, *,
                 resident: str = "rgb", window: int = WINDOW, lanes: int = LANES, store: str = "",
                 machine: LoaderConfig = LoaderConfig(), shard: tuple[int, int] = (0, 1), device_id: int | None = None,
                 quarantine: Quarantine | None = None, group: dist.ProcessGroup | None = None,
                 monitor: Monitor | None = None) -> TrainLoader:
    """The training loader of a tier, for a split whose samples all have labels.

    batch: global batch, over all ranks; shard: (k, n), this rank gets rows [k·batch/n, (k+1)·batch/n) of each; seed: of order and
    augmentation; device_id: GPU that decodes and holds the batches, or None for the CPU; quarantine: where unreadable samples are
    recorded, by default bounded by `machine.quarantine_budget`, without a file. Tier resident: `resident`, `group`, see
    `pipeline.resident.chain.train_chain`; streamed: `window`, `lanes` (part of the order), `store`, see `ShardSource`.

    Raises ValueError when the index is not of the kind the tier reads, or split, batch, shard or statistics do not fit;
    RuntimeError when an archive is missing, too many samples are unreadable, or squares do not fit into memory.
    """
    check(tier, index)
    context = LoaderContext(index, split, data, machine, device_id, monitor or Monitor())
    stats = stats.expect(data.square_px)
    mean_image = None if data.mean == "channel" else stats.mean_image_chw
    planner = CropPlanner(index, data, seed, stats.channel_mean, stats.eigenvalues, stats.eigenvectors)
    quarantine = quarantine or Quarantine(quarantine_budget(machine, len(context.ids)))
    stand_ins = StandIns(seed, quarantine, planner.plan, "; or raise data.window" if tier == "streamed" else "")
    sampler: Sampler
    source: Source
    if tier == "streamed":
        sampler = windows = WindowSampler(index, context.ids, batch, seed, shard, window=window, lanes=lanes)
        source = ShardSource(index, windows, store=store, check_crc=machine.check_crc)
    else:
        sampler = Sampler(context.ids, batch, seed, shard)
        source = ArchiveSource(index, context.ids, check_crc=machine.check_crc)
    chain: Chain
    if tier == "resident":
        chain = train_chain(context, resident, sampler, planner, stand_ins, mean_image, group)
    else:
        chain = DecodingChain(context, BlockPlanner(sampler.take, sampler.share, planner), source, stand_ins,
                              context.decoding(context.ids, sampler.share, data.crop_px), mean_image)
    return TrainLoader(context, chain, sampler, planner, quarantine)


def eval_loader(tier: str, index: SampleIndex, split: str, data: DataConfig, batch: int, stats: Stats | None, *,
                resident: str = "rgb", keep: bool = True, machine: LoaderConfig = LoaderConfig(),
                shard: tuple[int, int] = (0, 1), device_id: int | None = None, skip_corrupt: bool = False, first: int = 0,
                ids: Ids | None = None, monitor: Monitor | None = None) -> EvalLoader:
    """The evaluation loader of a tier; in all of them but resident it reads the index, whatever its kind.

    For batch, stats, shard, skip_corrupt, first and ids see `pipeline.loading.eval_loader.Evaluation`; resident, keep:
    `pipeline.resident.chain.eval_chain`. Raises ValueError when there is no such tier, or batch, statistics or ids do not fit.
    """
    check(tier)
    context = LoaderContext(index, split, data, machine, device_id, monitor or Monitor())
    evaluation = Evaluation(context, batch, stats, shard=shard, skip_corrupt=skip_corrupt, first=first, ids=ids)
    return EvalLoader(evaluation, eval_chain(evaluation, resident, keep) if tier == "resident" else evaluation.decoding_chain())
