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
from pipeline.sampling.batch_plan import CropPlanner
from pipeline.sampling.sampler import Ids, Sampler, WindowSampler
from pipeline.stats import Stats

TIERS = ("archives", "packed", "streamed", "resident")


def check(tier: str, index: SampleIndex) -> None:
    """Whether an index is of the kind a tier reads.

    Raises:
        ValueError: it is not, or there is no such tier.
    """
    _check_name(tier)
    if tier == "archives" and index.packed is not None:
        raise ValueError(f"data.tier (=archives) must name what the index is: {index.path} holds packed images; write "
                         "data.tier: packed (or streamed, or resident)")
    if tier in ("packed", "streamed") and index.packed is None:
        raise ValueError(f"data.tier (={tier}) needs packed images, and {index.path} is an index of archives; run `python "
                         f"tools/pack_shards.py {index.path} OUT` and give OUT as data.packed")


def _check_name(tier: str) -> None:
    if tier not in TIERS:
        raise ValueError(f"data.tier (={tier}) must be one of {', '.join(TIERS)}; correct the recipe")


def train_loader(tier: str, index: SampleIndex, split: str, data: DataConfig, batch: int, seed: int, stats: Stats, *,
                 resident: str = "rgb", window: int = WINDOW, lanes: int = LANES, store: str = "",
                 machine: LoaderConfig = LoaderConfig(), shard: tuple[int, int] = (0, 1), device_id: int | None = None,
                 quarantine: Quarantine | None = None, group: dist.ProcessGroup | None = None,
                 monitor: Monitor | None = None) -> TrainLoader:
    """The training loader of a tier.

    Args:
        tier: one of TIERS.
        index, split: the samples; each needs a label.
        data: how an image becomes a crop.
        batch: global batch, over all ranks.
        seed: of order and augmentation.
        stats: mean and principal components of the training set.
        resident, group: tier resident, see `pipeline.resident.chain.train_chain`.
        window, lanes, store: tier streamed, see `WindowSampler` (they are part of the order) and `ShardSource`.
        machine: threads and checks; never changes a pixel.
        shard: (k, n): this rank gets rows [k·batch/n, (k+1)·batch/n) of every global batch.
        device_id: GPU that decodes and holds the batches, or None for the CPU.
        quarantine: where unreadable samples are recorded; by default bounded by `machine.quarantine_budget`, without a file.
        monitor: measures the loader at work; by default one of its own.

    Raises:
        ValueError: the index is not of the kind the tier reads; split, batch, shard or statistics do not fit.
        RuntimeError: an archive is missing, too many samples are unreadable, squares do not fit into memory.
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
        chain = DecodingChain(context, lambda step: planner.plan(step, *sampler.take(step)), source, stand_ins,
                              context.decoding(context.ids, sampler.share, data.crop_px), mean_image)
    return TrainLoader(context, chain, sampler, planner)


def eval_loader(tier: str, index: SampleIndex, split: str, data: DataConfig, batch: int, stats: Stats | None, *,
                resident: str = "rgb", keep: bool = True, machine: LoaderConfig = LoaderConfig(),
                shard: tuple[int, int] = (0, 1), device_id: int | None = None, skip_corrupt: bool = False, first: int = 0,
                ids: Ids | None = None, monitor: Monitor | None = None) -> EvalLoader:
    """The evaluation loader of a tier; in all of them but resident it reads the index, whatever its kind.

    Args:
        resident, keep: tier resident, see `pipeline.resident.chain.eval_chain`.
        batch, stats, shard, skip_corrupt, first, ids: see `pipeline.loading.eval_loader.Evaluation`.
        The rest as for `train_loader`.

    Raises:
        ValueError: there is no such tier; batch, statistics or ids do not fit.
        RuntimeError: squares do not fit into memory.
    """
    _check_name(tier)
    context = LoaderContext(index, split, data, machine, device_id, monitor or Monitor())
    evaluation = Evaluation(context, batch, stats, shard=shard, skip_corrupt=skip_corrupt, first=first, ids=ids)
    return EvalLoader(evaluation, eval_chain(evaluation, resident, keep) if tier == "resident" else evaluation.decoding_chain())
