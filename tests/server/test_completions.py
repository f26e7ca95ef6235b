"""The server as its clients see it: the real `openai` client, and plain HTTP where that would not send such a
thing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

from proxytune.config import Sampling, load_system
from proxytune.decoding.decoder import Decoder
from proxytune.models.roles import Models
from proxytune.records import Example, Prompt
from proxytune.runs.steered import SteeredModel
from tests.support.require import require_demo, require_or_skip

try:
    import httpx2
    from openai import APIStatusError, BadRequestError, NotFoundError, OpenAI

    from tests.support.servers import Served, served
except ImportError:
    require_or_skip("serve", "the packages of the server are not installed: pip install 'proxytune[serve]'")

PROMPT = "Question: Tugil has 24 nuts. Then the pile grows 4 times. How many nuts does Tugil have now?"
OTHER = "Question: Where do the Fusas live?"
ROLES = {"proxytune_format": "roles"}
"""Prompts as `generate` shows them to every model."""


@pytest.fixture(scope="module")
def models() -> Models:
    require_demo()
    return Models(load_system("demo"))


@pytest.fixture(scope="module")
def here(models: Models) -> Iterator[Served]:
    with served(models) as found:
        yield found


@pytest.fixture(scope="module")
def client(here: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{here.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def offline(models: Models) -> SteeredModel:
    return SteeredModel(models)


def post(here: Served, body: object, path: str = "/v1/completions") -> httpx2.Response:
    return httpx2.post(f"{here.url}{path}", json=body, timeout=60)


@pytest.mark.parametrize("as_", ["proxy", "base", "expert"])
def test_texts_are_those_of_generate(client: OpenAI, offline: SteeredModel, as_: str) -> None:
    """Greedy and sampled, several prompts at once, n: what `generate` gives, whatever is asked beside it."""
    model = "demo" if as_ == "proxy" else f"demo/{as_}"
    for temperature, n in ((0.0, 1), (0.8, 2)):
        sampling = Sampling(
            max_new_tokens=24, temperature=temperature, top_p=0.9, n=n, seed=5, stop=("\n\n",)
        )
        expected = [c.text for c in offline.generate([PROMPT, OTHER], as_=as_, sampling=sampling)]
        found = client.completions.create(
            model=model, prompt=[PROMPT, OTHER], max_tokens=24, temperature=temperature, top_p=0.9, n=n,
            seed=5, stop="\n\n", extra_body=ROLES,
        )  # fmt: skip
        assert [choice.text for choice in found.choices] == expected
        assert [choice.index for choice in found.choices] == list(range(2 * n))
        assert found.usage is not None and found.usage.total_tokens == (
            found.usage.prompt_tokens + found.usage.completion_tokens
        )


def test_alpha_is_of_one_request(client: OpenAI, offline: SteeredModel) -> None:
    """Requests with several alphas in one batch get each what its own alpha gives."""
    alphas = [0, 0.5, 1, "first:3", "linear:0:1:10"]
    sampling = Sampling(max_new_tokens=20)
    expected = [offline.generate([PROMPT], sampling=sampling, alpha=alpha)[0].text for alpha in alphas]
    streams = [
        client.completions.create(
            model="demo",
            prompt=PROMPT,
            max_tokens=20,
            temperature=0,
            stream=True,
            extra_body={"alpha": alpha, **ROLES},
        )
        for alpha in alphas
    ]
    assert ["".join(c.choices[0].text for c in stream) for stream in streams] == expected
    assert len(set(expected)) > 1


def test_a_seed_of_0_is_a_seed(client: OpenAI) -> None:
    asked = {"model": "demo/base", "prompt": PROMPT, "max_tokens": 12, "temperature": 2.0}

    def said(**more: int) -> str:
        return str(client.completions.create(**asked, **more).choices[0].text)  # type: ignore[call-overload]

    assert said(seed=0) == said(seed=0) != said(seed=1)
    assert len({said() for _ in range(3)}) == 3, "none draws one"


def test_streams_are_the_whole_answer(client: OpenAI) -> None:
    asked = {"model": "demo", "prompt": [PROMPT, OTHER], "max_tokens": 30, "temperature": 0.7, "seed": 1}
    extra = {"proxytune_trace": True}
    whole = client.completions.create(**asked, logprobs=3, n=2, extra_body=extra)
    texts, traces, logprobs, ends = [""] * 4, [[] for _ in range(4)], [[] for _ in range(4)], {}
    usage = None
    for chunk in client.completions.create(
        **asked, logprobs=3, n=2, stream=True, stream_options={"include_usage": True}, extra_body=extra
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            traces[choice.index] += choice.proxytune_trace
            logprobs[choice.index] += choice.logprobs.token_logprobs
            if choice.finish_reason:
                assert choice.index not in ends
                ends[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    for trace, own, choice in zip(traces, logprobs, whole.choices, strict=True):
        assert own == pytest.approx(choice.logprobs.token_logprobs, abs=1e-3)  # another batch, other rounding
        assert [_words(record) for record in trace] == [_words(record) for record in choice.proxytune_trace]
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage


def _words(record: dict[str, Any]) -> list[object]:
    return [record["text"], record["id"], record["offset"], record["end"], record["alpha"]]


def test_traces_are_those_of_generate(client: OpenAI, offline: SteeredModel) -> None:
    """A record per token: its probability under every role, and the five most probable tokens of each."""
    [expected] = offline.generate([PROMPT], sampling=Sampling(max_new_tokens=200), trace=True)
    found = client.completions.create(
        model="demo",
        prompt=PROMPT,
        max_tokens=200,
        temperature=0,
        logprobs=5,
        extra_body={"proxytune_trace": True, **ROLES},
    )
    [choice] = found.choices
    assert [record["id"] for record in choice.proxytune_trace] == list(expected.token_ids)
    assert choice.proxytune_trace[-1]["end"] == (expected.finish_reason == "eos")
    shown = [record for record in choice.proxytune_trace if not record["end"]]
    assert "".join(record["text"] for record in shown) == choice.text == expected.text
    for record, token, logprob in zip(
        choice.proxytune_trace, expected.trace, choice.logprobs.token_logprobs, strict=True
    ):
        assert record["probability"].keys() == {"base", "expert", "antiexpert", "proxy"}
        assert record["probability"] == pytest.approx(token.probability, rel=1e-4, abs=1e-7)
        assert math.exp(logprob) == pytest.approx(token.probability["proxy"], rel=1e-4, abs=1e-7)
        for role, ranked in record["top"].items():
            assert len(ranked) == 5 and ranked[0]["text"] == token.top[role]
            values = [one["probability"] for one in ranked]
            assert values == sorted(values, reverse=True)
            own = [one["probability"] for one in ranked if one["id"] == record["id"]]
            assert own == pytest.approx([record["probability"][role]] * len(own), rel=1e-3, abs=1e-7)
    alone = post_trace(client, "demo/base")
    assert alone[0]["probability"].keys() == {"base"} == alone[0]["top"].keys() and alone[0]["alpha"] is None


def post_trace(client: OpenAI, model: str) -> list[dict[str, object]]:
    found = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=2, extra_body={"proxytune_trace": True}
    )
    trace: list[dict[str, object]] = found.choices[0].proxytune_trace  # type: ignore[attr-defined]
    return trace


def test_echo_scores_the_prompt(client: OpenAI, offline: SteeredModel, here: Served) -> None:
    """Token prompts and texts; one more token than the prompt has, whichever way it is found."""
    ids = post(here, {"prompt": PROMPT}, "/tokenize").json()["tokens"]
    for prompt in (ids, PROMPT):
        for extra in ({"max_tokens": 1}, {"max_tokens": 1, "stop": "zzz"}, {"max_tokens": 0}):
            found = client.completions.create(
                model="demo", prompt=prompt, temperature=0, echo=True, logprobs=2, **extra
            )
            [choice] = found.choices
            lists = choice.logprobs
            new = extra["max_tokens"]
            assert len(lists.tokens) == len(lists.token_logprobs) == len(lists.top_logprobs) == len(ids) + new
            assert lists.token_logprobs[0] is None and lists.top_logprobs[0] is None
            assert choice.text.startswith(PROMPT) and found.usage.completion_tokens == new
            assert lists.tokens[0] == "<s>" and lists.text_offset[:2] == [0, 0]
            for token, at in list(zip(lists.tokens, lists.text_offset, strict=True))[1:]:
                assert choice.text[at : at + len(token)] == token, "text_offset is where it stands"
            for logprob, top in zip(lists.token_logprobs[1:], lists.top_logprobs[1:], strict=True):
                assert logprob in top.values() and 2 <= len(top) <= 3
    # what the first 9 tokens say of the next ones is what the models say in this process
    names = ("base", "expert", "antiexpert")
    before = Prompt("", "", ids={name: tuple(ids[:9]) for name in names})
    text = post(here, {"tokens": ids[9:]}, "/detokenize").json()["prompt"]
    [expected] = Decoder(offline.models, "proxy").likelihoods([Example("0", before)], lambda _: [text])
    assert sum(lists.token_logprobs[9 : len(ids)]) == pytest.approx(expected.logprob, abs=1e-3)


def test_chat_is_generate_of_one_message(client: OpenAI, offline: SteeredModel) -> None:
    [expected] = offline.generate([PROMPT], sampling=Sampling(max_new_tokens=20))
    messages = [{"role": "user", "content": PROMPT}]
    asked = {"model": "demo", "messages": messages, "max_tokens": 20, "temperature": 0}
    found = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    assert found.choices[0].message.content == expected.text
    tokens = found.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == expected.text
    assert all(len(token.top_logprobs) == 3 for token in tokens)
    pieces = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(piece.choices[0].delta.content for piece in pieces) == expected.text
    assert [piece.choices[0].delta.role for piece in pieces] == ["assistant"] + [None] * (len(pieces) - 1)


def test_models_and_tokens(client: OpenAI, here: Served) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["demo", "demo/base", "demo/antiexpert", "demo/expert", "demo/tuned"]
    assert client.models.retrieve("demo/base").id == "demo/base"
    for text in ("Hello there", "", "é ☃ <s> x"):
        tokens = post(here, {"prompt": text, "add_special_tokens": False}, "/tokenize").json()["tokens"]
        assert post(here, {"tokens": tokens}, "/detokenize").json()["prompt"] == text
    info = httpx2.get(f"{here.url}/tokenizer_info").json()
    assert (info["model"], info["bos_token"], info["eos_token"]) == ("demo", "<s>", "</s>")
    for name in names:
        info = httpx2.get(f"{here.url}/tokenizer_info", params={"model": name}).json()
        found = post(here, {"model": name, "prompt": "a b"}, "/tokenize").json()
        listed = client.models.retrieve(name).model_dump()
        assert info["model"] == name and found["max_model_len"] == listed["max_model_len"] > 0
        assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) > 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": "a"}, "model: Field required"),
        ({"model": "demo", "prompt": "a", "foo": 1}, "'foo' is not supported"),
        ({"model": "demo", "prompt": "a", "logit_bias": {"5": 1}}, "'logit_bias' is not supported"),
        ({"model": "demo", "prompt": "a", "best_of": 3}, "'best_of' is not supported"),
        ({"model": "demo", "prompt": "a", "presence_penalty": 0.5}, "'presence_penalty' is not supported"),
        ({"model": "demo", "prompt": "a", "alpha": -1}, "negative"),
        ({"model": "demo", "prompt": "a", "alpha": "warmup"}, "alpha 'warmup' is not"),
        ({"model": "demo/base", "prompt": "a", "alpha": 1}, "proxy only"),
        ({"model": "demo", "prompt": "a", "n": 1000}, "at most 128"),
        ({"model": "demo", "prompt": []}, "empty list"),
        ({"model": "demo", "prompt": [[]]}, "empty list"),
        ({"model": "demo", "prompt": [[5], []]}, "no tokens"),
        ({"model": "demo", "prompt": [99999]}, "token 99999"),
        ({"model": "demo", "prompt": "\ud800"}, "not valid Unicode"),
        ({"model": "demo", "prompt": "a", "max_tokens": 0}, "gives nothing"),
        ({"model": "demo", "prompt": "a", "stop": [""]}, "empty string"),
        ({"model": "demo", "prompt": "a", "stop": ["a"] * 17}, "at most 16"),
        ({"model": "demo", "prompt": "a", "temperature": 1e-9}, "use 0 for greedy"),
        ({"model": "demo", "prompt": "a", "logprobs": 21}, "logprobs"),
        ({"model": "demo", "prompt": "a b " * 3000}, "context window"),
        ([1], "valid dictionary"),
    ],
)  # fmt: skip
def test_bad_requests_are_one_line(here: Served, body: object, said: str) -> None:
    for stream in (False, True):
        sent = {**body, "stream": stream} if isinstance(body, dict) else body
        found = httpx2.post(
            f"{here.url}/v1/completions",
            content=json.dumps(sent),
            headers={"content-type": "application/json"},
        )
        error = found.json()["error"]
        assert found.status_code == 400 and said in error["message"] and "\n" not in error["message"]
        assert error["type"] == "invalid_request_error"
    assert here.server.service.open == 0


def test_errors_are_those_of_the_client(client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="'gpt-4' does not exist"):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(BadRequestError, match="'tools' is not supported"):
        client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "a"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )  # fmt: skip
    with pytest.raises(APIStatusError, match="the last message is the assistant's"):
        client.chat.completions.create(model="demo", messages=[{"role": "assistant", "content": "a"}])
    # what changes nothing is taken
    client.completions.create(
        model="demo", prompt="a", max_tokens=1, presence_penalty=0, user="me", best_of=1, logit_bias={}
    )


def test_not_json(here: Served) -> None:
    for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"model": "demo", "prompt": NaN}'):
        found = httpx2.post(
            f"{here.url}/v1/completions", content=content, headers={"content-type": "application/json"}
        )
        assert found.status_code == 400 and found.json()["error"]["message"]
    assert httpx2.get(f"{here.url}/nothing").json()["error"]["type"] == "not_found_error"
    assert httpx2.get(f"{here.url}/health", headers={"host": "evil.example"}).status_code == 403
