"""Dropout masks: uniform, independent, and a function of coordinates only."""
import hashlib

import pytest
import torch

from model.dropout import dropout, dropout_words, keep_mask

CPU = torch.device("cpu")


def words(seed: int = 1, step: int = 2, layer: str = "fc6") -> torch.Tensor:
    return torch.tensor(dropout_words(seed, step, layer), dtype=torch.int32)


def mask(p: float = 0.5, seed: int = 1, step: int = 0, layer: str = "fc6", rows: tuple[int, int] = (0, 128),
         columns: tuple[int, int] = (0, 4096)) -> torch.Tensor:
    return keep_mask(p, words(seed, step, layer), rows=rows, columns=columns, device=CPU)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_of_what_stays(p: float) -> None:
    # 524,288 draws: five deviations are 5·√(p(1-p)/524288). A row has 4096 and a column 128 of them.
    m = mask(p).double()
    sd = (p * (1 - p)) ** 0.5
    assert abs(m.mean() - (1 - p)) < 5 * sd / 524288**0.5
    assert (m.mean(1) - (1 - p)).abs().max() < 5 * sd / 4096**0.5
    assert (m.mean(0) - (1 - p)).abs().max() < 6 * sd / 128**0.5
    # Rows vary among each other as independent draws do: no more, no less (the variance of 128 means has a deviation of 12.5%).
    assert 0.4 < m.mean(1).var() * 4096 / sd**2 < 1.6
    assert 0.8 < m.mean(0).var() * 128 / sd**2 < 1.2


def test_neighbours_are_independent() -> None:
    m = mask().double() * 2 - 1
    bound = 5 / m.numel() ** 0.5
    for other in (m.roll(1, 0), m.roll(1, 1), m.roll(64, 1), m.roll(2048, 1), m.roll((1, 1), (0, 1)), m.flip(0), m.flip(1)):
        assert abs((m * other).mean()) < bound
    gram = m @ m.T / 4096  # every pair of rows: 8128 correlations of deviation 1/64
    assert (gram - torch.eye(128)).abs().max() < 6 / 64
    # A product of four neighbours catches what is linear in the bits of the coordinates.
    assert abs((m * m.roll(1, 0) * m.roll(1, 1) * m.roll((1, 1), (0, 1))).mean()) < bound


def test_seed_step_and_layer_choose_other_masks() -> None:
    m = mask().double() * 2 - 1
    for other in (mask(seed=2), mask(step=1), mask(step=2**40), mask(layer="fc7"), mask(rows=(128, 256))):
        assert abs((m * (other.double() * 2 - 1)).mean()) < 5 / m.numel() ** 0.5


def test_a_part_is_a_cut_of_the_whole() -> None:
    whole = mask()
    assert torch.equal(mask(rows=(32, 64), columns=(2048, 4096)), whole[32:64, 2048:])
    assert torch.equal(mask(), whole)


def test_equals_the_hash_in_plain_python() -> None:
    # lowbias32 as published, on unsigned integers. A change of this function changes every training run.
    def lowbias32(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    def key(axis: str, position: int) -> int:
        digest = hashlib.sha256(f"dropout/1/7/fc7/{axis}".encode()).digest()
        first, second = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
        return lowbias32(lowbias32(position ^ first) ^ second)

    def kept(row: int, column: int) -> bool:
        drawn = lowbias32(key("row", row) ^ key("column", column))
        signed = drawn - 2**32 if drawn >= 2**31 else drawn
        return signed >= 0.3 * 2**32 - 2**31

    expected = [[kept(row, column) for column in range(2000, 2040)] for row in range(100, 120)]
    assert mask(0.3, step=7, layer="fc7", rows=(100, 120), columns=(2000, 2040)).tolist() == expected


def test_inverted() -> None:
    x = torch.full((64, 256), 3.0)
    y = dropout(x, 0.25, words(), first_row=0, first_column=0)
    assert set(y.unique().tolist()) == {0.0, 4.0}
    assert dropout(x, 0.0, words(), first_row=0, first_column=0) is x


def test_gradient_passes_where_the_neuron_stays() -> None:
    x = torch.ones(4, 8, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.5, words(), first_row=0, first_column=0)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, y.detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_stays(dtype: torch.dtype) -> None:
    assert dropout(torch.ones(2, 4, dtype=dtype), 0.5, words(), first_row=0, first_column=0).dtype == dtype
