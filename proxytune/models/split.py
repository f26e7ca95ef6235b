"""A model whose layers transformers has split over processes: each holds a part of every weight."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def is_split(module: nn.Module) -> bool:
    """Whether this process holds only parts of the weights."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def own_parts(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights, or what this process has of them, by name."""
    for name, parameter in module.named_parameters():
        yield name, parameter.to_local() if isinstance(parameter, DTensor) else parameter
