"""Which path a model family may take: our packed attention where it is shown to be right, or its own forward.

Many families ignore a registered attention function, apply sliding windows only through the mask that we do
not receive, or rotate by the length of the call. Nothing here goes by a family's name: a model is asked what
it stores, what reaches our function is compared with what its configuration promises, and then two ragged
rows, in two chunks, are compared with one plain forward."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from proxytune.engine.attention import (
    NAME,
    Discovery,
    Forward,
    FusedForward,
    LlamaForward,
    MissingContext,
    attend,
)
from proxytune.engine.kv import CacheSpec, LayerShape, SlotCache
from proxytune.engine.runners import ModelRunner, ReferenceRunner, VocabMap, feed
from proxytune.errors import UserError
from proxytune.models.memory import is_split
from proxytune.models.small_copy import NoCopy, small_copy
from proxytune.models.weight_only import WeightOnlyQuantizer

AttentionInterface.register(NAME, attend)

FIXED_ROPE = {"default", "linear", "llama3", "yarn", "proportional"}
"""Rotations whose frequencies do not depend on how long the call is."""
UNBOUNDED = 1 << 20
"""Context window of models that name none (ALiBi, state space)."""
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Largest difference between packed and plain logits, in standard deviations of the logits, where rounding is
fine. It stays far below, and a wrong window, position or mask far above."""
COARSE = (0.03, 0.25)
"""Largest divergence of packed from plain distributions where rounding is coarse, as a share of that between
neighbouring positions of a text: the first where the model's own rounding is small, the second however large
it is. On text, rounding gives up to 0.003 in bfloat16 and 0.01 with 8-bit activations (on varied ids 0.11); a
wrong position gives 1 and more (SmolLM2 135M, Gemma 3 270M; 0.06 in a random miniature)."""
OWN = 5
"""How many times its own rounding a model may be off."""
CUT = 6
"""Where a row is cut to see that later tokens do not matter, and what rounding does when shapes change."""

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


def examine(model: PreTrainedModel, text: Sequence[int] = ()) -> Family:
    """Decide a model's path and switch its attention accordingly. UserError if no path is right.

    `text`: ids of some text, on which real weights are not at a loss, if there is a tokenizer at hand."""
    _keep_the_soft_cap(model)
    own = model.config._attn_implementation
    window, rope = context_window(model.config)
    trial = Trial.of(model, text)
    small = _small_family(model, own) if trial.coarse else None
    try:
        if rope is not None:
            raise Unfit(rope)
        _check_interface(model)
        if small is not None and small.path == "reference":
            raise Unfit(small.reason)
        family = _packed(model, window, trial)
        trusted = small is None or small.llama_forward is not None
        return family if trusted else replace(family, llama_forward=None)
    except Unfit as reason:
        model.set_attn_implementation(own)
        family = _reference(model, window, str(reason), trial)
    return family if small is None else replace(family, cached=family.cached and small.cached)


def examine_config(kind: type[PreTrainedModel], config: Any) -> Family:
    """The path of models of this class and configuration, from a small copy alone; layers and dtype are the
    copy's. UserError if no path is right, NoCopy if there is no small copy."""
    return examine(small_copy(kind, config, None))


def _small_family(model: PreTrainedModel, attention: str) -> Family:
    """The path that the model's small copy takes; without one, it is the slow path that asks for nothing."""
    try:
        return examine(small_copy(type(model), model.config, attention))
    except NoCopy as reason:
        return Family("reference", UNBOUNDED, str(reason))


def _keep_the_soft_cap(model: PreTrainedModel) -> None:
    """transformers before 5.21 loads Gemma 2 with sdpa, which drops its soft cap."""
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if capped and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


@dataclass(frozen=True)
class Trial:
    """Two ragged rows of ids, their plain logits, and how far others may be from these."""

    ids: list[list[int]]
    plain: list[Tensor]
    """[T, V] per row."""
    coarse: bool
    """Whether rounding is: in half precision, and where activations are quantised."""
    limit: float

    @classmethod
    def of(cls, model: PreTrainedModel, text: Sequence[int] = ()) -> Trial:
        """The trial of a model as it is."""
        first, second = ROWS
        ids = probe_ids(model)
        if len(text) >= first + second:
            ids = [list(text[:first]), list(text[first : first + second])]
        plain = [plain_logits(model, row) for row in ids]
        quantizer = getattr(model, "hf_quantizer", None)
        exact = quantizer is None or (
            isinstance(quantizer, WeightOnlyQuantizer) and quantizer.quantization_config.bits == 8
        )
        if exact and model.dtype in TOLERANCE:
            return cls(ids, plain, False, TOLERANCE[model.dtype])
        least, most = COARSE
        trial = cls(ids, plain, True, most)
        own = trial.apart(
            [
                (plain_logits(model, row[:CUT])[-1], there[CUT - 1])
                for row, there in zip(ids, plain, strict=True)
            ]
        )
        return replace(trial, limit=min(max(least, OWN * own), most))

    def apart(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
        """How far logits [V] are from the plain ones, to be held against `limit`; NaN where one is."""
        if not self.coarse:
            return max((difference(got, want) for got, want in pairs), key=lambda d: (math.isnan(d), d))
        between = [_divergence(row[i + 1], row[i]) for row in self.plain for i in range(len(row) - 1)]
        found = [_divergence(got, want) for got, want in pairs]
        return (sum(found) / len(found)) / max(sum(between) / len(between), 1e-12)

    def agrees(self, *pairs: tuple[Tensor, Tensor]) -> bool:
        """Whether these logits are the plain ones, but for rounding."""
        return self.apart(pairs) <= self.limit


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


def _check_interface(model: PreTrainedModel) -> None:
    """Unfit where the model's code offers no way in."""
    if not getattr(model, "_supports_attention_backend", False):
        raise Unfit("it does not use transformers' attention interface")
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise Unfit("its forward has no logits_to_keep")


def _packed(model: PreTrainedModel, window: int, trial: Trial) -> Family:
    """The packed Family of a model, or Unfit. Leaves our attention switched on."""
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
    _rotate_as_at_first(model)
    layers = [asked for _, asked in sorted(seen.layers.items())]
    family = Family(
        "packed",
        window,
        layers=tuple(asked.shape for asked in layers),
        devices=tuple(asked.device for asked in layers),
        dtype=layers[0].dtype,
    )
    apart = _probe(model, family, device, trial)
    if not apart <= trial.limit:
        raise Unfit(f"packed and plain logits differ by {apart:.2g} {UNITS[trial.coarse]}")
    model.config.pad_token_id = None  # GPT-2 looks for padding in every call, for which the host would wait
    if is_split(model):
        return family  # transformers' own modules speak with the other processes
    llama_forward = LlamaForward.of(model, layers, window) or FusedForward.of(model, layers, window)
    same = llama_forward is not None and _llama_forward_is_right(llama_forward, family, device, trial)
    return replace(family, llama_forward=llama_forward) if same else family


def _rotate_as_at_first(model: PreTrainedModel) -> None:
    """Up to `context_window`, rotations whose frequencies change with the length of a call have those of a
    short one. To find out, transformers compares the largest position with a number in every call, for which
    the host would wait."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            module.rope_type = _fixed(kinds)
        elif isinstance(kinds, dict):  # by type of layer
            module.rope_type = {layer: _fixed(kind) for layer, kind in kinds.items()}


def _fixed(kind: str) -> str:
    return kind if kind in FIXED_ROPE else "default"


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


ROWS = (11, 7)
"""Lengths of the rows that are tried."""
UNITS = {False: "standard deviations", True: "times what neighbouring positions do"}


def probe_ids(model: PreTrainedModel) -> list[list[int]]:
    """Two rows of different lengths with fixed, varied ids."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    return [[(7 + 131 * i * i + row) % vocabulary for i in range(n)] for row, n in enumerate(ROWS)]


@torch.inference_mode()
def plain_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Logits [T, V] of one row by one forward without any cache: the plain definition."""
    device = model.get_input_embeddings().weight.device
    out: Tensor = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits
    return out[0]


def _probe(forward: Forward, family: Family, device: torch.device, trial: Trial) -> float:
    """The two rows in chunks through our path: how far they are `apart` from what one plain forward per row
    gives."""
    cache = SlotCache(CacheSpec(family.layers, 64, family.dtype, family.devices))
    width, pairs = trial.plain[0].shape[-1], []
    runner = ModelRunner(forward, cache, VocabMap(width), family.window, device)
    for _ in trial.ids:
        cache.admit()
    for chunk in (slice(0, 4), slice(4, 10), slice(10, None)):
        parts = {row: tokens[chunk] for row, tokens in enumerate(trial.ids) if tokens[chunk]}
        cache.reserve([len(tokens[: chunk.stop]) for tokens in trial.ids])
        for row, got in feed(runner, parts).items():
            pairs.append((got, trial.plain[row][cache.lengths[row] - 1]))
    return trial.apart(pairs)


def _llama_forward_is_right(
    llama_forward: LlamaForward, family: Family, device: torch.device, trial: Trial
) -> bool:
    """Whether it gives the plain logits. Parts of the same names can be of another make."""
    try:
        return _probe(llama_forward, family, device, trial) <= trial.limit
    except ANOTHER_MAKE:
        return False


def difference(got: Tensor, want: Tensor) -> float:
    """Largest difference of two logit vectors, in standard deviations of the second."""
    want = want.double()
    return float((got.double() - want).abs().max() / want.std().clamp(min=1e-12))


def _divergence(got: Tensor, want: Tensor) -> float:
    """Kullback-Leibler divergence of two distributions given by logits [V], in nats."""
    log_got, log_want = got.double().log_softmax(-1), want.double().log_softmax(-1)
    return float((log_want.exp() * (log_want - log_got)).sum())


def _reference(model: PreTrainedModel, window: int, reason: str, trial: Trial) -> Family:
    """The reference Family of a model; UserError if it is no causal language model at all."""
    ids, plain = trial.ids[0], trial.plain[0]
    if not trial.agrees((plain_logits(model, ids[:CUT])[-1], plain[CUT - 1])):
        raise UserError(
            f"{type(model).__name__} is not a causal language model: later tokens change earlier logits"
        )
    return Family("reference", window, reason, cached=_own_cache_is_right(model, trial))


def _own_cache_is_right(model: PreTrainedModel, trial: Trial) -> bool:
    """Whether feeding a row in pieces through the model's own cache gives the plain logits."""
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return False
    ids, plain = trial.ids[0], trial.plain[0]
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
        if getattr(runner.rows, "caches", [None])[0] is None or not trial.agrees((logits[0], plain[at - 1])):
            return False
    return True
