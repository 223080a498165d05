"""Plans drawn for many steps together are those of each step alone, to the bit."""
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import DataConfig
from pipeline.sampling.batch_plan import BlockPlanner, CropPlanner
from pipeline.sampling.sampler import Sampler
from tests.helpers.small_set import photographs, write_set


@pytest.mark.parametrize(("region", "mean"), [("square", "image"), ("full", "channel")])
def test_a_step_among_many_is_the_step_alone(tmp_path: Path, region: str, mean: str) -> None:
    index = write_set(tmp_path, photographs(20))
    data = DataConfig(region=region, square_px=76, crop_px=67, mirror=True, lighting=0.1, mean=mean, lighting_epochs=5)
    random = np.random.default_rng(0)
    planner = CropPlanner(index, data, 3, random.random(3, np.float32), random.random(3) * 1000, random.random((3, 3)))
    for batch, shard in ((3, (0, 1)), (14, (1, 2)), (20, (0, 1))):
        sampler = Sampler(index.ids("train"), batch, 3, shard)
        together = BlockPlanner(sampler.take, sampler.share, planner)
        for step in (0, 1, 1400, 585, 586, 5000, 4999):
            found, alone = together(step), planner.plan(step, *sampler.take(step))
            assert found.step == step and found.encoded == []
            for one, other in ((found, alone), (found.augmentation, alone.augmentation), (found.regions, alone.regions)):
                for field in fields(one):
                    value, expected = getattr(one, field.name), getattr(other, field.name)
                    assert not isinstance(value, np.ndarray) or value.tobytes() == expected.tobytes(), field.name
