"""Weights that are no numbers are found when a model is loaded, not in what it says."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from proxytune.errors import UserError

PIECE = 2**24
"""Numbers that are looked at together where a dtype has to be widened first: it bounds the copies."""


def refuse_broken_weights(weights: Iterable[tuple[str, Tensor]], name: str) -> None:
    """UserError with the name of the first weight that holds a NaN or an infinite number; `name` is what the
    user calls the model or adapter.

    One pass over the weights. Integers, which are quantised weights, cannot be broken, but their scales can.
    Tensors without storage (`meta`, offloaded) are not looked at."""
    looked_at = [
        (key, whole(tensor)) for key, tensor in weights if tensor.is_floating_point() and not tensor.is_meta
    ]
    for key, fine in looked_at:  # read last, so that a GPU is not waited for between two weights
        if not bool(fine):
            raise UserError(
                f"'{name}' has NaN or infinite numbers in its weight {key}: the checkpoint is damaged, or a "
                "cast overflowed (float16 ends at 65504: try `dtype: bfloat16` or float32)"
            )


def whole(tensor: Tensor) -> Tensor:
    """Whether all numbers of a tensor are finite: a bool on its device, without a copy of the tensor."""
    if tensor.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    if tensor.element_size() >= 2:
        low, high = torch.aminmax(tensor.detach())  # NaN if any number is
        return low.isfinite() & high.isfinite()
    flat = tensor.detach().flatten()  # eight bits: no reductions
    pieces = [flat[at : at + PIECE].to(torch.float32).isfinite().all() for at in range(0, len(flat), PIECE)]
    return torch.stack(pieces).all()
