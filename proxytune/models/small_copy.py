"""A small copy of a model: the same code and kinds of layers, few and narrow, with fresh weights in float64.

What a family's code does with windows, positions and masks shows in a small copy as in the model itself, and
in float64 no rounding hides it. It needs no weights, so a configuration alone can be judged."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import logging as transformers_logging

LAYERS = 8
"""Layers of a copy, where more are not needed to have one of each kind."""
WINDOW = 5
"""Sliding windows of a copy: shorter than the rows that are tried."""
WORDS = 384
"""Vocabulary of a copy."""
WIDTH = 64
"""Inner width of a copy's feed-forward layers, and of their experts."""
MOST_NUMBERS = 100_000_000
"""Largest copy that is made: 0.8 GB in float64."""
SPREAD = 0.02
"""Standard deviation of what is added to fresh weights, so that none of them stays zero."""


class NoCopy(Exception):
    """The configuration cannot be made smaller, or what comes out is still large."""


def small_copy(kind: type[PreTrainedModel], config: Any, attention: str | None) -> PreTrainedModel:
    """A copy of the model class `kind` with this configuration, on the CPU, with this attention or its
    default. NoCopy if there is none."""
    try:
        small = _shrunk(config)
        with _quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            with torch.device("meta"):
                numbers = sum(p.numel() for p in kind._from_config(copy.deepcopy(small)).parameters())
            if numbers > MOST_NUMBERS:
                raise NoCopy(f"its small copy would still have {numbers / 1e6:.0f} million weights")
            model: PreTrainedModel = kind._from_config(
                small, attn_implementation=attention, dtype=torch.float64
            )
            with suppress(AttributeError, ValueError):  # only mixtures of experts have it
                model.set_experts_implementation("eager")
            model.eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(SPREAD * torch.randn_like(parameter))
    except NoCopy:
        raise
    except Exception as error:  # code of any family, on sizes that its authors did not try
        raise NoCopy(f"no small copy of it can be made ({type(error).__name__}: {error})") from error
    return model


def _shrunk(config: Any) -> Any:
    """The configuration with few layers and narrow ones, consistent in itself."""
    small = copy.deepcopy(config)
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    text = small.get_text_config()
    _fewer_layers(text)
    _narrower(text)
    for name in getattr(small, "sub_configs", {}):
        part = getattr(small, name, None)
        if part is not None and part is not text and hasattr(part, "num_hidden_layers"):
            part.num_hidden_layers = 1
    text.vocab_size = min(int(text.vocab_size), WORDS)
    for part in (small, text):
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if hasattr(part, name):
                setattr(part, name, None)
    if isinstance(getattr(text, "sliding_window", None), int):
        text.sliding_window = min(text.sliding_window, WINDOW)
    return small


def _fewer_layers(text: Any) -> None:
    """Cut the layers off behind the first that repeats what is there, and the lists that go by layer."""
    layers = int(text.num_hidden_layers)
    by_layer = {
        name: value
        for name, value in vars(text).items()
        if isinstance(value, list | tuple) and len(value) == layers
    }
    kinds = list(zip(*by_layer.values(), strict=True)) or [()] * layers
    first_of_each = [kinds.index(kind) for kind in kinds]
    keep = min(layers, max(LAYERS, max(first_of_each) + 1))
    text.num_hidden_layers = keep
    for name, value in by_layer.items():
        setattr(text, name, value[:keep])


def _narrower(text: Any) -> None:
    """Fewer heads of the size that they have, and the width that follows; narrow feed-forward layers."""
    if not getattr(text, "num_attention_heads", None):
        return  # no attention, and a state whose sizes hang together otherwise
    heads, width = int(text.num_attention_heads), int(text.hidden_size)
    shared = int(getattr(text, "num_key_value_heads", None) or heads)
    if heads % shared:
        return
    few = min(2, shared)
    size = int(getattr(text, "head_dim", None) or width // heads)
    text.num_attention_heads = few * min(2, heads // shared)
    if hasattr(text, "num_key_value_heads") and text.num_key_value_heads is not None:
        text.num_key_value_heads = few
    text.hidden_size = text.num_attention_heads * size
    for name in vars(text):
        if name in FEED_FORWARD and isinstance(getattr(text, name), int):
            setattr(text, name, min(getattr(text, name), WIDTH))
    if getattr(text, "word_embed_proj_dim", None) == width:  # OPT
        text.word_embed_proj_dim = text.hidden_size


FEED_FORWARD = {
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "ffn_dim",
    "n_inner",
}
"""What families call the inner width of a feed-forward layer."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' advice on a configuration that nobody will keep."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
