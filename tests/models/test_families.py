"""Every model family: tokens of the packed path equal the plain definition, and what the packed path would
get wrong is found out at load and takes the exact slow path, or is refused. Never a wrong token."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from proxytune.config import Sampling, System
from proxytune.engine.attention.attention import attend
from proxytune.errors import UserError
from proxytune.models.small_copy import small_copy
from proxytune.models.support import context_window, examine, examine_config
from tests.support import tiny
from tests.support.decoders import check, decoder, example, ragged
from tests.support.tiny import spec

LONG = [example("".join(chr(97 + place * place % 23) for place in range(size)), size) for size in (150, 71)]
"""Prompts that go far beyond a sliding window, a page and a block of the kernel."""


def family_trio(family: str, folder: Path) -> System:
    """Base, expert and antiexpert of one family with different weights."""
    roles = {
        role: tiny.save(folder / role, tiny.build(family, seed))
        for seed, role in enumerate(("base", "expert", "antiexpert"))
    }
    return System(name=family, **{role: spec(path) for role, path in roles.items()})


@pytest.mark.parametrize("family", tiny.PACKED)
@pytest.mark.every(4)
def test_packed(family: str, tmp_path: Path) -> None:
    """Ragged prompts, prefill in chunks mixed with decoding, four rows at a time: greedy and sampled."""
    d = decoder(family_trio(family, tmp_path), batch=4)
    assert {model.family.path for model in d.loaded.values()} == {"packed"}, d.notes()
    check(d, ragged(7, 1, longest=19), Sampling(max_new_tokens=9))
    check(d, ragged(3, 2, longest=19), Sampling(max_new_tokens=9, temperature=1.0, top_k=50))
    check(d, LONG, Sampling(max_new_tokens=4))


@pytest.mark.parametrize("family", tiny.REFERENCE)
@pytest.mark.every(4)
def test_reference(family: str, tmp_path: Path) -> None:
    """These ignore our attention, hide a window in the mask or keep other state: exact all the same, and
    announced."""
    d = decoder(family_trio(family, tmp_path), batch=3)
    assert {model.family.path for model in d.loaded.values()} == {"reference"}
    assert len(d.notes()) == 3 and "slow exact path" in d.notes()[0]
    check(d, ragged(4, 3, longest=14), Sampling(max_new_tokens=8))
    check(d, ragged(2, 4, longest=9), Sampling(max_new_tokens=6, temperature=1.0, n=2))
    check(d, LONG[:1], Sampling(max_new_tokens=3))


@pytest.mark.slow
def test_prefill_chunks_mix_with_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxytune.decoding.decoder.PREFILL_TOKENS", {"cpu": 5})
    for family in ("llama", "gemma3", "gpt-oss"):
        d = decoder(family_trio(family, tmp_path / family), batch=4)
        check(d, ragged(7, 5, longest=19), Sampling(max_new_tokens=9))


def test_families_can_be_mixed(tmp_path: Path) -> None:
    """Roles need the same vocabulary, not the same architecture; one may even take the slow path."""
    roles = {"base": "gemma3", "expert": "gpt2", "antiexpert": "bloom"}
    folders = {role: tiny.save(tmp_path / role, tiny.build(family)) for role, family in roles.items()}
    d = decoder(System(**{role: spec(folder) for role, folder in folders.items()}))
    check(d, ragged(5, 6), Sampling(max_new_tokens=8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [*tiny.PACKED, *tiny.REFERENCE])
def test_half_precision_takes_the_path_of_the_family(family: str, dtype: torch.dtype) -> None:
    """Rounding is as coarse as small faults are, so what decides is a small copy in float64."""
    found = examine(tiny.build(family).to(dtype))  # type: ignore[arg-type]
    assert found.path == ("packed" if family in tiny.PACKED else "reference"), found.reason
    assert found.cached == (found.path == "reference" and family != "mamba")


@pytest.mark.parametrize("family", [*tiny.PACKED, *tiny.REFERENCE])
def test_a_configuration_alone_gives_the_path(family: str) -> None:
    model = tiny.build(family)
    found = examine_config(type(model), model.config)  # type: ignore[arg-type]
    assert found.path == ("packed" if family in tiny.PACKED else "reference"), found.reason
    assert found.window == examine(model).window  # type: ignore[arg-type]


def test_a_small_copy_has_every_kind_of_layer_and_short_windows() -> None:
    kinds = ["sliding_attention"] * 11 + ["full_attention"]
    model = tiny.build("gemma3", num_hidden_layers=12, layer_types=kinds, sliding_window=200)
    small = small_copy(type(model), model.config, "eager")  # type: ignore[arg-type]
    text = small.config
    assert text.layer_types == kinds and text.sliding_window < 11
    assert small.dtype == torch.float64 and all(p.std() > 0 for p in small.parameters())
    assert model.config.num_hidden_layers == 12 and model.config.sliding_window == 200
    big = AutoConfig.for_model(
        "llama",
        hidden_size=8192,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=28672,
        vocab_size=128256,
    )
    before = torch.get_rng_state()
    small = small_copy(AutoModelForCausalLM._model_mapping[type(big)], big, None)
    assert sum(p.numel() for p in small.parameters()) < 20_000_000
    assert torch.equal(torch.get_rng_state(), before)


def test_what_has_no_small_copy_takes_the_slow_path_in_half_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.build("llama").bfloat16()
    monkeypatch.setattr("proxytune.models.small_copy.MOST_NUMBERS", 1000)
    found = examine(model)  # type: ignore[arg-type]
    assert found.path == "reference" and not found.cached and "small copy would still have" in found.reason
    assert examine(tiny.build("llama")).path == "packed"  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_lost_position_is_found_on_the_weights_themselves(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only the loaded model does, its small copy does not show: one forward is changed by hand."""
    model = tiny.build("llama").to(dtype)
    plain = model.forward

    def shifted(**inputs: Any) -> Any:
        if "packed" in inputs:
            inputs["position_ids"] = inputs["position_ids"] * 3
        return plain(**inputs)

    shifted.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    monkeypatch.setattr(model, "forward", shifted)
    found = examine(model)  # type: ignore[arg-type]
    assert found.path == "reference" and "differ by" in found.reason


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_length_dependent_rope_keeps_its_original_length(kind: str, tmp_path: Path) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 24}
    length = {"max_position_embeddings": 96, "original_max_position_embeddings": 24}
    if kind == "dynamic":
        length = {"max_position_embeddings": 24}
    family = "phi3" if kind == "longrope" else "llama"
    folder = tiny.save(tmp_path / "base", tiny.build(family, rope_parameters=rope, **length))
    d = decoder(System(base=spec(folder)), "base")
    assert d.loaded["base"].family.window == 24
    check(d, ragged(4, 7, longest=10), Sampling(max_new_tokens=8))
    with pytest.raises(UserError, match="context window is 24"):
        list(d.stream([example("z" * 40)], Sampling(max_new_tokens=4)))


def test_unknown_rope_without_an_original_length_is_not_trusted() -> None:
    config = SimpleNamespace(
        max_position_embeddings=64, rope_parameters={"rope_type": "new", "rope_theta": 1.0}
    )
    window, reason = context_window(SimpleNamespace(get_text_config=lambda: config))
    assert window == 64 and reason is not None and "'new'" in reason


@pytest.mark.parametrize("family", [f for f in tiny.REFERENCE if f != "qwen2-moe-windows"])
def test_a_family_that_claims_support_is_still_found_out(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flag is necessary, not sufficient: the other checks of the guard catch each of these by
    themselves."""
    model = tiny.build(family)
    monkeypatch.setattr(type(model), "_supports_attention_backend", True, raising=False)
    assert examine(model).path == "reference"


def test_a_wrong_mask_is_found_by_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last check: logits. Here the attention function itself is made to lose the scaling."""

    def lossy(
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **rest: Any
    ) -> Any:
        return attend(module, query, key, value, mask, scaling=1.0, **rest)

    from transformers import AttentionInterface

    AttentionInterface.register("proxytune", lossy)
    try:
        family = examine(tiny.build("llama"))  # type: ignore[arg-type]
    finally:
        AttentionInterface.register("proxytune", attend)
    assert family.path == "reference" and "differ by" in family.reason


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_that_looks_ahead_is_refused(dtype: torch.dtype) -> None:
    model = tiny.build("llama").to(dtype)
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.self_attn.is_causal = False
    plain = model.forward

    def sees_all(**inputs: Any) -> Any:
        length = inputs["input_ids"].shape[1]
        return plain(attention_mask=torch.zeros(1, 1, length, length, dtype=dtype), **inputs)

    model.forward = sees_all  # type: ignore[method-assign]
    with pytest.raises(UserError, match="not a causal language model"):
        examine(model)  # type: ignore[arg-type]
