"""An endpoint as a model of the engine, and deferral, with replies made by hand and no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from proxytune.api_spec import ApiSpec
from proxytune.black_box import decoder as black_box
from proxytune.black_box.client import Question
from proxytune.black_box.decoder import BlackBoxDecoder
from proxytune.black_box.deferral import TOKENS, Deferral, Nudged
from proxytune.black_box.options_seen import SeenOptions, option_forms
from proxytune.black_box.runner import ApiRunner
from proxytune.black_box.token_bytes import TokenBytes
from proxytune.black_box.visible import Continued, VisiblePosition, VisibleToken
from proxytune.config import Sampling, System, parse_alpha
from proxytune.engine.request import Segment, Work
from proxytune.errors import UserError
from proxytune.options import ApiOptions, DecodeOptions
from proxytune.records import Completion, Example, Prompt, Took
from tests.support import tiny

SPEC = ApiSpec(api="http://127.0.0.1:1/v1", model="m", top_logprobs=3)
DATA = [b"a", b"b", b"</s>", b"a", b"\xe2\x82", b"\xac", b" c"]
"""The bytes of seven tokens: 0 and 3 are the same, 2 is the end, 4 and 5 are parts of a letter."""


def tokens_of(data: Sequence[bytes], eos: int | None = 2) -> TokenBytes:
    made = TokenBytes(data, frozenset([2]), eos)
    for index, content in enumerate(data):
        made.ids.setdefault(content, []).append(index)
    return made


TOKENS_OF = tokens_of(DATA)


def shown(*pairs: tuple[bytes | None, float] | tuple[bytes | None, float, int], chosen: int = 0) -> Any:
    """A position: bytes, probabilities and, where the server has them, ids."""
    tokens = tuple(VisibleToken(math.log(p), data, *more) for data, p, *more in pairs)
    return VisiblePosition(tokens, tokens[chosen])


def went_on(*positions: VisiblePosition, ended: bool = False) -> Continued:
    return Continued("", ended, positions)


class Client:
    """Answers with what was laid out, in the order of the questions."""

    def __init__(self, *replies: Continued, parallel: int = 4, spec: ApiSpec = SPEC) -> None:
        self.left, self.spec = list(replies), spec
        self.options = ApiOptions(parallel=parallel)
        self.asked: list[Question] = []
        self.took_of: dict[int, Took] = {}
        self.names: list[str] = []

    def item(self, prompt: str) -> int:
        if prompt not in self.names:
            self.names.append(prompt)
        return self.names.index(prompt)

    def ask(self, questions: Sequence[Question]) -> list[Continued]:
        self.asked += questions
        return [self.left.pop(0) for _ in questions]

    def replies(self, questions: Sequence[Question]) -> Any:
        return reversed(list(enumerate(self.ask(questions))))

    def took(self, item: int) -> Took:
        return self.took_of.pop(item, Took())

    def check(self) -> None:
        """Nothing is missing."""

    def spent(self) -> str:
        return f"{len(self.asked)} calls"


def runner(*replies: Continued, lenient: bool = False, tokens: TokenBytes = TOKENS_OF, **more: Any) -> Any:
    client: Any = Client(*replies, **more)
    made = ApiRunner(client, tokens, "expert", lenient, torch.device("cpu"))
    made.rows.admit()
    made.rows.admit()
    return made


def test_a_tokens_ids_by_its_bytes() -> None:
    def find(data: bytes | None, index: int | None = None, same: bool = False) -> list[int]:
        return TOKENS_OF.find(VisibleToken(-1.0, data, index), same_ids=same)

    assert find(b"a") == [0, 3] and find(b"a", 3) == [3] and find(b"a", 1) == [0, 3]
    assert find(b"never") == [] and find(b"never", 1, same=True) == []
    assert find(None, 5, same=True) == [5] and find(None, 0, same=True) == [0] and find(None, 5) == []
    assert find(None, 7, same=True) == [] and find(None, 6, same=True) == [6], "there are seven"
    assert find(b"", 4, same=True) == [4] and find(b"", 4) == [2] and find(b"", None, same=True) == [2]
    assert tokens_of(DATA, None).find(VisibleToken(-1.0, b"")) == []
    assert tokens_of(DATA, 0).find(VisibleToken(-1.0, b"")) == [0]


def test_whether_ids_mean_the_same() -> None:
    def same(*pairs: Any) -> bool:
        return TOKENS_OF.same_ids(shown(*pairs))

    assert same((b"a", 0.5, 3), (b"b", 0.2, 1)) and same((b"a", 0.5, 0), (None, 0.2, 9), (b"b", 0.1))
    assert not same((b"a", 0.5, 3), (b"b", 0.2, 6)) and not same((b"a", 0.5), (b"", 0.1, 2))


def test_the_bytes_of_a_vocabulary() -> None:
    """Special tokens stand behind ordinary ones of the same bytes; only the first ids are there."""
    words = tiny.tokenizer()
    found = TokenBytes.of(words, len(words))
    a = words.get_vocab()["a"]
    assert found.data[a] == b"a" and found.eos == words.eos_token_id == 2
    assert found.special == frozenset(words.all_special_ids) and found.data[2] == b"</s>"
    assert found.text([a, 2, a]) == b"a</s>a" and len(TokenBytes.of(words, 50).data) == 50
    byte = words.get_vocab()
    assert found.data[byte["\u00c3"]] == b"\xc3" and found.data[byte["\u0120"]] == b" "
    words.add_special_tokens({"additional_special_tokens": ["<|b|>"]})
    assert TokenBytes.of(words, len(words)).ids[b"<|b|>"] == [len(words) - 1]


def test_special_tokens_stand_behind_ordinary_ones() -> None:
    class Words:
        eos_token_id = 0
        added_tokens_decoder: ClassVar[dict[int, Any]] = {0: SimpleNamespace(content="x", special=True)}

        def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
            return [["x", "x", "\u2581y", "<0x0A>"][index] for index in ids]

    found = TokenBytes.of(Words(), 4)
    assert found.data == [b"x", b"x", b" y", b"\n"] and found.ids[b"x"] == [1, 0]
    assert found.special == {0}


def test_logits_are_what_is_shown_of_each_row() -> None:
    """Two rows, of which one is asked about twice; what is not shown is minus infinity. Of a token that is
    shown twice the larger counts."""
    made = runner(
        went_on(shown((b"b", 0.5), (b"a", 0.25))),
        went_on(shown((b" c", 0.5), (b"b", 0.25), (b"b", 0.125))),
        went_on(ended=True),
    )
    assert (made.prompt("p", (9, 8)), made.prompt("q", (7,)), made.prompt("p", (9, 8))) == (0, 1, 0)
    got = made.forward(Work([Segment(0, (0, 1, 6)), Segment(1, (1, 0))], [0, 2, 4]))
    assert [(q.item, q.prompt, q.max_tokens, q.visible) for q in made.client.asked] == [
        (0, "p", 1, True),
        (0, "pb c", 1, True),
        (1, "qa", 1, True),
    ]
    want = torch.full((3, 7), -math.inf, dtype=torch.float64)
    want[0, 1], want[0, 0], want[1, 6], want[1, 1], want[2, 2] = (*map(math.log, (0.5, 0.25, 0.5, 0.25)), 0.0)
    assert torch.equal(got, want)
    assert made.rows.ids == [[0, 1, 6], [1, 0]] and made.rows.lengths == [3, 2]
    assert made.remarks == {"where the base ends a response, the endpoint shows no other token"}
    made.client.left = [went_on(shown((b"a", 0.5)))]
    made.forward(Work([Segment(1, (1,))], [0]))
    assert made.client.asked[-1].prompt == "qab", "the row goes on"
    assert made.rows.ids[1] == [1, 0, 1] and made.rows.lengths == [3, 3]


def test_prompts_as_ids_are_those_of_the_expert() -> None:
    spec = SPEC.model_copy(update={"prompt_as": "ids"})
    made = runner(went_on(shown((b"a", 0.5, 0))), spec=spec)
    made.prompt("p", (9, 8))
    made.forward(Work([Segment(0, (0, 4))], [1]))
    assert made.client.asked == [Question(0, (9, 8, 4))], "a part of a letter can be sent so"


def test_what_cannot_go_on_is_a_fault_of_its_row() -> None:
    made = runner(went_on(), went_on(shown((b"never", 0.5))), lenient=True)
    made.prompt("p", ())
    got = made.forward(Work([Segment(0, (0, 4)), Segment(1, (0, 1))], [0, 1, 3]))
    assert bool(got.isnan().all()) and list(made.faults) == [(0, 4), (0,), (0, 1)]
    assert r"b'\xe2\x82'" in made.faults[0, 4] and "part of a letter" in made.faults[0, 4]
    assert made.faults[(0,)].startswith("the endpoint shows no token here")
    assert made.faults[0, 1] == "no visible token of the base is one of the expert"
    assert any("were left out ('never', for example)" in remark for remark in made.remarks)
    strict = runner(went_on(shown((b"a", 0.5), (b"never", 0.25))))
    strict.prompt("p", ())
    with pytest.raises(UserError, match="the base's token 'never' is no token of the expert"):
        strict.forward(Work([Segment(0, (0,))], [0]))


@pytest.mark.parametrize(
    ("asked", "count", "noted"), [(6, 2, True), (6, 3, False), (99, 2, True), (99, 3, False)]
)
def test_fewer_tokens_than_were_asked_for(asked: int, count: int, noted: bool) -> None:
    """Less than half of them, or of the seven that there are."""
    made = runner(
        went_on(shown(*((data, 0.1) for data in (b"a", b"b", b" c", b"\xac")[:count]))),
        spec=SPEC.model_copy(update={"top_logprobs": asked}),
    )
    made.prompt("p", ())
    made.forward(Work([Segment(0, (0,))], [0]))
    want = f"the endpoint was asked for {asked} tokens of a position, and shows no more than {count}"
    assert made.remarks == ({want} if noted else set())


# Deferral


def deferral(made: Any, sampling: Sampling | None = None, gamma: float = 0.5) -> Deferral:
    """With an expert that is never loaded; token 2 ends a response."""
    term = SimpleNamespace(expert="expert")
    inner: Any = SimpleNamespace(
        eos=frozenset([2]),
        ensemble=SimpleNamespace(terms=(term,)),
        contexts_or_why=lambda example, task: {"base": (int(example.id),), "expert": (5, int(example.id))},
        continued=lambda text: tuple(100 + byte for byte in text.encode()),
    )
    return Deferral(inner, made, gamma, sampling or Sampling(max_new_tokens=9))


def row(**more: Any) -> Nudged:
    return Nudged(Example("0", Prompt("p", "p")), (5,), "p", 0, **more)


def taken(reply: Continued, asked: int = 3, sampling: Sampling | None = None, **more: Any) -> Nudged:
    """A row after a reply of the base."""
    found = row(**more)
    deferral(runner(), sampling)._take(found, reply, asked)
    return found


SURE = [shown((b"b", 0.5), (b"a", 0.25)), shown((b" c", 0.75), (b"a", 0.1)), shown((b"a", 0.9), (b"b", 0.1))]


def test_the_base_speaks_while_it_is_sure() -> None:
    """Gamma itself is sure. Of its tokens all count, with their ids and probabilities."""
    found = taken(went_on(*SURE))
    assert (found.text(), found.ids, found.tokens, found.by_expert) == ("b ca", [1, 6, 0], 3, 0)
    assert found.logprob == pytest.approx(math.log(0.5 * 0.75 * 0.9))
    assert (found.unsure, found.reason) == (False, None)
    doubtful = shown((b"a", 0.49), (b"b", 0.4))
    found = taken(went_on(SURE[0], doubtful, SURE[1]))
    assert (found.text(), found.tokens, found.unsure, found.reason) == ("b", 1, True, None)
    other = shown((b"a", 0.6), (b"b", 0.3), chosen=1)  # it went on with another one than the first
    assert taken(went_on(other)).unsure and not taken(went_on(other)).tokens
    assert taken(went_on(shown((None, 0.9)))).unsure, "a part of a letter"


def test_how_a_base_comes_to_its_end() -> None:
    assert taken(went_on(*SURE[:2], ended=True)).reason == "eos"
    short = taken(went_on(*SURE[:2]))
    assert short.unsure and short.reason is None, "less than was asked for: it was a part of a letter"
    end = taken(went_on(SURE[0], shown((b"</s>", 0.9), (b"a", 0.1)), SURE[1]))
    assert (end.reason, end.text(), end.ids, end.tokens) == ("eos", "b", [1], 2)
    hidden = taken(went_on(shown((b"", 0.9), (b"a", 0.1))))
    assert (hidden.reason, hidden.text(), hidden.tokens) == ("eos", "", 1)
    stopped = taken(went_on(*SURE), sampling=Sampling(max_new_tokens=9, stop=("x", " c")))
    assert (stopped.reason, stopped.text(), stopped.tokens) == ("stop", "b c", 2)
    full = taken(went_on(*SURE), sampling=Sampling(max_new_tokens=4), tokens=2)
    assert (full.reason, full.text(), full.tokens, full.unsure) == ("length", "b c", 4, False)
    unknown = taken(went_on(shown((b"zz", 0.9), (b"a", 0.1))), asked=1)
    assert unknown.ids == [222, 222], "the experts see a token that they lack as its text"


def test_what_the_expert_says() -> None:
    made = deferral(runner(), Sampling(max_new_tokens=3, stop=("bb",)))
    found = row(unsure=True, ids=[6], tokens=1, logprob=-1.0)
    made._said(found, (1,), -0.25)
    assert (found.ids, found.tokens, found.by_expert, found.logprob) == ([6, 1], 2, 1, -1.25)
    assert (found.text(), found.unsure, found.reason) == ("b", False, None)
    made._said(found, (0,), -0.5)
    assert (found.reason, found.text(), found.by_expert) == ("length", "ba", 2)
    ended, none, stopped = row(unsure=True), row(unsure=True), row(data=bytearray(b"b"))
    made._said(ended, (2,), -0.5)
    assert (ended.reason, ended.ids, ended.tokens, ended.text()) == ("eos", [], 1, "")
    made._said(none, (), math.nan)
    assert (none.reason, none.tokens, none.logprob) == ("nan", 0, 0.0)
    made._said(stopped, (1,), -0.5)
    assert stopped.reason == "stop"


def test_responses_of_a_base_and_an_expert_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time of three: each asks for what it has room for, and its prompt goes on with its text."""
    made = runner(
        went_on(SURE[0], shown((b"a", 0.2))),  # 0: unsure after "b"
        went_on(*SURE, ended=True),  # 1: all by itself
        went_on(SURE[1]),  # 0, after the expert's word
        went_on(SURE[2], ended=True),  # 2
        parallel=2,
    )
    for text in ("p0", "p1", "p2"):
        made.prompt(text, ())
    all_three = deferral(made, Sampling(max_new_tokens=20), gamma=0.45)
    monkeypatch.setattr(
        Deferral, "_let_expert_speak", lambda self, rows: [self._said(r, (0,), -2.0) for r in rows]
    )
    found, work = [], []
    for example, completion in all_three.responses([Example(str(n), Prompt(f"p{n}", "")) for n in range(3)]):
        assert example.id == completion.example_id
        found.append(completion)
        work.append(all_three.work())
        if completion.example_id == "2":
            made.client.left.append(went_on(ended=True))
    assert [(q.item, q.prompt, q.max_tokens) for q in made.client.asked] == [
        (0, "p0", TOKENS),
        (1, "p1", TOKENS),
        (0, "p0ba", TOKENS),
        (2, "p2", TOKENS),
        (0, "p0ba ca", 20 - 4),
    ]
    assert [c.example_id for c in found] == ["1", "2", "0"]
    last = found[-1]
    assert (last.text, last.finish_reason, last.token_ids) == ("ba ca", "eos", (1, 0, 6, 0))
    assert last.took == Took(generated_tokens=4, deferred=2)
    assert last.logprob == pytest.approx(math.log(0.5 * 0.75) - 4.0)
    assert [(w.finished, w.finished_tokens, w.unread) for w in work] == [(1, 3, 2), (2, 4, 1), (3, 8, 0)]
    assert all_three.remarks == ["deferral below 0.45: another distribution than proxy-tuning"]


def test_the_room_of_a_response_bounds_what_is_asked_for() -> None:
    made = runner(went_on(SURE[0]), went_on(*SURE[:2]), parallel=2)
    two = deferral(made, Sampling(max_new_tokens=3))
    rows = [row(tokens=2), row(tokens=1)]
    two._let_base_speak(rows)
    assert [question.max_tokens for question in made.client.asked] == [1, 2]
    assert [one.reason for one in rows] == ["length", "length"]


def test_deferral_is_of_one_expert() -> None:
    made = deferral(runner())
    made.decoder.ensemble.terms = (1, 2)  # type: ignore[misc, assignment]
    with pytest.raises(UserError, match="lets one expert speak, and the system has 2"):
        _ = made._expert


def test_a_deferred_response_is_cut_before_its_first_stop_string() -> None:
    made = deferral(runner(), Sampling(stop=("c", "b")))
    found = made._completion(row(data=bytearray(b"abcb"), reason="stop", ids=[1], tokens=0, remark="r"))
    assert (found.text, found.finish_reason, found.remark, found.sample) == ("a", "stop", "r", 0)
    assert made.remarks == [], "nothing was said"
    letter = row(data=bytearray(b"a\xe2\x82"))
    assert not letter.whole and letter.text() == "a\ufffd" and row(data=bytearray(b"a")).whole


# The decoder


def alone(client: Any) -> BlackBoxDecoder:
    """The base by itself, which needs no models."""
    models: Any = SimpleNamespace(system=System(name="box", base=SPEC))
    return BlackBoxDecoder(models, "base", DecodeOptions(), client)


ONE, TWO = parse_alpha(1), parse_alpha(2)


def test_the_base_alone() -> None:
    """One request for each response, which is cut here too; its calls are counted once."""
    client = Client(
        Continued("yes, no", ended=False), Continued("so?", ended=True), Continued("all", ended=False)
    )
    client.took_of = {
        0: Took(api_calls=2, api_prompt_tokens=7, api_completion_tokens=4),
        1: Took(api_calls=1, api_prompt_tokens=3, api_completion_tokens=2),
    }
    made, heard = alone(client), []
    given = [Example(name, Prompt(f"p{name}", "u")) for name in "abc"]
    sampling = Sampling(max_new_tokens=6, stop=("no", ","))
    steps = made.steps([(e, (ONE, TWO)) for e in given], sampling, on_text=lambda *what: heard.append(what))
    found = {}
    for number, finished in enumerate(steps):
        assert [alpha for alpha, _ in finished] == [ONE, TWO] and finished[0][1] is finished[1][1]
        found[finished[0][1].example_id] = finished[0][1]
        assert (made.work().finished, made.work().unread) == (number + 1, 2 - number)
        assert made.work().spent == "3 calls"
    assert client.asked == [
        Question(n, f"p{name}", 6, visible=False, stop=("no", ",")) for n, name in enumerate("abc")
    ]
    assert [(c.text, c.finish_reason) for c in (found["a"], found["b"], found["c"])] == [
        ("yes", "stop"),  # cut here: the endpoint went on
        ("so?", "stop"),  # it ended before the limit, and stop strings were sent
        ("all", "length"),
    ]
    assert heard == [("c", 0, "all"), ("b", 0, "so?"), ("a", 0, "yes")], "as they come"
    took = found["a"].took
    assert (took.prompt_tokens, took.generated_tokens) == (7, 4)
    assert (took.api_calls, took.api_prompt_tokens, took.api_completion_tokens) == (2, 7, 4)
    assert not made.cancel("a") and made.memory == {}
    assert made.notes() == [f"the base is {SPEC}, of which 3 tokens of a position are asked for"]


@pytest.mark.parametrize(("count", "sent", "reason"), [(4, 4, "stop"), (5, 0, "eos")])
def test_an_endpoint_takes_four_stop_strings(count: int, sent: int, reason: str) -> None:
    """More are looked for here alone."""
    client = Client(Continued("said", ended=True))
    stops = tuple(f"<{number}>" for number in range(count))
    [[(_, found)]] = alone(client).steps([(Example("a", Prompt("p", "u")), (ONE,))], Sampling(stop=stops))
    assert client.asked[0].stop == stops[:sent] and found.finish_reason == reason


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"temperature": 0.1}, "answers greedily"),
        ({"n": 2}, "answers greedily"),
        ({"ban": ("a",)}, "knows no bans"),
        ({"ban_first": ("a",)}, "knows no bans"),
        ({"min_new_tokens": 1}, "knows no bans"),
    ],
)
def test_what_the_base_alone_cannot_do(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        list(alone(Client()).steps([], Sampling(**wrong)))


def test_settings_that_need_weights_are_refused() -> None:
    made = alone(Client())
    with pytest.raises(UserError, match="a forced opener is of models that are here"):
        list(made.steps([], Sampling(), forced=""))
    with pytest.raises(UserError, match="--trace needs a distribution"):
        list(made.steps([], Sampling(), trace="tokens"))
    made.defer = 0.0
    with pytest.raises(UserError, match="--defer is of responses"):
        list(made.likelihood_sweep([], lambda _: (), [ONE]))
    models: Any = SimpleNamespace(system=System(name="box", base=SPEC))
    for how in ({"speculate": 2}, {"drafter": "lookup"}):
        with pytest.raises(UserError, match="verifies no drafts"):
            BlackBoxDecoder(models, "proxy", DecodeOptions(**how), Client())  # type: ignore[arg-type]


def test_options_of_the_base_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of four for each request at a time. The first completion of an example has its call; the
    time goes to all of a block alike."""
    replies = [went_on(shown((b" A", 0.5), (b" B", 0.25))) for _ in range(5)]
    replies[1] = went_on(shown((b"x", 0.5)))
    client = Client(*replies, parallel=1)
    client.took_of = {0: Took(api_calls=1, api_prompt_tokens=7, api_completion_tokens=1)}
    made = alone(client)
    clock = count(0.0, 6.0)  # every block takes six seconds
    monkeypatch.setattr(black_box.time, "perf_counter", lambda: next(clock))
    given = [Example(str(n), Prompt(f"p{n}", "u")) for n in range(5)]
    found, work = [], []
    for alpha, completion in made.likelihood_sweep(given, lambda _: (" A", " B", " C"), [ONE, TWO]):
        found.append((alpha, completion))
        now = made.work()
        work.append((now.finished, now.unread, now.scoring, now.prefill_seconds))
    assert work == [(4, 1, True, 6.0)] * 24 + [(5, 0, True, 12.0)] * 6 and len(client.asked) == 5
    assert all(question.max_tokens == 1 and question.visible for question in client.asked)
    first = [completion for alpha, completion in found if completion.example_id == "0" and alpha == TWO]
    assert [c.sample for c in first] == [0, 1, 2] and [c.text for c in first] == [" A", " B", " C"]
    # C is at most as probable as B, the last that is shown; alpha means nothing to the base alone
    assert [c.logprob for c in first] == pytest.approx([math.log(p) for p in (0.5, 0.25, 0.25)])
    assert [c.bounded for c in first] == [False, False, True] and first[0].finish_reason == "length"
    calls = [(c.took.api_calls, c.took.api_prompt_tokens, c.took.prompt_tokens) for _, c in found[:6]]
    assert calls == [(1, 7, 7), *[(0, 0, 0)] * 5]
    assert [c.took.seconds for _, c in found] == [6 / 24] * 24 + [6 / 6] * 6
    unseen = [completion for _, completion in found if completion.example_id == "1"]
    assert {c.finish_reason for c in unseen} == {"unseen"} and all(math.isnan(c.logprob) for c in unseen)
    why = "none of the options is among the 3 tokens that the endpoint shows"
    assert {c.remark for c in unseen} == {why} and {c.bounded for c in unseen} == {None}


def test_an_option_is_one_word() -> None:
    made = alone(Client())
    with pytest.raises(UserError, match="the text ' two words' is several tokens"):
        list(made.likelihood_sweep([Example("0", Prompt("p", "u"))], lambda _: (" one", " two words"), [ONE]))
    assert made._forms([[" one", "two "]]) == []


def test_the_forms_of_an_option() -> None:
    """A chat endpoint's answer may begin without the space."""
    spelt = {" A": (7,), "A": (3,), " B": (8,), "B": (8, 1), "C": (9,), "D": (5, 5)}
    inner: Any = SimpleNamespace(continued=spelt.__getitem__)
    chat = SPEC.model_copy(update={"route": "chat"})
    assert option_forms(inner, [" A", " B", "C"], SPEC) == [[7], [8], [9]]
    assert option_forms(inner, [" A", " B", "C"], chat) == [[7, 3], [8], [9]]
    for spec in (SPEC, chat):
        with pytest.raises(UserError, match="the text 'D' is several tokens"):
            option_forms(inner, [" A", "D"], spec)


def test_scores_do_not_overflow() -> None:
    seen = SeenOptions((-1000.0, -1001.0), (False, False))
    low, high = math.log(1 / (1 + math.e)), math.log(math.e / (1 + math.e))
    assert seen.scores([0.0, 0.0], 1.0) == pytest.approx([high, low])
    assert seen.scores([-math.inf, 0.0], 0.0) == pytest.approx([high, low]), "alpha 0 is the base"
    assert seen.scores([0.0, 3.0], -1.0) == pytest.approx(
        [math.log(1 / (1 + math.exp(-4))), -4.01815], abs=1e-5
    )


def test_a_proxys_response_with_its_calls_and_faults() -> None:
    """NaN logits of a row that the endpoint showed nothing of are `unseen`, with the reason."""
    made = alone(Client())
    api = runner()
    made._api = black_box.ApiBase(made.client, "expert", False, api, SimpleNamespace(tokenizer=None))  # type: ignore[arg-type]
    made._inner = SimpleNamespace(remarks=["inner"])  # type: ignore[assignment]
    api.prompt("other", ())
    api.client.item("other")
    prompt = Prompt("p", "u")
    number = api.prompt("p", ())
    made.client.names = ["other", "p"]  # type: ignore[attr-defined]
    made.client.took_of = {1: Took(api_calls=5, api_prompt_tokens=50, api_completion_tokens=6)}  # type: ignore[attr-defined]
    api.faults[number, 4, 6] = "nothing is shown"
    api.remarks |= {"b", "a"}
    broken = Completion("0", 0, "", (4, 6), "nan", math.nan, took=Took(seconds=2.0, generated_tokens=2))
    found = made._finished(broken, prompt)
    assert (found.finish_reason, found.remark) == ("unseen", "nothing is shown")
    assert found.took == Took(
        seconds=2.0, generated_tokens=2, api_calls=5, api_prompt_tokens=50, api_completion_tokens=6
    )
    assert made.remarks == ["inner", "a", "b"] and api.window > 10**9
    other = Completion("0", 0, "", (4,), "nan", math.nan, remark="mine")
    assert made._finished(other, prompt).finish_reason == "nan"
    refused = Completion("0", 0, "", (4, 6), "template", math.nan, remark="no text")
    assert made._finished(refused, prompt) is refused
    assert made.remarks == ["inner", "a", "b"], "each is said once"
    with pytest.raises(UserError, match="token ids alone are no prompt"):
        made._api.context(Prompt("", "", ids={"base": (1,)}))


def test_a_chat_endpoint_cannot_go_on_with_a_response() -> None:
    chat = SPEC.model_copy(update={"route": "chat"})
    made = alone(Client(spec=chat))
    made.role = "proxy"
    with pytest.raises(UserError, match="cannot go on with a response token by token"):
        list(made.steps([], Sampling()))
