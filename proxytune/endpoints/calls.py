"""Calls to an endpoint: so many at a time, each within the budget before it is sent, failed ones again."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from proxytune.endpoints.endpoint import CallFailed, CallLimits

T = TypeVar("T")
"""What a call brings."""


class CallsEnded(Exception):
    """Why no more calls are made, in words."""

    def __init__(self, reason: str, *, money: bool) -> None:
        super().__init__(reason)
        self.money = money
        """Whether it is the limit on the cost."""


@dataclass(frozen=True)
class CallResult(Generic[T]):
    """What became of a call."""

    result: T | CallFailed
    usd: float
    """What it cost: as reported, or estimated where it may have cost something and nothing was reported."""


@dataclass
class Budget:
    """What may be spent, what is spent, and what the calls in flight may cost."""

    limit: float | None
    """US dollars; None is no limit."""
    spent: float = 0.0
    in_flight: float = 0.0
    settled: int = 0
    excess: float = 1.0
    """By how much the dearest call passed its estimate: an endpoint may count otherwise than we do."""

    def need(self, estimate: float) -> float:
        """What a call may cost, as far as we know this endpoint."""
        return estimate * self.excess

    def affords(self, need: float) -> bool:
        """Whether one more call cannot pass the limit."""
        return self.limit is None or self.spent + self.in_flight + need <= self.limit

    def settle(self, reserved: float, estimate: float, usd: float) -> None:
        """A call has ended."""
        self.in_flight -= reserved
        self.spent += usd
        self.settled += 1
        if estimate > 0:
            self.excess = max(self.excess, usd / estimate)


@dataclass(frozen=True)
class _Sent:
    """A call in flight."""

    place: int
    retry: int
    estimate: float
    reserved: float


@dataclass
class CallQueue(Generic[T]):
    """Asks for things by their number. Everything but `send` runs in the caller's thread."""

    send: Callable[[int], CallResult[T]]
    """One call. It keeps what it brought before it returns, so that a kill loses only calls in flight."""
    estimate: Callable[[int], float]
    """US dollars that a call may cost at most."""
    budget: Budget
    workers: int
    limits: CallLimits
    _new: deque[int] = field(default_factory=deque)
    _again: list[tuple[float, int, int]] = field(default_factory=list)
    """Failed ones, (when, which, how many retries), the next first. Each keeps its worker's place, so that an
    endpoint in trouble is not asked for more."""
    _running: dict[Future[CallResult[T]], _Sent] = field(default_factory=dict)

    def replies(self, places: Iterable[int]) -> Iterator[tuple[int, T]]:
        """The replies as they come. When a call fails for good, or the next could pass the limit, those in
        flight are awaited, and then CallsEnded says why."""
        self._new.extend(places)
        stopped: CallsEnded | None = None
        with ThreadPoolExecutor(self.workers) as pool:
            while self._running or (stopped is None and (self._new or self._again)):
                if stopped is None:
                    stopped = self._send_more(pool)
                for sent, result in self._ended(until_next=stopped is None):
                    if not isinstance(result, CallFailed):
                        yield sent.place, result
                    elif result.again and sent.retry < self.limits.retries:
                        pause = self.limits.pause_before(sent.retry + 1, result.after)
                        entry = (time.monotonic() + pause, sent.place, sent.retry + 1)
                        heapq.heappush(self._again, entry)
                    elif stopped is None:
                        times = f" after {sent.retry} retries" if sent.retry else ""
                        stopped = CallsEnded(f"it failed{times}: {result.reason}", money=False)
        if stopped is not None:
            raise stopped

    def _next(self) -> tuple[int, int] | None:
        """What is to be sent now, and how many retries that makes; None if nothing is due."""
        # as many at once as have ended, and one more: little is lost to a kill, or to a price that surprises
        most = min(self.workers, 1 + self.budget.settled)
        if len(self._running) < most and self._again and self._again[0][0] <= time.monotonic():
            return self._again[0][1:]
        if len(self._running) + len(self._again) < most and self._new:
            return self._new[0], 0
        return None

    def _send_more(self, pool: ThreadPoolExecutor) -> CallsEnded | None:
        """Send what is due, as far as workers and money go; -> why nothing can be sent any more."""
        while (due := self._next()) is not None:
            place, retry = due
            estimate = self.estimate(place)
            reserved = self.budget.need(estimate)
            if not self.budget.affords(reserved):
                if self._running:
                    return None
                limit, spent = self.budget.limit, self.budget.spent
                return CallsEnded(
                    f"--max-cost {limit:g}: {spent:.4f} USD are spent, and the next call may cost "
                    f"{reserved:.4f}",
                    money=True,
                )
            if retry:
                heapq.heappop(self._again)
            else:
                self._new.popleft()
            self.budget.in_flight += reserved
            self._running[pool.submit(self.send, place)] = _Sent(place, retry, estimate, reserved)
        return None

    def _ended(self, *, until_next: bool) -> Iterator[tuple[_Sent, T | CallFailed]]:
        """Calls that have ended, after waiting for one, or until the next retry is due."""
        pause = None
        if until_next and self._again and len(self._running) < self.workers:
            pause = max(self._again[0][0] - time.monotonic(), 0.0)
        if not self._running:
            time.sleep(pause or 0.0)
            return
        for future in wait(self._running, timeout=pause or None, return_when=FIRST_COMPLETED).done:
            sent, outcome = self._running.pop(future), future.result()
            self.budget.settle(sent.reserved, sent.estimate, outcome.usd)
            yield sent, outcome.result
