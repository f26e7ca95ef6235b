"""How many tokens the KV pools hold: every device has room for those of its own layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from proxytune.engine.cuda import FUSED_LAYER, OTHER_LAYER, reserve
from proxytune.errors import UserError
from proxytune.models import Loaded, free_memory

KV_SHARE = 0.5
"""Share of the free CPU memory that KV pools may grow into; they take it only as they fill."""
KV_SHARE_GPU = 0.85
"""Share of the free GPU memory for KV pools; activations need the rest."""
GRAPH_SHARE = 0.125
"""Most of the free GPU memory that is left for graphs; without enough of it, fewer are kept."""


def pool_tokens(loaded: Mapping[str, Loaded], rows: int, kv_memory: int | None) -> int:
    """Tokens that every model's pool holds, such that all pools together stay within the memory, and none
    holds more than `rows` rows need. UserError if that is no useful pool."""
    need, kernels = Counter[torch.device](), Counter[torch.device]()
    for family in (model.family for model in loaded.values() if model.family.path == "packed"):
        for layer, device in zip(family.layers, family.devices, strict=True):
            need[device] += layer.numbers * family.dtype.itemsize
            kernels[device] += OTHER_LAYER if family.llama_forward is None else FUSED_LAYER
    if kv_memory is not None:
        budgets = [(kv_memory, need.total())]
    else:
        graphs = len(kernels) == 1  # on several devices there are none
        budgets = [(kv_budget(device, kernels[device] if graphs else 0), need[device]) for device in need]
    most = rows * min(model.family.window for model in loaded.values())
    budget, per_token = min(budgets, key=lambda pair: pair[0] // max(pair[1], 1), default=(most, 1))
    tokens = min(budget // max(per_token, 1), most)
    if tokens < 2:
        raise UserError(
            f"KV memory of {budget / 2**30:.3f} GiB holds {tokens} tokens at {per_token} bytes each for "
            f"{', '.join(loaded)}: raise --kv-memory"
        )
    return tokens


def kv_budget(device: torch.device, kernels: int) -> int:
    """Bytes on a device for KV pools, beside the graphs of steps of so many kernels."""
    free = free_memory(device)
    if device.type == "cpu":
        return int(free * KV_SHARE)
    return int(free * KV_SHARE_GPU) - min(reserve(kernels), int(free * GRAPH_SHARE))
