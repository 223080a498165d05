"""Memory and disk checks of a resident store: what it needs, what is free, and what to use instead when it does not fit.

Each is of `count` squares of `kind` (rgb or yuv420), `row_bytes` each, and raises RuntimeError that names what would fit.
ImageNet, 1,281,167 training squares of 256 px: 252 GB as rgb (196,608 bytes each), 126 GB as yuv420. 1 GB is 10^9 bytes."""
import os
from pathlib import Path

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


def _meminfo(key: str, proc: Path) -> int:
    lines = (proc / "meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def free_bytes(folder: Path, proc: Path = _PROC) -> int:
    """Bytes free for files in `folder`. Those in tmpfs (as /dev/shm) take memory, and stay in it."""
    system, resolved = os.statvfs(folder), folder.resolve()
    mounts = [(line.split()[4], line.split(" - ")[1].split()[0]) for line in
              (proc / "self" / "mountinfo").read_text().splitlines()]
    around = [(len(Path(mount).parts), kind) for mount, kind in mounts if resolved.is_relative_to(mount)]
    free = system.f_bavail * system.f_frsize
    return min(free, _meminfo("MemAvailable", proc)) if around and max(around)[1] in ("tmpfs", "ramfs") else free


def check_disk(kind: str, count: int, row_bytes: int, folder: Path, present: int = 0) -> None:
    """Refuse a file of squares that its file system does not hold; `present` bytes of it are there already."""
    need, free = count * row_bytes - present, free_bytes(folder)
    if need > free:
        raise RuntimeError(f"data.resident (={kind}) needs {_gb(need)} more in {folder}, where {_gb(free)} are free; "
                           f"{_instead(kind, need, free, 'machine.resident_folder on another disk')}")


def check_memory(kind: str, count: int, row_bytes: int) -> None:
    """Refuse squares that memory does not hold."""
    need, (have, source) = count * row_bytes, memory()
    usable = int(RAM_SHARE * have)
    if need > usable:
        raise RuntimeError(f"data.resident (={kind}) needs {_gb(need)} for {count:,} squares, and of {source} ({_gb(have)}) "
                           f"{_gb(usable)} may be used; {_instead(kind, need, usable)}")


def check_device(kind: str, count: int, row_bytes: int, ranks: int, free: int) -> None:
    """Refuse a share of the squares that a GPU with `free` bytes does not hold; `ranks` processes, a GPU each, share them."""
    total, need, usable = count * row_bytes, -(-count // ranks) * row_bytes, max(free - NETWORK_BYTES, 0)
    if need > usable:
        more = f"at least {-(-total // usable)} GPUs of this size that share it" if usable else ""
        raise RuntimeError(f"data.resident (={kind}) needs {_gb(need)} on each of {ranks} GPU{'s' * (ranks > 1)}, and "
                           f"{_gb(usable)} are free (of {_gb(free)}, {_gb(NETWORK_BYTES)} are left to the network); "
                           f"{_instead(kind, need, usable, more)}")


def _instead(kind: str, need: int, room: int, other: str = "") -> str:
    """What would fit: half as many bytes, another place, else tier packed."""
    half = f"data.resident: yuv420 (half as much, {_gb(need / 2)}, fits)" if kind == "rgb" and need / 2 <= room else ""
    return "use " + ", or ".join(filter(None, [half, other, "data.tier: packed"]))


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
