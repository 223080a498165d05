"""NumPy arrays read back from files that anybody may have written."""
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.io_errors import reading


def read_array(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """An .npy file as a read-only memory map. Raises OSError, which names it, and ValueError when it is no array, or another one
    than that of `dtype` and `shape`, of which -1 may be any: a predicate like that of `files.difference`."""
    with reading(path):
        try:
            found = np.load(path, mmap_mode="r" if math.prod(shape) else None, allow_pickle=False)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # NumPy evaluates its header as a Python literal, and may be given a zip
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"is no array ({'it is a pickle' if 'pickle' in reason else reason})") from None
    if not isinstance(found, np.ndarray):
        raise ValueError("holds several arrays, not one")
    fits = found.ndim == len(shape) and all(wanted in (-1, given) for given, wanted in zip(found.shape, shape))
    if found.dtype != dtype or not fits:
        raise ValueError(f"holds {found.shape} {found.dtype}, not {shape} {np.dtype(dtype)}")
    return found
