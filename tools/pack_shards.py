"""Pack an index once into shuffled WebDataset shards of small JPEGs: the central squares of the paper (data tier `packed`).

  pack_shards.py INDEX OUT                        256-px squares, shards of about 1 GB
  pack_shards.py INDEX OUT --region full          whole images at a short side of 256
  torchrun --nproc-per-node 4 tools/pack_shards.py INDEX OUT       (or srun) each rank its share

OUT becomes an index folder of its own: `data.packed: OUT` in a recipe, `build_index.py info OUT`. Its shards are standard tars of
KEY.jpg and KEY.cls. Killed or interrupted, the same command resumes, and the bytes are the same.

Exit code: 0 done (or this rank's share), 2 an error, 130 interrupted.
"""
import sys
from pathlib import Path

if not __package__:  # run as a file: tools/profile must not hide the standard library's `profile`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train.exit_codes import run_command, start_command  # noqa: E402

if __name__ == "__main__":
    start_command(decodes=True)

import argparse
import os
import time

from tools.cli import ProgressBar, guarded  # noqa: E402

_RANK_VARIABLES = (("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_TASKS_PER_NODE"))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="pack_shards.py", description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("index", metavar="INDEX", type=Path, help="folder written by build_index.py")
    top.add_argument("out", metavar="OUT", type=Path, help="folder for the shards and their index")
    what = top.add_argument_group("what is written")
    what.add_argument("--split", nargs="+", default=[], help="splits to pack, from the first one on (default: all)")
    what.add_argument("--region", choices=("square", "full"), default="square",
                      help="central square, or the whole image at that short side (default: square)")
    what.add_argument("--square-px", type=int, default=256, help="side of the square: data.square_px of the recipe (256)")
    what.add_argument("--quality", type=int, default=90, help="of the JPEGs, 1 to 100 (default: 90)")
    what.add_argument("--subsampling", choices=("444", "422", "420"), default="444", help="of their chroma (default: 444, none)")
    what.add_argument("--seed", type=int, default=0, help="of the order of the images (default: 0)")
    what.add_argument("--shard-mb", type=int, default=1000, help="size of a shard to aim at, in 10^6 bytes (default: 1000)")
    what.add_argument("--shard-images", type=int, default=0, help="most images of a shard, instead of a size")
    how = top.add_argument_group("how")
    how.add_argument("--jobs", type=int, default=0, help="processes (default: this rank's share of the cores)")
    how.add_argument("--rank", type=int, help="which share of the shards (default: torchrun's RANK, Slurm's SLURM_PROCID, or 0)")
    how.add_argument("--world", type=int, help="of how many (default: torchrun's WORLD_SIZE, Slurm's SLURM_NTASKS, or 1)")
    how.add_argument("--budget", type=float, default=1e-4, help="largest share of unreadable images (default: 0.0001)")
    how.add_argument("--archives", type=Path, help="folder to look for archives in when they have moved")
    return top


def topology(rank: int | None, world: int | None) -> tuple[int, int, int]:
    """(rank, world, ranks on this machine), from the options or from torchrun's or Slurm's environment. Raises ValueError."""
    if (rank is None) != (world is None):
        raise ValueError(f"--rank (={rank}) and --world (={world}) belong together; give both or neither")
    local = 1
    if rank is None or world is None:
        rank, world = 0, 1
        for names in _RANK_VARIABLES:
            if names[0] in os.environ and names[1] in os.environ:
                rank, world = int(os.environ[names[0]]), int(os.environ[names[1]])
                local = int(os.environ.get(names[2], "1").split("(")[0].split(",")[0])  # Slurm: 4(x2),3
                break
    if not 0 <= rank < world:
        raise ValueError(f"--rank (={rank}) must lie in 0…{world - 1}, below --world (={world}); correct it")
    return rank, world, local


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return guarded(lambda: _pack(args))


def _pack(args: argparse.Namespace) -> None:
    from pipeline.index.sample_index import SampleIndex
    from pipeline.packing import pack
    from pipeline.packing.plan import PackOptions, pieces
    from pipeline.process_pool import cores

    for name, low in (("jobs", 0), ("shard_images", 0), ("shard_mb", 1)):
        if getattr(args, name) < low:
            raise ValueError(f"--{name.replace('_', '-')} (={getattr(args, name)}) must be at least {low}; correct it")
    if not 0 <= args.budget <= 1:
        raise ValueError(f"--budget (={args.budget}) must be a share between 0 and 1; correct it")
    rank, world, local = topology(args.rank, args.world)
    index = SampleIndex.load(args.index, args.archives)
    options = PackOptions(args.region, args.square_px, args.quality, args.subsampling, args.seed)
    # Slurm may have bound us to our cores already: then those are ours.
    jobs = args.jobs or max(1, min(cores(), (os.cpu_count() or 1) // local))
    plan = pack.prepare(index, args.out, options, splits=args.split, shard_images=args.shard_images,
                        shard_bytes=args.shard_mb * 1_000_000, budget=args.budget)
    start = time.monotonic()
    with ProgressBar() as progress:
        written = pack.write(index, args.out, plan, jobs=jobs, rank=rank, world=world, budget=args.budget, progress=progress)
        seconds = time.monotonic() - start
        missing = pack.missing(index, args.out, plan)
        if not missing:
            packed, notes = pack.complete(index, args.out, plan, jobs=jobs, budget=args.budget, progress=progress)
    if written:
        print(f"packed {written:,} images in {seconds:,.1f} s, {written / seconds:,.0f} img/s")
    if missing:
        print(f"rank {rank} of {world} has finished its share; {len(missing)} of {len(pieces(index, plan))} shards are not "
              f"finished ({missing[0].name}.tar …): the last rank writes the index; --rank 0 --world 1 does all that is left")
        return
    for note in notes:
        print(note)
    for split, measured in (packed.packed or {})["measured"].items():
        print(f"{split}: {measured['images']:,} images in shards of up to {plan.shard_images:,}, {measured['bytes'] / 1e3:.1f} "
              f"kB each; PSNR {measured['psnr_mean']:.2f} dB mean, {measured['psnr_min']:.2f} least (of {measured['measured']})")
    print(f"{packed.path}: verified, SHA-256 {packed.sha256[:16]}; `data.packed: {packed.path}` in a recipe")


if __name__ == "__main__":
    run_command(main)
