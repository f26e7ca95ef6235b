"""Linear layers of one input as one product: their weights lie in one allocation, of which each layer's own
are a part.

Nothing is in memory twice, and nothing has to be kept up to date: whether the layers lie together is seen
from their tensors in every call. An adapter's layer in the place of one is no plain layer, and then each is
multiplied by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from proxytune.engine.kernels.int8 import Int8Linear, product

PLAIN = (nn.Linear, Int8Linear)
"""Layers whose products can be joined, each with its own kind."""


def join(layers: Sequence[nn.Module]) -> bool:
    """Put the weights of layers into one allocation each, if these are of one kind; False if they are not, or
    if there is no memory for it."""
    if not _alike(layers):
        return False
    if all(_together(parts) is not None for parts in _columns(layers)):
        return True
    try:
        with torch.no_grad():
            for parts in _columns(layers):
                sizes = [len(part) for part in parts]
                pieces = torch.split_with_sizes(torch.cat([part.detach() for part in parts]), sizes)
                for part, piece in zip(parts, pieces, strict=True):
                    part.data = piece
    except torch.OutOfMemoryError:
        return False
    return True


def joint(layers: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """What each of the layers makes of x: [.., N] each, parts of one tensor where it is one product."""
    weight = None
    if _alike(layers):
        whole = [_together(parts) for parts in _columns(layers)]
        weight, rest = whole[0], [part for part in whole[1:] if part is not None]
        weight = weight if len(rest) == len(whole) - 1 else None
    if weight is None:
        return [layer(x) for layer in layers]
    if type(layers[0]) is nn.Linear:
        out = linear(x, weight, rest[0] if rest else None)
    else:
        out = product(x, weight, rest[0], rest[1] if len(rest) > 1 else None)
    return torch.split_with_sizes(out, [len(layer.weight) for layer in layers], -1)  # type: ignore[arg-type]


def _alike(layers: Sequence[nn.Module]) -> bool:
    """Whether layers are of one plain kind, with or without biases together, and nothing hangs on them."""
    kinds = {type(layer) for layer in layers}
    if len(kinds) != 1 or not kinds <= set(PLAIN):
        return False
    watched = any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in layers)
    shapes = {
        (layer.in_features, layer.bias is None, layer.weight.dtype, layer.weight.device) for layer in layers
    }
    return not watched and len(shapes) == 1


def _columns(layers: Sequence[nn.Module]) -> list[list[Tensor]]:
    """The layers' weights, then their scales and biases where there are some."""
    names = ("weight", "weight_scale", "bias")
    found = [[getattr(layer, name, None) for layer in layers] for name in names]
    return [column for column in found if column[0] is not None]  # type: ignore[misc]


def _together(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensor of which these are the rows one after the other; None if they do not lie so."""
    first, storage = parts[0], parts[0].untyped_storage().data_ptr()
    at = first.storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == storage and part.stride() == first.stride()
        if not same or not part.is_contiguous() or part.storage_offset() != at:
            return None
        at += part.numel()
    rows = sum(len(part) for part in parts)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
