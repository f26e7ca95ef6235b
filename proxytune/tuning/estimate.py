"""What a training will take, before any weights are read: trainable parameters and memory by parts.

Weights, gradients and the optimiser's state are counted. Activations are estimated by the tensors that a
layer of the Llama family keeps for its backward pass; docs/tuning.md has the estimate beside what was
measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from proxytune.errors import UserError
from proxytune.models import free_memory
from proxytune.tuning.methods import Method
from proxytune.tuning.options import TuneOptions

GIB = 2**30
FLOAT32 = 4
LIBRARIES = 0.7 * GIB
"""Of a process on a CPU: Python with torch, transformers, trl and peft."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Numbers of parameters, and bytes by parts."""

    parameters: int
    trainable: int
    parts: dict[str, float]

    @property
    def bytes(self) -> float:
        """Of all parts."""
        return sum(self.parts.values())

    def require_room(self) -> None:
        """UserError with the numbers where it will not fit into what is free."""
        free = free_memory()
        if self.bytes > free:
            largest = ", ".join(
                f"{name} {size / GIB:.1f}" for name, size in self.parts.items() if size > 0.05 * GIB
            )
            raise UserError(
                f"this training needs about {self.bytes / GIB:.1f} GiB ({largest}), and {free / GIB:.1f} GiB "
                "are free: use a smaller --batch, --checkpoint-activations, a shorter --max-length, or lora, "
                "qlora or lomo in place of full"
            )


def estimate(prepared: nn.Module, config: Any, weights: float, method: Method, job: Shape) -> MemoryEstimate:
    """Of a model that was prepared by `method`, whose own weights take `weights` bytes."""
    parameters = list(prepared.parameters())
    trained = [p for p in parameters if p.requires_grad]
    numbers = sum(p.numel() for p in trained)
    size = FLOAT32 if method.result == "adapter" else job.itemsize
    added = size * numbers if method.result == "adapter" else 0.0
    # lomo holds the gradient of a parameter while the next one's is computed, in float32 for the update
    gradients = FLOAT32 * 3 * max(p.numel() for p in trained) if method.fused else size * numbers
    parts = {
        "weights": weights + added,
        "gradients": float(gradients),
        "optimiser": float(method.state_numbers * FLOAT32 * numbers),
        "activations": activations(config, job),
        "other models": job.others,
        "libraries": 0.0 if torch.cuda.is_available() else LIBRARIES,
    }
    return MemoryEstimate(
        sum(p.numel() for p in parameters), numbers, {name: v for name, v in parts.items() if v}
    )


@dataclass(frozen=True)
class Shape:
    """The size of a batch, and what else stands in memory."""

    batch: int
    longest: int
    """Tokens of the longest example, virtual ones included."""
    itemsize: int
    """Bytes of a number of the model."""
    computed: int
    """Bytes of a number in the forward pass."""
    recomputed: bool
    adapter: bool
    through: bool
    others: float = 0.0
    """Bytes of other models: the base and the antiexpert of --through, the teacher."""

    @classmethod
    def of(cls, options: TuneOptions, method: Method, longest: int, others: float) -> Shape:
        """The shape of a training whose longest example has so many tokens."""
        itemsize = 2 if options.dtype == "bfloat16" else FLOAT32
        return cls(
            options.batch,
            longest + method.virtual_tokens(options),
            itemsize,
            2 if options.bf16 or options.dtype == "bfloat16" else FLOAT32,
            options.checkpoint_activations,
            method.result == "adapter" and method.virtual_tokens(options) == 0,
            options.through is not None or options.teacher is not None,
            others,
        )


def activations(config: Any, job: Shape) -> float:
    """Bytes that the backward pass needs of the forward pass, of one batch."""
    text = config.get_text_config()
    hidden, layers, words = text.hidden_size, text.num_hidden_layers, text.vocab_size
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    heads = text.num_attention_heads
    kv = (getattr(text, "num_key_value_heads", None) or heads) * (
        getattr(text, "head_dim", None) or hidden // heads
    )
    # norms keep their input in float32 and their output; q, k, v and what comes out of the attention; the MLP
    # its gate, its up, the activation of the gate and the product
    layer = 8 * hidden + 2 * kv + 4 * inner
    if job.adapter:
        layer += 4 * hidden + inner  # what comes out of dropout goes into A
    tokens = job.batch * job.longest
    kept = layers * hidden + layer if job.recomputed else layers * layer
    head = (
        3 * words * (3 if job.through else 1)
    )  # logits, their softmax and their gradient, for every token at most
    return float(tokens * (kept * job.computed + head * FLOAT32))
