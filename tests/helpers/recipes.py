"""A recipe for tests: the whole network, so small that a step takes milliseconds."""

from __future__ import annotations

from pathlib import Path

TEXT = """\
data:
  index: INDEX
  train_split: train
  validation_split: val
  test_split: val
  region: square
  square_px: 76
  crop_px: 67
  mirror: true
  lighting: 0.1
  mean: image
model:
  input_px: 67
  classes: 6
  towers: 2
  activation: relu
  dropout: 0.5
  lrn: {k: 2, n: 5, alpha: 1e-4, beta: 0.75}
  pool: {px: 3, stride: 2}
  layers:
    conv1: {kernels: 8,  px: 11, stride: 4, pad: 0, sees: own,  lrn: after, pool: true,  std: 0.05, bias: 0}
    conv2: {kernels: 16, px: 5,  stride: 1, pad: 2, sees: own,  lrn: after, pool: true,  std: 0.05, bias: 1}
    conv3: {kernels: 16, px: 3,  stride: 1, pad: 1, sees: both, lrn: none,  pool: false, std: 0.05, bias: 0}
    conv4: {kernels: 16, px: 3,  stride: 1, pad: 1, sees: own,  lrn: none,  pool: false, std: 0.05, bias: 1}
    conv5: {kernels: 8,  px: 3,  stride: 1, pad: 1, sees: own,  lrn: none,  pool: true,  std: 0.05, bias: 1}
    fc6: {neurons: 18, sees: both, dropout: true, std: 0.05, bias: 1}
    fc7: {neurons: 16, sees: both, dropout: true, std: 0.05, bias: 1}
    fc8: {sees: both, std: 0.05, bias: 0}
optimizer:
  lr: 1e-2
  momentum: 0.9
  weight_decay: 5e-4
  bias_lr_factor: 2
schedule:
  plateau: {factor: 0.1, patience: 1, min_delta: 0.5, drops: 3}
  milestones: []
  warmup_steps: 0
train:
  epochs: 3
  batch: 8
  seed: 1
  validate_views: 1
  test_views: 10
machine:
  torch_threads: 1
  threads: 1
  metrics_steps: 1
"""


def write_recipe(folder: Path, index: object = "nowhere", **replaced: str) -> Path:
    """Write the recipe into `folder`; each of `replaced` is `name=line` and takes the place of the line of that name."""
    lines = TEXT.replace("INDEX", str(index)).splitlines()
    for name, line in replaced.items():
        place = [number for number, old in enumerate(lines) if old.strip().startswith(f"{name}:")]
        assert len(place) == 1, f"{name} is {len(place)} times in the recipe"
        lines[place[0]] = line
    path = folder / "small.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
