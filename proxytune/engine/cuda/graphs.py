"""CUDA graphs of the decoding step: captured once per (rows, kind of drafts, sampling), then replayed.

A step is hundreds of small kernels, and launching them one by one takes longer than running them. All graphs
share one memory pool, since only one runs at a time; nothing that outlives a step lies in it. On other
devices the step runs as it is, which is how it is tested here.

Not run on a GPU so far: capture, replay, the choice of parallel branches and the check for host
synchronisation were written without one at hand. That a step reads no value and touches no tensor off its
device is tested on torch's `meta` device."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from proxytune.engine.cuda.sampling import SamplingNeeds
from proxytune.engine.cuda.state import DeviceState, Widths, bucket
from proxytune.engine.cuda.step import Branches, DeviceStep, Logits, in_turn
from proxytune.engine.kv.pages import PagedCache
from proxytune.engine.speculative.draft_length import Ahead

CAPTURED = {"cuda"}
"""Types of devices on which steps are captured; elsewhere they run as they are."""
TIMED = 5
"""Replays by which branches in parallel and in turn are compared."""


class Refused(Exception):
    """The step cannot be captured: some model waits for the device in it."""


class StepShape(NamedTuple):
    """What a graph is made for."""

    rows: int
    ahead: Ahead
    needs: SamplingNeeds


@dataclass(frozen=True)
class Captured:
    """A graph, and where it leaves its output: [rows, 3k + 3], a packed `StepOutput`."""

    graph: torch.cuda.CUDAGraph
    output: Tensor


class Graphs:
    """The state of one ensemble's batch on the device, and the graphs that move it."""

    def __init__(self, step: DeviceStep, device: torch.device, parallel: bool | None = None) -> None:
        """`parallel`: models that do not wait for each other run at the same time; None measures what is
        faster when the first graph is made."""
        self.step, self.device, self.parallel = step, device, parallel
        self.refused: str | None = None
        self.state: DeviceState | None = None
        self.captured: dict[StepShape, Captured] = {}
        self._pool: Any = None
        if device.type in CAPTURED:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self.sides = [torch.cuda.Stream(device) for _ in step.verifiers]  # type: ignore[no-untyped-call]

    def room_for(self, need: Widths, rows: int) -> DeviceState:
        """The state, at least so wide and with so many rows. New buffers make the graphs void."""
        state = self.state
        if state is None or rows > state.rows or need.join(state.widths) != state.widths:
            if state is not None:
                need, rows = need.join(state.widths), max(rows, state.rows)
            caches = {n: r.cache for n, r in self.step.runners.items() if isinstance(r.cache, PagedCache)}
            size = self.step.runners[self.step.target].alignment.size
            self.captured.clear()
            self._pool = None  # it goes with its graphs
            self.state = state = DeviceState(caches, self.step.target, bucket(rows), need, size, self.device)
        return state

    @property
    def made(self) -> int:
        """How many graphs there are."""
        return len(self.captured)

    def ready(self, shape: StepShape) -> bool:
        """Whether `run` will not have to make a graph first."""
        return self.device.type not in CAPTURED or shape in self.captured

    def run(self, shape: StepShape) -> Tensor:
        """One step of the first rows of the state -> its output, packed, on the device and not yet there.

        Raises Refused, with the state as it was, if the step cannot be captured."""
        assert self.state is not None
        if self.device.type not in CAPTURED:
            return self.step(self.state.views(shape.rows), shape.ahead, shape.needs).packed()
        if shape not in self.captured:
            self.prepare(shape)
        captured = self.captured[shape]
        captured.graph.replay()
        return captured.output

    def prepare(self, shape: StepShape) -> None:
        """Make the graph of a shape, on a batch in which nothing moves. Large ones first: the small ones then
        find their memory in the pool."""
        assert self.state is not None
        moving = self.state.moving.clone()
        self.state.moving.zero_()
        try:
            if self.parallel is None:
                both = {True: self._capture(shape, self.forked), False: self._capture(shape, in_turn)}
                self.parallel = seconds(both[True].graph) < seconds(both[False].graph)
                self.captured[shape] = both[self.parallel]
            else:
                self.captured[shape] = self._capture(shape, self.forked if self.parallel else in_turn)
        finally:
            self.state.moving.copy_(moving)

    def _capture(self, shape: StepShape, branches: Branches) -> Captured:
        assert self.state is not None
        batch = self.state.views(shape.rows)
        output = torch.zeros(shape.rows, 3 * shape.ahead.k + 3, dtype=torch.long, device=self.device)

        def once() -> None:
            output.copy_(self.step(batch, shape.ahead, shape.needs, branches).packed())

        main = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(main)
        try:
            with torch.cuda.stream(self._stream):
                once()  # kernels are compiled and libraries make up their minds
                without_waiting(once)
        finally:
            main.wait_stream(self._stream)  # before anybody changes the state
        graph = torch.cuda.CUDAGraph()
        try:
            with _refusing(), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                once()
        finally:
            torch.cuda.set_stream(main)  # a capture that fails does not go back to it
        self._pool = self._pool or graph.pool()
        return Captured(graph, output)

    def forked(self, branches: Sequence[Callable[[], Logits]]) -> list[Logits]:
        """The first branch on this stream, the others beside it."""
        main, found = torch.cuda.current_stream(self.device), []
        beside = list(zip(self.sides, branches[1:], strict=False))
        for stream, branch in beside:
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                found.append(branch())
        found.insert(0, branches[0]())
        for stream, _ in beside:
            main.wait_stream(stream)
        return found


@contextmanager
def _refusing() -> Iterator[None]:
    """What CUDA does not allow in a graph becomes Refused; memory that runs out stays what it is."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise Refused(str(error).splitlines()[0]) from error


def without_waiting(function: Callable[[], None]) -> None:
    """Run a function in which the host may not wait for the device; Refused if it does."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it does not see every wait
        torch.cuda.set_sync_debug_mode("error")
    try:
        with _refusing():
            function()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def seconds(graph: torch.cuda.CUDAGraph) -> float:
    """The best time of a few replays."""
    best = float("inf")
    for _ in range(TIMED):
        torch.cuda.synchronize()
        began = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best
