"""YAML as recipes and studies are written: what YAML 1.2 says a text means, read strictly and at once whatever it holds, with the
line of each key.

PyYAML reads YAML 1.1: there 010 is 8, 1:30 is 90, `no` is false, 5e-4 is a string, and of two equal keys the last one counts.
Aliases are refused: a few lines of them stand for billions of values, and a recipe extends another.
"""
import re
from typing import Any

import yaml

MOST_BYTES, MOST_VALUES, MOST_DEPTH, MOST_DIGITS = 1 << 20, 10_000, 50, 300  # of a float
Lines = dict[tuple[str, ...], int]  # keys from the outermost one inwards → line, from 1
_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, ten times faster, where it is installed
_NUMBERS = list("-+0123456789.")
_PLAIN: dict[str, tuple[re.Pattern[str], list[str]]] = {  # kind of a plain scalar → what it looks like, and how that begins
    "null": (re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    "int": (re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), _NUMBERS),
    "float": (re.compile(r"(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
                         r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"), _NUMBERS)}
_TAGS = {f"tag:yaml.org,2002:{kind}": kind for kind in (*_PLAIN, "str", "map", "seq")}


class Dumper(yaml.SafeDumper):
    """Writes text that YAML 1.1 and 1.2 read alike."""
    yaml_implicit_resolvers = {first: list(entries) for first, entries in yaml.SafeDumper.yaml_implicit_resolvers.items()}


for _kind, (_pattern, _first) in _PLAIN.items():
    Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _pattern, _first)


def load_yaml(text: str) -> Any:
    """Plain values of a YAML text. Raises ValueError, on one line."""
    return read_yaml(text)[0]


def read_yaml(text: str) -> tuple[Any, Lines]:
    """Plain values of a YAML text, and the line of each key. Raises ValueError, on one line."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"{len(text):,} characters are more than the {MOST_BYTES:,} that are read")
    try:
        reader = _Reader(text, _PARSER)
        return reader.document(), reader.lines
    except yaml.MarkedYAMLError as error:
        reason = " ".join(f"{problem} (line {mark.line + 1})" for problem, mark in (
            (error.context, error.context_mark), (error.problem, error.problem_mark)) if problem and mark)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
    try:  # libyaml does not take the escapes of undecodable bytes, as a path may have them
        if "escape code" in reason:
            reader = _Reader(text, yaml.SafeLoader)
            return reader.document(), reader.lines
    except yaml.YAMLError:
        pass
    raise ValueError(reason)


class _Reader:
    """Makes values of a parser's events: composing nodes, as PyYAML would, overflows the stack on deep nesting."""

    def __init__(self, text: str, parser: Any) -> None:
        self.lines: Lines = {}
        self._events: Any = yaml.parse(text, Loader=parser)
        self._values = 0

    def document(self) -> Any:
        """The value of the only document; None of an empty text."""
        value, documents = None, 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                value, documents = self._value(next(self._events), ()), documents + 1
        if documents > 1:
            raise ValueError(f"{documents} documents (---) are more than one; keep one")
        return value

    def _value(self, event: Any, keys: tuple[str, ...], depth: int = 0) -> Any:
        line = event.start_mark.line + 1
        self._values += 1
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"the alias *{event.anchor} (line {line}) is not read; write its value out, or use extends")
        if self._values > MOST_VALUES:
            raise ValueError(f"line {line} makes it more than {MOST_VALUES:,} values")
        if depth > MOST_DEPTH:
            raise ValueError(f"line {line} is nested more than {MOST_DEPTH} deep")
        if event.tag is not None and event.tag not in _TAGS:
            raise ValueError(f"line {line} has a tag, {event.tag}, which is not read")
        if isinstance(event, yaml.ScalarEvent):
            return _scalar(event, line)
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(keys, depth)
        value = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            value.append(self._value(event, keys, depth + 1))
        return value

    def _mapping(self, keys: tuple[str, ...], depth: int) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            line = event.start_mark.line + 1
            if not isinstance(event, yaml.ScalarEvent):
                raise ValueError(f"the key in line {line} is a list, mapping or alias; a key is a word")
            key = _scalar(event, line)
            if key == "<<":
                raise ValueError(f"key '<<' (line {line}) is not part of YAML 1.2; write the keys out, or use extends")
            if key in found:
                raise ValueError(f"key {key!r} (line {line}) is given twice; keep one")
            self.lines[*keys, str(key)] = line
            found[key] = self._value(next(self._events), (*keys, str(key)), depth + 1)
        return found


def _scalar(event: Any, line: int) -> Any:
    text, kind = event.value, _TAGS.get(event.tag, "str")
    if event.implicit[0]:  # plain, without a tag
        kind = next((kind for kind, (pattern, _) in _PLAIN.items() if pattern.match(text)), "str")
    elif kind in _PLAIN and not _PLAIN[kind][0].match(text):
        raise ValueError(f"{text!r} (line {line}) is no {kind}")
    if kind in ("str", "null"):
        return text if kind == "str" else None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        if len(text) > MOST_DIGITS:
            raise ValueError(f"the number in line {line} has more than {MOST_DIGITS} digits")
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    return float(re.sub(r"\.(inf|nan)$", r"\1", text, flags=re.IGNORECASE))
