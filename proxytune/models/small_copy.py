"""The path that a model would take, found out without its weights: on a copy of its configuration with few
layers and fresh weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from proxytune.errors import UserError
from proxytune.models.memory import skeleton_of
from proxytune.models.support import ANOTHER_MAKE, Family, examine

FEWEST, MOST_NUMBERS = 2, 500_000_000
"""Layers of a copy at least, and numbers at most (2 GB)."""
FEW_WORDS = 1024


def family_without_weights(config: Any, remote: bool) -> Family | str:
    """The Family of a small copy; why it cannot be known where the copy is too large or cannot be made."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or [])
    every_kind = max((kinds.index(kind) + 1 for kind in {*kinds}), default=0)
    layers = min(text.num_hidden_layers, max(FEWEST, every_kind))
    try:
        text.num_hidden_layers, text.vocab_size = layers, min(text.vocab_size, FEW_WORDS)
        if kinds and len(text.layer_types) != layers:  # in some it follows from the number
            text.layer_types = kinds[:layers]
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(text, key, None)
        numbers = sum(parameter.numel() for parameter in skeleton_of(small, remote).parameters())
        if numbers > MOST_NUMBERS:
            return f"unknown: even {layers} of its layers are {numbers / 1e9:.1f}B numbers"
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(small, dtype=torch.float32, trust_remote_code=remote)
        return examine(module.eval())
    except UserError as error:
        return str(error)
    except ANOTHER_MAKE as error:
        return f"unknown: a small copy of it cannot be made ({type(error).__name__}: {error!s:.120})"
