"""The command `alexnet`, one verb for each thing to do. Each is a module of its own, which `python -m` runs as well."""
import sys
from pathlib import Path

if not __package__:  # run as a file, as `command` below does: from any folder, beside whatever packages lie there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train.exit_codes import exit_code, run_command, start_command  # noqa: E402

if __name__ == "__main__":
    start_command(decodes=True)

import importlib
import importlib.metadata
import os
import shlex
import shutil
from collections.abc import Sequence
from typing import NoReturn

from train.cli import Parser, nearest  # noqa: E402

VERBS = {  # verb → its module, what it does
    "demo": ("tools.demo.__main__", "all of it: generate images, index them, train, test"),
    "doctor": ("tools.doctor", "what this machine has, what is missing, and what to do"),
    "index": ("tools.build_index", "index images in place; look into an index, check it, derive another"),
    "stats": ("tools.compute_stats", "mean image and colour components of an index"),
    "pack": ("tools.pack_shards", "pack an index into shuffled shards of small JPEGs"),
    "train": ("train.main", "train as a recipe says, or resume"),
    "eval": ("train.evaluate.__main__", "test networks with 1 or 10 crops, alone and as an ensemble"),
    "report": ("train.report.__main__", "an HTML page about runs"),
    "export": ("train.export.__main__", "publish a network: safetensors, model card, ONNX"),
    "show": ("tools.show.__main__", "pictures: crops, filters, top-5 answers, nearest neighbours"),
    "profile": ("tools.profile_pipeline", "what limits the data loader, and what would lift it"),
    "bench": ("tools.bench.__main__", "the loader beside other people's, on the same work"),
    "study": ("tools.run_study", "the runs of a study, several at once"),
}


def command(verb: str, *words: str | Path) -> list[str]:
    """The command line that runs a verb in a process of its own, from any folder, installed or not."""
    return [sys.executable, str(Path(__file__).resolve()), verb, *map(str, words)]


def typed(verb: str, *words: str | Path) -> str:
    """The command line of a verb as a user can type it here, outside the environment too."""
    script, found = Path(sys.executable).parent / "alexnet", shutil.which("alexnet")
    if found and Path(found).parent.resolve() == script.parent.resolve():
        program = ["alexnet"]
    else:
        program = [os.path.relpath(script)] if script.is_file() else [sys.executable, os.path.relpath(__file__)]
    return shlex.join([*program, verb, *map(str, words)])


def top() -> Parser:
    """The command line of `alexnet` itself."""
    verbs = "\n".join(f"  {verb:9} {what}" for verb, (_, what) in VERBS.items())
    found = Parser(prog="alexnet", usage="alexnet VERB …",
                   description=f"Train AlexNet (2012), from the archives to a report.\n\n{verbs}",
                   example="  alexnet demo\n  alexnet index build classes photos -o photos.index\n"
                   "  alexnet train demo --train.epochs=3\n  alexnet eval runs/demo\n\n"
                   "alexnet VERB --help says more. Exit codes: 0 done, 1 a check failed,\n"
                   "2 a mistake, 3 diverged, 4 the machine failed, 75 stopped and saved,\n130 interrupted.")
    found.add_argument("--version", action="store_true", help="the version of this program")
    return found


def main(argv: Sequence[str]) -> int:
    """Run `alexnet …`; returns its exit code."""
    verb, rest = (argv[0], list(argv[1:])) if argv else ("--help", [])
    if verb == "help":
        verb, rest = (rest[0], ["--help"]) if rest else ("--help", [])
    if verb in VERBS:
        return int(importlib.import_module(VERBS[verb][0]).main(rest, f"alexnet {verb}") or 0)

    def work() -> None:
        if not verb.startswith("-"):
            raise ValueError(f"verb (={verb}) is none; {nearest(verb, VERBS) or 'give one of ' + ', '.join(VERBS)}")
        if top().parse_args([verb, *rest]).version:
            print(f"alexnet {importlib.metadata.version('alexnet-dali')}")
    return exit_code(work, "close other programs")


def script() -> NoReturn:
    """The console script."""
    start_command(decodes=True)
    run_command(main)


if __name__ == "__main__":
    run_command(main)
