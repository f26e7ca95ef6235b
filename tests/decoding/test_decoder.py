"""The engine against the plain definition: tokens of every path must be the oracle's, in float64, token for
token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxytune.config import ExpertSpec, Sampling, System, parse_alpha
from proxytune.decoding.decoder import Decoder
from proxytune.decoding.kv_pools import kv_budget, pool_tokens
from proxytune.engine.cuda import reserve
from proxytune.engine.request import Work
from proxytune.engine.runners.runner import ModelRunner
from proxytune.engine.speculative.drafter import Speculation
from proxytune.errors import UserError
from proxytune.models.roles import Models
from proxytune.records import Example, Prompt
from tests.support import decoders, tiny
from tests.support.decoders import SAMPLERS, by_id, check, decoder, example, kv_bytes, plain, ragged
from tests.support.memory import leave_free
from tests.support.tiers import examples
from tests.support.tiny import spec

SPECULATIONS = {"plain": Speculation(k=0), "drafts of 3": Speculation(k=3), "adaptive": Speculation()}


@pytest.fixture(params=SPECULATIONS, autouse=True)
def speculation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test of this file holds without speculation and with it."""
    monkeypatch.setattr(decoders, "speculation", SPECULATIONS[request.param])
    return str(request.param)


@pytest.mark.thorough
@pytest.mark.every(3)
def test_hundred_ragged_prompts_greedy(trio: System) -> None:
    check(decoder(trio), ragged(examples(40, 100)), Sampling(max_new_tokens=12))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.every(3)
def test_sampled(trio: System, sampler: dict[str, Any]) -> None:
    check(decoder(trio), ragged(12, 1), Sampling(max_new_tokens=10, seed=3, **sampler))


@pytest.mark.parametrize("alpha", ["0.4", "2", "first:3", "warmup:2", "linear:0:1.5:6"])
@pytest.mark.every(3)
def test_alpha_schedules(trio: System, alpha: str) -> None:
    check(decoder(trio), ragged(10, 2), Sampling(max_new_tokens=10), alpha)


@pytest.mark.every(3)
def test_samples_of_one_prompt_share_it_and_differ(trio: System, layout: str) -> None:
    d = decoder(trio, batch=3)
    found = check(d, ragged(4, 5), Sampling(max_new_tokens=8, temperature=1.0, n=5))
    assert len({c.token_ids for c in found if c.example_id == "0"}) > 1
    assert d.stats.prompt_tokens > 0


def test_prompt_kv_is_computed_once_for_all_samples(trio: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is fed each prompt once, and then one token per step and sample: nothing twice."""
    d = decoder(trio, batch=7, speculation=Speculation(k=0))
    fed: dict[int, int] = {}
    forward = ModelRunner.forward

    def count(self: ModelRunner, work: Work) -> torch.Tensor:
        fed[id(self)] = fed.get(id(self), 0) + sum(len(segment.ids) for segment in work.segments)
        return forward(self, work)

    monkeypatch.setattr(ModelRunner, "forward", count)
    examples = ragged(3, 5)
    found = list(d.stream(examples, Sampling(max_new_tokens=6, temperature=1.0, n=10)))
    prompts = sum(len(d.contexts(e.prompt)["base"]) - 1 for e in examples)
    responses = sum(len(c.token_ids) for c in found)
    assert set(fed.values()) == {prompts + responses}


def test_prompts_that_begin_alike_share_the_beginning_and_change_nothing(trio: System, layout: str) -> None:
    """Few-shot examples, then questions of different lengths, two of them equal; with room, and without."""
    shots = "Question: one?\nAnswer: two.\n\n"
    examples = [example(f"{shots}{'Why? ' * (n % 3)}{n % 4}", n) for n in range(5)]
    s = Sampling(max_new_tokens=6, temperature=0.8)
    free = by_id(check(decoder(trio, batch=3), examples, s))
    tight = by_id(list(decoder(trio, kv_memory=kv_bytes(decoder(trio), 110)).stream(examples, s)))
    assert {k: c.token_ids for k, c in tight.items()} == {k: c.token_ids for k, c in free.items()}


def test_long_prompts_attend_through_torch_and_decode_through_the_kernel(
    trio: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one forward with short ones."""
    monkeypatch.setattr("proxytune.engine.attention.packed.MOST_TOKENS", 8)
    check(decoder(trio, batch=5), ragged(12, seed=5), Sampling(max_new_tokens=9))


def test_without_a_compiler_a_note_says_so(trio: System, monkeypatch: pytest.MonkeyPatch) -> None:
    assert decoder(trio).notes() == []
    monkeypatch.setattr("proxytune.decoding.remarks.why_not", lambda: "no C++ compiler found")
    [note] = decoder(trio).notes()
    assert "slower" in note and "no C++ compiler found" in note


@pytest.mark.every(3)
def test_preemption_under_a_tiny_pool_changes_nothing(trio: System, layout: str) -> None:
    examples, s = ragged(10, 6, longest=12), Sampling(max_new_tokens=40, temperature=0.8)
    free = by_id(list(decoder(trio).stream(examples, s)))
    d = decoder(trio, kv_memory=kv_bytes(decoder(trio), 160))
    tight = by_id(list(d.stream(examples, s)))
    assert d.stats.preemptions > 0
    assert {k: c.token_ids for k, c in tight.items()} == {k: c.token_ids for k, c in free.items()}


@pytest.mark.every(3)
def test_alone_in_any_batch_in_any_order(trio: System, layout: str) -> None:
    examples, s = ragged(9, 7), Sampling(max_new_tokens=9, temperature=1.0, seed=11)
    want = {e.id: next(iter(decoder(trio).stream([e], s))).token_ids for e in examples}
    for batch in (1, 4, 64):
        for order in (examples, examples[::-1]):
            got = {c.example_id: c.token_ids for c in decoder(trio, batch=batch).stream(order, s)}
            assert got == want


def test_stop_strings_end_rows_in_the_middle_of_a_batch(trio: System) -> None:
    d, examples = decoder(trio), ragged(12, 8)
    free = {c.example_id: c for c in d.stream(examples, Sampling(max_new_tokens=24, temperature=1.0))}
    stop = next(c.text[5:7] for c in free.values() if len(c.text) > 8)
    found = check(d, examples, Sampling(max_new_tokens=24, temperature=1.0, stop=(stop,)))
    assert any(c.finish_reason == "stop" for c in found)
    for c in found:
        assert stop not in c.text
        assert c.text == free[c.example_id].text.split(stop)[0]


CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


@pytest.mark.parametrize("chat", ["llama2", "tokenizer"])
def test_chat_expert_sees_its_own_context(trio: System, tmp_path: Path, chat: str) -> None:
    words = tiny.tokenizer(chat_template=CHAT)
    expert = spec(tiny.save(tmp_path / "expert", tiny.build("llama", 2), words), chat)
    system = trio.model_copy(update={"expert": expert, "tuned": expert})
    examples = [
        Example(
            str(i),
            Prompt(
                f"{q}\nAnswer:",
                user=f"Say: {q}",
                system="Be kind." if i % 2 else None,
                response_prefix="Answer:",
            ),
        )
        for i, q in enumerate(["why?", "what is 3?", "ab Answer: c"])
    ]
    check(decoder(system), examples, Sampling(max_new_tokens=8))
    check(decoder(system, "tuned"), examples, Sampling(max_new_tokens=8))


def test_alpha_zero_is_the_base_of_hugging_face(trio: System) -> None:
    d, examples = decoder(trio), ragged(6, 9)
    found = {c.example_id: c for c in d.stream(examples, Sampling(max_new_tokens=12), alpha=parse_alpha(0))}
    base = plain(d, "base")
    for e in examples:
        ids = torch.tensor([d.contexts(e.prompt)["base"]])
        out = base.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=2
        )
        assert out[0, ids.shape[1] :].tolist() == list(found[e.id].token_ids)


def test_equal_expert_and_antiexpert_change_nothing(trio: System) -> None:
    same = trio.model_copy(update={"antiexpert": trio.expert})
    examples, s = ragged(6, 10), Sampling(max_new_tokens=10, temperature=0.7)
    base = {c.example_id: c.token_ids for c in decoder(trio, "base").stream(examples, s)}
    assert {c.example_id: c.token_ids for c in decoder(same).stream(examples, s)} == base


def test_trace_records_and_changes_nothing(trio: System) -> None:
    d, examples, s = decoder(trio), ragged(5, 11), Sampling(max_new_tokens=10, temperature=1.0)
    bare = {c.example_id: c for c in d.stream(examples, s)}
    for c in d.stream(examples, s, trace="tokens"):
        assert c.token_ids == bare[c.example_id].token_ids and not bare[c.example_id].trace
        assert [t.id for t in c.trace] == list(c.token_ids)
        assert all(set(t.probability) == {"base", "expert", "antiexpert", "proxy"} for t in c.trace)
        logprob = sum(torch.tensor(t.probability["proxy"], dtype=torch.float64).log().item() for t in c.trace)
        assert logprob == pytest.approx(c.logprob, abs=1e-9)


def test_several_experts(trio: System, tmp_path: Path) -> None:
    other = tiny.save(tmp_path / "other", tiny.build("llama", 5))
    own = tiny.save(tmp_path / "own", tiny.build("llama", 6))
    assert trio.expert is not None
    experts = (
        ExpertSpec(**trio.expert.model_dump(), weight=0.7),
        ExpertSpec(model=str(other), dtype="float64", weight=0.5, antiexpert=spec(own)),
    )
    check(
        decoder(trio.model_copy(update={"expert": None, "experts": experts})),
        ragged(6, 12),
        Sampling(max_new_tokens=8),
    )


def test_forced_opener_then_own_choice(trio: System) -> None:
    found = list(decoder(trio, "base").stream(ragged(3, 13), Sampling(max_new_tokens=8), forced=" ok"))
    assert all(c.text.startswith(" ok") and len(c.token_ids) > 3 for c in found)


def test_context_window_bounds_prompt_and_response(trio: System) -> None:
    d = decoder(trio)
    last = next(iter(d.stream([example("a" * 250)], Sampling(max_new_tokens=50, min_new_tokens=50))))
    assert last.finish_reason == "length" and len(last.token_ids) == 256 - 251
    with pytest.raises(UserError, match=r"301 tokens for the base, whose context window is 256"):
        list(d.stream([example("a" * 300)], Sampling()))


def test_prompt_that_no_pool_can_hold(trio: System) -> None:
    d = decoder(trio, kv_memory=kv_bytes(decoder(trio), 40))
    with pytest.raises(UserError, match=r"needs KV memory for 71 tokens of the base, but its pool holds 40"):
        list(d.stream([example("a" * 50)], Sampling(max_new_tokens=20)))
    with pytest.raises(UserError, match="--kv-memory"):
        decoder(trio, kv_memory=10)


@pytest.mark.thorough
@settings(
    max_examples=examples(4, 10), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(0, 25), min_size=1, max_size=7),
    limit=st.integers(1, 14),
    batch=st.integers(1, 5),
    pool=st.integers(80, 200),
    samples=st.integers(1, 3),
    temperature=st.sampled_from([0.0, 0.9]),
    stop=st.sampled_from([(), ("e",), ("a", "\n")]),
)
@pytest.mark.every(3)
def test_lengths_stops_and_pools(
    trio: System,
    layout: str,
    lengths: list[int],
    limit: int,
    batch: int,
    pool: int,
    samples: int,
    temperature: float,
    stop: Any,
) -> None:
    """Whatever the raggedness, the stops, the batch and the pool: the tokens are those of the roomy
    decoder."""
    examples = [
        example("abc? " * 5 + "x" * n, i) if n > 20 else example("q" * n, i) for i, n in enumerate(lengths)
    ]
    s = Sampling(max_new_tokens=limit, temperature=temperature, n=samples, stop=stop)
    roomy = by_id([c for e in examples for c in decoder(trio).stream([e], s)])
    tight = decoder(trio, batch=batch, kv_memory=kv_bytes(decoder(trio), pool))
    found = by_id(list(tight.stream(examples, s)))
    assert found.keys() == roomy.keys()
    for where, c in found.items():
        want = roomy[where]
        assert (c.token_ids, c.finish_reason, c.text) == (want.token_ids, want.finish_reason, want.text)
        assert c.logprob == pytest.approx(want.logprob, abs=1e-9)


def test_the_proxy_also_ends_where_the_expert_does(trio: System, tmp_path: Path) -> None:
    """A chat expert ends its turn with a token of its own; the base's end-of-sequence alone would let it
    ramble."""
    model = tiny.build("llama", 2)
    model.generation_config.eos_token_id = [40, 2]  # type: ignore[union-attr]
    system = trio.model_copy(update={"expert": spec(tiny.save(tmp_path / "expert", model))})
    found = list(decoder(system).stream(ragged(40), Sampling(max_new_tokens=60, temperature=2.0)))
    ended = [c for c in found if 40 in c.token_ids]
    assert ended and all(
        c.finish_reason == "eos" and c.token_ids.index(40) == len(c.token_ids) - 1 for c in ended
    )


def test_an_end_that_is_an_ordinary_token_is_not_in_the_text(trio: System, tmp_path: Path) -> None:
    """Generation settings may end a response at a full stop: a special token is left out of the text by the
    tokenizer, this one only by us."""
    model = tiny.build("llama", 1, **tiny.ROLES["base"][1])
    model.generation_config.eos_token_id = [40, 41, 42, 43]  # type: ignore[union-attr]
    system = trio.model_copy(update={"base": spec(tiny.save(tmp_path / "base", model))})
    d = decoder(system)
    shown = {token: d.text_of([token]) for token in (40, 41, 42, 43)}
    assert all(len(text) == 1 for text in shown.values())
    pieces: dict[str, str] = {}

    def hear(name: str, sample: int, piece: str) -> None:
        pieces[name] = pieces.get(name, "") + piece

    s = Sampling(max_new_tokens=60, temperature=2.0)
    found = list(d.stream(ragged(30), s, trace="tokens", on_text=hear))
    ended = [c for c in found if c.finish_reason == "eos" and c.token_ids[-1] in shown]
    assert len(ended) > 5
    for c in ended:
        assert c.text == d.text_of(c.token_ids[:-1]) == pieces.get(c.example_id, "")
        assert d.text_of(c.token_ids) == c.text + shown[c.token_ids[-1]]
        assert len(c.trace) == len(c.token_ids) and c.trace[-1].id == c.token_ids[-1]


def test_the_pools_take_their_share_of_what_is_free(trio: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the CPU's free memory, which other programs need too. All pools together, and never more than
    every row's window."""
    d, asked = decoder(trio, batch=64), list[torch.device]()
    per_token = kv_bytes(d, 1)
    free = 1000 * per_token

    def free_memory(where: torch.device) -> int:
        asked.append(where)
        return free

    monkeypatch.setattr("proxytune.decoding.kv_pools.free_memory", free_memory)
    assert pool_tokens(d.loaded, 64, None) == 500 and asked == [torch.device("cpu")]
    assert pool_tokens(d.loaded, 64, 10 * per_token) == 10 and len(asked) == 1
    free = 10**6 * per_token
    assert pool_tokens(d.loaded, 64, None) == 64 * d.loaded["base"].family.window
    free = 1
    with pytest.raises(UserError, match="raise --kv-memory"):
        pool_tokens(d.loaded, 64, None)


@pytest.mark.parametrize(("free", "left"), [(10**12, 850 * 10**9 - reserve(12)), (10**6, 725_000)])
def test_on_a_gpu_activations_and_graphs_need_the_rest(
    free: int, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """85% of what is free, without what the graphs take; they get an eighth at most."""
    monkeypatch.setattr("proxytune.decoding.kv_pools.free_memory", lambda where: free)
    assert kv_budget(torch.device("cuda"), 12) == left
    assert kv_budget(torch.device("cuda"), 0) == int(0.85 * free)


def test_models_that_do_not_fit_together_are_refused_before_loading(
    trio: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_free(monkeypatch, 500_000)
    with pytest.raises(UserError, match=r"base 0\.0 \+ expert 0\.0 \+ antiexpert 0\.0 = .* are free"):
        Decoder(Models(trio), "proxy")
