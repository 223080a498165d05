"""Random numbers without state (counter-based): a function of seed, purpose and counters, never of what was drawn before.

The mixing function is the finaliser of SplitMix64 (Steele, Lea, Flood 2014), chained over the words of the key. `bits` and
`uniform` use integer arithmetic modulo 2^64 only, so they are the same on every machine and for every version of NumPy (whose
own generators may change their streams between releases, NEP 19). `normal` goes through log and cos, whose last bit may differ
between mathematical libraries.
"""
import enum

import numpy as np
import numpy.typing as npt

Words = int | npt.NDArray[np.integer]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Purpose(enum.IntEnum):
    """What a number is drawn for, so that no two uses share a stream."""
    ORDER = 1
    TOP = 2
    LEFT = 3
    MIRROR = 4
    LIGHTING = 5
    SUBSTITUTE = 6
    PACK = 7
    SHARD = 8
    WINDOW = 9
    HOLD_OUT = 10
    BOX_AREA = 11
    BOX_RATIO = 12


def _mix(word: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def bits(seed: int, purpose: Purpose, *key: Words) -> npt.NDArray[np.uint64]:
    """64 random bits for each key: integers, or integer arrays that broadcast, for example (epoch, ids)."""
    word: npt.NDArray[np.uint64] = np.asarray([int(seed) & 0xFFFFFFFFFFFFFFFF], np.uint64)
    for part in (int(purpose), *key):
        # A golden-ratio step before each word keeps (1, 0) and (0, 1) apart, and a zero key away from the fixed point 0.
        word = _mix((word + _GOLDEN) ^ _mix(np.atleast_1d(np.asarray(part)).astype(np.uint64) + _GOLDEN))
    return word


def uniform(seed: int, purpose: Purpose, *key: Words) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 53 random bits, one for each key."""
    return (bits(seed, purpose, *key) >> np.uint64(11)).astype(np.float64) * 2.0 ** -53


def normal(seed: int, purpose: Purpose, *key: Words) -> npt.NDArray[np.float64]:
    """Standard normal numbers, one for each key (Box–Muller, one of the pair)."""
    radius = np.sqrt(-2 * np.log1p(-uniform(seed, purpose, *key, 0)))
    drawn: npt.NDArray[np.float64] = radius * np.cos(2 * np.pi * uniform(seed, purpose, *key, 1))
    return drawn
