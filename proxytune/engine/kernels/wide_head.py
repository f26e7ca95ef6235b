"""The output head of a model in 16 bits, with logits in float32.

Products are summed in float32 anyway. To round the sums to bfloat16 leaves steps of 0.125 between logits of
16 and 32, and proxy-tuning adds three of them. It costs nothing: logits are made wide next anyway."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from proxytune.engine.kernels.native import NotBuilt, library

HALVES = (torch.bfloat16, torch.float16)
CHUNK = 1 << 24
"""Numbers of a weight that are made wide at a time, where the product is written out."""


class WideHead(nn.Linear):
    """An nn.Linear whose output is float32 where its weights have 16 bits."""

    @classmethod
    def over(cls, layer: nn.Linear) -> WideHead:
        """The same layer: parameters are shared, not copied."""
        new = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        new.weight, new.bias = layer.weight, layer.bias
        return new

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if x.dtype not in HALVES or x.dtype != self.weight.dtype:
            return linear(x, self.weight, self.bias)
        out = wide_product(x.reshape(-1, self.in_features), self.weight)
        out = out if self.bias is None else out.add_(self.bias)
        return out.view(*x.shape[:-1], self.out_features)


def use_wide_head(model: nn.Module) -> None:
    """Put a WideHead in the place of a model's output head, if that is a plain layer of 16 bits. On a CPU the
    product is one of ours, in bfloat16 and where there is a compiler: torch and oneDNN have none."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not nn.Linear or head.weight.dtype not in HALVES:
        return
    if head.weight.is_cuda or (head.weight.dtype == torch.bfloat16 and on_cpu() is not None):
        for path in [path for path, module in model.named_modules() if module is head]:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, WideHead.over(head))


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] times weight [N, K], both of 16 bits, -> [M, N] in float32."""
    if x.is_cuda and has_wide_product(x.dtype):
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    kernel = on_cpu() if x.device.type == "cpu" and x.dtype == torch.bfloat16 else None
    if kernel is not None and weight.is_contiguous():
        x, out = x.contiguous(), torch.empty(len(x), len(weight), dtype=torch.float32)
        sizes = *x.shape, len(weight), torch.get_num_threads()
        kernel(x.data_ptr(), weight.data_ptr(), out.data_ptr(), *sizes)
        return out
    wide, step = x.float(), max(1, CHUNK // weight.shape[1])
    parts = (weight[first : first + step] for first in range(0, len(weight), step))
    return torch.cat([wide @ part.float().T for part in parts], 1)


@cache
def on_cpu() -> Callable[..., None] | None:
    """The product in C++ (cpu_head.cpp); None where it could not be compiled."""
    try:
        function = library("cpu_head")["wide_product"]
    except NotBuilt:
        return None
    function.argtypes = (*(ctypes.c_void_p,) * 3, *(ctypes.c_int64,) * 4)
    function.restype = None
    return function


@cache
def has_wide_product(dtype: torch.dtype) -> bool:
    """Whether torch multiplies 16 bits into float32 on this GPU: 1 + 2**-12 is no number of 16 bits."""
    x = torch.zeros(16, 16, dtype=dtype, device="cuda")
    x[0, 0], x[0, 1], x[1, 0], x[1, 1] = 1.0, 2.0**-12, 1.0, 1.0
    try:
        out = torch.mm(x[:1], x.T, out_dtype=torch.float32)
    except (TypeError, NotImplementedError, RuntimeError):
        return False
    return out.dtype == torch.float32 and float(out[0, 1]) == 1 + 2.0**-12
