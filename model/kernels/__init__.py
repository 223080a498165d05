"""Triton kernels, each beside a twin in plain torch, and the choice between the two (machine.kernels).

`auto` takes a kernel for tensors on a GPU where Triton can build it, else the twin. On a CPU kernels run in Triton's interpreter
alone, for tests: the environment must say so (TRITON_INTERPRET=1) before Triton is imported, and `auto` never takes it."""
import functools
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch

from model.config import Kernels


@functools.cache
def what_is_missing() -> str | None:
    """What Triton lacks to run kernels on a GPU: itself, or what it compiles its launchers with, searched for as it does."""
    if importlib.util.find_spec("triton") is None:
        return "Triton (it comes with torch for CUDA)"
    if interpreted():
        return "a compiled launcher (TRITON_INTERPRET is set)"
    if os.environ.get("CC") is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        return "a C compiler (CC, gcc or clang)"
    scheme = sysconfig.get_default_scheme()
    headers = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    return None if (Path(headers) / "Python.h").exists() else f"Python's headers ({headers}/Python.h)"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def takes_triton(kernels: Kernels, device: torch.device) -> bool:
    """Whether a tensor of this device goes through Triton's kernels. Raises ValueError when they are demanded and cannot."""
    if kernels == "torch" or kernels == "auto" and device.type != "cuda":
        return False
    if device.type == "cuda":
        missing = what_is_missing()
    else:
        missing = None if interpreted() else f"a GPU, and the device is a {device.type}"
    if missing is not None and kernels == "triton":
        raise ValueError(f"machine.kernels (=triton) needs {missing}; use auto, or torch")
    return missing is None
