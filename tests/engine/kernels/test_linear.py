"""The linear layers of the CPU path: the same product, whatever the rows and whichever kernels there are."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from proxytune.engine.kernels import linear
from proxytune.engine.kernels.linear import RowLinear, dense, show_weights, use_row_linears
from tests.support import tiny

NEAR = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""How far a product of a few hundred standard normal numbers may be from that in float64."""


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", ["plain", "packed", "no oneDNN"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(96, 352), (512, 600), (768, 1024), (1100, 96)])
def test_every_path_gives_the_product(
    size: tuple[int, int], dtype: torch.dtype, way: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "no oneDNN":
        monkeypatch.setattr(linear, "ONEDNN", None)
    layer = nn.Linear(*size, bias=bias).to(dtype)
    exact = copy.deepcopy(layer).double()
    fast = RowLinear.over(layer)
    if way == "packed":
        if dtype not in linear.ONEDNN_DTYPES:
            pytest.skip(f"oneDNN has no kernel for {dtype} on this processor")
        fast.pack()
        assert fast.weight is None
    for rows in (0, 1, 2, 3, 4, 5, 9, 64, 200, 257):
        x = torch.randn(1, rows, size[0]).to(dtype)
        with torch.inference_mode():
            got, want = fast(x), exact(x.double())
        assert got.shape == (1, rows, size[1]) and got.is_contiguous() and got.dtype == dtype
        assert rows == 0 or (got - want).abs().max() < NEAR[dtype]
    assert fast(torch.randn(2, 3, size[0]).to(dtype)).shape == (2, 3, size[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_lie_in_one_layout_and_come_back(dtype: torch.dtype) -> None:
    """Packed layers hold no other copy; what is tied, small or exact stays as it is."""
    model = tiny.build("llama", 1, hidden_size=512, intermediate_size=640, tie_word_embeddings=True)
    model.to(dtype)
    before = {name: p.clone() for name, p in model.named_parameters()}
    whole = sum(p.nbytes for p in model.parameters())
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        want = model(ids).logits
        packed = use_row_linears(model)
        got = model(ids).logits
    least = 0.9 * sum(p.nbytes for n, p in before.items() if "proj" in n)
    assert packed > least if dtype in linear.ONEDNN_DTYPES else packed == 0
    assert packed + sum(p.nbytes for p in model.parameters()) == whole
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert type(model.lm_head) is RowLinear
    assert (got - want).abs().max() < (1e-4 if dtype == torch.float32 else 0.1)
    show_weights(model)
    assert {n: torch.equal(p, before[n]) for n, p in model.named_parameters()} == dict.fromkeys(before, True)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, got)  # still by the same kernels


def test_a_copy_has_weights_of_its_own() -> None:
    """PEFT copies a layer and then loads other weights into the copy."""
    fast = RowLinear.over(nn.Linear(256, 512)).requires_grad_(False)
    weight, x = fast.weight.clone(), torch.randn(1, 8, 256)
    fast.pack()
    with torch.inference_mode():
        before = fast(x)
        other = copy.deepcopy(fast)
        other.load_state_dict({"weight": weight + 1, "bias": fast.bias})
        assert torch.equal(fast(x), before) and torch.equal(dense(fast), weight)
        assert (other(x) - (x.sum(-1, keepdim=True) + before)).abs().max() < 1e-3
        assert fast.weight is None and torch.equal(dense(other), weight + 1)


def test_small_and_exact_models_are_left_alone() -> None:
    small = tiny.build("llama", 1).float()
    exact = tiny.build("llama", 1, hidden_size=256).double()
    assert use_row_linears(small) == use_row_linears(exact) == 0
    assert not any(isinstance(m, RowLinear) for model in (small, exact) for m in model.modules())


def test_layers_that_share_a_tensor_are_not_packed() -> None:
    """Replicated layers: each would keep a copy of its own."""
    one, other = nn.Linear(512, 512), nn.Linear(512, 512)
    other.weight = one.weight
    model = nn.Sequential(one, other, nn.Linear(512, 512))
    assert use_row_linears(model) == 512 * 512 * 4
    assert model[0].weight is model[1].weight and model[2].weight is None


def test_layers_within_an_adapter_keep_their_weights() -> None:
    """PEFT casts to the dtype of A, and reads the weights below (DoRA) in every forward."""
    model = tiny.build("llama", 1, hidden_size=512, intermediate_size=640).float()
    adapted = get_peft_model(model, LoraConfig(r=64, target_modules=["q_proj"], use_dora=True))
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        want = adapted(ids).logits
        assert use_row_linears(model) > 0
        got = adapted(ids).logits
    assert (got - want).abs().max() < 1e-4
    attention = model.model.layers[0].self_attn  # type: ignore[union-attr]
    assert type(attention.q_proj.lora_A["default"]) is RowLinear
    assert attention.q_proj.base_layer.weight is not None and attention.o_proj.weight is None


def test_onednn_is_there_on_this_build() -> None:
    """Without it decoding is slower, not wrong; a build that lost it should be noticed."""
    assert linear.ONEDNN is not None
