"""RMS norms for decoding in float32 on a CPU: one call instead of the eight operations that a model of
transformers is written in, or the six of torch's own. With a few rows their number is what they cost."""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from proxytune.native import NotBuilt, library

NEAR = 1e-5
"""How far two roundings of a norm of standard normal numbers may be apart."""


@cache
def _kernel() -> Callable[..., None] | None:
    """cpu_norm.cpp; None where it could not be compiled."""
    try:
        function = library("core/cpu_norm")["rms_norm"]
    except NotBuilt:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = (pointer, pointer, pointer, number, number, ctypes.c_float, number)
    function.restype = None
    return function


class RowNorm(nn.RMSNorm):
    """nn.RMSNorm of float32 on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        kernel, weight = _kernel(), self.weight
        known = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous()
        if kernel is None or not known:
            return super().forward(x)
        size = weight.shape[0]
        out = torch.empty_like(x)
        where = x.data_ptr(), weight.data_ptr(), out.data_ptr()
        kernel(*where, x.numel() // size, size, self.eps, torch.get_num_threads())
        return out


def use_row_norms(model: nn.Module) -> None:
    """Put RowNorm in the place of every float32 module on the CPU that computes the same. Which ones
    do is tried out: norms that add one to their weight or subtract the mean look alike from outside."""
    for path, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not isinstance(eps, float):
            continue
        alone = len(list(module.parameters())) == 1 and not list(module.children())
        alone &= len(inspect.signature(module.forward).parameters) == 1  # no gate
        if alone and weight.dtype == torch.float32 and weight.device.type == "cpu":
            own = RowNorm(weight.shape[0], eps, device="meta")
            own.weight = weight  # shared, not copied
            if _same(module, own):
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, own)


@torch.inference_mode()
def _same(module: nn.Module, own: RowNorm) -> bool:
    """Whether both give the same on ordinary, on small and on shifted numbers, where eps and a mean show."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, own.weight.shape[0], generator=draw)
    for probe in (x, x * (own.eps or 0.0) ** 0.5, x + 1):
        expected, got = module(probe[None]), own(probe[None])
        if expected.shape != got.shape or not torch.allclose(got, expected, rtol=NEAR, atol=NEAR):
            return False
    return True
