"""What a step on the device computes with masks is, bit for bit, what the host's own path computes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proxytune.config import Sampling, parse_alpha
from proxytune.engine.cuda.attention import slots_of
from proxytune.engine.cuda.sampling import cut
from proxytune.engine.cuda.state import DeviceState, Widths, bans_of, sampling_needs
from proxytune.engine.cuda.step import StepOutput
from proxytune.engine.kv.cache import CacheSpec, LayerShape
from proxytune.engine.kv.pages import PAGE, PagedCache
from proxytune.engine.logits import warp
from proxytune.engine.request import Request, Row
from proxytune.engine.sampling import RowPosition, pick
from proxytune.engine.speculative.draft_length import Ahead, StepDraftLength

VOCABULARY = 23
CPU = torch.device("cpu")


def random_logits(seed: int, *shape: int) -> Tensor:
    """Logits in float32 of few values, so that ties are common."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(4).round() / 2


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.lists(
        st.tuples(
            st.floats(0.2, 3),
            st.integers(0, 30),
            st.sampled_from([0.01, 0.3, 0.7, 0.95, 1.0]),
            st.sampled_from([0.0, 0.0, 0.02, 0.3, 1.0]),
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_cut_is_warp(seed: int, rows: list[tuple[float, int, float, float]]) -> None:
    logits = random_logits(seed, len(rows), VOCABULARY)
    logits[0, 3] = float("-inf")
    temperature, top_k, top_p, min_p = (torch.tensor(column) for column in zip(*rows, strict=True))
    temperature, top_p, min_p = temperature.double(), top_p.double(), min_p.double()
    scaled = logits / temperature.to(logits.dtype)[:, None]
    assert torch.equal(cut(scaled, top_k, top_p, min_p), warp(logits, temperature, top_k, top_p, min_p))


tokens = st.integers(0, VOCABULARY - 1)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.7]),
    top_k=st.sampled_from([0, 1, 4]),
    top_p=st.sampled_from([0.4, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.3]),
    min_new_tokens=st.integers(0, 4),
)
requests = st.builds(
    Request,
    contexts=st.lists(tokens, min_size=1, max_size=40).map(lambda ids: {"base": tuple(ids)}),
    key=st.integers(-(2**63), 2**63 - 1),
    max_new_tokens=st.integers(1, 50),
    eos=st.frozensets(tokens, max_size=3),
    alpha=st.sampled_from(["0.3", "first:3", "warmup:2:0.7", "linear:0.1:1.7:6"]).map(parse_alpha),
    sampling=samplings,
    banned=st.frozensets(tokens, max_size=3),
    banned_first=st.frozensets(tokens, max_size=2),
    forced=st.lists(tokens, max_size=3).map(tuple),
)


def state_of(rows: Sequence[Row], room: int) -> DeviceState:
    spec = CacheSpec((LayerShape(1, 2, 2),), 40 * PAGE, torch.float32, (CPU,))
    cache = PagedCache(spec)
    for row in rows:
        cache.admit()
        cache.reserve([*cache.lengths[:-1], len(row.ids["base"])])
    widths = reduce(Widths.join, (Widths.of(row.request) for row in rows))
    state = DeviceState({"base": cache}, "base", room, widths, VOCABULARY, CPU)
    state.fill(rows)
    return state


@settings(max_examples=200, deadline=None)
@given(made=st.lists(st.tuples(requests, st.integers(0, 5)), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_a_filled_state_picks_what_the_host_picks(made: list[tuple[Request, int]], seed: int) -> None:
    """Bans, ends, forced tokens, alpha and every sampler, for rows at any position, at three positions."""
    rows = []
    for request, length in made:
        row = Row(request, len(rows), 0, {"base": [*request.contexts["base"], *range(length)]})
        row.tokens += range(length)
        rows.append(row)
    state = state_of(rows, 6)
    batch, draw = state.views(6), sampling_needs(rows)
    positions = batch.position[:, None] + torch.arange(3)
    logits = random_logits(seed, 6, 3, VOCABULARY)
    found = batch.sampler.pick(logits, positions, draw)
    alphas = batch.alpha(positions).tolist()
    ends = batch.sampler.ends(found).tolist()
    for index, row in enumerate(rows):
        positions = [RowPosition(row, len(row.tokens) + j) for j in range(3)]
        assert pick(logits[index], positions).tolist() == found[index].tolist()
        assert alphas[index] == [row.request.alpha.at(at.position) for at in positions]
        assert ends[index] == [token in row.request.eos for token in found[index].tolist()]
        assert batch.last["base"][index] == row.ids["base"][-1]
        assert batch.offset["base"][index] + batch.position[index] == len(row.ids["base"]) - 1
        pages = state.caches["base"].tables[index]
        table = batch.table["base"][index].tolist()
        assert table[: len(pages)] == pages and set(table[len(pages) :]) <= {state.caches["base"].spare}
    assert batch.limit[len(rows) :].tolist() == batch.position[len(rows) :].tolist()


def test_rows_that_stay_keep_their_settings_and_others_get_theirs() -> None:
    def row(temperature: float) -> Row:
        request = Request({"base": (1, 2)}, 5, 9, Sampling(temperature=temperature))
        return Row(request, 0, 0, {"base": [1, 2]})

    one, two, three = row(0.1), row(0.2), row(0.3)
    state = state_of([one, two, three], 4)
    one.tokens.append(7)
    one.ids["base"].append(7)
    state.fill([one, three])
    batch = state.views(4)
    assert batch.sampler.temperature[:2].tolist() == [0.1, 0.3]
    assert batch.position.tolist() == [1, 0, 0, 0] and batch.limit.tolist() == [9, 9, 0, 0]
    assert batch.last["base"][:2].tolist() == [7, 2]


def test_bans_end_where_they_should() -> None:
    request = Request(
        {"a": (1,)},
        0,
        9,
        Sampling(min_new_tokens=4),
        eos=frozenset([2, 3]),
        banned=frozenset([5]),
        banned_first=frozenset([2, 5, 6]),
    )
    until = bans_of(request)
    assert (until[2], until[3], until[6]) == (4, 4, 1) and until[5] > 10**9 and len(until) == 4


def test_widths_come_in_powers_of_two() -> None:
    def request(length: int, new: int) -> Request:
        return Request({"a": (1,) * length, "b": (1,)}, 0, new, eos=frozenset([1, 2, 3]))

    assert Widths.of(request(10, 6)) == (2, 0, 4, 0)
    assert Widths.of(request(10, 6)).join(Widths.of(request(100, 12))) == (8, 0, 4, 0)
    assert Widths().join(Widths(3, 1, 0, 2)) == (3, 1, 0, 2)


def test_what_a_step_says_survives_its_packing() -> None:
    output = StepOutput(
        torch.tensor([1, 2]),
        torch.arange(8).view(2, 4),
        torch.arange(6).view(2, 3),
        torch.randn(2, 4, dtype=torch.float64),
        torch.arange(2 * 4 * 5).view(2, 4, 5),
    )
    packed = output.packed()
    assert packed.shape == (2, 12 + 4 * 5)
    assert all(torch.equal(a, b) for a, b in zip(StepOutput.unpacked(packed, 3), output, strict=True))


def test_slots() -> None:
    table, real = torch.tensor([[4, 2], [1, 9]]), torch.tensor([[True, True], [True, False]])
    at = torch.tensor([[PAGE - 1, PAGE], [0, 0]])
    assert slots_of(table, at, real, 9).tolist() == [5 * PAGE - 1, 2 * PAGE, PAGE, 9 * PAGE]


@pytest.mark.parametrize("acceptance, per_token, want", [(0.9, 0.01, 8), (0.05, 0.3, 0), (0.6, 0.3, 1)])
def test_draft_length_of_whole_steps(acceptance: float, per_token: float, want: int) -> None:
    """Each length is timed first; then the one that gives most tokens per second is taken."""
    draft_length, tried = StepDraftLength(), list[int]()
    for _ in range(40):
        ahead = draft_length.choose(8, acceptance)
        tried.append(ahead.k)
        draft_length.started += 1
        draft_length.add(8, ahead, 1.0 + per_token * ahead.k)
        assert not ahead.lookup
    assert {0, 1, 3} <= set(tried[:8]) and set(tried[20:]) == {want}
    assert StepDraftLength().choose(128, 0.9) == Ahead(0), "too wide to try anything else first"


def ride(
    draft_length: StepDraftLength,
    acceptance: float | None,
    matched: float,
    lookup_acceptance: float,
    rows: int = 4,
) -> list[Ahead]:
    """Forty steps on a machine on which the expert takes as long as a fifth of a plain step."""
    chosen = []
    for _ in range(40):
        chosen.append(draft_length.choose(rows, acceptance, matched, lookup_acceptance))
        draft_length.started += 1
        draft_length.add(rows, chosen[-1], 1.0 if chosen[-1].lookup else 1.0 + 0.2 * chosen[-1].k)
    return chosen[20:]


def test_prompt_lookup_is_chosen_where_it_gives_most() -> None:
    assert set(ride(StepDraftLength(), 0.1, 1.0, 0.9)) == {Ahead(6, lookup=True)}
    assert set(ride(StepDraftLength(), 0.1, 0.0, 0.9)) == {Ahead(0)}, "nothing was found"
    assert set(ride(StepDraftLength(), 0.9, 0.2, 0.9)) == {Ahead(6)}, "the expert does more for all rows"
    assert set(ride(StepDraftLength(), None, 0.5, 0.5)) == {Ahead(6, lookup=True)}
    assert set(ride(StepDraftLength(), None, 0.0, 0.0)) == {Ahead(0)}
    assert {a.k for a in ride(StepDraftLength(), None, 1.0, 0.9, rows=32)} == {3}, (
        "up to where products are bound"
    )


def test_slow_prompt_lookup_is_tried_and_left() -> None:
    """And come back to now and then: they may have been measured in a slow minute."""

    def steps(draft_length: StepDraftLength, count: int, slow: float) -> float:
        looked_up = 0
        for _ in range(count):
            ahead = draft_length.choose(4, None, 1.0, 0.5)
            draft_length.started += 1
            draft_length.add(4, ahead, slow if ahead.lookup else 1.0)
            looked_up += ahead.lookup
        return looked_up / count

    draft_length = StepDraftLength()
    assert 0 < steps(draft_length, 640, 3.0) < 0.05
    steps(draft_length, 640, 1.1)
    assert steps(draft_length, 640, 1.1) > 0.9


def test_no_retries_where_even_good_drafts_would_lose() -> None:
    def tries(per_token: float) -> int:
        draft_length, found = StepDraftLength(), 0
        for step in range(2000):
            ahead = draft_length.choose(8, 0.05)
            draft_length.started += 1
            draft_length.add(8, ahead, 1.0 + per_token * ahead.k)
            found += step >= 100 and ahead.k > 0
        return found

    assert tries(0.3) > 5 and tries(1.2) == 0
