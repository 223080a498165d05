"""The choice between Triton's kernels and their twins in torch."""
import importlib.util

import pytest
import torch

from model import kernels
from model.kernels import takes_triton
from tests.helpers.kernels import DEVICE

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_leaves_a_cpu_alone_even_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not takes_triton("auto", CPU) and not takes_triton("torch", CPU) and takes_triton("triton", CPU)
    monkeypatch.setattr(kernels, "what_is_missing", kernels.what_is_missing.__wrapped__)
    assert not takes_triton("auto", CUDA), "a GPU's training would run in the interpreter"
    with pytest.raises(ValueError, match=r"machine.kernels \(=triton\) needs a compiled launcher .*TRITON_INTERPRET"):
        takes_triton("triton", CUDA)


def test_triton_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"machine.kernels \(=triton\) needs a GPU, and the device is a cpu; use auto, or torch"):
        takes_triton("triton", CPU)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    missing = kernels.what_is_missing.__wrapped__
    monkeypatch.setenv("CC", "cc")
    assert missing() is None
    monkeypatch.setattr(kernels.sysconfig, "get_paths", lambda scheme: {"include": "/nowhere"})
    assert missing() == "Python's headers (/nowhere/Python.h)"
    monkeypatch.delenv("CC")
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    assert missing() == "a C compiler (CC, gcc or clang)"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert missing() == "Triton (it comes with torch for CUDA)"
    monkeypatch.setattr(kernels, "what_is_missing", missing)
    assert not takes_triton("auto", CUDA) and not takes_triton("torch", CUDA)


def test_kernels_run_here() -> None:
    assert takes_triton("triton", DEVICE)
