"""What handlers call: jobs go to the engine thread, and their answers come back as events. All of it runs in
the event loop, but the making of contexts, which has a thread of its own."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from proxytune.config import Role, System
from proxytune.decoding.open_batch import OpenBatch
from proxytune.errors import UserError
from proxytune.options import ServeOptions
from proxytune.server.faults import RequestFault, broken, leaving
from proxytune.server.work.engine_thread import WHOLE, EngineThread, Event
from proxytune.server.work.jobs import JobFault, ServedJob
from proxytune.server.work.meters import Meters

Made = TypeVar("Made")
MOST_RETRY = 30
"""Seconds after which a client may come again, at most."""


class ServedAnswer:
    """The events of one job, as they come. Whoever stops reading it calls `close`: then nothing more is
    computed."""

    def __init__(self, job: ServedJob, service: Service) -> None:
        self.job, self._service = job, service
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._left = len(job.responses) + len(job.texts)

    @property
    def size(self) -> int:
        """Responses and texts that are still open."""
        return self._left

    def hear(self, events: Sequence[Event]) -> int:
        """Events from the engine thread. -> how many responses and texts ended."""
        before = self._left
        for place, what in events:
            self._events.put_nowait((place, what))
            if place == WHOLE:
                self._left = 0
            elif getattr(what, "finish_reason", True) is not None:  # a text that was scored has none
                self._left -= 1
        if self._left == 0:
            self._events.put_nowait(None)
        return before - self._left

    async def events(self) -> AsyncIterator[Event]:
        """(place, piece or scored text), until all have ended. RequestFault where the job has no result."""
        while (event := await self._events.get()) is not None:
            if isinstance(event[1], JobFault):
                raise _fault(event[1])
            yield event

    def waiting(self) -> bool:
        """Whether the next event is not here yet."""
        return self._events.empty()

    def close(self) -> None:
        """Nobody reads it any more; a second time does nothing."""
        self._service.release(self)


class Service:
    """A system that answers: one open batch per role that is served, an engine thread, and limits."""

    def __init__(
        self, system: System, batches: Mapping[Role, OpenBatch], options: ServeOptions, meters: Meters
    ) -> None:
        """`batches` are the engine thread's from now on."""
        self.system, self.options, self.meters = system, options, meters
        self.batches = batches
        self.roles = tuple(batches)
        self.created = int(time.time())
        self.draining = False
        """Whether no request is taken any more."""
        self._engine = EngineThread(batches, self._post)
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="prompts")
        self._answers = dict[ServedJob, ServedAnswer]()
        self._open = 0
        self._rows = max(batch.decoder.max_batch for batch in batches.values())
        self._seconds = 1.0  # of a response, lately
        self._loop: asyncio.AbstractEventLoop | None = None

    # From start to end

    def start(self) -> None:
        """Begin to answer, in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self.meters.watch(self.batches)
        self._engine.start()

    def drain(self) -> None:
        """Take no more requests; those under way have a while to finish."""
        if not self.draining:
            self.draining = True
            self._engine.end_at(time.monotonic() + self.options.shutdown_seconds)

    def close(self) -> None:
        """End everything. It blocks until the step that goes on is over."""
        self.draining = True
        self._engine.close()
        self._preparing.shutdown(wait=True, cancel_futures=True)

    @property
    def alive(self) -> bool:
        """Whether it answers."""
        return self._engine.alive and not self.draining

    # Models

    def role_of(self, model: str) -> Role:
        """The role of a served model's name. RequestFault for another name."""
        known = self.models
        found = known.get(model)
        if found is None:
            raise RequestFault(
                404,
                f"the model '{model}' does not exist: there are {', '.join(known)}",
                kind="not_found_error",
                param="model",
                code="model_not_found",
            )
        return found

    @property
    def models(self) -> dict[str, Role]:
        """Name -> role. The proxy has the system's name; without it the first role has."""
        name = self.system.name
        own: dict[str, Role] = {f"{name}/{role}": role for role in self.roles if role != "proxy"}
        return {name: "proxy", **own} if "proxy" in self.roles else own

    @property
    def first_model(self) -> str:
        """The model that is meant where none is named."""
        return next(iter(self.models))

    # Jobs

    async def prepare(self, make: Callable[[], Made]) -> Made:
        """Run what reads texts (tokenizers, templates) where it disturbs nobody. RequestFault for bad
        input."""
        assert self._loop is not None
        try:
            return await self._loop.run_in_executor(self._preparing, make)
        except UserError as error:
            raise RequestFault(400, str(error)) from None

    async def ask(self, count: int, make: Callable[[], ServedJob]) -> ServedAnswer:
        """Start a job of `count` responses and texts. RequestFault where there is no room for it, or its
        input is bad."""
        self._reserve(count)
        try:
            job = await self.prepare(make)
        except BaseException:
            self._open -= count
            raise
        answer = ServedAnswer(job, self)
        self._open += answer.size - count
        if answer.size:
            self._answers[job] = answer
            self._engine.put(job)
        else:
            answer.hear([])
        return answer

    def _reserve(self, count: int) -> None:
        if self.draining:
            raise leaving()
        most = self._rows + self.options.max_waiting
        if count > most:
            raise RequestFault(400, f"the request asks for {count} responses: at most {most} fit")
        if self._open + count > most:
            self.meters.refused.inc()
            raise RequestFault(
                429,
                f"{self._open} responses are under way or wait, and at most {most} may: try again later",
                kind="rate_limit_error",
                code="server_busy",
                retry_after=self._retry_after(),
            )
        self._open += count

    def _retry_after(self) -> int:
        """Seconds until about one response has ended."""
        return max(1, min(MOST_RETRY, math.ceil(self._seconds / max(1, self._rows))))

    def release(self, answer: ServedAnswer) -> None:
        """Nobody waits for an answer any more."""
        if self._answers.pop(answer.job, None) is not None and answer.size:
            self._open -= answer.size
            answer.job.cancelled = True
            self._engine.put(answer.job)

    # Events

    def _post(self, news: Sequence[tuple[ServedJob, Sequence[Event]]]) -> None:
        """Called in the engine thread."""
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hear, news)

    def _hear(self, news: Sequence[tuple[ServedJob, Sequence[Event]]]) -> None:
        for job, events in news:
            answer = self._answers.get(job)
            if answer is not None:
                self._open -= answer.hear(events)
                if answer.size == 0:
                    del self._answers[job]

    @property
    def open(self) -> int:
        """Responses and texts that are asked for and have not ended."""
        return self._open

    def took(self, seconds: float) -> None:
        """A response took so long."""
        self._seconds += 0.1 * (seconds - self._seconds)


def _fault(fault: JobFault) -> RequestFault:
    """A job's fault as it is answered."""
    if fault.leaving:
        return leaving()
    return RequestFault(400, fault.message) if fault.wrong else broken(fault.message)
