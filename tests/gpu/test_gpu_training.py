"""A training step and whole trainings on GPUs."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.helpers.loaders import train_loader
from tests.helpers.networks import small
from tests.helpers.small_set import photographs, write_set

from model.alexnet import AlexNet
from model.config import LrnConfig
from pipeline.compute_stats import compute
from pipeline.config import DataConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.stats import Stats
from train.recipe import parse

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SMALL = DataConfig(region="square", square_px=76, crop_px=67, mirror=True, lighting=0.1, mean="image")
NETWORK = small((16, 32, 48, 48, 32), (64, 64), std=(0.01,) * 8, classes=10, lrn=LrnConfig(2.0, 5, 1e-4, 0.75))


def test_a_training_step_equals_the_cpus(photos: SampleIndex, stats: Stats) -> None:
    """Same initial values, same dropout masks: logits and gradients differ by rounding only (TF32 off)."""
    with train_loader("archives", photos, "train", SMALL, 8, 1, stats) as loader:
        batch = next(iter(loader))
    found = []
    for device in ("cpu", "cuda"):
        network = AlexNet(NETWORK, seed=3).to(device, torch.float64)
        logits = network(batch.images.to(device, torch.float64), step=5)
        torch.nn.functional.cross_entropy(logits, batch.labels.to(device)).backward()
        found.append([logits.detach().cpu()] + [p.grad.cpu() for p in network.parameters() if p.grad is not None])
    assert len(found[0]) == 17
    for here, there in zip(*found, strict=True):
        # LRN and dropout hash are the same arithmetic; sums are in another order
        assert torch.allclose(here, there, rtol=1e-6, atol=1e-9)


def test_the_demo_recipe_trains_on_the_gpu(tmp_path: Path) -> None:
    """Commands as a user types them; bf16 and channels_last too. `parse` shows that the recipe knows these settings."""
    root = Path(__file__).resolve().parents[2]
    recipe = root / "train/recipes/demo.yaml"
    assert parse(["--config", str(recipe), "--machine.device=cuda"]).config.machine.device == "cuda"
    index = write_set(tmp_path / "set", photographs(64), photographs(72)[64:], classes=10)
    compute(index, "train", 76).save(index.path / "stats-train-76.npz")
    for name, more in (("plain", []), ("fast", ["--machine.precision=bf16", "--machine.channels_last=true"])):
        command = [sys.executable, "-m", "train.main", "--config", str(recipe), f"--data.index={index.path}",
                   "--machine.device=cuda", f"--machine.runs={tmp_path}", f"--machine.name={name}", "--train.epochs=1",
                   "--train.batch=16", "--schedule.milestones=[]", *more]
        done = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr


def test_two_gpus_share_a_run_in_every_way(tmp_path: Path) -> None:
    """Losses in float32; NCCL, a GPU a process."""
    from tests.helpers.losses import SHARINGS, SINGLE, largest_difference, losses
    from tests.helpers.recipes import write_recipe

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs: NCCL allows one process each")
    index = write_set(tmp_path / "set", photographs(76), photographs(84)[76:], classes=6)
    compute(index, "train", 76).save(index.path / "stats-train-76.npz")
    recipe = write_recipe(tmp_path, index.path)
    single = losses(SINGLE, recipe, tmp_path, 12, "--machine.device=cuda")
    for sharing in SHARINGS.values():
        if sharing.processes <= torch.cuda.device_count():
            shared = losses(sharing, recipe, tmp_path, 12, "--machine.device=cuda")
            assert largest_difference(shared, single) < 1e-5, sharing
