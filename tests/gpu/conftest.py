"""A small set of photographs for tests on a GPU, with its statistics."""
import pytest
from tests.helpers.small_set import photographs, write_set

from pipeline.compute_stats import compute
from pipeline.index.sample_index import SampleIndex
from pipeline.stats import Stats


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    return write_set(tmp_path_factory.mktemp("gpu"), photographs(32), photographs(40)[32:])


@pytest.fixture(scope="module")
def stats(photos: SampleIndex) -> Stats:
    return compute(photos, "train", 76)
