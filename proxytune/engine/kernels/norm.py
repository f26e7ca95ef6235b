"""RMS norms for decoding in float32 or bfloat16 on a CPU: one call instead of the eight operations that a
model of transformers is written in, or the six of torch's own. With a few rows their number is what they
cost."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from proxytune.engine.kernels.cpu_rows import rms_norm

NEAR = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
"""How far two roundings of a norm of standard normal numbers may be apart."""


class RowNorm(nn.RMSNorm):
    """nn.RMSNorm on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        assert self.eps is not None  # torch would take the smallest number of the dtype
        return rms_norm(x, self.weight, self.eps)


def use_row_norms(model: nn.Module) -> None:
    """Put RowNorm in the place of every module on the CPU that computes the same in float32 or bfloat16.

    Which ones do is tried out: norms that add one to their weight or subtract the mean look alike from
    outside."""
    for path, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not isinstance(eps, float):
            continue
        alone = len(list(module.parameters())) == 1 and not list(module.children())
        alone &= len(inspect.signature(module.forward).parameters) == 1  # no gate
        if alone and weight.dtype in NEAR and weight.device.type == "cpu":
            own = RowNorm(weight.shape[0], eps, device="meta")
            own.weight = weight  # shared, not copied
            if _same(module, own):
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, own)


@torch.inference_mode()
def _same(module: nn.Module, own: RowNorm) -> bool:
    """Whether both give the same on ordinary, on small and on shifted numbers, where eps and a mean show."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, own.weight.shape[0], generator=draw).to(own.weight.dtype)
    near = NEAR[own.weight.dtype]
    for probe in (x, x * (own.eps or 0.0) ** 0.5, x + 1):
        expected, got = module(probe[None]), own(probe[None])
        if expected.shape != got.shape or not torch.allclose(got, expected, rtol=near, atol=near):
            return False
    return True
