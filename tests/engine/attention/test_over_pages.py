"""Forwards of the engine's own steps (several devices, likelihoods, refused graphs) attend in pages as they
lie: no page is gathered, and key heads are not repeated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from proxytune.config import ModelSpec, Sampling, System, parse_alpha
from proxytune.engine.attention import attention
from proxytune.engine.attention.over_pages import paged_groups
from proxytune.engine.attention.packed import Group
from proxytune.engine.kernels import paged_attention as paged
from proxytune.engine.kv.pages import PagedCache
from proxytune.engine.likelihood import likelihoods
from proxytune.engine.speculative.drafter import Speculation
from tests.engine.test_likelihood import expected, items_for
from tests.support import tiny
from tests.support.decoders import check, decoder, ragged, use_pages
from tests.support.tiny import spec


class Calls:
    """What attends."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.kernel: list[tuple[int, int]] = []
        """Rows and queries per row of every call."""
        self.read = 0
        call, read = paged.paged_attention, PagedCache.read

        def counted(query: Tensor, *rest: Any) -> Tensor:
            self.kernel.append((query.shape[0], query.shape[2]))
            return call(query, *rest)

        def gathered(cache: PagedCache, *where: int) -> tuple[Tensor, Tensor]:
            self.read += 1
            return read(cache, *where)

        patch.setattr("proxytune.engine.attention.over_pages.paged_attention", counted)
        patch.setattr(PagedCache, "read", gathered)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Pages on the CPU, which attend as on a GPU, written out in float64."""
    use_pages(monkeypatch)
    monkeypatch.setattr(attention, "supported", lambda *_: True)
    return Calls(monkeypatch)


def test_rows_are_put_together_by_powers_of_two() -> None:
    segments = [(0, 0, 1, 9), (1, 1, 3, 3), (2, 4, 1, 1), (4, 5, 4, 20), (5, 9, 300, 300)]
    found = {group.query: [row for row, *_ in group.parts] for group in paged_groups(segments, 256)}
    assert found == {1: [0, 2], 4: [1, 4]}


@pytest.mark.parametrize("k", [0, 3])
def test_decoding_with_a_trace(trio: System, calls: Calls, k: int) -> None:
    """Prefill, drafts and verification of ragged rows, in one forward or several."""
    d = decoder(trio, speculation=Speculation(k=k))
    check(d, ragged(7, 1), Sampling(max_new_tokens=9), trace="tokens")
    assert calls.read == 0 and {1, 4} <= {query for _, query in calls.kernel} | {4 * (k == 0)}
    assert max(rows for rows, _ in calls.kernel) > 2


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt-oss", "deepseek-v3"])
def test_windows_caps_sinks_and_sizes(family: str, calls: Calls, tmp_path: Any) -> None:
    d = decoder(System(base=spec(tiny.save(tmp_path, tiny.build(family, 1)))), "base")
    check(d, ragged(4, 2), Sampling(max_new_tokens=9))
    assert calls.kernel and calls.read == 0


def test_likelihoods(trio: System, calls: Calls) -> None:
    alphas = [parse_alpha(1), parse_alpha(0.5)]
    d = decoder(trio)
    items = items_for(d)
    for item, found in zip(items, likelihoods(d.ensemble, items, alphas), strict=True):
        for at, alpha in enumerate(("1", "0.5")):
            values, greedy = expected(d, item, alpha)
            assert found.logprobs[at].tolist() == pytest.approx(values, abs=1e-9)
            assert bool(found.greedy[at]) == greedy
    assert calls.kernel and calls.read == 0


def test_long_prompts_are_left_to_torch(trio: System, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxytune.engine.attention.packed.MOST_NEW", 8)
    check(decoder(trio), ragged(5, 4), Sampling(max_new_tokens=5))
    assert calls.kernel and calls.read > 0 and max(query for _, query in calls.kernel) <= 8


def test_by_the_kernel(trio: System, kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel itself, in float32, says what float64 does."""
    use_pages(monkeypatch)
    calls = Calls(monkeypatch)
    base = ModelSpec(model=trio.base.model, dtype="float32")
    check(decoder(System(base=base), "base"), ragged(3, 5, longest=6), Sampling(max_new_tokens=3))
    assert calls.kernel and calls.read == 0


def test_a_window_counts_the_token_itself() -> None:
    mask = Group(1, [0], [0], [5]).mask(2, torch.zeros(1))
    assert mask is not None and mask.isfinite().flatten().tolist() == [False, False, False, True, True]
