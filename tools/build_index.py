"""Index image archives in place, and look into an index: `build_index.py --help`.

Nothing is extracted; archives are only read. Exit codes: 0 done, 1 damage found, 2 a mistake, 4 the machine failed, 130
interrupted.
"""
import sys
from pathlib import Path

if not __package__:  # run as a file: tools/profile must not hide the standard library's `profile`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train.exit_codes import run_command, start_command  # noqa: E402

if __name__ == "__main__":
    start_command()

import argparse
import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tools.cli import ProgressBar, guarded, printable  # noqa: E402
from train.cli import Parser, put_json  # noqa: E402

if TYPE_CHECKING:
    from pipeline.index.sample_index import SampleIndex


def parser(prog: str = "build_index.py") -> Parser:
    top = Parser(prog=prog, description="Index image archives in place, and look into an index. Nothing is extracted; archives "
                 "are only read.", example=f"""\
  {prog} build classes photos -o photos.index
  {prog} build ilsvrc2012 --train T.tar --val V.tar --devkit D.tar.gz -o indexes/ilsvrc2012
  {prog} build webdataset shards/*.tar -o shards.index
  {prog} subset photos.index -o halves.index --hold-out 0.5 --hold-out-as test
  {prog} info photos.index""")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    presets = verbs.add_parser("build", help="index a data set", example=f"{prog} build classes photos -o photos.index",
                               hint=f"; for a folder of classes: `{prog} build classes FOLDER -o INDEX`")
    build = presets.add_subparsers(dest="preset", required=True, metavar="PRESET")
    output = Parser(add_help=False)
    output.add_out("folder to write the index to", required=True)
    output.add_argument("--force", action="store_true", help="replace the index that is there")
    scan = Parser(add_help=False, parents=[output])
    scan.add_argument("--no-crc", action="store_true", help="no CRC-32 (reads headers only; faster from slow disks)")
    jobs = Parser(add_help=False)
    jobs.add_jobs("processes or threads")
    archives = {"train": "tar of <wnid>.tar", "val": "tar of validation images", "test": "tar of test images",
                "devkit": "devkit (.tar.gz or folder): class words, validation labels"}
    more = {"test-truth": "ILSVRC2010_test_ground_truth.txt", "patch": "patch_images.tar: replaces images of the same base name"}
    for year, options in (("2012", archives), ("2010", archives | more)):
        preset = build.add_parser(f"ilsvrc{year}", parents=[scan, jobs], help=f"ILSVRC{year}: any of its archives", example=(
            f"{prog} build ilsvrc{year} --train T.tar --val V.tar --devkit D.tar.gz -o indexes/ilsvrc{year}"))
        for name, what in options.items():
            preset.add_argument(f"--{name}", type=Path, metavar="PATH", help=what)
    build.add_parser("fall2011", parents=[scan, jobs], help="a tar of <wnid>.tar",
                     example=f"{prog} build fall2011 fall11_whole.tar -o indexes/fall2011").add_argument(
        "path", type=Path, metavar="TAR", help="tar of <wnid>.tar, uncompressed")
    classes = build.add_parser("classes", parents=[scan, jobs], help="a tar or a folder of class folders", example=f"""\
  {prog} build classes photos -o photos.index
  {prog} build classes ILSVRC/Data/CLS-LOC --val-truth LOC_val_solution.csv -o indexes/ilsvrc2012      (as Kaggle has it)""")
    classes.add_argument("path", type=Path, metavar="PATH",
                         help="tar or folder of class folders; beside train/, val and test may be flat")
    truth = classes.add_mutually_exclusive_group()
    truth.add_argument("--devkit", type=Path, metavar="PATH", help="devkit: class words, labels of a flat val")
    truth.add_argument("--val-truth", type=Path, metavar="CSV", help="Kaggle's LOC_val_solution.csv: labels of a flat val")
    build.add_parser("webdataset", parents=[scan, jobs], help="WebDataset shards",
                     example=f"{prog} build webdataset shards/*.tar -o shards.index").add_argument(
        "shards", type=Path, nargs="+", metavar="SHARD",
        help="tars of key.jpg + key.cls; a word train, val or test in the name is the split")

    subset = verbs.add_parser("subset", parents=[output], help="derive an index: some classes, images held out of train",
                              example=f"{prog} subset INDEX -o few.index --class-range 0:50 --hold-out 0.1 --hold-out-as val")
    subset.add_argument("index", metavar="INDEX", type=Path, help="folder of the index to derive from")
    subset.add_argument("--classes", type=Path, metavar="FILE",
                        help="file of the classes to keep: wnids or folders, one a line, # comments")
    subset.add_argument("--class-range", metavar="A:B", help="keep classes A to B - 1, counted from 0")
    subset.add_argument("--exclude-classes", type=Path, metavar="FILE", help="file of classes to leave out")
    subset.add_argument("--min-images", type=int, default=0, metavar="N",
                        help="leave out classes with fewer training images")
    subset.add_argument("--hold-out", type=float, metavar="SHARE", help="share of each class's training images to hold out")
    subset.add_argument("--hold-out-as", metavar="SPLIT", help="their split: val or test")
    subset.add_argument("--hold-out-min", metavar="N", type=int, default=0,
                        help="hold out at least N images of each class, which keeps one")
    subset.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of images")

    common = Parser(add_help=False)
    common.add_argument("index", type=Path, metavar="INDEX", help="folder of the index")
    common.add_archives()
    info = verbs.add_parser("info", parents=[common], help="what an index holds", example=f"{prog} info INDEX --json")
    info.add_json()
    verify = verbs.add_parser("verify", parents=[common, jobs], help="check the archives against the index",
                              example=f"{prog} verify INDEX --full --exclude")
    how = verify.add_mutually_exclusive_group()
    how.add_argument("--full", action="store_true", help="every header and CRC-32")
    how.add_argument("--scrub", action="store_true", help="decode every image wholly, once")
    verify.add_argument("--exclude", action="store_true", help="mark damaged samples excluded in the index")
    ls = verbs.add_parser("ls", parents=[common], help="list samples", example=f"{prog} ls INDEX --split val --odd")
    ls.add_argument("--class", dest="wnid", metavar="WNID", help="of this class only")
    ls.add_argument("--split", help="of this split only")
    ls.add_argument("--odd", action="store_true", help="only those with a reason (grey, cmyk, damaged …)")
    ls.add_json("JSON lines, to FILE.json or, without it, to stdout")
    cat = verbs.add_parser("cat", parents=[common], help="write an image's bytes to stdout",
                           example=f"{prog} cat INDEX 7 > x.jpg")
    cat.add_argument("id", type=int, metavar="ID", help="sample id")
    return top


def build(args: argparse.Namespace) -> None:
    from pipeline.index.builder import Builder
    from pipeline.index.folders import build_classes, build_fall2011, kaggle_truth
    from pipeline.index.ilsvrc import build_ilsvrc, read_devkit
    from pipeline.index.sample_index import SampleIndex
    from pipeline.index.webdataset import build_webdataset
    from pipeline.process_pool import cores

    with ProgressBar() as progress:
        builder = Builder(args.out, args.preset, jobs=args.jobs or cores(), crc=not args.no_crc, force=args.force,
                          progress=progress)
        if args.preset == "webdataset":
            build_webdataset(builder, args.shards)
        elif args.preset == "fall2011":
            build_fall2011(builder, args.path)
        elif args.preset == "classes":
            kit = read_devkit(args.devkit) if args.devkit is not None else None
            truth = None if kit is None or kit.val_labels is None else [kit.classes[label].wnid for label in kit.val_labels]
            build_classes(builder, args.path, words={entry.wnid: entry.words for entry in kit.classes} if kit else {},
                          truth=truth if args.val_truth is None else kaggle_truth(args.val_truth))
        else:
            build_ilsvrc(builder, train=args.train, val=args.val, test=args.test, devkit=args.devkit,
                         test_truth=getattr(args, "test_truth", None), patch=getattr(args, "patch", None))
    _print_info(SampleIndex.load(args.out))


def subset(args: argparse.Namespace) -> None:
    from pipeline.index.sample_index import SampleIndex
    from pipeline.index.subset import Choices, derive, read_names, read_range

    choices = Choices(read_names(args.classes) if args.classes is not None else None,
                      read_range(args.class_range) if args.class_range is not None else None,
                      read_names(args.exclude_classes) if args.exclude_classes is not None else (),
                      args.min_images, args.hold_out, args.hold_out_as, args.seed, args.hold_out_min)
    notes = derive(SampleIndex.load(args.index), args.out, choices, force=args.force)
    _print_info(SampleIndex.load(args.out))
    for note in notes:
        print(f"note: {printable(note)}", file=sys.stderr)


def _load(args: argparse.Namespace) -> "SampleIndex":
    from pipeline.index.sample_index import SampleIndex

    return SampleIndex.load(args.index, args.archives)


def info(args: argparse.Namespace) -> None:
    index = _load(args)
    if not put_json(args.json, _summary(index)):
        _print_info(index)


def _summary(index: "SampleIndex") -> dict[str, Any]:
    """The header of an index with counts and bytes, without its list of files."""
    from pipeline.index.sample_index import FORMATS

    labels = index.samples["label"][index.ids("train")].tolist() if "train" in index.split_names else []
    formats = Counter(index.samples["format"].tolist())
    unseen = set(range(len(index.classes))) - set(labels) if labels else ()  # empty inner tar, or labels from 1 on
    return {"path": str(index.path), **{key: value for key, value in index.header.items() if key not in ("magic", "files")},
            "derived": index.derived, "bytes": int(index.samples["size"].sum(dtype="int64")),
            "formats": {FORMATS[code]: count for code, count in sorted(formats.items())},
            "empty_classes": [index.classes[label].wnid for label in sorted(unseen)]}


def _print_info(index: "SampleIndex") -> None:
    about = _summary(index)
    print(f"index     {printable(about['path'])}  ({about['preset']}, version {about['version']}, "
          f"sha256 {about['sha256'][:16]}…)")
    for step in about["derived"]:
        few = f"; {len(step['too_few']):,} classes had too few images" if step["too_few"] else ""
        print(f"derived   of {printable(step['index'])[:16]}… ({step['samples']:,} samples, {step['classes']:,} classes): "
              f"{printable(step['chosen'])}{few}")
    print(f"samples   {about['samples']:,}, {about['bytes'] / 1e6:,.1f} MB of images, {len(index.classes):,} classes, "
          f"{'CRC-32 each' if about['crc32'] else 'no CRC-32'}")
    for split in about["splits"]:
        unlabelled = int((index.samples["label"][index.split_rows(split["name"])] < 0).sum())
        print(f"  {split['name']:<7} {split['count']:,} images, {split['excluded']:,} excluded"
              + (f", {unlabelled:,} without label" if unlabelled else ""))
    labels = Counter(index.samples["label"].tolist())
    classes = {printable(entry.wnid): labels[label] for label, entry in enumerate(index.classes[:10])}
    for title, counts in (("classes", classes), ("formats", about["formats"]), ("odd", about["reasons"])):
        if counts:
            print(f"{title:<10}" + ", ".join(f"{name} {count:,}" for name, count in counts.items())
                  + " …" * (len(index.classes) > 10 and title == "classes"))
    if "val" in index.split_names and (index.samples["label"][index.split_rows("val")] < 0).all():
        print("note: val has no labels, so nothing can be validated on it: give --devkit (or, to classes, --val-truth)",
              file=sys.stderr)
    if empty := about["empty_classes"]:
        print(f"no image  in train of {len(empty):,} classes: {', '.join(map(printable, empty[:10]))}{' …' * (len(empty) > 10)}")
    for archive in about["archives"]:
        print(f"archive   {printable(archive['path'])}  {archive['size']:,} bytes, {archive['kind']}")
    for odd in about["oddities"][:20]:
        print(f"  {'kept' if odd['kept'] else 'excluded':<9} {printable(odd['name'])}: {printable(odd['reason'])}")
    if len(about["oddities"]) > 20:
        print(f"  … and {len(about['oddities']) - 20:,} more (info --json)")


def verify(args: argparse.Namespace) -> int:
    from pipeline.index import verify as checks
    from pipeline.process_pool import cores

    index, jobs = _load(args), args.jobs or cores()
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
    import numpy as np

    from pipeline.index.header import label_of
    from pipeline.index.sample_index import FORMATS, REASONS

    index = _load(args)
    ids = np.arange(len(index))
    if args.wnid is not None:
        labels = label_of(index.classes)
        if args.wnid not in labels:
            raise ValueError(f"class (={args.wnid}) is not in the index {index.path}; its {len(labels)} classes are listed by "
                             "info --json")
        ids = np.flatnonzero(index.samples["label"] == labels[args.wnid])
    if args.split is not None:
        rows = index.split_rows(args.split)
        ids = ids[(ids >= rows.start) & (ids < rows.stop)]
    if args.odd:
        ids = ids[index.samples["reason"][ids] != 0]
    with contextlib.ExitStack() as stack:
        to_file = args.json is not None and str(args.json) != "-"
        file = stack.enter_context(args.json.open("w", encoding="utf-8")) if to_file \
            else getattr(sys.stdout, "stream", sys.stdout)  # itself: nobody waits for a list that nobody reads
        for id in ids.tolist():
            row = dict(zip(index.samples.dtype.names or (), index.samples[id].tolist()))
            archive, label = index.archives[row["archive"]], row["label"]
            about = {"id": id, "split": index.split_names[row["split"]], "archive": str(archive.path), "member": index.name(id),
                     "offset": 0 if archive.is_folder else row["offset"], "size": row["size"], "label": label,
                     "wnid": index.classes[label].wnid if label >= 0 else None, "width": row["width"], "height": row["height"],
                     "crc32": row["crc32"] if index.header["crc32"] else None, "format": FORMATS[row["format"]],
                     "channels": row["channels"], "reason": REASONS[row["reason"]], "excluded": bool(row["excluded"])}
            state = f"  {about['reason']}{', excluded' if about['excluded'] else ''}" if about["reason"] else ""
            print(json.dumps(about) if args.json is not None else f"{id}  {about['split']}  {printable(about['wnid'] or '-')}  "
                  f"{about['width']}×{about['height']}  {about['size']}  {printable(about['member'])}{state}", file=file)


def cat(args: argparse.Namespace) -> None:
    data = _load(args).read(args.id)
    if sys.stdout.isatty():
        raise ValueError(f"stdout (=a terminal) cannot show an image; redirect it: cat INDEX {args.id} > x.jpg")
    sys.stdout.buffer.write(data)


def main(argv: Sequence[str] | None = None, prog: str = "build_index.py") -> int:
    def work() -> int | None:
        args = parser(prog).parse_args(argv)
        return {"build": build, "subset": subset, "info": info, "verify": verify, "ls": ls, "cat": cat}[args.verb](args)
    return guarded(work, "interrupted; nothing was written")


if __name__ == "__main__":
    run_command(main)
