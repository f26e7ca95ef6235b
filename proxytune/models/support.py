"""Which path a model family may take: our packed attention where it is shown to be right, or its own forward.

Many families ignore a registered attention function, apply sliding windows only through the mask that we do
not receive, or rotate by the length of the call. Nothing here goes by a family's name: a model is asked what
it stores, what reaches our function is compared with what its configuration promises, and then two ragged
rows, in two chunks, are compared with one plain forward."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from proxytune.engine.attention import NAME, Discovery, Forward, LlamaForward, MissingContext, attend
from proxytune.engine.kv import CacheSpec, LayerShape, SlotCache
from proxytune.engine.runners import ModelRunner, ReferenceRunner, VocabMap, feed
from proxytune.errors import UserError

AttentionInterface.register(NAME, attend)

FIXED_ROPE = {"default", "linear", "llama3", "yarn", "proportional"}
"""Rotations whose frequencies do not depend on how long the call is."""
UNBOUNDED = 1 << 20
"""Context window of models that name none (ALiBi, state space)."""
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""Largest difference between packed and plain logits, in standard deviations of the logits. Rounding stays
far below, and a wrong window, position or mask far above; half precision is coarse, so there the other checks
count."""

ANOTHER_MAKE = (RuntimeError, ValueError, TypeError, AttributeError, IndexError)
"""What a part raises that is tried out and is not what it was taken for."""


@dataclass(frozen=True)
class Family:
    """How one loaded model is to be run."""

    path: Literal["packed", "reference"]
    window: int
    """Most tokens that it takes."""
    reason: str = ""
    """Why it takes the reference path."""
    cached: bool = False
    """On the reference path: whether its own cache gives what a plain forward gives."""
    layers: tuple[LayerShape, ...] = ()
    devices: tuple[torch.device, ...] = ()
    dtype: torch.dtype = torch.float32
    llama_forward: LlamaForward | None = None
    """The same forward at less cost, where the model has the form for it."""


class Unfit(Exception):
    """The packed path would not be right for this model; the message says why."""


def examine(model: PreTrainedModel) -> Family:
    """Decide a model's path and switch its attention accordingly. UserError if no path is right."""
    text = model.config.get_text_config()
    if getattr(text, "attn_logit_softcapping", None) and model.config._attn_implementation == "sdpa":
        # transformers before 5.21 loads Gemma 2 with sdpa, which drops the soft cap
        model.set_attn_implementation("eager")
    own = model.config._attn_implementation
    window, rope = context_window(model.config)
    try:
        if rope is not None:
            raise Unfit(rope)
        family = _packed(model, window)
    except Unfit as reason:
        model.set_attn_implementation(own)
        return _reference(model, window, str(reason))
    return family


def context_window(config: Any) -> tuple[int, str | None]:
    """Most tokens that a model takes, and why its rotation rules the packed path out, if it does.

    Where frequencies change with the length of the call ("dynamic", "longrope"), a cache is only right up to
    the length that the model was first trained for: that is the window then."""
    text = config.get_text_config()
    window = int(getattr(text, "max_position_embeddings", None) or UNBOUNDED)
    for rope in _rope_parameters(getattr(text, "rope_parameters", None)):
        kind = rope.get("rope_type", "default")
        if kind in FIXED_ROPE:
            continue
        original = rope.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", None
        )
        if kind == "dynamic":
            original = original or window
        if not original:
            return window, f"its rotary embedding '{kind}' depends on the length of the call"
        window = min(window, int(original))
    return window, None


def _rope_parameters(parameters: Any) -> Iterator[Mapping[str, Any]]:
    """Every rope dictionary of a configuration: one, or one per layer type."""
    if isinstance(parameters, Mapping):
        if "rope_type" in parameters or "rope_theta" in parameters:
            yield parameters
        else:
            for nested in parameters.values():
                yield from _rope_parameters(nested)


def _packed(model: PreTrainedModel, window: int) -> Family:
    """The packed Family of a model, or Unfit. Leaves our attention switched on."""
    if not getattr(model, "_supports_attention_backend", False):
        raise Unfit("it does not use transformers' attention interface")
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise Unfit("its forward has no logits_to_keep")
    ids = probe_ids(model)
    plain = [plain_logits(model, row) for row in ids]
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise Unfit("it keeps its own attention")
    seen = Discovery()
    device = model.get_input_embeddings().weight.device
    try:
        with torch.inference_mode():
            token = torch.zeros(1, 1, dtype=torch.long, device=device)
            model(input_ids=token, position_ids=token, use_cache=False, logits_to_keep=1, packed=seen)
    except MissingContext as error:
        raise Unfit(str(error)) from None
    _check_layers(model.config.get_text_config(), seen)
    layers = [asked for _, asked in sorted(seen.layers.items())]
    family = Family(
        "packed",
        window,
        layers=tuple(asked.shape for asked in layers),
        devices=tuple(asked.device for asked in layers),
        dtype=layers[0].dtype,
    )
    limit = tolerance(plain[0].dtype)
    apart = _probe(model, family, device, ids, plain)
    if not apart <= limit:
        raise Unfit(f"packed and plain logits differ by {apart:.2g} standard deviations")
    model.config.pad_token_id = None  # GPT-2 looks for padding in every call, for which the host would wait
    llama_forward = LlamaForward.of(model, layers, window)
    same = llama_forward is not None and _llama_forward_is_right(
        llama_forward, family, device, ids, plain, limit
    )
    return replace(family, llama_forward=llama_forward) if same else family


def _check_layers(config: Any, seen: Discovery) -> None:
    """What reached our function must be what the configuration promises: every layer, and every window."""
    layers = int(config.num_hidden_layers)
    if seen.calls != layers or sorted(seen.layers) != list(range(layers)):
        raise Unfit(f"{seen.calls} of its {layers} layers call the attention function once each")
    if getattr(config, "attention_chunk_size", None):
        raise Unfit("its attention is chunked")
    kinds = getattr(config, "layer_types", None)
    for layer, kind in enumerate(kinds or ()):
        if kind == "sliding_attention" and seen.layers[layer].window is None:
            raise Unfit("its sliding window is only in the mask")
        if kind not in {"full_attention", "sliding_attention"}:
            raise Unfit(f"it has layers of type '{kind}'")
    promised = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if promised and not kinds and all(asked.window is None for asked in seen.layers.values()):
        raise Unfit("its sliding window is only in the mask")


def probe_ids(model: PreTrainedModel) -> list[list[int]]:
    """Two rows of different lengths with fixed, varied ids."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    return [[(7 + 131 * i * i + row) % vocabulary for i in range(n)] for row, n in enumerate((11, 7))]


@torch.inference_mode()
def plain_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Logits [T, V] of one row by one forward without any cache: the plain definition."""
    device = model.get_input_embeddings().weight.device
    out: Tensor = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits
    return out[0]


def _probe(
    forward: Forward, family: Family, device: torch.device, ids: list[list[int]], plain: list[Tensor]
) -> float:
    """Two ragged rows in two chunks through our path: their largest `difference` from what one plain forward
    per row gives."""
    cache = SlotCache(CacheSpec(family.layers, 64, family.dtype, family.devices))
    width, errors = plain[0].shape[-1], [0.0]
    runner = ModelRunner(forward, cache, VocabMap(width), family.window, device)
    for _ in ids:
        cache.admit()
    for chunk in (slice(0, 4), slice(4, 10), slice(10, None)):
        parts = {row: tokens[chunk] for row, tokens in enumerate(ids) if tokens[chunk]}
        cache.reserve([len(tokens[: chunk.stop]) for tokens in ids])
        for row, got in feed(runner, parts).items():
            errors.append(difference(got, plain[row][cache.lengths[row] - 1]))
    return max(errors, key=lambda error: (math.isnan(error), error))


def _llama_forward_is_right(
    llama_forward: LlamaForward,
    family: Family,
    device: torch.device,
    ids: list[list[int]],
    plain: list[Tensor],
    limit: float,
) -> bool:
    """Whether it gives the plain logits. Parts of the same names can be of another make."""
    try:
        return _probe(llama_forward, family, device, ids, plain) <= limit
    except ANOTHER_MAKE:
        return False


def difference(got: Tensor, want: Tensor) -> float:
    """Largest difference of two logit vectors, in standard deviations of the second."""
    want = want.double()
    return float((got.double() - want).abs().max() / want.std().clamp(min=1e-12))


def tolerance(dtype: torch.dtype) -> float:
    """The TOLERANCE of a dtype."""
    return TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])


def _reference(model: PreTrainedModel, window: int, reason: str) -> Family:
    """The reference Family of a model; UserError if it is no causal language model at all."""
    ids = probe_ids(model)[0]
    plain = plain_logits(model, ids)
    limit = tolerance(plain.dtype)
    if difference(plain_logits(model, ids[:6])[-1], plain[5]) > limit:
        raise UserError(
            f"{type(model).__name__} is not a causal language model: later tokens change earlier logits"
        )
    return Family("reference", window, reason, cached=_own_cache_is_right(model, ids, plain, limit))


def _own_cache_is_right(model: PreTrainedModel, ids: list[int], plain: Tensor, limit: float) -> bool:
    """Whether feeding a row in pieces through the model's own cache gives the plain logits."""
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return False
    device = model.get_input_embeddings().weight.device
    runner = ReferenceRunner(model, VocabMap(plain.shape[-1]), UNBOUNDED, device, UNBOUNDED, cached=True)
    runner.rows.admit()
    at = 0
    for count in (5, 1, len(ids) - 6):
        try:
            logits = feed(runner, {0: ids[at : at + count]})
        except ANOTHER_MAKE:
            return False  # some caches take one token at a time only
        at += count
        if (
            getattr(runner.rows, "caches", [None])[0] is None
            or not difference(logits[0], plain[at - 1]) <= limit
        ):
            return False
    return True
