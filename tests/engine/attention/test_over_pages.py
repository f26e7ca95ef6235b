"""Forwards of the engine's own steps (several devices, likelihoods, refused graphs) attend in pages as they
lie: no page is gathered, and key heads are not repeated."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from proxytune.config import ModelSpec, Sampling, System, parse_alpha
from proxytune.engine.attention import attention, over_pages, varlen
from proxytune.engine.attention.over_pages import attend_pages
from proxytune.engine.attention.packed import Group
from proxytune.engine.attention.ragged import Ragged, tiles, written_out
from proxytune.engine.kernels.scores import ScoreRule
from proxytune.engine.kv.cache import CacheSpec, LayerShape
from proxytune.engine.kv.pages import PAGE, PagedCache
from proxytune.engine.likelihood import likelihoods
from proxytune.engine.speculative.drafter import Speculation
from tests.engine.test_likelihood import expected, items_for
from tests.support import tiny
from tests.support.decoders import check, decoder, ragged, use_pages
from tests.support.tiny import spec

CPU = torch.device("cpu")


class Calls:
    """What attends."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.rows: list[tuple[int, int]] = []
        """Rows of every call, and the most new tokens of one."""
        self.read = 0
        call, read = attend_pages, PagedCache.read

        def counted(rows: Ragged, *rest: Any) -> Tensor:
            self.rows.append((len(rows.parts), rows.longest))
            return call(rows, *rest)

        def gathered(cache: PagedCache, *where: int) -> tuple[Tensor, Tensor]:
            self.read += 1
            return read(cache, *where)

        patch.setattr(attention, "attend_pages", counted)
        patch.setattr(PagedCache, "read", gathered)


def by_the_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    most_new: int,
    longest: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """`varlen_attn` as torch documents it: causal from the lower right, a window to the left."""
    assert enable_gqa == (query.shape[1] != key.shape[1]) and window_size[1] == 0
    assert query_ends.dtype == key_ends.dtype == torch.int32
    out, (left, _) = torch.empty_like(query), window_size
    ends = zip(*(pairwise(end.tolist()) for end in (query_ends, key_ends)), strict=True)
    for (q_from, q_to), (k_from, k_to) in ends:
        new, all_of = q_to - q_from, k_to - k_from
        assert 0 < new <= most_new and new <= all_of <= longest
        seen = torch.ones(new, all_of, dtype=torch.bool).tril(all_of - new)
        if left >= 0:
            seen &= ~torch.ones(new, all_of, dtype=torch.bool).tril(all_of - new - left - 1)
        q, k, v = (t.transpose(0, 1) for t in (query[q_from:q_to], key[k_from:k_to], value[k_from:k_to]))
        found = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
        out[q_from:q_to] = found.transpose(0, 1)
    return out


@pytest.fixture(params=["pages", "varlen"])
def calls(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Calls:
    """Pages on the CPU, which attend as on a GPU, in float64: written out, or by what torch documents."""
    use_pages(monkeypatch)
    monkeypatch.setattr(attention, "supported", lambda *_: True)
    monkeypatch.setattr(over_pages, "_right", lambda *_: False)
    if request.param == "varlen":
        use_varlen(monkeypatch)
    return Calls(monkeypatch)


def use_varlen(patch: pytest.MonkeyPatch) -> None:
    """What torch documents in the place of its kernel, in float64 too."""
    patch.setattr(varlen, "DTYPES", (torch.float64,))
    patch.setattr(varlen, "there", lambda _: True)
    patch.setattr(varlen, "function", lambda: by_the_definition)
    patch.setattr(varlen, "grouped", lambda: True)
    patch.setattr(varlen, "APART", {torch.float64: 1e-9})
    patch.setattr("proxytune.engine.kernels.trial._found", {})


def test_rows_are_cut_into_tiles() -> None:
    parts = [(3, 0, 1, 9), (1, 1, 5, 5), (2, 6, 4, 30)]
    assert tiles(parts, 4) == [(0, 0, 1, 9), (1, 1, 4, 4), (1, 5, 1, 5), (2, 6, 4, 30)]
    assert tiles(parts, 8) == [(0, 0, 1, 9), (1, 1, 5, 5), (2, 6, 4, 30)]


def some_rows(counts: Sequence[int], before: Sequence[int], kv_heads: int, size: int, value: int) -> Ragged:
    """Rows with so many new tokens after so many, in a cache full of numbers, with their pages mixed up."""
    cache = PagedCache(CacheSpec((LayerShape(kv_heads, size, value),), 40 * PAGE, torch.float32, (CPU,)))
    cache.free_pages = cache.free_pages[1::2] + cache.free_pages[::2]
    for pool in cache.pools(0):
        pool.copy_(torch.randn(pool.shape, generator=torch.Generator().manual_seed(1)))
    ends = [count + there for count, there in zip(counts, before, strict=True)]
    for _ in counts:
        cache.admit()
    cache.reserve(ends)
    starts = accumulate(counts, initial=0)
    return Ragged(cache, list(zip(range(len(counts)), starts, counts, ends, strict=False)))


RAGGED: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, ScoreRule]] = {
    "one prompt": ((20,), (0,), 2, ScoreRule()),
    "prompts and rows that go on": ((9, 1, 17, 2), (0, 20, 5, 16), 2, ScoreRule(0.3)),
    "a window": ((21, 1, 6), (0, 30, 15), 2, ScoreRule(window=12)),
    "everything": ((5, 9), (20, 3), 4, ScoreRule(None, 11, 4.0, torch.linspace(-1, 1, 4))),
    "single tokens": ((1, 1, 1), (0, 15, 64), 1, ScoreRule()),
}


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", RAGGED)
def test_the_kernel_is_attention(name: str, splits: int, kernels: torch.device) -> None:
    """One call for all rows, against each written out."""
    from proxytune.engine.kernels.triton_attention import launch_ragged, tile_tokens

    counts, before, kv_heads, rule = RAGGED[name]
    rows = some_rows(counts, before, kv_heads, 16, 24)
    query = torch.randn(sum(counts), 4, 16, generator=torch.Generator().manual_seed(2))
    pools = tuple(pool.to(kernels) for pool in rows.cache.pools(0))
    if rule.sinks is not None:
        rule = rule._replace(sinks=rule.sinks.to(kernels))
    want = written_out(query.to(kernels), pools, rows.table(kernels), rows.parts, rule)  # type: ignore[arg-type]
    most = tile_tokens(rows.longest, 4 // kv_heads, torch.float32)
    there = rows.table(kernels), rows.tiles(most, kernels)
    got = launch_ragged(query.to(kernels), *pools, *there, rule, most, splits)
    torch.testing.assert_close(got, want, atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", ["one prompt", "prompts and rows that go on", "a window"])
def test_torchs_attention_of_ragged_rows(name: str, grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is handed what it documents, if it was found to be right for such heads."""
    use_varlen(monkeypatch)
    counts, before, _, rule = RAGGED[name]
    rows = some_rows(counts, before, 2, 16, 16)
    query = torch.randn(sum(counts), 4 if grouped else 2, 16, dtype=torch.float64)
    pools = tuple(pool.double() for pool in rows.cache.pools(0))
    assert varlen.takes(query, pools, rule)  # type: ignore[arg-type]
    assert not varlen.takes(query, pools, rule._replace(softcap=2.0))  # type: ignore[arg-type]
    want = written_out(query, pools, rows.table(CPU), rows.parts, rule)  # type: ignore[arg-type]
    got = varlen.attend(query, pools, rows.copied(CPU), rule)  # type: ignore[arg-type]
    torch.testing.assert_close(got, want)
    monkeypatch.setattr(varlen, "grouped", lambda: False)
    assert varlen.takes(query, pools, rule) == (not grouped)  # type: ignore[arg-type]


def test_torchs_attention_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that aligns causality to the upper left would be wrong for rows that go on."""
    use_varlen(monkeypatch)
    monkeypatch.setattr(varlen, "function", lambda: lambda q, *rest, **named: torch.zeros_like(q))
    pools = tuple(pool.double() for pool in some_rows((3,), (0,), 2, 16, 16).cache.pools(0))
    query = torch.randn(3, 2, 16, dtype=torch.float64)
    with pytest.warns(UserWarning, match="attention of ragged rows in torch is off by"):
        assert not varlen.takes(query, pools, ScoreRule())  # type: ignore[arg-type]


def test_copies_are_made_where_they_are_little() -> None:
    assert varlen.pays([(0, 0, 512, 4096)]) and varlen.pays([(0, 0, 3, 3), (1, 3, 100, 900)])
    assert not varlen.pays([(0, 0, 1, 100)]) and not varlen.pays([(0, 0, 5, 500), (1, 5, 5, 500)])


def test_this_torch_has_what_is_looked_for() -> None:
    found = varlen.function()
    assert found is not None and found.__name__ == "varlen_attn" and varlen.grouped()


@pytest.mark.parametrize("k", [0, 3])
def test_decoding_with_a_trace(trio: System, calls: Calls, k: int) -> None:
    """Prefill, drafts and verification of ragged rows, each in one call per layer."""
    d = decoder(trio, speculation=Speculation(k=k))
    check(d, ragged(5, 1), Sampling(max_new_tokens=6), trace="tokens")
    assert calls.read == 0 and calls.rows
    assert max(rows for rows, _ in calls.rows) > 2 and max(most for _, most in calls.rows) > 4


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt-oss", "deepseek-v3"])
def test_windows_caps_sinks_and_sizes(family: str, calls: Calls, tmp_path: Any) -> None:
    d = decoder(System(base=spec(tiny.save(tmp_path, tiny.build(family, 1)))), "base")
    check(d, ragged(4, 2), Sampling(max_new_tokens=9))
    assert calls.rows and calls.read == 0


def test_likelihoods(trio: System, calls: Calls) -> None:
    alphas = [parse_alpha(1), parse_alpha(0.5)]
    d = decoder(trio)
    items = items_for(d)
    for item, found in zip(items, likelihoods(d.ensemble, items, alphas), strict=True):
        for at, alpha in enumerate(("1", "0.5")):
            values, greedy = expected(d, item, alpha)
            assert found.logprobs[at].tolist() == pytest.approx(values, abs=1e-9)
            assert bool(found.greedy[at]) == greedy
    assert calls.rows and calls.read == 0


@pytest.mark.slow
def test_by_the_kernel(trio: System, kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel itself, in float32, says what float64 does."""
    use_pages(monkeypatch)
    calls = Calls(monkeypatch)
    base = ModelSpec(model=trio.base.model, dtype="float32")
    check(decoder(System(base=base), "base"), ragged(3, 5, longest=6), Sampling(max_new_tokens=3))
    assert calls.rows and calls.read == 0


def test_a_window_counts_the_token_itself() -> None:
    mask = Group(1, [0], [0], [5]).mask(2, torch.zeros(1))
    assert mask is not None and mask.isfinite().flatten().tolist() == [False, False, False, True, True]
