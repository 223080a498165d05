"""Dropout masks as a function of (seed, step, layer, row of the global batch, neuron) (paper §4.2).

Every entry is a hash of its own coordinates. So a mask is the same on a CPU and on a GPU, in one process and in two, after a
resume, and however the batch is cut; a process computes only the rows and the neurons it holds; there is no generator state to
save. Seed, step and layer enter as four words, which may lie on the network's device: then nothing of a mask comes from the host,
and a captured CUDA graph draws the masks of another step when the words are replaced. Inverted dropout: what is kept is divided
by the probability of keeping, so testing needs no factor. B rows and N neurons held by this process."""
import hashlib
import importlib

import torch
from torch.nn import functional

from model.config import Kernels
from model.kernels import takes_triton


def _hash32(x: torch.Tensor) -> torch.Tensor:
    """Mix int32 entries in place (Wellons' lowbias32): every input bit changes about half of the output bits."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32)), (16, 0)):
        # >> keeps the sign of an int32: the mask makes it the logical shift the hash is defined with.
        x ^= (x >> shift).bitwise_and_((1 << (32 - shift)) - 1)
        if factor:
            x *= factor
    return x


def dropout_words(seed: int, step: int, layer: str) -> list[int]:
    """The words that a layer's mask is hashed from, four int32: two for its rows, two for its columns."""
    words = []
    for axis in ("row", "column"):
        digest = hashlib.sha256(f"dropout/{seed}/{step}/{layer}/{axis}".encode()).digest()
        words += [int.from_bytes(digest[i:i + 4], "little", signed=True) for i in (0, 4)]
    return words


def _keys(words: torch.Tensor, start: int, count: int, device: torch.device) -> torch.Tensor:
    """Random int32 keys of positions start..start+count of one axis of the mask, given its two words. Hashed where the words
    lie: from the CPU some thousand numbers travel to a GPU sooner than it is told of 26 operations on them."""
    first, second = words.unbind()
    keys = torch.arange(start, start + count, dtype=torch.int32, device=words.device)
    return _hash32(_hash32(keys ^ first) ^ second).to(device, non_blocking=True)


def threshold(p: float) -> int:
    """The least int32 drawn that keeps its neuron: a share p of all lies below."""
    return min(round(p * 2**32) - 2**31, 2**31 - 1)


def keep_mask(p: float, words: torch.Tensor, *, rows: tuple[int, int], columns: tuple[int, int],
              device: torch.device) -> torch.Tensor:
    """Which neurons stay: (B, N) bool, each True with probability 1 - p. `words`: (4,) int32, see `dropout_words`. `rows` and
    `columns` are [start, stop)."""
    row_keys = _keys(words[:2], rows[0], rows[1] - rows[0], device)
    column_keys = _keys(words[2:], columns[0], columns[1] - columns[0], device)
    drawn = _hash32(row_keys[:, None] ^ column_keys[None, :])  # uniform over -2^31 .. 2^31 - 1
    return drawn >= threshold(p)


def dropout(x: torch.Tensor, p: float, words: torch.Tensor, *, first_row: int, first_column: int, relu: bool = False,
            kernels: Kernels = "auto") -> torch.Tensor:
    """Inverted dropout of (B, N): zero with probability p, else divided by 1 - p. Same dtype as x. `words`: (4,) int32, on the
    CPU or on the device of x. With `relu` x passes through max(x, 0) first, which may be done in x itself. `kernels`: see
    model/kernels."""
    if relu and takes_triton(kernels, x.device):
        module = importlib.import_module("model.kernels.dropout")
        if module.takes(x, p):
            result: torch.Tensor = module.ReluDropout.apply(x, p, words.to(x.device, non_blocking=True), first_row, first_column)
            return result
    if relu:
        x = functional.relu(x, inplace=True)
    if p == 0.0:
        return x
    keep = keep_mask(p, words, rows=(first_row, first_row + x.shape[0]), columns=(first_column, first_column + x.shape[1]),
                     device=x.device)
    return x * keep.to(x.dtype).mul_(1.0 / (1.0 - p))
