"""Norms of the CPU path: replaced where they compute an RMS norm, found out by trying."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from proxytune.engine.kernels import cpu_rows
from proxytune.engine.kernels.cpu_attention import why_not
from proxytune.engine.kernels.norm import RowNorm, use_row_norms
from tests.support import tiny
from tests.support.on_cpu import without_row_kernels


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, RowNorm) for module in model.modules())


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_a_llama_computes_the_same_with_them(dtype: torch.dtype, near: float) -> None:
    model = tiny.build("llama", 1).to(dtype)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    with torch.inference_mode():
        want = model(ids).logits
        use_row_norms(model)
        got = model(ids).logits
    layers = model.config.num_hidden_layers
    assert norms(model) == 2 * layers + 1
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert (got - want).abs().max() < near


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_norms_and_dtypes_stay(dtype: torch.dtype) -> None:
    """Gemma adds one to its weights; GPT-2 subtracts the mean; float64 stays as transformers has it."""
    for model in (
        tiny.build("gemma2", 1).to(dtype),
        tiny.build("gpt2", 1).to(dtype),
        tiny.build("llama", 1),
    ):
        with torch.no_grad():
            use_row_norms(model)
        assert norms(model) == 0


def test_bfloat16_is_rounded_as_transformers_rounds_it() -> None:
    """Norm and rotation: the same bits wherever the sums of squares round alike."""
    if cpu_rows.built("rms_norm_bfloat16") is None:
        pytest.skip("no compiler")
    x = (3 * torch.randn(50, 192)).bfloat16()
    norm = LlamaRMSNorm(192, 1e-5).bfloat16()
    norm.weight.data.normal_()
    with torch.inference_mode():
        same = cpu_rows.rms_norm(x, norm.weight, 1e-5) == norm(x)
    assert same.float().mean() > 0.999
    q, cos, sin = torch.randn(7, 3, 16), *torch.randn(2, 7, 16)
    q, cos, sin = q.bfloat16(), cos.bfloat16(), sin.bfloat16()
    want, _ = apply_rotary_pos_emb(q, q, cos, sin, unsqueeze_dim=1)
    assert torch.equal(cpu_rows.rotate(q.clone(), cos, sin), want)
    broken = q.clone()
    broken[0, 0, 0] = float("nan")
    assert cpu_rows.rotate(broken, cos, sin).isnan().sum() == 2


@pytest.mark.parametrize("compiled", [True, False])
def test_the_norm_itself(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every shape and layout, with the kernel and without; other dtypes are torch's."""
    if not compiled:
        without_row_kernels(monkeypatch)
    for size in (1, 5, 64, 4096):
        own = RowNorm(size, 1e-5)
        own.weight.data.normal_()
        for x in (
            torch.randn(1, 3, size),
            torch.randn(40, size),
            torch.randn(size, 6).T,
            torch.zeros(2, size),
        ):
            exact = (
                x.double() * (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * own.weight.double()
            )
            with torch.inference_mode():
                assert (own(x) - exact).abs().max() < 1e-5
        with torch.inference_mode():
            assert own.double()(torch.ones(2, size, dtype=torch.float64)).dtype == torch.float64


def test_the_kernel_is_there_where_the_attention_is() -> None:
    assert (cpu_rows.built("rms_norm_float32") is None) == (why_not() is not None)


class Gated(nn.Module):
    """An RMS norm that may be called with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        y = nn.functional.rms_norm(x, (8,), self.weight, self.eps)
        return y if gate is None else y * gate


class Plain(Gated):
    """The same without a gate."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class Centred(nn.Module):
    """A layer norm without a bias: with weights of one an RMS norm of numbers whose mean is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (8,), self.weight, None, self.eps)


def test_what_only_looks_like_one_stays() -> None:
    model = nn.Sequential(Gated(), Centred(), nn.LayerNorm(8, bias=False), Plain())
    use_row_norms(model)
    assert [type(module) for module in model] == [Gated, Centred, nn.LayerNorm, RowNorm]
