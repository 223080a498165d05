"""Runs from each tier of images: the same draws, exact resume, errors that say what is missing."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Callable

import pytest
import torch

from tests.conftest import TinySet
from tests.helpers.recipes import write_recipe
from tests.helpers.runs import here, pair, same, weights
from tests.helpers.small_set import photographs, write_set
from tools import pack_shards


@pytest.fixture(scope="module")
def packed(tiny_set: TinySet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiers") / "packed"
    options = ["--square-px", "76", "--shard-images", "20", "--budget", "0.05", "--jobs", "1"]
    assert pack_shards.main([str(tiny_set.index), str(out), *options]) == 0
    return out


@pytest.fixture(scope="module")
def recipe(tiny_set: TinySet, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_recipe(tmp_path_factory.mktemp("recipe"), tiny_set.index)
    text = path.read_text().replace("  mean: image\n", f"  mean: image\n  tier: archives\n  packed: {packed}\n")
    path.write_text(text.replace("  epochs: 3\n", "  epochs: 2\n"))
    return path


def options(tier: str, tmp_path: Path) -> list[str]:
    return {"archives": [], "packed": ["--data.tier=packed"],
            "streamed": ["--data.tier=streamed", "--data.window=16", "--data.lanes=2"],
            "resident": ["--data.tier=resident", f"--machine.resident_folder={tmp_path / 'resident'}"]}[tier]


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run folder of an undisturbed run of a tier."""
    @functools.cache
    def run(tier: str) -> Path:
        folder = tmp_path_factory.mktemp(tier)
        out, _ = here(recipe, folder, *options(tier, folder))
        assert "-bound: " in out
        return folder / "small"
    return run


@pytest.mark.parametrize("tier", ["packed", "streamed", "resident"])
def test_a_run_stopped_anywhere_resumes_with_the_same_bits(recipe: Path, whole: Callable[[str], Path], tmp_path: Path,
                                                           tier: str) -> None:
    here(recipe, tmp_path, "--machine.stop_after=7", *options(tier, tmp_path), code=75)
    shutil.rmtree(tmp_path / "resident", ignore_errors=True)  # the first run has filled it; this one fills it from step 7 on
    out, _ = here(recipe, tmp_path, "--resume", *options(tier, tmp_path))
    assert "at step 7" in out
    same(whole(tier), tmp_path / "small")


def test_resident_rgb_trains_exactly_as_the_archives_do(whole: Callable[[str], Path]) -> None:
    one, other = weights(whole("archives")), weights(whole("resident"))
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("memory", [pytest.param("ram", marks=pytest.mark.slow), "gpu"])
def test_two_processes_with_resident_images_train_as_one(recipe: Path, whole: Callable[[str], Path], tmp_path: Path,
                                                         memory: str) -> None:
    """`gpu` without one: the images are divided between the two processes, which exchange their crops."""
    pair(recipe, tmp_path, *options("resident", tmp_path), f"--machine.resident_memory={memory}")
    one, other = weights(whole("resident")), weights(tmp_path / "small")
    for name, value in one.items():
        assert torch.allclose(value, other[name], rtol=1e-4, atol=1e-5), name  # towers add up in another order


@pytest.mark.parametrize("argv, message", [
    (["--data.tier=packed", "--data.packed="], "tier (=packed) needs packed images, and INDEX is an index of archives; run "
     "`alexnet pack INDEX -o OUT` and give OUT as the index (in a recipe: as data.packed)"),
    (["--data.tier=streamed", "--data.packed="], "tier (=streamed) needs packed images"),
    (["--data.index=PACKED"], "tier (=archives) must name what the index is: PACKED holds packed images"),
    (["--data.tier=tape"], "data.tier"),
    (["--data.tier=packed", "--data.packed=nowhere"], "data.packed (=nowhere) is no packed folder yet; write it with `alexnet"),
    (["--data.tier=packed", "--data.square_px=80"],
     "data.square_px (=80) must be the 76 of the packed images in PACKED; correct"),
    (["--data.tier=streamed", "--data.window=0"], "data.window (=0) must be at least 1"),
    (["--data.tier=streamed", "--data.lanes=0"], "data.lanes (=0) must be at least 1"),
    (["--data.tier=resident", "--data.resident=cmyk"], "data.resident"),
    (["--data.tier=resident", "--data.region=full", "--data.mean=channel"],
     "data.region (=full) must be square for tier resident"),
    (["--data.tier=resident", "--machine.resident_memory=disk"], "machine.resident_memory (=disk) must be ram or gpu"),
    (["--machine.archives=s3://bucket"],
     "machine.archives (=s3://bucket) cannot be read by tier archives; use data.tier: streamed"),
    (["--machine.queue=0"], "machine.queue (=0) must be at least 1"),
])
def test_a_tier_that_cannot_be_is_explained(recipe: Path, packed: Path, tiny_set: TinySet, tmp_path: Path, argv: list[str],
                                            message: str) -> None:
    names = {"INDEX": str(tiny_set.index), "PACKED": str(packed)}
    for name, path in names.items():
        message, argv = message.replace(name, path), [word.replace(name, path) for word in argv]
    _, err = here(recipe, tmp_path, *argv, code=2)
    assert message in err and not (tmp_path / "small").exists()


def test_packed_images_of_another_set_are_refused(recipe: Path, tmp_path: Path) -> None:
    other = write_set(tmp_path / "other", photographs(30))
    _, err = here(recipe, tmp_path, f"--data.index={other.path}", "--data.tier=packed", code=2)
    assert f"must hold the images of data.index (={other.path}), and its split train was packed from others" in err
