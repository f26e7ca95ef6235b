"""The output head of a model in 16 bits, with logits in float32.

Products are summed in float32 anyway. To round the sums to bfloat16 leaves steps of 0.125 between logits of
16 and 32, and proxy-tuning adds three of them. It costs nothing: logits are made wide next anyway."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

DEVICES = {"cuda"}
"""Types of devices on which logits come out wide. oneDNN, which multiplies on a CPU, has no such product."""
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
    """Put a WideHead in the place of a model's output head, if that is a plain layer of 16 bits."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not nn.Linear or head.weight.dtype not in HALVES:
        return
    if head.weight.device.type in DEVICES:
        places = [path for path, module in model.named_modules() if module is head]
        for path in places:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, WideHead.over(head))


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] times weight [N, K], both of 16 bits, -> [M, N] in float32."""
    if x.is_cuda and has_wide_product(x.dtype):
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    wide, step = x.float(), max(1, CHUNK // weight.shape[1])
    parts = (weight[first : first + step] for first in range(0, len(weight), step))
    return torch.cat([wide @ part.float().T for part in parts], 1)


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
