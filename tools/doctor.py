"""What this machine and this installation have, what is missing, and what to do: `alexnet doctor`, `python tools/doctor.py`.

Exit codes: 0 training would work, 1 it would not, 2 a mistake in what was asked.
"""
import sys
from pathlib import Path

if not __package__:  # run as a file: tools/profile must not hide the standard library's `profile`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train.exit_codes import run_command, start_command  # noqa: E402

if __name__ == "__main__":
    start_command()

import argparse
import contextlib
import ctypes
import importlib
import importlib.metadata
import os
import platform
import re
import resource
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType

from pipeline.process_pool import cores  # noqa: E402
from tools.cli import guarded  # noqa: E402
from train.cli import Parser, put_json  # noqa: E402

PACKAGE = "alexnet-dali"
DALI = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")
MARKS = {"ok": "ok", "note": "-", "warning": "!", "error": "✗"}
LEAST_FILES, LEAST_SHM, LEAST_DISK, LEAST_MEMORY = 4096, 1 << 29, 5 << 30, 4 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the answer: `kind` error where training would not work, warning where it would be slow or may fail later."""
    name: str
    value: str
    kind: str = "ok"
    advice: str = ""


def version(name: str) -> str:
    """The version of an installed distribution, or ""."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _numbers(text: str) -> list[int]:
    """A version as numbers, for comparison."""
    return [int(number) for number in re.findall(r"\d+", text.partition("+")[0])]


def imported(name: str, package: str) -> tuple[ModuleType | None, Finding]:
    """A module that training needs, or None, and the finding about it."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        there = version(package)
        problem = f"{there} is installed, and cannot be imported: {error}" if there else "not installed"
        return None, Finding(package, problem, "error",
                             f"pip install {'--force-reinstall ' if there else ''}{package}, or pip install -e . for all of it")
    return module, Finding(package, version(package) or str(getattr(module, "__version__", "?")))


def software() -> Iterator[Finding]:
    """Python, the packages that are needed, and the extras."""
    fits = sys.version_info[:2] in ((3, 11), (3, 12))
    yield Finding("python", f"{platform.python_version()} ({sys.executable})", "ok" if fits else "error",
                  "" if fits else "use Python 3.11 or 3.12")
    try:
        required = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(PACKAGE, "not installed, run from its source tree", "note", "pip install -e . gives the command alexnet")
        return
    yield Finding(PACKAGE, f"{version(PACKAGE)} ({Path(__file__).resolve().parent.parent})")
    missing: dict[str, list[str]] = {}
    for line in required:
        name, extra = re.split(r"[^\w.-]", line)[0], re.search(r'extra == "(\w+)"', line)
        least, found = re.search(r">=([\d.]+)", line), version(name)
        names = missing.setdefault(extra[1] if extra else "", [])
        if name in (*DALI, "torch") and not found:
            continue  # the lines about them say so
        if not found or least and _numbers(found) < _numbers(least[1]):
            names.append(f"{name}{least[0] if least else ''}")
    for group, names in missing.items():
        if group in ("dev", "cuda13"):
            continue
        title = f"extra {group}" if group else "requirements"
        if not names:
            yield Finding(title, "installed")
        elif group:
            yield Finding(title, f"missing: {', '.join(names)}", "note", f"pip install '{PACKAGE}[{group}]', if you want it")
        else:
            yield Finding(title, f"missing: {', '.join(names)}", "error", f"pip install {shlex.join(names)}")


def dali() -> Iterator[Finding]:
    """DALI: one flavour of it, which can be imported."""
    found = [name for name in DALI if version(name)]
    _, finding = imported("nvidia.dali", found[0] if found else DALI[0])
    if len(found) == 2 and finding.kind == "ok":
        finding = Finding("nvidia-dali", f"both {' and '.join(found)}, which overwrite each other's files", "warning",
                          f"pip uninstall {' '.join(DALI)}, then install one of them")
    yield finding


def gpus(proc: Path = Path("/proc")) -> Iterator[Finding]:
    """torch, the driver, the GPUs, and whether the three fit together."""
    torch, finding = imported("torch", "torch")
    driver = proc / "driver" / "nvidia" / "version"
    there = re.search(r"Module\s+(?:for \S+\s+)?(\d[\d.]+)", driver.read_text()) if driver.is_file() else None
    if torch is None:
        yield finding
        return
    built = torch.version.cuda
    yield Finding("torch", f"{torch.__version__}, " + (f"built for CUDA {built}" if built else "a CPU build"))
    yield Finding("driver", f"NVIDIA {there[1]}" if there else "no NVIDIA driver", "ok" if there else "note")
    count = torch.cuda.device_count() if built else 0
    if there and not built:
        yield Finding("GPUs", "the driver has some, and this torch cannot use them", "warning",
                      "install torch's CUDA build instead of its CPU build (pytorch.org, Get started), or train on the CPU")
    elif there and not count:
        reason = "CUDA_VISIBLE_DEVICES hides them" if "CUDA_VISIBLE_DEVICES" in os.environ else "the driver may be too old"
        yield Finding("GPUs", f"torch sees none: {reason}", "warning",
                      f"unset CUDA_VISIBLE_DEVICES, or install a driver for CUDA {built} or a torch for an older one")
    elif not count:
        yield Finding("GPUs", "none; training runs on the CPU", "note")
    for number in range(count):
        about = torch.cuda.get_device_properties(number)
        try:
            torch.ones(1, device=f"cuda:{number}").sum().item()
            yield Finding(f"GPU {number}", f"{about.name}, {about.total_memory / 2 ** 30:.0f} GiB, compute capability "
                          f"{about.major}.{about.minor}")
        except RuntimeError as error:
            yield Finding(f"GPU {number}", f"{about.name}: {str(error).splitlines()[0]}", "warning",
                          "end what uses it, or install a torch built for it; --machine.device=cpu trains without it")
    if count:
        engines = decoder_engines()
        yield Finding("JPEG engines", "unknown" if engines is None else f"{engines} for each GPU" if engines
                      else "none: CUDA cores decode (nvJPEG)", "ok" if engines else "note")
        triton = version("triton")
        yield Finding("triton", triton or "not installed", "ok" if triton else "warning",
                      "" if triton else "pip install triton; without it machine.kernels is torch, and slower")


def decoder_engines() -> int | None:
    """Hardware engines that decode JPEG on a GPU, as nvJPEG counts them; None where it cannot say."""
    with contextlib.suppress(ImportError, OSError, AttributeError, StopIteration):
        nvjpeg = importlib.import_module("nvidia.nvjpeg")
        path = next(file for folder in nvjpeg.__path__ for file in Path(folder).glob("lib/libnvjpeg.so*"))
        library, handle = ctypes.CDLL(str(path)), ctypes.c_void_p()
        engines, per_engine = ctypes.c_uint(), ctypes.c_uint()
        if library.nvjpegCreateSimple(ctypes.byref(handle)) == 0:
            if library.nvjpegGetHardwareDecoderInfo(handle, ctypes.byref(engines), ctypes.byref(per_engine)) == 0:
                return engines.value
            return 0  # the call's answer where there is none
    return None


def machine(folder: Path, shm: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Cores, memory, shared memory, disk, open files."""
    usable, all_cores = cores(), os.cpu_count() or 1
    yield Finding("cores", f"{usable} usable of {all_cores}", "note" if usable < all_cores else "ok",
                  "the others are not this process's (taskset, a container, Slurm)" if usable < all_cores else "")
    with contextlib.suppress(ImportError):  # it needs no more than the standard library and NumPy
        from pipeline.resident.capacity import memory

        limit, what = memory()
        few = limit < LEAST_MEMORY
        yield Finding("memory", f"{limit / 2 ** 30:.1f} GiB ({what})", "warning" if few else "ok",
                      "lower train.batch, machine.test_batch and machine.prefetch" if few else "")
    if shm.is_dir():
        size = shutil.disk_usage(shm).total
        yield Finding(str(shm), f"{size / 2 ** 30:.1f} GiB", "warning" if size < LEAST_SHM else "ok", "several GPUs talk "
                      "through it: start the container with --shm-size=8g or --ipc=host" if size < LEAST_SHM else "")
    free = shutil.disk_usage(folder).free
    yield Finding("disk", f"{free / 1e9:.1f} GB free in {folder}", "warning" if free < LEAST_DISK else "ok",
                  "make room: a checkpoint of the paper's network takes 0.5 GB" if free < LEAST_DISK else "")
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield Finding("open files", f"{files} (ulimit -n)", "warning" if 0 <= files < LEAST_FILES else "ok",
                  f"ulimit -n {most if 0 < most < 65536 else 65536}" if 0 <= files < LEAST_FILES else "")


def parser(prog: str = "python -m tools.doctor") -> Parser:
    top = Parser(prog=prog, description="Say what this machine and this installation have, what is missing, and what to do. "
                 "Exit code 0: training would work; 1: it would not.", example=f"{prog} --json doctor.json")
    top.add_json()
    return top


def examine(args: argparse.Namespace) -> int:
    """Look, print, return the exit code."""
    findings = [*software(), *dali(), *gpus(), *machine(Path.cwd())]
    works = all(finding.kind != "error" for finding in findings)
    if not put_json(args.json, {"works": works, "findings": [asdict(finding) for finding in findings]}):
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            print(f"{MARKS[finding.kind]:2} {finding.name:{width}}  {finding.value}")
            if finding.advice:
                print(f"{'':{width + 5}}→ {finding.advice}")
        first = "demo" if version("pillow") else "train --help"
        print(f"training would work here: alexnet {first}" if works else "training would not work here; mend what is marked ✗")
    return 0 if works else 1


def main(argv: Sequence[str] | None = None, prog: str = "python -m tools.doctor") -> int:
    """The command; returns its exit code."""
    return guarded(lambda: examine(parser(prog).parse_args(argv)))


if __name__ == "__main__":
    run_command(main)
