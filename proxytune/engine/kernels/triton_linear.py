"""Triton kernel of `int8.Int8Linear`: activations times int8 weights, for a few rows at a time.

Run so far in Triton's interpreter on CPU tensors, and compiled for sm_80 and sm_90 without being run there;
the block sizes are reasoned, not tuned (benchmarks/gpu_kernels.py measures them). Importing this module needs
the package `triton`.

One pass over the weights, no atomics and no second kernel, so a result depends on its inputs and the number
of rows alone. The weights are the left operand: their 16 to 64 outputs fill the tensor cores' long side,
whereas one token would leave it empty."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 264
"""Programs to aim for: two per multiprocessor of an H200."""


class Blocks(NamedTuple):
    """How the work of one call is cut."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


@triton.jit
def linear_kernel(
    x, weight, scale, bias, out, rows, outputs, inputs, x_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, BIASED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out[m, n] = scale[n] * sum_k x[m, k] * weight[n, k] + bias[n], summed in float32."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    weight_at = weight + n.to(tl.int64)[:, None] * inputs + k[None, :]
    x_at = x + m[None, :] * x_row + k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k_first in range(0, inputs, BLOCK_K):
        if EVEN:  # whole blocks: no masks in the way of wide loads
            w = tl.load(weight_at)
            a = tl.load(x_at, mask=(m < rows)[None, :], other=0.0)
        else:
            inside = k_first + k < inputs
            w = tl.load(weight_at, mask=(n < outputs)[:, None] & inside[None, :], other=0)
            a = tl.load(x_at, mask=inside[:, None] & (m < rows)[None, :], other=0.0)
        if WIDEN:
            a = a.to(tl.float32)
        acc = tl.dot(w.to(a.dtype), a, acc, input_precision="ieee")  # int8 is exact in every float dtype
        weight_at += BLOCK_K
        x_at += BLOCK_K
    acc = acc * tl.load(scale + n, mask=n < outputs, other=0.0)[:, None]
    if BIASED:
        acc = acc + tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[:, None]
    place = m.to(tl.int64)[None, :] * outputs + n[:, None]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=(m < rows)[None, :] & (n < outputs)[:, None])


def blocks(rows: int, outputs: int, dtype: torch.dtype) -> Blocks:
    """Fewer outputs per program where there are few, so that every multiprocessor has weights to read."""
    m = min(64, max(16, triton.next_power_of_2(rows)))
    n = next((n for n in (64, 32) if triton.cdiv(outputs, n) >= PROGRAMS), 16)
    if dtype == torch.float32:  # no tensor cores: larger tiles would not fit the registers
        return Blocks(16, n, 64, 4, 2)
    return Blocks(m, n, 256 if m == 16 else 128, 2 if n == 16 else 4, 4)


def launch(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, cut: Blocks | None = None
) -> Tensor:
    """x [M, K] of 16 or 32 bits, weight [N, K] int8, scale [N] float32, bias [N] -> [M, N] in x's dtype."""
    (rows, inputs), outputs = x.shape, weight.shape[0]
    cut = cut or blocks(rows, outputs, x.dtype)
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(outputs, cut.outputs), triton.cdiv(rows, cut.rows))
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        linear_kernel[grid](
            x, weight, scale, scale if bias is None else bias, out, rows, outputs, inputs, x.stride(0),
            BLOCK_M=cut.rows, BLOCK_N=cut.outputs, BLOCK_K=cut.inputs,
            EVEN=inputs % cut.inputs == 0 and outputs % cut.outputs == 0, BIASED=bias is not None,
            # the interpreter multiplies the bits of bfloat16 (triton-lang/triton#11584)
            WIDEN=triton.knobs.runtime.interpret and x.dtype == torch.bfloat16,
            num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
    return out
