"""How sure a mean over images is: percentile bootstrap, exact, without resampling.

A bootstrap draws N of the N images with replacement and looks at the mean, many times. The sum of N such draws has a known
distribution: that of one image's value, convolved with itself N times, a power of its Fourier transform. So the limit of
infinitely many resamples is computed in milliseconds, and there is no seed. Differences between two networks are means too,
of each image's difference, so what both find hard does not widen them.
"""

from __future__ import annotations

import math

import numpy as np

LEVEL = 0.95
_SIZE = 1 << 17  # of the grid of sums
_FINE = 1 << 12  # steps of it in a standard deviation of the sum: it reaches 16 to either side


def interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Between which limits the mean of a resample of images lies in this share of cases.

    Args:
        values: (N,) of each image, N at least 1. Integers (errors, differences of errors) are treated exactly, others to about
            1/4096 of the standard error.
        level: share.
    """
    count, values = len(values), values.astype(np.float64)
    spread = float(values.std()) * math.sqrt(count)  # of the sum
    if spread == 0:
        return float(values[0]), float(values[0])
    whole = bool((values == np.rint(values)).all()) and spread < _FINE
    origin, step = (0.0, 1.0) if whole else (float(values.mean()), spread / _FINE)
    places = (values - origin) / step
    below = np.floor(places)
    share, cell = places - below, below.astype(np.int64)  # a value between two points is divided, which keeps the mean
    one = np.bincount(cell % _SIZE, 1 - share, _SIZE) + np.bincount((cell + 1) % _SIZE, share, _SIZE)
    total = np.fft.irfft(np.fft.rfft(one / count) ** count, _SIZE)  # of sums, modulo the grid
    first = round(float(places.sum())) - _SIZE // 2
    reached = np.cumsum(np.roll(total, -(first % _SIZE)))
    low, high = (first + int(np.searchsorted(reached, tail)) for tail in ((1 - level) / 2, (1 + level) / 2))
    return origin + step * low / count, origin + step * high / count
