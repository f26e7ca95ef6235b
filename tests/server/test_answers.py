"""From the body of a request to what is written, step by step, on a batch in which a letter is a token."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace
from typing import Any

import pytest

from proxytune.config import Sampling, parse_alpha
from proxytune.decoding.open_batch import Piece, ScoredText, SeenToken
from proxytune.errors import UserError
from proxytune.options import ServeOptions
from proxytune.records import named_by_content
from tests.support.letter_batch import LetterBatch, sent
from tests.support.require import require_or_skip

try:
    from proxytune.server import app as routes
    from proxytune.server.answers import streams
    from proxytune.server.answers.calls import CallReader, PromptHead, ServedCall, conversation_of
    from proxytune.server.answers.protocol import (
        IGNORED,
        NEUTRAL,
        ChatBody,
        CompletionBody,
        TokenizeBody,
    )
    from proxytune.server.answers.writing import LEAST, Writer
    from proxytune.server.faults import LONGEST, RequestFault, broken, leaving
    from proxytune.server.work.jobs import ServedJob, TextToScore
except ImportError:
    require_or_skip("serve", "the packages of the server are not installed: pip install 'proxytune[serve]'")

ALPHA = parse_alpha("0.75")


def reader(
    role: Any = "proxy", virtual: tuple[int, ...] = (), negative: bool = False, **limits: int
) -> CallReader:
    """Reads requests to a batch of letters."""
    batch: Any = LetterBatch(virtual)
    return CallReader(batch, role, ServeOptions(**limits), negative, ALPHA)


def completion(**more: Any) -> CompletionBody:
    """The body of a request."""
    return CompletionBody.model_validate({"model": "m", "prompt": "ab", **more})


def chat(*messages: tuple[str, str], **more: Any) -> ChatBody:
    """The body of a request."""
    turns = [{"role": role, "content": text} for role, text in messages or [("user", "ab")]]
    return ChatBody.model_validate({"model": "m", "messages": turns, **more})


# What is asked for


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        ({}, 1), ({"n": 3}, 3), ({"prompt": ["a", "b"], "n": 3}, 6), ({"prompt": [5, 6], "n": None}, 1),
        ({"prompt": [[5], [6]], "echo": True, "logprobs": 0, "n": 3}, 8), ({"echo": True, "n": 2}, 2),
        ({"logprobs": 2, "n": 2}, 2),
    ],
)  # fmt: skip
def test_how_many_responses_and_texts_are_asked_for(body: Any, asked: int) -> None:
    assert reader(max_choices=6).count(completion(**body)) == asked
    assert reader().count(chat(n=3)) == 3


def test_too_many_responses_are_named() -> None:
    with pytest.raises(RequestFault) as raised:
        reader(max_choices=5).count(completion(prompt=["a", "b"], n=3))
    assert raised.value.status == 400 and raised.value.param == "n"
    assert str(raised.value) == "the request asks for 6 responses (2 prompts, n = 3): at most 5 are allowed"


def test_the_settings_of_a_response() -> None:
    body = completion(
        temperature=0.5, top_p=0.25, top_k=4, min_p=0.125, n=2, min_tokens=3, seed=0, stop=["x", "y"],
        max_tokens=7,
    )  # fmt: skip
    found = reader().completion(body).sampling
    assert found == Sampling(
        max_new_tokens=7, min_new_tokens=3, temperature=0.5, top_k=4, top_p=0.25, min_p=0.125, n=2, seed=0,
        stop=("x", "y"),
    )  # fmt: skip
    usual = (
        reader().completion(completion(temperature=None, top_p=None, top_k=-1, min_p=None, n=None)).sampling
    )
    assert (usual.temperature, usual.top_p, usual.top_k, usual.min_p, usual.n) == (1.0, 1.0, 0, 0.0, 1)
    assert (usual.max_new_tokens, usual.min_new_tokens, usual.stop) == (16, 0, ())
    assert usual.seed > 0, "drawn"
    assert reader().completion(completion(max_tokens=0, echo=True)).sampling.max_new_tokens == 1
    greedy = reader().completion(completion(temperature=0, stop="x")).sampling
    assert (greedy.seed, greedy.stop) == (0, ("x",))
    most = reader().completion(completion(max_tokens=2**40, min_tokens=2**40, top_k=2**40)).sampling
    assert most.max_new_tokens == most.min_new_tokens == most.top_k == 1 << 30


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"stop": ["a", "b", "c"]}, "stop has 3 strings: at most 2 are allowed"),
        ({"stop": "a" * 1001}, "a stop string has more than 1000 characters"),
        ({"temperature": 0.0009}, "is below 0.001: use 0 for greedy decoding"),
        ({"max_tokens": 0}, "max_tokens = 0 gives nothing"),
        ({"proxytune_format": "roles", "prompt": [5]}, "proxytune_format 'roles' is of texts"),
        ({"proxytune_format": "roles", "echo": True, "logprobs": 1}, "proxytune_format 'roles' is of texts"),
        ({"alpha": -0.5}, "start the server with --allow-negative-alpha"),
    ],
)
def test_what_is_refused(body: Any, said: str) -> None:
    with pytest.raises(UserError) as raised:
        reader(max_stops=2).completion(completion(**body))
    assert said in str(raised.value)


def test_what_is_just_allowed() -> None:
    fine = completion(stop=["a" * 1000, "b"], temperature=0.001)
    assert len(reader(max_stops=2).completion(fine).sampling.stop) == 2
    roles = completion(proxytune_format="roles", echo=True)
    assert reader().completion(roles).job.responses[0].contexts == {"base": tuple(map(ord, "?ab"))}


def test_alpha_is_the_system_s_or_the_request_s() -> None:
    assert reader().completion(completion()).job.responses[0].alpha == ALPHA
    zero = reader().completion(completion(alpha=0))
    assert zero.job.responses[0].alpha == parse_alpha(0)
    assert reader(negative=True).completion(completion(alpha=-0.5)).job.responses[0].alpha == parse_alpha(
        -0.5
    )
    assert reader("base").completion(completion()).job.responses[0].alpha == ALPHA
    with pytest.raises(UserError, match="alpha acts on the proxy only: leave it out for 'm'"):
        reader("base").completion(completion(alpha=0))


def test_every_prompt_and_sample_is_a_response() -> None:
    call = reader(virtual=(3, 4)).completion(completion(prompt=["ab", "c"], n=2, stream=True))
    names = [example.id for example in named_by_content(["ab", "c"])]
    assert [(r.contexts["base"], r.example_id, r.sample) for r in call.job.responses] == [
        ((3, 4, 97, 98), names[0], 0), ((3, 4, 97, 98), names[0], 1),
        ((3, 4, 99), names[1], 0), ((3, 4, 99), names[1], 1),
    ]  # fmt: skip
    assert call.heads == (PromptHead("ab", (97, 98), 2), PromptHead("c", (99,), 1)), "without virtual tokens"
    assert [(r.trace, r.whole) for r in call.job.responses] == [(False, False)] * 4
    assert call.job.role == "proxy" and call.job.texts == [] and not call.next_from_score
    ids = reader().completion(completion(prompt=[97, 98], logprobs=0))
    assert ids.heads == (PromptHead("ab", (97, 98), 2),)
    assert [(r.trace, r.whole) for r in ids.job.responses] == [(True, True)]
    assert reader().completion(completion(proxytune_trace=True)).job.responses[0].trace is True


def test_without_a_limit_there_is_as_much_as_there_is_room() -> None:
    call = reader().completion(completion(prompt=["ab", "x" * 30], max_tokens=None))
    assert [r.sampling.max_new_tokens for r in call.job.responses] == [18, 1]
    assert reader().chat(chat()).job.responses[0].sampling.max_new_tokens == 18
    assert reader().chat(chat(max_tokens=5)).sampling.max_new_tokens == 5
    both = reader().chat(chat(max_tokens=5, max_completion_tokens=6))
    assert both.job.responses[0].sampling.max_new_tokens == 6, "the newer name"


@pytest.mark.parametrize(
    ("more", "responses", "by_score"),
    [
        ({"max_tokens": 1}, 0, True), ({"max_tokens": 0}, 0, False), ({"max_tokens": 2}, 1, False),
        ({"max_tokens": 1, "n": 2}, 2, False), ({"max_tokens": 1, "temperature": 1.0}, 1, False),
        ({"max_tokens": 1, "stop": "a"}, 1, False), ({"max_tokens": 1, "min_tokens": 1}, 1, False),
        ({"max_tokens": 1, "proxytune_trace": True}, 1, False),
    ],
)  # fmt: skip
def test_a_prompt_is_scored_and_one_greedy_token_read_off_it(
    more: Any, responses: int, by_score: bool
) -> None:
    call = reader(virtual=(3,)).completion(
        completion(**{"temperature": 0, "echo": True, "logprobs": 4, **more})
    )
    assert (len(call.job.responses), call.next_from_score) == (responses, by_score)
    assert call.job.texts == [TextToScore((97, 98), ALPHA, 4)]
    unscored = reader().completion(completion(**{"temperature": 0, "echo": True, **more}))
    assert unscored.job.texts == [] and not unscored.next_from_score


def test_a_conversation() -> None:
    call = reader(virtual=(3,)).chat(
        chat(("developer", "a"), ("user", "b"), n=2, logprobs=True, stream=False)
    )
    assert [(r.sample, r.trace, r.whole) for r in call.job.responses] == [(0, True, True), (1, True, True)]
    text = conversation_of(chat(("system", "a"), ("user", "b"))).plain
    assert call.job.responses[0].contexts == {"base": (3, *map(ord, text))}, "a developer is the system"
    assert call.heads == (PromptHead("", (3, *map(ord, text)), len(text)),)
    assert call.job.responses[1].example_id == named_by_content([text])[0].id
    begun = conversation_of(chat(("user", "b"), ("assistant", "So"), continue_final_message=True))
    assert (begun.messages, begun.begun) == ((("user", "b"),), "So")
    with pytest.raises(UserError, match="top_logprobs needs logprobs: true"):
        reader().chat(chat(top_logprobs=0))
    with pytest.raises(UserError, match="the last message is of the user, not of the assistant"):
        conversation_of(chat(continue_final_message=True))


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}])
def test_a_text_or_a_conversation_is_tokenised(body: Any) -> None:
    with pytest.raises(ValueError, match="give either 'prompt' or 'messages'"):
        TokenizeBody.model_validate(body)
    assert TokenizeBody.model_validate({"prompt": ""}).add_special_tokens is True


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_fields_that_are_not_supported_are_taken_with_values_that_change_nothing(name: str) -> None:
    for value in NEUTRAL[name]:
        assert completion(**{name: value}) == completion()
        assert chat(**{name: value}) == chat()
    for value in ("something", 0.5, {"a": 1}):
        with pytest.raises(ValueError, match=f"'{name}' is not supported: leave it out"):
            completion(**{name: value})
    if name.endswith("_penalty"):
        with pytest.raises(ValueError, match=f"'{name}' is not supported"):
            completion(**{name: False})


def test_fields_of_openai_that_have_no_part_in_an_answer() -> None:
    assert {"user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"} == IGNORED
    assert completion(**dict.fromkeys(IGNORED, "x")) == completion()
    for more in ({"nothing": 1}, {"messages": []}, {"stream_options": {"include_obfuscation": True}}):
        with pytest.raises(ValueError, match=r"nothing|messages|'include_obfuscation' is not supported"):
            completion(**more)
    assert completion(stream_options={"include_obfuscation": False}).stream_options is not None


def test_the_defaults_of_a_request() -> None:
    usual = {
        "model": "m", "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "n": 1, "min_tokens": 0,
        "seed": None, "stop": None, "stream": False, "stream_options": None, "alpha": None,
        "proxytune_trace": False,
    }  # fmt: skip
    assert completion().model_dump() == usual | {
        "prompt": "ab", "max_tokens": 16, "proxytune_format": "plain", "echo": False, "logprobs": None,
    }  # fmt: skip
    assert chat().model_dump() == usual | {
        "messages": [{"role": "user", "content": "ab"}], "max_tokens": None, "max_completion_tokens": None,
        "logprobs": False, "top_logprobs": None, "continue_final_message": False,
    }  # fmt: skip
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert ChatBody.model_validate({"model": "m", "messages": [parts]}).messages[0].text == "ab"


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("temperature", (0, 100), (-0.1, 100.1)), ("top_p", (0.01, 1), (0, 1.01)),
        ("top_k", (-1, 2**63 - 1), (-2,)), ("logprobs", (0, 20), (-1, 21)),
        ("min_p", (0, 1), (-0.1, 1.1)), ("n", (1,), (0,)), ("min_tokens", (0,), (-1,)),
        ("max_tokens", (0,), (-1,)),
        ("seed", (-(2**63), 2**63 - 1), (2**63, -(2**63) - 1)), ("model", ("x" * 300,), ("x" * 301,)),
    ],
)  # fmt: skip
def test_the_bounds_of_fields(field: str, good: tuple[Any, ...], bad: tuple[Any, ...]) -> None:
    for value in good:
        assert getattr(completion(**{field: value}), field) == value
    for value in bad:
        with pytest.raises(ValueError, match=field):
            completion(**{field: value})


# How it is written


def writer(body: CompletionBody | ChatBody, role: Any = "proxy") -> Writer:
    """Of two prompts."""
    heads = (PromptHead("<s>xyt3", (1, 7, 3), 3), PromptHead("c", (99,), 4))
    batch: Any = LetterBatch()
    return Writer(body, ServedCall(ServedJob(role), heads, Sampling()), batch)


def test_tokens_are_counted_once() -> None:
    made = writer(completion())
    for place, generated in ((0, 2), (1, 3), (0, 5), (1, 3)):
        made.count(place, Piece(0, "", (), generated))
    assert made.usage.json == {"prompt_tokens": 7, "completion_tokens": 8, "total_tokens": 15}


@pytest.mark.parametrize(
    ("body", "kinds", "begins"),
    [
        (completion(), ("text_completion", "text_completion"), "cmpl-"),
        (chat(), ("chat.completion", "chat.completion.chunk"), "chatcmpl-"),
    ],
)
def test_the_envelope(body: Any, kinds: tuple[str, str], begins: str) -> None:
    made = writer(body)
    whole, chunk = made.envelope([{"a": 1}], chunk=False), made.envelope([], chunk=True)
    assert (whole["object"], chunk["object"]) == kinds and whole["id"] == chunk["id"]
    assert whole["id"].startswith(begins) and len(whole["id"]) == len(begins) + 24
    assert (whole["model"], whole["choices"], whole["created"]) == ("m", [{"a": 1}], made.created)


def test_why_a_response_ended() -> None:
    made = writer(completion())
    reasons: tuple[Any, ...] = (None, "eos", "stop", "length")
    found = [made.finish_reason(Piece(0, "", (), 1, reason)) for reason in reasons]
    assert found == [None, "stop", "stop", "length"]
    for remark, said in (("no numbers", "no numbers"), (None, "the response failed")):
        with pytest.raises(RequestFault) as raised:
            made.finish_reason(Piece(0, "", (), 1, "nan", remark))
        fault = raised.value
        assert (fault.status, fault.kind, fault.code, str(fault)) == (
            500,
            "server_error",
            "model_error",
            said,
        )


RANKED = ((2, -0.5), (7, -1.0), (8, -1.5), (4, -2.0))


@pytest.mark.parametrize(
    ("token", "logprob", "top"),
    [
        (4, -2.25, {"t2": -0.5, "xy": -1.0, "t4": -2.25}), (2, -0.75, {"t2": -0.75, "xy": -1.0}),
        (8, -1.75, {"t2": -0.5, "xy": -1.0}), (4, -math.inf, {"t2": -0.5, "xy": -1.0, "t4": LEAST}),
    ],
)  # fmt: skip
def test_the_most_probable_tokens_and_the_chosen_one(token: int, logprob: float, top: Any) -> None:
    assert writer(completion(logprobs=3)).top(RANKED, token, logprob) == top
    assert writer(completion(logprobs=0)).top(RANKED, token, logprob) == {
        {4: "t4", 2: "t2", 8: "xy"}[token]: max(logprob, LEAST)
    }


TOKENS = (
    SeenToken(7, "xy", 0, -1.0, ranked={"proxy": RANKED, "base": RANKED[:1]}, alpha=0.5,
              probability={"proxy": 0.4, "base": 0.3}),
    SeenToken(9, "</s>", 2, -0.25, end=True, ranked={"proxy": RANKED}, alpha=0.5),
)  # fmt: skip


def test_log_probabilities_of_a_completion() -> None:
    assert writer(completion(logprobs=1)).logprobs(TOKENS, 5) == {
        "tokens": ["xy", "</s>"], "token_logprobs": [-1.0, -0.25], "text_offset": [5, 7],
        "top_logprobs": [{"t2": -0.5, "xy": -1.0}, {"t2": -0.5, "t9": -0.25}],
    }  # fmt: skip
    assert writer(completion()).logprobs(TOKENS, 5) is None
    assert writer(chat()).logprobs(TOKENS, 5) is None


def test_log_probabilities_of_a_chat() -> None:
    found = writer(chat(logprobs=True, top_logprobs=2)).logprobs(TOKENS, 0)
    xy = {"token": "xy", "logprob": -1.0, "bytes": [120, 121]}
    t2 = {"token": "t2", "logprob": -0.5, "bytes": [116, 50]}
    assert found == {"content": [{**xy, "top_logprobs": [t2, xy]}], "refusal": None}, "without the end"
    bare = writer(chat(logprobs=True)).logprobs(TOKENS, 0)
    assert bare == {"content": [{**xy, "top_logprobs": []}], "refusal": None}


def test_a_trace_has_every_role_and_of_a_model_alone_itself() -> None:
    [first, last] = writer(completion(proxytune_trace=True)).trace(TOKENS) or []
    assert first["probability"] == {"proxy": 0.4, "base": 0.3} and first["alpha"] == 0.5
    assert (first["text"], first["id"], first["offset"], first["end"]) == ("xy", 7, 0, False)
    assert (last["offset"], last["end"]) == (2, True) and first["top"].keys() == {"proxy", "base"}
    assert first["top"]["base"] == [{"text": "t2", "id": 2, "probability": pytest.approx(math.exp(-0.5))}]
    seen = SeenToken(7, "xy", 0, -1.0, ranked={"base": ((2, -1.0),) * 7, "proxy": RANKED}, alpha=0.5)
    [alone] = writer(completion(proxytune_trace=True), "base").trace([seen]) or []
    assert alone["alpha"] is None and alone["top"].keys() == {"base"} and len(alone["top"]["base"]) == 5
    assert writer(completion()).trace(TOKENS) is None


def test_a_prompt_is_given_back_with_its_scores() -> None:
    made = writer(completion(logprobs=1, echo=True))
    head = made.call.heads[0]
    scored = ScoredText((-1.25, -math.inf), (RANKED, RANKED[1:], RANKED[3:]))
    text, found = made.echoed(head, scored)
    assert text == head.text and found is not None and vars(found) == {
        "tokens": ["<s>", "xy", "t3"], "token_logprobs": [None, -1.25, LEAST],
        "top_logprobs": [None, {"t2": -0.5, "xy": -1.25}, {"xy": -1.0, "t3": LEAST}],
        "text_offset": [0, 0, 2],
    }  # fmt: skip
    assert made.echoed(head, None) == (head.text, None)
    with pytest.raises(RequestFault) as raised:
        made.echoed(head, ScoredText((math.nan,), ()))
    assert raised.value.status == 500 and "NaN" in str(raised.value)
    # the token after the last one
    piece = made.next_token(scored)
    assert (piece.text, piece.generated, piece.finish_reason) == ("text of [4]", 1, "length")
    assert [(t.id, t.text, t.logprob, t.end) for t in piece.tokens] == [(4, "t4", -2.0, False)]
    ended = made.next_token(ScoredText((), (((9, -0.5),),)))
    assert (ended.text, ended.finish_reason, ended.tokens[0].end) == ("", "eos", True)


# What is sent


def test_events_are_json_in_utf_8() -> None:
    assert streams.event({"a": "\u00e9", "b": None}) == 'data: {"a":"\u00e9","b":null}\n\n'.encode()
    assert streams.json_bytes({"a": "\ud800"}) == b'{"a":"\\ud800"}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        streams.json_bytes({"a": math.nan})


async def two_events() -> Any:
    """A stream."""
    yield b"one"
    yield b"two"


def test_a_stream_is_sent_and_its_end_is_told() -> None:
    ended = list[bool]()
    first, *bodies = sent(streams.EventStream(two_events(), ended.append), {"type": "http.request"})
    assert {body["type"] for body in bodies} == {"http.response.body"}
    headers = dict(first["headers"])
    assert (first["type"], first["status"]) == ("http.response.start", 200)
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"cache-control"] == b"no-cache" and b"content-length" not in headers
    assert [(body["body"], body["more_body"]) for body in bodies] == [
        (b"one", True), (b"two", True), (b"", False),
    ]  # fmt: skip
    assert ended == [True]


def test_a_stream_whose_client_goes_away_is_closed() -> None:
    ended, made = list[bool](), list[str]()

    async def slow() -> Any:
        try:
            yield b"one"
            await asyncio.sleep(3600)
        finally:
            made.append("closed")

    sent(streams.EventStream(slow(), ended.append), {"type": "http.request"}, {"type": "http.disconnect"})
    assert ended == [False]


# Faults


def test_the_page_names_every_status() -> None:
    assert set(routes.FAULTS) == {400, 401, 403, 404, 408, 413, 429, 500, 503} and routes.CLOSED == 499


def test_a_fault_in_the_shape_of_openai() -> None:
    fault = RequestFault(429, "a\nb  c", kind="rate_limit_error", param="n", code="busy", retry_after=7)
    error = {"message": "a b c", "type": "rate_limit_error", "param": "n", "code": "busy"}
    assert fault.body == {"error": error} and fault.headers == {"retry-after": "7"}
    plain = RequestFault(400, "x" * LONGEST)
    assert plain.body["error"] == {
        "message": "x" * 500, "type": "invalid_request_error", "param": None, "code": None,
    }  # fmt: skip
    assert plain.headers == {}
    assert RequestFault(400, "x" * 501).body["error"]["message"] == "x" * 500 + "..."
    assert RequestFault(401, "a", retry_after=0).headers == {"retry-after": "0", "www-authenticate": "Bearer"}
    assert RequestFault(400, "\ud800").body["error"]["message"] == "\\ud800"
    inside, away = broken("m"), leaving()
    assert (inside.status, inside.kind, inside.code) == (500, "server_error", "internal_error")
    assert (away.status, away.kind, away.code) == (503, "server_error", "shutting_down")
    assert away.headers == {"retry-after": "10"}


@pytest.mark.parametrize(
    ("first", "message", "param"),
    [
        ({"loc": ("body", "n"), "type": "int", "msg": "too large"}, "n: too large", "n"),
        ({"loc": ("body", "a", 0, "b"), "type": "x", "msg": "m"}, "a.0.b: m", "a.0.b"),
        (
            {"loc": ("body", "a"), "type": "extra_forbidden", "msg": "m"},
            "'a' is not supported: leave it out", "a",
        ),
        ({"loc": ("body",), "type": "value_error", "msg": "Value error, give one"}, "give one", None),
        (
            {"loc": (3,), "type": "json_invalid", "msg": "m", "ctx": {"error": "E"}},
            "the body is not JSON: E", None,
        ),
        ({"loc": ("body", 3), "type": "json_invalid", "msg": "m"}, "the body is not JSON: m", None),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_body(first: Any, message: str, param: str | None) -> None:
    other = {"loc": ("body", "z"), "type": "x", "msg": "another"}
    error: Any = SimpleNamespace(errors=lambda: [first, other])
    fault = routes._wrong_body(error)
    assert (fault.status, str(fault), fault.param) == (400, message, param)
