"""The choice of the draft length from made-up machines whose times are known."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from proxytune.engine.speculative.draft_length import (
    LADDER,
    Ahead,
    DraftLength,
    FadingRate,
    LatencyTable,
    StepDraftLength,
    run_of,
)

Cost = Callable[[int], float]


def ride(
    verify: Cost, draft: Cost, acceptance: float, rows: int, steps: int = 400
) -> tuple[dict[int, int], float, float]:
    """Let a DraftLength drive a machine. -> how often each k was chosen in the last quarter, tokens per
    second, and those of plain decoding."""
    draft_length, draw = DraftLength(), random.Random(1)
    chosen: dict[int, int] = {}
    tokens = seconds = 0.0
    for step in range(steps):
        k = draft_length.choose(rows)
        accepted = [next((j for j in range(k) if draw.random() >= acceptance), k) for _ in range(rows)]
        spent = k * draft(rows) + verify(rows * (k + 1))
        if k:
            draft_length.saw_drafts(rows, k, k * rows, k * draft(rows))
            draft_length.acceptance.add(sum(accepted), sum(min(n + 1, k) for n in accepted))
        draft_length.verify.add(rows * (k + 1), verify(rows * (k + 1)))
        closing = sum(n == k for n in accepted)
        if closing:
            draft_length.close.add(closing, draft(closing))
            spent += draft(closing)
        tokens += sum(n + 1 for n in accepted)
        seconds += spent
        if step >= steps * 3 // 4:
            chosen[k] = chosen.get(k, 0) + 1
    return chosen, tokens / seconds, rows / (verify(rows) + draft(rows))


def flat(tokens: int) -> float:
    """Bound by memory: any number of tokens takes the same time."""
    return 10.0


def bound(tokens: int) -> float:
    """Bound by arithmetic: twice the tokens, twice the time."""
    return 1.0 * tokens


def trap(tokens: int) -> float:
    """Two tokens cost nearly twice what one does, and more cost no more."""
    return 10.0 if tokens == 1 else 18.0


def small(tokens: int) -> float:
    return 1.0


def test_flat_times_and_good_drafts_mean_long_drafts() -> None:
    chosen, speed, plain = ride(flat, small, 0.9, rows=1)
    assert min(chosen) >= 4 and speed > 2.5 * plain


@pytest.mark.parametrize("acceptance", [0.1, 0.6, 0.95])
@pytest.mark.parametrize("rows", [1, 16, 128])
@pytest.mark.parametrize("verify", [flat, bound, trap])
def test_never_much_slower_than_plain(verify: Cost, rows: int, acceptance: float) -> None:
    """Trying out included, within three percent."""
    _, speed, plain = ride(verify, lambda n: 0.1 * verify(n), acceptance, rows, steps=2000)
    assert speed > 0.97 * plain


@pytest.mark.parametrize("rows", [1, 8, 32])
@pytest.mark.parametrize("verify", [flat, bound])
def test_trying_out_is_cheap_where_drafts_are_bad(verify: Cost, rows: int) -> None:
    """Responses of 40 tokens, one in ten drafts is accepted."""
    _, speed, plain = ride(verify, lambda n: 0.1 * verify(n), 0.1, rows, steps=40)
    assert speed > 0.9 * plain


def test_bad_drafts_mean_plain_decoding() -> None:
    chosen, _, _ = ride(bound, lambda n: 0.3 * bound(n), 0.3, rows=8)
    assert set(chosen) <= {0, 1} and chosen[0] > 95


def test_the_trap_of_two_tokens() -> None:
    """Where k = 1 loses and k = 3 wins, k = 1 is not the end of it."""
    chosen, speed, plain = ride(trap, small, 0.8, rows=1)
    assert max(chosen, key=lambda k: chosen[k]) >= 3 and speed > 1.3 * plain


def test_a_drafter_that_gets_better_is_noticed() -> None:
    draft_length = DraftLength()
    for tokens in (1, 2, 4):
        for _ in range(3):
            draft_length.verify.add(tokens, 10.0)
    for _ in range(3):
        draft_length.draft.add(1, 1.0)
        draft_length.close.add(1, 1.0)
    for _ in range(200):
        draft_length.acceptance.add(0, 1)
    assert draft_length.choose(1) == 0
    tried = 0
    for _ in range(20_000):
        k = draft_length.choose(1)
        if k:
            tried += 1
            draft_length.acceptance.add(k, k)
    assert tried > 10 and draft_length.choose(1) == max(LADDER)


def test_a_slow_minute_is_forgotten() -> None:
    """The longer draft was measured while the machine was busy; later it costs no more than the shorter."""
    draft_length = DraftLength()
    draft_length.draft.add(1, 1.0), draft_length.draft.add(1, 1.0)
    draft_length.close.add(1, 1.0), draft_length.close.add(1, 1.0)
    for tokens, seconds in ((1, 10.0), (2, 10.0), (4, 10.0), (5, 30.0), (7, 30.0), (9, 30.0)):
        for _ in range(4):
            draft_length.verify.add(tokens, seconds)
    for _ in range(200):
        draft_length.acceptance.add(19, 20)
    assert draft_length.choose(1) == 3
    chosen = []
    for _ in range(1000):
        chosen.append(draft_length.choose(1))
        draft_length.verify.add(chosen[-1] + 1, 10.0)
    assert min(chosen[-100:]) > 3


def measured(close: float, verify: Cost, rows: int = 1) -> DraftLength:
    """What plain steps and a few drafts have shown."""
    draft_length = DraftLength()
    for tokens in (rows, 2 * rows, 4 * rows, 8 * rows):
        draft_length.verify.add(tokens, verify(tokens)), draft_length.verify.add(tokens, verify(tokens))
    for times in (draft_length.close, draft_length.draft):
        times.add(rows, close), times.add(rows, close)
    return draft_length


def test_prompt_lookup_for_all_models_where_it_wins() -> None:
    """Before they were ever a draft: from what was seen of them, and from what wider forwards cost."""
    draft_length = measured(3.0, flat)
    for _ in range(30):
        draft_length.acceptance.add(0, 1)
    assert not draft_length.prefers_lookup([0], 0), "nothing found"
    for _ in range(30):
        draft_length.lookup_acceptance.add(0, 1)
    assert not draft_length.prefers_lookup([6], 0)
    for _ in range(30):
        draft_length.lookup_acceptance.add(6, 6)
    assert draft_length.prefers_lookup([6], 0) and not draft_length.prefers_lookup([], 0)
    wide, better = measured(10.0, bound), measured(1.0, flat)
    wide.lookup_acceptance = better.lookup_acceptance = draft_length.lookup_acceptance
    for _ in range(100):
        better.acceptance.add(8, 8)
    assert not wide.prefers_lookup([6], 0), "reading it takes as long as choosing it"
    assert not better.prefers_lookup([2], 8), "the expert goes further"


def test_what_prompt_lookup_costs_is_measured() -> None:
    draft_length = measured(3.0, flat)
    draft_length.lookup_acceptance.accepted = draft_length.lookup_acceptance.examined = 100.0
    assert draft_length.prefers_lookup([6], 0)
    for _ in range(3):
        draft_length.lookup.add(7, 200.0)
    assert sum(draft_length.prefers_lookup([6], 0) for _ in range(320)) == 10, (
        "it may have been a slow minute"
    )


def test_prompt_lookup_without_an_expert() -> None:
    """Eight rows, one of them quoting: it reads its drafts beside the last tokens of the others."""
    draft_length = DraftLength()
    for _ in range(3):
        draft_length.verify.add(8, 10.0)
    draft_length.lookup_acceptance.accepted = draft_length.lookup_acceptance.examined = 100.0
    taken = 0
    for _ in range(100):
        found = [6, 0, 0, 0, 0, 0, 0, 0]
        looked_up = draft_length.prefers_lookup(found, 0)
        taken += looked_up
        (draft_length.lookup if looked_up else draft_length.verify).add(
            14 if looked_up else 8, 11.0 if looked_up else 10.0
        )
    assert taken == 100


def test_prompt_lookup_in_one_row_pays_for_all_of_them() -> None:
    """Where every token takes its time, six more of one row keep seven others waiting."""
    draft_length = DraftLength()
    for _ in range(3):
        draft_length.verify.add(8, 8.0), draft_length.lookup.add(14, 14.0)
    draft_length.lookup_acceptance.accepted = draft_length.lookup_acceptance.examined = 100.0
    assert not draft_length.prefers_lookup([6, 0, 0, 0, 0, 0, 0, 0], 0)


def test_the_drafter_reads_prompt_lookup_where_that_saves_forwards() -> None:
    def reads(wide: float, share: float) -> int:
        draft_length = DraftLength()
        for _ in range(3):
            draft_length.read.add(1, 1.0), draft_length.read.add(7, wide)
        draft_length.guesses.accepted, draft_length.guesses.examined = share * 100, 100.0
        return sum(draft_length.guessing(1, 6) for _ in range(160))

    assert reads(1.5, 0.9) == reads(1.5, 0.4) == 160
    assert reads(1.5, 0.2) == reads(5.0, 0.7) == 10, "tried in any case, to be measured"


def test_no_retries_where_even_good_drafts_would_lose() -> None:
    """64 rows, products bound by arithmetic: drafts of any quality lose, and none is tried for ever."""
    draft_length = measured(1.0, lambda tokens: 10.0 * tokens, rows=64)
    for _ in range(200):
        draft_length.acceptance.add(0, 1)
    assert not any(draft_length.choose(64) for _ in range(1000))


def test_times_of_about_as_many_tokens_count_together() -> None:
    """Batches of 100 to 104 rows, each seen once: noise must not choose between them."""
    times = LatencyTable()
    for tokens, seconds in ((100, 10.0), (101, 14.0), (102, 9.0), (103, 12.0), (104, 10.0)):
        times.add(tokens, seconds)
    assert times.known(102) and abs(times.at(100) - times.at(104)) < 0.5
    assert 9.0 <= times.at(102) <= 11.0


def test_what_slows_one_size_down_slows_all() -> None:
    """Rows grow longer: a size that was measured when they were short must not look cheap for ever."""
    times = LatencyTable()
    for tokens, seconds in ((4, 1.0), (4, 1.0), (16, 3.0), (16, 3.0), *[(4, 2.0)] * 20):
        times.add(tokens, seconds)
    assert abs(times.at(4) - 2.0) < 0.05 and 4.5 < times.at(16) < 6.0
    assert times.below(16) == times.at(16)


def test_times() -> None:
    times = LatencyTable()
    assert times.at(3) == 0.0 and not times.known(1)
    times.add(4, 9.0)
    times.add(4, 2.0)
    assert times.at(4) == 2.0 and times.known(4) and times.known(5) and not times.known(8)
    times.add(4, 100.0)
    assert 2.0 < times.at(4) <= 2.5, "an outlier hardly moves the mean"
    times.add(8, 6.0)
    assert times.at(8) == 6.0 and times.at(4) < times.at(6) < 6.0 < times.at(16)
    assert times.at(2) == times.at(4), "fewer tokens than measured: no cheaper"


def test_rates_by_hand() -> None:
    """0.5 + 0.25 + 0.125; old counts fade by three in a hundred, or as it is told."""
    assert run_of(0.5, 3) == pytest.approx(0.875) and run_of(0.8, 0) == 0.0
    rate, quick = FadingRate(2.0, 4.0), FadingRate(2.0, 4.0, memory=0.5)
    rate.add(3, 5)
    quick.add(3, 5)
    assert (rate.accepted, rate.examined) == pytest.approx((0.97 * 2 + 3, 0.97 * 4 + 5))
    assert quick.value == pytest.approx(4 / 7) and FadingRate(5.0, 5.0).value == 0.999
    start = DraftLength()
    assert (start.acceptance.value, start.guesses.value, start.lookup_acceptance.value) == (0.7, 0.5, 0.5)
    assert (start.acceptance.memory, start.lookup_acceptance.memory) == (0.97, 0.9)


def test_a_time_moves_its_mean_and_the_level_of_all() -> None:
    """The best of two; then a tenth and three tenths of the change, which is 1.5 at most."""
    times = LatencyTable()
    for tokens, seconds in ((20, 4.0), (20, 3.0), (21, 3.6)):  # 20 and 21 are one class
        times.add(tokens, seconds)
    [(size, mean, count)] = times.seen.values()
    assert (size, count) == (pytest.approx(20 + 1 / 3), 3)
    assert (mean, times.level) == pytest.approx((3 * 1.2**0.1, 1.2**0.3))
    times.add(20, 1e9)
    [(_, later, _)] = times.seen.values()
    assert (later / mean, times.level) == pytest.approx((1.5**0.1, (1.2 * 1.5) ** 0.3))
    for _ in range(20):
        times.add(24, 1.0)
    assert len(times.seen) == 2, "24 is another class: 8 * 1.15**8 is 24.5"


def table(points: dict[int, float]) -> LatencyTable:
    """Times that were measured twice."""
    times = LatencyTable()
    for tokens, seconds in points.items():
        times.add(tokens, seconds), times.add(tokens, seconds)
    return times


@pytest.mark.parametrize(
    ("points", "tokens", "seconds"),
    [
        ({4: 3.0}, 1, 3.0),  # no cheaper than what was measured
        ({4: 3.0}, 16, 6.0),  # one point alone: with the root
        ({1: 2.0, 3: 9.0, 4: 10.0}, 2, 5.5),  # halfway between its neighbours
        ({1: 2.0, 3: 9.0, 4: 10.0}, 3, 9.0),
        ({1: 2.0, 2: 3.0, 4: 8.0}, 8, 18.0),  # on the line through 2 and 4
        ({1: 2.0, 3: 9.0, 4: 10.0}, 7, 18.0),  # 3 is more than half of 4: on that through 1 and 4
        ({3: 5.0, 4: 6.0}, 6, 8.0),  # none of half as many: the first
        ({4: 10.0, 8: 6.0}, 6, 10.0),  # more tokens are never cheaper
        ({4: 10.0, 8: 6.0}, 0, 0.0),
    ],
)
def test_times_between_and_beyond_measurements(points: dict[int, float], tokens: int, seconds: float) -> None:
    assert table(points).at(tokens) == pytest.approx(seconds)


def test_what_is_known_of_about_as_many() -> None:
    """Within a fifth below and a quarter above, seen twice."""
    ten = table({10: 1.0})
    assert [n for n in range(6, 16) if ten.known(n)] == [8, 9, 10, 11, 12]
    once = LatencyTable()
    once.add(10, 1.0)
    assert not once.known(10)
    low = table({2: 1.0, 5: 3.0, 9: 2.0})
    assert [low.below(n) for n in (1, 2, 4, 5, 8, 9, 20)] == [0.0, 1.0, 1.0, 3.0, 3.0, 2.0, 2.0]


def test_the_speed_of_a_step_by_hand() -> None:
    """Two rows, three drafts each that are right with a half: 1.875 tokens of each. The draft models run
    once for two drafts; the closing forward is for an eighth of the rows, and one needs it with a chance of
    1 - (7/8)**2."""
    known = DraftLength(
        draft=table({2: 3.0}), verify=table({2: 10.0, 8: 16.0}), close=table({1: 5.0, 2: 9.0})
    )
    known.forwards, known.drafted = 1.0, 2.0
    known.acceptance.accepted, known.acceptance.examined = 5.0, 10.0
    seconds = 16 + 3 * 3 / 2 + (1 - (7 / 8) ** 2) * 5
    assert known.speed(2, 3) == pytest.approx(1.875 / seconds)
    assert known.speed(2, 3, verify=1.0) == pytest.approx(1.875 / (seconds - 15))
    # all four drafts of both rows accepted: both close
    sure = (1 + run_of(0.9999, 3)) / (16 + 4.5 + 9)
    assert known.speed(2, 3, share=0.9999) == pytest.approx(sure, rel=1e-3)
    assert known.speed(2, 0) == pytest.approx(1 / (10 + 9)), "plain: the draft models read the token"
    assert DraftLength().speed(2, 3) == 0.0
    known.saw_drafts(4, 2, 6, 3.0)
    assert known.draft.seen[4][1] == 1.5, "of one forward"
    assert (known.forwards, known.drafted) == pytest.approx((0.97 + 2 * 4, 0.97 * 2 + 6))


def test_what_is_tried_first() -> None:
    """Plain, then one draft, then three, up to 512 tokens; with nothing to draft no time of drafts is
    needed."""
    start, order = DraftLength(), []
    for _ in range(6):
        order.append(start.choose(2))
        start.verify.add(2 * (order[-1] + 1), 10.0)
    assert order == [0, 0, 1, 1, 3, 3] and DraftLength().choose(0) == 0
    assert DraftLength(verify=table({256: 10.0})).choose(256) == 1
    # beyond, by the estimate alone: 2.533 tokens in the time of four times as many, which is twice as long
    assert DraftLength(verify=table({257: 10.0})).choose(257) == 3


def test_the_drafter_reads_guesses_now_and_then_in_any_case() -> None:
    """Two rows share a forward of 4 seconds: half of the guesses right saves 0.875 * 4 / 2, and three tokens
    more cost 2."""
    reading = DraftLength()
    assert reading.guessing(2, 3), "nothing is known yet"
    reading.read = table({2: 4.0, 5: 6.0})
    assert [reading.guessing(2, 3) for _ in range(31)] == [*[False] * 14, True, *[False] * 15, True]
    reading.read = table({2: 4.0, 5: 5.7})
    assert reading.guessing(2, 3)


def step_times(
    rows: int, expert: dict[int, float], lookup: dict[int, float] | None = None
) -> StepDraftLength:
    """Whole steps by their drafts: seconds."""
    steps = StepDraftLength()
    for found, times in ((False, expert), (True, lookup or {})):
        for k, seconds in times.items():
            for _ in range(2):
                steps.add(rows, Ahead(k, found), seconds)
    return steps


def test_steps_on_a_gpu_by_hand() -> None:
    """Measured first; then the fastest by tokens per second, if by a twentieth; never beyond 150 tokens."""
    assert StepDraftLength().choose(4, 0.5) == Ahead(0)
    assert step_times(4, {0: 1.0}).choose(4, 0.5) == Ahead(1)
    assert step_times(4, {0: 1.0, 1: 1.0}).choose(4, 0.5) == Ahead(3)
    assert step_times(4, {0: 1.0}).choose(4, None) == Ahead(0), "there is no expert to draft"
    flat_times = dict.fromkeys(LADDER, 1.0)
    assert step_times(4, flat_times).choose(4, 0.9) == Ahead(8)
    assert step_times(15, flat_times).choose(15, 0.9) == Ahead(8), "135 tokens"
    assert step_times(17, flat_times).choose(17, 0.9) == Ahead(6), "153 would be too many"
    assert step_times(75, flat_times).choose(75, 0.9) == Ahead(1)
    assert step_times(76, flat_times).choose(76, 0.9) == Ahead(0)
    # one draft, right with a half: 1.5 tokens in 1.42 s are a twentieth more than 1 in 1 s, in 1.44 s not
    slow = {2: 9.0, 3: 9.0, 4: 9.0, 6: 9.0, 8: 9.0}
    assert step_times(1, {0: 1.0, 1: 1.42, **slow}).choose(1, 0.5) == Ahead(1)
    assert step_times(1, {0: 1.0, 1: 1.44, **slow}).choose(1, 0.5) == Ahead(0)


def test_prompt_lookup_on_a_gpu_by_hand() -> None:
    """As if reading were free until it was measured, and each 32nd step again."""
    steps = step_times(2, dict.fromkeys(LADDER, 1.0))
    assert steps.choose(2, None, matched=0.5, lookup_acceptance=0.9) == Ahead(6, lookup=True)
    assert steps.choose(2, None, matched=0.0, lookup_acceptance=0.9) == Ahead(0)
    # a hundredth of the rows, with one token more on the average: no twentieth more
    assert steps.choose(2, None, matched=0.01, lookup_acceptance=0.5) == Ahead(0)
    slow = step_times(2, {0: 1.0}, {6: 50.0})
    # 1 + 4.22 tokens in two seconds, against one in a second
    assert step_times(2, {0: 1.0}, {6: 2.0}).choose(2, None, 1.0, 0.9) == Ahead(6, lookup=True)
    found = []
    for slow.started in range(64):
        found.append(slow.choose(2, None, matched=1.0, lookup_acceptance=0.9).lookup)
    assert [at for at, looked in enumerate(found) if looked] == [31, 63]
    assert step_times(30, dict.fromkeys(LADDER, 1.0)).choose(30, None, 1.0, 0.9) == Ahead(4, True)


def test_a_plain_step_on_a_gpu_drafts_now_and_then() -> None:
    """Each 128th, where almost always right drafts would win."""
    hopeful = step_times(1, dict.fromkeys(LADDER, 1.0))
    hopeless = step_times(1, {k: 1.0 + k for k in LADDER})
    tried = {"hopeful": list[int](), "hopeless": list[int]()}
    for started in range(260):
        for name, steps in (("hopeful", hopeful), ("hopeless", hopeless)):
            steps.started = started
            if steps.choose(1, 0.0001) != Ahead(0):
                tried[name].append(started)
    assert tried == {"hopeful": [127, 255], "hopeless": []}
