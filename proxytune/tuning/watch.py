"""What a person sees as training goes on: step, loss, learning rate, tokens per second, time left, peak
memory. A live line in a terminal, a line now and then in a log; always on stderr."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from proxytune.models import process_peak
from proxytune.terminal import say
from proxytune.training_record import CurvePoint

LOG_SECONDS = 10.0
RECENT = 20
"""Steps over which the shown loss is a mean."""


def peak_bytes() -> int:
    """Memory at its largest so far: of the GPU, or of the process where there is none."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return process_peak()


@dataclass
class TrainingLine:
    """The line of one training; a context manager."""

    title: str
    total: int
    shown: bool = True
    losses: list[float] = field(default_factory=list)

    def __enter__(self) -> TrainingLine:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("{task.completed}/{task.total} {task.fields[text]}"),
            TimeRemainingColumn(),
        )
        self._live = Progress(
            *columns, disable=not (self.shown and sys.stderr.isatty()), console=Console(stderr=True)
        )
        self._task = self._live.add_task(self.title, total=self.total, text="")
        self._live.start()
        self._began = self._last = time.monotonic()
        self._first: tuple[int, int] | None = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def at(self, step: int, loss: float, tokens: int, rate: float | None = None) -> None:
        """The training is after `step`, and `tokens` have gone through the model so far."""
        self.losses.append(loss)
        now = time.monotonic()
        if self._first is None:
            self._first = step - 1, 0 if step == 1 else tokens
        seconds = max(now - self._began, 1e-9)
        done, seen = step - self._first[0], tokens - self._first[1]
        recent = self.losses[-RECENT:]
        text = f"loss {sum(recent) / len(recent):.3f}"
        text += "" if rate is None else f", learning rate {rate:.2e}"
        text += f", {seen / seconds:,.0f} tokens/s, {peak_bytes() / 2**30:.2f} GiB"
        if not self._live.disable:
            self._live.update(self._task, completed=step, text=text)
        elif self.shown and (now - self._last >= LOG_SECONDS or step == self.total):
            self._last = now
            left = seconds / done * (self.total - step) if done else math.nan
            say(f"{self.title} {step}/{self.total}: {text}, {left:,.0f} s left")


class Watch(TrainerCallback):  # type: ignore[misc]
    """Shows a training of transformers' loop, and keeps its time and, made before the model is loaded, what
    memory the process had taken by then."""

    def __init__(self, title: str, shown: bool) -> None:
        self.title, self.shown = title, shown
        self.before_bytes = peak_bytes()
        self.seconds = self.cpu_seconds = 0.0
        self._line: TrainingLine | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The number of steps is known."""
        self._line = TrainingLine(
            self.title, state.max_steps, self.shown and state.is_world_process_zero
        ).__enter__()
        self._began, self._cpu_began = time.monotonic(), time.process_time()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """A step's figures, or those of a measurement on held-out examples."""
        if self._line is None or logs is None:
            return
        if "loss" in logs:
            tokens = int(state.num_input_tokens_seen)
            self._line.at(state.global_step, float(logs["loss"]), tokens, logs.get("learning_rate"))
        if "eval_loss" in logs and self.shown and state.is_world_process_zero:
            say(f"{self.title} {state.global_step}/{state.max_steps}: held-out loss {logs['eval_loss']:.4f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The loop is over."""
        self.seconds = time.monotonic() - self._began
        self.cpu_seconds = time.process_time() - self._cpu_began
        if self._line is not None:
            self._line.__exit__(None, None, None)


def curve_of(history: list[dict[str, Any]]) -> list[CurvePoint]:
    """transformers' log as a curve: one point for each step, whatever was measured there."""
    points: dict[int, dict[str, float]] = {}
    names = {"loss": "loss", "eval_loss": "held_out", "learning_rate": "learning_rate"}
    for entry in history:
        here = points.setdefault(int(entry["step"]), {})
        here |= {new: float(entry[old]) for old, new in names.items() if old in entry}
    return [CurvePoint(step=step, **found) for step, found in sorted(points.items()) if found]
