"""What decoding does to every token by itself, on the CPU, as one call of C++ (cpu_rows.cpp). Where there is
no compiler, or for dtypes that it does not take, torch does it in several."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import rms_norm as rms_norm_by_torch

from proxytune.engine.kernels.native import NotBuilt, library

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
NORMS = {torch.float32: "rms_norm_float32", torch.bfloat16: "rms_norm_bfloat16"}
ROTATIONS = {
    torch.float32: "rotate_float32",
    torch.float64: "rotate_float64",
    torch.bfloat16: "rotate_bfloat16",
}


@cache
def built(name: str) -> Callable[..., None] | None:
    """A function of cpu_rows.cpp; None where it could not be compiled."""
    try:
        function = library("cpu_rows")[name]
    except NotBuilt:
        return None
    rest = (_NUMBER, _NUMBER, ctypes.c_float) if name in NORMS.values() else (_NUMBER,) * 4
    function.argtypes = (*(_POINTER,) * 3, *rest, _NUMBER)
    function.restype = None
    return function


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., d] and a weight [d] -> [..., d]. In bfloat16 it is rounded before the weight too."""
    known = x.dtype == weight.dtype and x.device.type == "cpu" and x.is_contiguous()
    kernel = built(NORMS[x.dtype]) if known and x.dtype in NORMS else None
    if kernel is None:
        return rms_norm_by_torch(x, weight.shape, weight, eps)
    size = weight.shape[0]
    out = torch.empty_like(x)
    where = x.data_ptr(), weight.data_ptr(), out.data_ptr()
    kernel(*where, x.numel() // size, size, eps, torch.get_num_threads())
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021), halves against halves: x [T, H, D], cos and sin [T, R] of
    one dtype, R <= D -> [T, H, D]. x may be overwritten."""
    kernel = built(ROTATIONS[x.dtype]) if x.dtype in ROTATIONS and x.device.type == "cpu" else None
    turned = cos.shape[-1]
    if kernel is None or not x.is_contiguous():
        rest = x[..., turned:]
        x = x[..., :turned]
        low, high = x.chunk(2, dim=-1)
        x = x * cos[:, None] + torch.cat((-high, low), dim=-1) * sin[:, None]
        return x if rest.shape[-1] == 0 else torch.cat((x, rest), dim=-1)
    cos, sin = cos.contiguous(), sin.contiguous()
    kernel(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), *x.shape, turned, torch.get_num_threads())
    return x
