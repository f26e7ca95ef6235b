"""Decoding in steps on the device, run eagerly on CPU tensors in float64: the tokens are the oracle's, token
for token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxytune.config import ExpertSpec, Sampling, System, TraceKind, parse_alpha
from proxytune.decoding.decoder import Decoder
from proxytune.engine.cuda import loop as device_loop
from proxytune.engine.cuda.graphs import Graphs
from proxytune.engine.cuda.loop import DeviceLoop
from proxytune.engine.cuda.sampling import SamplingNeeds
from proxytune.engine.cuda.state import bucket
from proxytune.engine.engine import Engine
from proxytune.engine.kv.pages import PagedCache
from proxytune.engine.request import Request
from proxytune.engine.speculative.draft_length import Ahead, StepDraftLength
from proxytune.engine.speculative.drafter import Speculation
from proxytune.models.roles import Models
from proxytune.records import Completion
from tests.support import adapters, decoders, tiny
from tests.support.adapters import on_anti
from tests.support.decoders import SAMPLERS, by_id, check, decoder, example, kv_bytes, ragged
from tests.support.on_device import Ways, as_on_a_device, drafting, nothing_read, on_launch
from tests.support.tiny import spec, trio_of


class Steps:
    """Counts what runs on the device, and what the engine runs itself."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.ahead = self.waited = self.refused = 0
        start = DeviceLoop.start

        def counted_start(loop: DeviceLoop, plan: Any) -> bool:
            started = start(loop, plan)
            self.refused += not started
            return started

        def heard(loop: DeviceLoop, rows: object, shape: object, steady: bool) -> None:
            self.ahead, self.waited = self.ahead + steady, self.waited + (not steady)

        patch.setattr(DeviceLoop, "start", counted_start)
        on_launch(patch, heard)


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Steps]:
    """Every test here has to use it."""
    as_on_a_device(monkeypatch)
    found = Steps(monkeypatch)
    yield found


@pytest.fixture(autouse=True)
def any_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where prompt lookup is tried, every step drafts in another way than the one before."""
    ways = cycle([Ahead(2), Ahead(3, lookup=True), Ahead(0), Ahead(6, lookup=True), Ahead(1)])
    choose = StepDraftLength.choose

    def chosen(draft_length: StepDraftLength, rows: int, acceptance: float | None, *lookup: float) -> Ahead:
        if lookup[0] == 0.0:
            return choose(draft_length, rows, acceptance, *lookup)
        ahead = next(ways)
        return Ahead(0) if acceptance is None and not ahead.lookup else ahead

    monkeypatch.setattr(StepDraftLength, "choose", chosen)


@pytest.mark.parametrize("k", [0, 1, 3, 6, None, "lookup", "any"])
@pytest.mark.every(2)
def test_greedy(trio: System, steps: Steps, k: Ways) -> None:
    """17 ragged prompts, so that batches are padded to 24 rows and shrink to one."""
    d = decoder(trio, speculation=drafting(k))
    check(d, ragged(17), Sampling(max_new_tokens=9))
    assert steps.ahead > 0 and steps.refused == 0
    assert (d.stats.drafted > 0) == (k != 0)


@pytest.mark.parametrize("k", [0, 1, 3, 6, "lookup", "any"])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.every(2)
def test_sampled(trio: System, steps: Steps, sampler: dict[str, Any], k: Ways) -> None:
    d = decoder(trio, speculation=drafting(k))
    check(d, ragged(3, 1), Sampling(max_new_tokens=10, seed=3, **sampler))
    assert steps.ahead > 0 and steps.refused == 0


@pytest.mark.parametrize("alpha", ["0", "0.4", "2", "first:3", "warmup:2", "linear:0:1.5:6"])
@pytest.mark.parametrize("k", [0, 3])
def test_alpha_schedules(trio: System, steps: Steps, alpha: str, k: int) -> None:
    check(decoder(trio, speculation=drafting(k)), ragged(5, 2), Sampling(max_new_tokens=10), alpha)
    assert steps.ahead > 0


def everything(found: list[Completion]) -> dict[tuple[str, int], tuple[Any, ...]]:
    return {
        where: (c.token_ids, c.finish_reason, c.text, pytest.approx(c.logprob, abs=1e-9))
        for where, c in by_id(found).items()
    }


def both(
    monkeypatch: pytest.MonkeyPatch, system: System, examples: Any, s: Sampling, k: Ways, **options: Any
) -> None:
    """Steps on the device give the tokens of the engine's own steps."""
    role, batch = options.pop("role", "proxy"), options.pop("batch", None)
    steps = list[bool]()
    on_launch(monkeypatch, lambda *_: steps.append(True))
    d = decoder(system, role, batch=batch, speculation=drafting(k))
    ours = everything(list(d.stream(examples, s, **options)))
    assert steps
    monkeypatch.setattr(device_loop, "DEVICES", set())
    count = len(steps)
    plain = decoder(system, role, speculation=Speculation(k=0))
    assert ours == everything(list(plain.stream(examples, s, **options))) and len(steps) == count


@pytest.mark.parametrize("k", [0, 3, "lookup", "any"])
def test_bans_and_minimum_length(trio: System, monkeypatch: pytest.MonkeyPatch, k: Ways) -> None:
    s = Sampling(
        max_new_tokens=10, min_new_tokens=3, temperature=1.5, ban=("e", "a"), ban_first=("b", "\n"), n=4
    )
    both(monkeypatch, trio, ragged(4, 3), s, k)


@pytest.mark.parametrize("k", [0, 3])
def test_forced_opener(trio: System, monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    both(monkeypatch, trio, ragged(3, 13), Sampling(max_new_tokens=8, temperature=0.8), k, forced=" ok")


@pytest.mark.parametrize("k", [0, 3, "lookup", "any"])
def test_stops_are_seen_late_and_cut(trio: System, monkeypatch: pytest.MonkeyPatch, k: Ways) -> None:
    s = Sampling(max_new_tokens=24, temperature=1.0, stop=("e", "a\n", "3"))
    both(monkeypatch, trio, ragged(12, 8), s, k)


@pytest.mark.parametrize("k", [0, "lookup", "any"])
def test_one_model_alone(trio: System, monkeypatch: pytest.MonkeyPatch, k: Ways) -> None:
    both(monkeypatch, trio, ragged(5, 8), Sampling(max_new_tokens=30, temperature=0.4), k, role="base")


@pytest.mark.parametrize("role", ["base", "proxy"])
def test_prompt_lookup_is_accepted(trio: System, steps: Steps, role: str) -> None:
    """Random models loop now and then, so that prompt lookup finds drafts."""
    d = decoder(trio, role, speculation=drafting("lookup"))
    list(d.stream(ragged(5, 1), Sampling(max_new_tokens=60)))
    assert steps.refused == 0 and d.stats.accepted > d.stats.examined / 2 > 20
    assert d.stats.row_steps < d.stats.generated_tokens - 40


@pytest.mark.parametrize("k", [0, 3, "lookup", "any"])
@pytest.mark.every(2)
def test_the_device_knows_what_was_generated(
    trio: System, monkeypatch: pytest.MonkeyPatch, steps: Steps, k: Ways
) -> None:
    """Before a step is followed, for every row that goes on, while rows come, end, give way and change
    places, and where drafts do not fit."""
    checked, follow = list[int](), DeviceLoop.follow

    def watched(loop: DeviceLoop) -> Any:
        state, step = loop.graphs.state, loop.in_flight[0]
        assert state is not None
        if len(loop.in_flight) == 1:
            batch = state.views(len(step.rows))
            for index, row in enumerate(step.rows):
                known = int(batch.offset["base"][index] + 1 + batch.position[index])
                history = batch.history[index, :known].tolist()
                assert history[: len(row.ids["base"])] == row.ids["base"]
                assert history[-1] == batch.last["base"][index]
                checked.append(known)
        return follow(loop)

    monkeypatch.setattr(DeviceLoop, "follow", watched)
    s = Sampling(max_new_tokens=40, temperature=0.6, n=2, stop=("3",))
    d = decoder(trio, kv_memory=kv_bytes(decoder(trio), 160), speculation=drafting(k))
    list(d.stream(ragged(9, 6, longest=12), s))
    assert d.stats.preemptions > 0 and len(checked) > 40 and steps.refused == 0


@pytest.mark.slow
def test_where_drafts_do_not_fit_a_step_has_fewer_or_none(
    trio: System, monkeypatch: pytest.MonkeyPatch, steps: Steps
) -> None:
    """And stays on the device. With room for the drafts of this step, but not of the next, it has them."""
    fits, seen = PagedCache.fits, set[int]()
    on_launch(monkeypatch, lambda loop, rows, shape, steady: seen.add(shape.ahead.k))
    examples, s = ragged(8, 6, longest=12), Sampling(max_new_tokens=40, min_new_tokens=40)
    d = decoder(trio, kv_memory=kv_bytes(decoder(trio), 240), speculation=drafting(6))
    check(d, examples, s)
    assert seen == {0, 6} and steps.refused == 0

    def no_more_than(cache: PagedCache, lengths: list[int]) -> bool:
        new = max((b - a for a, b in zip(cache.lengths, lengths, strict=False)), default=0)
        return new <= 7 and fits(cache, lengths)

    seen.clear()
    roomy = decoder(trio, speculation=drafting(6))
    monkeypatch.setattr(PagedCache, "fits", no_more_than)
    check(roomy, [example("abc")], s)
    assert seen == {6} and steps.refused == 0


@pytest.mark.parametrize("k", [0, 3, "lookup"])
@pytest.mark.parametrize("role", ["proxy", "tuned"])
@pytest.mark.parametrize("agreement", [False, True])
def test_traces(
    trio: System, monkeypatch: pytest.MonkeyPatch, steps: Steps, role: str, agreement: bool, k: Ways
) -> None:
    """Steps on the device trace what the engine's own steps do, and nothing else comes of it."""
    system = trio.model_copy(update={"tuned": trio.antiexpert})
    s = Sampling(max_new_tokens=8, temperature=1.2, min_new_tokens=2)
    kind: TraceKind = "agreement" if agreement else "tokens"

    def traced() -> dict[tuple[str, int], Any]:
        d = decoder(system, role, speculation=drafting(k), agreement=agreement)
        found = by_id(list(d.stream(ragged(5, 3), s, alpha=parse_alpha("linear:0:1.5:6"), trace=kind)))
        return {where: [asdict(t) for t in c.trace] for where, c in found.items()}

    ours = traced()
    assert steps.ahead > 0 and steps.refused == 0
    monkeypatch.setattr(device_loop, "DEVICES", set())
    theirs = traced()
    assert {where: len(own) for where, own in ours.items()} == {
        where: len(own) for where, own in theirs.items()
    }
    assert all(bool(t["divergence"]) == agreement for own in ours.values() for t in own)
    for where, own in theirs.items():
        for one, other in zip(ours[where], own, strict=True):
            assert one.keys() == other.keys()
            assert all(
                one[name] == (pytest.approx(v, abs=1e-9) if isinstance(v, dict) else v)
                for name, v in other.items()
            )


@pytest.mark.parametrize("k", [0, 3])
def test_several_experts(trio: System, tmp_path: Path, steps: Steps, k: int) -> None:
    other = tiny.save(tmp_path / "other", tiny.build("llama", 5))
    own = tiny.save(tmp_path / "own", tiny.build("llama", 6))
    assert trio.expert is not None
    experts = (
        ExpertSpec(**trio.expert.model_dump(), weight=0.7),
        ExpertSpec(model=str(other), dtype="float64", weight=0.5, antiexpert=spec(own)),
    )
    system = trio.model_copy(update={"expert": None, "experts": experts})
    check(decoder(system, speculation=drafting(k)), ragged(5, 12), Sampling(max_new_tokens=8))
    assert steps.ahead > 0


@pytest.mark.parametrize("k", [0, 1, 4, "lookup", "any"])
@pytest.mark.parametrize("name", ["lora", "head", "prompt"])
@pytest.mark.every(2)
def test_shared_pair(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, steps: Steps, name: str, k: Ways
) -> None:
    """An adapter that shares a forward, one that PEFT switches, and a soft prompt, against plain decoding in
    the engine's own steps (which test_models holds against PEFT and the oracle)."""
    pair, s = (
        adapters.system(folders, on_anti(folders, name)),
        Sampling(max_new_tokens=12, temperature=0.7),
    )
    ours = decoders.tokens(Decoder(Models(pair), "proxy", speculation=drafting(k)), s)
    assert steps.ahead > 0 and steps.refused == 0
    monkeypatch.setattr(device_loop, "DEVICES", set())
    assert ours == decoders.tokens(Decoder(Models(pair), "proxy", speculation=Speculation(k=0)), s)


FAMILIES = ["mistral", "gemma2", "gpt-oss", "deepseek-v3", "gpt2", "opt", "qwen3-moe"]
"""Windows, soft-capped scores, sinks, values of another size, learned positions, mixtures."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.every(3)
def test_families(family: str, tmp_path: Path, steps: Steps) -> None:
    folders = {
        role: tiny.save(tmp_path / role, tiny.build(family, seed))
        for seed, role in enumerate(("base", "expert", "antiexpert"))
    }
    system = System(name=family, **{role: spec(folder) for role, folder in folders.items()})
    check(decoder(system, speculation=drafting(3)), ragged(4, 4), Sampling(max_new_tokens=9))
    assert steps.ahead > 0 and steps.refused == 0


def test_ids_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens have each other's id in the expert: logits and ids are mapped on the device."""
    words = tiny.tokenizer(swapped=("a", "e"))
    system = trio_of(tmp_path, expert=words).model_copy(update={"vocab": "intersect"})
    both(monkeypatch, system, ragged(5, 1), Sampling(max_new_tokens=12, temperature=1.0), 3)


@pytest.mark.parametrize("k", [1, 6])
@pytest.mark.every(2)
def test_rows_end_inside_a_draft(trio: System, monkeypatch: pytest.MonkeyPatch, steps: Steps, k: int) -> None:
    """At a high temperature the drafter draws end-of-sequence often, and limits are reached anywhere."""
    d = decoder(trio, speculation=drafting(k))
    same = trio.model_copy(update={"base": trio.expert})  # base = expert: nearly all drafts are accepted
    agreeing = decoder(same, speculation=drafting(k))
    for one, limit, alpha in ((d, 7, "1"), (agreeing, 9, "0")):
        check(one, ragged(3, 5), Sampling(max_new_tokens=limit, temperature=3.0, n=2), alpha)
    assert agreeing.stats.accepted > agreeing.stats.examined / 2
    s = Sampling(max_new_tokens=40, temperature=3.0)
    found = list(agreeing.stream(ragged(24, 5), s, alpha=parse_alpha(0)))
    monkeypatch.setattr(device_loop, "DEVICES", set())
    plain = decoder(same, speculation=Speculation(k=0)).stream(ragged(24, 5), s, alpha=parse_alpha(0))
    assert everything(found) == everything(list(plain))
    assert {c.finish_reason for c in found} == {"eos", "length"}


@pytest.mark.parametrize("k", [0, 3, 6, "lookup", "any"])
def test_last_position_of_the_window(trio: System, steps: Steps, k: Ways) -> None:
    d = decoder(trio, speculation=drafting(k))
    for length in (249, 253, 254):  # and <s> before them
        s = Sampling(max_new_tokens=50, min_new_tokens=50)
        (c,) = d.stream([example("a" * length)], s)
        assert (c.finish_reason, len(c.token_ids)) == ("length", 255 - length)
        short = s.model_copy(update={"max_new_tokens": len(c.token_ids)})
        check(d, [example("a" * length)], short)
    assert steps.waited > 0


@pytest.mark.parametrize("k", [0, 3, "lookup", "any"])
@pytest.mark.every(2)
def test_preemption(trio: System, monkeypatch: pytest.MonkeyPatch, steps: Steps, k: Ways) -> None:
    examples, s = ragged(10, 6, longest=12), Sampling(max_new_tokens=40, temperature=0.8)
    d = decoder(trio, kv_memory=kv_bytes(decoder(trio), 160), speculation=drafting(k))
    tight = everything(list(d.stream(examples, s)))
    assert d.stats.preemptions > 0 and steps.ahead > 0
    monkeypatch.setattr(device_loop, "DEVICES", set())
    assert tight == everything(list(decoder(trio).stream(examples, s)))


@pytest.mark.parametrize("k", [0, 3, "lookup", "any"])
@pytest.mark.every(2)
def test_samples_share_their_prompt(trio: System, steps: Steps, k: Ways) -> None:
    d = decoder(trio, batch=3, speculation=drafting(k))
    examples = [example("a prompt that fills a page or more", 0), example("short", 1)]
    check(d, examples, Sampling(max_new_tokens=8, temperature=1.0, n=5))
    assert steps.ahead > 0


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 25), min_size=1, max_size=6),
    limit=st.integers(1, 14),
    batch=st.integers(1, 5),
    pool=st.integers(80, 200),
    samples=st.integers(1, 2),
    k=st.sampled_from([0, 1, 3, 6, None, "lookup", "any"]),
    sampler=st.sampled_from([{}, *SAMPLERS]),
    stop=st.sampled_from([(), ("e",), ("a", "\n")]),
)
def test_whatever_comes(
    trio: System,
    monkeypatch: pytest.MonkeyPatch,
    lengths: list[int],
    limit: int,
    batch: int,
    pool: int,
    samples: int,
    k: Ways,
    sampler: dict[str, Any],
    stop: tuple[str, ...],
) -> None:
    examples = [example("abc? " * (n // 5) + "x" * (n % 5), i) for i, n in enumerate(lengths)]
    s = Sampling(max_new_tokens=limit, n=samples, stop=stop, **sampler)
    tight = decoder(trio, batch=batch, kv_memory=kv_bytes(decoder(trio), pool), speculation=drafting(k))
    ours = everything(list(tight.stream(examples, s)))
    with monkeypatch.context() as patch:
        patch.setattr(device_loop, "DEVICES", set())
        assert ours == everything(list(decoder(trio, speculation=Speculation(k=0)).stream(examples, s)))


def test_what_the_host_may_not_do_is_noticed() -> None:
    values, mask = torch.arange(3), torch.tensor([True, False, True])
    for reads in (
        lambda: values.max().item(),
        lambda: bool(mask.any()),
        lambda: values[mask],
        lambda: values.tolist(),
        lambda: values.repeat_interleave(values),
        lambda: torch.unique(values),
        lambda: 2 in values,
    ):
        with pytest.raises(AssertionError), nothing_read():
            reads()


def test_padding_writes_to_the_spare_page_alone(trio: System) -> None:
    """Three rows in a bucket of four, one of them done: only live rows' pages and the spare page change."""
    d = decoder(trio, speculation=drafting(2))
    engine = Engine(d.ensemble, max_rows=3, speculation=drafting(2))
    for number, new in enumerate((9, 9, 1)):
        engine.submit(Request({n: (1, 40 + number, 50) for n in d.loaded}, number, new))
    engine.step()  # the prompts
    assert engine.device is not None
    engine.step()
    state, caches = engine.device.graphs.state, [r.rows for r in d.ensemble.runners.values()]
    assert state is not None and state.rows == 4 and engine.device.in_flight
    engine.step()
    alive = state.views(4).position < state.views(4).limit
    assert alive.tolist() == [True, True, False, False]
    before = [[pool.clone() for pool in cache.pools(0)] for cache in caches]  # type: ignore[attr-defined]
    engine.device.graphs.step(state.views(4), Ahead(2), SamplingNeeds(False, False))
    for cache, pools in zip(caches, before, strict=True):
        assert isinstance(cache, PagedCache)
        own = {page for table in cache.tables[:2] for page in table} | {cache.spare}
        for old, new_pool in zip(pools, cache.pools(0), strict=True):
            changed = {int(page) for page in (old != new_pool).flatten(1).any(1).nonzero()}
            assert changed and changed <= own


def test_the_host_is_one_step_late(trio: System, steps: Steps) -> None:
    """A step is started before the last is read; a request that arrives is let in after that."""
    d, heard = decoder(trio, speculation=drafting(0)), list[object]()
    engine = Engine(
        d.ensemble, max_rows=4, speculation=drafting(0), on_token=lambda r, token: heard.append(r.tag)
    )
    contexts = {n: (1, 40) for n in d.loaded}
    engine.submit(Request(contexts, 1, 6, tag="first"))
    engine.step()
    engine.step()
    assert engine.device is not None and len(engine.device.in_flight) == 1 and not heard
    engine.step()
    assert heard == ["first"] and len(engine.device.in_flight) == 1 and steps.ahead == 1
    engine.submit(Request(contexts, 2, 6, tag="second"))
    results = []
    while engine.busy:
        results += engine.step()
    assert {r.request.tag: len(r.tokens) for r in results} == {"first": 6, "second": 6}
    assert [r.request.tag for r in results] == ["first", "second"]
    assert not engine.scheduler.rows and all(not r.rows.lengths for r in d.ensemble.runners.values())


def test_what_cannot_run_this_way(trio: System) -> None:
    """Another choice of drafts: the engine's own steps."""

    def device(role: str = "proxy", trace: bool = False, s: Speculation | None = None) -> bool:
        d = decoder(trio, role)
        return Engine(d.ensemble, max_rows=2, trace=trace, speculation=s or drafting(2)).device is not None

    assert device() and device("base") and device("base", s=Speculation(k=2)) and device(trace=True)
    assert not device(s=Speculation(pick=lambda logits, positions: logits.argmin(-1)))


def test_a_refused_capture_leaves_the_engine_its_own_steps(
    trio: System, monkeypatch: pytest.MonkeyPatch, steps: Steps
) -> None:
    monkeypatch.setattr(Graphs, "ready", lambda *_: False)

    def prepare(*_: object) -> None:
        raise device_loop.Refused("some layer waits")

    monkeypatch.setattr(Graphs, "prepare", prepare)
    with pytest.warns(UserWarning, match="some layer waits"):
        check(decoder(trio, speculation=drafting(3)), ragged(3, 1), Sampling(max_new_tokens=6))
    assert steps.waited == steps.ahead == 0


def test_buckets() -> None:
    assert [bucket(n) for n in (1, 2, 3, 9, 17, 33, 97, 128, 129, 300)] == [
        *(1, 2, 4, 16, 24, 48, 128, 128, 256, 384)
    ]
