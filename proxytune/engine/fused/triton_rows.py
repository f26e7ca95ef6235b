"""Triton kernels of `rows`: what a model does to every token by itself, between its products.

Results are rounded to the models' dtype wherever transformers rounds them, so that values are the same but
for the order of a sum and for functions like exp. Run so far in Triton's interpreter on CPU tensors, and
compiled for sm_80 and sm_90 without being run there. Importing this module needs the package `triton`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SILU, GELU_TANH = 0, 1
"""Activations that `gate_kernel` knows."""
GATE_BLOCK = 1024
"""Numbers per program of a gated activation."""


@triton.jit
def norm_kernel(
    x, residual, weight, total, out, eps, inner, x_outer, x_inner,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ADDED: tl.constexpr, LATE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """One row of an RMS norm, of x or of x + residual, which then goes to `total`. LATE rounds once, after
    the weight, to which SHIFT is added."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    live = at < SIZE
    value = tl.load(x + row // inner * x_outer + row % inner * x_inner + at, mask=live, other=0.0)
    if ADDED:
        more = tl.load(residual + row * SIZE + at, mask=live, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(out.dtype.element_ty)
        tl.store(total + row * SIZE + at, value, mask=live)
    wide = value.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    scale = tl.load(weight + at, mask=live, other=0.0).to(tl.float32)
    result = wide * (scale + SHIFT) if LATE else wide.to(out.dtype.element_ty).to(tl.float32) * scale
    tl.store(out + row * SIZE + at, result.to(out.dtype.element_ty), mask=live)


@triton.jit
def _rounded(value, like):
    """A product as the models' dtype has it, made wide again."""
    return value.to(like.dtype.element_ty).to(value.dtype)


@triton.jit
def _turn(
    source, cos, sin, target,
    SIZE: tl.constexpr, TURNED: tl.constexpr, HALF: tl.constexpr, PAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A head of SIZE numbers, of which the first TURNED are rotated, halves against halves."""
    at = tl.arange(0, HALF)
    live = at < TURNED // 2
    low = tl.load(source + at, mask=live, other=0.0).to(WIDE)
    high = tl.load(source + TURNED // 2 + at, mask=live, other=0.0).to(WIDE)
    low_cos = tl.load(cos + at, mask=live, other=0.0).to(WIDE)
    low_sin = tl.load(sin + at, mask=live, other=0.0).to(WIDE)
    high_cos = tl.load(cos + TURNED // 2 + at, mask=live, other=0.0).to(WIDE)
    high_sin = tl.load(sin + TURNED // 2 + at, mask=live, other=0.0).to(WIDE)
    first = _rounded(low * low_cos, target) - _rounded(high * low_sin, target)
    second = _rounded(high * high_cos, target) + _rounded(low * high_sin, target)
    tl.store(target + at, first.to(target.dtype.element_ty), mask=live)
    tl.store(target + TURNED // 2 + at, second.to(target.dtype.element_ty), mask=live)
    if TURNED < SIZE:
        _copy(source, target, TURNED, SIZE, PAD)


@triton.jit
def _copy(source, target, FIRST: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr):
    at = tl.arange(0, PAD)
    live = (at >= FIRST) & (at < SIZE)
    tl.store(target + at, tl.load(source + at, mask=live), mask=live)


@triton.jit
def place_kernel(
    query, key, value, cos, sin, slots, turned, keys, values,
    q_token, q_head, k_token, k_head, v_token, v_head, cos_token, sin_token, heads, kv_heads,
    DK: tl.constexpr, DK_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    TURNED: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One head of one token: a key or value goes to its slot in the pool, the key rotated; or a query is
    rotated. Programs of the second grid axis are the keys, the values, then the queries."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if head < 2 * kv_heads:
        slot = tl.load(slots + token)
        if head < kv_heads:
            source, target = key + token * k_token + head * k_head, keys + (slot * kv_heads + head) * DK
            if TURNED == 0:
                _copy(source, target, 0, DK, DK_PAD)
            else:
                _turn(
                    source, cos + token * cos_token, sin + token * sin_token, target,
                    DK, TURNED, HALF, DK_PAD, WIDE,
                )  # fmt: skip
        else:
            head = head - kv_heads
            source, target = value + token * v_token + head * v_head, values + (slot * kv_heads + head) * DV
            _copy(source, target, 0, DV, DV_PAD)
    else:
        head = head - 2 * kv_heads
        _turn(
            query + token * q_token + head * q_head, cos + token * cos_token, sin + token * sin_token,
            turned + (token * heads + head) * DK, DK, TURNED, HALF, DK_PAD, WIDE,
        )  # fmt: skip


@triton.jit
def gate_kernel(
    gate, up, out, gate_row, up_row, size,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out = activation(gate) * up."""
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    x = tl.load(gate + row * gate_row + at, mask=live, other=0.0).to(WIDE)
    if ACTIVATION == 0:
        x = x / (1.0 + tl.exp(-x))
    else:  # 1 + tanh(y) is 2 / (1 + exp(-2y)), and no exp may overflow
        y = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        small = tl.exp(-2.0 * tl.abs(y))
        x = x * tl.where(y < 0.0, small, 1.0) / (1.0 + small)
    result = _rounded(x, out) * tl.load(up + row * up_row + at, mask=live, other=0.0).to(WIDE)
    tl.store(out + row * size + at, result.to(out.dtype.element_ty), mask=live)


def wide(dtype: torch.dtype) -> tl.dtype:
    """What a kernel computes in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def norm_warps(block: int) -> int:
    """Warps of a program, whose threads have 16 numbers each where there are many."""
    return min(16, max(1, block // 512))


def norm(
    x: Tensor,  # [M, N, d]
    weight: Tensor,  # [d]
    eps: float,
    late: bool,
    shift: float,
    residual: Tensor | None = None,  # [M * N, d], contiguous
) -> tuple[Tensor, Tensor]:
    """The norm [M, N, d], and what it is of: x, or x + residual."""
    outer, inner, size = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(out)
    block = triton.next_power_of_2(size)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        norm_kernel[(outer * inner,)](
            x, x if residual is None else residual, weight, total, out, eps, inner, *x.stride()[:2],
            SIZE=size, BLOCK=block, ADDED=residual is not None, LATE=late, SHIFT=shift,
            num_warps=norm_warps(block),
        )  # fmt: skip
    return out, total


def placed(
    query: Tensor | None,  # [T, H, Dk]
    key: Tensor,  # [T, Hkv, Dk]
    value: Tensor,  # [T, Hkv, Dv]
    rotation: tuple[Tensor, Tensor] | None,  # [T, R] each
    pools: tuple[Tensor, Tensor],  # [.., Hkv, Dk] and [.., Hkv, Dv], contiguous
    slots: Tensor,  # [T]
) -> Tensor:
    """Rotate queries and keys, store keys and values; without a rotation, only store. -> queries [T, H, Dk],
    or nothing."""
    tokens, kv_heads, dk = key.shape
    heads, dv = 0 if query is None else query.shape[1], value.shape[2]
    query = key if query is None else query
    turned = torch.empty(tokens, heads, dk, dtype=key.dtype, device=key.device)
    cos, sin = (key[:, 0], key[:, 0]) if rotation is None else rotation
    size = 0 if rotation is None else cos.shape[1]
    with torch.cuda.device_of(key):  # type: ignore[no-untyped-call]
        place_kernel[(tokens, 2 * kv_heads + heads)](
            query, key, value, cos, sin, slots, turned, *pools,
            *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], cos.stride(0), sin.stride(0),
            heads, kv_heads,
            DK=dk, DK_PAD=triton.next_power_of_2(dk), DV=dv, DV_PAD=triton.next_power_of_2(dv),
            TURNED=size, HALF=max(1, triton.next_power_of_2(size // 2)), WIDE=wide(key.dtype), num_warps=1,
        )  # fmt: skip
    return turned


def gated(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    """activation(gate) * up for gate and up [M, N]."""
    rows, size = gate.shape
    out = torch.empty(rows, size, dtype=gate.dtype, device=gate.device)
    with torch.cuda.device_of(gate):  # type: ignore[no-untyped-call]
        gate_kernel[(triton.cdiv(size, GATE_BLOCK), rows)](
            gate, up, out, gate.stride(0), up.stride(0), size,
            ACTIVATION=activation, BLOCK=GATE_BLOCK, WIDE=wide(gate.dtype), num_warps=4,
        )  # fmt: skip
    return out
