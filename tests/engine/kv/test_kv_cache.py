"""Both KV layouts against a plain model: a row is a list of numbers, and these must be read back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from proxytune.engine.kv.cache import CacheSpec, KVCache, LayerShape, Placement, round_up, zeros
from proxytune.engine.kv.pages import PAGE, PagedCache
from proxytune.engine.kv.slots import SLOT_GRANULE, SlotCache

CPU = torch.device("cpu")
LAYERS = (LayerShape(2, 3, 5), LayerShape(1, 4, 2))  # key and value sizes, and layers, differ
Layout = type[SlotCache] | type[PagedCache]
LAYOUTS: list[Layout] = [SlotCache, PagedCache]


def make(layout: Layout, tokens: int, dtype: torch.dtype = torch.float64) -> Any:
    return layout(CacheSpec(LAYERS, tokens, dtype, (CPU,) * len(LAYERS)))


def free(cache: PagedCache) -> list[int]:
    """The pages that no row has."""
    return cache.free_pages


def content(layer: int, part: int, numbers: Sequence[int]) -> torch.Tensor:
    """What token numbers store, [H, T, D]: every head and element differs, in keys (0) and in values (1)."""
    shape = LAYERS[layer]
    size = (shape.key, shape.value)[part]
    element = torch.arange(shape.heads * size, dtype=torch.float64).view(shape.heads, 1, size)
    return torch.tensor(numbers, dtype=torch.float64)[None, :, None] * 100 + element + 50 * part + 25 * layer


def put(cache: KVCache, rows: Sequence[int], numbers: Sequence[Sequence[int]]) -> None:
    """One packed forward: new tokens for some rows, written to every layer."""
    starts = [cache.lengths[row] for row in rows]
    at = Placement.of(rows, starts, [len(n) for n in numbers], CPU)
    flat = [number for part in numbers for number in part]
    for layer in range(len(LAYERS)):
        cache.write(layer, content(layer, 0, flat), content(layer, 1, flat), at)
    for row, part in zip(rows, numbers, strict=True):
        cache.commit(row, len(part))


def check(cache: KVCache, model: Sequence[Sequence[int]]) -> None:
    """Every row holds its numbers, read one by one and all rows together."""
    assert cache.lengths == [len(row) for row in model]
    if not model:
        return
    longest = max(map(len, model))
    for layer in range(len(LAYERS)):
        together = cache.read(layer, 0, len(model), longest)
        for row, numbers in enumerate(model):
            alone = cache.read(layer, row, 1, len(numbers))
            for part in (0, 1):
                want = content(layer, part, numbers)
                assert torch.equal(together[part][row, :, : len(numbers)].double(), want)
                assert torch.equal(alone[part][0].double(), want)


class Machine(RuleBasedStateMachine):
    """Random operations on a cache and on the plain model, within what the scheduler may do."""

    layout: Layout

    @initialize(tokens=st.integers(2, 14))
    def start(self, tokens: int) -> None:
        self.cache = make(self.layout, tokens * PAGE)
        self.model: list[list[int]] = []
        self.shared: list[int] = []
        """Per row how many of its first tokens other rows may share: it is never rewound into them."""
        self.fresh = count(1)

    def row(self, data: st.DataObject) -> int:
        return int(data.draw(st.integers(0, len(self.model) - 1), label="row"))

    @rule()
    def admit(self) -> None:
        assume(self.cache.fits([*map(len, self.model), 1]))
        self.cache.admit()
        self.model.append([])
        self.shared.append(0)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        source = self.row(data)
        length = data.draw(st.integers(0, len(self.model[source])), label="length")
        assume(self.cache.fits([*map(len, self.model), length + 1]))
        self.cache.admit(source, length)
        self.model.append(self.model[source][:length])
        self.shared[source] = max(self.shared[source], length)
        self.shared.append(length)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def feed(self, data: st.DataObject) -> None:
        """A step: several rows get new tokens, in one forward."""
        rows = sorted(data.draw(st.sets(st.integers(0, len(self.model) - 1), min_size=1), label="rows"))
        parts = [[next(self.fresh) for _ in range(data.draw(st.integers(1, 40)))] for _ in rows]
        lengths = list(map(len, self.model))
        for row, part in zip(rows, parts, strict=True):
            lengths[row] += len(part)
        assume(self.cache.fits(lengths))
        self.cache.reserve(lengths)
        put(self.cache, rows, parts)
        for row, part in zip(rows, parts, strict=True):
            self.model[row] += part

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        row = self.row(data)
        length = data.draw(st.integers(self.shared[row], len(self.model[row])), label="length")
        self.cache.rewind(row, length)
        del self.model[row][length:]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def swap(self, data: st.DataObject) -> None:
        one, other = self.row(data), self.row(data)
        self.cache.swap(one, other)
        for rows in (self.model, self.shared):
            rows[one], rows[other] = rows[other], rows[one]  # type: ignore[index]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        row = self.row(data)
        self.cache.drop(row)
        for rows in (self.model, self.shared):
            rows[row] = rows[-1]  # type: ignore[index]
            rows.pop()

    @invariant()
    def same(self) -> None:
        if not hasattr(self, "model"):
            return
        check(self.cache, self.model)
        tokens = self.cache.spec.tokens
        if isinstance(self.cache, PagedCache):
            owned = [page for table in self.cache.tables for page in table]
            assert all(self.cache.owners[page] == owned.count(page) for page in range(self.cache.pages))
            assert sorted([*free(self.cache), *set(owned)]) == list(range(self.cache.pages))
            used = self.cache.pages - len(free(self.cache))
            assert used * PAGE <= self.cache.peak_bytes // self.cache.spec.bytes_per_token <= tokens
        else:
            assert self.cache.slots * self.cache.slot_length <= tokens
            used = sum(map(len, self.model))
            assert used <= self.cache.peak_bytes // self.cache.spec.bytes_per_token <= tokens

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        while self.model:
            self.cache.drop(0)
            self.model.pop()
        assert self.cache.lengths == []
        if isinstance(self.cache, PagedCache):
            assert set(self.cache.owners) <= {0} and len(free(self.cache)) == self.cache.pages


class SlotMachine(Machine):
    layout = SlotCache


class PagedMachine(Machine):
    layout = PagedCache


_SETTINGS = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestSlots = SlotMachine.TestCase
TestSlots.settings = _SETTINGS
TestPages = PagedMachine.TestCase
TestPages.settings = _SETTINGS


def test_slots_grow_with_their_rows_and_keep_their_content() -> None:
    cache, model = make(SlotCache, 4096), [[] for _ in range(3)]  # type: list[list[int]]
    fresh = count(1)
    for _ in model:
        cache.admit()
    shapes = []
    for step in (1, 60, 10, 100, 400, 700):
        part = [[next(fresh) for _ in range(step + row)] for row in range(3)]
        cache.reserve([len(old) + len(new) for old, new in zip(model, part, strict=True)])
        put(cache, range(3), part)
        model = [old + new for old, new in zip(model, part, strict=True)]
        check(cache, model)
        shapes.append((cache.slots, cache.slot_length))
    assert shapes[0] == (4096 // SLOT_GRANULE, SLOT_GRANULE)
    lengths = [length for _, length in shapes]
    assert lengths == sorted(lengths) and len(set(lengths)) >= 4
    # a fourth row does not fit into slots that long; with shorter rows the pool is laid out for more
    assert not cache.fits([1300] * 4)
    cache.rewind(0, 5), cache.rewind(1, 7), cache.rewind(2, 0)
    model = [row[:length] for row, length in zip(model, (5, 7, 0), strict=True)]
    for _ in range(20):
        cache.admit(1, 7)
        model.append(model[1])
    check(cache, model)
    assert cache.slots >= 23 and cache.slots * cache.slot_length <= 4096


def test_one_row_can_fill_the_whole_pool() -> None:
    for layout in LAYOUTS:
        cache = make(layout, 5 * PAGE)
        assert cache.capacity == 5 * PAGE
        assert cache.fits([cache.capacity]) and not cache.fits([cache.capacity + 1])
        cache.admit()
        cache.reserve([cache.capacity])
        put(cache, [0], [list(range(cache.capacity))])
        check(cache, [list(range(cache.capacity))])
        assert cache.peak_bytes == cache.capacity * cache.spec.bytes_per_token


def test_forks_share_full_pages_only() -> None:
    cache, prompt = make(PagedCache, 12 * PAGE), list(range(2 * PAGE + 3))
    cache.admit()
    cache.reserve([len(prompt)])
    put(cache, [0], [prompt])
    for _ in range(3):
        cache.admit(0, len(prompt))
    assert cache.pages - len(free(cache)) == 2 + 4  # two full pages for all, the last page per row
    assert [table[:2] for table in cache.tables] == [cache.tables[0][:2]] * 4
    assert len({table[2] for table in cache.tables}) == 4
    lengths = [len(prompt) + 1] * 4
    cache.reserve(lengths)
    put(cache, range(4), [[1000 + row] for row in range(4)])
    model = [[*prompt, 1000 + row] for row in range(4)]
    check(cache, model)
    for left in (3, 2, 1):  # the donor goes first: its pages live on with the others
        cache.drop(0)
        model[0] = model[-1]
        model.pop()
        check(cache, model)
        assert cache.pages - len(free(cache)) == 2 + left
    cache.drop(0)
    assert len(free(cache)) == cache.pages


def test_a_fork_takes_the_pages_that_drafts_have_left() -> None:
    """Rewound rows keep their pages until somebody needs them."""
    cache = make(PagedCache, 4 * PAGE)
    cache.admit()
    cache.reserve([4 * PAGE])
    put(cache, [0], [list(range(PAGE + 3))])
    assert not free(cache) and cache.fits([PAGE + 3, PAGE + 4])
    cache.admit(0, PAGE + 2)
    check(cache, [list(range(PAGE + 3)), list(range(PAGE + 2))])
    assert len(free(cache)) == 1


def test_a_page_that_is_shared_cannot_be_written_again() -> None:
    """Rewinding into a shared page would let one row overwrite another's prompt: it must not go unnoticed."""
    cache = make(PagedCache, 6 * PAGE)
    cache.admit()
    cache.reserve([PAGE])
    put(cache, [0], [list(range(PAGE))])
    cache.admit(0, PAGE)
    with pytest.raises(AssertionError):
        cache.rewind(1, PAGE - 1)


def test_peak_is_the_most_that_was_ever_used() -> None:
    for layout in LAYOUTS:
        cache = make(layout, 64 * PAGE)
        assert cache.peak_bytes == 0
        cache.admit()
        cache.reserve([40])
        put(cache, [0], [list(range(40))])
        cache.admit(0, 40)
        two = cache.peak_bytes
        assert two > 40 * cache.spec.bytes_per_token
        cache.drop(1)
        cache.rewind(0, 1)
        assert cache.peak_bytes == two
        per_token = cache.spec.bytes_per_token
        assert per_token == 8 * (2 * (3 + 5) + 1 * (4 + 2))
        # slots: two rows of 40; pages: two full ones shared, and one each
        assert two == per_token * (80 if layout is SlotCache else 4 * PAGE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_are_kept_and_inputs_cast(layout: Layout, dtype: torch.dtype) -> None:
    cache = make(layout, 8 * PAGE, dtype)
    cache.admit()
    cache.reserve([3])
    put(cache, [0], [[1, 2, 3]])
    assert cache.spec.bytes_per_token == dtype.itemsize * 22
    for layer in range(len(LAYERS)):
        for part, got in enumerate(cache.read(layer, 0, 1, 3)):
            assert got.dtype == dtype
            assert torch.equal(got[0], content(layer, part, [1, 2, 3]).to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_never_written_is_finite(layout: Layout) -> None:
    """Masked attention multiplies stale keys by 0, so there must be no nan or infinity among them."""
    cache = make(layout, 8 * PAGE)
    cache.admit()
    cache.admit()
    cache.reserve([5, 30])
    put(cache, [0, 1], [list(range(5)), list(range(30))])
    keys, values = cache.read(0, 0, 2, 30)
    assert bool(keys.isfinite().all()) and bool(values.isfinite().all())


def test_placement_counts_tokens_of_ragged_parts() -> None:
    at = Placement.of([2, 0, 5], [7, 0, 3], [2, 1, 3], CPU)
    assert at.rows.tolist() == [2, 2, 0, 5, 5, 5]
    assert at.positions.tolist() == [7, 8, 0, 3, 4, 5]


def test_helpers() -> None:
    assert [round_up(n, 16) for n in (0, 1, 16, 17)] == [0, 16, 16, 32]
    for dtype in (torch.bfloat16, torch.float64):
        assert zeros(10, dtype, CPU).dtype == dtype and zeros(10, dtype, CPU).tolist() == [0.0] * 10
