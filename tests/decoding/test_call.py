"""What a call counts and says of itself, by hand: time shared out to responses, what is open, what is cut
short, what is noted beside figures."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from proxytune.config import Sampling, parse_alpha
from proxytune.decoding import kv_pools, remarks
from proxytune.decoding.call import DecodeStats, RunningStream, Scored, ScoringTexts, Tag
from proxytune.decoding.completions import NOT_NUMBERS, ResultReader, failed, scored, token_text
from proxytune.decoding.conversations import Conversation
from proxytune.decoding.kv_pools import kv_budget, pool_tokens
from proxytune.decoding.open_batch.batch import ScoredText, prefix_of
from proxytune.decoding.prompts import bare, continued, opened
from proxytune.decoding.response_text import ResponseText
from proxytune.decoding.stop_strings import StopStrings
from proxytune.engine import Request, Result
from proxytune.engine.cuda import FUSED_LAYER, OTHER_LAYER, reserve
from proxytune.engine.engine import Counts
from proxytune.engine.request import Row, RowCounts, TokenTrace
from proxytune.errors import UserError
from proxytune.records import Completion, Example, Prompt, Took
from proxytune.terminal import WorkSoFar
from tests.support import tiny

ONE = parse_alpha(1)
WORDS = tiny.tokenizer()
TEXT = ResponseText(WORDS)
A, B = (WORDS.get_vocab()[letter] for letter in "ab")


class FakeEngine:
    """An engine that only counts."""

    def __init__(self) -> None:
        self.counts, self.gone = Counts(), list[int]()
        self.scheduler = SimpleNamespace(rows=list[Row](), waiting=list[Row](), preemptions=0)
        self.submitted = 0

    def submit(self, request: Request) -> int:
        self.submitted += 1
        return self.submitted

    def cancel(self, ticket: int) -> bool:
        self.gone.append(ticket)
        return ticket != 2


def request(name: str, prompt: int = 3, sample: int = 0, most: int = 9, **more: Any) -> Request:
    contexts = {"base": (5,) * prompt, "expert": (5,) * (2 * prompt)}
    tag = Tag(Example(name, Prompt("", "")), sample, ONE)
    return Request(contexts, key=0, max_new_tokens=most, tag=tag, **more)


def row(made: Request, tokens: int) -> Row:
    return Row(made, ticket=0, prompt=0, ids={}, tokens=[7] * tokens)


def result(made: Request, tokens: tuple[int, ...], reason: str = "length", **more: Any) -> Result:
    return Result(made, tokens, reason, more.pop("logprob", -1.5), more.pop("trace", ()), **more)


def stream() -> tuple[Any, RunningStream]:
    engine: Any = FakeEngine()
    return engine, RunningStream(engine)


def test_time_goes_to_responses_by_their_tokens() -> None:
    """Prompts of 2, 6 and 4 tokens were begun; 10 seconds of prefill and 20 of decoding, in which 40 tokens
    were generated. One response ends with 8 of them; then two, with 6 and 26, and take all that is left."""
    engine, running = stream()
    engine.scheduler.rows = [row(request("b", 6), 5), row(request("c", 4), 9)]
    engine.counts = Counts(seconds=30.0, prefill_seconds=10.0, generated_tokens=40)
    counts = RowCounts(row_steps=5, drafted=4, examined=3, accepted=2, preemptions=1)
    [first] = running.took([result(request("a", 2), (7,) * 8, counts=counts)], "base")
    prefill, decode = 10 * 2 / 12, 20 * 8 / 40
    assert first == Took(
        seconds=pytest.approx(prefill + decode),
        prefill_seconds=pytest.approx(prefill),
        prompt_tokens=2,
        generated_tokens=8,
        row_steps=5,
        drafted=4,
        examined=3,
        accepted=2,
        preemptions=1,
    )
    engine.scheduler.rows = []
    engine.counts = Counts(seconds=50.0, prefill_seconds=16.0, generated_tokens=40)
    ended = [result(request("b", 6), (7,) * 6), result(request("c", 4), (7,) * 26)]
    second, third = running.took(ended, "base")
    left = 16 - prefill, (50 - 16) - decode
    assert second.prefill_seconds == pytest.approx(left[0] * 6 / 10)
    assert second.seconds == pytest.approx(left[0] * 6 / 10 + left[1] * 6 / 32)
    assert sum(one.seconds for one in (first, second, third)) == pytest.approx(50.0)
    assert sum(one.prefill_seconds for one in (first, second, third)) == pytest.approx(16.0)
    assert running.shared.generated_tokens == 40 and third.prompt_tokens == 4


def test_what_is_known_of_a_stream() -> None:
    engine, running = stream()
    engine.counts = Counts(seconds=30.0, prefill_seconds=12.0)
    engine.scheduler.rows = [row(request("a", most=50), 5), row(request("b", most=60), 0)]
    engine.scheduler.waiting = [row(request("c", most=70), 0), row(request("d", most=80), 3)]
    running.ended(result(request("x"), (1, 2)))
    running.ended(result(request("y"), (1, 2, 3)))
    assert running.work() == WorkSoFar(
        finished=2,
        finished_tokens=5,
        open=((5, 50), (0, 60), (0, 70), (3, 80)),
        unread=1,  # one of those that wait was preempted: its prompt was read
        decode_seconds=18.0,
        prefill_seconds=12.0,
    )


def test_responses_are_cancelled_by_their_names() -> None:
    """All of an example, or one; under every alpha. Every ticket is tried, also after one that had ended."""
    engine, running = stream()
    for name, sample in [("a", 0), ("a", 1), ("a", 0), ("b", 0)]:
        running.submit(request(name, sample=sample))
    assert running.cancel("a", 0) and engine.gone == [1, 3]
    assert not running.cancel("a", 1) and engine.gone == [1, 3, 2]
    assert running.cancel("a", None) and engine.gone[3:] == [1, 3, 2]
    assert not running.cancel("c", None) and not running.cancel("b", 1) and len(engine.gone) == 6


def test_figures_of_several_calls_add_up() -> None:
    engine: Any = FakeEngine()
    engine.scheduler.preemptions = 3
    engine.counts = Counts(1.0, 0.5, 10, 20, 30, 40, 50, 60)
    before = DecodeStats(2.0, 0.25, 1, 2, 7, 3, 4, 5, 6)
    assert before.after(engine) == DecodeStats(
        seconds=3.0,
        prefill_seconds=0.75,
        prompt_tokens=11,
        generated_tokens=22,
        preemptions=10,
        row_steps=33,
        drafted=44,
        examined=55,
        accepted=66,
    )


def test_what_is_known_of_texts_that_are_scored() -> None:
    texts = ScoringTexts(5)
    texts.add(2.0, ended=True), texts.add(0.5, ended=False), texts.add(1.0, ended=True)
    assert texts.work() == WorkSoFar(finished=2, unread=3, prefill_seconds=3.5, scoring=True)
    tag = Scored(Example("q", Prompt("", "")), 2, "x")
    assert repr(tag) == "q, text 3" and repr(request("q").tag) == "q"
    assert scored(tag, (4, 5), -2.5, Took(seconds=1.0)) == Completion(
        "q", 2, "x", (4, 5), "length", -2.5, took=Took(seconds=1.0)
    )
    broken = scored(tag, (4,), math.nan, Took())
    assert (broken.finish_reason, broken.remark, broken.sample) == ("nan", NOT_NUMBERS, 2)
    none = failed("q", 3, "why", "x")
    assert (none.example_id, none.sample, none.text, none.token_ids) == ("q", 3, "x", ())
    assert (none.finish_reason, none.remark) == ("template", "why") and math.isnan(none.logprob)


def reader(alone: bool = False, **windows: int) -> ResultReader:
    return ResultReader(StopStrings(TEXT, ("!",)), windows or {"base": 99}, alone)


def read(found: Result, by: ResultReader) -> Completion:
    return by.completion(found, "e", 4, Took(seconds=2.0))


def test_a_result_as_a_completion() -> None:
    """Its last token is no text where it is an end of sequence, and stays where it is a stop."""
    for reason, text in (("eos", "a"), ("stop", "ab"), ("length", "ab")):
        asked = request("e", sampling=Sampling(max_new_tokens=2))
        made = read(result(asked, (A, B), reason), reader())
        assert (made.text, made.token_ids, made.finish_reason, made.remark) == (text, (A, B), reason, None)
        assert (made.example_id, made.sample, made.logprob, made.took.seconds) == ("e", 4, -1.5, 2.0)
    assert read(result(request("e"), (), "nan"), reader()).remark == NOT_NUMBERS


@pytest.mark.parametrize(
    ("tokens", "reason", "cut"), [(4, "length", True), (5, "length", False), (4, "stop", False)]
)
def test_the_window_that_was_full_is_that_with_the_least_room(tokens: int, reason: str, cut: bool) -> None:
    """The base has 30 - 10 tokens left, the expert 35 - 20, though its window is the larger."""
    asked = request("e", 10, sampling=Sampling(max_new_tokens=5))
    made = read(result(asked, (A,) * tokens, reason), reader(base=30, expert=35))
    want = "the context window of the expert (35 tokens) was full before 5 new tokens"
    assert made.remark == (want if cut else None)


@pytest.mark.parametrize("alone", [False, True])
def test_traces_name_tokens_by_their_texts(alone: bool) -> None:
    """Of a model by itself there is no proxy."""
    trace = TokenTrace(A, 0.25, {"base": 0.5, "proxy": 0.75}, {"base": B, "proxy": 2}, {"base": 0.125})
    [found] = read(result(request("e"), (A,), trace=(trace,)), reader(alone)).trace
    assert (found.text, found.id, found.alpha, found.divergence) == ("a", A, 0.25, {"base": 0.125})
    assert found.probability == ({"base": 0.5} if alone else {"base": 0.5, "proxy": 0.75})
    assert found.top == ({"base": "b"} if alone else {"base": "b", "proxy": "</s>"})
    half = WORDS.encode("é", add_special_tokens=False)[0]
    assert token_text(TEXT, half) == WORDS.convert_ids_to_tokens(half), "a part of a letter has a name"


# Notes


def stored(reason: str, text: str = "x", remark: str | None = None) -> dict[str, Any]:
    made = Completion("e", 0, text, (1, 2, 3), reason, -1.0, remark=remark)  # type: ignore[arg-type]
    return remarks.stored_response(made)


def test_responses_as_they_are_stored() -> None:
    assert stored("stop") == {"text": "x", "finish_reason": "stop", "tokens": 3}
    assert stored("nan", "", "why") == {"text": "", "finish_reason": "nan", "tokens": 3, "remark": "why"}


def test_notes_on_responses() -> None:
    """The most frequent reason of each kind; a length without a remark is what was asked for."""
    rows = [stored("length", remark="w1"), *[stored("length", remark="w2")] * 2, stored("length")]
    rows += [stored("template", "", "t"), stored("nan", "", "n"), stored("unseen", "", "u"), stored("eos")]
    assert remarks.notes_on(rows) == [
        "1 of 8 responses were not asked: t",
        "1 of 8 responses were broken off: n",
        "1 of 8 responses were left out: u",
        "3 of 8 responses were cut short: w2",
    ]
    # faults do not count among the empty ones: two of four sound ones are half, and three are more
    half = [stored("eos", ""), stored("eos", " \n"), stored("eos"), stored("stop"), stored("nan", "")]
    assert remarks.notes_on(half) == [] == remarks.notes_on([])
    [note] = remarks.notes_on([*half, stored("stop", "")])
    assert note.startswith("3 of 6 responses are empty: a model that was tuned on a chat template may end")


def test_notes_on_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(path: str, device: str = "cpu", *notes: str) -> Any:
        family, where = SimpleNamespace(path=path, reason="it is odd"), torch.device(device)
        return SimpleNamespace(family=family, device=where, module=SimpleNamespace(device=where), notes=notes)

    monkeypatch.setattr(remarks, "why_not", lambda: "no compiler")
    monkeypatch.setattr(remarks.cpu_load, "advice", lambda threads, load: "busy")
    slow = "the base takes the slow exact path (one row at a time): it is odd"
    torches = "attention on the CPU goes through torch, which is slower: no compiler"
    both = {"base": loaded("reference", "cpu", "n1"), "expert": loaded("packed", "cpu", "n2", "n3")}
    assert remarks.notes_on_models(both) == [slow, "n1", "n2", "n3", torches, "busy"]
    assert remarks.notes_on_models({"base": loaded("reference")}) == [slow, "busy"]
    assert remarks.notes_on_models({"base": loaded("packed", "meta")}) == []
    mixed = {"a": loaded("packed", "meta"), "b": loaded("packed")}
    assert remarks.notes_on_models(mixed) == [torches]


# Pools


def pool(numbers: tuple[int, ...], devices: tuple[str, ...], window: int, fused: bool = False) -> Any:
    layers = tuple(SimpleNamespace(numbers=number) for number in numbers)
    family = SimpleNamespace(
        path="packed",
        layers=layers,
        devices=tuple(map(torch.device, devices)),
        dtype=torch.bfloat16,
        window=window,
        llama_forward="it" if fused else None,
    )
    return SimpleNamespace(family=family)


def test_pools_of_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 a token takes 2 * (10 + 4) bytes on one device and 2 * 6 on the other, which has the
    least room for what it needs."""
    free = {"cuda:0": 2800, "cuda:1": 600}
    seen = list[tuple[str, int]]()

    def budget(device: torch.device, kernels: int) -> int:
        seen.append((str(device), kernels))
        return free[str(device)]

    monkeypatch.setattr(kv_pools, "kv_budget", budget)
    a = pool((10, 6), ("cuda:0", "cuda:1"), 70, fused=True)
    b = pool((4,), ("cuda:0",), 60)
    reference = SimpleNamespace(family=SimpleNamespace(path="reference", window=90, layers=()))
    loaded = {"base": a, "expert": b, "antiexpert": reference}
    assert pool_tokens(loaded, 128, None) == 600 // 12
    assert seen == [("cuda:0", 0), ("cuda:1", 0)], "on several devices there are no graphs"
    free["cuda:1"] = 2400
    assert pool_tokens(loaded, 128, None) == 2800 // 28, "of the larger one, since it needs more"
    free["cuda:1"] = 10**9
    assert pool_tokens(loaded, 128, None) == 2800 // 28
    assert pool_tokens(loaded, 1, None) == 60, "no more than a row needs, by the shortest window"
    assert pool_tokens(loaded, 3, 10**9) == 3 * 60 and pool_tokens(loaded, 99, 4000) == 4000 // 40
    assert pool_tokens({"antiexpert": reference}, 2, None) == 180
    assert pool_tokens(loaded, 9, 2 * 40) == 2
    seen.clear()
    pool_tokens({"base": pool((3, 3), ("cuda:0",) * 2, 70, fused=True), "expert": b}, 2, None)
    assert seen == [("cuda:0", 2 * FUSED_LAYER + OTHER_LAYER)]
    with pytest.raises(UserError) as raised:
        pool_tokens({"base": a, "expert": b}, 9, 79)
    assert str(raised.value).startswith(
        "KV memory of 0.000 GiB holds 1 tokens at 40 bytes each for base, exp"
    )
    with pytest.raises(UserError, match=r"KV memory of 2\.500 GiB holds 1 tokens at"):
        pool_tokens({"base": pool((10**9,), ("cuda:0",), 9)}, 9, 5 * 2**29)


def test_shares_of_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_pools, "free_memory", lambda device: 1001)
    assert kv_budget(torch.device("cpu"), 9) == 500
    monkeypatch.setattr(kv_pools, "free_memory", lambda device: 10**11)
    assert kv_budget(torch.device("cuda"), 3) == 85 * 10**9 - reserve(3)


# Texts


def test_a_conversation_as_plain_text() -> None:
    """Where there is white space already, no more is put in."""
    said = (("system", "Be kind."), ("user", "a\n"), ("assistant", "b"), ("user", "\tc"))
    assert Conversation(said).plain == "Be kind.\n\na\nb\tc"
    begun = Conversation((("user", "a"), ("assistant", "b"), ("user", "c")), "So")
    assert begun.plain == "a b\n\nc So"
    assert begun.prompt == Prompt("a b\n\nc So", "c", response_prefix="So", messages=begun.messages)
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "It"}]
    assert Conversation.of(messages, begun=True) == Conversation((("user", "q"),), "It")
    assert Conversation.of(messages) == Conversation((("user", "q"), ("assistant", "It")))


def test_texts_that_go_on_after_others() -> None:
    """Without the special tokens at the beginning, and whole where the first letter melts into the anchor."""
    assert continued(WORDS, "b a") == tuple(WORDS.encode("b a", add_special_tokens=False))
    assert continued(WORDS, "") == ()

    class Melting:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            assert not add_special_tokens
            return {"a": [1], "ab": [9], "b": [2], "ac": [1, 3]}[text]

    assert continued(Melting(), "b") == (2,) and continued(Melting(), "c") == (3,)


class Closing:
    """A tokenizer that puts tokens around every text: its beginning is 1, its end 2."""

    def __init__(self, before: list[int], after: list[int], bos: int | None = 1, eos: int | None = 2) -> None:
        self.before, self.after, self.bos_token_id, self.eos_token_id = before, after, bos, eos

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        own = [int(letter) for letter in text]
        return [*self.before, *own, *self.after] if add_special_tokens else own


@pytest.mark.parametrize(
    ("words", "text", "ids"),
    [
        (Closing([1], []), "77", [1, 7, 7]),
        (Closing([1], []), "17", [1, 7]),  # the text has the beginning already
        (Closing([], []), "11", [1]),
        (Closing([1], [], bos=None), "17", [1, 1, 7]),
        (Closing([1], [2]), "7", [1, 7]),
        (Closing([1], [2]), "72", [1, 7, 2]),  # its own end stays, once
        (Closing([1], [2, 2]), "7", [1, 7]),
        (Closing([1], [2], eos=None), "7", [1, 7, 2]),
        (Closing([1], [2], bos=0, eos=0), "7", [1, 7, 2]),
        (Closing([0], [], bos=0), "07", [0, 7]),
        (Closing([1], [0], eos=0), "7", [1, 7]),
        (Closing([1], [2]), "", [1]),
        (Closing([], [2]), "", [2]),  # nothing is left without it
    ],
)
def test_the_ids_before_a_response(words: Any, text: str, ids: list[int]) -> None:
    assert opened(words, text) == ids


def test_bare_prompts() -> None:
    assert bare(Prompt(" q A: \n", "", response_prefix="")) == " q A:"
    assert bare(Prompt(" q A: ", "", response_prefix="A:")) == " q"


def test_what_stands_for_an_empty_text() -> None:
    def words(bos: int | None, eos: int | None) -> Any:
        return SimpleNamespace(bos_token_id=bos, eos_token_id=eos)

    assert [prefix_of(words(*pair)) for pair in ((1, 2), (0, 2), (None, 2), (None, 0))] == [1, 0, 2, 0]
    with pytest.raises(UserError, match="neither a beginning nor an end of sequence"):
        prefix_of(words(None, None))


def test_whether_a_scored_text_is_one() -> None:
    assert ScoredText((-1.0, -math.inf), ()).fault is None is ScoredText((), ()).fault
    assert ScoredText((-1.0, math.nan), ()).fault == NOT_NUMBERS
