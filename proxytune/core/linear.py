"""Linear layers for decoding in float32 on a CPU: the kernel is chosen by the number of rows.

torch's own linear is made for the many rows of training; with the 1 to 64 rows of a decode step it is two to
four times slower than other ways to the same product (benchmarks/README.md). Which way is taken depends on
sizes alone, never on a measurement, so that a run rounds in the same way every time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

WORTH = 1 << 15
"""Weights of fewer numbers are left alone: choosing would cost more than it gains."""
CACHED = 1 << 18
"""Weights of fewer numbers lie in the CPU's cache: with one row, torch's linear is best for them."""
SMALL = 1 << 19
"""Weights of fewer numbers are best multiplied from the left, as W @ x.T, by a few rows."""
FEW_ROWS = 64


def _onednn() -> Callable[..., Any] | None:
    """oneDNN's linear kernel, a private operation of torch: None where this build of torch lacks it."""
    try:
        kernel: Callable[..., Any] = torch.ops.mkldnn._linear_pointwise
        with torch.inference_mode():
            x, w = torch.ones(1, 2), torch.ones(3, 2)
            right = bool((kernel(x, w, None, "none", [], "") == 2).all())
    except (AttributeError, RuntimeError):
        return None
    return kernel if right else None


ONEDNN = _onednn()


class RowLinear(nn.Linear):
    """nn.Linear with the same weights, for few rows at a time."""

    @classmethod
    def over(cls, layer: nn.Linear) -> RowLinear:
        """The same layer: parameters are shared, not copied."""
        new = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        new.weight, new.bias = layer.weight, layer.bias
        return new

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        rows, numbers = x.numel() // self.in_features, self.weight.numel()
        if 1 < rows <= FEW_ROWS and (numbers < SMALL or (ONEDNN is None and rows <= 4)):
            flat = x.reshape(rows, self.in_features)
            y = (self.weight @ flat.T).T.contiguous().view(*x.shape[:-1], self.out_features)
            return y if self.bias is None else y + self.bias
        if ONEDNN is not None and numbers >= CACHED:
            out: Tensor = ONEDNN(x, self.weight, self.bias, "none", [], "")
            return out
        return linear(x, self.weight, self.bias)


def use_row_linears(model: nn.Module) -> None:
    """Put RowLinear in the place of every plain float32 linear layer on the CPU that is large enough."""
    for path, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or layer.weight.numel() < WORTH:
            continue
        if layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu":
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, RowLinear.over(layer))
