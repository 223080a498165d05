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
  channels: [8, 16, 16, 16, 8]
  hidden: [18, 16]
  towers: 2
  dropout: 0.5
  lrn: {k: 2, n: 5, alpha: 1e-4, beta: 0.75}
  init_std: [0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05]
  init_bias: [0, 1, 0, 1, 1, 1, 1, 0]
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
