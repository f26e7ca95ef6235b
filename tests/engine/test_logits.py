"""The mathematics of a step, against published vectors, transformers' warpers and hand-made numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from proxytune.engine.logits import (
    SamplingParams,
    Shift,
    ban,
    choose,
    combine,
    gumbel,
    largest,
    log_probability,
    philox,
    some,
    warp,
    widen,
)
from tests.support import oracle

INF = float("inf")

RANDOM123 = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
"""kat_vectors of the Random123 distribution, philox4x32 with 10 rounds: counter, key, result."""


@pytest.mark.parametrize("counter, key, want", RANDOM123)
def test_philox_gives_the_published_vectors(
    counter: tuple[int, ...], key: tuple[int, int], want: tuple[int, ...]
) -> None:
    words = philox([torch.tensor([c]) for c in counter], (torch.tensor([key[0]]), torch.tensor([key[1]])))
    assert tuple(int(word) for word in words) == want
    assert tuple(oracle.philox(counter, key)) == want


@settings(max_examples=30, deadline=None)
@given(
    keys=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=3),
    position=st.integers(0, 100_000),
    vocabulary=st.integers(1, 11),
)
def test_gumbel_is_the_documented_noise(keys: list[int], position: int, vocabulary: int) -> None:
    """Every token, also where the vocabulary is no multiple of four, of every key, negative ones included."""
    positions = torch.tensor([position + row for row in range(len(keys))])
    got = gumbel(torch.tensor(keys), positions, vocabulary)
    assert got.dtype == torch.float64 and got.shape == (len(keys), vocabulary)
    for row, key in enumerate(keys):
        want = [oracle.noise(key, position + row, token) for token in range(vocabulary)]
        assert got[row].tolist() == pytest.approx(want, rel=1e-14, abs=1e-14)


def test_the_key_is_64_bits_wide() -> None:
    keys = torch.tensor([5, 5 + 2**32, 5 - 2**63])
    noise = gumbel(keys, torch.zeros(3, dtype=torch.long), 8)
    assert len({tuple(row) for row in noise.tolist()}) == 3


def test_noise_is_standard_gumbel_and_independent() -> None:
    rows, vocabulary = 400, 1000
    noise = gumbel(torch.arange(rows) * 7919, torch.arange(rows) % 5, vocabulary)
    count = rows * vocabulary
    assert bool(noise.isfinite().all())
    assert float(noise.mean()) == pytest.approx(0.5772156649, abs=5 * 1.2825 / math.sqrt(count))
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)
    # adjacent positions, adjacent tokens, adjacent keys and the two halves of a key: all uncorrelated
    key, at = torch.full((rows,), 3), torch.arange(rows)
    here = gumbel(key, at, vocabulary)
    for other in (
        gumbel(key, at + 1, vocabulary),
        here.roll(1, dims=-1),
        gumbel(key + 1, at, vocabulary),
        gumbel(key + 2**32, at, vocabulary),
    ):
        correlation = float(torch.corrcoef(torch.stack([here.flatten(), other.flatten()]))[0, 1])
        assert abs(correlation) < 5 / math.sqrt(count)


def choice(
    rows: int, temperature: Any = 1.0, top_k: Any = 0, top_p: Any = 1.0, min_p: Any = 0.0, key: int = 0
) -> SamplingParams:
    """A SamplingParams for `rows` rows; rows differ in their keys."""

    def column(value: Any, dtype: torch.dtype) -> Tensor:
        return torch.tensor(value if isinstance(value, list) else [value] * rows, dtype=dtype)

    heat = column(temperature, torch.float64)
    full = SamplingParams(
        rows=torch.arange(rows),
        temperature=heat,
        top_k=column(top_k, torch.long),
        top_p=column(top_p, torch.float64),
        min_p=column(min_p, torch.float64),
        keys=torch.arange(rows) * 1_000_003 + key,
        positions=torch.arange(rows) % 7,
    )
    return among(full, [row for row in range(rows) if heat[row] > 0])


def among(choice: SamplingParams, sampled: list[int]) -> SamplingParams:
    """The choice of some of the rows that draw."""
    at = torch.tensor(sampled, dtype=torch.long)
    return SamplingParams(**{name: column[at] for name, column in vars(choice).items()})


@pytest.mark.parametrize(
    "temperature, top_k, top_p, min_p",
    [(1.0, 0, 1.0, 0.0), (0.7, 0, 1.0, 0.0), (2.0, 4, 1.0, 0.0), (1.0, 0, 0.7, 0.0), (1.2, 0, 1.0, 0.3)],
)
def test_sampled_frequencies_follow_the_distribution(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    draws = 20_000
    logits = torch.tensor([2.0, 1.5, 1.0, 0.3, 0.0, -0.5, -2.0])
    tokens = choose(logits.expand(draws, -1), choice(draws, temperature, top_k, top_p, min_p))
    seen = torch.bincount(tokens, minlength=len(logits)).double()
    one = choice(1, temperature, top_k, top_p, min_p)
    want = (
        warp(logits[None], one.temperature, one.top_k, one.top_p, one.min_p).softmax(-1)[0].double() * draws
    )
    kept = want > 0
    assert float(seen[~kept].sum()) == 0
    chi = float(((seen - want)[kept] ** 2 / want[kept]).sum())
    assert chi < 33  # below 1e-5 for six degrees of freedom, and the draws are fixed


def test_tiny_temperature_is_greedy() -> None:
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    assert torch.equal(choose(logits, choice(50, 1e-6)), logits.argmax(-1))


BASE = torch.tensor([[1.0, -2.0, 0.5, 0.1]])
EXPERT = torch.tensor([[0.3, 0.7, -1.0, 2.0]])
ANTI = torch.tensor([[0.1, 0.2, 3.0, -2.0]])


def test_combine_by_hand() -> None:
    got = combine(BASE, [Shift(EXPERT, ANTI)], torch.tensor([0.5], dtype=torch.float64))
    assert got[0].tolist() == pytest.approx([1.1, -1.75, -1.5, 2.1], abs=1e-6)


def test_alpha_is_per_row() -> None:
    rows = BASE.repeat(4, 1)
    alphas = torch.tensor([0.0, 1.0, 2.0, -1.0], dtype=torch.float64)
    got = combine(rows, [Shift(EXPERT.repeat(4, 1), ANTI.repeat(4, 1))], alphas)
    assert torch.equal(got[0], BASE[0])
    for row, alpha in enumerate(alphas.tolist()):
        assert got[row].tolist() == pytest.approx((BASE + alpha * (EXPERT - ANTI))[0].tolist(), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_experts_and_alpha_zero_give_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    base, expert, anti = (torch.randn(5, 100, generator=generator, dtype=dtype) * 1e3 for _ in range(3))
    alpha = torch.tensor([0.1, 0.3, 1.0, 7.7, 10.0], dtype=torch.float64)
    assert torch.equal(combine(base, [Shift(expert, expert)], alpha), base)
    assert torch.equal(combine(base, [Shift(expert, anti)], alpha * 0), base)
    assert not torch.equal(combine(base, [Shift(expert, anti)], alpha), base)
    assert combine(base, [], alpha) is base


def test_weights_and_several_experts() -> None:
    shifts = [Shift(EXPERT, ANTI, 0.25), Shift(ANTI, BASE, -2.0)]
    got = combine(BASE, shifts, torch.tensor([3.0]))
    want = BASE + 3 * (0.25 * (EXPERT - ANTI) - 2 * (ANTI - BASE))
    assert got[0].tolist() == pytest.approx(want[0].tolist(), rel=1e-5)


def test_unshared_tokens_stay_at_the_base() -> None:
    shared = torch.tensor([True, False, True, False])
    got = combine(BASE, [Shift(EXPERT, ANTI, shared=shared)], torch.tensor([1.0]))
    assert got[0, ~shared].tolist() == BASE[0, ~shared].tolist()
    assert got[0, shared].tolist() == pytest.approx([1.2, -3.5], abs=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), -INF, INF])
def test_bad_columns_do_not_leak(bad: float) -> None:
    """What an expert says of a token cannot reach a row with alpha 0, an unshared token, or a neighbour."""
    broken = EXPERT.clone()
    broken[0, 2] = bad
    rows, alpha = BASE.repeat(2, 1), torch.tensor([0.0, 1.0])
    got = combine(rows, [Shift(broken.repeat(2, 1), ANTI.repeat(2, 1))], alpha)
    assert torch.equal(got[0], BASE[0])
    others = [0, 1, 3]
    assert got[1, others].isfinite().all() and not got[1, 2].isfinite()
    mask = torch.tensor([True, True, False, True])
    assert combine(BASE, [Shift(broken, ANTI, shared=mask)], torch.tensor([1.0]))[0, 2] == BASE[0, 2]


def test_a_token_that_the_base_rules_out_stays_ruled_out() -> None:
    base = BASE.clone()
    base[0, 1] = -INF
    assert combine(base, [Shift(EXPERT, ANTI)], torch.tensor([10.0]))[0, 1] == -INF


def test_widen() -> None:
    assert widen(BASE.bfloat16()).dtype == widen(BASE.half()).dtype == widen(BASE).dtype == torch.float32
    assert widen(BASE.double()).dtype == torch.float64


def test_ban_touches_its_pairs_only_and_copies() -> None:
    rows = BASE.repeat(3, 1)
    got = ban(rows, torch.tensor([0, 2, 2]), torch.tensor([3, 0, 1]))
    want = rows.clone()
    want[0, 3] = want[2, 0] = want[2, 1] = -INF
    assert torch.equal(got, want) and torch.equal(rows, BASE.repeat(3, 1))
    none = torch.tensor([], dtype=torch.long)
    assert torch.equal(ban(rows, none, none), rows)


def test_log_probability() -> None:
    got = log_probability(BASE.repeat(4, 1), torch.arange(4))
    assert got.exp().sum().item() == pytest.approx(1)
    assert got[3].item() == pytest.approx(
        math.log(math.exp(0.1) / sum(map(math.exp, BASE[0].tolist()))), abs=1e-6
    )


def warped(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    one = choice(len(logits), temperature, top_k, top_p, min_p)
    return warp(logits, one.temperature, one.top_k, one.top_p, one.min_p)


def theirs(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float = 0.0) -> Tensor:
    """transformers' own; min-p before the cuts that it does not disturb."""
    ids = torch.zeros(len(logits), 1, dtype=torch.long)
    scores = logits / temperature
    if min_p:
        scores = MinPLogitsWarper(min_p)(ids, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    return TopPLogitsWarper(top_p)(ids, scores) if top_p < 1 else scores


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 2, 7, 39, 40, 41, 1000]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 1e-9, 0.05, 0.3, 1.0]),
)
def test_warp_is_that_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    got = warped(logits, temperature, top_k, top_p, min_p)
    want = theirs(logits, temperature, top_k, top_p, min_p)
    assert torch.equal(got.isinf(), want.isinf())
    assert torch.allclose(got, want)


def test_ties_at_the_kth_value_are_kept() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    assert warped(logits, top_k=2).isfinite()[0].tolist() == [True, False, True, True, True, False]
    assert torch.equal(warped(logits, top_k=2), theirs(logits, 1.0, 2, 1.0))


def test_top_p_at_its_ends() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    assert warped(logits, top_p=1e-9).isfinite().sum(-1).tolist() == [1, 1]
    assert warped(logits, top_p=1e-9)[0].argmax() == 1
    assert torch.equal(warped(logits, top_p=1.0), logits)
    # the crossing token is kept: the masses are .5, .25, .125, .125
    even = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).double().log()
    for top_p, kept in [(0.4, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.9, 4), (1.0, 4)]:
        assert int(warped(even, top_p=top_p).isfinite().sum()) == kept, top_p
    level = torch.zeros(1, 4)  # masses of .25, which are exact: two of them reach .5
    assert warped(level, top_p=0.5).isfinite()[0].tolist() == [True, True, False, False]


def test_warp_settings_are_per_row() -> None:
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(3))
    mixed = choice(4, [0.5, 1.0, 2.0, 1.0], [3, 0, 5, 0], [1.0, 0.4, 0.8, 1.0], [0.0, 0.0, 0.2, 0.5])
    got = warp(logits, mixed.temperature, mixed.top_k, mixed.top_p, mixed.min_p)
    each = [(0.5, 3, 1.0, 0.0), (1.0, 0, 0.4, 0.0), (2.0, 5, 0.8, 0.2), (1.0, 0, 1.0, 0.5)]
    for row, (t, k, p, m) in enumerate(each):
        assert torch.equal(got[row], warped(logits[row : row + 1], t, k, p, m)[0])


def test_banned_tokens_are_never_sampled() -> None:
    logits = torch.randn(200, 5, generator=torch.Generator().manual_seed(4))
    where = torch.arange(200)
    allowed = ban(ban(logits, where, torch.full((200,), 2)), where, torch.full((200,), 4))
    for top_k, top_p in [(0, 1.0), (4, 1.0), (0, 0.99), (5, 0.5)]:
        assert not {2, 4} & set(choose(allowed, choice(200, 5.0, top_k, top_p)).tolist())


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0, 2.0]]).repeat(3, 1)
    assert choose(logits, choice(3, 0.0)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_largest_are_those_of_torch(dtype: torch.dtype) -> None:
    """Ties, columns of a wider table, -inf and what is not a number included."""
    wide = torch.randn(40, 300, generator=torch.Generator().manual_seed(1)).mul(2).round().to(dtype)
    wide[3, 7], wide[5], wide[6, 20:25] = float("nan"), float("-inf"), float("inf")
    for logits in (wide, wide[:, :211], wide[:0]):
        got = largest(logits)
        assert got.dtype == torch.long and torch.equal(got, logits.argmax(-1))
    assert largest(wide.requires_grad_())[3] == 7


def test_some_rows() -> None:
    logits = torch.randn(4, 6)
    both = {"base": logits, "expert": logits + 1}
    assert some(both, [0, 1, 2, 3])["base"] is logits and some({}, [0]) == {}
    for rows in ([3, 1], [0, 1, 2], [1, 0, 2, 3], [2, 2, 2, 2, 0], []):
        found, index = some(both, rows), torch.tensor(rows, dtype=torch.long)
        assert all(torch.equal(found[name], values[index]) for name, values in both.items())


def test_a_row_does_not_depend_on_its_batch() -> None:
    """Greedy and sampled rows mixed: each row's token is what it is alone, in any company."""
    rows = 12
    logits = torch.randn(rows, 50, generator=torch.Generator().manual_seed(5)) * 2
    heat = [0.0, 1.0, 0.7, 0.0] * 3
    full = choice(rows, heat, [0, 5, 0, 3] * 3, [1.0, 1.0, 0.6, 0.5] * 3)
    together = choose(logits, full).tolist()

    def picked(order: list[int]) -> list[int]:
        drawing = full.rows.tolist()
        part = among(full, [drawing.index(row) for row in order if row in drawing])
        places = torch.tensor([order.index(row) for row in part.rows.tolist()], dtype=torch.long)
        return choose(logits[torch.tensor(order)], replace(part, rows=places)).tolist()

    for row in range(rows):
        assert picked([row]) == [together[row]]
    order = [7, 2, 11, 0, 5]
    assert picked(order) == [together[row] for row in order]
    assert [together[row] for row in (0, 3, 4)] == logits.argmax(-1)[[0, 3, 4]].tolist()


@pytest.mark.parametrize(
    "top_k, top_p, min_p",
    [
        (1, 1.0, 0.0),
        (5, 1.0, 0.4),
        (40, 0.8, 0.0),
        ([3, 9, 20, 7], [1.0, 0.5, 0.9, 0.2], [0.0, 0.1, 0.9, 0.0]),
    ],
)
@pytest.mark.parametrize("ties", [False, True])
def test_top_k_first_draws_what_the_whole_vocabulary_draws(
    ties: bool, top_k: Any, top_p: Any, min_p: Any
) -> None:
    """Noise for the survivors only, or for all tokens: the same token; also where tokens tie at the k-th
    place."""
    for seed in range(40):
        logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(seed)) * 2
        if ties:
            logits = (logits * 2).round() / 2
        one = choice(4, 0.9, top_k, top_p, min_p, key=seed)
        warped = warp(logits, one.temperature, one.top_k, one.top_p, one.min_p)
        whole = (warped.double() + gumbel(one.keys, one.positions, 300)).argmax(-1)
        assert torch.equal(choose(logits, one), whole)


def test_rows_without_top_k_draw_from_everything_beside_rows_with_it() -> None:
    """A batch of a server has both."""
    torch.manual_seed(0)
    logits = torch.randn(4, 40)
    mixed = choose(logits, choice(4, 2.0, [3, 0, 1, 0], key=7))
    for row, top_k in enumerate([3, 0, 1, 0]):
        alone = choice(4, 2.0, top_k, key=7)
        assert mixed[row] == choose(logits, alone)[row]


def test_noise_of_some_tokens_is_theirs() -> None:
    keys, positions = torch.tensor([5, 2**40 + 1]), torch.tensor([0, 77])
    ids = torch.tensor([[0, 3, 4, 258], [9, 1, 2, 200]])
    assert torch.equal(gumbel(keys, positions, 259, ids), gumbel(keys, positions, 259).gather(-1, ids))
