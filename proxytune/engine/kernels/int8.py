"""Weight-only 8-bit linear layers: symmetric int8 weights with one scale per output, activations untouched.

Why our own, where a well-kept library would do: in eager mode none of them multiplies int8 weights with
16-bit activations in one pass on CUDA. torchao's Int8Tensor casts the whole weight to the activations' dtype
and calls `mm` (5 bytes of traffic per weight, where bfloat16 weights cost 2), and gets fast through
torch.compile only; bitsandbytes quantises the activations too, asks the device for outliers in every call (so
no CUDA graph) and is documented to be slower than 16 bits at small batches; torch's own
`_weight_int8pack_mm` takes float32 on CUDA and multiplies without tensor cores; EETQ's kernel comes from a
hub. torchao's torch.compile route would compile the model, which we do not."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear

from proxytune.engine.kernels.paged_attention import KERNEL_DTYPES, runs_triton
from proxytune.engine.kernels.stored import StoredLinear
from proxytune.engine.kernels.trial import APART, farthest, trusted

MOST_ROWS = 128
"""Up to this many rows weights are read as int8 by the kernel; more are multiplied with weights that were
made 16 bits wide first, by the vendor's kernel."""
FEW = 12
"""On a CPU up to this many bfloat16 rows go through torch's own product with int8 weights; more are faster
with weights that are made 16 bits wide first."""
TRIED = 64
"""Outputs at both ends of a layer for which the kernel is tried."""
CHUNK = 1024
"""Rows of a matrix that are quantised together, which bounds the float32 copies."""


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [N, K] -> int8 [N, K] and scale [N] float32; |weight - scale * int8| <= scale / 2 everywhere.

    Scales are bfloat16 numbers, rounded up, so that kernels which take them so multiply by the same."""
    rounded = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for first in range(0, weight.shape[0], CHUNK):
        part = weight[first : first + CHUNK].float()
        step = (part.abs().amax(1) / 127 * (1 + 2**-8)).bfloat16().float()
        step[step == 0] = 1.0
        scale[first : first + CHUNK] = step
        rounded[first : first + CHUNK] = (part / step[:, None]).round_().to(torch.int8)
    return rounded, scale


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights in a float dtype [N, K], each rounded once."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    wide = scale.to(torch.promote_types(dtype, torch.float32))
    return torch.mul(weight, wide[:, None], out=out)


class Int8Linear(StoredLinear):
    """A linear layer with int8 `weight` [N, K] and `weight_scale` [N]."""

    quantize = staticmethod(quantize)

    @staticmethod
    def empty(inputs: int, outputs: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        weight = torch.empty(outputs, inputs, dtype=torch.int8, device=device)
        return weight, torch.empty(outputs, dtype=torch.float32, device=device)

    def forward(self, input: Tensor) -> Tensor:
        """[.., K] -> [.., N] in the input's dtype."""
        return product(input, self.weight, self.weight_scale, self.bias)


def product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [.., K] times int8 weights [N, K] with scales [N], plus bias [N] -> [.., N] in x's dtype."""
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    taken = 0 < rows <= MOST_ROWS and x.dtype in KERNEL_DTYPES and runs_triton(x)
    if taken and _right(x, weight, scale, bias):
        from proxytune.engine.kernels.triton_linear import launch

        return launch(x.reshape(rows, -1), weight, scale, bias).view(*x.shape[:-1], outputs)
    if x.device.type == "cpu":
        return _on_cpu(x, weight, scale, bias)
    own = None if bias is None else bias.to(x.dtype)
    return linear(x, dequantize(weight, scale, x.dtype), own)


def _on_cpu(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The weights' integers are exact in every float dtype, so the scale may come after the product."""
    scale, rows = scale.to(x.dtype), x.numel() // weight.shape[1]
    if 0 < rows <= FEW and x.dtype == torch.bfloat16 and has_int8_product():
        out: Tensor = torch._weight_int8pack_mm(x.reshape(rows, -1), weight, scale)
        out = out.view(*x.shape[:-1], len(weight))
    else:
        out = linear(x, weight.to(x.dtype)).mul_(scale)
    return out if bias is None else out.add_(bias.to(x.dtype))


def _right(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel was found to be right for weights of this size and so many rows."""
    from proxytune.engine.kernels.triton_linear import blocks

    rows, dtype = x.numel() // weight.shape[1], x.dtype
    shape = blocks(rows, len(weight), weight.shape[1], dtype), *weight.shape, bias is not None, dtype

    def apart() -> float:
        return _apart(rows, dtype, weight, scale, bias)

    return trusted("int8 kernel", shape, x.device, apart, APART[dtype])


def _apart(rows: int, dtype: torch.dtype, weight: Tensor, scale: Tensor, bias: Tensor | None) -> float:
    """How far the kernel is from the product with wide weights, in standard deviations; for the first and
    last outputs, since a layer can be large."""
    from proxytune.engine.kernels.triton_linear import launch

    draw = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(rows, weight.shape[1], generator=draw, device=weight.device).to(dtype)
    out, apart = launch(x, weight, scale, bias), 0.0
    for ends in (slice(None, TRIED), slice(-TRIED, None)):
        own = None if bias is None else bias[ends].float()
        want = linear(x.float(), dequantize(weight[ends], scale[ends], torch.float32), own)
        far = farthest(out[:, ends], want) / max(float(want.std(correction=0)), 1e-12)
        apart = far if far != far else max(apart, far)
    return apart


@cache
def has_int8_product() -> bool:
    """Whether this build of torch multiplies bfloat16 rows with int8 weights on the CPU."""
    ones = torch.ones(16, 32, dtype=torch.bfloat16)
    try:
        out = torch._weight_int8pack_mm(ones[:1], ones.to(torch.int8), ones[:, 0])
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return bool((out == 32).all())
