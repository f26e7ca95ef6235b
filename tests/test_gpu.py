"""On a GPU: pages in place of slots, and the same tokens. Skips without CUDA; the CPU runs the same pages
elsewhere (test_decode's `layout`)."""

from __future__ import annotations

import pytest
import torch
from conftest import require_or_skip
from test_decode import check, decoder, ragged

from proxytune.config import Sampling, System
from proxytune.core.cache import PagedCache


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        require_or_skip("gpu", "no CUDA device")


def test_tokens_are_the_oracles(trio: System) -> None:
    d = decoder(trio)
    assert all(isinstance(runner.rows, PagedCache) for runner in d.ensemble.runners.values())
    check(d, ragged(20), Sampling(max_new_tokens=12))
    check(d, ragged(6, 1), Sampling(max_new_tokens=8, temperature=0.9, top_k=20, top_p=0.9, n=3))


def test_memory_does_not_grow_with_requests(trio: System) -> None:
    d, settings = decoder(trio, max_batch=16), Sampling(max_new_tokens=8)
    list(d.stream(ragged(64), settings))
    before = torch.cuda.memory_allocated()
    for seed in range(8):
        list(d.stream(ragged(64, seed), settings))
    assert torch.cuda.memory_allocated() <= before
