"""trl's SFTTrainer with what it cannot do: the loss of the whole proxy, and that of a teacher's distribution.

`--through base` trains the expert on the loss of base + alpha * (expert - antiexpert), the logits that
decoding combines (consistent proxy tuning, Peng et al. 2024), in place of the expert's own. Base and
antiexpert are run once for each batch, without gradient."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from trl import SFTTrainer

from proxytune.tuning.tokens import NOT_LEARNED


@dataclass(frozen=True)
class Steering:
    """The frozen models of `--through base`."""

    base: nn.Module
    antiexpert: nn.Module | None
    """None: the expert's own model with its adapter taken off."""
    alpha: float
    vocabulary: int
    """Tokens that they have in common: what is beyond is padding of a head."""

    def logits(self, expert: Tensor, base: Tensor, antiexpert: Tensor) -> Tensor:
        """The proxy's logits [N, V] in float32, as decoding combines them."""
        size = self.vocabulary
        b, e, a = (logits[:, :size].float() for logits in (base, expert, antiexpert))
        return b + self.alpha * (e - a)


class ExpertTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer, whose loss is the proxy's where there is a `steering`. It sends nothing anywhere, and
    writes no model card."""

    steering: Steering | None = None
    teacher: nn.Module | None = None
    """The frozen model of --teacher."""

    def _send_telemetry(self) -> None:
        """trl would report that it is used."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """trl would write a README.md of its own into every checkpoint."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The sum of the learned tokens' cross-entropy over their number, as SFTTrainer has it."""
        if self.steering is None and self.teacher is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        learned = labels != NOT_LEARNED  # [B, T - 1]
        seen = {
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
            "use_cache": False,
        }
        width = labels.shape[1] + 1
        # virtual tokens come first, and predict nothing
        own = _before(model(**seen).logits[:, -width:], learned)  # [N, V]
        targets = labels[learned]
        total, logits = self._total(model, own, targets, seen, learned)
        count = learned.sum() if num_items_in_batch is None else num_items_in_batch
        loss = total / torch.as_tensor(count, device=total.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        mode = "train" if self.model.training else "eval"
        right = (logits.argmax(-1) == targets).float().mean().item() if len(targets) else 0.0
        self._metrics[mode]["mean_token_accuracy"].append(right)
        return loss

    def _total(
        self, model: nn.Module, own: Tensor, targets: Tensor, seen: dict[str, Any], learned: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The sum of the losses of the learned tokens, and the logits [N, V] that it is of."""
        if self.teacher is not None:
            with torch.no_grad():
                wanted = _before(self.teacher(**seen).logits, learned)
            size = min(own.shape[-1], wanted.shape[-1])
            p, q = (logits[:, :size].float().log_softmax(-1) for logits in (wanted, own))
            return nn.functional.kl_div(q, p, reduction="sum", log_target=True), own
        assert self.steering is not None
        with torch.no_grad():
            base = _before(self.steering.base(**seen).logits, learned)
            antiexpert = _before(self._antiexpert(model, seen), learned)
        logits = self.steering.logits(own, base, antiexpert)
        return nn.functional.cross_entropy(logits, targets, reduction="sum"), logits

    def _antiexpert(self, model: nn.Module, seen: dict[str, Any]) -> Tensor:
        """The antiexpert's logits [B, T, V]."""
        assert self.steering is not None
        own = self.steering.antiexpert
        inner: Any = self.accelerator.unwrap_model(model)
        with contextlib.nullcontext() if own is not None else inner.disable_adapter():
            logits: Tensor = (own or inner)(**seen).logits
        return logits


def _before(logits: Tensor, learned: Tensor) -> Tensor:
    """The logits [N, V] that predict the learned tokens: those of one position earlier."""
    return logits[:, :-1][learned]
