"""Speculation cannot be seen in the tokens: whatever drafts, however far and however badly, in float64 the
response is that of plain decoding. (test_decoder holds all of its own tests to the oracle with it too.)"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from proxytune.config import ExpertSpec, Sampling, System, parse_alpha
from proxytune.decoding.decoder import Decoder
from proxytune.engine.engine import Engine
from proxytune.engine.request import Request, Row
from proxytune.engine.sampling import RowPosition, pick
from proxytune.engine.scheduler import Scheduler
from proxytune.engine.speculative.draft_length import DraftLength, LatencyTable
from proxytune.engine.speculative.drafter import LOOKUP, Drafter, Drafts, Speculation, same_prefix
from proxytune.errors import UserError
from proxytune.models.roles import Models
from proxytune.options import DecodeOptions
from proxytune.records import Completion
from tests.support import tiny
from tests.support.decoders import by_id, check, decoder, example, kv_bytes, ragged, use_pages
from tests.support.tiers import examples, slow
from tests.support.tiny import spec

PLAIN = Speculation(k=0)
Found = dict[tuple[str, int], Completion]


def run(d: Decoder, examples: Sequence[Any], s: Sampling, **options: Any) -> Found:
    return by_id(list(d.stream(examples, s, **options)))


def outcome(found: Found) -> dict[tuple[str, int], tuple[Any, ...]]:
    return {where: (c.token_ids, c.finish_reason, c.text) for where, c in found.items()}


class Coin:
    """Drafts that are the true token with probability `p` and another one otherwise: any acceptance."""

    def __init__(self, truth: Found, p: float, seed: int = 0) -> None:
        self.truth, self.p, self.draw = truth, p, random.Random(seed)
        self.right = self.asked = 0
        self.right_at: set[tuple[tuple[str, int], int]] = set()

    def __call__(self, logits: Tensor, positions: Sequence[RowPosition]) -> Tensor:
        tokens = []
        for row, position in positions:
            tag: Any = row.request.tag
            known = self.truth[tag.where].token_ids
            right = self.draw.random() < self.p and position < len(known)
            self.asked, self.right = self.asked + 1, self.right + right
            self.right_at |= {(tag.where, position)} if right else set()
            tokens.append(known[position] if right else self.draw.randrange(3, logits.shape[-1]))
        return torch.tensor(tokens)


@pytest.fixture(scope="module")
def pair(trio: System, tmp_path_factory: pytest.TempPathFactory) -> System:
    """Two experts."""
    second = spec(tiny.save(tmp_path_factory.mktemp("pair") / "second", tiny.build("llama", 9)))
    experts = (
        ExpertSpec(**trio.expert.model_dump(), weight=0.7),  # type: ignore[union-attr]
        ExpertSpec(**second.model_dump(), weight=0.5),
    )
    return trio.model_copy(update={"expert": None, "experts": experts})


QUICK_DRAFTS = {(1, 0.0), (4, 0.5), (None, 0.9), (15, 1.0)}
ANY_DRAFTS = [
    (k, p) if (k, p) in QUICK_DRAFTS else slow(k, p) for k in (1, 4, 15, None) for p in (0.0, 0.5, 0.9, 1.0)
]


@pytest.mark.parametrize(("k", "p"), ANY_DRAFTS)
def test_any_drafts_give_the_plain_tokens(k: int | None, p: float, trio: System) -> None:
    s = Sampling(max_new_tokens=24, temperature=0.7, top_k=40, n=2)
    plain = decoder(trio, speculation=PLAIN)
    want = run(plain, ragged(6, 2), s)
    for batch in (1, 5):
        coin = Coin(want, p)
        d = decoder(trio, batch=batch, speculation=Speculation(k=k, pick=coin, lookup=False))
        found = run(d, ragged(6, 2), s)
        assert outcome(found) == outcome(want)
        for where, c in found.items():
            assert c.logprob == pytest.approx(want[where].logprob, abs=1e-9)
        assert d.stats.generated_tokens == plain.stats.generated_tokens
        if k is not None:
            assert coin.asked and 0 < d.stats.examined <= d.stats.drafted
            # a wrong draft can be right by chance, so the coin is a lower bound
            assert d.stats.accepted >= (d.stats.examined if p == 1 else 0)
            if p == 1:
                assert d.stats.row_steps < plain.stats.row_steps / min(k, 3) + 12


@pytest.mark.thorough
@settings(
    max_examples=examples(5, 15), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    k=st.one_of(st.none(), st.integers(0, 15)),
    p=st.floats(0, 1),
    lookup=st.booleans(),
    sampler=st.sampled_from(
        [{}, {"temperature": 1.1}, {"temperature": 0.8, "top_k": 9}, {"temperature": 1.0, "top_p": 0.8}]
    ),
    alpha=st.sampled_from(["1", "0", "0.4", "first:3", "linear:0:2:9", "warmup:5"]),
    limit=st.integers(1, 20),
    minimum=st.integers(0, 6),
    batch=st.integers(1, 6),
    samples=st.integers(1, 3),
    pool=st.integers(90, 220),
    stop=st.sampled_from([(), ("e",), ("a", "\n")]),
    trace=st.sampled_from(["off", "tokens"]),
)
@pytest.mark.every(3)
def test_everything_at_once(
    trio: System,
    layout: str,
    k: int | None,
    p: float,
    lookup: bool,
    sampler: dict[str, Any],
    alpha: str,
    limit: int,
    minimum: int,
    batch: int,
    samples: int,
    pool: int,
    stop: Any,
    trace: Any,
) -> None:
    """Preemption between drafts, shared prompts, stops, minimum lengths, schedules, both layouts."""
    s = Sampling(
        max_new_tokens=limit, min_new_tokens=min(minimum, limit), n=samples, stop=stop, ban=("b",), **sampler
    )
    examples, how = ragged(5, limit), {"alpha": parse_alpha(alpha), "trace": trace, "forced": "so"}
    want = run(decoder(trio, speculation=PLAIN), examples, s, **how)
    tight = decoder(
        trio,
        batch=batch,
        kv_memory=kv_bytes(decoder(trio), pool),
        speculation=Speculation(k=k, lookup=lookup, pick=Coin(want, p)),
    )
    found = run(tight, examples, s, **how)
    assert outcome(found) == outcome(want)
    for where, c in found.items():
        for got, item in zip(c.trace, want[where].trace, strict=True):
            assert (got.id, got.top, got.alpha) == (item.id, item.top, item.alpha)
            assert got.probability == pytest.approx(item.probability, abs=1e-9)


def letters(found: Found, longest: int = 1) -> list[str]:
    """What was generated in ASCII, in pieces of up to `longest` letters."""
    texts = {c.text[at : at + n] for c in found.values() for n in range(1, longest + 1) for at in range(24)}
    return sorted(text for text in texts if text.strip() and text.isascii())


@pytest.mark.thorough
@settings(max_examples=examples(10, 25), deadline=None)
@given(
    experts=st.sampled_from(
        [("trio", None), ("pair", None), ("pair", "expert"), ("pair", "expert2"), ("trio", LOOKUP)]
    ),
    k=st.sampled_from([None, *range(16)]),
    p=st.sampled_from([None, 0.0, 0.5, 0.8, 0.95, 1.0]),
    lookup=st.booleans(),
    straight=st.booleans(),
    sampler=st.sampled_from(
        [
            {},
            {"temperature": 1.1},
            {"temperature": 0.8, "top_k": 9},
            {"temperature": 1.0, "top_p": 0.8},
            {"temperature": 0.9, "top_k": 20, "top_p": 0.6},
        ]
    ),
    alpha=st.sampled_from(["1", "0", "0.4", "first:3", "linear:0:2:9", "warmup:5"]),
    limit=st.sampled_from([1, 6, 9, 12]),
    minimum=st.integers(0, 6),
    samples=st.integers(1, 2),
    batch=st.sampled_from([1, 3, 6]),
    pool=st.sampled_from([32, 48, 64, 120]),
    pages=st.booleans(),
    ban=st.sampled_from([None, 0, 5, 23]),
    stop=st.sampled_from([None, 0, 7, 31, 112]),
)
def test_speculation_says_what_the_oracle_says(
    trio: System,
    pair: System,
    experts: tuple[str, str | None],
    k: int | None,
    p: float | None,
    lookup: bool,
    straight: bool,
    sampler: dict[str, Any],
    alpha: str,
    limit: int,
    minimum: int,
    samples: int,
    batch: int,
    pool: int,
    pages: bool,
    ban: int | None,
    stop: int | None,
) -> None:
    """Bans and stops are of what would be generated without them; `p` None is the expert's own drafts,
    `straight` lets all models read every other draft of prompt lookup at once."""
    system, drafter = {"trio": trio, "pair": pair}[experts[0]], experts[1]
    examples, how = ragged(3, limit, longest=10), {"alpha": parse_alpha(alpha)}
    s = Sampling(max_new_tokens=limit, min_new_tokens=min(minimum, limit), n=samples, **sampler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("proxytune.engine.scheduler.HEADROOM", 0)  # else responses this short preempt nobody
        if pages:
            use_pages(patch)
        plain = decoder(system, speculation=PLAIN)
        truth = run(plain, examples, s, **how)
        if ban is not None and (plainly := letters(truth)):
            first = {c.text[:1] for c in truth.values()}.intersection(plainly)
            bans = {"ban": (plainly[ban % len(plainly)],), "ban_first": tuple(sorted(first))}
            s = s.model_copy(update=bans)
            truth = run(plain, examples, s, **how)
        if stop is not None and (pieces := letters(truth, 3)):
            s = s.model_copy(update={"stop": (pieces[stop % len(pieces)],)})
        draft = pick if p is None else Coin(truth, p)
        if straight:
            k, turns = None, cycle([True, False])
            patch.setattr(DraftLength, "prefers_lookup", lambda _, found, k: any(found) and next(turns))
        how_far = Speculation(k=k, lookup=lookup, drafter=drafter, pick=draft)
        memory = kv_bytes(plain, pool)
        check(decoder(system, batch=batch, kv_memory=memory, speculation=how_far), examples, s, alpha)


def test_preemption_between_drafts_says_what_the_oracle_says(
    trio: System,
    layout: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows give way between accepted drafts."""
    monkeypatch.setattr("proxytune.engine.scheduler.HEADROOM", 0)
    examples, s = ragged(4, 6, longest=12), Sampling(max_new_tokens=16, temperature=0.8)
    plain = decoder(trio, speculation=PLAIN)
    coin = Coin(run(plain, examples, s), 0.9)
    gave_way: list[tuple[tuple[str, int], int]] = []
    preempt = Scheduler.preempt

    def heard(scheduler: Scheduler) -> None:
        preempt(scheduler)
        row: Any = scheduler.waiting[0]
        gave_way.append((row.request.tag.where, len(row.tokens)))

    monkeypatch.setattr(Scheduler, "preempt", heard)
    how = Speculation(k=4, pick=coin, lookup=False)
    d = decoder(trio, kv_memory=kv_bytes(plain, 64), speculation=how)
    check(d, examples, s)
    assert d.stats.preemptions == len(gave_way) and d.stats.accepted > 0
    accepted = [{at for row, at in coin.right_at if row == where} for where, _ in gave_way]
    assert any(min(at) < n <= max(at) for at, (_, n) in zip(accepted, gave_way, strict=True) if at)


@pytest.mark.parametrize("sampler", [{}, {"temperature": 0.9, "top_k": 50}], ids=str)
@pytest.mark.parametrize("k", [slow(1), 4, slow(15), None])
def test_drafts_end_with_the_context_window(k: int | None, sampler: dict[str, Any], tmp_path: Path) -> None:
    """The last position of the smallest window: no draft is fed beyond it, and none is missing before."""
    small = {"max_position_embeddings": 24}
    parts = {
        role: spec(
            tiny.save(tmp_path / role, tiny.build("llama", seed, **(small if role == "expert" else {})))
        )
        for seed, role in enumerate(("base", "expert", "antiexpert"))
    }
    system = System(name="narrow", **parts)
    s = Sampling(max_new_tokens=100, **sampler)
    want = by_id(check(decoder(system, speculation=PLAIN), ragged(6, 1, longest=20), s))
    for pick_ in (pick, Coin(want, 1.0)):
        d = decoder(system, speculation=Speculation(k=k, pick=pick_))
        assert outcome(run(d, ragged(6, 1, longest=20), s)) == outcome(want)
    assert {len(c.token_ids) for c in want.values() if c.finish_reason == "length"} != {100}


def test_rows_that_finish_inside_a_draft(trio: System) -> None:
    """End-of-sequence, a stop string and the length limit in the middle of accepted drafts: nothing after
    them is generated, streamed or counted."""
    plain, s = decoder(trio, speculation=PLAIN), Sampling(max_new_tokens=40, temperature=1.5)
    free = run(plain, ragged(40, 3), s)
    stop = next(c.text[13:15] for c in free.values() if len(c.text) > 20 and c.text[13:15].isascii())
    s = s.model_copy(update={"stop": (stop, "e")})
    want = run(plain, ragged(40, 3), s)
    assert {c.finish_reason for c in want.values()} == {"eos", "stop", "length"}
    streamed: dict[str, str] = {}

    def hear(example_id: str, sample: int, text: str) -> None:
        streamed[example_id] = streamed.get(example_id, "") + text

    coin = Coin(want, 1.0)
    d = decoder(trio, speculation=Speculation(k=9, pick=coin))
    found = run(d, ragged(40, 3), s, on_text=hear)
    assert outcome(found) == outcome(want)
    ends = {(where, len(c.token_ids) - 1): c.finish_reason for where, c in want.items()}
    assert {ends[at] for at in ends.keys() & coin.right_at} >= {"eos", "stop"}
    assert d.stats.accepted > d.stats.generated_tokens / 2
    assert d.stats.generated_tokens == sum(len(c.token_ids) for c in want.values())
    assert {where[0]: c.text for where, c in found.items() if c.text} == {
        k: v for k, v in streamed.items() if v
    }


def test_any_of_several_experts_can_draft(pair: System) -> None:
    s = Sampling(max_new_tokens=16, temperature=0.9)
    want = run(decoder(pair, speculation=PLAIN), ragged(5), s)
    for name in (None, "expert", "expert2"):
        d = decoder(pair, speculation=Speculation(k=3, drafter=name))
        assert outcome(run(d, ragged(5), s)) == outcome(want)
        assert d.ensemble.draft_models(name) == (name or "expert",)
    with pytest.raises(UserError, match="no expert 'expert3' to draft: choose expert or expert2 or lookup"):
        run(decoder(pair, speculation=Speculation(drafter="expert3")), ragged(1), s)


@pytest.fixture
def flat(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which a forward takes as long whatever it reads."""
    add = LatencyTable.add
    monkeypatch.setattr(LatencyTable, "add", lambda times, tokens, seconds: add(times, tokens, 1.0))


@pytest.mark.parametrize("k", [2, 5, None])
def test_a_model_alone_drafts_from_its_own_response(k: int | None, trio: System, flat: None) -> None:
    """Random models loop, so prompt lookup drafts well."""
    s = Sampling(max_new_tokens=80)
    plain = decoder(trio, "base", speculation=PLAIN)
    want = run(plain, ragged(4), s)
    d = decoder(trio, "base", speculation=Speculation(k=k))
    assert d.ensemble.draft_models() == ()
    assert outcome(run(d, ragged(4), s)) == outcome(want)
    assert d.stats.accepted > 0 and d.stats.row_steps < plain.stats.row_steps


def test_prompt_lookup_ends_where_a_response_does(trio: System) -> None:
    """What follows an end of text in the prompt is no draft."""
    d = decoder(trio, "base", speculation=Speculation(k=6))
    drafter = Engine(d.ensemble, max_rows=1, speculation=d.speculation).drafter
    size = d.ensemble.runners["base"].alignment.size
    ids = (5, 6, 7, 8, 2, 9, 5, 6, 7)
    for ticket, (prompt, eos, want) in enumerate(
        (
            (ids, [], [8, 2, 9, 5, 6, 7]),
            (ids, [2], [8, 2]),
            ((5, 6, 7, 8, size, 9, 5, 6, 7), [], [8]),
        )
    ):
        request = Request({"base": prompt}, 1, 9, eos=frozenset(eos))
        row = Row(request, ticket, 0, {"base": list(prompt)})
        assert drafter.look_up(row, 6) == want


def test_prompt_lookup_spares_forwards_of_the_drafter(trio: System, tmp_path: Path) -> None:
    """With lookup the drafter reads what it found in one forward, and the tokens stay. (Three times the same
    model, in folders of their own: it loops, and its drafts are accepted.)"""
    s, forwards = Sampling(max_new_tokens=80), dict[str, int]()
    copies = {
        role: trio.base.model_copy(
            update={"model": str(shutil.copytree(str(trio.base.model), tmp_path / role))}
        )
        for role in ("expert", "antiexpert")
    }
    system = trio.model_copy(update=copies)
    want = run(decoder(system, speculation=PLAIN), [example("ab")], s)
    for lookup in (False, True):
        d = decoder(system, speculation=Speculation(k=6, lookup=lookup))
        runner: Any = d.ensemble.runners["expert"]
        runner.forward = counted(forwards, str(lookup), runner.forward)
        assert outcome(run(d, [example("ab")], s)) == outcome(want)
    assert 0 < forwards["True"] < forwards["False"]


@pytest.mark.parametrize("k", [2, 6, None])
@pytest.mark.parametrize("sampler", [{}, {"temperature": 0.6, "top_k": 4}], ids=["greedy", "sampled"])
def test_prompt_lookup_for_all_models_at_once(
    k: int | None, sampler: dict[str, Any], trio: System, flat: None
) -> None:
    """No expert drafts: one forward per model and step, whatever is accepted."""
    s = Sampling(max_new_tokens=80, **sampler)
    plain = decoder(trio, speculation=PLAIN)
    want = run(plain, ragged(4), s)
    d, forwards = decoder(trio, speculation=Speculation(k=k, drafter=LOOKUP)), dict[str, int]()
    for name, runner in d.ensemble.runners.items():
        patched: Any = runner
        patched.forward = counted(forwards, name, patched.forward)
    assert outcome(run(d, ragged(4), s)) == outcome(want)
    assert d.stats.drafted > 0
    if k is not None or not sampler:  # samples hardly recur
        assert d.stats.accepted > 0 and d.stats.row_steps < plain.stats.row_steps
    assert forwards["base"] == forwards["expert"] == forwards["antiexpert"]


def counted(calls: dict[str, int], name: str, function: Any) -> Any:
    """The function, its calls counted under the name."""

    def call(work: Any) -> Any:
        calls[name] = calls.get(name, 0) + 1
        return function(work)

    return call


def test_prompt_lookup_takes_over_where_the_expert_is_bad_and_text_recurs(
    trio: System, monkeypatch: pytest.MonkeyPatch, flat: None
) -> None:
    """By themselves."""

    def watched(draft_length: DraftLength, found: Sequence[int], k: int) -> bool:
        chosen = prefers_lookup(draft_length, found, k)
        taken.append(chosen)
        return chosen

    prefers_lookup, taken = DraftLength.prefers_lookup, list[bool]()
    monkeypatch.setattr(DraftLength, "prefers_lookup", watched)
    s = Sampling(max_new_tokens=120)
    want = run(decoder(trio, speculation=PLAIN), [example("ab")], s)
    d = decoder(trio, batch=1, speculation=Speculation(pick=Coin(want, 0.0)))
    assert outcome(run(d, [example("ab")], s)) == outcome(want)
    assert taken.count(True) > 3 and d.stats.row_steps < 100


@pytest.mark.parametrize("role", ["proxy", "tuned"])
def test_the_trace_of_agreement_is_the_plain_one(role: str, trio: System, tmp_path: Path) -> None:
    system = trio.model_copy(update={"tuned": spec(tiny.save(tmp_path / "tuned", tiny.build("llama", 7)))})
    s = Sampling(max_new_tokens=12, temperature=0.8)
    plain, fast = (
        run(decoder(system, role, agreement=True, speculation=how), ragged(4), s, trace="agreement")
        for how in (PLAIN, Speculation(k=3))
    )
    assert outcome(plain) == outcome(fast)
    for where, c in fast.items():
        for got, want in zip(c.trace, plain[where].trace, strict=True):
            assert got.divergence is not None and want.divergence is not None
            assert got.divergence == pytest.approx(want.divergence, abs=1e-9) and len(got.divergence) == 2


def test_drafts_of_prompt_lookup_say_nothing_of_the_expert() -> None:
    drafter = Drafter({}, ("expert",), "base", Speculation())
    first = drafter.draft_length.acceptance.value
    drafter.learn(Drafts([[1, 2]], {}, ()), 0, 1, None)
    assert drafter.draft_length.acceptance.value == first
    drafter.learn(Drafts([[1, 2]], {}, ("expert",)), 0, 1, None)
    assert drafter.draft_length.acceptance.value < first


def test_same_prefix() -> None:
    assert [same_prefix(a, b) for a, b in (([], [1]), ([1, 2], [1]), ([1, 2], [1, 3]), ([4], [5]))] == [
        0,
        1,
        1,
        0,
    ]


def test_settings_as_users_give_them(trio: System) -> None:
    def speculation(**options: Any) -> Speculation:
        return Decoder(Models(trio), "base", DecodeOptions(**options)).speculation

    assert speculation().k is None and speculation(speculate="off").k == 0
    assert speculation(speculate=3).k == 3
    assert speculation(speculate="5", drafter="lookup") == Speculation(k=5, drafter="lookup")
    for bad in (-1, 16, "fast", "2.5"):
        with pytest.raises(UserError, match="give 'auto', 'off' or a length from 0 to 15"):
            DecodeOptions(speculate=bad)
