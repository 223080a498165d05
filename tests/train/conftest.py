"""Shared data of the tests of runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import TinySet
from tests.helpers.recipes import write_recipe


@pytest.fixture(scope="module")
def recipe(tiny_set: TinySet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small recipe on the small set; a module that needs another one has a fixture of this name."""
    return write_recipe(tmp_path_factory.mktemp("recipe"), tiny_set.index)
