"""The paged attention of CUDA against attention written out in float64, for every class of shapes.

Where there is no GPU, Triton's interpreter runs the kernel on CPU tensors; with one, the same tests compile
and run it there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from proxytune.engine.kernels import paged_attention as paged
from proxytune.engine.kernels.scores import ScoreRule
from proxytune.engine.kv.cache import CacheSpec, LayerShape, Placement
from proxytune.engine.kv.pages import PAGE, PagedCache

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
"""For values of about 1."""


@dataclass(frozen=True)
class Shape:
    """One call: new tokens, query heads, KV heads, sizes of keys and values, and what modifies scores."""

    new: int = 1
    heads: int = 2
    kv_heads: int = 2
    key: int = 16
    value: int = 16
    lengths: tuple[int, ...] = (40, 17, 33)
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    splits: int | None = None
    dtype: torch.dtype = torch.float32
    index: torch.dtype = torch.int64
    spare_pages: int = 1


def inputs(s: Shape, device: torch.device, seed: int = 0) -> dict[str, Any]:
    """Arguments of paged_attention. Rows share their first page where it is full of old tokens; every place
    that no row should read holds 30,000 (in keys and values alike)."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw)

    width = max(1, -(-max(s.lengths) // PAGE)) + s.spare_pages
    pages = torch.randperm(2 + len(s.lengths) * width, generator=draw).tolist()
    unused, shared = pages.pop(), pages.pop()
    table = torch.full((len(s.lengths), width), unused)
    keys = torch.full((len(pages) + 2, PAGE, s.kv_heads, s.key), 3e4)
    values = torch.full((len(pages) + 2, PAGE, s.kv_heads, s.value), 3e4)
    for row, length in enumerate(s.lengths):
        for first in range(0, length, PAGE):
            page = shared if first == 0 and length - s.new >= PAGE else pages.pop()
            table[row, first // PAGE] = page
            here = min(PAGE, length - first)
            if page != shared or keys[page, 0, 0, 0] == 3e4:
                keys[page, :here] = normal(here, s.kv_heads, s.key)
                values[page, :here] = normal(here, s.kv_heads, s.value)
    return {
        "query": normal(len(s.lengths), s.heads, s.new, s.key).to(device, s.dtype),
        "keys": keys.to(device, s.dtype),
        "values": values.to(device, s.dtype),
        "table": table.to(device, s.index),
        "lengths": torch.tensor(s.lengths, device=device, dtype=s.index),
        "window": s.window,
        "softcap": s.softcap,
        "sinks": normal(s.heads).to(device, s.dtype) if s.sinks else None,
    }


def attended(arguments: dict[str, Any], scaling: float | None = None, splits: int | None = None) -> Tensor:
    """The paged attention of these arguments."""
    tensors, rule = split(arguments, scaling)
    return paged.paged_attention(*tensors, rule, splits)


def split(arguments: dict[str, Any], scaling: float | None) -> tuple[list[Tensor], ScoreRule]:
    """The tensors, and what the scores are to be."""
    tensors = [arguments[name] for name in ("query", "keys", "values", "table", "lengths")]
    return tensors, ScoreRule(scaling, *(arguments[name] for name in ("window", "softcap", "sinks")))


def written_out(arguments: dict[str, Any], scaling: float) -> Tensor:
    """Attention by its definition, one token and head at a time, in float64 on the CPU."""
    a = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    query, keys, values = (a[name].double() for name in ("query", "keys", "values"))
    rows, heads, new, _ = query.shape
    out = torch.zeros(rows, heads, new, values.shape[-1], dtype=torch.float64)
    for row, length in enumerate(a["lengths"].tolist()):
        if length == 0:
            continue
        k, v = (pool[a["table"][row].long()].flatten(0, 1)[:length] for pool in (keys, values))  # [L, Hkv, D]
        for head in range(heads):
            kv = head * k.shape[1] // heads
            for token in range(new):
                at = length - new + token
                first = 0 if a["window"] is None else max(0, at - a["window"] + 1)
                scores = k[first : at + 1, kv] @ query[row, head, token] * scaling
                if a["softcap"] is not None:
                    scores = a["softcap"] * torch.tanh(scores / a["softcap"])
                weights = scores.exp()
                total = weights.sum() + (0 if a["sinks"] is None else a["sinks"][head].double().exp())
                out[row, head, token] = weights @ v[first : at + 1, kv] / total
    return out


def compare(s: Shape, device: torch.device, seed: int = 0) -> None:
    """The kernel and the gathered path against the definition."""
    arguments = inputs(s, device, seed)
    scaling = 0.9 * s.key**-0.5
    assert paged.supported(arguments["query"], arguments["keys"], arguments["values"])
    want = written_out(arguments, scaling)
    got = attended(arguments, scaling, s.splits)
    assert got.shape == want.shape and got.dtype == s.dtype and got.device.type == device.type
    torch.testing.assert_close(got.cpu().double(), want, atol=TOLERANCE[s.dtype], rtol=TOLERANCE[s.dtype])
    tensors, rule = split(arguments, scaling)
    plain = paged.gathered(*tensors, rule)
    assert plain.transpose(1, 2).is_contiguous() and got.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(plain.cpu().double(), want, atol=TOLERANCE[s.dtype], rtol=TOLERANCE[s.dtype])


BORDERS = (1, 15, 16, 17, 32, 33)
SHAPES = {
    "decode": Shape(lengths=BORDERS),
    "decode of one row": Shape(lengths=(100,)),
    "decode, groups of 4": Shape(heads=8, kv_heads=2),
    "decode, groups of 8": Shape(heads=8, kv_heads=1),
    "verify 2": Shape(new=2, lengths=(2, 16, 17, 18, 31)),
    "verify 5, groups of 4": Shape(new=5, heads=4, kv_heads=1, lengths=(5, 16, 20, 21, 37)),
    "verify 5, groups of 3": Shape(new=5, heads=6, kv_heads=2),
    "verify 16": Shape(new=16, lengths=(16, 31, 32, 47)),
    "verify 16, groups of 8: two tiles": Shape(new=16, heads=8, kv_heads=1, splits=1),
    "head size 64": Shape(key=64, value=64),
    "head size 80": Shape(key=80, value=80),
    "head size 96": Shape(new=5, key=96, value=96),
    "a continuation, two tiles and more": Shape(new=40, heads=4, kv_heads=2, lengths=(40, 77), splits=1),
    "a continuation with a window": Shape(new=33, lengths=(35, 60), window=20, splits=2),
    "head size 112": Shape(key=112, value=112),
    "head size 128": Shape(new=2, key=128, value=128),
    "keys 192, values 128": Shape(key=192, value=128, heads=4, kv_heads=4),
    "keys 8, values 24": Shape(key=8, value=24),
    "head size 256": Shape(key=256, value=256, heads=2, kv_heads=1),
    "window 1": Shape(new=2, window=1),
    "window inside a page": Shape(window=7, lengths=BORDERS),
    "window over pages": Shape(new=5, window=20, lengths=(5, 19, 20, 21, 24, 25, 60), heads=4, kv_heads=2),
    "window wider than rows": Shape(window=500),
    "soft cap": Shape(softcap=5.0),
    "sinks": Shape(sinks=True, heads=4, kv_heads=2),
    "window, soft cap, sinks": Shape(new=5, window=9, softcap=2.0, sinks=True, heads=8, kv_heads=2, splits=3),
    "one split": Shape(splits=1, sinks=True),
    "more splits than blocks": Shape(splits=7, lengths=(1, 16, 100)),
    "more splits than tokens, with a window": Shape(splits=64, window=3, lengths=(2, 90)),
    "padding rows": Shape(new=5, lengths=(0, 30, 0, 5), sinks=True),
    "padding rows only": Shape(lengths=(0, 0)),
    "table wider than rows": Shape(spare_pages=6, splits=4),
    "table filled to the end": Shape(spare_pages=0, lengths=(48, 32)),
    "int32 table and lengths": Shape(index=torch.int32),
    "float16": Shape(dtype=torch.float16, new=5, heads=8, kv_heads=2, key=80, value=80),
    "bfloat16": Shape(dtype=torch.bfloat16, new=5, heads=8, kv_heads=2, key=128, value=128),
    "bfloat16 with everything": Shape(
        dtype=torch.bfloat16, new=2, heads=4, kv_heads=2, window=9, softcap=4.0, sinks=True, splits=2
    ),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.every(3)
def test_is_attention(name: str, kernels: torch.device) -> None:
    compare(SHAPES[name], kernels)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_is_attention_for_any_shape(data: st.DataObject, kernels: torch.device) -> None:
    new, group = data.draw(st.integers(1, 16)), data.draw(st.integers(1, 4))
    kv_heads = data.draw(st.integers(1, 2))
    splits = data.draw(st.integers(1, 3)) if new * group <= 16 else 1  # the interpreter takes its time
    s = Shape(
        new=new,
        heads=group * kv_heads,
        kv_heads=kv_heads,
        key=data.draw(st.integers(1, 40)),
        value=data.draw(st.integers(1, 40)),
        lengths=tuple(data.draw(st.lists(st.just(0) | st.integers(new, 50), min_size=1, max_size=3))),
        window=data.draw(st.none() | st.integers(1, 80)),
        softcap=data.draw(st.none() | st.just(3.0)),
        sinks=data.draw(st.booleans()),
        splits=splits,
        dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
    )
    compare(s, kernels, seed=new)


def test_the_definition_is_sdpa() -> None:
    """The yardstick of this file against torch."""
    arguments = inputs(Shape(new=3, heads=4, kv_heads=2, dtype=torch.float64), torch.device("cpu"))
    want = written_out(arguments, 0.3)
    for row, length in enumerate(arguments["lengths"].tolist()):
        pools = (arguments["keys"], arguments["values"])
        k, v = (pool[arguments["table"][row]].flatten(0, 1)[:length].transpose(0, 1) for pool in pools)
        mask = torch.ones(3, length, dtype=torch.bool).tril(length - 3)
        got = scaled_dot_product_attention(
            arguments["query"][row], k, v, attn_mask=mask, scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(got, want[row])


def test_what_lies_beyond_a_row_is_never_read(kernels: torch.device) -> None:
    """Not even NaN gets through the kernel; numbers do not depend on it."""
    s = Shape(new=2, heads=4, lengths=(17, 30, 2))
    arguments = inputs(s, kernels)
    clean = attended(arguments)
    for name in ("keys", "values"):
        pool = arguments[name]
        pool[pool == 3e4] = math.nan
    assert torch.equal(attended(arguments), clean)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("path", ["kernel", "gathered"])
@pytest.mark.every(3)
def test_only_what_is_seen_can_be_no_number(
    path: str, number: float, splits: int, kernels: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that is no number spoils the queries that see it: not the token before it, not the next row."""
    if path == "gathered":
        monkeypatch.setattr(paged, "supported", lambda *_: False)
    arguments = inputs(Shape(new=2, heads=4, lengths=(40, 30)), kernels)
    clean = attended(arguments, splits=splits)
    for names, key in ((("values",), "value"), (("keys", "values"), "both")):
        dirty = {**arguments, **{name: arguments[name].clone() for name in names}}
        last = int(dirty["table"][0, 39 // PAGE])
        for name in names:
            dirty[name][last, 39 % PAGE] = number
        found = attended(dirty, splits=splits)
        assert not found[0, :, 1].isfinite().any(), key
        assert torch.equal(found[0, :, 0], clean[0, :, 0]) and torch.equal(found[1], clean[1]), key
    spoilt = {**arguments, "keys": arguments["keys"].clone()}
    for at in range(16, 40):  # all that one split sees, and more
        spoilt["keys"][int(spoilt["table"][0, at // PAGE]), at % PAGE] = math.nan
    assert attended(spoilt, splits=splits)[0].isnan().all()


def test_rows_do_not_depend_on_their_neighbours(kernels: torch.device) -> None:
    """With the splits given, a row alone has the same bits as in a batch."""
    arguments = inputs(Shape(new=2, heads=4, lengths=(50, 20, 0, 33)), kernels)
    together = attended(arguments, splits=2)
    for row in range(4):
        one = {k: v[row : row + 1] if k in {"query", "table", "lengths"} else v for k, v in arguments.items()}
        assert torch.equal(attended(one, splits=2)[0], together[row])


def test_strided_queries(kernels: torch.device) -> None:
    """The query as a model hands it over: [1, H, T, D] seen as rows of new tokens."""
    s = Shape(new=3, heads=4, kv_heads=2)
    arguments = inputs(s, kernels)
    flat = arguments["query"].transpose(0, 1).reshape(1, 4, 9, 16)  # [1, H, R * Q, D]
    seen = flat[0].reshape(4, 3, 3, 16).transpose(0, 1)
    assert not seen.is_contiguous()
    assert torch.equal(attended({**arguments, "query": seen}), attended(arguments))


def test_what_the_kernel_leaves_to_the_gathered_path(kernels: torch.device) -> None:
    good = inputs(Shape(), kernels)
    for s in (
        Shape(dtype=torch.float64),
        Shape(new=257, lengths=(260,), heads=1, kv_heads=1),
        Shape(key=300, value=16),
    ):
        arguments = inputs(s, kernels)
        assert not paged.supported(*(arguments[n] for n in ("query", "keys", "values")))
        got = attended(arguments, 0.1)
        want = written_out(arguments, 0.1)
        torch.testing.assert_close(got.cpu().double(), want, atol=1e-5, rtol=1e-5)
    assert paged.supported(good["query"], good["keys"], good["values"])
    assert not paged.supported(good["query"].half(), good["keys"], good["values"])
    assert not paged.supported(good["query"][:, :1], good["keys"], good["values"])
    assert not paged.supported(good["query"], good["keys"][:, :10], good["values"])
    assert not paged.supported(good["query"], good["keys"].transpose(2, 3).contiguous().mT, good["values"])


def test_without_a_gpu_the_kernel_is_not_used() -> None:
    arguments = inputs(Shape(), torch.device("cpu"))
    assert not paged.supported(arguments["query"], arguments["keys"], arguments["values"])


@pytest.mark.parametrize("new", [1, 3, 16])
def test_token_slots_are_where_the_cache_writes(new: int) -> None:
    """Slots made on the device from table and lengths equal PagedCache's own; padding goes to the spare
    slot."""
    device = torch.device("cpu")
    cache = PagedCache(CacheSpec((LayerShape(2, 4, 4),), 40 * PAGE, torch.float32, (device,)))
    lengths = [0, 15, 16, 40]
    for _ in lengths:
        cache.admit()
    cache.reserve([length + new for length in lengths])
    at = Placement.of(range(4), lengths, [new] * 4, device)
    key = torch.randn(2, 4 * new, 4)
    cache.write(0, key, key, at)
    width = max(map(len, cache.tables))
    table = torch.tensor([t + [0] * (width - len(t)) for t in cache.tables] + [[0] * width])
    after = torch.tensor([*(length + new for length in lengths), 0])
    slots = paged.token_slots(table, after, new, PAGE, spare=39 * PAGE)
    assert slots.tolist() == at.flat[device].tolist() + [39 * PAGE] * new
    pool = torch.zeros_like(cache.pools(0)[0])
    pool.flatten(0, 1).index_copy_(0, slots[: 4 * new], key.transpose(0, 1))
    assert torch.equal(pool, cache.pools(0)[0])


def test_splits_depend_on_shapes_alone(kernels: torch.device) -> None:
    from proxytune.engine.kernels.triton_attention import MOST_SPLITS, default_splits

    assert default_splits(tiles=8, tokens=4096, block=64) == 64
    assert default_splits(tiles=1, tokens=100_000, block=64) == MOST_SPLITS
    assert default_splits(tiles=2048, tokens=4096, block=64) == 1
    assert default_splits(tiles=1, tokens=16, block=64) == 1


def test_one_table_width_serves_all_lengths(kernels: torch.device) -> None:
    """What is launched is the same for rows of 1 and of 96 tokens, so a captured graph serves both."""
    wide = inputs(Shape(lengths=(96, 90), spare_pages=0), kernels)
    for lengths in ((96, 90), (1, 50), (0, 90)):
        arguments = {**wide, "lengths": torch.tensor(lengths, device=kernels)}
        got = attended(arguments, 0.25, 3)
        torch.testing.assert_close(got.cpu().double(), written_out(arguments, 0.25), atol=5e-6, rtol=5e-6)
