"""Ranks of the processes that torchrun starts, and numbers of processes that make no sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from train.config import ParallelConfig
from train.parallel.topology import _coordinates, process_group


@pytest.mark.parametrize("variables, towers, parallel, device, message", [
    ({"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}, 2, {"towers": 2}, "cpu", r"processes \(=3\) must be even in number"),
    ({"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3"}, 2, {}, "cpu", r"processes of this machine \(=3\) must be even in number"),
    ({"WORLD_SIZE": "2"}, 1, {"towers": 2}, "cpu", r"model.towers \(=1\) must be 2 for two processes to hold a tower each"),
    ({"WORLD_SIZE": "2"}, 1, {"scheme": "weird"}, "cpu",
     r"model.towers \(=1\) must be 2 .*; use --parallel.towers=1 --parallel.scheme=towers"),
    ({"WORLD_SIZE": "1"}, 2, {}, "cuda", r"machine.device \(=cuda\) cannot be used: no CUDA GPU is visible"),
])
def test_topologies_that_make_no_sense(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], towers: int,
                                       parallel: dict[str, Any], device: str, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((ValueError, RuntimeError), match=message):
        with process_group(towers=towers, device=device, timeout_s=5, parallel=ParallelConfig(**parallel)):
            pass


@pytest.mark.parametrize("world, towers, parallel, places", [
    (1, 2, {"towers": 2}, [(0, 1, 0, 1)]),
    (2, 2, {}, [(0, 1, 0, 2), (0, 1, 1, 2)]),
    (2, 1, {}, [(0, 2, 0, 1), (1, 2, 0, 1)]),
    (3, 2, {}, [(0, 3, 0, 1), (1, 3, 0, 1), (2, 3, 0, 1)]),
    (4, 2, {}, [(0, 2, 0, 2), (0, 2, 1, 2), (1, 2, 0, 2), (1, 2, 1, 2)]),
    (4, 2, {"towers": 1}, [(rank, 4, 0, 1) for rank in range(4)]),
    (2, 2, {"scheme": "weird"}, [(0, 1, 0, 2), (0, 1, 1, 2)]),
])
def test_towers_of_a_pair_are_neighbours(world: int, towers: int, parallel: dict[str, Any],
                                         places: list[tuple[int, ...]]) -> None:
    assert [_coordinates(world, rank, world, towers, ParallelConfig(**parallel)) for rank in range(world)] == places


def test_half_an_environment_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError, match=r"environment \(=WORLD_SIZE\) lacks .*RANK.*; start with torchrun, or unset"):
        with process_group(towers=2, device="cpu", timeout_s=5):
            pass
