"""What a user can set about tuning, declared once: a field is the option, the key in configs/tune/*.yaml and
the entry in training.json. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError

from proxytune.config import Chat, shipped
from proxytune.errors import UserError, did_you_mean
from proxytune.options import Options
from proxytune.schema import explain
from proxytune.yaml_files import read_yaml


def read_names(value: object) -> object:
    """`a,b` or a list of such texts -> names."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return value
    return tuple(name.strip() for text in texts for name in text.split(",") if name.strip())


Names = Annotated[tuple[str, ...], BeforeValidator(read_names)]


class TuneOptions(Options):
    """How an expert is tuned. The defaults that depend on the method are None here and stand in METHODS."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    data: str | None = Field(default=None, json_schema_extra={"metavar": "[FORMAT:]FILE"})
    """Training examples: JSONL with `prompt` and `completion`, or with `messages`; or an original file:
    gsm8k:FILE, triviaqa:FILE, alpaca:FILE, dolly:FILE, sharegpt:FILE. gsm8k:generated is the demo world's."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first N examples."""
    chat: Chat = "none"
    """The prompt format that is learned: none (plain text), llama2, or tokenizer (the chat template)."""
    max_length: int = Field(default=2048, ge=2)
    """Tokens of an example at most. A longer completion is cut; a prompt that leaves no room is an error."""
    validation: str | None = Field(default=None, json_schema_extra={"metavar": "SHARE|FILE"})
    """Held-out examples: a share of the data (0.05), or a file like --data. The best weights on them are
    kept."""
    patience: int = Field(default=0, ge=0)
    """Stop after this many measurements on the held-out examples without a better loss; 0: never."""
    epochs: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    """Passes over the examples."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps in all, in place of --epochs."""
    batch: int = Field(default=8, ge=1)
    """Sequences that go through the model together, on each device."""
    accumulate: int = Field(default=1, ge=1)
    """Batches whose gradients are added up before a step. lomo has none to add up."""
    learning_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Largest learning rate. Default: the method's."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate goes on after the warm-up."""
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of all steps over which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """AdamW's weight decay."""
    clip: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Largest gradient norm; 0 is off. """
    bf16: bool = False
    """Compute in bfloat16; what is trained stays as it is."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of the weights. bfloat16 is for weights that are not trained, and for lomo."""
    checkpoint_activations: bool = False
    """Compute activations again in the backward pass in place of keeping them (gradient checkpointing)."""
    rank: int = Field(default=64, ge=1)
    """The rank of the update."""
    lora_alpha: float = Field(default=16.0, gt=0, allow_inf_nan=False)
    """The update is scaled by lora_alpha / rank."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout before the update."""
    targets: Names = Field(default=(), json_schema_extra={"metavar": "NAME,..."})
    """Which layers get an update (q_proj,v_proj). Default: all linear layers but the head."""
    virtual_tokens: int = Field(default=20, ge=1)
    """Tokens of the soft prompt."""
    encoder: Literal["lstm", "mlp"] = "lstm"
    """What makes the soft prompt in training: a bidirectional LSTM and an MLP, or an MLP alone."""
    encoder_hidden: int | None = Field(default=None, ge=1)
    """Hidden size of the encoder. Default: that of the model."""
    adaptive: bool = False
    """AdaLomo, with a learning rate for each row and column; needs a GPU."""
    base: str | None = Field(default=None, json_schema_extra={"metavar": "MODEL"})
    """The large model that the expert is to steer, for the system that is written. Default: the model
    itself."""
    through: Literal["base"] | None = None
    """base: train on the loss of base + alpha * (expert - antiexpert) in place of the expert's own."""
    teacher: str | None = Field(default=None, json_schema_extra={"metavar": "MODEL"})
    """Learn the distribution of this model on the completions in place of their tokens (distillation)."""
    alpha: float = Field(default=1.0, gt=0, le=10)
    """--through: alpha of that sum, and of the system that is written."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints (and measurements on the held-out examples). Default: an epoch."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the order of the examples, dropout and new weights."""
    report_to: Names = Field(default=(), json_schema_extra={"metavar": "NAME,..."})
    """Also send curves to these (tensorboard, wandb, trackio, ...: whatever transformers knows)."""


METHOD_HELP: Mapping[str, str] = {
    "full": "All weights, by AdamW (the paper's Table 11).",
    "lora": "Low-rank updates beside the linear layers (the paper's Table 13): an adapter.",
    "qlora": "LoRA on weights in 4 bits: an adapter. The antiexpert is the same 4-bit model.",
    "p-tuning": "A soft prompt, made by a small network that training throws away: an adapter.",
    "lomo": "All weights, without memory for all gradients or for an optimiser's state.",
}
"""The methods in a line each; METHODS has what they do."""
_LORA, _PROMPT, _LOMO = frozenset({"lora", "qlora"}), frozenset({"p-tuning"}), frozenset({"lomo"})
ONLY: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(("rank", "lora_alpha", "dropout", "targets"), _LORA),
    **dict.fromkeys(("virtual_tokens", "encoder", "encoder_hidden"), _PROMPT),
    "adaptive": _LOMO,
    "weight_decay": frozenset(METHOD_HELP) - _LOMO,
    "clip": frozenset(METHOD_HELP) - _LOMO,
}
"""Settings that only these methods have."""


def left_out(method: str) -> frozenset[str]:
    """The settings that a method does not have."""
    return frozenset(name for name, methods in ONLY.items() if method not in methods)


def tune_names() -> list[str]:
    """The settings in configs/tune."""
    return sorted(path.stem for path in shipped("configs/tune").glob("*.yaml"))


def read_settings(name_or_path: str, method: str) -> dict[str, Any]:
    """The settings of that name in configs/tune, or of that YAML file: what is given in place of the
    defaults. UserError if they are of another method."""
    path = Path(name_or_path)
    if path.suffix not in {".yaml", ".yml"}:
        if name_or_path not in tune_names():
            raise UserError(
                f"{did_you_mean('settings', name_or_path, tune_names())}. Or give the path of a .yaml file"
            )
        path = shipped("configs/tune") / f"{name_or_path}.yaml"
    content = dict(read_yaml(path))
    own = content.pop("method", method)
    if own != method:
        raise UserError(f"'{path}' is for the method {own}, not {method}")
    if foreign := sorted(left_out(method) & content.keys()):
        raise UserError(
            f"'{path}': {foreign[0]} is of {', '.join(sorted(ONLY[foreign[0]]))}, not of {method}"
        )
    _validated(content, str(path))
    return content


def _validated(content: Mapping[str, Any], origin: str) -> TuneOptions:
    try:
        return TuneOptions.model_validate(dict(content))
    except ValidationError as error:
        raise UserError(f"'{origin}': {explain(error, TuneOptions)}") from None
