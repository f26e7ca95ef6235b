"""What a person sees while a run goes on, on stderr: a live bar in a terminal, a line now and then in a
log."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

LOG_SECONDS = 10.0


class Progress:
    """Examples done, tokens per second, time left and the running score of one run; a context manager."""

    def __init__(self, title: str, score: str, shown: bool = True) -> None:
        self.title = title
        self.score = score
        self.shown = shown
        self.total = self.done = self.here = self.tokens = 0
        self.scores: list[float] = []
        self.began = self.logged = time.monotonic()
        self._bar: Bar | None = None

    def note(self, text: str) -> None:
        """Something worth knowing that is no error."""
        if self.shown:
            print(f"note: {text}", file=sys.stderr, flush=True)

    def begin(self, total: int, done: int, scores: Sequence[float]) -> None:
        """Start the clock for `total` examples, of which an earlier session finished `done` with these
        scores."""
        self.total, self.done, self.scores = total, done, list(scores)
        self.began = self.logged = time.monotonic()
        console = Console(stderr=True)
        if self.shown and console.is_terminal:
            name, told = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[told]}")
            self._bar = Bar(name, BarColumn(bar_width=24), told, console=console, transient=True)
            self._bar.add_task(self.title, total=total, completed=self.done, told="")
            self._bar.start()

    def advance(self, score: float | None, tokens: int) -> None:
        """One more example is finished; `tokens` were generated in this session so far."""
        self.done += 1
        self.here += 1
        self.tokens = tokens
        if score is not None:
            self.scores.append(score)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, told=self.told())
        elif self.shown and time.monotonic() - self.logged > LOG_SECONDS:
            self.logged = time.monotonic()
            print(f"{self.title}: {self.told()}", file=sys.stderr, flush=True)

    def told(self) -> str:
        """The state in one line."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        left = seconds / self.here * (self.total - self.done) if self.here else 0.0
        score = f", {self.score} {sum(self.scores) / len(self.scores):.3f}" if self.scores else ""
        return f"{self.done}/{self.total}, {self.tokens / seconds:.0f} tokens/s, {clock(left)} left{score}"

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self.shown and self.here and kind is None:
            seconds = time.monotonic() - self.began
            told = self.told().replace(f", {clock(0)} left", "")
            print(f"{self.title}: {told}, {clock(seconds)}", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
