"""The attention that Hugging Face modules call in our forwards: packed tokens, ragged rows, our KV cache.

One call carries T tokens of several rows, [1, H, T, D]. `Packed` says which tokens belong to which rows; it
travels as a keyword argument of the model's forward, so that several engines can run in one process. On the
CPU a kernel takes the rows as they are, and on CUDA one call takes all of them over their pages. Where torch
attends, rows with equal query length form a group, and a group is one attention call: decode is one group,
every prefill chunk another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from proxytune.engine.attention.over_pages import attend_pages
from proxytune.engine.attention.packed import MAX_GROUPED, MOST_TOKENS, Group, Packed, PackedPart
from proxytune.engine.cuda.attention import DevicePacked
from proxytune.engine.fused import Rotation, place, rotate_and_place
from proxytune.engine.kernels.cpu_attention import attend_slots, takes
from proxytune.engine.kernels.cpu_rows import rotate
from proxytune.engine.kernels.paged_attention import supported
from proxytune.engine.kernels.scores import ScoreRule
from proxytune.engine.kv.cache import KVCache, LayerShape, integers
from proxytune.engine.kv.pages import PagedCache
from proxytune.engine.kv.slots import SlotCache

Forward = Callable[..., Any]
"""A causal language model's forward: keyword arguments as in Hugging Face, an object with `.logits`."""
NAME = "proxytune"
"""Our name in the registry of attention functions."""


@dataclass(frozen=True)
class LayerCall:
    """What one layer stores, where, and what it asks of attention."""

    shape: LayerShape
    device: torch.device
    dtype: torch.dtype
    scaling: float | None
    window: int | None
    plain: bool
    """Neither soft-capped scores nor sinks."""


@dataclass
class Discovery:
    """Takes the place of `Packed` in the one-token forward that learns what a model stores and asks for."""

    layers: dict[int, LayerCall] = field(default_factory=dict)
    calls: int = 0

    def see(
        self, layer: int, key: Tensor, value: Tensor, scaling: float | None, window: int | None, plain: bool
    ) -> None:
        """Note one layer's call."""
        self.calls += 1
        shape = LayerShape(key.shape[1], key.shape[-1], value.shape[-1])
        self.layers[layer] = LayerCall(shape, key.device, key.dtype, scaling, window, plain)


class MissingContext(RuntimeError):
    """The model does not forward our keyword argument to its attention (StableLM)."""


def attend(
    module: nn.Module,
    query: Tensor,  # [1, H, T, Dk], rotated
    key: Tensor,  # [1, Hkv, T, Dk], rotated, not repeated for grouped queries
    value: Tensor,  # [1, Hkv, T, Dv]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packed: Packed | DevicePacked | Discovery | None = None,
    rotation: Rotation | None = None,
    **_: object,  # position ids, router flags: the interface hands every attention the same arguments
) -> tuple[Tensor, None]:
    """The function registered with transformers' AttentionInterface: -> [1, T, H, Dv], None.

    With a `rotation`, which only `FusedForward` gives, queries and keys are not rotated yet."""
    if packed is None:
        raise MissingContext(f"{type(module).__name__} does not forward keyword arguments to its attention")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    rule = ScoreRule(scaling, sliding_window, softcap, s_aux)
    if isinstance(packed, Discovery):
        packed.see(layer, key, value, scaling, sliding_window, rule.plain)
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2), None
    if isinstance(packed, DevicePacked):
        return packed.attend(layer, query, key, value, rule, rotation), None
    results, cache = list[Tensor](), packed.parts[0].cache
    if isinstance(cache, PagedCache):
        results += [_over_pages(part, layer, query, key, value, rule, rotation) for part in packed.parts]
        if rest := query.shape[2] - packed.parts[-1].tokens.stop:  # tokens that no row owns
            results.append(query.new_zeros(rest, query.shape[1], value.shape[-1]))
        return (results[0] if len(results) == 1 else torch.cat(results))[None], None
    result = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])  # [T, H, Dv]
    result[packed.parts[-1].tokens.stop :] = 0
    for part in packed.parts:
        mine = part.tokens
        q, k, v, out = query[0, :, mine], key[0, :, mine], value[0, :, mine], result[mine]
        if rotation is not None:
            q, k = (rotate(t.transpose(0, 1), *rotation.of(mine)).transpose(0, 1) for t in (q, k))
        cache, groups = part.cache, part.groups
        if isinstance(cache, SlotCache) and takes(q, cache.spec.dtype):
            attend_slots(q, k, v, cache.pools(layer), part.at.segments, out, rule, MOST_TOKENS)
            groups = part.long_groups
        else:
            cache.write(layer, k, v, part.at)
        for group in groups:
            _attend_group(group, q, cache, layer, out, rule)
    return result[None], None


def _over_pages(
    part: PackedPart,
    layer: int,
    query: Tensor,  # [1, H, T, Dk] of all parts, and so are key and value
    key: Tensor,
    value: Tensor,
    rule: ScoreRule,
    rotation: Rotation | None,
) -> Tensor:
    """Store a part's keys and values and let its queries see them and what came before: -> [T, H, Dv]."""
    cache = part.cache
    assert isinstance(cache, PagedCache)
    pools = cache.pools(layer)
    q, k, v = (t[0, :, part.tokens].transpose(0, 1) for t in (query, key, value))  # [T, H, D]
    slots = cache.slots(part.at, key.device)
    if rotation is None:
        place(k, v, pools, slots)
    else:
        q = rotate_and_place(q, k, v, rotation.of(part.tokens), pools, slots)
    if supported(q[:1].transpose(0, 1)[None], *pools):
        return attend_pages(part.ragged, q, pools, rule)
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    for group in part.groups:
        _attend_group(group, q.transpose(0, 1), cache, layer, out, rule)
    return out


def _attend_group(group: Group, q: Tensor, cache: KVCache, layer: int, out: Tensor, rule: ScoreRule) -> None:
    """Rows of like lengths against what the cache has of them, by torch."""
    keys, values = cache.read(layer, group.first, group.block, group.longest)
    rows = _gather(q, group)
    keys, values = keys.to(q.dtype), values.to(q.dtype)
    attend_rows, on_cpu = _fused if rule.plain else _explicit, q.device.type == "cpu"
    if not on_cpu and group.block > 1:  # to look at the result would wait for the device
        keys, values = cleared(keys, group), cleared(values, group)
    seen = attend_rows(rows, keys, values, group, rule)
    if on_cpu and group.query <= MAX_GROUPED and not bool(seen.isfinite().all()):
        _apart(seen, rows, keys, values, group, rule)
    _scatter(seen, group, out)


def cleared(lines: Tensor, group: Group) -> Tensor:
    """Keys or values [block, H, longest, D] with zeros behind every row's length: what is left there of a
    sequence that had a NaN, a mask would not hide."""
    lengths = [0] * group.block
    for row, length in zip(group.rows, group.lengths, strict=True):
        lengths[row - group.first] = length
    ends = integers(lengths, lines.device)[:, None]
    behind = torch.arange(lines.shape[2], device=lines.device) >= ends  # [block, longest]
    return lines.masked_fill(behind[:, None, :, None], 0.0)


def _apart(seen: Tensor, q: Tensor, keys: Tensor, values: Tensor, group: Group, rule: ScoreRule) -> None:
    """Compute anew what is not finite in `seen` [block, H, query, Dv]: every query alone, with the keys that
    it sees. A mask does not hide a NaN, and behind a row's length, or in a later draft, there may be one of a
    sequence that had it."""
    attend_rows = _fused if rule.plain else _explicit
    for row, length in zip(group.rows, group.lengths, strict=True):
        mine = slice(row - group.first, row - group.first + 1)
        if bool(seen[mine].isfinite().all()):
            continue
        for number in range(group.query):
            end = length - group.query + number + 1
            alone, at = Group(1, [row], [0], [end]), slice(number, number + 1)
            seen[mine, :, at] = attend_rows(
                q[mine, :, at], keys[mine, :, :end], values[mine, :, :end], alone, rule
            )


def _gather(query: Tensor, group: Group) -> Tensor:
    """Queries [H, T, D] of a part -> [block, H, query, D] of a group; of rows in between they are zeros."""
    heads = query.shape[0]
    if group.dense:
        start = group.starts[0]
        tokens = query[:, start : start + len(group.rows) * group.query]
        return tokens.reshape(heads, len(group.rows), group.query, -1).transpose(0, 1)
    rows, at = group.indices(query.device)
    q = query.new_zeros(group.block, heads, group.query, query.shape[-1])
    q[rows] = query[:, at].reshape(heads, len(group.rows), group.query, -1).transpose(0, 1)
    return q


def _scatter(seen: Tensor, group: Group, result: Tensor) -> None:
    """Write a group's [block, H, query, Dv] to its tokens of the part's result [T, H, Dv]."""
    by_token = seen.transpose(1, 2)
    if group.dense:
        start = group.starts[0]
        result[start : start + len(group.rows) * group.query] = by_token.flatten(0, 1)
        return
    rows, at = group.indices(seen.device)
    result[at] = by_token[rows].flatten(0, 1)


def _fused(q: Tensor, keys: Tensor, values: Tensor, group: Group, rule: ScoreRule) -> Tensor:
    """SDPA, with grouped queries only where there are any and without a mask where causality says it all. For
    a few queries of each of several rows on a CPU, two products of matrices are faster."""
    grouped, window, scaling = q.shape[1] != keys.shape[1], rule.window, rule.scaling
    several = group.query <= FEW_QUERIES and (grouped or len(group.rows) >= SEVERAL_ROWS)
    if several and not q.is_cuda and q.dtype in EXACT:
        return written_out(q, keys, values, group.mask(window, q), scaling)
    if group.from_start and (window is None or group.query <= window):
        return scaled_dot_product_attention(
            q, keys, values, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    mask = group.mask(window, q)
    if grouped and q.is_cuda and mask is not None:  # with both, CUDA has no kernel but the written-out one
        keys, values = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (keys, values))
        grouped = False
    return scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scaling, enable_gqa=grouped)


FEW_QUERIES = 8
SEVERAL_ROWS = 4
EXACT = (torch.float32, torch.float64)
"""Dtypes whose softmax need not be computed in a wider one."""


def written_out(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Attention as two products per row and key head; the query heads that share one count as queries."""
    rows, heads, queries, size = q.shape
    scale = size**-0.5 if scaling is None else scaling
    shared = (q * scale).reshape(rows, keys.shape[1], -1, size)  # [R, Hkv, H / Hkv * q, Dk]
    scores = shared @ keys.transpose(-1, -2)
    if mask is not None:
        scores.view(rows, keys.shape[1], -1, queries, keys.shape[2]).add_(mask[:, :, None])
    return (scores.softmax(-1) @ values).reshape(rows, heads, queries, -1)


def _explicit(q: Tensor, keys: Tensor, values: Tensor, group: Group, rule: ScoreRule) -> Tensor:
    """Attention written out, for what SDPA lacks: soft-capped scores (Gemma 2) and sinks (gpt-oss)."""
    sharing, mask, sinks = q.shape[1] // keys.shape[1], group.mask(rule.window, q), rule.sinks
    keys, values = keys.repeat_interleave(sharing, 1), values.repeat_interleave(sharing, 1)
    scores = q @ keys.transpose(-1, -2) * rule.scale(q.shape[-1])  # [R, H, q, L]
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    if mask is not None:
        scores = scores + mask
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if sinks is None:
        return scores.softmax(-1).to(q.dtype) @ values
    column = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1].to(q.dtype) @ values
