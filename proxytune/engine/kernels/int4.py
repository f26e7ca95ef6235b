"""Weight-only 4-bit linear layers for the CPU: groups of weights along a row share a scale and a middle.

The product is torch's own (`_weight_int4pack_mm_for_cpu`), which multiplies bfloat16 activations. Weights
are rounded to the nearest of 16 values, as llama.cpp's Q4_1 does, without calibration."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from proxytune.engine.kernels.stored import StoredLinear

GROUP = 32
"""Weights that share a scale."""
OUTPUTS = 16
"""The kernel takes multiples of so many outputs."""
MIDDLE = 8
"""The stored value that stands for the middle of a group."""


def fits(inputs: int, outputs: int) -> bool:
    """Whether a layer of these sizes can be quantised."""
    return inputs % GROUP == 0 and outputs % OUTPUTS == 0


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [N, K] -> 4-bit values in the kernel's own layout [N, K / 2], and scale and middle of every
    group [K / 32, N, 2] in bfloat16."""
    values, scales = in_groups(weight)
    packed: Tensor = torch._convert_weight_to_int4pack_for_cpu(values, 1)
    return packed, scales


def in_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [N, K] -> values 0..15 [N, K] int32, and scale and middle [K / 32, N, 2]: a weight is near
    (value - 8) * scale + middle, by half a scale and the rounding of scale and middle to bfloat16."""
    groups = weight.float().reshape(len(weight), -1, GROUP)  # [N, K / 32, 32]
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).bfloat16().float()
    scale[scale == 0] = 1.0
    middle = (low + MIDDLE * scale).bfloat16().float()
    values = ((groups - middle[..., None]) / scale[..., None]).round_().add_(MIDDLE).clamp_(0, 15)
    scales = torch.stack([scale, middle], dim=-1).transpose(0, 1)  # [K / 32, N, 2]
    return values.flatten(1).to(torch.int32), scales.to(torch.bfloat16).contiguous()


def why_not() -> str | None:
    """Why 4-bit layers do not run here; None where they do. The kernel is tried on a small product."""
    if torch.cuda.is_available():
        return "it runs on the CPU only, and the models go to a GPU: use `4bit`"
    try:
        layer, x = nn.Linear(GROUP, OUTPUTS, bias=False), torch.ones(1, GROUP)
        with torch.inference_mode():
            near = (Int4Linear.of(layer)(x) - layer(x)).abs().max() < 1.0
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        return f"this build of torch has no 4-bit product for the CPU ({error}): use `int8` or `4bit`"
    return None if near else "torch's 4-bit product is wrong on this processor: use `int8` or `4bit`"


class Int4Linear(StoredLinear):
    """A linear layer with packed 4-bit `weight` [N, K / 2] and `weight_scale` [K / 32, N, 2]. It multiplies
    in bfloat16, whatever the dtype of what comes in."""

    quantize = staticmethod(quantize)

    @staticmethod
    def empty(inputs: int, outputs: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        weight = torch.empty(outputs, inputs // 2, dtype=torch.uint8, device=device)
        return weight, torch.empty(inputs // GROUP, outputs, 2, dtype=torch.bfloat16, device=device)

    def forward(self, input: Tensor) -> Tensor:
        """[.., K] -> [.., N] in the input's dtype."""
        if input.numel() == 0:
            return input.new_empty(*input.shape[:-1], self.out_features)
        flat = input.reshape(-1, self.in_features).to(torch.bfloat16)
        out: Tensor = torch._weight_int4pack_mm_for_cpu(flat, self.weight, GROUP, self.weight_scale)
        out = out.to(input.dtype).view(*input.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(input.dtype)
