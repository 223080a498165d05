"""What fits: how much a resident store needs, how much memory and disk there are, and what to do instead.

ImageNet, 1,281,167 training squares of 256 px: 252 GB as rgb (196,608 bytes each), 126 GB as yuv420. 1 GB is 10^9 bytes.
"""
import os
from pathlib import Path

import torch

RAM_SHARE = 0.9  # of a machine's memory for the squares; the rest is for the processes themselves
NETWORK_BYTES = 8 << 30  # of a GPU, for the network, its activations and the decoder


def gigabytes(count: float) -> str:
    """251.9 GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> tuple[int, str]:
    """Bytes of memory this process may use in all, and what says so: the machine, or a limit of its control group.

    Args:
        proc, cgroups: where the kernel tells.
    """
    lines = (proc / "meminfo").read_text().splitlines()
    found = [(int(line.split()[1]) * 1024, "the machine's memory") for line in lines if line.startswith("MemTotal:")]
    try:
        groups = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        groups = []
    for group in groups:  # "0::/path" (version 2), "4:memory:/path" (version 1); limits of the groups above hold too
        _, controllers, path = group.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base, name = (cgroups / "memory", "memory.limit_in_bytes") if controllers else (cgroups, "memory.max")
        here = base / path.lstrip("/")
        for folder in (here, *here.parents):
            if base != folder and base not in folder.parents:
                break
            try:
                text = (folder / name).read_text().strip()
            except OSError:
                continue
            if text.isdigit():
                found.append((int(text), f"the memory limit {folder / name}"))
    return min(found)


def available(proc: Path = Path("/proc")) -> int:
    """Bytes of memory that are free, or would be when asked for."""
    line = next(line for line in (proc / "meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def gpu_bytes() -> int:
    """Memory of all GPUs of this machine."""
    return sum(torch.cuda.get_device_properties(gpu).total_memory for gpu in range(torch.cuda.device_count()))


def is_memory(folder: Path, proc: Path = Path("/proc")) -> bool:
    """Whether files in `folder` lie in memory (tmpfs, as /dev/shm)."""
    mounts = [line.split()[4:5] + line.split(" - ")[1].split()[:1] for line in
              (proc / "self" / "mountinfo").read_text().splitlines()]
    resolved = folder.resolve()
    around = [(len(Path(place).parts), kind) for place, kind in mounts
              if Path(place) == resolved or Path(place) in resolved.parents]
    return max(around)[1] in ("tmpfs", "ramfs") if around else False


def check_ram(kind: str, rows: int, row_bytes: int, folder: Path, present: int, *, promised: int = 0,
              gpus: int = 0, limit: tuple[int, str] | None = None, free: int | None = None) -> None:
    """Refuse a file of squares that memory or the disk does not hold.

    Args:
        kind: rgb or yuv420.
        rows, row_bytes: N and the bytes of each.
        folder: where the file lies or will lie.
        present: bytes of it that are on the disk already.
        promised: bytes that other files of squares there have yet to get.
        gpus: bytes of all GPUs of the machine, for advice.
        limit: what `memory` says, asked when None.
        free: bytes free in the folder's file system, asked when None.

    Raises:
        RuntimeError: naming what would fit.
    """
    check_memory(kind, rows, row_bytes, gpus=gpus, limit=limit)
    need = rows * row_bytes
    if free is None:
        system = os.statvfs(folder)
        free = system.f_bavail * system.f_frsize
        if is_memory(folder):  # its pages cannot be dropped as those of a disk's file can
            free = min(free, available())
    left = max(free - promised, 0)
    if need - present > left:
        others = f" (of {gigabytes(free)}: other squares there are being filled)" if promised else ""
        raise RuntimeError(f"data.resident (={kind}) needs {gigabytes(need - present)} more in {folder}, where {gigabytes(left)} "
                           f"are free{others}; {_instead(kind, need - present, left, 'machine.resident_folder on another disk')}")


def check_memory(kind: str, rows: int, row_bytes: int, *, gpus: int = 0, limit: tuple[int, str] | None = None) -> None:
    """Refuse squares that memory does not hold; arguments and errors of `check_ram`."""
    need = rows * row_bytes
    have, source = limit or memory()
    usable = int(RAM_SHARE * have)
    if need > usable:
        raise RuntimeError(f"data.resident (={kind}) needs {gigabytes(need)} for {rows:,} squares, and of {source} "
                           f"({gigabytes(have)}) {gigabytes(usable)} may be used; "
                           f"{_instead(kind, need, usable, 'machine.resident_memory: gpu' if need <= gpus else '')}")


def check_device(kind: str, rows: int, row_bytes: int, ranks: int, free: int, margin: int = NETWORK_BYTES, *,
                 limit: tuple[int, str] | None = None) -> None:
    """Refuse a share of the squares that a GPU does not hold.

    Args:
        kind: rgb or yuv420.
        rows, row_bytes: N of the whole store and the bytes of each.
        ranks: processes, a GPU each, that share them.
        free: bytes free on this GPU.
        margin: bytes of them left to the network.
        limit: what `memory` says, asked when None.

    Raises:
        RuntimeError: naming what would fit.
    """
    need, usable = -(-rows // ranks) * row_bytes, max(free - margin, 0)
    if need > usable:
        enough = -(-rows * row_bytes // usable) if usable else 0
        more = f"at least {enough} GPUs of this size that share it" if enough else ""
        ram = "machine.resident_memory: ram" if rows * row_bytes <= RAM_SHARE * (limit or memory())[0] else ""
        raise RuntimeError(f"data.resident (={kind}) needs {gigabytes(need)} on each of {ranks} GPU{'s' * (ranks > 1)}, and "
                           f"{gigabytes(usable)} are free (of {gigabytes(free)}, {gigabytes(margin)} are left to the network); "
                           f"{_instead(kind, need, usable, more, ram)}")


def _instead(kind: str, need: int, room: int, *others: str) -> str:
    """What would fit: half as many bytes, other memory, else tier packed."""
    found = [f"data.resident: yuv420 (half as much, {gigabytes(need / 2)}, fits)"] if kind == "rgb" and need / 2 <= room else []
    found += [other for other in others if other]
    return "use " + ", or ".join([*found, "data.tier: packed"])
