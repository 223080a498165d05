"""What the tools share: errors of one line, text safe for a terminal, progress on stderr, machine and versions in words."""
import contextlib
import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.progress import ProgressBar
from train.exit_codes import MISTAKE, ToolOutput, exit_code, printable

__all__ = ["ProgressBar", "guarded", "hardware", "printable", "versions"]
PACKAGES = ("torch", "triton", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13",
            "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "numpy", "pillow", "simplejpeg", "webdataset", "spdl")


def guarded(work: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Do the work of a command; returns its exit code: what `work` returns (None: 0), 2 after an error that is the user's or the
    world's, 130 after Ctrl-C, each with one line on stderr and no traceback. Who reads the output may leave (`… | head`)."""
    with contextlib.redirect_stdout(ToolOutput(sys.stdout)):
        return exit_code(work, "close other programs, or ask for less", interrupted, failed=MISTAKE)


def hardware() -> dict[str, Any]:
    """CPU model, cores this process may use, memory in GiB."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": [*models, platform.processor() or platform.machine()][0], "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(memory, 1)}


def versions() -> dict[str, str]:
    """Of Python and of the packages that make figures what they are, those that are installed."""
    return {"python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES if any(metadata.distributions(name=name))}}
