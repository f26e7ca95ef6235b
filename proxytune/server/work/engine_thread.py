"""The one thread that touches models. It takes jobs from a queue between two steps, steps every role that has
responses, and posts what is new.

What goes wrong with a job ends that job. What goes wrong with a step ends the responses of its role, each
with an error; the next job finds an empty batch."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from proxytune.config import Role
from proxytune.decoding.open_batch import OpenBatch
from proxytune.errors import UserError
from proxytune.server.work.jobs import JobFault, ServedJob

LOG = logging.getLogger(__name__)
Event = tuple[int, object]
"""The place of a response or text in its job, and a Piece, a ScoredText or a JobFault; place -1 is the
job."""
Post = Callable[[Sequence[tuple[ServedJob, Sequence[Event]]]], None]
"""Hears what a step has brought, in the engine thread."""
WHOLE = -1


@dataclass(frozen=True)
class Deadline:
    """No response goes on after this time (`time.monotonic`)."""

    at: float


class EngineThread:
    """Decodes and scores what jobs ask for."""

    def __init__(self, batches: Mapping[Role, OpenBatch], post: Post) -> None:
        """`batches` belong to the thread from now on."""
        self.batches, self._post = batches, post
        self._inbox: queue.SimpleQueue[ServedJob | Deadline | None] = queue.SimpleQueue()
        self._jobs: dict[Role, list[ServedJob]] = {role: [] for role in batches}
        self._to_score: deque[tuple[ServedJob, int]] = deque()
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to take jobs."""
        self._thread.start()

    def put(self, job: ServedJob) -> None:
        """A job, to be started as soon as the step that goes on is over. A job that is put again is looked at
        again: it may have been cancelled."""
        self._inbox.put(job)

    def end_at(self, deadline: float) -> None:
        """Responses that are under way at this time (`time.monotonic`) end there, with an error."""
        self._inbox.put(Deadline(deadline))

    def close(self) -> None:
        """End everything and wait for the thread. Its caches are empty then."""
        if self._thread.is_alive():
            self._inbox.put(None)
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while self._take():
            for role, batch in self.batches.items():
                if batch.busy:
                    self._step(role, batch)
            if self._to_score:
                self._score(*self._to_score.popleft())
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._end_all(JobFault("the server shuts down", leaving=True))
        for batch in self.batches.values():
            batch.close()

    @property
    def _busy(self) -> bool:
        return bool(self._to_score) or any(batch.busy for batch in self.batches.values())

    def _take(self) -> bool:
        """Take in what has come, and wait for something where there is nothing to do. -> False at the end."""
        wait = not self._busy
        while True:
            try:
                found = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            if found is None:
                return False
            if isinstance(found, Deadline):
                self._deadline = found.at
            elif found.cancelled:
                self._drop(found)
            else:
                self._start(found)

    def _start(self, job: ServedJob) -> None:
        batch = self.batches[job.role]
        self._to_score.extend((job, place) for place in range(len(job.texts)))
        try:
            for place, asked in enumerate(job.responses):
                job.tickets[batch.submit(asked)] = place
        except Exception as error:
            if not isinstance(error, UserError):
                LOG.exception("a job could not be started")
            self._drop(job)
            self._post([(job, [(WHOLE, _fault(error))])])
            return
        if job.tickets:
            self._jobs[job.role].append(job)

    def _drop(self, job: ServedJob) -> None:
        """Nothing more is computed for a job."""
        job.cancelled = True
        for ticket in job.tickets:
            self.batches[job.role].cancel(ticket)
        job.tickets.clear()
        if job in self._jobs[job.role]:
            self._jobs[job.role].remove(job)
        self._to_score = deque(item for item in self._to_score if item[0] is not job)

    def _step(self, role: Role, batch: OpenBatch) -> None:
        try:
            pieces = batch.step()
        except Exception as error:
            LOG.exception("a step as %s failed: its responses are ended", role)
            self._end(role, JobFault(f"decoding failed: {type(error).__name__}"))
            return
        by_ticket = {piece.ticket: piece for piece in pieces}
        news = list[tuple[ServedJob, list[Event]]]()
        for job in list(self._jobs[role]):
            mine = job.tickets.keys() & by_ticket.keys()
            if not mine:
                continue
            news.append((job, [(job.tickets[ticket], by_ticket[ticket]) for ticket in sorted(mine)]))
            for ticket in mine:
                if by_ticket[ticket].finish_reason is not None:
                    del job.tickets[ticket]
            if not job.tickets:
                self._jobs[role].remove(job)
        if news:
            self._post(news)

    def _score(self, job: ServedJob, place: int) -> None:
        text = job.texts[place]
        try:
            found: object = self.batches[job.role].score(text.ids, text.alpha, text.ranked)
        except Exception as error:
            if not isinstance(error, UserError):
                LOG.exception("a text could not be scored")
            self._drop(job)
            found, place = _fault(error), WHOLE
        self._post([(job, [(place, found)])])

    def _end(self, role: Role, fault: JobFault) -> None:
        """All responses of a role end with a fault."""
        jobs = list(self._jobs[role])
        for job in jobs:
            self._drop(job)
        self._post([(job, [(WHOLE, fault)]) for job in jobs])

    def _end_all(self, fault: JobFault) -> None:
        for job in dict.fromkeys(job for job, _ in self._to_score):
            self._drop(job)
            self._post([(job, [(WHOLE, fault)])])
        for role in self.batches:
            self._end(role, fault)


def _fault(error: Exception) -> JobFault:
    """What is said of an exception: a UserError says it itself."""
    if isinstance(error, UserError):
        return JobFault(str(error), wrong=True)
    return JobFault(f"this request failed: {type(error).__name__}")
