"""What a decoder says of its work in numbers, against what was asked of it: drafts, steps, tokens, time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from proxytune.config import Sampling, System, parse_alpha
from proxytune.decoding import decoder as decoders
from proxytune.decoding.decoder import MAX_ROWS, SMALL_POOL, Decoder
from proxytune.decoding.templates import _line
from proxytune.engine import Engine, Request
from proxytune.engine.sampling import RowPosition, pick
from proxytune.engine.speculative.drafter import LOOKUP, Speculation
from proxytune.engine.timing import PrefillShare
from proxytune.errors import UserError
from proxytune.models.roles import Models
from proxytune.options import DecodeOptions
from proxytune.records import RoleMemory, Took
from proxytune.terminal import WorkSoFar
from tests.support.decoders import decoder, example
from tests.support.on_device import as_on_a_device

NINE = Sampling(max_new_tokens=9, min_new_tokens=9)


def never_right(logits: Tensor, positions: Sequence[RowPosition]) -> Tensor:
    """The token behind the one that would be chosen."""
    return (pick(logits, positions) + 1) % logits.shape[-1]


@pytest.mark.parametrize(
    ("choose", "figures"),
    [
        # three drafts and a token of its own, twice; then one token is left
        (pick, {"row_steps": 3, "drafted": 6, "examined": 6, "accepted": 6}),
        # a token a step: three drafts, while three more may follow it, then two, one and none
        (never_right, {"row_steps": 9, "drafted": 6 * 3 + 2 + 1, "examined": 8, "accepted": 0}),
    ],
)
def test_drafts_are_counted(trio: System, choose: Any, figures: dict[str, int]) -> None:
    """Expert, antiexpert and base are one model here, so what the expert drafts is what the proxy chooses."""
    same = trio.model_copy(update={"expert": trio.base, "antiexpert": trio.base})
    d = decoder(same, speculation=Speculation(k=3, lookup=False, pick=choose))
    [found] = d.stream([example("abc")], NINE)
    for name, count in figures.items():
        assert (getattr(d.stats, name), getattr(found.took, name)) == (count, count), name
    assert (d.stats.generated_tokens, d.stats.prompt_tokens) == (9, 4) and len(found.token_ids) == 9
    assert (found.took.generated_tokens, found.took.prompt_tokens) == (9, 4)
    list(d.stream([example("abcde")], NINE))
    assert (d.stats.generated_tokens, d.stats.prompt_tokens) == (18, 10), "both calls"
    assert d.stats.row_steps == 2 * figures["row_steps"]


@pytest.mark.parametrize("on_device", [False, True])
def test_tokens_of_all_models_share_the_time(
    trio: System, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three models: a prompt of nine tokens is fed in two parts of four, beside a row that decodes."""
    if on_device:
        as_on_a_device(monkeypatch)
    heard = list[tuple[int, ...]]()
    for name in ("together", "collected"):
        monkeypatch.setattr(PrefillShare, name, lambda self, *fed: heard.append(fed) or 0.0)
    d = decoder(trio, speculation=Speculation(k=0))
    engine = Engine(d.ensemble, max_rows=2, prefill_tokens=4)

    def submit(prompt: int, most: int) -> None:
        engine.submit(Request({name: (5,) * prompt for name in d.loaded}, 0, most, sampling=NINE))

    submit(3, 30)
    engine.step(), engine.step(), engine.step()
    submit(9, 30)
    heard.clear()
    for _ in range(5):
        engine.step()
    engine.close()
    if on_device:
        assert set(heard) == {(3,), (6,)} and heard == sorted(heard), "a row, then two"
    else:
        assert heard == [(12, 3), (12, 3), (0, 6), (0, 6), (0, 6)]


def test_figures_of_texts_that_are_scored(trio: System) -> None:
    """The prompt counts with its first text; the time is shared by the alphas."""
    d, seen = decoder(trio), list[WorkSoFar]()
    alphas, found = [parse_alpha(0), parse_alpha(2), parse_alpha(0.5)], []
    asked = [example("abc", 0), example("de", 1)]
    for alpha, completion in d.likelihood_sweep(asked, lambda e: ("xy", "z"), alphas):
        found.append((alpha, completion))
        seen.append(d.work())
    assert [alpha for alpha, _ in found] == alphas * 4
    tokens = [(c.took.prompt_tokens, c.took.generated_tokens) for _, c in found]
    assert tokens == [pair for pair in [(4, 2), (0, 1), (3, 2), (0, 1)] for _ in alphas]
    assert (d.stats.prompt_tokens, d.stats.generated_tokens) == (7, 6)
    assert sum(c.took.seconds for _, c in found) == pytest.approx(d.stats.seconds, rel=0.5)
    assert all(c.took == replace(Took(), **vars(c.took)) and c.took.api_calls == 0 for _, c in found)
    works = [(work.finished, work.unread, work.scoring) for work in seen]
    assert works == [
        pair for pair in [(1, 3, True), (2, 2, True), (3, 1, True), (4, 0, True)] for _ in alphas
    ]
    [(_, alone)] = d.likelihood_sweep(asked[:1], lambda e: ("xy",), [parse_alpha(0.5)])
    assert alone.logprob == pytest.approx(found[2][1].logprob, abs=1e-9)
    assert found[0][1].logprob != pytest.approx(found[1][1].logprob, abs=1e-6)


def test_what_this_process_takes(trio: System, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = {"base": RoleMemory(weights=5, kv_peak=7), "expert": RoleMemory(weights=6, kv_peak=8)}
    monkeypatch.setattr(Decoder, "memory", memory)
    monkeypatch.setattr("proxytune.decoding.interface.process_peak", lambda: 99)
    assert decoder(trio).place("x") == {"process_peak": 99, "kv_peak": {"base": 7, "expert": 8}}
    assert decoder(trio).workers == {}


@pytest.mark.parametrize(
    ("options", "speculation", "rows"),
    [
        ({}, Speculation(k=None), MAX_ROWS),
        ({"speculate": "off", "batch": 3}, Speculation(k=0), 3),
        ({"speculate": 4, "drafter": LOOKUP}, Speculation(k=4, drafter=LOOKUP), MAX_ROWS),
    ],
)
def test_options_are_those_of_the_engine(
    trio: System,
    options: dict[str, Any],
    speculation: Speculation,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = list[int]()
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    models = decoder(trio, "base").models
    d = Decoder(models, "base", DecodeOptions(**options))
    assert d.speculation == speculation and d.max_batch == rows == d.engine().scheduler.max_rows
    assert threads == [] and d.engine().scheduler.prefill_tokens == 2048
    Decoder(models, "base", DecodeOptions(threads=3))
    assert threads == [3]
    tight = Decoder(models, "base", DecodeOptions(kv_memory=10**7))
    assert tight._pool == tight.beside().runners["base"].rows.capacity == 10**7 // kv(tight)
    asked = list[int]()
    monkeypatch.setattr(Decoder, "_runner", lambda self, model, pool: asked.append(pool))
    monkeypatch.setattr(Decoder, "_ensemble", lambda self, runners: runners)
    tight.head = replace(tight.head, module=OnAGpu())  # type: ignore[arg-type]
    for tight._pool in (SMALL_POOL + 1, SMALL_POOL - 1):
        tight.beside()
    assert asked == [SMALL_POOL, SMALL_POOL - 1]


def test_captured_steps_are_kept_by_all_that_they_depend_on(trio: System) -> None:
    """What drafts, how, and what of it is traced."""
    ensemble = decoder(trio).ensemble
    ensemble.forget_graphs()

    def propose(keys: Tensor, positions: Tensor) -> Tensor:
        return keys

    plain = ensemble.graphs((), None)
    others = [
        ensemble.graphs(("expert",), None),
        ensemble.graphs((), propose),
        ensemble.graphs((), None, trace=True),
        ensemble.graphs((), None, trace=True, ranked=2),
    ]
    assert ensemble.graphs((), None) is plain and len({id(one) for one in (plain, *others)}) == 5
    assert ensemble.graphs_made == 0
    ensemble.forget_graphs()
    assert ensemble.graphs((), None) is not plain


def test_which_models_draft(trio: System) -> None:
    """The first expert unless another is named; none where prompt lookup alone drafts."""
    ensemble = decoder(trio).ensemble
    assert ensemble.draft_models() == ensemble.draft_models("expert") == ("expert",)
    assert ensemble.draft_models(LOOKUP) == () == decoder(trio, "base").ensemble.draft_models()
    with pytest.raises(UserError, match="no expert 'base' to draft: choose expert or lookup"):
        ensemble.draft_models("base")
    assert ensemble.watchers == ("base", "expert", "antiexpert", "proxy") and ensemble.measured == ()
    assert replace(ensemble, reference="expert").measured == ("proxy", "base")


def kv(d: Decoder) -> int:
    """Bytes of keys and values for a token of the base."""
    family = d.loaded["base"].family
    return sum(layer.numbers for layer in family.layers) * 8


class OnAGpu:
    """What says that it is on a GPU."""

    def get_input_embeddings(self) -> Any:
        return self

    @property
    def weight(self) -> Any:
        return self

    device = torch.device("cuda")


def test_a_call_has_no_work_before_it_begins(trio: System) -> None:
    d = Decoder(Models(trio), "base", DecodeOptions())
    assert d.work() == WorkSoFar() and not d.cancel("x")
    asked, three = [example("abc", 0), example("de", 1)], Sampling(max_new_tokens=3, min_new_tokens=3)
    stream = d.stream(asked, three)
    next(stream)
    works = [d.work()]
    list(stream)
    texts = d.likelihoods(asked, lambda e: ("x", "y"))
    next(texts)
    works.append(d.work())
    list(texts)
    assert [(w.finished, w.finished_tokens, w.unread, w.scoring) for w in works] == [
        (2, 6, 0, False),
        (1, 0, 3, True),
    ], "of the call that goes on, whichever came before"
    assert decoders.PREFILL_TOKENS == {"cpu": 2048, "cuda": 512}


def test_a_templates_words_are_of_one_short_line() -> None:
    assert _line(" \na\u0007b\nc") == "a\\x07b" and _line("x" * 301) == "x" * 300
    assert _line(" \n") == "no reason given"
