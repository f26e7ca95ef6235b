"""Logits of a head in 16 bits are not rounded to 16 bits before they are subtracted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from proxytune.config import ModelSpec, Sampling, System
from proxytune.decoding.decoder import Decoder
from proxytune.engine.kernels import wide_head
from proxytune.engine.kernels.wide_head import WideHead, use_wide_head, wide_product
from proxytune.engine.runners import SharedLora
from proxytune.engine.runners.lora import SpanLora
from proxytune.models.roles import Models
from tests.support import tiny
from tests.support.decoders import ragged


def far(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).abs().max())


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("by", ["kernel", "pieces"])
def test_logits_are_the_products(
    dtype: torch.dtype, bias: bool, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By our kernel, or with weights that are made wide piece by piece."""
    monkeypatch.setattr(wide_head, "CHUNK", 64 * 30)
    if by == "pieces":
        monkeypatch.setattr(wide_head, "on_cpu", lambda: None)
    torch.manual_seed(0)
    layer = nn.Linear(64, 100, bias=bias, dtype=dtype)
    layer.weight.data *= 40
    x = torch.randn(1, 5, 64, dtype=dtype)
    want = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    got = WideHead.over(layer)(x)
    assert got.dtype == torch.float32 and got.shape == (1, 5, 100)
    assert far(got, want) < 1e-4 < 0.01 < far(layer(x), want)


@torch.inference_mode()
@pytest.mark.parametrize("sizes", [(1, 1), (31, 3), (32, 4), (33, 5), (100, 50), (576, 1031)], ids=str)
def test_a_row_has_the_same_sums_in_any_batch(sizes: tuple[int, int]) -> None:
    """To the last bit, and right at all edges of the kernel's tiles."""
    torch.manual_seed(0)
    (inputs, outputs), kernel = sizes, wide_head.on_cpu()
    x, weight = torch.randn(70, inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16()
    want = x.double() @ weight.double().T
    whole = wide_product(x, weight)
    assert far(whole, want) < 1e-4
    for rows in (*range(1, 9), 13, 65) if kernel is not None else ():
        assert torch.equal(wide_product(x[:rows], weight), whole[:rows])
    assert wide_product(x[:0], weight).shape == (0, outputs)


def test_other_dtypes_are_left_alone() -> None:
    layer = nn.Linear(8, 9, dtype=torch.float64)
    x = torch.randn(2, 8, dtype=torch.float64)
    assert torch.equal(WideHead.over(layer)(x), layer(x))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "granite", "gpt-neox"])
def test_whatever_a_family_does_to_its_logits(family: str, tmp_path: Path) -> None:
    """Tied embeddings, soft-capped and scaled logits, heads of other names."""
    folder = tiny.save(tmp_path / "model", tiny.build(family, 1))
    d = Decoder(Models(System(base=ModelSpec(model=str(folder), dtype="bfloat16"))), "base")
    model: PreTrainedModel = d.loaded["base"].module
    head = model.get_output_embeddings()
    assert isinstance(head, WideHead)
    tied = model.get_input_embeddings().weight
    assert (head.weight is tied) == bool(model.config.tie_word_embeddings)
    logits = d.loaded["base"].logits([1, 30, 40, 50])
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())
    (c,) = d.stream(ragged(1, 1), Sampling(max_new_tokens=4))
    assert len(c.token_ids) == 4


def test_the_difference_of_models_is_fine(tmp_path: Path) -> None:
    """At logits of 16 to 32, bfloat16 has steps of 0.125, and so would the sum of the three."""
    roles = {}
    for number, role in enumerate(tiny.ROLES):
        model = tiny.build("llama", number)
        model.lm_head.weight.data *= 100
        roles[role] = ModelSpec(model=str(tiny.save(tmp_path / role, model)), dtype="bfloat16")
    d = Decoder(Models(System(**roles)), "proxy")
    base, expert, antiexpert = (model.logits([1, 30, 40]) for model in d.loaded.values())
    combined = base + (expert - antiexpert)
    large = combined[combined.abs() > 16]
    assert len(large) > 10 and (large % 0.0625 != 0).any()


def test_an_adapter_on_the_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, shared = WideHead.over(nn.Linear(32, 50, bias=False, dtype=torch.bfloat16)), SharedLora()
    down, up = torch.randn(4, 32).bfloat16(), torch.randn(50, 4).bfloat16()
    lora = SpanLora(layer, shared)
    lora.add("a", down, up, 0.5)
    x = torch.randn(1, 3, 32).bfloat16()
    shared.place({"a": slice(1, 3)}, 3)
    with torch.inference_mode():
        got, plain = lora(x), layer(x)
        added = 0.5 * wide_product(x[0, 1:] @ down.T, up)
    assert torch.equal(got[:, :1], plain[:, :1])
    torch.testing.assert_close(got[0, 1:], plain[0, 1:] + added)


def test_only_a_plain_head_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama", 1)
    use_wide_head(model)
    assert type(model.lm_head) is nn.Linear  # float64
    use_wide_head(model.half())
    assert type(model.lm_head) is nn.Linear
    model.bfloat16()
    with monkeypatch.context() as patch:
        patch.setattr(wide_head, "on_cpu", lambda: None)  # no compiler
        use_wide_head(model)
    assert type(model.lm_head) is nn.Linear
    use_wide_head(model)
    assert type(model.lm_head) is WideHead
