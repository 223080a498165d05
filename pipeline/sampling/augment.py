"""Random augmentation: random crop, horizontal flip (mirror) and PCA colour jitter (lighting) of an image (paper §4.1), and the
boxes of torchvision's RandomResizedCrop. Each is a function of (seed, epoch, id) without state, so it does not depend on ranks,
threads or prefetch depth. B samples; all pairs are (rows, columns)."""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.rng import Purpose, normal, uniform

Rows = slice | list[int]
Pairs = npt.NDArray[np.int64]
_TRIES = 10  # for a box that lies in the region


@dataclass(frozen=True)
class Augmentation:
    """How B images are augmented."""
    top: npt.NDArray[np.int64]  # (B,) offset of the crop in its region, pixels of the resized image; of a box see `CropPlanner`
    left: npt.NDArray[np.int64]  # (B,)
    mirror: npt.NDArray[np.bool_]  # (B,) flip horizontally
    alphas: npt.NDArray[np.float64]  # (B, 3) the α of paper §4.1, already times their standard deviation
    shift: npt.NDArray[np.float32]  # (B, 3) added to every pixel: the colour jitter, less a channel mean; grey levels
    box: Pairs | None = None  # (B, 2) size of the box that is resized to the crop; None: of the crop itself, which is not

    @classmethod
    def none(cls, count: int, channel_mean: npt.NDArray[np.float32] | None = None) -> "Augmentation":
        """That of images that stay as they are, but for a (3,) channel mean that is subtracted."""
        zeros, shift = np.zeros(count, np.int64), np.zeros((count, 3), np.float32)
        if channel_mean is not None:
            shift -= channel_mean
        return cls(zeros, zeros, np.zeros(count, bool), np.zeros((count, 3)), shift)

    def rows(self, rows: Rows) -> "Augmentation":
        return Augmentation(self.top[rows], self.left[rows], self.mirror[rows], self.alphas[rows], self.shift[rows],
                            None if self.box is None else self.box[rows])


def augment(seed: int, epochs: npt.NDArray[np.int64], ids: npt.NDArray[np.int64], rooms: npt.NDArray[np.int64], *,
            mirror: bool, lighting: float, lighting_epochs: int = 0) -> Augmentation:
    """Crop positions, flips and alphas of samples `ids` in `epochs`, both (B,); `shift` is left at zero, see `lighting_shift`.
    Offsets are uniform on 0…room, both ends included; `rooms` (B, 2): largest offset (rows, columns) at which the crop still
    lies in its region. `mirror`: False flips no image, True half of them. `lighting`: standard deviation of the alphas; zeros
    too in epochs from `lighting_epochs` on (0: in none)."""
    top = uniform(seed, Purpose.TOP, epochs, ids) * (rooms[:, 0] + 1)
    left = uniform(seed, Purpose.LEFT, epochs, ids) * (rooms[:, 1] + 1)
    flips = uniform(seed, Purpose.MIRROR, epochs, ids) < (0.5 if mirror else 0.0)
    alphas = np.zeros((len(ids), 3))
    if lighting:
        alphas = lighting * np.stack([normal(seed, Purpose.LIGHTING, epochs, ids, axis) for axis in range(3)], axis=1)
        if lighting_epochs:
            alphas[epochs >= lighting_epochs] = 0
    return Augmentation(top.astype(np.int64), left.astype(np.int64), flips, alphas, np.zeros((len(ids), 3), np.float32))


def random_boxes(seed: int, epochs: npt.NDArray[np.int64], ids: npt.NDArray[np.int64], extents: Pairs, scale: Sequence[float],
                 ratio: Sequence[float]) -> tuple[Pairs, npt.NDArray[np.bool_]]:
    """Sizes (B, 2) of the boxes of torchvision's RandomResizedCrop in regions of sizes `extents` (B, 2). A box covers a share of
    its region that is uniform on `scale`, and the logarithm of its width over its height is uniform on those of `ratio`; the
    first of ten that lies in the region is taken. Where none does it is the largest central one of an allowed ratio: (B,) bool
    says which must lie in the middle."""
    sizes, waiting = np.zeros_like(extents), np.arange(len(ids))
    low, high = np.log(ratio)
    for attempt in range(_TRIES):
        key, limits = (epochs[waiting], ids[waiting], attempt), extents[waiting]
        area = limits.prod(axis=1) * (scale[0] + (scale[1] - scale[0]) * uniform(seed, Purpose.BOX_AREA, *key))
        shape = np.exp(low + (high - low) * uniform(seed, Purpose.BOX_RATIO, *key))
        found = np.rint(np.sqrt(np.stack([area / shape, area * shape], axis=1))).astype(np.int64)
        fits = ((found > 0) & (found <= limits)).all(axis=1)
        sizes[waiting[fits]], waiting = found[fits], waiting[~fits]
    central = np.zeros(len(ids), bool)
    central[waiting] = True
    height, width = extents[waiting].T
    narrowed = np.stack([np.minimum(height, np.rint(width / ratio[0])), np.minimum(width, np.rint(height * ratio[1]))], axis=1)
    sizes[waiting] = np.maximum(narrowed, 1).astype(np.int64)
    return sizes, central


def lighting_shift(alphas: npt.NDArray[np.float64], eigenvalues: npt.NDArray[np.float64],
                   eigenvectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """What PCA colour jitter adds to every pixel: Σ_i v_i·α_i·√λ_i, (B, 3) float32 grey levels. `alphas` (B, 3); `eigenvalues`
    (3,) of the RGB covariance of the training set, grey levels squared; column i of `eigenvectors` (3, 3) belongs to
    eigenvalue i, rows are R, G, B. The paper writes λ_i; its authors' code multiplies by the standard deviation √λ_i, and with
    pixels of 0–255 only that leaves an image (the authors' 2012 release differs from paper §4.1 here)."""
    return ((alphas * np.sqrt(eigenvalues)) @ eigenvectors.T).astype(np.float32)
