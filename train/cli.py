"""Command lines of one kind: how --help looks, what the shared options mean, and mistakes in one line.

RECIPE, INDEX and RUN are positional; `-o/--out` is where a command writes; `--json [FILE]` gives its figures, on stdout without a
FILE; `--which`, `--device` and `--jobs` mean the same everywhere. Imports nothing heavy.
"""
import argparse
import difflib
import itertools
import json
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pipeline.files import write_json

WHICH = "last"  # of a run's checkpoints, unless --which says another
DEVICES = "auto, cpu, cuda or cuda:N"
_KINDS = {"int": "a whole number", "float": "a number"}


class _Formatter(argparse.HelpFormatter):
    """Paragraphs, indented lines as they are written, and "(default: X)" behind the help of each option that has a default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=max(60, min(shutil.get_terminal_size().columns - 2, 110)))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        groups = itertools.groupby(text.splitlines(), lambda line: not line or line.startswith(" "))
        return "\n".join("\n".join(lines) if as_it_is else textwrap.fill(" ".join(lines), width) for as_it_is, lines in groups)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_it = action.default in (None, False, [], argparse.SUPPRESS) or "(default:" in (action.help or "")
        return action.help if says_it else f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose --help ends with an example, and that raises ValueError for a mistake: parse within `exit_code`.

    `former`: options that were renamed, with their names now, or "" for those that have become positional; still taken.
    `hint`: what is said besides of a choice that is none.
    """

    def __init__(self, *, example: str = "", former: Mapping[str, str] | None = None, hint: str = "", **options: Any) -> None:
        if example:
            options["epilog"] = f"examples:\n{example}" if "\n" in example else f"example:\n  {example}"
        super().__init__(**{"formatter_class": _Formatter, "allow_abbrev": False, **options})
        self._former = former or {}
        self._hint = hint

    def parse_known_args(self, args: Sequence[str] | None = None,  # type: ignore[override]
                         namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        return super().parse_known_args(self._renamed(sys.argv[1:] if args is None else list(args)), namespace)

    def parse_settings(self, words: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
        """The options, and the words that set values of a recipe: --group.key=value, or --group.key value."""
        joined: list[str] = []
        for word in sys.argv[1:] if words is None else words:
            if joined and re.fullmatch(r"--\w+(\.\w+)+", joined[-1]):
                joined[-1] += f"={word}"
            else:
                joined.append(word)
        args, settings = self.parse_known_intermixed_args(joined)
        for word in settings:
            if not re.match(r"--\w+\.", word):
                self.error(f"unrecognized arguments: {word}")
        return args, settings

    def _renamed(self, words: list[str]) -> list[str]:
        """The words with today's names for former ones; and --json before a word that is no file's name has none."""
        found: list[str] = []
        for number, word in enumerate(words):
            if word == "--":
                return found + words[number:]
            name, equals, value = word.partition("=")
            if name in self._former:
                name = self._former[name]
                found += [f"{name}={value}" if equals and name else name or value] if name or equals else []
            elif word == "--json" and not re.fullmatch(r"-|.*\.jsonl?", "".join(words[number + 1:number + 2])):
                found.append("--json=-")
            else:
                found.append(word)
        return found

    def error(self, message: str) -> NoReturn:
        raise ValueError(self._in_words(message))

    def _in_words(self, message: str) -> str:
        """What argparse says, as this program says it."""
        see = f"see {self.prog} --help"
        if found := re.fullmatch(r"unrecognized arguments: (.*)", message, re.DOTALL):
            word = (found[1].split() or [found[1]])[0]  # of white space alone
            name, _, value = word.partition("=")
            if not word.startswith("-"):
                return f"argument (={word}) is one too many; {see}"
            near = nearest(name, [option for action in self._actions for option in action.option_strings])
            return f"{name} (={value or 'none'}) is no option; {near or see}"
        if found := re.fullmatch(r"the following arguments are required: (.*)", message):
            return f"{found[1]} (=none) must be given; {see}"
        if found := re.fullmatch(r"argument (.*?): invalid (?:choice|(\w+) value): '?(.*?)'?(?: \(choose from (.*)\))?", message,
                                 re.DOTALL):
            name, kind, value, choices = found.groups()
            known = (choices or "").replace("'", "").split(", ")
            rule = f"must be one of {', '.join(known)}" if choices else f"must be {_KINDS.get(kind, kind)}"
            return f"{name} (={value}) {rule}; {choices and nearest(value, known) or 'correct it'}{choices and self._hint}"
        if found := re.fullmatch(r"argument (.*?): (expected .*)", message):
            return f"{found[1]} (=none) must have a value ({found[2]}); {see}"
        message = message.removeprefix("argument ").replace(": (=", " (=")
        return message if "; " in message else f"{message}; {see}"

    def add_out(self, help: str, metavar: str = "FOLDER", **options: Any) -> None:
        """`-o/--out`: where the command writes."""
        self.add_argument("-o", "--out", type=Path, metavar=metavar, help=help, **options)

    def add_json(self, help: str = "the figures as JSON, to FILE.json or, without it, to stdout") -> None:
        """`--json [FILE]`, for `put_json`."""
        self.add_argument("--json", nargs="?", const=Path("-"), type=Path, metavar="FILE", help=help)

    def add_which(self) -> None:
        """`--which`: of a run's checkpoints."""
        self.add_argument("--which", choices=("best", "last"),
                          help=f"of a run's checkpoints: the best validated or the newest (default: {WHICH})")

    def add_device(self, help: str = "where to compute", default: str = "the recipe's") -> None:
        """`--device auto|cpu|cuda[:N]`; None where it is not given."""
        self.add_argument("--device", type=device, metavar="auto|cpu|cuda[:N]", help=f"{help} (default: {default})")

    def add_jobs(self, help: str = "processes", default: str = "one a core") -> None:
        """`--jobs`; 0 where it is not given."""
        self.add_argument("--jobs", type=at_least(0), default=0, metavar="N", help=f"{help} (default: {default})")

    def add_archives(self) -> None:
        """`--archives`: where they lie now."""
        self.add_argument("--archives", type=Path, metavar="FOLDER", help="folder to find archives in that have moved")


def gpu(device: str) -> int | None:
    """The number of the GPU that `--device` means, None for the CPU. Raises ValueError when there is none."""
    if device == "cpu":
        return None
    import torch

    number, count = int(device.partition(":")[2] or 0), torch.cuda.device_count()
    if number < count:
        return number
    if device == "auto":
        return None
    raise ValueError(f"--device (={device}) needs GPU {number}, but {visible_gpus()}; use --device=cpu")


def visible_gpus() -> str:
    """How many GPUs torch sees, and whether it is the kind that sees any."""
    import torch

    count = torch.cuda.device_count()
    build = f"torch {torch.__version__} is " + (f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build")
    return f"{count} are visible" if count else f"no CUDA GPU is visible ({build})"


def at_least(low: int) -> Callable[[str], int]:
    """The type of an option that is a whole number of at least `low`."""
    def whole(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"(={text}) must be a whole number; correct it") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"(={text}) must be at least {low}; correct it")
        return value
    return whole


def share(text: str) -> float:
    """The type of an option between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"(={text}) must be a share between 0 and 1; correct it")
    return value


def positive(text: str) -> float:
    """The type of an option that is a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"(={text}) must be a number above 0; correct it")
    return value


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean …?` with the known name (keys with dots) most like `name`; empty when none is."""
    known = list(known)
    last = name.rpartition(".")[2].lstrip("-")
    alike = {key: difflib.SequenceMatcher(None, key.rpartition(".")[2].lstrip("-"), last).ratio() for key in known}
    same = sorted((key for key in known if alike[key] >= 0.8), key=lambda key: (key.count("."), -alike[key]))  # of another group
    found = difflib.get_close_matches(name, known, 1, cutoff=0.9) or same or difflib.get_close_matches(name, known, 1, cutoff=0.5)
    return f"did you mean {found[0]}?" if found else ""


def check_runs(paths: Iterable[Path]) -> None:
    """Raise ValueError for a RUN of a command line that does not exist, before torch is imported to look into it."""
    for path in paths:
        if not path.exists():
            near = Path("runs") / path.name
            beside = {other.name: other for other in path.parent.glob("*/")}
            alike = [near] if near.is_dir() else [beside[name] for name in difflib.get_close_matches(path.name, beside, 1)]
            remedy = f"did you mean {alike[0]}?" if alike else "give a run folder, such as runs/demo"
            raise ValueError(f"RUN (={path}) does not exist; {remedy}")


def device(text: str) -> str:
    """auto, cpu, cuda or cuda:N, of a command line; a bare number is that GPU's."""
    text = f"cuda:{text}" if text.isdecimal() else text
    if not is_device(text):
        raise argparse.ArgumentTypeError(f"(={text}) must be {DEVICES}; correct it")
    return text


def is_device(text: str) -> bool:
    """Whether a text is one of `DEVICES`."""
    return re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", text) is not None


def put_json(where: Path | None, value: Any) -> bool:
    """Write what `--json` asks for; returns whether that went to stdout, where then nothing else belongs."""
    if where is None:
        return False
    if str(where) == "-":
        print(json.dumps(value, indent=1, allow_nan=False))
        return True
    where.parent.mkdir(parents=True, exist_ok=True)
    write_json(where, value)
    return False
