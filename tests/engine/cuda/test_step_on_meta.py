"""The step with every tensor on torch's device `meta`, which has shapes and no values: what would read a
value fails, and so does an operation with a tensor from elsewhere, which on a GPU is a copy that waits. That
is what a CUDA graph asks of a step, as far as it can be checked without CUDA."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from proxytune.config import ExpertSpec, ModelSpec, Role, Sampling, System, TraceKind
from proxytune.decoding.decoder import Decoder
from proxytune.engine.cuda.sampling import SamplingNeeds
from proxytune.engine.cuda.state import DeviceBatch
from proxytune.engine.cuda.step import DeviceStep, StepOutput
from proxytune.engine.speculative.draft_length import Ahead
from proxytune.models.roles import Models
from tests.support import adapters, tiny
from tests.support.adapters import on_anti
from tests.support.decoders import SAMPLERS, ragged
from tests.support.on_device import Ways, as_on_a_device, drafting
from tests.support.tiny import spec, trio_of


class OneDevice(TorchDispatchMode):
    """Fails where an operation has a tensor that is not on meta, given or made."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        assert all(t.is_meta for t in tensors), f"{func.name()} with a tensor from elsewhere"
        self.operations += 1
        return out


def on_meta(monkeypatch: pytest.MonkeyPatch, value: Any) -> Any:
    """A copy of a value, with all tensors in it on meta."""

    def moved(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        if id(tensor) not in memo:
            found = tensor.to("meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(found, requires_grad=False) if is_parameter else found
        there: Tensor = memo[id(tensor)]
        return there

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "__deepcopy__", moved)
        patch.setattr(nn.Parameter, "__deepcopy__", moved)
        return copy.deepcopy(value)


class Checked(Exception):
    """The step went through."""


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The first step runs on meta and ends the decoding: how many operations it had."""
    as_on_a_device(monkeypatch)
    call, found = DeviceStep.__call__, list[int]()

    def watched(self: DeviceStep, batch: DeviceBatch, ahead: Ahead, draw: SamplingNeeds) -> StepOutput:
        step, there = on_meta(monkeypatch, (self, batch))
        with OneDevice() as mode:
            output = call(step, there, ahead, draw).packed()
        assert output.is_meta and output.shape == (len(batch.position), self.output_width(ahead.k))
        found.append(mode.operations)
        raise Checked

    monkeypatch.setattr(DeviceStep, "__call__", watched)
    yield found


EVERYTHING: dict[str, Any] = {
    "temperature": 0.9,
    "top_k": 9,
    "top_p": 0.8,
    "min_new_tokens": 2,
    "ban": ("e",),
}


def step_on_meta(system: System, role: Role = "proxy", k: Ways = 2, **sampler: Any) -> None:
    """Decode up to the first step."""
    d = Decoder(Models(system), system.require(role), speculation=drafting(k))
    sampling = Sampling(max_new_tokens=5, **(sampler or EVERYTHING))
    with pytest.raises(Checked):
        list(d.stream(ragged(3, 1), sampling, forced="ok"))


def of_family(folder: Path, name: str) -> System:
    """A trio; mixtures of experts in bfloat16, in which experts multiply in groups and nobody asks who got
    what."""
    mixture, roles = "num_experts_per_tok" in tiny.PACKED[name][1], dict[str, ModelSpec]()
    for number, role in enumerate(tiny.ROLES):
        saved = tiny.save(folder / role, tiny.build(name, number))
        roles[role] = ModelSpec(model=str(saved), dtype="bfloat16") if mixture else spec(saved)
    return System(name=name, **roles)


@pytest.mark.parametrize("name", tiny.PACKED)
@pytest.mark.every(4)
def test_families(name: str, tmp_path: Path, operations: list[int]) -> None:
    step_on_meta(of_family(tmp_path, name))
    assert operations[0] > 100


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotations_that_depend_on_the_length(kind: str, tmp_path: Path, operations: list[int]) -> None:
    """transformers looks at the largest position to choose the frequencies."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 64}
    model = tiny.build("phi3" if kind == "longrope" else "llama", rope_parameters=rope)
    step_on_meta(System(base=spec(tiny.save(tmp_path, model))), "base", k=0)
    assert operations[0] > 50


@pytest.mark.parametrize("trace", ["tokens", "agreement"])
def test_a_trace(trio: System, operations: list[int], trace: TraceKind) -> None:
    system = trio.model_copy(update={"tuned": trio.antiexpert})
    d = Decoder(Models(system), "proxy", speculation=drafting(2), agreement=trace == "agreement")
    with pytest.raises(Checked):
        list(d.stream(ragged(3, 1), Sampling(max_new_tokens=5), trace=trace))
    assert operations


@pytest.mark.parametrize("k", [0, 1, 5, "lookup"])
@pytest.mark.parametrize("sampler", [{"temperature": 0.0}, *SAMPLERS], ids=str)
@pytest.mark.every(3)
def test_samplers(trio: System, operations: list[int], sampler: dict[str, Any], k: Ways) -> None:
    step_on_meta(trio, k=k, **sampler)
    assert operations


@pytest.mark.parametrize("k", [2, "lookup"])
@pytest.mark.parametrize("name", ["lora", "head", "prompt"])
def test_adapters_on_the_antiexpert(
    name: str, folders: dict[str, Path], operations: list[int], k: Ways
) -> None:
    step_on_meta(adapters.system(folders, on_anti(folders, name)), k=k)
    assert operations


def test_a_vocabulary_in_another_order(tmp_path: Path, operations: list[int]) -> None:
    words = tiny.tokenizer(swapped=("a", "e"))
    swapped = trio_of(tmp_path, expert=words).model_copy(update={"vocab": "intersect"})
    step_on_meta(swapped)
    step_on_meta(swapped, k="lookup")
    assert operations


def test_int8_base(tmp_path: Path, operations: list[int]) -> None:
    system = of_family(tmp_path, "llama")
    int8 = system.base.model_copy(update={"dtype": "float32", "quantization": "int8"})
    step_on_meta(system.model_copy(update={"base": int8}))
    assert operations


def test_one_model_and_two_experts(trio: System, operations: list[int]) -> None:
    step_on_meta(trio, "base", k=0)
    step_on_meta(trio, "base", k="lookup")
    assert trio.expert is not None
    second = ExpertSpec(model=trio.expert.model, dtype="float64", weight=0.5)
    step_on_meta(trio.model_copy(update={"expert": None, "experts": (second, second)}))
    assert len(operations) == 3


def test_what_is_not_on_the_device_is_noticed() -> None:
    here, there = torch.zeros(3), torch.zeros(3, device="meta")
    for wrong in (lambda: there[here.long()], lambda: torch.tensor([1]).to("meta"), lambda: there * here[0]):
        with pytest.raises(AssertionError), OneDevice():
            wrong()
    for read in (
        lambda: there.sum().item(),
        lambda: 1 in there,
        lambda: bool(there.any()),
        lambda: there.nonzero(),
    ):
        with pytest.raises((RuntimeError, NotImplementedError)), OneDevice():
            read()


def test_values_stay_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(2, 2)
    moved, again = on_meta(monkeypatch, (layer, layer))
    assert moved is again and moved.weight.is_meta and not layer.weight.is_meta
