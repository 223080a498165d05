"""Memory and disk checks of a resident store: what it needs, what is free, and what to use instead when it does not fit.

ImageNet, 1,281,167 training squares of 256 px: 252 GB as rgb (196,608 bytes each), 126 GB as yuv420. 1 GB is 10^9 bytes.
Each check raises RuntimeError that names what would fit. Its first arguments are `kind`, rgb or yuv420, and `count` squares of
`row_bytes` each; `limit` is what `memory` says, asked when None.
"""
import os
from pathlib import Path

import torch

RAM_SHARE = 0.9  # of a machine's memory for the squares; the rest is for the processes themselves
NETWORK_BYTES = 8 << 30  # of a GPU, for the network, its activations and the decoder
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def memory(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> tuple[int, str]:
    """Bytes of memory this process may use in all, and what says so: the machine, or a limit of its control group."""
    found = [(_meminfo("MemTotal", proc), "the machine's memory")]
    try:
        groups = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        groups = []
    for group in groups:  # "0::/path" (version 2), "4:memory:/path" (version 1); limits of the groups above hold too
        _, controllers, path = group.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base, name = (cgroups / "memory", "memory.limit_in_bytes") if controllers else (cgroups, "memory.max")
        own = base / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(base) and (file := folder / name).is_file() and (text := file.read_text().strip()).isdigit():
                found.append((int(text), f"the memory limit {file}"))
    return min(found)


def available(proc: Path = _PROC) -> int:
    """Bytes of memory that are free, or would be when asked for."""
    return _meminfo("MemAvailable", proc)


def _meminfo(key: str, proc: Path) -> int:
    lines = (proc / "meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def is_memory(folder: Path, proc: Path = _PROC) -> bool:
    """Whether files in `folder` lie in memory (tmpfs, as /dev/shm)."""
    mounts = [(line.split()[4], line.split(" - ")[1].split()[0]) for line in
              (proc / "self" / "mountinfo").read_text().splitlines()]
    resolved = folder.resolve()
    around = [(len(Path(mount).parts), kind) for mount, kind in mounts if resolved.is_relative_to(mount)]
    return bool(around) and max(around)[1] in ("tmpfs", "ramfs")


def check_ram(kind: str, count: int, row_bytes: int, folder: Path, present: int, *, promised: int = 0, gpus: int | None = None,
              limit: tuple[int, str] | None = None, free: int | None = None) -> None:
    """Refuse a file of squares that memory or the disk does not hold.

    Args:
        folder: where the file lies or will lie.
        present: bytes of it that are on the disk already.
        promised: bytes that other files of squares there have yet to get.
        gpus: bytes of all GPUs of the machine, asked when None.
        free: bytes free in the folder's file system, asked when None.
    """
    check_memory(kind, count, row_bytes, gpus=gpus, limit=limit)
    need = count * row_bytes - present
    if free is None:
        system = os.statvfs(folder)
        free = system.f_bavail * system.f_frsize
        if is_memory(folder):  # its pages cannot be dropped as those of a disk's file can
            free = min(free, available())
    left = max(free - promised, 0)
    if need > left:
        others = f" (of {_gb(free)}: other squares there are being filled)" if promised else ""
        raise RuntimeError(f"data.resident (={kind}) needs {_gb(need)} more in {folder}, where {_gb(left)} are free{others}; "
                           f"{_instead(kind, need, left, 'machine.resident_folder on another disk')}")


def check_memory(kind: str, count: int, row_bytes: int, *, gpus: int | None = None,
                 limit: tuple[int, str] | None = None) -> None:
    """Refuse squares that memory does not hold."""
    need = count * row_bytes
    have, source = limit or memory()
    usable = int(RAM_SHARE * have)
    if need > usable:
        if gpus is None:
            gpus = sum(torch.cuda.get_device_properties(gpu).total_memory for gpu in range(torch.cuda.device_count()))
        raise RuntimeError(f"data.resident (={kind}) needs {_gb(need)} for {count:,} squares, and of {source} ({_gb(have)}) "
                           f"{_gb(usable)} may be used; "
                           f"{_instead(kind, need, usable, 'machine.resident_memory: gpu' if need <= gpus else '')}")


def check_device(kind: str, count: int, row_bytes: int, ranks: int, free: int, margin: int = NETWORK_BYTES, *,
                 limit: tuple[int, str] | None = None) -> None:
    """Refuse a share of the squares that a GPU does not hold.

    Args:
        ranks: processes, a GPU each, that share the squares.
        free: bytes free on this GPU.
        margin: bytes of them left to the network.
    """
    total, need, usable = count * row_bytes, -(-count // ranks) * row_bytes, max(free - margin, 0)
    if need > usable:
        more = f"at least {-(-total // usable)} GPUs of this size that share it" if usable else ""
        ram = "machine.resident_memory: ram" if total <= RAM_SHARE * (limit or memory())[0] else ""
        raise RuntimeError(f"data.resident (={kind}) needs {_gb(need)} on each of {ranks} GPU{'s' * (ranks > 1)}, and "
                           f"{_gb(usable)} are free (of {_gb(free)}, {_gb(margin)} are left to the network); "
                           f"{_instead(kind, need, usable, more, ram)}")


def _instead(kind: str, need: int, room: int, *others: str) -> str:
    """What would fit: half as many bytes, other memory, else tier packed."""
    half = f"data.resident: yuv420 (half as much, {_gb(need / 2)}, fits)" if kind == "rgb" and need / 2 <= room else ""
    return "use " + ", or ".join(filter(None, [half, *others, "data.tier: packed"]))


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
