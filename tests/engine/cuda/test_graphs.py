"""Capture and replay without a GPU: the operations of a step are recorded once and carried out again on the
same memory, which is what a CUDA graph does. Nothing that Python knew at the time of a recording may matter.

Streams, events and the check for host synchronisation are stand-ins here; test_gpu runs the real ones."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from proxytune.config import Sampling, System
from proxytune.decoding.decoder import Decoder
from proxytune.engine.cuda import graphs
from proxytune.engine.cuda import loop as device_loop
from proxytune.engine.cuda.graphs import Refused, StepShape
from proxytune.engine.cuda.sampling import SamplingNeeds
from proxytune.engine.speculative.draft_length import Ahead
from proxytune.engine.speculative.drafter import Speculation
from proxytune.models.roles import Models
from tests.support import adapters, decoders
from tests.support.adapters import on_anti
from tests.support.decoders import SAMPLERS, check, decoder, ragged
from tests.support.on_device import Ways, as_on_a_device, drafting, graphs_of, nothing_read, on_launch


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """What is there already is no garbage: every capture collects first, and would look at all of it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def memory(values: Any) -> set[int]:
    return {v.untyped_storage().data_ptr() for v in tree_leaves(values) if isinstance(v, Tensor)}


class Recording(TorchDispatchMode):
    """Stands in for a CUDA graph."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.is_mutable or not memory(out) & memory((args, kwargs)):  # a view stays one
            self.operations.append((func, args, kwargs or {}, out))
        return out

    @torch.inference_mode()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)

    def pool(self) -> tuple[int, int]:
        return 0, 1


class Stream:
    """Stands in for a CUDA stream."""

    def __init__(self, device: object = None) -> None:
        self.waited: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)


@contextmanager
def recorded(graph: Recording, pool: object = None, stream: object = None) -> Iterator[None]:
    with graph:
        yield


@pytest.fixture(autouse=True)
def _recorded_in_place_of_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_device(monkeypatch)
    monkeypatch.setattr(graphs, "CAPTURED", {"cpu"})
    monkeypatch.setattr(graphs, "without_waiting", silently)
    for name, value in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": Recording,
        "graph": recorded,
        "synchronize": lambda *_: None,
        "set_stream": lambda stream: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


def silently(function: Callable[[], None]) -> None:
    try:
        with nothing_read():
            function()
    except AssertionError as error:
        raise Refused(str(error).splitlines()[0]) from error


@pytest.mark.parametrize("parallel", [False, True, None])
@pytest.mark.parametrize("k", [0, 3, "lookup"])
@pytest.mark.every(2)
def test_replayed_steps_are_the_oracles(trio: System, k: Ways, parallel: bool | None) -> None:
    d = decoder(trio, speculation=drafting(k))
    d.ensemble.graphs(d.ensemble.draft_models(d.speculation.drafter)).parallel = parallel
    check(d, ragged(9, 2), Sampling(max_new_tokens=9))
    made = graphs_of(d)
    replays = sum(captured.graph.replays for captured in made.captured.values())  # type: ignore[attr-defined]
    assert replays > made.made and made.parallel in (False, True)
    before = dict(made.captured)
    check(d, ragged(6, 3), Sampling(max_new_tokens=7))  # another engine, the same graphs
    assert all(made.captured[shape] is captured for shape, captured in before.items())


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.every(3)
def test_replayed_samples(trio: System, sampler: dict[str, Any]) -> None:
    """Noise, positions and schedules are those of the moment, not those of the recording."""
    d = decoder(trio, speculation=drafting(2))
    check(d, ragged(4, 1), Sampling(max_new_tokens=10, seed=3, **sampler), "linear:0:1.5:6")
    assert graphs_of(d).made > 0


def test_adaptive_lengths_have_a_graph_each(trio: System) -> None:
    d = decoder(trio, speculation=Speculation())
    check(d, ragged(3, 4), Sampling(max_new_tokens=40))
    assert len({shape.ahead.k for shape in graphs_of(d).captured}) > 1


@pytest.mark.parametrize("name", ["lora", "prompt"])
@pytest.mark.every(3)
def test_replayed_shared_pair(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pair, s = (
        adapters.system(folders, on_anti(folders, name)),
        Sampling(max_new_tokens=12, temperature=0.7),
    )
    d = Decoder(Models(pair), "proxy", speculation=drafting(3))
    ours = decoders.tokens(d, s)
    assert graphs_of(d).made > 0
    monkeypatch.setattr(device_loop, "DEVICES", set())
    assert ours == decoders.tokens(Decoder(Models(pair), "proxy", speculation=Speculation(k=0)), s)


def test_making_a_graph_moves_nothing(trio: System) -> None:
    """Also in the middle of a batch: state and pages, all but the spare one, are what they were."""
    d = decoder(trio, speculation=drafting(1))
    stream = d.stream(ragged(3, 4), Sampling(max_new_tokens=30, min_new_tokens=20, n=2))
    made, seen = d.ensemble.graphs(d.ensemble.draft_models()), list[int]()

    def watched(*_: object) -> None:
        if len(seen) > 3:
            return
        assert made.state is not None
        caches = list(made.state.caches.values())
        before = [made.state.moving.clone(), made.state.history[:, :-1].clone()]
        before += [p[: c.spare].clone() for c in caches for p in c.pools(1)]
        for ahead in (Ahead(2), Ahead(3, lookup=True)):
            made.prepare(StepShape(made.state.rows, ahead, SamplingNeeds(True, True), made.state.widths))
        after = [
            made.state.moving,
            made.state.history[:, :-1],
            *(p[: c.spare] for c in caches for p in c.pools(1)),
        ]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        seen.append(1)

    with pytest.MonkeyPatch.context() as patch:
        on_launch(patch, watched)
        next(stream)
    assert len(seen) > 3
    list(stream)


def test_wider_requests_have_graphs_of_their_own(trio: System) -> None:
    """Those of narrower ones stay, and serve batches that fit them."""
    d, s = decoder(trio, speculation=drafting(1), batch=2), Sampling(max_new_tokens=5)
    check(d, ragged(2, 1, longest=5), s)
    made = graphs_of(d)
    state, before = made.state, dict(made.captured)
    check(d, ragged(2, 2, longest=5), s)
    assert made.state is state and made.captured == before
    check(d, ragged(2, 1, longest=90), s)
    assert state is not None and made.state is not None and made.state.widths.pages > state.widths.pages
    wider = dict(made.captured)
    assert all(made.captured[shape] is captured for shape, captured in before.items()) and wider != before
    check(d, ragged(2, 3, longest=5), s)  # their rows' histories are those of the moment
    assert made.state is state and made.captured == wider
    mixed = [*ragged(3, 4, longest=5), *ragged(3, 5, longest=90)]
    check(d, [replace(e, id=f"{number}") for number, e in enumerate(mixed)], s)


def dead_graph(happened: list[str], word: Callable[[], str]) -> None:
    """Garbage in a circle, as an ensemble and its graphs are, that says when it is collected."""

    class Dead:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            happened.append(word())

    Dead()


def test_nothing_is_collected_during_a_capture(trio: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead graph that is freed while another is captured ends the capture."""
    happened, capturing = list[str](), list[bool]()

    def now() -> str:
        return "during" if capturing else "outside"

    @contextmanager
    def watched(graph: Recording, pool: object = None, stream: object = None) -> Iterator[None]:
        assert "outside" in happened  # what was dead before is gone
        capturing.append(True)
        dead_graph(happened, now)
        with graph:
            yield
        capturing.clear()

    monkeypatch.setattr(torch.cuda, "graph", watched)
    before = gc.get_threshold()
    dead_graph(happened, now)
    gc.set_threshold(1, 1, 1)
    try:
        check(decoder(trio, speculation=drafting(2)), ragged(3, 1), Sampling(max_new_tokens=6))
    finally:
        gc.set_threshold(*before)
    assert gc.isenabled() and "during" not in happened and len(happened) > 1


class Memory:
    """Room for so many graphs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
        self.room, self.asked, self.error = 1, 0, error
        self.graphs: weakref.WeakSet[Recording] = weakref.WeakSet()
        monkeypatch.setattr(torch.cuda, "graph", self.capture)

    @contextmanager
    def capture(self, graph: Recording, pool: object = None, stream: object = None) -> Iterator[None]:
        self.asked += 1
        with graph:
            yield
        if len(self.graphs) >= self.room:
            raise self.error
        self.graphs.add(graph)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory\nmore")],
    ids=["allocator", "driver"],
)
def test_graphs_for_which_there_is_no_memory(
    trio: System, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    """The most recent ones stay; where not even one fits, the step runs without."""
    memory = Memory(monkeypatch, error)
    d, s = decoder(trio, speculation=drafting(1), batch=4), Sampling(max_new_tokens=8, min_new_tokens=8)
    made = d.ensemble.graphs(d.ensemble.draft_models())
    made.parallel = False
    check(d, ragged(4, 1), s)
    check(d, ragged(2, 1), s)
    assert made.refused is None and not made.dropped and made.made == made.most == 1
    assert next(iter(made.captured)).rows == 2
    memory.room, memory.asked = 0, 0
    made.captured.clear()
    with pytest.warns(UserWarning, match="no memory for a CUDA graph of 4 rows"):
        check(d, ragged(4, 2), s)
    assert made.refused is None and made.made == 0 and len(made.dropped) >= 1
    asked = memory.asked
    check(d, ragged(4, 3), s)
    assert memory.asked == asked  # and it does not try again


def test_the_graph_that_was_used_last_is_kept(trio: System) -> None:
    d = decoder(trio, speculation=drafting(0), batch=4)
    made = d.ensemble.graphs(d.ensemble.draft_models())
    made.most, s = 2, Sampling(max_new_tokens=4, min_new_tokens=4)
    for rows in (4, 2, 4, 1):
        check(d, ragged(rows, rows), s)
    assert [shape.rows for shape in made.captured] == [4, 1]


def test_memory_is_set_aside_for_graphs() -> None:
    """45 to 85 MB each were counted for 13B + 7B + 7B, of 40 + 32 + 32 layers."""
    assert 45e6 < graphs.reserve(104 * graphs.OTHER_LAYER) / graphs.MOST_GRAPHS < 85e6


def test_a_step_in_which_the_host_reads_is_refused(trio: System, monkeypatch: pytest.MonkeyPatch) -> None:
    combine = graphs.DeviceStep.accept

    def reading(self: Any, batch: Any, tokens: Tensor, drafts: Tensor) -> Tensor:
        assert tokens.max().item() >= 0
        return combine(self, batch, tokens, drafts)

    monkeypatch.setattr(graphs.DeviceStep, "accept", reading)
    d = decoder(trio, speculation=drafting(2))
    with pytest.warns(UserWarning, match="without CUDA graphs"):
        check(d, ragged(3, 1), Sampling(max_new_tokens=6))
    made = graphs_of(d)
    assert made.refused is not None and made.made == 0
    check(d, ragged(3, 1), Sampling(max_new_tokens=6))  # and it does not try again


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_an_exception_in_a_branch_leaves_no_stream_behind(trio: System, broken: int) -> None:
    """A capture with a stream that nobody waits for cannot be ended, and says that in place of the cause."""
    made, main = decoder(trio, speculation=drafting(1)).ensemble.graphs(("expert",)), Stream()

    def branch(number: int) -> Callable[[], dict[str, Tensor]]:
        def run() -> dict[str, Tensor]:
            if number == broken:
                raise ValueError("in a branch")
            return {}

        return run

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="in a branch"):
        patch.setattr(torch.cuda, "current_stream", lambda device: main)
        made.forked([branch(0), branch(1), branch(2)])
    assert main.waited == [side for side in made.sides if side.waited] != []


def test_a_failed_capture_is_waited_for(trio: System, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = list[object]()
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(graphs.DeviceStep, "__call__", broken)
    d = decoder(trio, speculation=drafting(1))
    with pytest.raises(ZeroDivisionError):
        list(d.stream(ragged(2, 1), Sampling(max_new_tokens=4)))
    assert waited == [torch.device("cpu")]


def test_models_beside_each_other(trio: System) -> None:
    """Branches beside the first wait for what came before, and the first waits for them at the end."""
    made = decoder(trio, speculation=drafting(1)).ensemble.graphs(("expert",))
    order = list[int]()
    assert len(made.step.verifiers) == len(made.sides) == 2

    def branch(number: int) -> Callable[[], dict[str, Tensor]]:
        return lambda: (order.append(number), {str(number): torch.tensor(number)})[1]

    found = made.forked([branch(0), branch(1), branch(2)])
    assert [list(logits) for logits in found] == [["0"], ["1"], ["2"]] and order == [1, 2, 0]
    assert all(len(side.waited) == 1 for side in made.sides)
