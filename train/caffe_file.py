"""Reads .npy files that hold a pickled dict of layers, without running a line of what stands in them.

Such a file is a program: `np.load(…, allow_pickle=True)` calls whatever it names. Here the only names it may use are those that
NumPy itself writes for an array, and even these are not NumPy's but the small stand-ins below, which look at what they are given
and keep it. What comes out are dicts, lists, strings, numbers and arrays of numbers.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import warnings
from pathlib import Path
from typing import Any, BinaryIO, Callable

import numpy as np

_NUMBERS = re.compile(r"[<>=|]?[fiu][1248]")
_MOST = 10_000  # values in a file; one that contains itself has no end


class _DType:
    """What a pickle says of an array's type."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = str(code), "="

    def __setstate__(self, state: Any) -> None:
        self.order = str(state[1])

    def numbers(self) -> np.dtype[Any]:
        """The type, of numbers only."""
        if not _NUMBERS.fullmatch(self.code):
            raise pickle.UnpicklingError(f"an array of {self.code!r}")
        return np.dtype((self.order if self.order in "<>" else "=") + self.code.lstrip("<>=|"))


class _Array:
    """What a pickle says of an array, kept until all of it is read."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def value(self) -> Any:
        """The array; of an array of objects the list of them."""
        try:
            _, shape, dtype, fortran, data = self.state
            if isinstance(data, list):
                return data
            return _numbers(data, dtype, shape, "F" if fortran else "C")
        except (TypeError, ValueError, AttributeError) as error:
            raise pickle.UnpicklingError(f"an array that is none ({error})") from None


class _Flat(_Array):
    """The same, as protocol 5 writes it."""

    def __init__(self, data: Any = b"", dtype: Any = None, shape: Any = (), order: Any = "C") -> None:
        self.state = data, dtype, shape, order

    def value(self) -> Any:
        try:
            data, dtype, shape, order = self.state
            return _numbers(data, dtype, shape, "F" if order == "F" else "C")
        except (TypeError, ValueError, AttributeError) as error:
            raise pickle.UnpicklingError(f"an array that is none ({error})") from None


def _numbers(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    raw = data.encode("latin1") if isinstance(data, str) else bytes(data)  # Python 2 wrote bytes as a string
    found: np.ndarray = np.frombuffer(raw, dtype.numbers()).reshape(tuple(int(size) for size in shape), order=order)
    return found


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """`_codecs.encode`, with which protocol 2 writes bytes."""
    if encoding != "latin1" or not isinstance(text, str):
        raise pickle.UnpicklingError(f"bytes in {encoding!r}")
    return text.encode("latin1")


_CORE = ("numpy.core", "numpy._core")  # before and since NumPy 2
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array, ("numpy", "dtype"): _DType, ("_codecs", "encode"): _encode,
    **{(f"{core}.{module}", "_reconstruct"): _Array for core in _CORE for module in ("multiarray", "_multiarray_umath")},
    **{(f"{core}.numeric", "_frombuffer"): _Flat for core in _CORE}}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name}, which is no array")
        return _ALLOWED[module, name]


def read_npy(path: Path) -> Any:
    """The object in a .npy file.

    Raises:
        ValueError: it is no .npy file, holds an array of numbers, or more than dicts, lists, strings, numbers and arrays of them.
    """
    with path.open("rb") as file:
        _read_header(file, path)
        held = io.BytesIO(file.read())  # a file would make room for whatever length is asked of it
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd escapes in text
            for opcode, argument, _ in pickletools.genops(held):  # also compares all lengths with what is there
                if opcode.name.endswith("PUT") and int(argument or 0) > _MOST:  # the unpickler would make a table of this length
                    raise pickle.UnpicklingError(f"a place {argument} for one of its values")
            held.seek(0)
            found = _plain(_Unpickler(held, encoding="latin1").load(), [_MOST])
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError, OverflowError,
            RecursionError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"weights (={path}) are no dict of layers: {said}; nothing of the file was run, give one that holds "
                         "dicts, lists, strings and arrays of numbers only") from None
    while isinstance(found, list) and len(found) == 1:  # the array of one object that NumPy puts around a dict
        found = found[0]
    return found


def _read_header(file: BinaryIO, path: Path) -> None:
    """Pass over the header of a .npy file, which must be that of an array of objects. (NumPy's own reader has errors of its own
    for each way in which a header can be broken.)"""
    start = file.read(8)
    length = int.from_bytes(file.read(2 if start[6:7] == b"\1" else 4), "little")
    header = file.read(min(length, _MOST))
    if start[:6] != b"\x93NUMPY" or len(header) < length:
        raise ValueError(f"weights (={path}) are no .npy file; give one that holds a dict of layers")
    if not re.search(rb"'descr': *'[|]O'", header):
        raise ValueError(f"weights (={path}) hold an array of numbers, not a dict of layers; give a file that does")


def _plain(value: Any, left: list[int]) -> Any:
    """The same without stand-ins; `left` counts down."""
    left[0] -= 1
    if left[0] < 0:
        raise pickle.UnpicklingError(f"more than {_MOST} values")
    if isinstance(value, _Array):
        return _plain(value.value(), left)
    if isinstance(value, dict):
        return {_plain(key, left): _plain(entry, left) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, left) for entry in value]
    if isinstance(value, bytes):
        return value.decode("latin1")
    if value is None or isinstance(value, (str, bool, int, float, np.ndarray)):
        return value
    raise pickle.UnpicklingError(f"a {type(value).__name__}")
