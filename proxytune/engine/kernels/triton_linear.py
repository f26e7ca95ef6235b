"""Triton kernel of `int8.Int8Linear`: activations times int8 weights, for a few rows at a time.

Run so far in Triton's interpreter on CPU tensors, and compiled for sm_80 and sm_90 without being run there;
the block sizes are reasoned, not tuned (benchmarks/gpu_kernels.py measures them). Importing this module needs
the package `triton`.

One pass over the weights and no atomics, so a result depends on its inputs and the number of rows alone. The
weights are the left operand: their 16 to 64 outputs fill the tensor cores' long side, whereas one token would
leave it empty. A layer of few outputs would leave multiprocessors without work: its inputs are shared out
too, and a second kernel adds the parts up in their order."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 264
"""Programs to aim for: two per multiprocessor of an H200."""
LEAST_INPUTS = 1024
"""Inputs of one part of a layer whose inputs are shared out: less is not worth adding up."""
ADDED = 256
"""Outputs per program that adds parts up."""


class Blocks(NamedTuple):
    """How the work of one call is cut."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int
    splits: int = 1
    """Parts of the inputs."""


@triton.jit
def linear_kernel(
    x, weight, scale, bias, out, rows, outputs, inputs, x_row, span,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, BIASED: tl.constexpr, SPLIT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out[m, n] = scale[n] * sum_k x[m, k] * weight[n, k] + bias[n], summed in float32. SPLIT: out[s, m, n]
    is the sum over one part of `span` inputs, without scale and bias."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    begin, end = 0, inputs
    if SPLIT:
        begin = tl.program_id(2) * span
        end = tl.minimum(begin + span, inputs)
    weight_at = weight + n.to(tl.int64)[:, None] * inputs + begin + k[None, :]
    x_at = x + m[None, :] * x_row + begin + k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k_first in range(begin, end, BLOCK_K):
        if EVEN:  # whole blocks: no masks in the way of wide loads
            w = tl.load(weight_at)
            a = tl.load(x_at, mask=(m < rows)[None, :], other=0.0)
        else:
            inside = k_first + k < end
            w = tl.load(weight_at, mask=(n < outputs)[:, None] & inside[None, :], other=0)
            a = tl.load(x_at, mask=inside[:, None] & (m < rows)[None, :], other=0.0)
        if WIDEN:
            a = a.to(tl.float32)
        acc = tl.dot(w.to(a.dtype), a, acc, input_precision="ieee")  # int8 is exact in every float dtype
        weight_at += BLOCK_K
        x_at += BLOCK_K
    if not SPLIT:
        acc = acc * tl.load(scale + n, mask=n < outputs, other=0.0)[:, None]
        if BIASED:
            acc = acc + tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[:, None]
    else:
        out += tl.program_id(2).to(tl.int64) * rows * outputs
    place = m.to(tl.int64)[None, :] * outputs + n[:, None]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=(m < rows)[None, :] & (n < outputs)[:, None])


@triton.jit
def add_kernel(
    parts, scale, bias, out, outputs, splits,
    BLOCK: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Add up the parts [S, M, N] of one row, then scale and bias as `linear_kernel` has them."""
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = n < outputs
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(0, splits):
        place = (split * tl.num_programs(1) + row) * outputs + n
        acc += tl.load(parts + place, mask=live, other=0.0)
    acc = acc * tl.load(scale + n, mask=live, other=0.0)
    if BIASED:
        acc = acc + tl.load(bias + n, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row * outputs + n, acc.to(out.dtype.element_ty), mask=live)


def blocks(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> Blocks:
    """Fewer outputs per program where there are few, so that every multiprocessor has weights to read; where
    that leaves half of them idle, parts of the inputs."""
    m = min(64, max(16, triton.next_power_of_2(rows)))
    n = next((n for n in (64, 32) if triton.cdiv(outputs, n) >= PROGRAMS), 16)
    if dtype == torch.float32:  # no tensor cores: larger tiles would not fit the registers
        cut = Blocks(16, n, 64, 4, 2)
    else:
        cut = Blocks(m, n, 256 if m == 16 else 128, 2 if n == 16 else 4, 4)
    programs = triton.cdiv(outputs, cut.outputs) * triton.cdiv(rows, cut.rows)
    if 4 * programs > PROGRAMS:
        return cut
    return cut._replace(splits=max(1, min(PROGRAMS // programs, inputs // LEAST_INPUTS)))


def launch(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, cut: Blocks | None = None
) -> Tensor:
    """x [M, K] of 16 or 32 bits, weight [N, K] int8, scale [N] float32, bias [N] -> [M, N] in x's dtype."""
    (rows, inputs), outputs = x.shape, weight.shape[0]
    cut = cut or blocks(rows, outputs, inputs, x.dtype)
    x = x if x.stride(-1) == 1 else x.contiguous()
    span = triton.cdiv(triton.cdiv(inputs, cut.splits), cut.inputs) * cut.inputs
    splits = triton.cdiv(inputs, span)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    parts = torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device) if splits > 1 else out
    biased, shift = bias is not None, scale if bias is None else bias
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        linear_kernel[(triton.cdiv(outputs, cut.outputs), triton.cdiv(rows, cut.rows), splits)](
            x, weight, scale, shift, parts, rows, outputs, inputs, x.stride(0), span,
            BLOCK_M=cut.rows, BLOCK_N=cut.outputs, BLOCK_K=cut.inputs,
            EVEN=inputs % cut.inputs == 0 and outputs % cut.outputs == 0, BIASED=biased, SPLIT=splits > 1,
            # the interpreter multiplies the bits of bfloat16 (triton-lang/triton#11584)
            WIDEN=triton.knobs.runtime.interpret and x.dtype == torch.bfloat16,
            num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
        if splits > 1:
            add_kernel[(triton.cdiv(outputs, ADDED), rows)](
                parts, scale, shift, out, outputs, splits, BLOCK=ADDED, BIASED=biased, num_warps=2
            )  # fmt: skip
    return out
