"""Decoding in steps that live on the device: the host starts a step, and reads the output of the last one.

While the rows that decode stay the same, the next step is started before the last one is read, so that the
device never waits: what a step needs to know of the one before is already there. The prompts of other rows
are computed behind such steps, until one of them is to decode. The host is one step behind, and for two steps
every row has pages. A stop found in the text ends its row late: the in-flight step still decodes it,
and that output is dropped. When a row ends, the in-flight step is read before anything else is planned.

The tokens are those of the engine's own steps. Prompt lookup drafts for all models here, never for
the expert alone: how far that agrees would be known too late."""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from proxytune.engine.cuda.graphs import Graphs, Refused, StepShape
from proxytune.engine.cuda.state import MOST_NEW, Widths, bucket, sampling_needs
from proxytune.engine.cuda.step import StepOutput
from proxytune.engine.kv.pages import PagedCache
from proxytune.engine.request import Plan, Request, Row, Segment
from proxytune.engine.runners.runner import ModelRunner, Runner
from proxytune.engine.sampling import pick
from proxytune.engine.scheduler import Scheduler
from proxytune.engine.speculative.draft_length import Ahead
from proxytune.engine.speculative.drafter import Drafter, Drafts, Speculation

DEVICES = {"cuda"}
"""Types of devices on which steps run this way. Elsewhere it is right too (the tests say so), but slower."""


def steps_on_device(runners: Mapping[str, Runner], settings: Speculation) -> bool:
    """Whether these models can decode this way: our attention over pages, one device, one id per token."""
    if settings.pick is not pick and settings.propose is None:
        return False
    devices = set[torch.device]()
    for runner in runners.values():
        if not isinstance(runner, ModelRunner) or not isinstance(runner.cache, PagedCache):
            return False
        devices |= runner.devices
        if runner.alignment.longest > 1:
            return False
    return len(devices) == 1 and devices.pop().type in DEVICES


@dataclass
class InFlightStep:
    """A step that was started and not read yet."""

    rows: list[Row]
    waiting: int
    """Requests that waited when it was started."""
    shape: StepShape
    output: Tensor
    """Packed, in the host's memory; complete once `copied`."""
    copied: torch.cuda.Event | None
    began: float
    alone: bool
    """Whether no prompts were computed beside it."""
    steady: bool
    """Whether it was started before the step before it was read."""


class StepResult(NamedTuple):
    """The output of a step, for the scheduler's rows as they are now."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    drafts: Drafts
    views: list[Tensor]
    """Packed `TokenViews` of every row's tokens."""


class DeviceLoop:
    """Starts steps and reads them, one late."""

    def __init__(self, scheduler: Scheduler, drafter: Drafter, graphs: Graphs) -> None:
        self.scheduler, self.drafter, self.graphs = scheduler, drafter, graphs
        self.in_flight: deque[InFlightStep] = deque()
        self.ahead = Ahead(0)
        self._widths = Widths()
        self._wishes: list[list[int]] = []
        self._collected = 0.0
        self._prompts = False
        """Whether prompts were computed after the last step that was planned."""

    def expect(self, request: Request) -> None:
        """A request will come: the state has to be wide enough for it."""
        self._widths = self._widths.join(Widths.of(request))

    def abandon(self) -> None:
        """The rows are gone. What is in flight is not read; what is computed next comes after it."""
        self.in_flight.clear()
        self._prompts = False
        if self.graphs.state is not None:
            self.graphs.state.forget()

    def depths(self, rows: Sequence[Row]) -> list[list[int]]:
        """What the scheduler is to make room for: this step and the one after it, or else this step."""
        if self.graphs.refused is not None:
            return [self.drafter.depths(rows)]
        self.ahead = self._choose(rows)
        room = [row.request.max_new_tokens - len(row.tokens) for row in rows]
        self._wishes = [
            [min(most, left - 1) for left in room] for most in (2 * self.ahead.k + 1, self.ahead.k)
        ]
        return self._wishes

    def _choose(self, rows: Sequence[Row]) -> Ahead:
        """How the next step drafts; the host knows the rows as the last step that it read left them."""
        drafter, draft_length = self.drafter, self.drafter.draft_length
        alone = not drafter.draft_models
        if not rows or (alone and not drafter.settings.lookup):
            return Ahead(0)
        if drafter.settings.k is not None:
            k = min(drafter.settings.k, MOST_NEW - 1)
            return Ahead(k, lookup=alone and k > 0)
        matched = sum(bool(drafter.look_up(row, 1)) for row in rows) if drafter.watches(len(rows)) else 0
        return draft_length.steps.choose(
            bucket(len(rows)),
            None if alone else draft_length.acceptance.value,
            matched / len(rows),
            draft_length.lookup_acceptance.value,
        )

    def start(self, plan: Plan) -> bool:
        """Start the planned step, without drafts where there is no room for them; False if the models cannot
        be captured."""
        if self.graphs.refused is not None:
            if self.graphs.state is not None:
                self.graphs.state.forget()
            return False
        ahead = self.ahead if list(plan.depths) in self._wishes else Ahead(0)
        rows, most = self.scheduler.rows[: plan.decoding], plan.decoding
        if ahead.k == 0 or self.drafter.settings.k is not None:  # else another size drafts otherwise
            most = min(self.scheduler.max_rows, len(self.scheduler.rows) + len(self.scheduler.waiting))
        need = reduce(Widths.join, (Widths.of(row.request) for row in rows))
        shape = StepShape(bucket(len(rows)), ahead, sampling_needs(rows), need)
        shape = self.graphs.fit(shape, self.scheduler.max_rows, self._widths)
        assert self.graphs.state is not None
        self.graphs.state.fill(rows)
        try:
            larger = () if self.graphs.full else (bucket(most),)
            for size in dict.fromkeys((*larger, shape.rows)):
                if not self.graphs.ready(shape._replace(rows=size)):
                    self.graphs.prepare(shape._replace(rows=size))
        except Refused as reason:
            self.graphs.refused = str(reason)
            warnings.warn(f"decoding without CUDA graphs, which is slower: {reason}", stacklevel=2)
            return False
        prompts = any(plan.prefill.values())
        self.launch(list(rows), shape, alone=not (prompts or self._prompts))
        self._prompts = prompts
        return True

    def launch(self, rows: list[Row], shape: StepShape, *, alone: bool, steady: bool = False) -> None:
        began = time.perf_counter()
        on_device, copied = self.graphs.run(shape), None
        if on_device.is_cuda:
            output = torch.empty(on_device.shape, dtype=on_device.dtype, pin_memory=True)
            output.copy_(on_device, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        else:
            output = on_device.clone()  # the next step writes over it
        self.drafter.draft_length.steps.started += 1
        waiting = len(self.scheduler.waiting)
        self.in_flight.append(InFlightStep(rows, waiting, shape, output, copied, began, alone, steady))

    def follow(self) -> Mapping[str, tuple[Segment, ...]]:
        """Start the next step before the last is read, if no row joined it or left it and there are pages.
        -> the prompt tokens that are to be computed behind it; they have pages too."""
        last, scheduler = self.in_flight[-1], self.scheduler
        count = len(last.rows)
        if last.rows != scheduler.rows[:count] or last.waiting != len(scheduler.waiting):
            return {}
        if scheduler.joining(count):
            return {}
        if all(row.request.max_new_tokens - len(row.tokens) <= 1 for row in last.rows):
            return {}  # the in-flight step chooses the last tokens
        shape = last.shape._replace(ahead=self._choose(last.rows))
        if not self.graphs.ready(shape):
            return {}
        both = last.shape.ahead.k + 1 + shape.ahead.k + 1
        growth = [min(both, row.request.max_new_tokens - len(row.tokens)) for row in last.rows]
        prefill, state = scheduler.prefill(count), self.graphs.state
        assert state is not None
        before = [len(table) for cache in state.caches.values() for table in cache.tables[:count]]
        if not scheduler.make_room({name: growth for name in scheduler.caches}, prefill):
            return {}
        if before != [len(table) for cache in state.caches.values() for table in cache.tables[:count]]:
            state.fill_tables()
        prompts = any(prefill.values())
        self.launch(last.rows, shape, alone=not (prompts or self._prompts), steady=True)
        self._prompts = prompts
        return prefill

    def collect(self) -> StepResult:
        """Read the oldest step. The caches know its tokens from then on; rows that have ended or are new
        since have none."""
        step = self.in_flight.popleft()
        if step.copied is not None:
            step.copied.synchronize()
        self._time(step)
        output = StepOutput.unpacked(step.output, step.shape.ahead.k)
        counts, tokens, drafts, logprobs = (part.tolist() for part in output[:4])
        place = {row: index for index, row in enumerate(step.rows)}
        looked_up = step.shape.ahead.lookup
        result = StepResult([], [], Drafts([], {}, () if looked_up else self.drafter.draft_models), [])
        for index, row in enumerate(self.scheduler.rows):
            at = place.get(row)
            count = 0 if at is None else counts[at]
            result.tokens.append([] if at is None else tokens[at][:count])
            result.logprobs.append([] if at is None else logprobs[at][:count])
            result.drafts.tokens.append([] if at is None else _counted(row, drafts[at]))
            result.views.append(output.views[at or 0, :count])
            for rows in self.graphs.state.caches.values() if self.graphs.state else ():
                rows.commit(index, count)
        return result

    def _time(self, step: InFlightStep) -> None:
        """In a steady flow a step takes as long as from one collected step to the next."""
        began, self._collected = self._collected if step.steady else step.began, time.perf_counter()
        if step.alone:
            self.drafter.draft_length.steps.add(step.shape.rows, step.shape.ahead, self._collected - began)


def _counted(row: Row, drafts: list[int]) -> list[int]:
    """The drafts that could have been accepted: up to an end, and short of the limit, where no draft is asked
    for; none where prompt lookup found nothing."""
    drafts = drafts[: max(0, row.request.max_new_tokens - len(row.tokens) - 1)]
    drafts = drafts[: next((n for n, token in enumerate(drafts) if token < 0), len(drafts))]
    ended = next((n for n, token in enumerate(drafts, 1) if token in row.request.eos), len(drafts))
    return drafts[:ended]
