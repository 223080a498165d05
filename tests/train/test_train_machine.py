"""What a run asks of the machine, and what it says when there is too little of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TinySet
from tests.helpers.recipes import write_recipe
from tests.helpers.runs import here, inside
from train import build
from train.evaluate import __main__ as evaluate, command
from train.parallel import topology as distributed
from train.parallel.topology import Topology, process_group
from train.recipe import load


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def test_a_gpu_computes_in_full_precision_and_with_exact_repeats(recipe: Path, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """What `configure_torch` asks of torch; no GPU is touched."""
    asked: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    for owner, name in ((torch.backends.cudnn, "deterministic"), (torch.backends.cudnn, "benchmark"),
                        (torch.utils.deterministic, "fill_uninitialized_memory")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    gpu = Topology.single("cuda:0")
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        build.configure_torch(load_with(recipe, tmp_path, "machine:", "machine:\n  precision: bf16\n  deterministic: false"), gpu)
        assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32
        build.configure_torch(load(recipe), gpu)
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
        assert asked == [False, True]
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = flags


@pytest.mark.parametrize(("capability", "dtype"), [("AVX2", torch.float32), ("AVX512", torch.bfloat16)])
def test_bf16_where_a_cpu_computes_in_it(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: str,
                                         dtype: torch.dtype) -> None:
    """What precision auto is; bf16 by name is bf16 anywhere."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for precision, expected in (("auto", dtype), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        config = load_with(recipe, tmp_path, "machine:", f"machine:\n  precision: {precision}")
        with build.autocast(config, Topology.single("cpu"))():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected
        assert build.with_precision(config, Topology.single("cpu")).machine.precision in ("fp32", "bf16")


def load_with(recipe: Path, folder: Path, old: str, new: str) -> Any:
    """A recipe with one line replaced."""
    path = folder / "other.yaml"
    path.write_text(recipe.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    return load(path)


@pytest.mark.parametrize("variable, ours, users", [
    ("CUBLAS_WORKSPACE_CONFIG", ":4096:8", ":16:8"), ("NCCL_LAUNCH_ORDER_IMPLICIT", "1", "0")])
def test_libraries_are_told_before_cuda_starts(variable: str, ours: str, users: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(distributed, "_device", lambda *_: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: told.append(os.environ[variable]))
    for mine, expected in ((None, ours), (users, users)):
        with monkeypatch.context() as patch:
            patch.setenv(variable, mine or "x")
            if mine is None:
                patch.delenv(variable)
            with process_group(towers=2, device="cuda", timeout_s=5):
                assert told.pop() == expected


@pytest.mark.parametrize("text", ["", "Unable to allocate 3 GiB"])
def test_too_little_memory_is_a_failure_of_the_machine(tiny_set: TinySet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       text: str) -> None:
    def fail(*args: Any) -> None:
        raise MemoryError(*([text] if text else []))
    monkeypatch.setattr(build, "configure_torch", fail)
    _, err = here(write_recipe(tmp_path, tiny_set.index), tmp_path, code=4)
    assert err == (f"error: memory (={text or 'used up'}) does not suffice; lower train.batch, machine.test_batch or "
                   "machine.prefetch\n")
    monkeypatch.setattr(command, "run", fail)
    _, err = inside(evaluate.main, ["--run", str(tmp_path)], code=4)
    assert err == f"error: memory (={text or 'used up'}) does not suffice; give a smaller --batch\n"
