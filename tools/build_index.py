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
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file from anywhere

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


def _jobs(arguments: argparse.Namespace) -> int:
    from pipeline.parallel import cores

    if arguments.jobs < 0:
        raise ValueError(f"--jobs (={arguments.jobs}) must not be negative; 0 is one a core")
    return int(arguments.jobs) or cores()


def build(arguments: argparse.Namespace) -> int:
    from pipeline.index.builder import Builder
    from pipeline.index.folders import build_classes
    from pipeline.index.ilsvrc import build_fall2011, build_ilsvrc
    from pipeline.index.sample_index import SampleIndex
    from pipeline.index.webdataset import build_webdataset
    from tools.progress import Console

    with Console() as progress:
        builder = Builder(arguments.out, arguments.preset, jobs=_jobs(arguments), crc=not arguments.no_crc,
                          force=arguments.force, progress=progress)
        if arguments.preset.startswith("ilsvrc"):
            build_ilsvrc(builder, train=arguments.train, val=arguments.val, test=arguments.test, devkit=arguments.devkit,
                         test_truth=getattr(arguments, "test_truth", None), patch=getattr(arguments, "patch", None))
        elif arguments.preset == "webdataset":
            build_webdataset(builder, arguments.shards)
        elif arguments.preset == "fall2011":
            build_fall2011(builder, arguments.path)
        else:
            build_classes(builder, arguments.path)
    index = SampleIndex.load(arguments.out)
    _print_info(index)
    if "val" in index.split_names and (index.samples["label"][index.split_rows("val")] < 0).all():
        print("note: val has no labels, so nothing can be validated on it: give --devkit", file=sys.stderr)
    return 0


def subset(arguments: argparse.Namespace) -> int:
    from pipeline.index.sample_index import SampleIndex
    from pipeline.index.subset import Choices, derive, read_names, read_range

    choices = Choices(read_names(arguments.classes) if arguments.classes is not None else None,
                      read_range(arguments.class_range) if arguments.class_range is not None else None,
                      read_names(arguments.exclude_classes) if arguments.exclude_classes is not None else (),
                      arguments.min_images, arguments.hold_out, arguments.hold_out_as, arguments.seed)
    notes = derive(SampleIndex.load(arguments.index), arguments.out, choices, force=arguments.force)
    _print_info(SampleIndex.load(arguments.out))
    for note in notes:
        print(f"note: {_plain(note)}", file=sys.stderr)
    return 0


def info(arguments: argparse.Namespace) -> int:
    from pipeline.index.verify import summary

    index = _load(arguments)
    if arguments.json:
        print(json.dumps(summary(index), indent=1))
    else:
        _print_info(index)
    return 0


def _print_info(index: "SampleIndex") -> None:
    from pipeline.index.verify import summary

    about = summary(index)
    print(f"index     {_plain(about['path'])}  ({about['preset']}, version {about['version']}, sha256 {about['sha256'][:16]}…)")
    for step in about["derived"]:
        print(f"derived   of {_plain(step['index'][:16])}… ({step['samples']:,} samples, {step['classes']:,} classes): "
              f"{_plain(step['chosen'])}" + (f"; {len(step['too_few']):,} classes had too few images" if step["too_few"] else ""))
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
        names = ", ".join(map(_plain, about["empty_classes"][:10])) + (" …" if len(about["empty_classes"]) > 10 else "")
        print(f"no image  in train of {len(about['empty_classes']):,} classes: {names}")
    for archive in about["archives"]:
        print(f"archive   {_plain(archive['path'])}  {archive['size']:,} bytes, {archive['kind']}")
    for odd in about["oddities"][:20]:
        print(f"  {'kept' if odd['kept'] else 'excluded':<9} {_plain(odd['name'])}: {_plain(odd['reason'])}")
    if len(about["oddities"]) > 20:
        print(f"  … and {len(about['oddities']) - 20:,} more (info --json)")


def verify(arguments: argparse.Namespace) -> int:
    from pipeline.index import verify as checks
    from tools.progress import Console

    index, jobs = _load(arguments), _jobs(arguments)
    with Console() as progress:
        if arguments.scrub:
            from pipeline.decoding.scrub import scrub

            found = checks.check_files(index) + scrub(index, jobs, progress)
        else:
            found = checks.full(index, jobs, progress) if arguments.full else checks.quick(index)
    for finding in found:
        sample = f"sample {finding.id} (={_plain(finding.name)})" if finding.id is not None else _plain(finding.name)
        print(f"damaged: {sample} {_plain(finding.problem)}")
    how = "every image decoded" if arguments.scrub else "every CRC-32" if arguments.full else "a quick look"
    left_out = checks.left_out(index, arguments.scrub) if arguments.scrub or arguments.full else 0
    how += f"; {left_out:,} excluded before, not checked" if left_out else ""
    if not found:
        print(f"ok: {len(index) - left_out:,} samples, {how}")
        return 0
    samples = sum(finding.id is not None for finding in found)
    print(f"{samples:,} damaged of {len(index) - left_out:,} samples, {how}")
    if not arguments.exclude:
        return 1
    print(f"excluded {checks.exclude(index, found):,} more samples")
    return 0


def ls(arguments: argparse.Namespace) -> int:
    import numpy as np

    from pipeline.index.sample_index import FORMATS, REASONS

    index = _load(arguments)
    ids = np.arange(len(index)) if arguments.wnid is None else index.class_rows(arguments.wnid)
    if arguments.split is not None:
        rows = index.split_rows(arguments.split)
        ids = ids[(ids >= rows.start) & (ids < rows.stop)]
    if arguments.odd:
        ids = ids[index.samples["reason"][ids] != 0]
    for id in ids.tolist():
        row = index.samples[id]
        archive = index.archives[row["archive"]]
        split, label = index.split_names[row["split"]], int(row["label"])
        wnid = index.classes[label].wnid if label >= 0 else None
        name, reason = index.name(id), REASONS[row["reason"]]
        if not arguments.json:
            state = f"  {reason}{', excluded' if row['excluded'] else ''}" if reason else ""
            print(f"{id}  {split}  {_plain(wnid or '-')}  {row['width']}×{row['height']}  {row['size']}  {_plain(name)}{state}")
            continue
        print(json.dumps({
            "id": id, "split": split, "archive": str(archive.path), "member": name,
            "offset": 0 if archive.kind == "folder" else int(row["offset"]), "size": int(row["size"]), "label": label,
            "wnid": wnid, "width": int(row["width"]), "height": int(row["height"]),
            "crc32": int(row["crc32"]) if index.header["crc32"] else None, "format": FORMATS[row["format"]],
            "channels": int(row["channels"]), "reason": reason, "excluded": bool(row["excluded"])}))
    return 0


def cat(arguments: argparse.Namespace) -> int:
    data = _load(arguments).read(arguments.id)
    if sys.stdout.isatty():
        raise ValueError(f"stdout (=a terminal) cannot show an image; redirect it: cat INDEX {arguments.id} > x.jpg")
    sys.stdout.buffer.write(data)
    return 0


def _load(arguments: argparse.Namespace) -> "SampleIndex":
    from pipeline.index.sample_index import SampleIndex

    return SampleIndex.load(arguments.index, arguments.archives)


def _plain(text: Any) -> str:
    """Text from an archive, safe for a terminal: no control characters, no undecodable bytes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        code = {"build": build, "subset": subset, "info": info, "verify": verify, "ls": ls, "cat": cat}[arguments.verb](arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # ls | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {_plain(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
