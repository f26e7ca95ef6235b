"""Bytes: what a model's weights take, and what is free."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import logging as transformers_logging

if sys.platform != "win32":
    import resource

from proxytune.config import ModelSpec
from proxytune.errors import UserError
from proxytune.models.weight_only import bytes_needed
from proxytune.processes import gpu, world

GIB = 2**30


def check_memory(spec: ModelSpec, config: Any, remote: bool) -> float:
    """Bytes of the weights; UserError with the numbers if they cannot fit into what is free."""
    need = weights_needed(spec, config, remote)
    free = free_memory(place_of(spec))
    if need > free and placed_by_us(spec, config):
        raise UserError(
            f"'{spec.model}' needs {need / GIB:.1f} GiB for its weights, and {free / GIB:.1f} GiB are free: "
            + SMALLER
        )
    return need


SMALLER = "use a smaller dtype, quantization: int8 or 4bit, or a device_map over several devices"


def weights_needed(spec: ModelSpec, config: Any, remote: bool) -> float:
    """Bytes that a model's weights will take, from its configuration alone."""
    return weights_of(spec, config, skeleton_of(config, remote))


def skeleton_of(config: Any, remote: bool) -> PreTrainedModel:
    """The model of a configuration without weights."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=remote)
    finally:
        transformers_logging.set_verbosity(level)


def weights_of(spec: ModelSpec, config: Any, skeleton: PreTrainedModel) -> float:
    """Bytes that the weights of a skeleton will take as `spec` has them loaded."""
    dtype = (config.dtype or torch.float32) if spec.dtype == "auto" else getattr(torch, spec.dtype)
    if spec.quantization in ("int8", "int4"):
        return float(bytes_needed(skeleton, dtype.itemsize, 8 if spec.quantization == "int8" else 4))
    numbers: int = sum(p.numel() for p in skeleton.parameters())
    if spec.quantization == "none":
        return float(numbers * dtype.itemsize)
    head = skeleton.get_output_embeddings()  # stays as it is, as embeddings and norms do
    linear = sum(m.weight.numel() for m in skeleton.modules() if isinstance(m, nn.Linear) and m is not head)
    return linear * {"8bit": 1.0, "4bit": 0.5}[spec.quantization] + (numbers - linear) * dtype.itemsize


def placed_by_us(spec: ModelSpec, config: Any) -> bool:
    """Whether the estimate counts: no device map of the user's own, and not stored quantised (smaller than it
    looks)."""
    one = spec.device_map is None or str(spec.device_map).partition(":")[0] in ("cpu", "auto", "cuda")
    return one and getattr(config, "quantization_config", None) is None


def place_of(spec: ModelSpec) -> str:
    """Where a model's weights go, as `free_memory` is asked: one device, or "auto" for several."""
    where = spec.device_map
    if where is None:
        return gpu() if torch.cuda.is_available() else "cpu"
    if where in ("cpu", "cuda"):
        return "cpu" if where == "cpu" else "cuda:0"
    one = isinstance(where, str) and where.startswith("cuda:") and where[5:].isdigit()
    return str(where) if one else "auto"


def free_memory(where: str | torch.device | None = None) -> int:
    """Free bytes of a device, the first GPU unless it is named, or of the CPU without one; of all GPUs and
    the CPU for "auto"."""
    cpu = int(psutil.virtual_memory().available)
    if str(where) == "cpu" or not torch.cuda.is_available():
        return cpu
    give_back()
    if str(where) == "auto":
        return sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())) + cpu
    index, count = 0 if where is None else torch.device(where).index or 0, torch.cuda.device_count()
    if index >= count:
        raise UserError(
            f"there is no {where} here: `device_map` can be cuda:0 to cuda:{count - 1}, cpu or auto"
        )
    return int(torch.cuda.mem_get_info(index)[0])


def process_peak() -> int:
    """Resident memory of this process at its largest so far, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def leave_the_file(module: nn.Module) -> None:
    """Copy what a module on the CPU still reads from its checkpoint's file. transformers maps the whole file
    into memory, and a small tensor keeps the pages of all that lies elsewhere by now."""
    for parameter in module.parameters():
        if parameter.device.type == "cpu" and parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def give_back() -> None:
    """Let go of what nobody uses: torch keeps freed blocks of a GPU, and an ensemble and its graphs hold on
    to each other until they are collected."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def is_split(module: nn.Module) -> bool:
    """Whether this process holds only parts of the weights."""
    return any(
        own is not whole for (_, own), whole in zip(own_parts(module), module.parameters(), strict=True)
    )


def own_parts(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights, or what this process has of them, by name."""
    if world() == 1:
        yield from module.named_parameters()
        return
    from torch.distributed.tensor import DTensor  # half a second, which one process alone need not wait

    for name, parameter in module.named_parameters():
        yield name, parameter.to_local() if isinstance(parameter, DTensor) else parameter
