"""The ways to tune, one record each: what becomes trainable, by which optimiser, and what a result is.

- full: all weights, AdamW (the paper's Table 11).
- lora: low-rank updates beside the linear layers (Hu et al. 2021; the paper's Table 13).
- qlora: the same beside weights in 4 bits (Dettmers et al. 2023).
- p-tuning: embeddings before the prompt, made by a small network that is thrown away after training (Liu et
  al. 2021, "GPT understands, too").
- lomo: all weights by stochastic gradient descent that takes each gradient as soon as it is there and forgets
  it (Lv et al. 2023), so that there is never memory for all gradients, nor for an optimiser's state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from proxytune.errors import UserError, did_you_mean, needs_extra
from proxytune.models import plain
from proxytune.tuning.options import TuneOptions


@dataclass(frozen=True)
class Method:
    """A way to tune."""

    name: str
    result: Literal["weights", "adapter"]
    """weights: a checkpoint of its own. adapter: files beside the model, whose weights stay as they are."""
    learning_rate: float
    """Without --learning-rate."""
    prepare: Callable[[PreTrainedModel, TuneOptions], nn.Module]
    """Makes trainable what is trained; the model may be one without weights."""
    optimizer: Callable[[TuneOptions], str]
    """Which of transformers' optimisers."""
    state_numbers: int
    """Numbers that the optimiser keeps for each trained one."""
    refuse: Callable[[TuneOptions], None]
    """UserError for settings that it cannot have."""
    quantization: Literal["none", "4bit"] = "none"
    """Of the weights that are not trained."""
    packages: tuple[str, ...] = ()
    """What it needs beside trl."""
    fused: bool = False
    """Whether gradients are used up within the backward pass."""
    virtual_tokens: Callable[[TuneOptions], int] = lambda options: 0
    """Positions of the window that it takes."""

    def check(self, options: TuneOptions) -> None:
        """UserError in one line for what is missing or cannot be."""
        for package in ("trl", *self.packages):
            needs_extra("proxytune tune", package, "tune")
        self.refuse(options)


# What becomes trainable


def _everything(model: PreTrainedModel, options: TuneOptions) -> nn.Module:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    module: nn.Module = model
    return module


def _lora(model: PreTrainedModel, options: TuneOptions) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    _require_targets(model, options.targets)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.dropout,
        target_modules=list(options.targets) or "all-linear",
    )
    return _wrapped(get_peft_model, model, config)


def _soft_prompt(model: PreTrainedModel, options: TuneOptions) -> nn.Module:
    from peft import PromptEncoderConfig, get_peft_model

    config = PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=options.virtual_tokens,
        encoder_reparameterization_type=options.encoder.upper(),
        encoder_hidden_size=options.encoder_hidden or model.config.get_text_config().hidden_size,
    )
    return _wrapped(get_peft_model, model, config)


def _wrapped(get_peft_model: Any, model: PreTrainedModel, config: Any) -> nn.Module:
    """PEFT's model around this one; of a model without weights, its own parts have none either."""
    with plain.quiet():
        if next(model.parameters()).device.type != "meta":
            made: nn.Module = get_peft_model(model, config)
            return made
        with torch.device("meta"):
            made = get_peft_model(model, config)
    return made


def _require_targets(model: PreTrainedModel, targets: tuple[str, ...]) -> None:
    """UserError for a target that is no linear layer of the model."""
    head = model.get_output_embeddings()
    linear = [path for path, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    names = {path.rpartition(".")[2] for path in linear}
    for target in targets:
        if not any(path == target or path.endswith(f".{target}") for path in linear):
            raise did_you_mean("target module", target, names)


# What cannot be


def _nothing(options: TuneOptions) -> None:
    pass


def _no_half_weights(options: TuneOptions) -> None:
    if options.dtype != "float32":
        raise UserError(
            "full tuning in bfloat16 weights would round AdamW's small steps away: leave --dtype at float32, "
            "and compute in bfloat16 by --bf16"
        )


def _no_accumulation(options: TuneOptions) -> None:
    if options.accumulate > 1:
        raise UserError(
            f"--accumulate {options.accumulate}: lomo uses each gradient up within the backward pass, so "
            "there is nothing to add up. Raise --batch in its place"
        )
    if options.adaptive and not torch.cuda.is_available():
        raise UserError("--adaptive: AdaLomo (lomo-optim) runs on a GPU only: leave it out")
    if options.weight_decay:
        raise UserError("--weight-decay: lomo is run without it")


def _adamw(options: TuneOptions) -> str:
    return "adamw_torch"


def _fused(options: TuneOptions) -> str:
    return "adalomo" if options.adaptive else "lomo"


def _length(options: TuneOptions) -> int:
    return options.virtual_tokens


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("full", "weights", 2e-5, _everything, _adamw, 2, _no_half_weights),
        Method("lora", "adapter", 1e-4, _lora, _adamw, 2, _nothing),
        Method(
            "qlora",
            "adapter",
            1e-4,
            _lora,
            _adamw,
            2,
            _nothing,
            quantization="4bit",
            packages=("bitsandbytes",),
        ),
        Method("p-tuning", "adapter", 1e-3, _soft_prompt, _adamw, 2, _nothing, virtual_tokens=_length),
        Method(
            "lomo",
            "weights",
            3e-2,
            _everything,
            _fused,
            0,
            _no_accumulation,
            packages=("lomo_optim",),
            fused=True,
        ),
    )
}


def get_method(name: str) -> Method:
    """The method of that name, or the UserError with the nearest names."""
    if name not in METHODS:
        raise did_you_mean("method", name, METHODS)
    return METHODS[name]
