"""Linear layers whose weights are stored in few bits, and multiplied without being made wide first."""

from __future__ import annotations

from abc import abstractmethod
from typing import Self

import torch
from torch import Tensor, nn


class StoredLinear(nn.Linear):
    """A linear layer of small numbers: what they stand for is said by `weight` and `weight_scale` together.

    It is an nn.Linear so that peft can put adapters on it; whoever looks for layers with float weights asks
    `type(module) is nn.Linear`."""

    def __init__(self, inputs: int, outputs: int, *, bias: Tensor | None, device: torch.device | str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = inputs, outputs
        weight, scale = self.empty(inputs, outputs, device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @classmethod
    def of(cls, layer: nn.Linear) -> Self:
        """A linear layer quantised."""
        bias = None if layer.bias is None else layer.bias.detach()
        new = cls(layer.in_features, layer.out_features, bias=bias, device=layer.weight.device)
        new.weight.data, new.weight_scale.data = cls.quantize(layer.weight.detach())
        return new

    @staticmethod
    @abstractmethod
    def empty(inputs: int, outputs: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Weight and scale, not filled."""

    @staticmethod
    @abstractmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Float weights [N, K] as weight and scale."""
