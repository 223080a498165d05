"""How much more a loader could do than it is asked for, measured while it works.

A stage is busy for some share of the time its threads have. The busiest stage limits: used half of the time, the loader could
feed a network twice as fast. Decoding happens in DALI's threads, whose CPU time the kernel counts; finishing, and waiting for
what is late, in the thread that makes the batches, which is busy whenever its queue is not full.
"""
import os
from dataclasses import dataclass

from pipeline.config import LoaderConfig
from pipeline.monitor import Meter


@dataclass(frozen=True)
class Usage:
    """What a loader has used up to a moment, in seconds. `time` is the moment, `making` how long its queue was not full."""
    time: float = 0.0
    read: float = 0.0
    decode: float = 0.0
    making: float = 0.0

    def plus(self, other: "Usage", earlier: "Usage") -> "Usage":
        """This, and what was used from `earlier` to `other`."""
        # Threads that have ended take their count with them.
        return Usage(*(getattr(self, name) + max(0.0, getattr(other, name) - getattr(earlier, name))
                       for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Headroom:
    """`times`: how many times the present rate the loader could give. `stage`: its busiest one."""
    times: float
    stage: str


def usage(meter: Meter) -> Usage:
    """What the loader of `meter` has used so far."""
    totals, spans = meter.totals(), meter.spans()
    read = spans["read"].wall_s if "read" in spans else 0.0
    decode = sum(_cpu_s(thread) for thread in meter.decoders)
    return Usage(meter.now(), read, decode, sum(seconds for state, seconds in totals.items() if state != "idle"))


def headroom(used: Usage, machine: LoaderConfig, decoding: int) -> Headroom:
    """Head-room of a loader that used so much in `used.time` seconds with so many `decoding` threads."""
    shares = {"read": used.read / max(1, machine.read_threads), "decode": used.decode / max(1, decoding),
              "making batches": used.making}
    stage = max(shares, key=lambda name: shares[name])
    return Headroom(used.time / max(shares[stage], 1e-9), stage)


def threads() -> set[int]:
    """Kernel ids of this process's threads; none where /proc does not tell."""
    try:
        return {int(name) for name in os.listdir("/proc/self/task")}
    except OSError:
        return set()


def decoders(before: set[int]) -> set[int]:
    """DALI's threads among those that came after `before`. (With one worker its executor decodes, with more the workers do.)"""
    found = set()
    for thread in threads() - before:
        try:
            with open(f"/proc/self/task/{thread}/comm") as file:
                if file.read().startswith("[DALI]"):
                    found.add(thread)
        except OSError:  # it has ended
            continue
    return found


def _cpu_s(thread: int) -> float:
    """CPU seconds of a thread; those of one that has ended are lost, and count as 0."""
    try:
        with open(f"/proc/self/task/{thread}/schedstat") as file:
            return int(file.read().split()[0]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0
