"""Images of a device: Triton's kernel (in its interpreter where there is no GPU) and torch's path against `Normalizer`."""
import numpy as np
import pytest
import torch

from pipeline.decoding.normalize import Finish, Normalizer
from pipeline.resident.device import DeviceNormalizer
from pipeline.resident.store import Layout, Located, Planes
from pipeline.sampling.augment import Augmentation
from tests.helpers.kernels import DEVICE, rounding  # noqa: F401 (a fixture)

ROWS = 3


def crops_of(layout: Layout, packed: bool) -> tuple[Located, Augmentation, list[torch.Tensor]]:
    """Crops of noise in all corners and at odd and even places, some flipped; and the same cut one by one on the CPU."""
    random, room = np.random.default_rng(layout.crop_px), layout.square_px - layout.crop_px
    squares = random.integers(0, 256, (ROWS, layout.square_px, layout.square_px, 3)).astype(np.uint8)
    rows = layout.encode_all(torch.from_numpy(squares))
    places = [(0, 0), (0, room), (room, 0), (room, room), (room // 2, (room + 1) // 2), *random.integers(0, room + 1, (1, 2))]
    top, left = np.array(places, np.int64).T
    which, count = random.integers(0, ROWS, len(places)), len(places)
    alone = [torch.from_numpy(layout.crop(rows[row].numpy(), down, right).copy())
             for row, down, right in zip(which.tolist(), top.tolist(), left.tolist(), strict=True)]
    augmentation = Augmentation(top, left, np.arange(count) % 2 == 1, np.zeros((count, 3)),
                                random.normal(0, 20, (count, 3)).astype(np.float32))
    planes = layout.planes(rows)
    if packed:
        order = random.permutation(count)
        planes = layout.packed_in(torch.zeros(count * layout.packed_bytes, dtype=torch.uint8), count)
        layout.pack(layout.planes(rows), planes, *(torch.from_numpy(column[order]) for column in (which, top, left)))
        which = np.argsort(order)
    there = Planes(*(plane if plane is None else plane.to(DEVICE) for plane in planes))
    return Located(there, which, top, left), augmentation, alone


@pytest.mark.parametrize("kind,square_px,crop_px,packed,mean", [
    ("rgb", 9, 6, False, "image"), ("rgb", 9, 6, True, "image_center"), ("rgb", 5, 5, False, "channel"),
    ("yuv420", 10, 7, False, "image"), ("yuv420", 10, 7, True, "image"), ("yuv420", 9, 4, False, "image_center"),
    ("yuv420", 9, 4, True, "channel"), ("yuv420", 8, 8, False, "channel"), ("yuv420", 21, 5, True, "image")])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_images_have_the_bits_of_the_cpu(kernels: str, packed: bool, kind: str, square_px: int, crop_px: int, mean: str) -> None:
    layout, centered = Layout(kind, square_px, crop_px), mean == "image_center"
    located, augmentation, alone = crops_of(layout, packed)
    image = np.random.default_rng(1).uniform(0, 255, (3, square_px, square_px)).astype(np.float32)
    subtracted = None if mean == "channel" else image
    finish = Finish(subtracted, centered)
    normalizer = Normalizer(crop_px, finish, threads=1)
    expected = normalizer.begin(alone, augmentation)()
    normalizer.close()
    device = DeviceNormalizer(layout, finish, DEVICE, kernels=kernels)
    assert torch.equal(device.begin(located, augmentation)().cpu(), expected)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("dtype,channels_last", [(torch.float32, True), (torch.bfloat16, True), (torch.float16, False)])
@pytest.mark.usefixtures("rounding")
def test_images_go_where_they_are_wanted(kernels: str, dtype: torch.dtype, channels_last: bool) -> None:
    layout = Layout("rgb", 9, 6)
    located, augmentation, _ = crops_of(layout, False)
    mean = np.random.default_rng(1).uniform(0, 255, (3, 9, 9)).astype(np.float32)
    expected = DeviceNormalizer(layout, Finish(mean), DEVICE, kernels="torch").images(located, augmentation)
    device = DeviceNormalizer(layout, Finish(mean, channels_last=channels_last), DEVICE, kernels=kernels)
    own = device.images(located, augmentation)
    assert own.dtype == torch.float32 and torch.equal(own, expected)
    assert own.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    out = torch.full((len(expected), 3, 6, 6), torch.nan, device=DEVICE).to(dtype)
    out = out.contiguous(memory_format=torch.channels_last) if channels_last else out
    assert device.images(located, augmentation, out) is out and torch.equal(out, expected.to(dtype))
