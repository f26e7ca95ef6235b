"""The step with the forward that CUDA has, in the place of transformers' modules: in float64 its tokens are
the oracle's, with torch in the place of kernels and with the kernels in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from proxytune.config import Role, Sampling, System
from proxytune.decoding.decoder import Decoder
from proxytune.engine.attention import FusedForward, LlamaForward
from proxytune.engine.cuda import loop as device_loop
from proxytune.engine.fused import DeviceNorm, GatedMLP, modules, triton_rows
from proxytune.models.roles import Models
from tests.support import adapters, tiny
from tests.support.adapters import on_anti
from tests.support.decoders import check, ragged, tokens, use_pages
from tests.support.on_device import Ways, drafting
from tests.support.tiny import spec


@pytest.fixture(autouse=True)
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU counts as a GPU, for models that are loaded from now on."""
    use_pages(monkeypatch)
    monkeypatch.setattr(device_loop, "DEVICES", {"cpu"})
    monkeypatch.setattr(modules, "DEVICES", {"cpu"})
    monkeypatch.setattr(LlamaForward, "devices", frozenset())
    monkeypatch.setattr(FusedForward, "devices", frozenset({"cpu"}))


def fused(system: System, k: Ways, role: Role = "proxy") -> Decoder:
    """A decoder whose models all take the forward of CUDA."""
    d = Decoder(Models(system), system.require(role), speculation=drafting(k))
    for model in d.loaded.values():
        assert isinstance(model.family.llama_forward, FusedForward)
        assert any(isinstance(m, DeviceNorm) for m in model.module.modules())
        assert any(isinstance(m, GatedMLP) for m in model.module.modules())
    return d


@pytest.mark.parametrize("k", [0, 1, 3, "lookup"])
@pytest.mark.parametrize(
    "sampler", [{"temperature": 0.0}, {"temperature": 0.9, "top_k": 20, "top_p": 0.6}], ids=str
)
def test_tokens_are_the_oracles(trio: System, sampler: dict[str, Any], k: Ways) -> None:
    check(fused(trio, k), ragged(7, 1), Sampling(max_new_tokens=9, seed=3, **sampler))


@pytest.mark.parametrize("name", ["llama3-rope", "mistral", "qwen2", "qwen2-windows", "qwen3", "smollm3"])
def test_families_of_the_form(name: str, tmp_path: Path) -> None:
    """Where not every layer rotates (SmolLM3), a model has not the form, and its own forward is right."""
    model = tiny.build(name, 1)
    system = System(base=spec(tiny.save(tmp_path, model)))
    d = Decoder(Models(system), "base", speculation=drafting("lookup"))
    assert isinstance(d.loaded["base"].family.llama_forward, FusedForward) == (name != "smollm3")
    check(d, ragged(5, 2), Sampling(max_new_tokens=9))


@pytest.mark.parametrize("name", ["lora", "head", "prompt"])
def test_adapters_on_the_antiexpert(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models in one forward, each with its own pages; adapted layers are multiplied by themselves. The
    tokens are those of transformers' modules."""
    system = adapters.system(folders, on_anti(folders, name))
    found = tokens(fused(system, 2))
    monkeypatch.setattr(modules, "DEVICES", frozenset())
    monkeypatch.setattr(FusedForward, "devices", frozenset())
    assert tokens(Decoder(Models(system), "proxy", speculation=drafting(2))) == found


def counted(patch: pytest.MonkeyPatch) -> dict[str, int]:
    calls = dict.fromkeys(("norm", "placed", "gated"), 0)
    for name in calls:
        launch = getattr(triton_rows, name)

        def other(*given: Any, name: str = name, launch: Any = launch, **named: Any) -> Any:
            calls[name] += 1
            return launch(*given, **named)

        patch.setattr(triton_rows, name, other)
    return calls


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.every(2)
def test_kernels_give_the_oracles_tokens(
    trio: System, k: int, kernels: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float64 through the interpreter; norms and attention have no kernel for it, and are written out."""
    if kernels.type != "cpu":
        pytest.skip("test_gpu has it")
    calls = counted(monkeypatch)
    check(fused(trio, k), ragged(2, 1, longest=6), Sampling(max_new_tokens=3))
    assert calls["placed"] > 0 and calls["gated"] > 0 and calls["norm"] == 0


@pytest.mark.slow
def test_all_kernels_in_float32(trio: System, kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with every kernel, the paged attention too, says what it says without them."""
    if kernels.type != "cpu":
        pytest.skip("test_gpu has it")
    monkeypatch.setattr("proxytune.models.roles.use_row_norms", lambda model: None)
    monkeypatch.setattr("proxytune.models.roles.use_row_linears", lambda model: 0)
    single = {role: getattr(trio, role).model_copy(update={"dtype": "float32"}) for role in tiny.ROLES}
    system, calls = trio.model_copy(update=single), counted(monkeypatch)
    s, examples = Sampling(max_new_tokens=3), ragged(1, 1, longest=4)
    with_kernels = [c.token_ids for c in fused(system, 2).stream(examples, s)]
    assert min(calls.values()) > 0
    for place in ("kernels.paged_attention", "fused.rows"):
        monkeypatch.setattr(f"proxytune.engine.{place}.runs_triton", lambda tensor: False)
    assert [c.token_ids for c in fused(system, 2).stream(examples, s)] == with_kernels
