"""LlamaForward: taken where a model has the form for it, as the numbers show, and the same to the last
digits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from proxytune.engine.attention.llama_forward import FIRST
from proxytune.engine.attention.packed import Packed, PackedPart
from proxytune.engine.kernels.cpu_rows import rotate
from proxytune.engine.kv.cache import CacheSpec, Placement
from proxytune.engine.kv.slots import SlotCache
from proxytune.models.support import Family, examine
from tests.support import tiny
from tests.support.on_cpu import without_row_kernels

FORM = {
    "llama",
    "llama3-rope",
    "mistral",
    "qwen2",
    "qwen2-windows",
    "qwen3",
    "granite",  # whose multipliers are one here
    "mixtral",
    "qwen3-moe",
}


def has_llama_forward(model: Any) -> bool:
    family = examine(model)
    assert family.path == "packed"
    return family.llama_forward is not None


@pytest.mark.parametrize("name", tiny.PACKED)
def test_who_has_the_form(name: str) -> None:
    assert has_llama_forward(tiny.build(name)) == (name in FORM)


def once(forward: Any, family: Family, ids: list[int]) -> Tensor:
    """Logits [T, V] of one row from its start."""
    cache = SlotCache(CacheSpec(family.layers, len(ids), family.dtype, family.devices))
    cache.admit()
    cache.reserve([len(ids)])
    at = Placement.of([0], [0], [len(ids)], torch.device("cpu"))
    with torch.inference_mode():
        out = forward(
            input_ids=torch.tensor([ids]),
            position_ids=at.positions[None],
            use_cache=False,
            logits_to_keep=torch.arange(len(ids)),
            packed=Packed([PackedPart(cache, at, slice(0, len(ids)))]),
        )
    logits: Tensor = out.logits[0]
    return logits


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(FORM))
def test_the_same_logits(
    name: str, dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the model's own forward through our attention: float64 to the last digits."""
    if not compiled:
        without_row_kernels(monkeypatch)
    model = tiny.build(name, 1).to(dtype)
    family = examine(model)  # type: ignore[arg-type]
    assert family.llama_forward is not None
    ids = [(7 * i * i + 3) % tiny.VOCABULARY for i in range(40)]
    got, want = once(family.llama_forward, family, ids), once(model, family, ids)
    limit = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    assert (got - want).abs().max() <= limit * want.std()


MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")


@pytest.mark.parametrize("multiplier", MULTIPLIERS)
def test_the_numbers_find_out_what_looks_alike(multiplier: str) -> None:
    """Granite has the same parts. What it multiplies on the way shows, except the strength of attention,
    which it hands to our function."""
    assert has_llama_forward(tiny.build("granite", **{multiplier: 0.9})) == (
        multiplier == "attention_multiplier"
    )


def test_a_part_of_another_make_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some mixtures return a pair; the layer around them knows, we do not."""
    model: Any = tiny.build("llama")

    class Pair(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return self.inner(x), None

    class Unpacking(type(model.model.layers[0])):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
            pair, self.mlp = self.mlp, self.mlp.inner
            try:
                out: Tensor = super().forward(hidden_states, **arguments)
            finally:
                self.mlp = pair
            return out

    for layer in model.model.layers:
        layer.mlp = Pair(layer.mlp)
        layer.__class__ = Unpacking
    assert not has_llama_forward(model)


def test_hooks_are_not_skipped() -> None:
    """Whoever hangs a hook on a module wants it called; accelerate moves weights in one."""
    model: Any = tiny.build("llama")
    model.model.layers[0].register_forward_hook(lambda *called: None)
    assert not has_llama_forward(model)


def test_what_is_put_in_later_is_used() -> None:
    """As adapters are: modules are looked up in every call."""
    model: Any = tiny.build("llama")
    family = examine(model)
    ids = [5, 6, 7]
    before = once(family.llama_forward, family, ids)
    model.model.layers[1].self_attn.v_proj = nn.Linear(32, 16, bias=False).double()
    after = once(family.llama_forward, family, ids)
    assert (after - before).abs().max() > 1e-3
    assert (after - once(model, family, ids)).abs().max() < 1e-12


def test_rotations_are_computed_as_far_as_they_are_needed() -> None:
    """Some positions at once, more when a row grows beyond them, and none beyond the window."""
    model = tiny.build("llama", 1, max_position_embeddings=700)
    family = examine(model)  # type: ignore[arg-type]
    assert family.llama_forward is not None
    for length, known in ((5, FIRST), (300, 600), (650, 700)):
        ids = [(7 * i * i + 3) % tiny.VOCABULARY for i in range(length)]
        got, want = once(family.llama_forward, family, ids), once(model, family, ids)
        assert (got - want).abs().max() <= 1e-12 * want.std()
        assert family.llama_forward.rotations is not None and len(family.llama_forward.rotations[0]) == known


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_rotation(dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against transformers', for whole heads and for their first part; many tokens take several threads."""
    if not compiled:
        without_row_kernels(monkeypatch)
    for tokens, heads, size, turned in ((1, 1, 2, 2), (5, 3, 8, 8), (5, 2, 12, 4), (600, 4, 64, 64)):
        x = torch.randn(tokens, heads, size, dtype=torch.float64).to(dtype)
        angle = torch.randn(tokens, turned // 2, dtype=torch.float64).repeat(1, 2)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        part = x[None, :, :, :turned].transpose(1, 2)
        want = x.clone()
        want[..., :turned] = apply_rotary_pos_emb(part, part, cos[None], sin[None])[0][0].transpose(0, 1)
        limit = {torch.float64: 1e-14, torch.float32: 1e-5, torch.bfloat16: 0.0}[dtype]
        assert (rotate(x, cos, sin) - want).abs().max() <= limit
