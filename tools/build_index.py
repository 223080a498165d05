"""Index image archives in place, and look into an index.

  build_index.py build ilsvrc2012 --train T.tar --val V.tar --devkit D.tar.gz --out DIR
  build_index.py build ilsvrc2010 --train T.tar --val V.tar --test X.tar --test-truth TXT --devkit D.tar.gz \\
                                  --patch patch_images.tar --out DIR
  build_index.py build fall2011 fall11_whole.tar --out DIR      (any tar of <wnid>.tar)
  build_index.py build classes PATH --out DIR                   (tar or folder of class folders)
  build_index.py build webdataset SHARD... --out DIR            (key.jpg + key.cls)
  build_index.py subset INDEX --out DIR --class-range 0:50      (some classes of an index, on the same archives)
  build_index.py subset INDEX --out DIR --hold-out 0.5 --hold-out-as test
  build_index.py info|verify|ls DIR        build_index.py cat DIR ID > x.jpg

Nothing is extracted; archives are only read. Exit code: 0 done, 1 damage found, 2 an error, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: tools/profile must not hide the standard library's `profile`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools.cli import ProgressBar, guarded, printable  # noqa: E402

if TYPE_CHECKING:
    from pipeline.index.sample_index import SampleIndex


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="build_index.py", description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = top.add_subparsers(dest="verb", required=True)
    build = verbs.add_parser("build", help="index a data set").add_subparsers(dest="preset", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, required=True, help="folder to write the index to")
    common.add_argument("--force", action="store_true", help="replace the index that is there")
    common.add_argument("--no-crc", action="store_true", help="no CRC-32 (reads headers only; faster from slow disks)")
    _add_jobs(common)
    for year in ("2012", "2010"):
        preset = build.add_parser(f"ilsvrc{year}", parents=[common], help=f"ILSVRC{year}: any of its archives")
        preset.add_argument("--train", type=Path, help="tar of <wnid>.tar")
        preset.add_argument("--val", type=Path, help="tar of validation images")
        preset.add_argument("--test", type=Path, help="tar of test images")
        preset.add_argument("--devkit", type=Path, help="devkit (.tar.gz or folder): class words, validation labels")
        if year == "2010":
            preset.add_argument("--test-truth", type=Path, help="ILSVRC2010_test_ground_truth.txt")
            preset.add_argument("--patch", type=Path, help="patch_images.tar: replaces images of the same base name")
    for name, what in (("fall2011", "a tar of <wnid>.tar"), ("classes", "a tar or a folder of class folders")):
        build.add_parser(name, parents=[common], help=what).add_argument("path", type=Path, help=what)
    build.add_parser("webdataset", parents=[common], help="WebDataset shards").add_argument(
        "shards", type=Path, nargs="+", help="tars of key.jpg + key.cls; a word train, val or test in the name is the split")

    subset = verbs.add_parser("subset", help="derive an index: some classes, images held out of train")
    subset.add_argument("index", metavar="INDEX", type=Path, help="folder of the index to derive from")
    subset.add_argument("--out", type=Path, required=True, help="folder to write the new index to")
    subset.add_argument("--force", action="store_true", help="replace the index that is there")
    subset.add_argument("--classes", type=Path, help="file of the classes to keep: wnids or folders, one a line, # comments")
    subset.add_argument("--class-range", metavar="A:B", help="keep classes A to B - 1, counted from 0")
    subset.add_argument("--exclude-classes", type=Path, help="file of classes to leave out")
    subset.add_argument("--min-images", type=int, default=0, help="leave out classes with fewer training images")
    subset.add_argument("--hold-out", type=float, metavar="SHARE", help="share of each class's training images to hold out")
    subset.add_argument("--hold-out-as", metavar="SPLIT", help="their split: val or test")
    subset.add_argument("--seed", type=int, default=0, help="of the choice of images (default: 0)")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("index", type=Path, help="folder of the index")
    common.add_argument("--archives", type=Path, help="folder to find archives in that have moved")
    info = verbs.add_parser("info", parents=[common], help="what an index holds")
    info.add_argument("--json", action="store_true", help="as JSON")
    verify = verbs.add_parser("verify", parents=[common], help="check the archives against the index")
    how = verify.add_mutually_exclusive_group()
    how.add_argument("--full", action="store_true", help="every header and CRC-32")
    how.add_argument("--scrub", action="store_true", help="decode every image wholly, once")
    verify.add_argument("--exclude", action="store_true", help="mark damaged samples excluded in the index")
    _add_jobs(verify)
    ls = verbs.add_parser("ls", parents=[common], help="list samples")
    ls.add_argument("--class", dest="wnid", help="of this class only")
    ls.add_argument("--split", help="of this split only")
    ls.add_argument("--odd", action="store_true", help="only those with a reason (grey, cmyk, damaged …)")
    ls.add_argument("--json", action="store_true", help="JSON lines")
    cat = verbs.add_parser("cat", parents=[common], help="write an image's bytes to stdout")
    cat.add_argument("id", type=int, help="sample id")
    return top


def _add_jobs(to: argparse.ArgumentParser) -> None:
    to.add_argument("--jobs", type=int, default=0, help="processes or threads (default 0: one a core)")


def _jobs(args: argparse.Namespace) -> int:
    from pipeline.parallel import cores

    if args.jobs < 0:
        raise ValueError(f"--jobs (={args.jobs}) must not be negative; 0 is one a core")
    return int(args.jobs) or cores()


def build(args: argparse.Namespace) -> None:
    """Index a data set."""
    from pipeline.index.builder import Builder
    from pipeline.index.folders import build_classes
    from pipeline.index.ilsvrc import build_fall2011, build_ilsvrc
    from pipeline.index.sample_index import SampleIndex
    from pipeline.index.webdataset import build_webdataset

    with ProgressBar() as progress:
        builder = Builder(args.out, args.preset, jobs=_jobs(args), crc=not args.no_crc, force=args.force, progress=progress)
        if args.preset == "webdataset":
            build_webdataset(builder, args.shards)
        elif args.preset == "fall2011":
            build_fall2011(builder, args.path)
        elif args.preset == "classes":
            build_classes(builder, args.path)
        else:
            build_ilsvrc(builder, train=args.train, val=args.val, test=args.test, devkit=args.devkit,
                         test_truth=getattr(args, "test_truth", None), patch=getattr(args, "patch", None))
    index = SampleIndex.load(args.out)
    _print_info(index)
    if "val" in index.split_names and (index.samples["label"][index.split_rows("val")] < 0).all():
        print("note: val has no labels, so nothing can be validated on it: give --devkit", file=sys.stderr)


def subset(args: argparse.Namespace) -> None:
    """Derive an index from another."""
    from pipeline.index.sample_index import SampleIndex
    from pipeline.index.subset import Choices, derive, read_names, read_range

    choices = Choices(read_names(args.classes) if args.classes is not None else None,
                      read_range(args.class_range) if args.class_range is not None else None,
                      read_names(args.exclude_classes) if args.exclude_classes is not None else (),
                      args.min_images, args.hold_out, args.hold_out_as, args.seed)
    notes = derive(SampleIndex.load(args.index), args.out, choices, force=args.force)
    _print_info(SampleIndex.load(args.out))
    for note in notes:
        print(f"note: {printable(note)}", file=sys.stderr)


def _load(args: argparse.Namespace) -> "SampleIndex":
    from pipeline.index.sample_index import SampleIndex

    return SampleIndex.load(args.index, args.archives)


def info(args: argparse.Namespace) -> None:
    """Print what an index holds."""
    index = _load(args)
    if args.json:
        print(json.dumps(index.summary(), indent=1))
    else:
        _print_info(index)


def _print_info(index: "SampleIndex") -> None:
    about = index.summary()
    print(f"index     {printable(about['path'])}  ({about['preset']}, version {about['version']}, "
          f"sha256 {about['sha256'][:16]}…)")
    for step in about["derived"]:
        few = f"; {len(step['too_few']):,} classes had too few images" if step["too_few"] else ""
        print(f"derived   of {printable(step['index'][:16])}… ({step['samples']:,} samples, {step['classes']:,} classes): "
              f"{printable(step['chosen'])}{few}")
    print(f"samples   {about['samples']:,}, {about['bytes'] / 1e6:,.1f} MB of images, {len(index.classes):,} classes, "
          f"{'CRC-32 each' if about['crc32'] else 'no CRC-32'}")
    for split in about["splits"]:
        labels = index.samples["label"][index.split_rows(split["name"])]
        labelled = "" if (labels >= 0).all() else f", {int((labels < 0).sum()):,} without label"
        print(f"  {split['name']:<7} {split['count']:,} images, {split['excluded']:,} excluded{labelled}")
    print("formats   " + ", ".join(f"{name} {count:,}" for name, count in about["formats"].items()))
    if about["reasons"]:
        print("odd       " + ", ".join(f"{name} {count:,}" for name, count in about["reasons"].items()))
    if about["empty_classes"]:
        names = ", ".join(map(printable, about["empty_classes"][:10])) + (" …" if len(about["empty_classes"]) > 10 else "")
        print(f"no image  in train of {len(about['empty_classes']):,} classes: {names}")
    for archive in about["archives"]:
        print(f"archive   {printable(archive['path'])}  {archive['size']:,} bytes, {archive['kind']}")
    for odd in about["oddities"][:20]:
        print(f"  {'kept' if odd['kept'] else 'excluded':<9} {printable(odd['name'])}: {printable(odd['reason'])}")
    if len(about["oddities"]) > 20:
        print(f"  … and {len(about['oddities']) - 20:,} more (info --json)")


def verify(args: argparse.Namespace) -> int:
    """Check the archives against the index."""
    from pipeline.index import verify as checks

    index, jobs = _load(args), _jobs(args)
    with ProgressBar() as progress:
        if args.scrub:
            from pipeline.decoding.scrub import scrub  # loads DALI

            findings, how = checks.check_files(index) + scrub(index, jobs, progress), "every image decoded"
        elif args.full:
            findings, how = checks.full(index, jobs, progress), "every CRC-32"
        else:
            findings, how = checks.quick(index), "a quick look"
    for finding in findings:
        sample = f"sample {finding.id} (={printable(finding.name)})" if finding.id is not None else printable(finding.name)
        print(f"damaged: {sample} {printable(finding.problem)}")
    left_out = checks.left_out(index, args.scrub) if args.scrub or args.full else 0
    how += f"; {left_out:,} excluded before, not checked" if left_out else ""
    if not findings:
        print(f"ok: {len(index) - left_out:,} samples, {how}")
        return 0
    damaged = sum(finding.id is not None for finding in findings)
    print(f"{damaged:,} damaged of {len(index) - left_out:,} samples, {how}")
    if not args.exclude:
        return 1
    print(f"excluded {checks.exclude(index, findings):,} more samples")
    return 0


def ls(args: argparse.Namespace) -> None:
    """List samples."""
    import numpy as np

    from pipeline.index.sample_index import FORMATS, REASONS

    index = _load(args)
    ids = np.arange(len(index)) if args.wnid is None else index.class_rows(args.wnid)
    if args.split is not None:
        rows = index.split_rows(args.split)
        ids = ids[(ids >= rows.start) & (ids < rows.stop)]
    if args.odd:
        ids = ids[index.samples["reason"][ids] != 0]
    for id in ids.tolist():
        row = index.samples[id]
        archive = index.archives[row["archive"]]
        split, label = index.split_names[row["split"]], int(row["label"])
        wnid = index.classes[label].wnid if label >= 0 else None
        name, reason = index.name(id), REASONS[row["reason"]]
        if not args.json:
            state = f"  {reason}{', excluded' if row['excluded'] else ''}" if reason else ""
            print(f"{id}  {split}  {printable(wnid or '-')}  {row['width']}×{row['height']}  {row['size']}  "
                  f"{printable(name)}{state}")
            continue
        print(json.dumps({
            "id": id, "split": split, "archive": str(archive.path), "member": name,
            "offset": 0 if archive.kind == "folder" else int(row["offset"]), "size": int(row["size"]), "label": label,
            "wnid": wnid, "width": int(row["width"]), "height": int(row["height"]),
            "crc32": int(row["crc32"]) if index.header["crc32"] else None, "format": FORMATS[row["format"]],
            "channels": int(row["channels"]), "reason": reason, "excluded": bool(row["excluded"])}))


def cat(args: argparse.Namespace) -> None:
    """Write an image's bytes to stdout."""
    data = _load(args).read(args.id)
    if sys.stdout.isatty():
        raise ValueError(f"stdout (=a terminal) cannot show an image; redirect it: cat INDEX {args.id} > x.jpg")
    sys.stdout.buffer.write(data)


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    args = parser().parse_args(argv)
    verbs = {"build": build, "subset": subset, "info": info, "verify": verify, "ls": ls, "cat": cat}
    return guarded(lambda: verbs[args.verb](args), "interrupted; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
