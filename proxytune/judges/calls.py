"""Calls to an endpoint: so many at a time, each within the budget before it is sent, failed ones again."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from proxytune.judges.endpoint import CallFailed, CallLimits, Reply


class CallsEnded(Exception):
    """Why no more calls are made, in words."""

    def __init__(self, reason: str, *, money: bool) -> None:
        super().__init__(reason)
        self.money = money
        """Whether it is the limit on the cost."""


@dataclass(frozen=True)
class Outcome:
    """What became of a call."""

    result: Reply | CallFailed
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

    def affords(self, estimate: float) -> bool:
        """Whether one more call cannot pass the limit."""
        return self.limit is None or self.spent + self.in_flight + self.need(estimate) <= self.limit

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
class Calls:
    """Asks for things by their number. Everything but `send` runs in the caller's thread."""

    send: Callable[[int], Outcome]
    """One call. It keeps what it brought before it returns, so that a kill loses only calls in flight."""
    estimate: Callable[[int], float]
    """US dollars that a call may cost at most."""
    budget: Budget
    workers: int
    limits: CallLimits
    _waiting: list[tuple[float, int, int]] = field(default_factory=list)
    """(when, which, how many retries), the next first."""
    _running: dict[Future[Outcome], _Sent] = field(default_factory=dict)

    def replies(self, places: Sequence[int]) -> Iterator[tuple[int, Reply]]:
        """The replies as they come. When a call fails for good, or the next could pass the limit, those in
        flight are awaited, and then CallsEnded says why."""
        self._waiting = [(0.0, place, 0) for place in places]
        heapq.heapify(self._waiting)
        stopped: CallsEnded | None = None
        with ThreadPoolExecutor(self.workers) as pool:
            while self._running or (self._waiting and stopped is None):
                if stopped is None:
                    stopped = self._send_more(pool)
                for place, result, retry in self._ended(until_next=stopped is None):
                    if isinstance(result, Reply):
                        yield place, result
                    elif result.again and retry < self.limits.retries:
                        pause = self.limits.pause_before(retry + 1, result.after)
                        heapq.heappush(self._waiting, (time.monotonic() + pause, place, retry + 1))
                    else:
                        times = f" after {retry} retries" if retry else ""
                        stopped = stopped or CallsEnded(f"it failed{times}: {result.reason}", money=False)
        if stopped is not None:
            raise stopped

    def _send_more(self, pool: ThreadPoolExecutor) -> CallsEnded | None:
        """Send what is due, as far as workers and money go; -> why nothing can be sent any more."""
        # with a limit, only as many at once as have shown what they cost, and one more
        most = self.workers if self.budget.limit is None else min(self.workers, 1 + self.budget.settled)
        while self._waiting and len(self._running) < most and self._waiting[0][0] <= time.monotonic():
            _, place, retry = self._waiting[0]
            estimate = self.estimate(place)
            if not self.budget.affords(estimate):
                if self._running:
                    return None
                return CallsEnded(
                    f"--max-cost {self.budget.limit:g}: {self.budget.spent:.4f} USD are spent, and the next "
                    f"call may cost {self.budget.need(estimate):.4f}",
                    money=True,
                )
            heapq.heappop(self._waiting)
            reserved = self.budget.need(estimate)
            self.budget.in_flight += reserved
            self._running[pool.submit(self.send, place)] = _Sent(place, retry, estimate, reserved)
        return None

    def _ended(self, *, until_next: bool) -> Iterator[tuple[int, Reply | CallFailed, int]]:
        """Calls that have ended, after waiting for one, or until the next is due."""
        pause = None
        if until_next and self._waiting and len(self._running) < self.workers:
            pause = max(self._waiting[0][0] - time.monotonic(), 0.0)
        if not self._running:
            time.sleep(pause or 0.0)
            return
        for future in wait(self._running, timeout=pause or None, return_when=FIRST_COMPLETED).done:
            sent, outcome = self._running.pop(future), future.result()
            self.budget.settle(sent.reserved, sent.estimate, outcome.usd)
            yield sent.place, outcome.result, sent.retry
