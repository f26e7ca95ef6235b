"""Whether Triton's kernels are right on this device: each is held against the same written out in torch, once
for every shape that a model asks for, before it is used.

Kernels were run in Triton's interpreter, not on every GPU, driver and compiler. What is wrong there would be
wrong in every token, and silently."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

APART = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 0.1}
"""How far results may be from those written out, for numbers of about 1. Rounding stays far below."""

_found: dict[object, bool] = {}
"""What was found for shapes so far."""


def trusted(what: str, shape: object, device: torch.device, apart: Callable[[], float], limit: float) -> bool:
    """Whether a kernel gives what it should, at this shape on this device. `apart` runs it beside the same
    written out, and is called once; what it raises means no as well. A warning says so."""
    key = what, shape, device
    if key not in _found:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"the {what} is captured at a shape at which it did not run before")
        with torch.inference_mode():
            try:
                found = f"is off by {far:.2g}" if not (far := apart()) <= limit else ""
            except torch.OutOfMemoryError:
                raise  # which says nothing of the kernel
            except failures() as error:
                found = f"does not run ({next(iter(str(error).splitlines()), type(error).__name__)})"
        _found[key] = not found
        if found:
            warnings.warn(f"the {what} {found} on {_name(device)}: something slower does it", stacklevel=4)
    return _found[key]


def failures() -> tuple[type[Exception], ...]:
    """What a kernel raises that cannot be compiled or launched."""
    from triton.errors import TritonError

    return TritonError, RuntimeError


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def farthest(got: Tensor, want: Tensor) -> float:
    """The largest difference; NaN where there is one."""
    return float((got.float() - want.float()).abs().max())
