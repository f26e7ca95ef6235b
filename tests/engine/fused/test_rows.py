"""The kernels between a model's products, against transformers' operations: the same bits where nothing is
summed and no exp is taken, a few last places elsewhere. Triton's interpreter runs them where there is no
GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from proxytune.engine.fused import rows, triton_rows
from proxytune.engine.fused.rows import NORM_KINDS, NormKind, Rotation
from proxytune.engine.kernels import trial

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES)
NORMS: dict[NormKind, Callable[..., nn.Module]] = dict(
    zip(NORM_KINDS, (LlamaRMSNorm, Gemma2RMSNorm, Olmo2RMSNorm), strict=True)
)


@pytest.fixture(autouse=True)
def _rounds_to_nearest(kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts bfloat16 off, where every GPU rounds."""
    if kernels.type != "cpu":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def rounding(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        bits = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16)
        return TensorHandle(bits.numpy().view(np.uint16), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounding)


@pytest.fixture
def launched(kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that ran."""
    names = list[str]()
    for name in ("norm", "placed", "gated"):
        launch = getattr(triton_rows, name)

        def counted(*given: Any, name: str = name, launch: Any = launch, **named: Any) -> Any:
            names.append(name)
            return launch(*given, **named)

        monkeypatch.setattr(triton_rows, name, counted)
    return names


def normal(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw).to(device, dtype)


@pytest.mark.parametrize("size", [1, 8, 96, 320])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", NORM_KINDS, ids=str)
def test_norms(
    kind: NormKind, dtype: torch.dtype, size: int, kernels: torch.device, launched: list[str]
) -> None:
    """Alone and of a sum, of rows and of heads that lie within wider rows. The sum has the same bits; the
    norm has them but where the squares add up to another last place."""
    module = NORMS[kind](size, 1e-5).to(kernels, dtype)
    module.weight.data = normal(size, dtype=dtype, device=kernels, seed=1)  # type: ignore[union-attr]
    x, more = (normal(7, size, dtype=dtype, device=kernels, seed=seed) for seed in (2, 3))
    heads = normal(3, 4 * size, dtype=dtype, device=kernels, seed=4).view(3, 4, size)[:, 1:3]
    weight: Tensor = module.weight.detach()  # type: ignore[union-attr,assignment,operator]
    with torch.inference_mode():
        both, total = rows.norm_of_sum(x, more, weight, 1e-5, kind)
        pairs = [
            (rows.norm(x[None], weight, 1e-5, kind), module(x[None])),
            (rows.norm(heads, weight, 1e-5, kind), module(heads)),
            (both, module(x + more)),
        ]
        assert launched == ["norm"] * 3 and torch.equal(total, x + more)
        for got, want in pairs:
            assert got.dtype == dtype and got.shape == want.shape
            step = torch.finfo(dtype).eps * want.double().abs().clamp(min=1e-3)
            assert ((got.double() - want.double()).abs() <= 4 * step).all()
            assert dtype == torch.float32 or (got == want).double().mean() > 0.99


@pytest.mark.parametrize("kind", NORM_KINDS, ids=str)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_what_is_written_out_has_the_modules_bits(kind: NormKind, dtype: torch.dtype) -> None:
    module = NORMS[kind](48, 1e-6).to(dtype)
    module.weight.data.normal_()  # type: ignore[union-attr,operator]
    x = torch.randn(5, 48).to(dtype)
    with torch.inference_mode():
        assert torch.equal(rows.written_out_norm(x, module.weight, 1e-6, kind), module(x))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize(
    "heads, kv, key, value, turned", [(4, 2, 16, 16, 16), (3, 3, 12, 8, 4), (2, 1, 80, 80, 80)]
)
def test_rotation_and_store(
    heads: int, kv: int, key: int, value: int, turned: int, dtype: torch.dtype, kernels: torch.device,
    launched: list[str],
) -> None:  # fmt: skip
    """Queries, keys and values are parts of one wider row; other places of the pools stay what they are."""
    tokens, sizes = 6, (heads * key, kv * key, kv * value)
    row = normal(tokens, sum(sizes), dtype=dtype, device=kernels)
    q, k, v = (
        part.view(tokens, -1, size) for part, size in zip(row.split(sizes, 1), (key, key, value), strict=True)
    )
    angles = normal(tokens, turned // 2, dtype=dtype, device=kernels, seed=1).repeat(1, 2)
    rotation = Rotation(angles.cos(), angles.sin())
    slots = torch.tensor([17, 3, 0, 31, 8, 2], device=kernels)
    pools = tuple(torch.full((2, 16, kv, size), 7.0, dtype=dtype, device=kernels) for size in (key, value))
    want = [pool.clone() for pool in pools]
    before = row.clone()
    got = rows.rotate_and_place(q, k, v, rotation, pools, slots)  # type: ignore[arg-type]
    assert launched == ["placed"] and torch.equal(row, before)
    turned_q, turned_k = (rotated(t, rotation) for t in (q, k))
    for pool, lines in zip(want, (turned_k, v), strict=True):
        pool.flatten(0, 1)[slots] = lines
    assert torch.equal(got, turned_q)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(pools, want, strict=True))
    rows.place(v, k, pools[::-1] if key == value else pools, slots) if key == value else None
    if key == value:
        assert torch.equal(pools[1].flatten(0, 1)[slots], v) and len(launched) == 2


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """As transformers rotates the first part of heads [T, H, D]."""
    turned = rotation.cos.shape[1]
    part = x[None, :, :, :turned].transpose(1, 2)
    out = x.clone()
    out[..., :turned] = apply_rotary_pos_emb(part, part, rotation.cos[None], rotation.sin[None])[0][
        0
    ].transpose(0, 1)
    return out


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_activations(
    activation: str, dtype: torch.dtype, kernels: torch.device, launched: list[str]
) -> None:
    """More numbers than one program has, gate and up side by side."""
    gate, up = (4 * normal(1, 3, 2 * 1100, dtype=dtype, device=kernels)).chunk(2, -1)
    got = rows.gated(gate, up, activation)
    own = silu(gate) if activation == "silu" else gelu(gate, approximate="tanh")
    want = own * up
    assert launched == ["gated"] and got.shape == want.shape
    step = torch.finfo(dtype).eps * (gate * up).double().abs().clamp(min=1e-2)
    assert ((got.double() - want.double()).abs() <= 4 * step).all()
    near = gate > -2  # where torch's own 1 + tanh(x) has numbers left
    assert dtype not in HALVES or (got == want)[near].double().mean() > 0.99


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_wide_gates_overflow_to_what_torch_says(kernels: torch.device, launched: list[str]) -> None:
    gate = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4, float("nan")]], device=kernels)
    for activation, own in (("silu", silu), ("gelu_tanh", lambda x: gelu(x, approximate="tanh"))):
        got = rows.gated(gate, torch.ones_like(gate), activation)
        torch.testing.assert_close(got, own(gate), equal_nan=True)
    assert launched == ["gated"] * 2


@pytest.mark.parametrize("name", ["norm", "placed", "gated"])
@pytest.mark.parametrize("wrong", [False, True])
def test_a_wrong_kernel_is_not_used(
    name: str, wrong: bool, kernels: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried on the model's shapes first; what torch does instead is right."""
    monkeypatch.setattr(rows, "trusted", trial.trusted)
    monkeypatch.setattr(trial, "_found", {})
    launch, calls = getattr(triton_rows, name), list[int]()

    def other(*given: Any, **named: Any) -> Any:
        calls.append(1)
        out = launch(*given, **named)
        if wrong:
            (out[0] if isinstance(out, tuple) else out).mul_(1.1)
        return out

    monkeypatch.setattr(triton_rows, name, other)
    x = normal(4, 2, 16, dtype=torch.float32, device=kernels)
    rotation = Rotation(torch.zeros(4, 16, device=kernels), torch.ones(4, 16, device=kernels))
    pools = (torch.zeros(1, 16, 2, 16, device=kernels), torch.zeros(1, 16, 2, 16, device=kernels))
    slots, weight = torch.arange(4, device=kernels), torch.ones(16, device=kernels)
    uses: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        "norm": (
            lambda: rows.norm(x, weight, 1e-5, NORM_KINDS[0]),
            rows.written_out_norm(x, weight, 1e-5, NORM_KINDS[0]),
        ),
        "placed": (
            lambda: rows.rotate_and_place(x.clone(), x.clone(), x, rotation, pools, slots),
            rotated(x, rotation),
        ),
        "gated": (lambda: rows.gated(x, x, "silu"), silu(x) * x),
    }
    use, want = uses[name]
    if wrong:
        with pytest.warns(UserWarning, match="kernel is off by"):
            torch.testing.assert_close(use(), want)
    else:
        torch.testing.assert_close(use(), want)
    tried = len(calls)
    torch.testing.assert_close(use(), want)
    assert tried > 0 and len(calls) == (tried if wrong else tried + 1)
