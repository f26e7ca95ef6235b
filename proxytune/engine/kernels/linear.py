"""Linear layers for decoding on a CPU: the kernel is chosen by the number of rows.

torch's own linear is made for the many rows of training; with the 1 to 500 rows of a decode step it is up to
four times slower than other ways to the same product (benchmarks/README.md). Best is oneDNN on weights in its
own layout, in float32 and, on processors that multiply bfloat16, at twice that speed. The layout takes the
place of the weights, so that a model is in memory once. Which way is taken depends on sizes alone, never on
a measurement, so that a run rounds in the same way every time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

WORTH = 1 << 15
"""Weights of fewer numbers are left alone: choosing would cost more than it gains."""
LIGHT = 1 << 17
"""Float32 weights of fewer numbers are best multiplied by one row as torch does it, and keep its layout."""
NARROW = 1024
"""Most inputs for which two rows are best multiplied as W @ x.T, and one row as two of it: a product with one
column runs on one thread."""
FEWEST = 4
"""Rows that oneDNN's own layout is read for; fewer are read more slowly."""


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
            right &= bool((reorder(w, TYPICAL).to_dense() == w).all())
    except (AttributeError, RuntimeError):
        return None
    return (kernel, reorder) if right else None


def _onednn_dtypes() -> frozenset[torch.dtype]:
    """What oneDNN multiplies at full speed here."""
    if ONEDNN is None:
        return frozenset()
    try:
        halves = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        halves = False
    return frozenset({torch.float32, torch.bfloat16} if halves else {torch.float32})


TYPICAL = 16
"""The number of rows that weights are laid out for. Any above one gives the same layout."""
ONEDNN = _onednn()
ONEDNN_DTYPES = _onednn_dtypes()


class RowLinear(nn.Linear):
    """nn.Linear for few rows at a time. Where it is `packed`, its `weight` is None until it is asked for."""

    packed: Tensor | None = None
    """The weights in oneDNN's layout, which only oneDNN reads."""

    @classmethod
    def over(cls, layer: nn.Linear) -> RowLinear:
        """The same layer: parameters are shared, not copied."""
        new = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        new.weight, new.bias = layer.weight, layer.bias
        return new

    def pack(self) -> None:
        """Lay the weights out as oneDNN likes them, and let go of them as they were."""
        if ONEDNN is not None and self.packed is None:
            with torch.inference_mode():
                self.packed = ONEDNN[1](self.weight, TYPICAL)
            self.register_parameter("weight", None)

    def show(self) -> None:
        """Put the weights beside their layout, for who reads them in every forward (an adapter of PEFT's)."""
        self.weight = nn.Parameter(dense(self), requires_grad=False)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, which will get other weights, has the plain ones: oneDNN's layout is opaque to torch."""
        if self.packed is None:
            return {**self.__dict__}
        weight = nn.Parameter(dense(self), requires_grad=False)
        return {**self.__dict__, "packed": None, "_parameters": {**self._parameters, "weight": weight}}

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        width = self.in_features
        rows = x.numel() // width
        if self.packed is not None:
            return self._by_onednn(x, rows, self.packed, max(rounded(rows), FEWEST))
        if rows == 0 or x.dtype != torch.float32 or (rows == 1 and self.weight.numel() < LIGHT):
            return linear(x, self.weight, self.bias)
        if rows <= 2 and width <= NARROW:
            return self._from_the_right(x, rows)
        if ONEDNN is not None:
            return self._by_onednn(x, rows, self.weight, rounded(rows))
        return self._from_the_right(x, rows) if 1 < rows <= 4 else linear(x, self.weight, self.bias)

    def _by_onednn(self, x: Tensor, rows: int, weight: Tensor, filled: int) -> Tensor:
        assert ONEDNN is not None
        if rows == 0:
            return x.new_empty(*x.shape[:-1], self.out_features)
        shape = x.shape[:-1]
        if filled > rows:
            x = x.reshape(rows, self.in_features)
            # whatever the further rows hold: to repeat one is cheaper than to add zeros
            x = x.expand(filled, -1).contiguous() if rows == 1 else pad(x, (0, 0, 0, filled - rows))
        out: Tensor = ONEDNN[0](x, weight, self.bias, "none", [], "")
        return (out[:rows] if filled > rows else out).view(*shape, self.out_features)

    def _from_the_right(self, x: Tensor, rows: int) -> Tensor:
        flat = x.reshape(rows, self.in_features)
        columns = flat if rows > 1 else flat.expand(2, -1).contiguous()
        y = (self.weight @ columns.T).T[:rows].contiguous().view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def rounded(rows: int) -> int:
    """Rows of zeros are added up to this: oneDNN makes a program for every number of rows, which takes it a
    millisecond and evicts an older one, and a batch has another number at every step. Where a whole forward
    is so many tokens, its layers need not do it one by one."""
    step = 1 if rows <= 8 else 4 if rows <= 64 else 16 if rows <= 256 else 64
    return -(-rows // step) * step


def use_row_linears(model: nn.Module) -> int:
    """Put RowLinear in the place of every plain linear layer on the CPU that is large enough, in oneDNN's
    layout where nothing else uses its weights. -> bytes of what lies in that layout.

    An embedding that is tied to the output head looks rows up in its weights, so these stay as they are. So
    do those within a layer of PEFT's, which reads dtypes and values of what it wraps."""
    places = [
        (path, layer)
        for path, layer in model.named_modules()
        if type(layer) is nn.Linear and layer.weight.numel() >= WORTH
        if layer.weight.dtype in (torch.float32, torch.bfloat16) and layer.weight.device.type == "cpu"
    ]
    users = Counter(
        parameter.data_ptr() for module in model.modules() for parameter in module.parameters(recurse=False)
    )
    taken = 0
    while places:  # no list may hold on to a layer whose weights are laid out anew
        path, layer = places.pop()
        parent, _, name = path.rpartition(".")
        new = RowLinear.over(layer)
        setattr(model.get_submodule(parent), name, new)
        weight = layer.weight
        light = weight.dtype == torch.float32 and weight.numel() < LIGHT
        alone = users[weight.data_ptr()] == 1 and not _wrapped(model, path)
        if weight.dtype in ONEDNN_DTYPES and not light and alone:
            taken += weight.nbytes
            del layer, weight
            new.pack()
    return taken


def _wrapped(model: nn.Module, path: str) -> bool:
    """Whether a module lies within an adapter's layer: beside a `base_layer`, or in a dictionary by name."""
    parts = path.split(".")
    above = (model.get_submodule(".".join(parts[:end])) for end in range(len(parts)))
    return any(hasattr(module, "base_layer") or isinstance(module, nn.ModuleDict) for module in above)


def dense(layer: nn.Module) -> Tensor:
    """The weights of a layer, in whichever layout it has them."""
    if isinstance(layer, RowLinear) and layer.packed is not None:
        return layer.packed.to_dense()
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight


def show_weights(model: nn.Module) -> None:
    """Put the weights of every packed layer beside their layout: what computes with that goes on."""
    for module in model.modules():
        if isinstance(module, RowLinear) and module.packed is not None:
            module.show()
