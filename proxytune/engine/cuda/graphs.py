"""CUDA graphs of the decoding step: captured once per shape (rows, drafts, sampling, widths), then replayed.

A step is hundreds of small kernels, and launching them one by one takes longer than running them. All graphs
share one memory pool, since only one runs at a time; nothing that outlives a step lies in it. Graphs take
memory of their own, so only the most recent are kept, and a step for whose graph there is no memory runs as
it is. So does every step on other devices, which is how it is tested here.

Not run on a GPU so far: capture, replay, the choice of parallel branches and the check for host
synchronisation were written without one at hand. That a step reads no value and touches no tensor off its
device is tested on torch's `meta` device."""

from __future__ import annotations

import gc
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
MOST_GRAPHS = 32
"""Graphs that are kept; the one that was not used for longest makes room."""
KERNEL_BYTES = 15 << 10
"""Memory that a graph takes per kernel of a plain step: about 10 kB, and a half more for what draft models
run again."""
FUSED_LAYER, OTHER_LAYER = 12, 43
"""Kernels of a step per layer of its models, with `FusedForward` and without (benchmarks/floor.py counts
them)."""
NO_MEMORY = ("out of memory", "ALLOC_FAILED")
"""How CUDA says so where it is not torch's allocator that asks."""


def reserve(kernels: int) -> int:
    """Bytes that the graphs of steps of so many kernels may come to take."""
    return MOST_GRAPHS * KERNEL_BYTES * kernels


class Refused(Exception):
    """The step cannot be captured: some model waits for the device in it."""


class StepShape(NamedTuple):
    """What a graph is made for."""

    rows: int
    ahead: Ahead
    needs: SamplingNeeds
    widths: Widths
    """Those of its state: the one whose buffers it reads and writes."""


@dataclass(frozen=True)
class Captured:
    """A graph, and where it leaves its output, a packed `StepOutput`."""

    graph: torch.cuda.CUDAGraph
    output: Tensor


class Graphs:
    """The state of one ensemble's batch on the device, and the graphs that move it."""

    def __init__(self, step: DeviceStep, device: torch.device, parallel: bool | None = None) -> None:
        """`parallel`: models that do not wait for each other run at the same time; None measures what is
        faster when the first graph is made."""
        self.step, self.device, self.parallel = step, device, parallel
        self.refused: str | None = None
        self.states: dict[Widths, DeviceState] = {}
        self.state: DeviceState | None = None
        """The one that the last step was for."""
        self.captured: dict[StepShape, Captured] = {}
        """The one that was used last comes last."""
        self.dropped: set[StepShape] = set()
        """For whose graphs there was no memory."""
        self.most = MOST_GRAPHS
        self._pool: Any = None
        if device.type in CAPTURED:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self.sides = [torch.cuda.Stream(device) for _ in step.verifiers]  # type: ignore[no-untyped-call]

    def fit(self, shape: StepShape, rows: int, expected: Widths) -> StepShape:
        """The shape with the widths of a state that serves it, which becomes the current one. It is at least
        as wide as the shape says, and has room for `rows` rows.

        Best is one for which the graph is made already. Otherwise it is wide enough for what is `expected`,
        so that the graph will serve longer. A wider request gets a state of its own: graphs of narrower ones
        stay as they are, for batches that fit them."""
        there = sorted((w for w, s in self.states.items() if s.rows >= rows), key=lambda w: w.pages)
        wide, wider = shape.widths, shape.widths.join(expected)
        made = (w for w in there if wide.join(w) == w and shape._replace(widths=w) in self.captured)
        enough = (w for w in there if wider.join(w) == w)
        widths = next(made, None) or next(enough, None) or wider
        state = self.states.get(widths)
        if state is None or state.rows < rows:
            state = self._new_state(widths, rows)
        if state is not self.state:
            state.forget()  # the rows went on in another
            self.state = state
        return shape._replace(widths=widths)

    def _new_state(self, widths: Widths, rows: int) -> DeviceState:
        for shape in [shape for shape in self.captured if shape.widths == widths]:
            self._drop(shape)  # of a state with fewer rows
        needed = {shape.widths for shape in self.captured}
        self.states = {w: state for w, state in self.states.items() if w in needed}
        caches = {n: r.cache for n, r in self.step.runners.items() if isinstance(r.cache, PagedCache)}
        size = self.step.runners[self.step.target].alignment.size
        state = DeviceState(caches, self.step.target, bucket(rows), widths, size, self.device)
        self.states[widths] = state
        return state

    def _drop(self, shape: StepShape) -> None:
        del self.captured[shape]
        if not self.captured:
            self._pool = None  # it goes with its graphs

    @property
    def made(self) -> int:
        """How many graphs there are."""
        return len(self.captured)

    @property
    def full(self) -> bool:
        """Whether a further graph would take the place of another."""
        return len(self.captured) >= self.most

    def ready(self, shape: StepShape) -> bool:
        """Whether `run` will not have to make a graph first."""
        return self.device.type not in CAPTURED or shape in self.captured or shape in self.dropped

    def run(self, shape: StepShape) -> Tensor:
        """One step of the first rows of the state -> its output, packed, on the device and not yet there.

        Raises Refused, with the state as it was, if the step cannot be captured."""
        if not self.ready(shape):
            self.prepare(shape)
        captured = self.captured.pop(shape, None)
        if captured is None:
            return self.step(self.states[shape.widths].views(shape.rows), shape.ahead, shape.needs).packed()
        self.captured[shape] = captured
        captured.graph.replay()
        return captured.output

    def prepare(self, shape: StepShape) -> None:
        """Make the graph of a shape, on a batch in which nothing moves. Large ones first: the small ones then
        find their memory in the pool. Where there is no memory, older graphs make room; where that is not
        enough, steps of this shape run without one."""
        while self.full:
            self._drop(next(iter(self.captured)))
        state = self.states[shape.widths]
        moving = state.moving.clone()
        state.moving.zero_()
        try:
            if not self._made(shape):
                self._make_room()
                self._made(shape)
        finally:
            state.moving.copy_(moving)
        if shape not in self.captured:
            self.dropped.add(shape)
            warnings.warn(
                f"no memory for a CUDA graph of {shape.rows} rows: such steps run without one, which is "
                "slower; a lower --kv-memory leaves room for it",
                stacklevel=2,
            )

    def _made(self, shape: StepShape) -> bool:
        """Make a graph; False if the memory does not suffice."""
        try:
            if self.parallel is None:
                both = {True: self._capture(shape, self.forked), False: self._capture(shape, in_turn)}
                self.parallel = seconds(both[True].graph) < seconds(both[False].graph)
                self.captured[shape] = both[self.parallel]
            else:
                self.captured[shape] = self._capture(shape, self.forked if self.parallel else in_turn)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            return False
        finally:
            torch.cuda.synchronize(self.device)  # whatever an exception left on one of the streams
        return True

    def _make_room(self) -> None:
        """Give up the older half of the graphs, and what the allocator keeps."""
        count = len(self.captured)
        for shape in list(self.captured)[: (count + 1) // 2]:
            self._drop(shape)
        if count:
            self.most = max(1, count // 2)
        gc.collect()
        torch.cuda.empty_cache()

    def _capture(self, shape: StepShape, branches: Branches) -> Captured:
        batch = self.states[shape.widths].views(shape.rows)
        width = self.step.output_width(shape.ahead.k)
        output = torch.zeros(shape.rows, width, dtype=torch.long, device=self.device)

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
            with _refusing(), uncollected(), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                once()
        finally:
            torch.cuda.set_stream(main)  # a capture that fails does not go back to it
        self._pool = self._pool or graph.pool()
        return Captured(graph, output)

    def forked(self, branches: Sequence[Callable[[], Logits]]) -> list[Logits]:
        """The first branch on this stream, the others beside it. This stream waits for them in any case: a
        capture cannot end before that, nor may a batch be changed."""
        main, found = torch.cuda.current_stream(self.device), []
        begun = list[torch.cuda.Stream]()
        try:
            for stream, branch in zip(self.sides, branches[1:], strict=False):
                stream.wait_stream(main)
                begun.append(stream)
                with torch.cuda.stream(stream):
                    found.append(branch())
            found.insert(0, branches[0]())
        finally:
            for stream in begun:
                main.wait_stream(stream)
        return found


@contextmanager
def _refusing() -> Iterator[None]:
    """What CUDA does not allow in a graph becomes Refused; memory that runs out stays what it is."""
    try:
        yield
    except RuntimeError as error:
        if ran_out(error):
            raise
        raise Refused(str(error).splitlines()[0]) from error


def ran_out(error: RuntimeError) -> bool:
    """Whether it is memory that is missing: for torch's allocator, for CUDA itself or for one of its
    libraries, or before that, where a capture then could not be ended either."""
    return (
        isinstance(error, torch.OutOfMemoryError)
        or isinstance(error.__context__, torch.OutOfMemoryError)
        or any(words in str(error) for words in NO_MEMORY)
    )


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect what is dead now, and nothing for a while: to free a graph, or what it used, is not allowed
    while another is captured."""
    enabled = gc.isenabled()
    gc.disable()
    gc.collect()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


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
