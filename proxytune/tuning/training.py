"""One training loop for any Hugging Face causal language model: pretraining and every way of tuning go
through it.

The flow is `TrainingExample(ids, weights) -> batches -> fit -> the model, changed in place`. What is
trained is decided by the optimisers that are handed in (they hold the parameters); what counts is decided
by the weight of each token. Given the same model, examples, configuration and thread count, the resulting
weights are the same.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn


@dataclass(frozen=True)
class TrainingExample:
    """Token ids and, per token, how much predicting it from the ones before counts (0: not at all)."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.weights):
            raise ValueError(f"{len(self.ids)} ids but {len(self.weights)} weights")


class TuneConfig(BaseModel):
    """How long and in what portions to train. The learning rate belongs to the optimisers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(default=1, ge=1)
    """Passes over the examples, each in an order of its own."""
    batch_size: int = Field(default=16, ge=1)
    """Rows per step: examples, or blocks where `block` is set."""
    block: int | None = Field(default=None, ge=2)
    """Pack the examples end to end into rows of this many tokens; None: one example per row, padded."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    decay_share: float = Field(default=1.0, ge=0.0, le=1.0)
    """The last share of all steps, over which the learning rate falls linearly to 0."""
    clip: float = Field(default=1.0, gt=0.0)
    """Largest gradient norm."""
    bf16: bool = False
    """Run the forward pass in bfloat16 autocast; weights and optimiser stay as they are."""
    seed: int = 0
    """Decides the order of the examples."""


class Optimizer(Protocol):
    """What the loop asks of an optimiser; every `torch.optim.Optimizer` has it."""

    param_groups: list[dict[str, object]]

    def step(self) -> object:
        """Change the parameters by their gradients."""

    def zero_grad(self) -> None:
        """Forget the gradients."""


@dataclass(frozen=True)
class TrainingBatch:
    """Rows of equal length. Padding has weight 0 and, where there is any, a mask."""

    ids: Tensor  # [B, T] int64
    weights: Tensor  # [B, T] float32
    mask: Tensor | None  # [B, T] int64, 1 where there is a token


@dataclass(frozen=True)
class Fitted:
    """What a training run did: the loss per step, the tokens that went through (without padding), and
    the seconds."""

    losses: tuple[float, ...]
    tokens: int
    seconds: float


def pack(examples: Sequence[TrainingExample], block: int) -> list[TrainingExample]:
    """The examples end to end, cut into blocks; an incomplete last block is dropped."""
    ids = [i for e in examples for i in e.ids]
    weights = [w for e in examples for w in e.weights]
    starts = range(0, len(ids) - block + 1, block)
    return [TrainingExample(tuple(ids[s : s + block]), tuple(weights[s : s + block])) for s in starts]


def collate(rows: Sequence[TrainingExample]) -> TrainingBatch:
    """Rows as tensors, padded on the right where their lengths differ (the padding's id is arbitrary: nothing
    sees it)."""
    width = max(len(row.ids) for row in rows)
    missing = [width - len(row.ids) for row in rows]
    ids = torch.tensor([[*row.ids, *[0] * m] for row, m in zip(rows, missing, strict=True)])
    weights = torch.tensor([[*row.weights, *[0.0] * m] for row, m in zip(rows, missing, strict=True)])
    if not any(missing):
        return TrainingBatch(ids, weights, None)
    mask = torch.tensor([[1] * (width - m) + [0] * m for m in missing])
    return TrainingBatch(ids, weights, mask)


def batches(examples: Sequence[TrainingExample], config: TuneConfig) -> Iterator[TrainingBatch]:
    """All batches of all epochs, in the order that the seed decides."""
    for epoch in range(config.epochs):
        order = list(examples)
        random.Random(f"tune/{config.seed}/{epoch}").shuffle(order)
        rows = pack(order, config.block) if config.block else order
        for start in range(0, len(rows), config.batch_size):
            yield collate(rows[start : start + config.batch_size])


def count_steps(examples: Sequence[TrainingExample], config: TuneConfig) -> int:
    """How many batches there will be."""
    rows = sum(len(e.ids) for e in examples) // config.block if config.block else len(examples)
    return config.epochs * math.ceil(rows / config.batch_size)


def learning_rate_factor(step: int, steps: int, config: TuneConfig) -> float:
    """The share of its own learning rate that every parameter group gets at a step (counted from 0)."""
    warm = (step + 1) / (config.warmup_steps + 1)
    decay = (steps - step) / max(1.0, config.decay_share * steps)
    return min(1.0, warm, decay)


def weighted_loss(logits: Tensor, batch: TrainingBatch) -> Tensor:
    """Mean cross-entropy of each next token, weighted; 0 where nothing in the batch counts."""
    targets, weights = batch.ids[:, 1:], batch.weights[:, 1:]
    each = nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none"
    )
    return (each * weights.flatten()).sum() / weights.sum().clamp(min=1e-8)


def fit(
    model: nn.Module,
    examples: Sequence[TrainingExample],
    optimizers: Sequence[Optimizer],
    config: TuneConfig,
    title: str = "training",
    show: bool = True,
) -> Fitted:
    """Train `model` in place and leave it in evaluation mode."""
    device = next(model.parameters()).device
    rates = [[float(str(group["lr"])) for group in o.param_groups] for o in optimizers]
    steps, losses, tokens, begin = count_steps(examples, config), list[float](), 0, time.monotonic()
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(config.seed)
    model.train()
    with _progress(show) as progress:
        bar = progress.add_task(title, total=steps, loss=math.nan)
        for step, cpu_batch in enumerate(batches(examples, config)):
            batch = _to(cpu_batch, device)
            _set_rates(optimizers, rates, learning_rate_factor(step, steps, config))
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.bf16):
                logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
            loss = weighted_loss(logits, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(trained, config.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            tokens += batch.ids.numel() if batch.mask is None else int(batch.mask.sum())
            progress.update(bar, advance=1, loss=sum(losses[-20:]) / len(losses[-20:]))
    model.eval()
    return Fitted(tuple(losses), tokens, time.monotonic() - begin)


def _set_rates(optimizers: Sequence[Optimizer], rates: Sequence[Sequence[float]], factor: float) -> None:
    for optimizer, own in zip(optimizers, rates, strict=True):
        for group, rate in zip(optimizer.param_groups, own, strict=True):
            group["lr"] = rate * factor


def _to(batch: TrainingBatch, device: torch.device) -> TrainingBatch:
    mask = None if batch.mask is None else batch.mask.to(device)
    return TrainingBatch(batch.ids.to(device), batch.weights.to(device), mask)


def _progress(show: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, disable=not show, console=Console(stderr=True))


OptimizerFactory = Callable[[nn.Module], Sequence[torch.optim.Optimizer]]
"""Makes the optimisers of a model: a tuning method is such a factory plus a choice of what is trainable."""


def adamw(lr: float, weight_decay: float = 0.0) -> OptimizerFactory:
    """AdamW on everything that is trainable."""

    def make(model: nn.Module) -> Sequence[torch.optim.Optimizer]:
        trained = [p for p in model.parameters() if p.requires_grad]
        return [torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)]

    return make


def muon(lr: float, weight_decay: float = 0.02, embedding: str = "embed") -> OptimizerFactory:
    """Muon on the matrices of the layers, AdamW on the rest (norms, and names with `embedding` or `lm_head`
    in them)."""

    def make(model: nn.Module) -> Sequence[torch.optim.Optimizer]:
        matrices, rest = list[nn.Parameter](), list[nn.Parameter]()
        for name, p in model.named_parameters():
            inner = p.ndim == 2 and embedding not in name and "lm_head" not in name
            (matrices if inner else rest).append(p)
        return [
            torch.optim.Muon(
                matrices, lr=lr, weight_decay=weight_decay, ns_steps=4, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay),
        ]

    return make
