"""How much of the first kernels is colour (paper figure 3): by hand, per tower, and beneath the picture."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import TinySet
from tests.helpers.figures import show
from tests.helpers.trained_run import write_run
from train.figures.kernels import chroma_lines, chroma_share, conv1, png, sheet, stretch

RANDOM = np.random.default_rng(0)
PATTERN = RANDOM.standard_normal((5, 5))


def kernel(*colour: float) -> np.ndarray:
    """(1, 3, 5, 5): a pattern in one colour."""
    return np.array(colour)[None, :, None, None] * PATTERN


def test_chroma_by_hand() -> None:
    colours = [(1, 1, 1), (1, -1, 0), (1, 1, -2), (1, 0, 0), (0, 0, -3), (2, 1, 0)]
    found = chroma_share(np.concatenate([kernel(*colour) for colour in colours]))
    # Of (2, 1, 0), 9/3 of its 5 lie along grey.
    np.testing.assert_allclose(found, [0, 1, 1, 2 / 3, 2 / 3, 2 / 5], atol=1e-12)
    even = np.zeros((2, 3, 5, 5))
    even[0], even[1, 0] = 7, 7  # an even grey and an even red: no mean is taken off
    np.testing.assert_allclose(chroma_share(even), [0, 2 / 3], atol=1e-12)


def test_chroma_has_no_scale_and_adds_up() -> None:
    kernels = RANDOM.standard_normal((40, 3, 5, 5))
    found = chroma_share(kernels)
    assert ((found >= 0) & (found <= 1)).all() and found.std() > 0.01
    for scale in 1e-30, 1e30:
        np.testing.assert_allclose(chroma_share(kernels * scale), found, rtol=1e-9)
    grey = np.array([1, 1, 1]) / np.sqrt(3)
    others = np.array([[1, -1, 0], [1, 1, -2]]) / np.sqrt([[2], [6]])
    share = np.einsum("tc,nchw->nthw", others, kernels)
    np.testing.assert_allclose(found, (share ** 2).sum((1, 2, 3)) / (kernels ** 2).sum((1, 2, 3)))
    assert np.allclose(others @ grey, 0)
    assert chroma_share(RANDOM.standard_normal((4000, 3, 3, 3))).mean() == pytest.approx(2 / 3, abs=0.01)  # noise


def test_a_kernel_of_zeros_has_no_share_and_a_damaged_one_is_refused() -> None:
    kernels = np.concatenate([kernel(1, -1, 0), np.zeros((1, 3, 5, 5))])
    assert chroma_share(kernels)[0] == 1 and np.isnan(chroma_share(kernels)[1])
    assert chroma_lines(kernels, 1) == ["2 kernels, chroma 100% of a kernel's energy, 1 above 50%"]
    assert chroma_lines(kernels, 2)[1:] == ["tower b: 1 kernels, all zero"]
    kernels[1, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"kernels \(=NaN or infinite\) must be finite; the weights are damaged, give an ea"):
        chroma_share(kernels)


def test_towers_that_differ_and_towers_that_do_not() -> None:
    grey, colour = ([kernel(*tint) + RANDOM.normal(0, 0.1, (1, 3, 5, 5)) for _ in range(24)] for tint in ((1, 1, 1), (1, -1, 0)))
    lines = chroma_lines(np.concatenate(grey + colour), 2)
    assert lines[0].startswith("tower a: 24 kernels, chroma ") and lines[0].endswith(", 0 above 50%") and len(lines) == 3
    assert lines[1].startswith("tower b: 24 kernels, chroma 9") and lines[1].endswith(", 24 above 50%")
    mixed = chroma_lines(np.concatenate([kernels for pair in zip(grey, colour) for kernels in pair]), 2)
    assert float(lines[2].split()[2]) < 1e-8 and float(mixed[2].split()[2]) > 0.3
    single = chroma_lines(np.concatenate(grey), 1)
    assert len(single) == 1 and single[0].startswith("24 kernels, chroma ")


def test_a_png_has_the_pictures_pixels(tmp_path: Path) -> None:
    picture = RANDOM.integers(0, 256, (40, 120, 3)) / 255
    with Image.open(io.BytesIO(png(picture))) as drawn:
        np.testing.assert_array_equal(np.asarray(drawn.convert("RGB")), np.round(picture * 255))


def test_the_command_prints_and_draws(tiny_set: TinySet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, tiny_set)
    words = ["--run", str(run), "--out", str(tmp_path / "new/k.png")]
    assert show("kernels", *words) == 0
    out = capsys.readouterr().out.splitlines()
    kernels, towers = conv1(run / "checkpoints/step-000000000")
    assert out[1:] == chroma_lines(kernels, towers) and len(out) == 4 and out[0].startswith("8 kernels of ")
    with Image.open(tmp_path / "new/k.png") as drawn:
        alone = np.asarray(Image.open(io.BytesIO(png(sheet(kernels, towers)))).convert("RGB"))
        np.testing.assert_array_equal(np.asarray(drawn.convert("RGB"))[:alone.shape[0], :alone.shape[1]], alone)


def test_kernels_are_stretched_one_by_one_and_laid_out_by_tower() -> None:
    kernels = np.random.default_rng(0).normal(size=(96, 3, 11, 11)) * np.arange(1, 97)[:, None, None, None]
    kernels[5] = 0.25
    pictures = stretch(kernels)
    assert pictures.shape == (96, 11, 11, 3)
    others = np.delete(pictures, 5, 0)
    assert (others.min(axis=(1, 2, 3)) == 0).all() and (others.max(axis=(1, 2, 3)) == 1).all()
    assert (pictures[5] == 0.5).all()
    assert pictures[7].argmax() == kernels[7].transpose(1, 2, 0).argmax()
    board = sheet(kernels, 2, scale=1)
    # 16 in a row, three rows a tower (figure 3 of the paper), a gap of 3 between towers
    assert board.shape == (6 * 15 + 4 + 3, 16 * 15 + 4, 3)
    np.testing.assert_array_equal(board[4:15, 4:15], pictures[0])
    np.testing.assert_array_equal(board[3 * 15 + 3 + 4:3 * 15 + 3 + 15, 15 + 4:15 + 15], pictures[49])


def test_kernels_of_no_checkpoint_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show("kernels", "--checkpoint", tmp_path / "no", "--out", tmp_path / "k.png") == 2
    assert "does not exist; give a run folder, such as" in capsys.readouterr().err
    assert show("kernels", "--checkpoint", tmp_path, "--out", tmp_path / "k.pdf") == 2
    assert "k.pdf) must end in .png, which is what is written; correct the name" in capsys.readouterr().err
