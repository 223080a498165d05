"""Pack an index once into shuffled WebDataset shards of small JPEGs: the central squares of the paper (data tier `packed`).

Exit code: 0 done (or this rank's share), 2 a mistake, 4 the machine failed, 130 interrupted.
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
from collections.abc import Sequence

from tools.cli import ProgressBar, guarded  # noqa: E402
from train.cli import Parser, at_least, share  # noqa: E402

_RANK_VARIABLES = (("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_TASKS_PER_NODE"))


def parser(prog: str = "pack_shards.py") -> Parser:
    top = Parser(prog=prog, description="""\
Pack an index once into shuffled WebDataset shards of small JPEGs: the central squares of the paper.
OUT becomes an index folder of its own, for data.packed of a recipe. Its shards are standard tars of KEY.jpg and KEY.cls. Killed \
or interrupted, the same command resumes, and the bytes are the same.""", example=f"""\
  {prog} INDEX -o packed                  squares of 256 pixels
  {prog} INDEX -o packed --region full    whole, short side 256
  torchrun --nproc-per-node 4 --no-python alexnet pack INDEX -o packed""")
    top.add_argument("index", metavar="INDEX", type=Path, help="folder of the index")
    top.add_argument("to", nargs="?", type=Path, help=argparse.SUPPRESS)  # the former way to say --out
    top.add_out("folder for the shards and their index")
    what = top.add_argument_group("what is written")
    what.add_argument("--split", nargs="+", default=[], help="splits to pack, from the first one on (default: all)")
    what.add_argument("--region", choices=("square", "full"), default="square",
                      help="central square, or the whole image at that short side")
    what.add_argument("--square-px", type=int, default=256, metavar="PX", help="side of the square: data.square_px of the recipe")
    what.add_argument("--quality", type=int, default=90, metavar="Q", help="of the JPEGs, 1 to 100")
    what.add_argument("--subsampling", choices=("444", "422", "420"), default="444", help="of their chroma; 444 is none")
    what.add_argument("--seed", type=int, default=0, metavar="N", help="of the order of the images")
    what.add_argument("--shard-mb", type=at_least(1), default=1000, metavar="MB", help="size of a shard to aim at, in 10^6 bytes")
    what.add_argument("--shard-images", type=at_least(0), default=0, metavar="N",
                      help="most images of a shard, instead of a size (default: by size)")
    top.add_jobs(default="this rank's share of the cores")
    top.add_argument("--rank", type=int, metavar="K",
                     help="which share of the shards (default: torchrun's RANK, Slurm's SLURM_PROCID, or 0)")
    top.add_argument("--world", type=int, metavar="N",
                     help="of how many (default: torchrun's WORLD_SIZE, Slurm's SLURM_NTASKS, or 1)")
    top.add_argument("--budget", type=share, default=1e-4, metavar="SHARE", help="largest share of unreadable images")
    top.add_archives()
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


def main(argv: Sequence[str] | None = None, prog: str = "pack_shards.py") -> int:
    return guarded(lambda: _pack(parser(prog).parse_intermixed_args(argv)))


def _pack(args: argparse.Namespace) -> None:
    from pipeline.index.sample_index import SampleIndex
    from pipeline.packing import pack
    from pipeline.packing.plan import PackOptions, pieces
    from pipeline.process_pool import cores

    if (args.out is None) == (args.to is None):
        raise ValueError(f"--out (={args.out or 'none'}) must name one folder for the shards; write pack INDEX -o FOLDER")
    out = args.out or args.to
    rank, world, local = topology(args.rank, args.world)
    index = SampleIndex.load(args.index, args.archives)
    options = PackOptions(args.region, args.square_px, args.quality, args.subsampling, args.seed)
    # Slurm may have bound us to our cores already: then those are ours.
    jobs = args.jobs or max(1, min(cores(), (os.cpu_count() or 1) // local))
    plan = pack.prepare(index, out, options, splits=args.split, shard_images=args.shard_images,
                        shard_bytes=args.shard_mb * 1_000_000, budget=args.budget)
    start = time.monotonic()
    with ProgressBar() as progress:
        written = pack.write(index, out, plan, jobs=jobs, rank=rank, world=world, budget=args.budget, progress=progress)
        seconds = time.monotonic() - start
        missing = pack.missing(index, out, plan)
        if not missing:
            packed, notes = pack.complete(index, out, plan, jobs=jobs, budget=args.budget, progress=progress)
    if written:
        print(f"packed {written:,} images in {seconds:,.1f} s, {written / seconds:,.0f} img/s")
    if missing and world == 1:
        raise RuntimeError(f"shard (={out / missing[0].name}.tar) was written and is not there any more; see who writes into "
                           "that folder, then run the same command again")
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
