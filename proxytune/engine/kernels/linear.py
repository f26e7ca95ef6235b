"""Linear layers for decoding in float32 on a CPU: the kernel is chosen by the number of rows.

torch's own linear is made for the many rows of training; with the 1 to 500 rows of a decode step it is up to
four times slower than other ways to the same product (benchmarks/README.md). Which way is taken depends on
sizes alone, never on a measurement, so that a run rounds in the same way every time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

WORTH = 1 << 15
"""Weights of fewer numbers are left alone: choosing would cost more than it gains."""
LIGHT = 1 << 17
"""Weights of fewer numbers are best multiplied by one row as torch does it."""
NARROW = 1024
"""Most inputs for which two rows are best multiplied as W @ x.T, and one row as two of it: a product with one
column runs on one thread."""
PACKED = 1 << 28
"""A model whose linear layers have no more numbers than this keeps a second copy of them in oneDNN's own
layout: at most 1 GiB."""


def _onednn() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """oneDNN's linear kernel and what lays its weights out, private operations of torch: None where this
    build of torch lacks them."""
    try:
        kernel: Callable[..., Any] = torch.ops.mkldnn._linear_pointwise.default
        reorder: Callable[..., Any] = torch.ops.mkldnn._reorder_linear_weight.default
        with torch.inference_mode():
            x, w = torch.ones(1, 2), torch.ones(3, 2)
            packed = kernel(x, reorder(w, TYPICAL), None, "none", [], "")
            right = bool((kernel(x, w, None, "none", [], "") == 2).all() and (packed == 2).all())
    except (AttributeError, RuntimeError):
        return None
    return (kernel, reorder) if right else None


TYPICAL = 16
"""The number of rows that weights are laid out for. Any above one gives the same layout."""
ONEDNN = _onednn()


class RowLinear(nn.Linear):
    """nn.Linear with the same weights, for few rows at a time."""

    packs = False
    """Whether to keep the weights in oneDNN's layout too."""
    _packed: tuple[object, Tensor] | None = None

    @classmethod
    def over(cls, layer: nn.Linear, packs: bool = False) -> RowLinear:
        """The same layer: parameters are shared, not copied."""
        new = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        new.weight, new.bias, new.packs = layer.weight, layer.bias, packs
        return new

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        width = self.in_features
        rows = x.numel() // width
        if rows == 0 or (rows == 1 and self.weight.numel() < LIGHT):
            return linear(x, self.weight, self.bias)
        if rows <= 2 and width <= NARROW:
            return self._from_the_right(x, rows)
        if ONEDNN is not None:
            return self._by_onednn(x, rows).view(*x.shape[:-1], self.out_features)
        return self._from_the_right(x, rows) if 1 < rows <= 4 else linear(x, self.weight, self.bias)

    def _by_onednn(self, x: Tensor, rows: int) -> Tensor:
        assert ONEDNN is not None
        weight = self._in_its_layout() if self.packs and rows > 1 else self.weight
        missing = rounded(rows) - rows
        if missing:
            x = pad(x.reshape(rows, self.in_features), (0, 0, 0, missing))
        out: Tensor = ONEDNN[0](x, weight, self.bias, "none", [], "")
        return out[:rows] if missing else out

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own second copy of the weights: oneDNN's layout is opaque to torch."""
        return {**self.__dict__, "_packed": None}

    def _from_the_right(self, x: Tensor, rows: int) -> Tensor:
        flat = x.reshape(rows, self.in_features)
        columns = flat if rows > 1 else flat.expand(2, -1).contiguous()
        y = (self.weight @ columns.T).T[:rows].contiguous().view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _in_its_layout(self) -> Tensor:
        """The weights as oneDNN likes them, made when first needed and again if they have changed."""
        assert ONEDNN is not None
        state = self.weight.data_ptr(), None if self.weight.is_inference() else self.weight._version
        if self._packed is None or self._packed[0] != state:
            with torch.inference_mode():
                self._packed = state, ONEDNN[1](self.weight, TYPICAL)
        return self._packed[1]


def rounded(rows: int) -> int:
    """Rows of zeros are added up to this: oneDNN makes a program for every number of rows, which takes it a
    millisecond and evicts an older one, and a batch has another number at every step. Where a whole forward
    is so many tokens, its layers need not do it one by one."""
    step = 1 if rows <= 8 else 8 if rows <= 64 else 16 if rows <= 256 else 64
    return -(-rows // step) * step


def use_row_linears(model: nn.Module) -> int:
    """Put RowLinear in the place of every plain float32 linear layer on the CPU that is large enough. -> what
    the second copies of weights take, in bytes."""
    places = [
        (path, layer)
        for path, layer in model.named_modules()
        if type(layer) is nn.Linear and layer.weight.numel() >= WORTH
        if layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"
    ]
    numbers = sum(layer.weight.numel() for _, layer in places)
    packs = ONEDNN is not None and numbers <= PACKED
    for path, layer in places:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, RowLinear.over(layer, packs))
    return numbers * torch.float32.itemsize if packs else 0
