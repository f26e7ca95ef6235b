"""Attention of a few new tokens per row over the compact slots of the CPU's cache, as one call of C++.

torch has no operation for it: SDPA and batched products read keys and values at a third of the memory's
speed, need every row padded to the longest and the new keys written before. The kernel (cpu_attention.cpp)
takes ragged rows as they lie, and writes and attends in one pass. Without a compiler attention goes through
torch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from proxytune.engine.kernels.native import NotBuilt, library
from proxytune.engine.kernels.scores import ScoreRule

DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}

_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p


class Call(ctypes.Structure):
    """The kernel's argument, field by field as in cpu_attention.cpp."""

    _fields_ = (
        *((name, _INT) for name in ("heads", "kv_heads", "key_size", "value_size", "segments")),
        *((name, _POINTER) for name in ("rows", "starts", "counts", "lengths", "query", "key", "value")),
        *((f"{name}_{step}", _INT) for name in ("query", "key", "value") for step in ("head", "token")),
        *(("keys", _POINTER), ("values", _POINTER), ("slot_length", _INT), ("out", _POINTER)),
        *(("scaling", ctypes.c_double), ("softcap", ctypes.c_double), ("window", _INT), ("sinks", _POINTER)),
        *(("most", _INT), ("threads", _INT)),
    )


Kernel = Callable[[object], None]


@cache
def _built() -> tuple[dict[torch.dtype, Kernel], str | None]:
    """The kernel by dtype, or why there is none."""
    try:
        built = library("cpu_attention")
    except NotBuilt as reason:
        return {}, str(reason)
    found: dict[torch.dtype, Kernel] = {}
    for dtype, name in DTYPES.items():
        function = built[f"attend_{name}"]
        function.argtypes, function.restype = (ctypes.POINTER(Call),), None
        found[dtype] = function
    return found, None


def why_not() -> str | None:
    """Why attention on the CPU goes through torch; None where the kernel is there."""
    return _built()[1]


def takes(query: Tensor, stored: torch.dtype) -> bool:
    """Whether the kernel attends for such queries over keys and values of a dtype."""
    return query.device.type == "cpu" and query.dtype == stored and query.dtype in _built()[0]


def attend_slots(
    query: Tensor,  # [H, T, Dk]
    key: Tensor,  # [Hkv, T, Dk]
    value: Tensor,  # [Hkv, T, Dv]
    pools: tuple[Tensor, Tensor],  # [slots, Hkv, length, Dk] and [.., Dv], contiguous
    segments: Tensor,  # [4, S] int64 on the CPU: row, first token, tokens, length with them
    out: Tensor,  # [T, H, Dv], contiguous
    rule: ScoreRule,
    most: int,
) -> None:
    """Write new keys and values into their rows' slots, and what the new tokens see to `out`; segments of
    more than `most` tokens are only written. All tensors have one dtype of DTYPES."""
    query, key, value = (t if t.stride(2) == 1 else t.contiguous() for t in (query, key, value))
    (keys, values), sinks = pools, rule.sinks
    if sinks is not None:
        sinks = sinks.to(query.dtype).contiguous()
    scaling = rule.scale(query.shape[2])
    rows = segments.data_ptr()
    step = segments.stride(0) * segments.itemsize
    call = Call(
        *(query.shape[0], key.shape[0], key.shape[2], value.shape[2], segments.shape[1]),
        *(rows, rows + step, rows + 2 * step, rows + 3 * step),
        *(query.data_ptr(), key.data_ptr(), value.data_ptr()),
        *(*query.stride()[:2], *key.stride()[:2], *value.stride()[:2]),
        *(keys.data_ptr(), values.data_ptr(), keys.shape[2], out.data_ptr()),
        *(scaling, rule.softcap or 0.0, rule.window or 0, None if sinks is None else sinks.data_ptr()),
        *(most, torch.get_num_threads()),
    )
    _built()[0][query.dtype](ctypes.byref(call))
