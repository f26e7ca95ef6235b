"""Clocks of the engine: what a forward took, and how the time of a step is shared between prompts and
responses. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

Clock = Callable[[], float]


def work_clock(devices: Iterable[str]) -> Clock:
    """The clock by which forwards are compared. On the CPU it counts the time that this thread worked: where
    other programs take the cores, forwards wait, and that says nothing of their sizes."""
    return time.thread_time if set(devices) <= {"cpu"} else time.perf_counter


@dataclass
class PrefillShare:
    """Which part of the time of a call goes to prompts: that of their tokens among all that were fed.

    On a device prompts run behind the step that was started with them, so the next one waits for them."""

    prompts: int = 0
    """Tokens of prompts that the step whose end comes next has to wait for."""
    behind: int = 0
    """Those that run behind that step."""

    def started(self, prompts: int) -> None:
        """A step on the device was started, and prompts behind it."""
        self.behind = prompts

    def alone(self, prompts: int) -> float:
        """Prompts were fed, and no row decoded. -> the share of this call."""
        self.prompts += prompts
        return 1.0

    def together(self, prompts: int, tokens: int) -> float:
        """So many tokens of prompts and of responses were fed, and are done. -> the share of this call."""
        self.prompts = self.behind = 0
        return prompts / (prompts + tokens) if prompts else 0.0

    def collected(self, tokens: int) -> float:
        """A step on the device ended, which fed so many tokens of responses. -> the share of this call."""
        share = self.prompts / (self.prompts + tokens) if self.prompts else 0.0
        self.prompts, self.behind = self.behind, 0
        return share
