"""Endpoints that misbehave: one line or, where another try helps, the verdicts; never a traceback, and never
without end."""

from __future__ import annotations

import email.utils
import gzip
import importlib.util
import json
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxytune import results
from proxytune.config import System
from proxytune.endpoints import Budget, CallFailed, CallLimits, CallQueue
from proxytune.endpoints import endpoint as endpoints
from proxytune.endpoints.calls import CallResult, CallsEnded
from proxytune.endpoints.endpoint import Answer, Reply, _after, _Response, is_address, key_in, reported
from proxytune.errors import UserError
from proxytune.judges.pairwise import PairwiseJudge
from proxytune.runs.judging import judge_run
from tests.support.command_line import proxytune
from tests.support.endpoint import KEY, Endpoint
from tests.support.misbehaving import KINDS, Misbehaving, misbehaving, says
from tests.support.require import require_or_skip
from tests.support.runs import evaluated

RETRIES = 2
ROWS = [{"instruction": f"Do {i}.", "output_1": f"plain {i}", "output_2": f"GOOD {i}"} for i in range(3)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Misbehaving]:
    """A server that misbehaves; the environment points to it."""
    if importlib.util.find_spec("httpx2") is None:
        require_or_skip("judges", "httpx2 is not installed: pip install 'proxytune[judges]'")
    with misbehaving() as state:
        monkeypatch.setenv("OPENAI_BASE_URL", state.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("PROXYTUNE_CACHE", str(tmp_path / "cache"))
        yield state


def limits(*, hangs: bool) -> CallLimits:
    """A short deadline only where nothing else ends a call: a busy machine may be slow."""
    return CallLimits(
        deadline=0.3 if hangs else 60, retries=RETRIES, pause=0.001, longest_pause=0.01, reply_bytes=1 << 20
    )


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.every(2)
def test_a_server_that_misbehaves(name: str, server: Misbehaving) -> None:
    kind = server.kind = KINDS[name]
    judge = PairwiseJudge("m", workers=1, limits=limits(hangs=kind.hangs))
    if kind.outcome != "fails":
        found = [row["preference"] for row in judge.judge(ROWS)]
        assert [preference is None for preference in found] == [kind.outcome == "no verdict"] * len(ROWS)
        return
    with pytest.raises(UserError) as raised:
        judge.judge(ROWS)
    line = str(raised.value)
    assert line.isprintable() and len(line) < 500 and KEY not in line
    assert server.calls == (1 if kind.once else 1 + RETRIES)
    assert "0 of 3 judgements are kept" in line and ("after 2 retries" in line) == (not kind.once)


def test_many_kinds_are_known() -> None:
    assert len(KINDS) >= 42
    assert {kind.outcome for kind in KINDS.values()} == {"fails", "judged", "no verdict"}


def test_nobody_answers(server: Misbehaving, monkeypatch: pytest.MonkeyPatch) -> None:
    for url, shown in [
        ("http://127.0.0.1:9/v1", "no connection"),
        ("http://[::1", "OPENAI_BASE_URL='http://"),
        ("http://127.0.0.1:99999/v1", "OPENAI_BASE_URL='http://"),
        ("http://", "OPENAI_BASE_URL='http://"),
        ("ftp://127.0.0.1/v1", "give http:// or https://"),
        ("localhost:8000", "give http:// or https://"),
        ("http://127.0.0.1/\x1b[31m", "give http:// or https://"),
    ]:
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        with pytest.raises(UserError, match=shown) as raised:
            PairwiseJudge("m", limits=limits(hangs=False)).judge(ROWS)
        assert str(raised.value).isprintable()
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    for proxy in ("http://127.0.0.1:99999", "nonsense://x", "http://127.0.0.1:9"):
        monkeypatch.setenv("HTTP_PROXY", proxy)
        monkeypatch.setenv("NO_PROXY", "")
        with pytest.raises(UserError, match=r"cannot ask it|no connection"):
            PairwiseJudge("m", limits=limits(hangs=False)).judge(ROWS)
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    with pytest.raises(UserError, match="OPENAI_API_KEY holds characters") as raised:
        PairwiseJudge("m").check()
    assert KEY not in str(raised.value)


def test_the_key_is_never_shown(server: Misbehaving, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = PairwiseJudge("m", limits=limits(hangs=False))
    for key, body, shown in [
        ("k" * 150, b"x" + b"k" * 150 + b"y", "it begins 'x***y'"),
        ("k" * 150, b"x" * 50 + b"k" * 150, f"it begins '{'x' * 50}***'"),
        ("", b"none of that", "it begins 'none of that'"),
    ]:
        monkeypatch.setenv("OPENAI_API_KEY", key)
        server.kind = says(body)
        with pytest.raises(UserError) as raised:
            judge.judge(ROWS)
        assert shown in str(raised.value)


def test_the_command_line_ends_with_2(server: Misbehaving, system: System, tmp_path: Path) -> None:
    """A server that never says anything usable leaves the run as it was."""
    folder = tmp_path / "run"
    evaluated(system, "alpaca_farm", data="plumbing", limit=2, out=folder, progress=False)
    before = (folder / results.RUN).read_bytes(), (folder / results.PREDICTIONS).read_bytes()
    for name, why in [
        ("403", "it refuses OPENAI_API_KEY"),
        ("a redirect elsewhere", "it redirects to"),
        ("content null", "gave no verdict on any of 2 responses"),
        ("content of surrogates", "gave no verdict on any of 2 responses"),
    ]:
        server.kind = KINDS[name]
        asked = proxytune("judge", "alpaca_farm", folder, "--judge", "m", "--price", "1,1", "--yes")
        assert asked.exit_code == 2 and why in asked.stderr and "Traceback" not in asked.stderr
        assert before == ((folder / results.RUN).read_bytes(), (folder / results.PREDICTIONS).read_bytes())
    server.kind = KINDS["usage null"]
    asked = proxytune("judge", "alpaca_farm", folder, "--judge", "m", "--price", "1,1", "--yes", "--json")
    assert asked.exit_code == 0 and json.loads(asked.stdout)["headline"] == "win_rate"


def test_what_a_server_asks_to_wait_is_heeded_within_bounds(endpoint: Endpoint) -> None:
    patient = CallLimits(pause=0.5, longest_pause=60)
    assert [patient.pause_before(retry, None) for retry in (1, 2, 3, 9)] == [0.5, 1, 2, 60]
    assert patient.pause_before(1, 7) == 7 and patient.pause_before(1, 3e9) == 60
    endpoint.failures = 3  # with Retry-After-Ms: 1
    begun = time.monotonic()
    assert (
        len(PairwiseJudge("m", workers=1, limits=CallLimits(pause=1e6, longest_pause=1e6)).judge(ROWS)) == 3
    )
    assert time.monotonic() - begun < 1e6


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "2"}, 2),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "Mon, 01 Jan 2001 00:00:00 GMT"}, None),
    ],
)
def test_the_units_of_what_a_server_asks_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    assert _after(headers) == seconds
    tomorrow = email.utils.formatdate(time.time() + 86400, usegmt=True)
    assert _after({"retry-after": tomorrow}) == pytest.approx(86400, abs=60)


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": 7, "completion_tokens": 3}, (7, 3)),
        ({"prompt_tokens": 7, "completion_tokens": 0}, (7, 0)),
        ({"prompt_tokens": 0, "completion_tokens": 0}, (100, 0)),
        ({"prompt_tokens": -7, "completion_tokens": 1.5}, (100, 50)),
        ({"prompt_tokens": True, "completion_tokens": "3"}, (100, 50)),
        ({"prompt_tokens": 10**12}, (100, 50)),
        ([], (100, 50)),
        (None, (100, 50)),
    ],
)
def test_what_is_no_count_costs_the_most_that_it_may(usage: object, tokens: tuple[int, int]) -> None:
    """A prompt always has tokens; a reply may have none."""
    answer = Answer({"choices": [], "usage": usage}, "")
    assert reported(answer.prompt_tokens, answer.completion_tokens, (100, 50)) == tokens


def test_a_model_that_reasons_is_asked_in_its_own_form(endpoint: Endpoint) -> None:
    endpoint.reasons = True
    found = PairwiseJudge("m", workers=1).judge(ROWS)
    assert [row["preference"] for row in found] == [2, 2, 2]
    assert ["max_tokens" in asked for asked in endpoint.seen] == [True, False, False, False]
    assert all(asked["max_completion_tokens"] for asked in endpoint.seen[1:])


def test_equal_questions_are_asked_once(endpoint: Endpoint) -> None:
    found = PairwiseJudge("m").judge([*ROWS, *ROWS])
    assert [row["preference"] for row in found] == [2] * 6 and len(endpoint.seen) == 3


def test_the_folder_is_locked_while_it_is_judged(
    endpoint: Endpoint, system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxytune.run_files.PATIENCE", 0.0)
    folder = tmp_path / "run"
    evaluated(system, "alpaca_farm", data="plumbing", limit=2, out=folder, progress=False)
    refusals: list[str] = []

    def again(done: int, total: int) -> None:
        with pytest.raises(UserError, match="another process is writing to") as raised:
            judge_run(folder, PairwiseJudge("m"))
        refusals.append(str(raised.value))

    made = judge_run(folder, PairwiseJudge("m", workers=1), again)
    assert made.headline == "win_rate" and len(refusals) == 2 and len(endpoint.seen) == 2


# What a server sent, read without a server

CLIENT = endpoints.Endpoint("http://here/v1", "sk-key")


def sent(body: bytes, status: int = 200, *, whole: bool = True, **headers: str) -> _Response:
    """A response; at most 100 bytes are read."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return _Response(status, named, body, whole, 100)


@pytest.mark.parametrize(
    ("status", "again"),
    [
        (300, None), (302, None), (399, None), (400, False), (401, None), (403, None), (404, False),
        (408, True), (409, True), (422, False), (425, True), (429, True), (499, False), (500, True),
        (503, True), (599, True), (600, False), (199, False),
    ],
)  # fmt: skip
def test_which_statuses_are_worth_another_try(status: int, again: bool | None) -> None:
    """None: another address or another key is needed, and no other try."""
    failed = CLIENT._refusal(sent(b'{"error": "no sk-key"}', status, retry_after="7"))
    assert failed.again is (again is True) and not failed.paid
    if again is None:
        assert (failed.status, failed.after) == (0, None)
    else:
        assert failed.reason == f"status {status} (no ***)" == str(failed)
        assert (failed.status, failed.after) == (status, 7)


def test_what_is_told_of_a_redirect_and_of_a_key() -> None:
    other = endpoints.Endpoint("http://here", "", CallLimits(), "`api`", "MY_KEY")
    redirect = sent(b"", 307, location="http://there\n/")
    assert CLIENT._refusal(redirect).reason == (
        "307: it redirects to 'http://there /': OPENAI_BASE_URL must name the endpoint itself"
    )
    assert other._refusal(sent(b"", 308)).reason == (
        "308: it redirects to 'nowhere': `api` must name the endpoint itself"
    )
    assert CLIENT._refusal(sent(b"", 401)).reason == "401: it refuses OPENAI_API_KEY"
    assert other._refusal(sent(b"off", 403)).reason == "403: it refuses MY_KEY (off)"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "a", "type": "b"}}', " (a)"), (b'{"error": "a", "message": "b"}', " (a)"),
        (b'{"message": "a"}', " (a)"), (b'"a"', " (a)"), (b"plain  text\n", " (plain text)"),
        (b"\xff", " (\ufffd)"), (b"[]", ""), (b'{"error": 3}', ""), (b"", ""), (b'{"detail": "a"}', ""),
        (b'"\\u001b[31m sk-key"', " (?[31m ***)"), (b'"' + b"y" * 300 + b'"', f" ({'y' * 200})"),
    ],
)  # fmt: skip
def test_what_a_server_says_of_an_error(body: bytes, message: str) -> None:
    assert CLIENT._message(body) == message


PACKED = zlib.compress(b"x" * 100)


@pytest.mark.parametrize(
    ("response", "found"),
    [
        (sent(b"plain"), b"plain"),
        (sent(b"plain", content_encoding=" Identity "), b"plain"),
        (sent(b"plain", content_encoding=""), b"plain"),
        (sent(gzip.compress(b"a"), content_encoding="GZIP"), b"a"),
        (sent(gzip.compress(b"a"), content_encoding="x-gzip"), b"a"),
        (sent(PACKED, content_encoding="deflate"), b"x" * 100),
        (sent(PACKED, content_encoding="gzip"), b"x" * 100),
        (sent(zlib.compress(b"x" * 101), content_encoding="deflate"), "has more than 100 bytes"),
        (sent(b"plain", content_encoding="gzip"), "is not gzip, as it claims"),
        (sent(PACKED[:-5], content_encoding="deflate"), "ends within its deflate"),
        (sent(b"plain", content_encoding="br"), "is in the encoding 'br'"),
        (sent(b"plain", whole=False), "has more than 100 bytes"),
        (sent(b"plain", whole=False, content_encoding="gzip"), "has more than 100 bytes"),
    ],
)
def test_a_body_is_unpacked_within_bounds(response: _Response, found: bytes | str) -> None:
    if isinstance(found, bytes):
        assert CLIENT._unpacked(response) == found
    else:
        with pytest.raises(CallFailed) as raised:
            CLIENT._unpacked(response)
        assert raised.value.reason == f"its reply {found}" and raised.value.again and raised.value.paid


@pytest.mark.parametrize(
    ("error", "reason", "again", "paid"),
    [
        (lambda kinds: TimeoutError(), "no whole answer within 7 s", True, True),
        (lambda kinds: kinds.ConnectError("sk-key"), "no connection (***)", True, False),
        (lambda kinds: kinds.ProxyError("x"), "no connection (x)", True, False),
        (lambda kinds: kinds.InvalidURL("x"), "cannot ask it (x)", False, False),
        (lambda kinds: kinds.UnsupportedProtocol("x"), "cannot ask it (x)", False, False),
        (lambda kinds: ValueError("x"), "cannot ask it (x)", False, False),
        (lambda kinds: ImportError("x"), "cannot ask it (x)", False, False),
        (lambda kinds: kinds.ReadError("x"), "the connection failed (ReadError: x)", True, True),
    ],
)
def test_what_becomes_of_a_call_that_brings_no_response(
    error: Any, reason: str, again: bool, paid: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether another try may help, and whether it may have cost something: what was sent may be answered."""
    kinds = pytest.importorskip("httpx2")
    sent_to: list[tuple[str, bytes, int]] = []

    async def post(self: endpoints.Endpoint, path: str, content: bytes, most: int) -> _Response:
        sent_to.append((path, content, most))
        raise error(kinds)

    monkeypatch.setattr(endpoints.Endpoint, "_post", post)
    client = endpoints.Endpoint("http://here", "sk-key", CallLimits(deadline=7.0, reply_bytes=99))
    with pytest.raises(CallFailed) as raised:
        client.ask({"a": 1})
    failed = raised.value
    assert (failed.reason, failed.again, failed.paid) == (reason, again, paid)
    with pytest.raises(CallFailed):
        client.post("completions", {}, 5)
    assert sent_to == [("chat/completions", b'{"a": 1}', 99), ("completions", b"{}", 5)]


def test_the_text_of_a_chat_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    content: Any = None
    usage = {"prompt_tokens": 7, "completion_tokens": 3}

    async def post(self: endpoints.Endpoint, path: str, body: bytes, most: int) -> _Response:
        return sent(json.dumps(content).encode(), most=most)

    def sent(body: bytes, most: int) -> _Response:
        return _Response(200, {}, body, True, most)

    monkeypatch.setattr(endpoints.Endpoint, "_post", post)
    for message, text in (({"content": "a"}, "a"), ({"content": None}, ""), ({"content": "", "x": 1}, "")):
        content = {"choices": [{"message": message}, {"message": {"content": "b"}}], "usage": usage}
        assert CLIENT.ask({}) == Reply(text, 7, 3)
    for none in (
        {"choices": []},
        {"choices": [{"message": {"content": 3}}]},
        {"choices": [{"text": "a"}]},
        [],
    ):
        content = none
        with pytest.raises(CallFailed, match=r"^its reply has no text in choices\[0\]\.message\.content"):
            CLIENT.ask({})


def test_a_reply_is_json_and_no_error() -> None:
    answer = CLIENT._reply(sent(b'{"choices": [], "error": "x"}'))
    assert (
        answer.content == {"choices": [], "error": "x"} and answer.begins == '{"choices": [], "error": "x"}'
    )
    for plain in (b"[3]", b'["error"]', b'"error"', b"3", b"null"):
        assert CLIENT._reply(sent(plain)).content == json.loads(plain)
    assert CLIENT._reply(sent(b'"' + b"a" * 90 + b'"')).begins == '"' + "a" * 59
    failed = answer.unreadable("has no text")
    assert failed.reason == 'its reply has no text (it begins \'{"choices": [], "error": "x"}\')'
    for body, reason in [
        (b'{"error": {"message": "a"}}', "its reply is an error (a)"),
        (b"<html>", "its reply is no JSON (it begins '<html>')"),
        (b"", "its reply is no JSON"),
    ]:
        with pytest.raises(CallFailed) as raised:
            CLIENT._reply(sent(body))
        failed = raised.value
        assert (failed.reason, failed.again, failed.paid, failed.status) == (reason, True, True, 0)


def test_counts_of_tokens_have_a_largest() -> None:
    for given, found in ((10**9, 10**9), (10**9 + 1, None), (1, 1), (-1, None), (1.0, None), (False, None)):
        answer = Answer({"usage": {"prompt_tokens": given, "completion_tokens": given}}, "")
        assert (answer.prompt_tokens, answer.completion_tokens) == (found, found)
    assert Answer({"usage": {"completion_tokens": 0}}, "").completion_tokens == 0
    assert Reply("", None, 3).tokens((9, 8)) == (9, 3) and Reply("", 0, None).tokens((9, 8)) == (0, 8)


@pytest.mark.parametrize(
    ("url", "valid"),
    [
        ("http://h", True), ("https://h:1/v1", True), ("http://h:0", False), ("http://h:65536", False),
        ("http://h:65535", True), ("ftp://h", False), ("http:///v1", False), ("h", False),
        ("http://\u00e4", False), ("http://h/a b", False), ("http://h/\x07", False), ("http://[::1", False),
    ],
)  # fmt: skip
def test_where_requests_can_be_sent(url: str, valid: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_address(url) is valid
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    if valid:
        made = endpoints.Endpoint.of_environment(CallLimits(retries=3))
        assert made == endpoints.Endpoint(url, "k", CallLimits(retries=3)) and "'k'" not in repr(made)
    else:
        with pytest.raises(UserError, match=r"^OPENAI_BASE_URL=.*: give http:// or https://"):
            endpoints.Endpoint.of_environment(CallLimits())


def test_the_usual_address_and_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made = endpoints.Endpoint.of_environment(CallLimits())
    assert (made.url, made.key) == ("https://api.openai.com/v1", "")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://h/v1/")
    assert endpoints.Endpoint.of_environment(CallLimits()).url == "http://h/v1"
    monkeypatch.setenv("A_KEY", "abc")
    assert key_in("A_KEY") == "abc" and key_in("NO_KEY") == ""
    for bad in ("a\nb", "\u00e4"):
        monkeypatch.setenv("A_KEY", bad)
        with pytest.raises(UserError, match=r"^A_KEY holds characters that no key has"):
            key_in("A_KEY")


# Queues of calls, without an endpoint


def failing(times: int, **more: Any) -> Any:
    """A call that fails so often, and then brings its number."""
    seen: dict[int, int] = {}

    def send(number: int) -> CallResult[str]:
        seen[number] = seen.get(number, 0) + 1
        fails = {"again": True, "paid": False, **more}
        if seen[number] <= times:
            return CallResult(CallFailed("why", **fails), 0.5)
        return CallResult(f"n{number}", 1.0)

    send.__dict__["seen"] = seen
    return send


def queue(send: Any, budget: Budget | None = None, workers: int = 2, **limits: Any) -> CallQueue[str]:
    """A queue whose calls are expected to cost a dollar."""
    quick = CallLimits(**{"pause": 0.001, "longest_pause": 0.002, **limits})
    return CallQueue(send, lambda number: 1.0, budget or Budget(None), workers, quick)


def test_every_number_is_asked_until_it_brings_something() -> None:
    send = failing(2)
    asked = queue(send, retries=2)
    assert dict(asked.replies([5, 3, 4])) == {5: "n5", 3: "n3", 4: "n4"}
    assert send.seen == {5: 3, 3: 3, 4: 3}
    assert (asked.budget.spent, asked.budget.settled) == (3 * (0.5 + 0.5 + 1.0), 9)
    assert asked.budget.in_flight == 0 and asked.budget.excess == 1.0
    assert list(queue(failing(0)).replies([])) == []


@pytest.mark.parametrize(
    ("retries", "more", "reason", "calls"),
    [
        (2, {}, "it failed after 2 retries: why", 3),
        (0, {}, "it failed: why", 1),
        (5, {"again": False}, "it failed: why", 1),
    ],
)
def test_a_call_that_fails_for_good(retries: int, more: dict[str, Any], reason: str, calls: int) -> None:
    send = failing(9, **more)
    with pytest.raises(CallsEnded) as raised:
        list(queue(send, workers=1, retries=retries).replies([1, 2]))
    assert str(raised.value) == reason and not raised.value.money and send.seen == {1: calls}


def test_a_limit_that_the_next_call_could_pass() -> None:
    send, budget = failing(0), Budget(2.5)
    asked, found = queue(send, budget, workers=1), []
    with pytest.raises(CallsEnded) as raised:
        for pair in asked.replies([1, 2, 3]):
            found.append(pair)
    assert found == [(1, "n1"), (2, "n2")] and raised.value.money
    assert str(raised.value) == ("--max-cost 2.5: 2.0000 USD are spent, and the next call may cost 1.0000")
    assert len(list(queue(failing(0), Budget(3.0), workers=1).replies([1, 2, 3]))) == 3, "up to the limit"


def test_the_first_call_goes_alone() -> None:
    """As many at once as have ended, and one more, so that a price that surprises costs one call."""
    lock, together, running, most = threading.Lock(), threading.Event(), 0, list[int]()

    def send(number: int) -> CallResult[str]:
        nonlocal running
        with lock:
            running += 1
            most.append(running)
            if running > 1:
                together.set()
        if number:
            together.wait(10)
        with lock:
            running -= 1
        return CallResult("x", 0.0)

    asked = queue(send, workers=3)
    assert len(list(asked.replies(range(9)))) == 9
    assert most[0] == 1 and max(most[:3]) <= 2 and 2 <= max(most) <= 3


def test_what_a_budget_affords() -> None:
    assert Budget(None).affords(1e9)
    budget = Budget(10.0, spent=4.0, in_flight=3.0)
    assert budget.affords(3.0) and not budget.affords(3.1)
    budget.settle(3.0, 0.0, 2.0)
    assert (budget.in_flight, budget.spent, budget.excess, budget.settled) == (0.0, 6.0, 1.0, 1)
