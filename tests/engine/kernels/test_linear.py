"""The linear layers of the CPU path: the same product, whatever the rows and whichever kernels there are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from proxytune.engine.kernels import linear
from proxytune.engine.kernels.linear import RowLinear, use_row_linears
from tests.support import tiny


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("size", [(96, 352), (512, 600), (768, 1024), (1100, 96)])
def test_every_path_gives_the_product(
    size: tuple[int, int], packs: bool, onednn: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not onednn:
        monkeypatch.setattr(linear, "ONEDNN", None)
    layer = nn.Linear(*size, bias=bias)
    fast = RowLinear.over(layer, packs)
    for rows in (0, 1, 2, 3, 4, 5, 9, 64, 200, 257):
        x = torch.randn(1, rows, size[0])
        with torch.inference_mode():
            got, want = fast(x), layer.double()(x.double())
        layer.float()
        assert got.shape == (1, rows, size[1]) and got.is_contiguous()
        assert rows == 0 or (got - want).abs().max() < 1e-4
    assert fast(torch.randn(2, 3, size[0])).shape == (2, 3, size[1])


def test_layers_are_replaced_where_it_pays_and_share_their_weights() -> None:
    model = tiny.build("llama", 1, hidden_size=256, intermediate_size=512).float()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        want = model(ids).logits
        use_row_linears(model)
        got = model(ids).logits
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert model.lm_head.weight is model.get_input_embeddings().weight
    kinds = {path.split(".")[-1]: type(m) for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert kinds["gate_proj"] is kinds["q_proj"] is RowLinear
    assert (got - want).abs().max() < 1e-4
    small = tiny.build("llama", 1).float()
    use_row_linears(small)
    exact = tiny.build("llama", 1, hidden_size=256).double()
    use_row_linears(exact)
    assert not any(isinstance(m, RowLinear) for model in (small, exact) for m in model.modules())


def test_a_packed_copy_follows_its_weights() -> None:
    """PEFT copies a layer and then loads other weights into the copy; merging writes into them."""
    fast = RowLinear.over(nn.Linear(256, 512), packs=True).requires_grad_(False)
    x = torch.randn(1, 8, 256)
    with torch.inference_mode():
        before = fast(x)
    other = copy.deepcopy(fast)
    other.load_state_dict({"weight": fast.weight + 1, "bias": fast.bias})
    with torch.inference_mode():
        assert torch.equal(fast(x), before)
        assert (other(x) - (x.sum(-1, keepdim=True) + before)).abs().max() < 1e-3
    fast.weight.mul_(2)
    with torch.inference_mode():
        assert (fast(x) - (2 * before - fast.bias)).abs().max() < 1e-4


def test_models_too_large_to_keep_twice_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    def layers(model: nn.Module) -> list[RowLinear]:
        return [m for m in model.modules() if isinstance(m, RowLinear)]

    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256), nn.Linear(4, 4))
    twin = copy.deepcopy(model)
    assert use_row_linears(model) == 2 * 256 * 512 * 4
    assert [layer.packs for layer in layers(model)] == [True, True]
    monkeypatch.setattr(linear, "PACKED", 2 * 256 * 512 - 1)
    assert use_row_linears(twin) == 0
    assert [layer.packs for layer in layers(twin)] == [False, False]


def test_onednn_is_there_on_this_build() -> None:
    """Without it decoding is slower, not wrong; a build that lost it should be noticed."""
    assert linear.ONEDNN is not None
