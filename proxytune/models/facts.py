"""What is known of one model of a system: its size, the path that it takes and why, what a token costs.

Known from the loaded model, or from its configuration alone."""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from proxytune.config import ModelSpec
from proxytune.engine.kv import CacheSpec
from proxytune.errors import UserError
from proxytune.models.adapter_files import first_line
from proxytune.models.memory import skeleton_of, weights_of
from proxytune.models.small_copy import NoCopy
from proxytune.models.support import UNBOUNDED, Family, context_window, examine_config
from proxytune.schema import Record


class ModelFacts(Record):
    """One model, as it is or would be loaded."""

    kind: str
    """The class in transformers."""
    layers: int | None
    parameters: int
    weights: int
    """Bytes that it adds to memory."""
    head: int
    """Rows of the output head."""
    window: int | None
    """Most tokens that it takes; None without a bound."""
    path: Literal["packed", "reference", "unknown"]
    reason: str
    """Why it takes the reference path, or why the path is not known."""
    examined: Literal["weights", "copy"]
    """What the path was found out on: the loaded weights, or a small copy of the configuration."""
    kv_per_token: int | None
    """Bytes of KV cache for one token; None where the model keeps a cache of its own."""


def model_facts(spec: ModelSpec, config: Any, loaded: Family | None, remote: bool) -> ModelFacts:
    """The facts of a model that is loaded (its Family is given) or that is known by its configuration
    only."""
    skeleton, text = skeleton_of(config, remote), config.get_text_config()
    family = _family_of(type(skeleton), config) if loaded is None else loaded
    if isinstance(family, str):
        path: Literal["packed", "reference", "unknown"] = "unknown"
        window, reason = context_window(config)[0], family
    else:
        path, window, reason = family.path, family.window, family.reason
    if loaded is not None and loaded.path == "packed":
        kv: int | None = CacheSpec(loaded.layers, 0, loaded.dtype, loaded.devices).bytes_per_token
    else:
        kv = None if path == "reference" else kv_per_token(spec, config)
    return ModelFacts(
        kind=type(skeleton).__name__,
        layers=getattr(text, "num_hidden_layers", None),
        parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
        weights=int(weights_of(spec, config, skeleton)),
        head=int(text.vocab_size),
        window=None if window >= UNBOUNDED else window,
        path=path,
        reason=reason,
        examined="copy" if loaded is None else "weights",
        kv_per_token=kv,
    )


def _family_of(kind: type[PreTrainedModel], config: Any) -> Family | str:
    """The Family of a small copy; why it cannot be known where there is none."""
    try:
        return examine_config(kind, config)
    except NoCopy as reason:
        return first_line(reason)  # what raised it can be of several lines
    except UserError as error:
        return str(error)


def kv_per_token(spec: ModelSpec, config: Any) -> int | None:
    """Bytes of KV cache for one token on the packed path, from the configuration; None where it does not say
    what its layers store."""
    text = config.get_text_config()
    layers, queries = (getattr(text, key, None) for key in ("num_hidden_layers", "num_attention_heads"))
    if not isinstance(layers, int) or not isinstance(queries, int):
        return None
    heads = getattr(text, "num_key_value_heads", None) or queries
    if hasattr(text, "qk_nope_head_dim"):  # latent attention: what is stored is unfolded
        key, value = text.qk_nope_head_dim + text.qk_rope_head_dim, text.v_head_dim
    else:
        key = value = getattr(text, "head_dim", None) or text.hidden_size // queries
    dtype = (config.dtype or torch.float32) if spec.dtype == "auto" else getattr(torch, spec.dtype)
    return int(layers * heads * (key + value) * dtype.itemsize)
