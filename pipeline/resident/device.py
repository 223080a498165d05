"""`DeviceNormalizer`: finished images of crops in a GPU's memory, in a Triton kernel where it can be built, else by torch."""
import logging
from collections.abc import Callable

import numpy as np
import torch

from pipeline.decoding.normalize import Finish, Normalizer
from pipeline.decoding.resize import resize_boxes
from pipeline.decoding.transfer import to_device
from pipeline.resident.store import Layout, Located
from pipeline.sampling.augment import Augmentation

_log = logging.getLogger(__name__)


class DeviceNormalizer:
    """What `Normalizer` is on a CPU, and its bits. `kernels`: auto takes Triton's on a GPU, where it works; torch never; triton
    always, also on a CPU, in its interpreter; but boxes, uint8 images and factors are torch's in any case. `crop_px`: side of the
    images, to which boxes of the layout's crops, whole squares, are resized; None: that of the crops, which are the images. The
    host waits for nothing here."""

    def __init__(self, layout: Layout, finish: Finish, device: torch.device, *, kernels: str = "auto",
                 crop_px: int | None = None) -> None:
        self._layout, self._device, self._finish, self._box_px = layout, device, finish, crop_px
        self._plain = Normalizer(crop_px or layout.crop_px, finish, threads=1, device=device)
        self._triton = (kernels == "triton" or kernels == "auto" and device.type == "cuda") and crop_px is None \
            and finish.factor is None and finish.output != "uint8"
        if self._triton:
            try:
                self._warm_up()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # Triton is missing, or what it compiles with is, or it does not know this GPU
                if kernels == "triton":
                    raise
                self._triton = False
                _log.warning("images in GPU memory are finished by torch, in several passes: Triton does not work (%s)", error)

    def _warm_up(self) -> None:
        """Compile the kernel. Raises what Triton raises."""
        row = torch.zeros(1, self._layout.row_bytes, dtype=torch.uint8, device=self._device)
        corner = np.zeros(1, np.int64)
        self.images(Located(self._layout.planes(row), corner, corner, corner), Augmentation.none(1))

    def begin(self, crops: Located, augmentation: Augmentation) -> Callable[[], torch.Tensor]:
        return lambda: self.images(crops, augmentation)

    def images(self, crops: Located, augmentation: Augmentation, out: torch.Tensor | None = None) -> torch.Tensor:
        """(B, 3, c, c): `out`, float32, bfloat16 or float16, of any strides, or new ones, as `Finish` says."""
        size = self._box_px or self._layout.crop_px
        if out is None:
            out = torch.empty(len(crops.rows), 3, size, size, device=self._device, dtype=self._finish.dtype,
                              memory_format=self._finish.memory_format)
        shift = np.ascontiguousarray(augmentation.shift.T)
        columns = [crops.rows, crops.top, crops.left, augmentation.mirror, *shift.view(np.int32)]
        table, = to_device(self._device, np.stack(columns, dtype=np.int32, casting="unsafe"))
        if self._triton:
            from pipeline.resident import kernels

            kernels.images(crops.planes, table, self._plain.mean, out, self._layout.square_px, centered=self._finish.centered)
            return out
        which, top, left, mirror = table[:4].long()
        pixels = self._layout.rgb(crops.planes, which, top, left)
        if self._box_px is not None:
            assert augmentation.box is not None
            top, left, sizes = to_device(self._device, augmentation.top, augmentation.left, augmentation.box)
            pixels = resize_boxes(pixels, top, left, sizes, self._box_px)
        return out.copy_(self._plain.whole(pixels, top, left, mirror == 1, table[4:].view(torch.float32).T))

    def close(self) -> None:
        self._plain.close()
