"""The CPU's attention kernel against attention written out, for every shape class that models have."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proxytune.engine.kernels import cpu_attention
from proxytune.engine.kernels.cpu_attention import attend_slots, takes, why_not
from proxytune.engine.kernels.scores import ScoreRule
from tests.support.require import require_or_skip


@pytest.fixture(autouse=True)
def compiled() -> None:
    """These tests are of the kernel."""
    if why_not() is not None:
        require_or_skip("compiler", f"{why_not()}")


ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}


class Shape(NamedTuple):
    """What a model asks for."""

    heads: int
    kv_heads: int
    key: int
    value: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


class Case:
    """New tokens of some rows, and slots that hold what came before; everything else in them is NaN."""

    def __init__(
        self, shape: Shape, parts: list[tuple[int, int, int]], dtype: torch.dtype, spare: int = 3
    ) -> None:
        """`parts`: row, tokens before, new tokens."""
        draw = torch.Generator().manual_seed(len(parts))
        total = sum(new for _, _, new in parts)
        length = max(old + new for _, old, new in parts) + spare
        slots = max(row for row, _, _ in parts) + 1

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=draw).to(dtype)

        self.shape, self.parts = shape, parts
        self.query = normal(total, shape.heads, shape.key).transpose(0, 1)
        self.key = normal(total, shape.kv_heads, shape.key).transpose(0, 1)
        self.value = normal(shape.kv_heads, total, shape.value)
        self.keys = torch.full((slots, shape.kv_heads, length, shape.key), torch.nan, dtype=dtype)
        self.values = torch.full((slots, shape.kv_heads, length, shape.value), torch.nan, dtype=dtype)
        for row, old, _ in parts:
            self.keys[row, :, :old] = normal(shape.kv_heads, old, shape.key)
            self.values[row, :, :old] = normal(shape.kv_heads, old, shape.value)
        self.sinks = normal(shape.heads) if shape.sinks else None
        self.out = torch.zeros(total, shape.heads, shape.value, dtype=dtype)

    def run(self, most: int = 1000) -> None:
        """The kernel."""
        starts = [sum(new for _, _, new in self.parts[:i]) for i in range(len(self.parts))]
        segments = [
            (row, start, new, old + new) for (row, old, new), start in zip(self.parts, starts, strict=True)
        ]
        attend_slots(
            self.query,
            self.key,
            self.value,
            (self.keys, self.values),
            torch.tensor(segments).T.contiguous(),
            self.out,
            ScoreRule(None, self.shape.window, self.shape.softcap, self.sinks),
            most,
        )

    def check(self) -> None:
        """Every token's result, one by one, and what the slots hold afterwards."""
        start, tolerance = 0, ROUNDING[self.query.dtype]
        for row, old, new in self.parts:
            mine = slice(start, start + new)
            assert torch.equal(self.keys[row, :, old : old + new], self.key[:, mine])
            assert torch.equal(self.values[row, :, old : old + new], self.value[:, mine])
            assert self.keys[row, :, old + new :].isnan().all()
            for token in range(new):
                at = old + token
                first = 0 if self.shape.window is None else max(0, at + 1 - self.shape.window)
                want = self.one(start + token, row, first, at + 1)
                assert (self.out[start + token].double() - want).abs().max() < tolerance
            start += new

    def one(self, token: int, row: int, first: int, end: int) -> Tensor:
        """One token's attention over its row's keys first..end-1, in float64: [H, Dv]."""
        group = self.shape.heads // self.shape.kv_heads
        keys = self.keys[row, :, first:end].double().repeat_interleave(group, 0)
        values = self.values[row, :, first:end].double().repeat_interleave(group, 0)
        scores = torch.einsum("hd,hld->hl", self.query[:, token].double(), keys) * self.shape.key**-0.5
        if self.shape.softcap is not None:
            scores = torch.tanh(scores / self.shape.softcap) * self.shape.softcap
        if self.sinks is not None:
            scores = torch.cat([scores, self.sinks.double()[:, None]], -1)
        weights = scores.softmax(-1)[:, : end - first]
        return torch.einsum("hl,hld->hd", weights, values)


SHAPES = [
    Shape(4, 4, 64, 64),
    Shape(8, 2, 128, 128),
    Shape(4, 4, 16, 16),
    Shape(6, 3, 5, 3),
    Shape(2, 1, 72, 40),
    Shape(3, 3, 80, 64, window=7),
    Shape(4, 2, 64, 64, window=40, softcap=5.0),
    Shape(4, 2, 96, 96, sinks=True),
    Shape(4, 1, 24, 24, window=3, sinks=True),
]
PARTS = st.lists(st.tuples(st.integers(0, 150), st.integers(1, 9)), min_size=1, max_size=9)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=12, deadline=None)
@given(lengths=PARTS, gaps=st.integers(0, 2))
def test_ragged_rows(shape: Shape, dtype: torch.dtype, lengths: list[tuple[int, int]], gaps: int) -> None:
    case = Case(shape, [(index * (gaps + 1), *part) for index, part in enumerate(lengths)], dtype)
    case.run()
    case.check()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_rows_on_several_threads(threads: int) -> None:
    before = torch.get_num_threads()
    case = Case(Shape(8, 4, 64, 64), [(row, 3 * row % 70, 1 + row % 3) for row in range(90)], torch.float32)
    try:
        torch.set_num_threads(threads)
        case.run()
    finally:
        torch.set_num_threads(before)
    case.check()


def test_long_segments_are_written_and_left_alone() -> None:
    case = Case(Shape(2, 2, 8, 8), [(0, 4, 6), (1, 9, 2)], torch.float64)
    case.run(most=5)
    assert torch.equal(case.keys[0, :, 4:10], case.key[:, :6]) and (case.out[:6] == 0).all()
    assert (case.out[6:] != 0).all()


def test_large_scores_neither_overflow_nor_vanish() -> None:
    case = Case(Shape(1, 1, 16, 16), [(0, 100, 1)], torch.float32)
    case.query *= 1000
    case.run()
    assert case.out.isfinite().all()
    case.check()


@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_what_is_not_a_number_shows(where: str) -> None:
    """The engine stops at logits that are not numbers; the kernel must not hide them."""
    case = Case(Shape(2, 2, 16, 16), [(0, 40, 1), (1, 3, 1)], torch.float32)
    getattr(case, where)[:, 0] = torch.nan
    case.run()
    assert case.out[0].isnan().all() and case.out[1].isfinite().all()


def test_strided_numbers_are_laid_side_by_side() -> None:
    case = Case(Shape(2, 2, 16, 16), [(0, 5, 3)], torch.float32)
    case.query = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    assert case.query.stride(2) != 1
    case.run()
    case.check()


def test_what_it_takes() -> None:
    half = torch.zeros(1, dtype=torch.float16)
    assert takes(torch.zeros(1), torch.float32) and not takes(torch.zeros(1), torch.bfloat16)
    assert not takes(half, torch.float16) and not takes(torch.zeros(1, device="meta"), torch.float32)
    assert set(cpu_attention.DTYPES) == set(ROUNDING)
