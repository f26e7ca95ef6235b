"""Bad input at every door of a base behind an API: one clear line, nothing lost, the spend said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxytune import results
from proxytune.api_spec import ApiSpec
from proxytune.black_box.client import ApiClient, Question
from proxytune.config import System, load_system, parse_system
from proxytune.errors import UserError
from proxytune.models import Models
from proxytune.options import ApiOptions, DecodeOptions, RunOptions
from proxytune.runs.decoders import client_of
from proxytune.runs.evaluation import Evaluation
from tests.support.command_line import proxytune, refused
from tests.support.endpoint import KEY
from tests.support.logprob_endpoint import LogprobEndpoint, serving_logprobs
from tests.support.misbehaving import KINDS, misbehaving

ITEMS = [
    {
        "question_id": f"q{n}",
        "question_sentence": f"How many is {n}?",
        "choices": ["one", "two"],
        "answer": ["0"],
    }
    for n in range(6)
]
FAST = {"api_retries": 1, "parallel": 1}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PROXYTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def items(tmp_path: Path) -> Path:
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    return path


@pytest.fixture(scope="module")
def served() -> Iterator[LogprobEndpoint]:
    with serving_logprobs(Models(load_system("demo")).get("base")) as state:
        yield state


@pytest.fixture
def server(served: LogprobEndpoint) -> LogprobEndpoint:
    served.form, served.fail_after, served.chat_only, served.key = "content", None, False, None
    served.hides = ""
    served.seen.clear()
    return served


def base_alone(url: str, **spec: Any) -> System:
    return System(name="box", base=ApiSpec(api=url, model="m", **spec))


def evaluation(system: System, items: Path, **api: Any) -> Evaluation:
    options = RunOptions(mode="choices", data=str(items))
    quiet = DecodeOptions(progress=False, api=ApiOptions(**{**FAST, **api}))
    return Evaluation(system, "realtimeqa", options, quiet)


def no_pauses(monkeypatch: pytest.MonkeyPatch, client: ApiClient) -> None:
    monkeypatch.setattr(type(client.endpoint.limits), "pause_before", lambda *_: 0.001)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("500", "status 500"),
        ("html", "is no JSON"),
        ("cut json", "is no JSON"),
        ("closes in the body", "the connection failed"),
        ("401", "it refuses OPENAI_API_KEY"),
        ("404", "status 404"),
        ("silence", "no whole answer within 0.3 s"),
        ("a drip of a body", "no whole answer within 0.3 s"),
        ("400 MB", "has more than"),
        ("a gzip bomb", "has more than"),
        ("a redirect elsewhere", "must name the endpoint itself"),
        ("another content type", "shows no log-probabilities"),
    ],
)
def test_an_endpoint_that_misbehaves(kind: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with misbehaving() as state:
        state.kind = KINDS[kind]
        deadline = 0.3 if KINDS[kind].hangs else 60.0
        options = ApiOptions(api_retries=1, parallel=1, api_deadline=deadline)
        client = ApiClient(ApiSpec(api=state.url, model="m", route="chat"), options)
        no_pauses(monkeypatch, client)
        with pytest.raises(UserError) as raised:
            client.ask([Question(client.item("q"), "q")])
        line = str(raised.value)
        assert why in line and "spent: " in line and "the same command continues" in line
        assert line.isprintable() and KEY not in line and len(line) < 600
        assert state.calls == (1 if KINDS[kind].once or kind == "another content type" else 2)


def test_nobody_answers(items: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = evaluation(base_alone("http://127.0.0.1:9/v1"), items, yes=True)
    assert asked.client is not None
    no_pauses(monkeypatch, asked.client)
    with pytest.raises(UserError, match=r"no connection .*spent: 2 calls, 0 \+ 0 tokens"):
        asked.run("base")


def test_what_was_answered_is_kept(
    server: LogprobEndpoint, items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that breaks down: the same command goes on, and asks only what is missing."""
    server.fail_after = 4
    system, out = base_alone(server.url, top_logprobs=2000), tmp_path / "run"
    first = evaluation(system, items)
    assert first.client is not None
    no_pauses(monkeypatch, first.client)
    with pytest.raises(UserError, match=r"status 500 \(out of order\); spent: 6 calls"):
        first.run("base", out)
    server.fail_after = None
    server.seen.clear()
    run, _ = evaluation(system, items).run("base", out)
    assert (run.status, run.n, len(server.seen)) == ("done", 6, 2)
    assert run.cost.api_calls == 6 and any("continued once" in note for note in run.notes)


def test_the_limit_on_the_cost(server: LogprobEndpoint, items: Path, tmp_path: Path) -> None:
    """A dollar a token: reserved before a call is sent, and for all sessions together."""
    price = {"price": (1e6 - 1, 1e6 - 1), "yes": True}
    system, out = base_alone(server.url, top_logprobs=2000), tmp_path / "run"
    with pytest.raises(UserError, match="over --max-cost 1"):
        evaluation(system, items, max_cost=1, **price).run("base", out)
    assert not server.seen
    with pytest.raises(UserError, match=r"--max-cost 100: .* with a higher limit continues"):
        evaluation(system, items, max_cost=100, **price).run("base", out)
    spent = len(server.seen)
    assert 0 < spent < 6
    with pytest.raises(UserError, match="--max-cost 100"):
        evaluation(system, items, max_cost=100, **price).run("base", out)
    assert len(server.seen) == spent, "what an earlier session spent counts"
    assert evaluation(system, items, max_cost=1e5, **price).run("base", out)[0].n == 6
    assert len(server.seen) == 6


def test_nothing_is_spent_without_consent(server: LogprobEndpoint, items: Path) -> None:
    with pytest.raises(UserError, match="costs money: add --yes"):
        evaluation(base_alone(server.url), items, price=(1.0, 2.0)).run("base")
    far = ApiClient(ApiSpec(api="https://example.invalid/v1", model="m"), ApiOptions(max_cost=1))
    with pytest.raises(UserError, match="--max-cost needs the price of 'm'"):
        far.check()
    assert not server.seen


def test_the_key_is_sent_and_never_stored(
    server: LogprobEndpoint, items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER_KEY", "sk-other-123456")
    server.key = "sk-other-123456"
    system = base_alone(server.url, top_logprobs=2000, key_variable="OTHER_KEY")
    evaluation(system, items).run("base", tmp_path / "run")
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"sk-other" not in stored and KEY.encode() not in stored
    server.key = "another"
    client = client_of(system, ApiOptions(**FAST))
    assert client is not None
    with pytest.raises(UserError, match="it refuses OTHER_KEY"):
        client.ask([Question(client.item("x"), "x")])


def test_nothing_among_the_visible_tokens(server: LogprobEndpoint, items: Path, tmp_path: Path) -> None:
    """Such an item is left out: counted, without a score, and the reader is told."""
    server.hides = "is 3?"
    run, folder = evaluation(base_alone(server.url), items).run("base", tmp_path / "run")
    rows = results.read_rows(folder)
    assert [row["question_id"] for row in rows if row.get("fault") == "unseen"] == ["q3"]
    assert run.metrics["faulty"].value == 1 / 6 and run.metrics["accuracy"].n == 5
    assert rows[3]["scores"] == {} and rows[3]["logprobs"] == [None, None]
    assert any("none of the options is among the 5 tokens" in note for note in run.notes)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"api": "ftp://h/v1", "model": "m"}, "base.api: give http"),
        ({"api": "https://u:secret@h/v1", "model": "m"}, "without a user"),
        ({"api": "https://h/v1?key=secret", "model": "m"}, "without a user, a query"),
        ({"api": "https://h/v1"}, "base.model"),
        ({"api": "https://h/v1", "model": " "}, "base.model: name the model"),
        ({"api": "https://h/v1", "model": "m", "top_logprobs": 0}, "base.top_logprobs"),
        ({"api": "https://h/v1", "model": "m", "top_logprob": 5}, "Did you mean: top_logprobs"),
        ({"api": "https://h/v1", "model": "m", "dtype": "float32"}, "Unknown key 'dtype'"),
        ({"api": "https://h/v1", "model": "m", "key_variable": "sk-secret"}, "and not the key itself"),
        ({"api": "https://h/v1", "model": "m", "route": "chat", "prompt_as": "ids"}, "takes no token ids"),
    ],
)
def test_a_file_that_is_wrong(spec: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_system({"base": spec}, Path("box.yaml"), Path())
    assert why in str(raised.value) and "secret" not in str(raised.value).replace(why, "")


def test_what_needs_weights_says_so(tmp_path: Path, server: LogprobEndpoint) -> None:
    box = tmp_path / "box.yaml"
    box.write_text(
        f"base: {{api: {server.url}, model: m, route: chat}}\n"
        "antiexpert: {model: 'demo://antiexpert'}\nexpert: {model: 'demo://expert', chat: llama2}\n"
        "tuned: {model: 'demo://tuned'}\ndata: {gsm: generated, truthfulqa_mc: generated}\n"
    )
    api = ("is behind an API", "eval, sweep-alpha, generate and check work with it")
    refused(
        proxytune("eval", "gsm", "-s", box, "--trace", "agreement", "--limit", 1, "--out", tmp_path / "a"),
        *api,
    )
    refused(proxytune("lm-eval", "--system", box, "--tasks", "x"), "behind an API")
    told = proxytune("eval", "gsm", "-s", box, "--limit", 1, "--out", tmp_path / "b")
    assert told.exit_code == 2 and "cannot go on with a response" in told.stderr.splitlines()[-1]
    refused(proxytune("eval", "gsm", "--defer", 0.3, "--limit", 1), "--defer is for a base behind an API")
    refused(proxytune("eval", "gsm", "-s", box, "--defer", 3), "--defer 3")
    sweep = ("sweep-alpha", "gsm", "--alphas", "0,1", "-s", box, "--limit", 1)
    told = proxytune(*sweep, "--out", tmp_path / "c")
    assert told.exit_code == 2 and "chat endpoint" in told.stderr.splitlines()[-1]
    assert not server.seen
