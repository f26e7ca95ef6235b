"""What a person sees on stderr as a run goes on: a live bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

from proxytune.records import UNSCORED
from proxytune.terminal.text import say, visible
from proxytune.terminal.time_left import WorkSoFar

LOG_SECONDS = 10.0
NAME, BAR, GAPS = 26, 12, 2
"""Columns of the live line: its title at most, its bar, and what is between its parts."""


class Progress:
    """Examples done, tokens per second (of decoding alone) or seconds per item, time left and the running
    score of one run; a context manager."""

    def __init__(self, title: str, score: str, shown: bool = True) -> None:
        self.title = title
        self.score = score
        self.shown = shown
        self.total = self.done = self.here = 0
        self.scores: list[float] = []
        self.work: Callable[[], WorkSoFar] = WorkSoFar
        self._left: float | None = None
        self.began = time.monotonic()
        self._bar: Bar | None = None
        self._ended = threading.Event()
        self._log: threading.Thread | None = None

    def note(self, text: str) -> None:
        """Something worth knowing that is no error."""
        if self.shown:
            self._line(f"note: {text}")

    def begin(self, total: int, done: int, scores: Sequence[float], work: Callable[[], WorkSoFar]) -> None:
        """Start the clock for `total` examples, of which `done` with these scores are from before.

        `work` gives what is known of the sequences of this session.
        """
        self.total, self.done, self.scores, self.work = total, done, list(scores), work
        self.began = time.monotonic()
        console = Console(stderr=True)
        if self.shown and console.is_terminal:
            name = TextColumn(
                "{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=NAME)
            )
            title = visible(self.title)
            bar = BarColumn(bar_width=BAR, table_column=Column(no_wrap=True, width=BAR))
            room = console.width - min(cell_len(title), NAME) - BAR - GAPS
            self._bar = Bar(name, bar, _LineColumn(self, room), console=console, transient=True)
            self._bar.add_task(title, total=total, completed=self.done)
            self._bar.start()
        elif self.shown:
            self._log = threading.Thread(target=self._keep_log, daemon=True)
            self._log.start()

    def _keep_log(self) -> None:
        """A line now and then, also while no example is finished yet."""
        while not self._ended.wait(LOG_SECONDS):
            self._line(f"{self.title}: {self.line()}")

    def advance(self, score: float | None) -> None:
        """One more example is finished."""
        self.done += 1
        self.here += 1
        if score is not None:
            self.scores.append(score)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done)

    def line(self, *, ended: bool = False, room: int | None = None) -> str:
        """The state in one line. What does not fit into `room` columns is left out: first the speed."""
        work = self.work()
        parts = {"done": f"{self.done}/{self.total}"}
        if work.scoring and self.here:
            parts["item"] = f"{work.prefill_seconds / self.here:.2f} s/item"
        if work.tokens_per_second is not None:
            parts["speed"] = f"{work.tokens_per_second:.0f} tokens/s"
        if not ended and (left := self._seconds_left(work)) is not None:
            parts["left"] = f"{clock(left)} left"
        if self.scores and self.score not in UNSCORED:
            parts["score"] = f"{self.score} {sum(self.scores) / len(self.scores):.3f}"
        if work.spent:
            parts["spent"] = work.spent
        if ended:
            parts["took"] = clock(time.monotonic() - self.began)
        for least in ("speed", "item", "score", "left"):
            if room is None or cell_len(", ".join(parts.values())) <= room:
                break
            parts.pop(least, None)
        return ", ".join(parts.values())

    def _seconds_left(self, work: WorkSoFar) -> float | None:
        """The estimate, or an earlier one that was lower: what is shown never grows."""
        found = work.seconds_left()
        if found is not None:
            self._left = found if self._left is None else min(self._left, found)
        return self._left

    def _line(self, text: str) -> None:
        say(text)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._log is not None:
            self._log.join()
        if self._bar is not None:
            self._bar.stop()
        if self.shown and self.here and kind is None:
            self._line(f"{self.title}: {self.line(ended=True)}")


class _LineColumn(ProgressColumn):
    """The state, read whenever the bar is drawn."""

    max_refresh = 0.5

    def __init__(self, progress: Progress, room: int) -> None:
        super().__init__(Column(no_wrap=True))
        self.progress = progress
        self.room = room

    def render(self, task: Task) -> Text:
        """The cell."""
        return Text(visible(self.progress.line(room=self.room)))


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
