"""Counted, seeded trials of faults: what was tried, and what came of it."""

from __future__ import annotations

import collections
import random
import re
import time
from dataclasses import dataclass, field
from typing import Callable, Iterator

LIMIT_S = 60.0  # longer is a hang
LINE = re.compile(r"[^\n]*; [^\n]+|[^\n]*\?")  # of an error: thing, rule broken; what to do


@dataclass
class Row:
    """One row of the matrix of faults; `outcomes` counts "refused" (an error of one line), "harmless" (accepted, and nothing
    follows from it), "silent", "traceback" and "hang", of which only the first two are as expected."""

    name: str
    seed: int = 1
    limit_s: float = LIMIT_S
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    bad: list[str] = field(default_factory=list)

    def draws(self, count: int) -> Iterator[random.Random]:
        """A generator for each of so many trials: any one of them can be repeated alone."""
        for number in range(count):
            yield random.Random(f"{self.name} {self.seed} {number}")

    def trial(self, fault: str, work: Callable[[], bool]) -> None:
        """Count one trial. `work` raises what the command would print in a line, or returns whether what it accepted is right."""
        began, outcome, words = time.monotonic(), "", ""
        try:
            outcome = "harmless" if work() else "silent"
        except (ValueError, RuntimeError, OSError, MemoryError) as error:
            outcome, words = ("refused" if "\n" not in str(error) else "several lines"), str(error)
        except Exception as error:  # would be a traceback
            outcome, words = "traceback", repr(error)
        if time.monotonic() - began > self.limit_s:
            outcome = "hang"
        self.outcomes[outcome] += 1
        if outcome not in ("refused", "harmless"):
            self.bad.append(f"{outcome}: {fault[:300]} {words[:300]}")

    def table_line(self) -> str:
        """The row in the table of docs/results."""
        count = self.outcomes
        as_expected = count["refused"] + count["harmless"]
        return (f"| {self.name} | {sum(count.values())} | {as_expected} | {count['refused']} | {count['silent']} "
                f"| {count['traceback'] + count['several lines']} | {count['hang']} |")

    def check(self, record: Callable[[str, object], None]) -> None:
        """Record the row; fail unless all trials were as expected."""
        record("row", self.table_line())
        print(self.table_line())
        assert not self.bad, f"{self.table_line()}\n" + "\n".join(self.bad[:20])


def flipped(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Bytes with one damage of the usual kinds: a flipped bit, another byte, a hole of zeros, a lost end, bytes too many."""
    kind = draw.choice(("bit", "bit", "bit", "byte", "zeros", "cut", "more"))
    at = draw.randrange(len(data))
    changed = bytearray(data)
    if kind == "bit":
        changed[at] ^= 1 << draw.randrange(8)
    elif kind == "byte":
        changed[at] = (changed[at] + draw.randrange(1, 256)) % 256
    elif kind == "zeros":
        changed[at:at + 512] = bytes(len(changed[at:at + 512]))
    elif kind == "cut":
        del changed[at:]
    else:
        changed[at:at] = draw.randbytes(draw.randrange(1, 20))
    return bytes(changed), f"{kind} at {at} of {len(data)}"
