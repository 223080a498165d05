"""Watches over the processes of a run, beside what they compute."""

from __future__ import annotations


class Watch:
    """What this process is doing. This one watches nobody."""

    phase, step = "start", 0

    def at(self, phase: str, step: int) -> None:
        """Training is now in this phase (load, forward, backward, update, save, test) of this step."""
        self.phase, self.step = phase, step
