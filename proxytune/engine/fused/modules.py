"""What is put in the place of a model's modules on CUDA: norms and gated feed-forward layers of few kernels.

As on the CPU (`kernels.norm`), which modules compute what is tried out on them, never taken from a name. The
same operations written out have to give the same bits, so that a kernel that is held against them is held
against the module."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from proxytune.engine.fused.joined import join, joint
from proxytune.engine.fused.rows import (
    ACTIVATIONS,
    NORM_KINDS,
    NormKind,
    gated,
    norm,
    norm_of_sum,
    written_out_norm,
)

DEVICES = {"cuda"}
"""Types of devices on which modules are replaced."""
GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
"""Parts of a gated feed-forward layer."""
INPUTS = ("q_proj", "k_proj", "v_proj")
"""Parts of an attention that multiply one input."""


class DeviceNorm(nn.Module):
    """An RMS norm as one kernel."""

    def __init__(self, weight: nn.Parameter, eps: float, kind: NormKind) -> None:
        super().__init__()
        self.weight, self.eps, self.kind = weight, eps, kind

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        return norm(x, self.weight, self.eps, self.kind)

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and the sum."""
        return norm_of_sum(x, residual, self.weight, self.eps, self.kind)


class GatedMLP(nn.Module):
    """A gated feed-forward layer in three kernels where its weights lie together."""

    def __init__(self, module: Any, activation: str) -> None:
        """The parts of a module, under their names: adapters look for them there."""
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = module.gate_proj, module.up_proj, module.down_proj
        self.act_fn, self.activation = module.act_fn, activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        gate, up = joint((self.gate_proj, self.up_proj), x)
        out: Tensor = self.down_proj(gated(gate, up, self.activation))
        return out


def use_device_kernels(model: nn.Module) -> None:
    """Put what computes the same in fewer kernels in the place of a model's modules on CUDA, and the weights
    of one input's products together."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for path, module in list(model.named_modules()):
        if hasattr(module, "_hf_hook"):  # accelerate moves what it is given between devices
            continue
        new: nn.Module | None = None
        if (kind := norm_kind(module)) is not None:
            new = DeviceNorm(module.weight, norm_eps(module), kind)
        elif (activation := gate_kind(module, dtype)) is not None:
            new = GatedMLP(module, activation)
        if new is not None:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, new)
    join_weights(model)


def join_weights(model: nn.Module) -> None:
    """Layer by layer, so that never more than one layer's weights are there twice."""
    for module in model.modules():
        names = INPUTS if _has(module, INPUTS) else ("gate_proj", "up_proj")
        if isinstance(module, GatedMLP) or names is INPUTS:
            layers = [getattr(module, name) for name in names]
            first = next(iter(layers[0].parameters()), None)
            if first is not None and first.device.type in DEVICES and join(layers) and first.is_cuda:
                torch.cuda.empty_cache()  # the pieces that the weights lay in may not fit the next


def _has(module: nn.Module, names: tuple[str, ...]) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def norm_eps(module: nn.Module) -> float:
    """What keeps a norm from dividing by nothing."""
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))  # type: ignore[return-value]


@torch.inference_mode()
def norm_kind(module: nn.Module) -> NormKind | None:
    """Which RMS norm a module is; None if it is none of them, or not on the device."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or weight.device.type not in DEVICES:
        return None
    alone = len(list(module.parameters())) == 1 and not list(module.children())
    if not alone or not isinstance(eps := norm_eps(module), float) or not _takes_one(module):
        return None
    x = _probe(weight.device, weight.dtype, weight.shape[0])
    probes = (x, x * eps**0.5, x + 1)
    return next((k for k in NORM_KINDS if _is(module, k, weight, eps, probes)), None)


def _is(module: nn.Module, kind: NormKind, weight: Tensor, eps: float, probes: tuple[Tensor, ...]) -> bool:
    return all(_equal(module, lambda x: written_out_norm(x, weight, eps, kind), x) for x in probes)


@torch.inference_mode()
def gate_kind(module: nn.Module, dtype: torch.dtype) -> str | None:
    """The activation of a gated feed-forward layer of tokens of this dtype, one of `ACTIVATIONS`; None if it
    is no such layer."""
    if {name for name, _ in module.named_children()} != GATED or not _takes_one(module):
        return None
    weight = next(iter(module.gate_proj.parameters()), None)  # type: ignore[union-attr]
    if weight is None or weight.device.type not in DEVICES:
        return None
    own: Any = module
    x = _probe(weight.device, dtype, int(own.gate_proj.in_features))
    for name, activation in ACTIVATIONS.items():

        def written(x: Tensor, activation: Callable[[Tensor], Tensor] = activation) -> Tensor:
            return own.down_proj(activation(own.gate_proj(x)) * own.up_proj(x))  # type: ignore[no-any-return]

        if _equal(module, written, x) and _equal(own.act_fn, activation, x * 3):
            return name
    return None


def _takes_one(module: nn.Module) -> bool:
    return len(inspect.signature(module.forward).parameters) == 1


def _equal(module: nn.Module, written: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether a module gives the same bits as what is written out."""
    expected = module(x[None])
    return isinstance(expected, Tensor) and torch.equal(expected, written(x[None]))


def _probe(device: torch.device, dtype: torch.dtype, size: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(3, size, generator=draw).to(device, dtype)
