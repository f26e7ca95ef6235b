"""Capture and replay without a GPU: the operations of a step are recorded once and carried out again on the
same memory, which is what a CUDA graph does. Nothing that Python knew at the time of a recording may matter.

Streams, events and the check for host synchronisation are stand-ins here; test_gpu runs the real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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
        "synchronize": lambda: None,
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
        assert made.state is not None
        caches = list(made.state.caches.values())
        before = [made.state.moving.clone(), made.state.history[:, :-1].clone()]
        before += [p[: c.spare].clone() for c in caches for p in c.pools(1)]
        for ahead in (Ahead(2), Ahead(3, lookup=True)):
            made.prepare(StepShape(made.state.rows, ahead, SamplingNeeds(True, True)))
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


def test_wider_requests_make_the_graphs_void(trio: System) -> None:
    d = decoder(trio, speculation=drafting(1), batch=2)
    check(d, ragged(2, 1, longest=5), Sampling(max_new_tokens=5))
    made = graphs_of(d)
    state, shapes = made.state, set(made.captured)
    check(d, ragged(2, 2, longest=5), Sampling(max_new_tokens=5))
    assert made.state is state and shapes <= set(made.captured)
    check(d, ragged(2, 1, longest=90), Sampling(max_new_tokens=5))
    assert state is not None and made.state is not None and made.state.widths.pages > state.widths.pages


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
