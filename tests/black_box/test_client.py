"""The client of an endpoint without a network: what is sent, what it may cost, what is counted and kept, and
what a run is said to take before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from proxytune.api_spec import ApiSpec
from proxytune.black_box import probing
from proxytune.black_box.client import ApiClient, Question
from proxytune.black_box.forecasting import Forecast, forecast
from proxytune.black_box.visible import (
    NOWHERE,
    ROUNDING,
    Continued,
    VisiblePosition,
    VisibleToken,
    read_answer,
)
from proxytune.config import Sampling
from proxytune.endpoints import CallFailed, CallLimits, endpoint
from proxytune.errors import UserError
from proxytune.options import ApiOptions
from proxytune.records import Example, Prompt, Took

HERE = ApiSpec(api="http://127.0.0.1:1/v1", model="m", top_logprobs=7)
CHAT = HERE.model_copy(update={"route": "chat"})
FAR = ApiSpec(api="https://example.invalid/v1", model="gpt-4o-mini")

BODIES: list[tuple[ApiSpec, Question, dict[str, Any]]] = [
    (HERE, Question(3, "hi"), {"max_tokens": 1, "prompt": "hi", "logprobs": 7}),
    (HERE, Question(3, (4, 9), 16), {"max_tokens": 16, "prompt": [4, 9], "logprobs": 7}),
    (
        HERE,
        Question(3, "hi", 5, visible=False, stop=("a", "b")),
        {"max_tokens": 5, "prompt": "hi", "stop": ["a", "b"]},
    ),
    (
        CHAT,
        Question(3, "hi", 2),
        {
            "max_tokens": 2,
            "messages": [{"role": "user", "content": "hi"}],
            "logprobs": True,
            "top_logprobs": 7,
        },
    ),
    (
        CHAT,
        Question(3, "hi", visible=False),
        {"max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]},
    ),
]


@pytest.mark.parametrize(("spec", "question", "body"), BODIES)
def test_what_is_sent(spec: ApiSpec, question: Question, body: dict[str, Any]) -> None:
    """As the two routes of OpenAI's interface have it; always greedy."""
    assert question.body(spec) == {"model": "m", "temperature": 0, **body}


@pytest.mark.parametrize(
    ("spec", "question", "tokens", "reply"),
    [
        # one token to begin with; a letter of two bytes may be two tokens; the reply shows 7 + the chosen one
        (HERE, Question(0, "né", 3), (3 + 1, 3), 65536 + 512 * 3 * 9),
        (HERE, Question(0, "\ud800"), (3 + 1, 1), 65536 + 512 * 9),
        (HERE, Question(0, (400, 900), 2), (2 + 1, 2), 65536 + 512 * 2 * 9),
        (CHAT, Question(0, "né", 3, visible=False), (3 + 32, 3), 65536 + 512 * 3),
    ],
)
def test_the_most_that_a_question_takes(
    spec: ApiSpec, question: Question, tokens: tuple[int, int], reply: int
) -> None:
    assert question.most(spec) == tokens and question.reply_bytes(spec) == reply


@pytest.mark.parametrize(
    ("spec", "given", "price"),
    [
        (HERE, None, (0.0, 0.0)),
        (HERE, (1.0, 3.0), (1.0, 3.0)),
        (FAR, None, (0.15, 0.6)),
        (FAR, (1.0, 3.0), (1.0, 3.0)),
        (FAR.model_copy(update={"model": "unknown"}), None, None),
        (HERE.model_copy(update={"model": "gpt-4o"}), None, (0.0, 0.0)),
    ],
)
def test_the_price(spec: ApiSpec, given: Any, price: Any) -> None:
    """The one that is given; a server here costs nothing, whatever its model is called."""
    assert ApiClient(spec, ApiOptions(price=given)).price == price


@pytest.mark.parametrize("limit", [0.0, 2.0])
def test_a_limit_needs_a_price(limit: float) -> None:
    unknown = FAR.model_copy(update={"model": "unknown"})
    with pytest.raises(UserError, match="--max-cost needs the price of 'unknown'"):
        ApiClient(unknown, ApiOptions(max_cost=limit)).check()
    ApiClient(unknown).check()
    ApiClient(FAR, ApiOptions(max_cost=limit)).check()


def test_the_endpoint_has_the_options_and_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_KEY", "sk-1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-2")
    spec = HERE.model_copy(update={"key_variable": "OTHER_KEY"})
    found = ApiClient(spec, ApiOptions(api_deadline=9.0, api_retries=4)).endpoint
    assert (found.url, found.key, found.key_from) == (HERE.api, "sk-1", "OTHER_KEY")
    assert found.limits == CallLimits(deadline=9.0, retries=4)
    assert found.url_from == "`api` in the system's file"


class Server:
    """In the place of an endpoint: every prompt is answered by its length, some with a failure."""

    def __init__(self, failures: dict[str, CallFailed] | None = None) -> None:
        self.failures, self.limits = failures or {}, CallLimits(retries=0)
        self.seen: list[tuple[str, Any, int]] = []

    def post(self, path: str, body: dict[str, Any], reply_bytes: int) -> endpoint.Answer:
        asked = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        self.seen.append((path, asked, reply_bytes))
        if asked in self.failures:
            raise self.failures[asked]
        shown = {"token": f"<{asked}>", "logprob": -0.5}
        logprobs = {"content": [{**shown, "top_logprobs": [shown]}]}
        usage = {"prompt_tokens": 10 * len(asked), "completion_tokens": 2}
        choice = {"text": f"<{asked}>", "logprobs": logprobs if "logprobs" in body else None}
        return endpoint.Answer({"choices": [choice], "usage": usage}, "")


def client(folder: Path, server: Server, spec: ApiSpec = HERE, **options: Any) -> ApiClient:
    """A client of the server, with replies in a folder."""
    made = ApiClient(spec, ApiOptions(**options), folder / "replies.sqlite")
    made.__dict__["endpoint"] = server
    return made


def asked(made: ApiClient, *prompts: str) -> list[str]:
    return [reply.text for reply in made.ask([Question(made.item(text), text) for text in prompts])]


def test_replies_are_in_order_and_each_is_paid_for_once(tmp_path: Path) -> None:
    server = Server()
    made = client(tmp_path, server, price=(3.0, 5.0), parallel=2)
    assert asked(made, "ccc", "a", "bb", "a") == ["<ccc>", "<a>", "<bb>", "<a>"]
    assert sorted(server.seen) == [
        ("completions", "a", 65536 + 512 * 9),
        ("completions", "bb", 65536 + 512 * 9),
        ("completions", "ccc", 65536 + 512 * 9),
    ]
    assert made.items == [made._hashed("item", text) for text in ("ccc", "a", "bb")]
    assert made.took(1) == Took(api_calls=1, api_prompt_tokens=10, api_completion_tokens=2)
    assert made.took(1) == Took() and made.took(0).api_prompt_tokens == 30
    # 3 calls: 60 tokens at 3 and 6 at 5 US dollars per million
    assert made.total == Took(api_calls=3, api_prompt_tokens=60, api_completion_tokens=6)
    assert made.usd((1000, 100)) == pytest.approx(0.0035)
    assert made.spent() == "spent: 3 calls, 60 + 6 tokens, 0.0002 USD"
    assert made.budget.spent == pytest.approx(0.00021)
    assert made.known(Question(0, "bb")) and not made.known(Question(0, "bb", 2))
    [text] = made.ask([Question(made.item("bb"), "bb", visible=False)])
    assert text == Continued("<bb>", ended=True), "another question, whose reply shows no tokens"
    server.seen.pop()
    made.store.ended(4, "", (0, 0), None)  # and let it have cost nothing
    again = client(tmp_path, server, price=(3.0, 5.0))
    assert asked(again, "bb", "dd", "a") == ["<bb>", "<dd>", "<a>"] and len(server.seen) == 4
    assert again.total.api_calls == 1 and again.spent_before([0, 2]) == pytest.approx(0.000110)
    # what the earlier session spent on a and bb counts, once, and what this one spent on dd
    assert again.item("a") == 2 and again.budget.spent == pytest.approx((50 * 3 + 6 * 5) / 1e6)


def test_an_unknown_price_is_no_sum(tmp_path: Path) -> None:
    made = client(tmp_path, Server(), FAR.model_copy(update={"model": "unknown"}))
    assert asked(made, "ab") == ["<ab>"] and made.usd((1, 1)) is None
    assert made.spent() == "spent: 1 calls, 20 + 2 tokens" and made.spent_before([0]) == 0.0


@pytest.mark.parametrize(("paid", "tokens"), [(True, (3 + 1, 1)), (False, (0, 0))])
def test_what_a_failed_call_may_have_cost_counts(tmp_path: Path, paid: bool, tokens: tuple[int, int]) -> None:
    """A call that may have been paid for counts as the most that it can take; its reply is not kept."""
    server = Server({"bad": CallFailed("out of order", again=False, paid=paid)})
    made = client(tmp_path, server, price=(1e6, 1e6))
    with pytest.raises(UserError) as raised:
        asked(made, "bad")
    assert str(raised.value).startswith(f"the endpoint of m at {HERE.api}: it failed: out of order; spent: ")
    assert str(raised.value).endswith("; what it said is kept, and the same command continues")
    assert (made.total.api_prompt_tokens, made.total.api_completion_tokens) == tokens
    assert made.total.api_calls == 1 and made.store.spent(made.items) == tokens
    assert not made.known(Question(0, "bad")) and made.budget.spent == pytest.approx(sum(tokens))


def test_the_limit_is_what_calls_may_cost(tmp_path: Path) -> None:
    """A dollar a token: the question may take 5 + 1, which 6 dollars allow and 5.99 do not."""
    for limit, calls in ((5.99, 0), (6.0, 1)):
        server = Server()
        made = client(tmp_path / str(limit), server, price=(1e6, 1e6), max_cost=limit)
        with pytest.raises(UserError, match=f"--max-cost {limit:g}: .*the same command with a higher limit"):
            asked(made, "four", "more")
        assert len(server.seen) == calls


def test_the_chat_route_is_another_path_and_another_item(tmp_path: Path) -> None:
    server = Server()
    made = client(tmp_path, server, CHAT)
    assert asked(made, "a") == ["<a>"] and server.seen[0][0] == "chat/completions"
    other = ApiClient(HERE.model_copy(update={"model": "n"}))
    assert len({made._hashed("item", "a"), other._hashed("item", "a"), made._hashed("item", "b")}) == 3


def examples(*lengths: int) -> list[Example]:
    """Examples whose prompts have so many characters."""
    return [Example(str(n), Prompt(f"{n}" * length, "")) for n, length in enumerate(lengths)]


def test_what_a_run_would_take(tmp_path: Path) -> None:
    """Four characters a token. Multiple choice: a call and a token for each question that is not stored.
    The base alone: a call for each response. The proxy: one for each token of each response, whose prompt
    has half of the response on the average."""
    made, given = client(tmp_path, Server(), price=(1e6, 1e4)), examples(40, 80, 8)
    asked(made, given[1].prompt.plain)  # 800 + 2 tokens
    seven = Sampling(max_new_tokens=7)
    paid = pytest.approx(800 + 0.02)
    choices = forecast(made, given, seven, one_position=True, alone=False)
    assert choices == Forecast(2, 1, (12, 2), pytest.approx(12.02), at_most=False, spent=paid)
    alone = forecast(made, given, seven, one_position=False, alone=True)
    assert alone == Forecast(3, 0, (32, 21), pytest.approx(32.21), at_most=True, spent=paid)
    proxy = forecast(made, given, seven, one_position=False, alone=False, responses=2)
    tokens = round((32 + 3 * 7 / 2) * 7 * 2), 7 * 3 * 2
    assert tokens == (595, 42)
    assert proxy == Forecast(42, 0, tokens, pytest.approx(595.42), at_most=True, spent=paid)


def test_a_forecast_in_words() -> None:
    assert str(Forecast(1200, 3, (2500, 1200), 1.006, at_most=False)) == (
        "1,200 calls (3 are stored), about 2,500 + 1,200 tokens, 1.01 USD"
    )
    assert str(Forecast(2, 0, (5, 2), None, at_most=True)) == (
        "at most 2 calls, about 5 + 2 tokens, cost unknown (give --price IN,OUT)"
    )
    assert str(Forecast(2, 0, (5, 2), 0.0, at_most=False)).endswith(", 0.00 USD")


def test_both_routes_are_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by a question that is sent, whatever is stored and without retries; a failure is said without
    the spend."""
    made: list[ApiClient] = []

    def ask(self: ApiClient, questions: Sequence[Question]) -> list[Continued]:
        made.append(self)
        if self.spec.route == "chat":
            raise UserError("the endpoint of m: it failed; spent: 1 calls")
        top = VisibleToken(-0.5, b" 5", 0)
        return [Continued(" 5", False, (VisiblePosition((top, VisibleToken(-2.0, b" 6")), top),))]

    monkeypatch.setattr(ApiClient, "ask", ask)
    own = ApiClient(HERE.model_copy(update={"prompt_as": "ids"}), ApiOptions(api_retries=5, parallel=3))
    completions, chat = probing.probe(own)
    assert (completions.route, completions.works) == ("completions", True)
    assert completions.text == (
        "it shows 2 tokens of a position with ids, first ' 5': every way can be used with it"
    )
    assert (chat.route, chat.works, chat.text) == ("chat", False, "the endpoint of m: it failed")
    assert [(one.spec.route, one.spec.prompt_as) for one in made] == [
        ("completions", "ids"),
        ("chat", "text"),
    ]
    assert {(one.options.api_retries, one.options.parallel, one.cache == own.cache) for one in made} == {
        (0, 3, False)
    }


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ((), (False, "it answers, and shows no token of the position")),
        (
            (VisibleToken(-0.5, b"A"), VisibleToken(-1.5, b"B", 4)),
            (True, "it shows 2 tokens of a position, first 'A': choices can be used with it"),
        ),
    ],
)
def test_what_a_probe_says(tokens: tuple[VisibleToken, ...], said: tuple[bool, str]) -> None:
    positions = (VisiblePosition(tokens, tokens[0]),) if tokens else ()
    assert probing._said(Continued("", False, positions), "choices") == said


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (VisibleToken(-1.0, None), "a part of a letter"),
        (VisibleToken(-1.0, None, 0), "a part of a letter (id 0)"),
        (VisibleToken(-1.0, b"a\xff"), repr("a\\xff")),
    ],
)
def test_how_a_message_names_a_token(token: VisibleToken, shown: str) -> None:
    assert token.shown == shown


def test_what_is_read_of_an_answer() -> None:
    """`max_tokens` is what some servers call the limit; the message may be null; a text that is only a part
    of a letter may come without log-probabilities."""

    def read(choice: dict[str, Any], logprobs: bool = False) -> Continued:
        return read_answer(endpoint.Answer({"choices": [choice]}, ""), logprobs=logprobs)

    ends = [("length", False), ("max_tokens", False), ("stop", True), (None, True)]
    for reason, ended in ends:
        assert read({"text": "a", "finish_reason": reason}) == Continued("a", ended)
    assert read({"message": {"content": None}}).text == ""
    assert read({"message": {"content": "b"}, "finish_reason": "length"}) == Continued("b", False)
    for wrong in ({}, {"text": 3}, {"message": {}}):
        with pytest.raises(CallFailed, match=r"no text in choices\[0\]"):
            read(wrong)
    tops = {"a": -3.0, "b": NOWHERE, "c": NOWHERE + 1, "d": ROUNDING, "e": -3.0}
    older = {"tokens": ["z"], "top_logprobs": [tops]}
    [position] = read({"text": "z", "logprobs": older}, logprobs=True).positions
    found = [(token.data, token.logprob) for token in position.tokens]
    assert found == [(b"d", 0.0), (b"a", -3.0), (b"e", -3.0), (b"c", NOWHERE + 1)], "equals as they came"
    assert position.chosen == VisibleToken(-math.inf, b"z"), "it is not among those shown"
    assert position.top == 1.0 and position.least == NOWHERE + 1
    for shown in (None, {"content": [{"top_logprobs": []}]}, {"tokens": ["z"], "top_logprobs": [{}]}):
        with pytest.raises(CallFailed) as raised:
            read({"text": "z", "logprobs": shown}, logprobs=True)
        assert raised.value.paid and not raised.value.again, "another try shows no more, and costs more"
