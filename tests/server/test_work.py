"""Who is let in, what handlers call, and the engine's thread, step by step and without a model."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from proxytune.config import System, parse_alpha
from proxytune.decoding.open_batch import Piece, ScoredText
from proxytune.errors import UserError
from proxytune.options import DecodeOptions, ServeOptions
from tests.support.letter_batch import LetterBatch, sent
from tests.support.require import require_or_skip

try:
    from proxytune.server import app as routes
    from proxytune.server import guards, run
    from proxytune.server.faults import RequestFault
    from proxytune.server.guards import ApiKey, Guard
    from proxytune.server.keys import read_key
    from proxytune.server.pages import docs_page
    from proxytune.server.playground.page import _expected, playground_html
    from proxytune.server.work.engine_thread import WHOLE, Deadline, EngineThread
    from proxytune.server.work.jobs import JobFault, ServedJob, TextToScore
    from proxytune.server.work.meters import Meters
    from proxytune.server.work.service import ServedAnswer, Service
except ImportError:
    require_or_skip("serve", "the packages of the server are not installed: pip install 'proxytune[serve]'")

ALPHA = parse_alpha("0.75")
DEMO = System.model_validate({"name": "s", "base": {"model": "b"}, "alpha": 0.75})


# Who is let in


def test_a_key_is_compared_whole() -> None:
    key = ApiKey.of("sk-secret")
    for header, opens in (
        (b"Bearer sk-secret", True), (b"bEARER   sk-secret ", True), (b"Bearer sk-secre", False),
        (b"Basic sk-secret", False), (b"sk-secret", False), (b"", False), (None, False),
    ):  # fmt: skip
        assert key.opens(header) is opens, header
    assert b"secret" not in key.digest


def guarded(
    key: str | None = None, host: str = "127.0.0.1", most: int = 5
) -> tuple[Guard, Meters, list[bytes]]:
    """A guard before an application that takes the whole body and answers 201."""
    meters, taken = Meters(), list[bytes]()

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        scope["route"] = SimpleNamespace(path="/v1/things")
        body = b""
        while (message := await receive()).get("more_body"):
            body += message["body"]
        taken.append(body + message.get("body", b""))
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    options = ServeOptions(host=host, max_body=most)
    secret = None if key is None else ApiKey.of(key)
    return Guard(behind, options, meters, secret, frozenset({"/page.js"})), meters, taken


def status(found: list[Any]) -> int:
    """Of what was sent."""
    return int(found[0]["status"])


LOCALHOST = (b"host", b"localhost:8000")
EMPTY = {"type": "http.request", "body": b"", "more_body": False}


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        (b"localhost", True), (b"LOCALHOST:80", True), (b"127.0.0.1:8000", True), (b"[::1]", True),
        (b"[::1]:8000", True), (b"evil.example", False), (b"evil.example:8000", False), (b"", False),
        (b"localhost.evil.example", False), (b"127.0.0.2", False),
    ],
)  # fmt: skip
def test_only_names_of_this_machine_are_answered(name: bytes, allowed: bool) -> None:
    guard, _, _ = guarded()
    assert status(sent(guard, EMPTY, headers=[(b"host", name)])) == (201 if allowed else 403)
    anywhere, _, _ = guarded(host="0.0.0.0")
    assert status(sent(anywhere, EMPTY, headers=[(b"host", name)])) == 201


@pytest.mark.parametrize(
    ("path", "code"),
    [("/", 201), ("/health", 201), ("/docs", 201), ("/openapi.json", 201), ("/page.js", 201),
     ("/metrics", 401), ("/v1/models", 401), ("/tokenize", 401)],
)  # fmt: skip
def test_what_needs_a_key(path: str, code: int) -> None:
    guard, meters, _ = guarded("sk-secret")
    found = sent(guard, EMPTY, headers=[LOCALHOST], path=path)
    assert status(found) == code
    with_key = [LOCALHOST, (b"authorization", b"Bearer sk-secret")]
    assert status(sent(guard, EMPTY, headers=with_key, path=path)) == 201
    if code == 401:
        error = json.loads(found[1]["body"])["error"]
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert (b"www-authenticate", b"Bearer") in found[0]["headers"]
        assert 'proxytune_requests_total{route="other",status="401"} 1.0' in meters.text().decode()
    times = f'proxytune_request_seconds_count{{route="/v1/things"}} {1.0 if code == 401 else 2.0}'
    assert times in meters.text().decode()
    counted = 'proxytune_requests_total{route="/v1/things",status="201"}'
    assert f"{counted} {1.0 if code == 401 else 2.0}" in meters.text().decode()


@pytest.mark.parametrize(
    ("declared", "parts", "code"),
    [
        (b"5", [b"abcde"], 201), (b"6", [b"abcdef"], 413), (b"6", [b"a"], 413), (None, [b"abc", b"de"], 201),
        (None, [b"abc", b"def"], 413), (b"x", [b"abc"], 201),
    ],
)  # fmt: skip
def test_bodies_up_to_the_limit_are_taken_whole(
    declared: bytes | None, parts: list[bytes], code: int
) -> None:
    guard, _, taken = guarded()
    headers = [LOCALHOST] + ([] if declared is None else [(b"content-length", declared)])
    messages = [{"type": "http.request", "body": part, "more_body": part is not parts[-1]} for part in parts]
    found = sent(guard, *messages, headers=headers)
    assert status(found) == code and taken == ([b"".join(parts)] if code == 201 else [])
    if code == 413:
        error = json.loads(found[1]["body"])["error"]
        assert error["code"] == "body_too_large" and "larger than 5 bytes" in error["message"]


def test_a_body_has_to_come_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert guards.BODY_SECONDS == 30
    monkeypatch.setattr(guards, "BODY_SECONDS", 0)
    guard, _, taken = guarded()
    found = sent(guard, {"type": "http.request", "body": b"a", "more_body": True}, headers=[LOCALHOST])
    assert status(found) == 408 and taken == []


@pytest.mark.parametrize(
    ("text", "key"),
    [("12345678", "12345678"), (" 12345678\n", "12345678"), ("1234567", None), ("12345 678", None),
     ("1234567\u00e9", None), ("1234\t5678", None)],
)  # fmt: skip
def test_which_keys_are_keys(
    text: str, key: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROXYTUNE_API_KEY", "of-the-environment")
    path = tmp_path / "key"
    path.write_text(text, encoding="utf-8")
    asked = ServeOptions(api_key_file=str(path))
    if key is not None:
        assert read_key(asked) == key
    else:
        with pytest.raises(UserError, match="holds no key: at least 8 letters, without spaces"):
            read_key(asked)
    assert read_key(ServeOptions()) == "of-the-environment"
    path.write_bytes(b"\xff\xfe12345678")
    with pytest.raises(UserError, match="it is no text"):
        read_key(asked)
    monkeypatch.delenv("PROXYTUNE_API_KEY")
    assert read_key(ServeOptions()) is None


# What handlers call


def service(
    rows: tuple[int, ...] = (3, 2), roles: tuple[Any, ...] = ("proxy", "base"), **limits: Any
) -> Service:
    """A service of batches of letters, whose engine does not run."""
    batches: Any = {role: LetterBatch(rows=n) for role, n in zip(roles, rows, strict=True)}
    return Service(DEMO, batches, ServeOptions(**{"max_waiting": 2, **limits}), Meters())


def test_the_names_of_the_models() -> None:
    both, alone = service(), service((1,), ("base",))
    assert both.models == {"s": "proxy", "s/base": "base"} and both.first_model == "s"
    assert alone.models == {"s/base": "base"} and alone.first_model == "s/base"
    assert both.role_of("s/base") == "base"
    with pytest.raises(RequestFault) as raised:
        alone.role_of("s")
    fault = raised.value
    assert str(fault) == "the model 's' does not exist: there are s/base"
    assert (fault.status, fault.kind, fault.param, fault.code) == (
        404, "not_found_error", "model", "model_not_found",
    )  # fmt: skip
    described = routes._model(both, "s")
    assert described == {
        "id": "s", "object": "model", "created": both.created, "owned_by": "proxytune", "role": "proxy",
        "system": "s", "max_model_len": 80, "alpha": "0.75",
    }  # fmt: skip
    assert routes._model(both, "s/base")["alpha"] is None


def test_health_is_503_once_it_shuts_down() -> None:
    made = service()
    [route] = [one for one in routes._operations(made).routes if getattr(one, "path", "") == "/health"]
    endpoint: Any = route.endpoint  # type: ignore[attr-defined]
    gone = asyncio.run(endpoint())
    assert (gone.status_code, json.loads(gone.body)) == (503, {"status": "shutting down"})
    made._engine = SimpleNamespace(alive=True)  # type: ignore[assignment]
    here = asyncio.run(endpoint())
    assert (here.status_code, json.loads(here.body)) == (200, {"status": "ok"})
    made.draining = True
    assert asyncio.run(endpoint()).status_code == 503


def asked(made: Service, count: int, job: ServedJob | Exception) -> ServedAnswer:
    """Ask it in an event loop of its own."""

    async def ask() -> ServedAnswer:
        made._loop = asyncio.get_running_loop()

        def make() -> ServedJob:
            if isinstance(job, Exception):
                raise job
            return job

        return await made.ask(count, make)

    return asyncio.run(ask())


def job_of(responses: int, texts: int = 0) -> ServedJob:
    """A job of so many responses and texts."""
    whole: Any = ["r"] * responses
    return ServedJob("proxy", whole, [TextToScore((1,), ALPHA, 0)] * texts)


async def gone_early(made: Service) -> None:
    """A request that is cancelled before it is a job."""
    made._loop, held = asyncio.get_running_loop(), threading.Event()
    task = asyncio.create_task(made.ask(2, lambda: (held.wait(10), job_of(2))[1]))
    await asyncio.sleep(0.01)
    assert made.open == 5, "its place is taken"
    task.cancel()
    held.set()
    await task


def test_room_is_reserved_and_given_back() -> None:
    made = service()  # 3 rows, and 2 may wait
    first = asked(made, 3, job_of(2))
    assert made._engine._inbox.get_nowait() is first.job
    assert made.open == 2, "what was read is what is open, whatever was reserved"
    asked(made, 3, job_of(2, 1))
    assert made.open == 5
    with pytest.raises(RequestFault, match="5 responses are under way or wait, and at most 5 may") as raised:
        asked(made, 1, job_of(1))
    fault = raised.value
    assert (fault.status, fault.kind, fault.code, fault.retry_after) == (
        429,
        "rate_limit_error",
        "server_busy",
        1,
    )
    assert b"proxytune_refused_total 1.0" in made.meters.text()
    first.close()
    first.close()
    assert made.open == 3 and first.job.cancelled
    with pytest.raises(RequestFault, match="bad input") as raised:
        asked(made, 2, UserError("bad input"))
    assert raised.value.status == 400 and made.open == 3
    with pytest.raises(ZeroDivisionError):
        asked(made, 2, ZeroDivisionError())
    with pytest.raises(asyncio.CancelledError):  # a client that goes while its prompt is prepared
        asyncio.run(gone_early(made))
    assert made.open == 3, "a place is given back however a request ends"
    with pytest.raises(RequestFault, match="the request asks for 6 responses: at most 5 fit") as raised:
        asked(made, 6, job_of(6))
    assert raised.value.status == 400
    made.draining = True
    with pytest.raises(RequestFault, match="the server shuts down"):
        asked(made, 1, job_of(1))


def test_who_comes_again_when() -> None:
    made = service()
    assert made._retry_after() == 1
    made.took(101.0)
    assert made._seconds == pytest.approx(11.0) and made._retry_after() == 4, "11 seconds by 3 rows"
    made.took(2011.0)
    assert made._retry_after() == 30, "at most"


def read(answer: ServedAnswer) -> list[Any]:
    """All of its events."""

    async def all_of_it() -> list[Any]:
        return [event async for event in answer.events()]

    return asyncio.run(all_of_it())


def test_an_answer_ends_with_its_last_response_or_text() -> None:
    made = service()
    answer = asked(made, 3, job_of(2, 1))
    more, last, scored = Piece(0, "a", (), 1), Piece(0, "b", (), 2, "eos"), ScoredText((), ())
    made._hear([(answer.job, [(0, more), (1, last)])])
    assert (answer.size, made.open) == (2, 2)
    made._hear([(answer.job, [(0, scored)]), (job_of(1), [(0, last)])])
    assert (answer.size, made.open) == (1, 1)
    made._hear([(answer.job, [(0, last)])])
    assert (answer.size, made.open, made._answers) == (0, 0, {})
    assert read(answer) == [(0, more), (1, last), (0, scored), (0, last)]
    answer.close()
    assert made.open == 0 and not answer.job.cancelled, "it was over"


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        (JobFault("wrong", wrong=True), 400, "wrong"), (JobFault("inside"), 500, "inside"),
        (JobFault("x", leaving=True), 503, "the server shuts down"),
    ],
)  # fmt: skip
def test_a_fault_of_a_job_ends_all_of_it(fault: JobFault, status: int, message: str) -> None:
    made = service()
    answer = asked(made, 2, job_of(2))
    made._hear([(answer.job, [(WHOLE, fault)])])
    assert made.open == 0
    with pytest.raises(RequestFault, match=message) as raised:
        read(answer)
    assert raised.value.status == status


# The engine thread


class Posted(list[Any]):
    """What a thread has told."""

    def __call__(self, news: Any) -> None:
        """Hear it."""
        self.extend((job, place, what) for job, events in news for place, what in events)


def engine() -> tuple[EngineThread, LetterBatch, Posted]:
    """A thread that was not started: what it does is called step by step."""
    batch, posted = LetterBatch(), Posted()
    batches: Any = {"proxy": batch}
    return EngineThread(batches, posted), batch, posted


def test_pieces_go_to_their_jobs_until_they_end() -> None:
    thread, batch, posted = engine()
    jobs = [job_of(2), job_of(1)]
    for job in jobs:
        thread.put(job)
    assert thread._take() and [job.tickets for job in jobs] == [{10: 0, 11: 1}, {12: 0}]
    batch.next = [Piece(12, "c", (), 1, "eos"), Piece(11, "b", (), 1), Piece(10, "a", (), 1, "length")]
    thread._step("proxy", batch)  # type: ignore[arg-type]
    assert [(job, place, what.text) for job, place, what in posted] == [
        (jobs[0], 0, "a"), (jobs[0], 1, "b"), (jobs[1], 0, "c"),
    ]  # fmt: skip
    assert jobs[0].tickets == {11: 1} and thread._jobs["proxy"] == [jobs[0]]
    jobs[0].cancelled = True
    thread.put(jobs[0])
    assert thread._take() and batch.cancelled == [11] and thread._jobs["proxy"] == []


def test_the_thread_steps_what_is_busy_until_it_is_told_to_end() -> None:
    thread, batch, posted = engine()
    job = job_of(1)
    thread.put(job)
    batch.next = [Piece(10, "a", (), 1, "eos")]

    def post(news: Any) -> None:
        posted(news)
        thread._inbox.put(None)

    thread._post = post
    thread._run()
    assert [(place, what.text) for _, place, what in posted] == [(0, "a")] and not batch.busy


def test_a_step_that_fails_ends_the_responses_of_its_role(caplog: pytest.LogCaptureFixture) -> None:
    thread, batch, posted = engine()
    job = job_of(2, 1)
    thread.put(job)
    thread._take()
    batch.next = RuntimeError("memory")
    thread._step("proxy", batch)  # type: ignore[arg-type]
    assert posted == [(job, WHOLE, JobFault("decoding failed: RuntimeError"))]
    assert sorted(batch.cancelled) == [10, 11] and job.cancelled and not thread._to_score
    assert "a step as proxy failed" in caplog.text


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        ("bad", JobFault("it does not fit", wrong=True)),
        ("broken", JobFault("this request failed: RuntimeError")),
    ],
)
def test_a_job_that_cannot_be_started_ends_alone(bad: str, fault: JobFault) -> None:
    thread, batch, posted = engine()
    other, whole = job_of(1), list[Any](["r", bad])
    job = ServedJob("proxy", whole, [TextToScore((1,), ALPHA, 0)])
    thread.put(other)
    thread.put(job)
    thread._take()
    assert posted == [(job, WHOLE, fault)] and batch.cancelled == [11]
    assert thread._jobs["proxy"] == [other] and not thread._to_score


def test_texts_are_scored_one_by_one() -> None:
    thread, batch, posted = engine()
    job = job_of(0, 2)
    thread.put(job)
    thread._take()
    assert list(thread._to_score) == [(job, 0), (job, 1)] and thread._jobs["proxy"] == []
    thread._score(*thread._to_score.popleft())
    assert posted == [(job, 0, batch.scored)]
    batch.scored = UserError("too long")
    thread._score(job, 1)
    assert posted[1:] == [(job, WHOLE, JobFault("too long", wrong=True))] and job.cancelled


def test_after_the_deadline_everything_ends() -> None:
    thread, batch, posted = engine()
    decoded, scored = job_of(1), job_of(0, 2)
    for job in (decoded, scored):
        thread.put(job)
    thread.end_at(0.0)
    thread.close()  # it does not run: nothing is waited for
    thread._inbox.put(None)
    thread._run()
    assert posted == [], "it was told to end before it did anything"
    again, batch, posted = engine()
    for item in (decoded := job_of(1), scored := job_of(0, 2), Deadline(0.0)):
        again._inbox.put(item)  # type: ignore[arg-type]
    posted_end = Posted()

    def post(news: Any) -> None:
        posted_end(news)
        batch.busy = False
        again._inbox.put(None)

    again._post = post
    again._run()
    away = JobFault("the server shuts down", leaving=True)
    assert (scored, WHOLE, away) in posted_end and (decoded, WHOLE, away) in posted_end
    later, _, told = engine()
    later._inbox.put(job_of(0, 1))
    later.end_at(time.monotonic() + 1000)
    later._post = lambda news: (told(news), later._inbox.put(None))  # type: ignore[assignment,func-returns-value]
    later._run()
    assert [what for _, _, what in told] == [ScoredText((), ())], "there is time left"


# The process


@pytest.mark.parametrize(
    ("host", "key", "shown", "warned"),
    [
        ("127.0.0.1", None, "127.0.0.1", False), ("0.0.0.0", None, "0.0.0.0", True),
        ("0.0.0.0", "k" * 8, "0.0.0.0", False),
        ("::1", None, "[::1]", False),
    ],
)  # fmt: skip
def test_what_is_said_where_a_server_starts(
    host: str, key: str | None, shown: str, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, ran = list[str](), list[Any]()
    if key is None:
        monkeypatch.delenv("PROXYTUNE_API_KEY", raising=False)
    else:
        monkeypatch.setenv("PROXYTUNE_API_KEY", key)
    made = SimpleNamespace(
        service=SimpleNamespace(models={"s": "proxy", "s/base": "base"}), run=lambda **how: ran.append(how)
    )
    told = list[Any]()
    monkeypatch.setattr(run, "server_of", lambda call, secret: told.append(secret) or made)
    monkeypatch.setattr(run, "_settle_memory", lambda: None)
    socket = SimpleNamespace(getsockname=lambda: (host, 4321))

    @contextmanager
    def listening(options: ServeOptions) -> Any:
        yield socket

    monkeypatch.setattr(run, "listening", listening)
    models: Any = SimpleNamespace(system=DEMO)
    run.serve(
        run.ServeCall(models, ServeOptions(host=host, roles="base"), DecodeOptions(), False, said.append)
    )
    assert said[-1] == f"serving s, s/base at http://{shown}:4321" and (len(said) == 2) is warned
    assert not warned or said[0].startswith(
        f"warning: whoever reaches {host}:4321 can use it: set PROXYTUNE_API_KEY"
    )
    assert told == [key] and ran == [{"sockets": [socket]}]


def test_the_proxy_is_loaded_first() -> None:
    system = System.model_validate({
        "name": "s", **{role: {"model": role} for role in ("base", "expert", "antiexpert", "tuned")},
    })  # fmt: skip
    assert run.served_roles(system, None) == ("proxy", "base", "antiexpert", "expert", "tuned")
    assert run.served_roles(system, " tuned,base, tuned") == ("tuned", "base")


def test_a_signal_drains_once() -> None:
    made = service(shutdown_seconds=5.0)
    made.drain()
    first = made._engine._inbox.get_nowait()
    made.drain()
    assert made.draining and made._engine._inbox.empty() and isinstance(first, Deadline)
    assert first.at == pytest.approx(time.monotonic() + 5.0, abs=1.0)


# Figures and pages


def test_every_figure_of_the_engine() -> None:
    meters = Meters()
    batches: Any = {"proxy": LetterBatch()}
    meters.watch(batches)
    meters.first.observe(0.5)
    lines = set(meters.text().decode().splitlines())
    bounds = ("0.01", "0.03", "0.1", "0.3", "1.0", "3.0", "10.0", "30.0", "100.0", "300.0")
    reached = [f'proxytune_first_token_seconds_bucket{{le="{at}"}} {float(float(at) > 0.5)}' for at in bounds]
    assert lines >= set(reached)
    assert lines >= {
        'proxytune_running{model="proxy"} 4.0', 'proxytune_waiting{model="proxy"} 5.0',
        'proxytune_kv_tokens{model="proxy",of="base"} 6.0',
        'proxytune_kv_tokens{model="proxy",of="expert"} 7.0',
        'proxytune_kv_capacity{model="proxy",of="base"} 60.0',
        'proxytune_kv_capacity{model="proxy",of="expert"} 70.0',
        'proxytune_generated_tokens_total{model="proxy"} 11.0',
        'proxytune_prompt_tokens_total{model="proxy"} 12.0', 'proxytune_drafted_total{model="proxy"} 13.0',
        'proxytune_examined_total{model="proxy"} 14.0', 'proxytune_accepted_total{model="proxy"} 15.0',
    }  # fmt: skip


def test_the_page_of_docs() -> None:
    schema = {
        "info": {"version": "1.<2", "description": "a & b"},
        "paths": {"/x": {"post": {"description": "Do\n  it."}, "get": {}}},
    }
    page = docs_page(schema)
    assert "<h1>proxytune 1.&lt;2</h1>" in page and "<p>a &amp; b</p>" in page
    assert "<dt><code>POST /x</code></dt><dd>Do it.</dd><dt><code>GET /x</code></dt><dd></dd>" in page


def test_roles_stand_around_the_proxy_on_the_playground() -> None:
    models: Any = {"s": "proxy", "s/tuned": "tuned", "s/expert": "expert", "s/base": "base"}
    page, _ = playground_html(DEMO, models)
    data = json.loads(page.partition('id="playground-data">')[2].partition("</script>")[0])
    assert [one["role"] for one in data["models"]] == ["base", "proxy", "expert", "tuned"]
    assert data["models"][2] == {"role": "expert", "model": "s/expert"} and data["alpha"] == "0.75"
    expected = [
        _expected(t) for t in ({"answer": "a", "Best Answer": "b"}, {"Best Answer": "b"}, {}, {"answer": 3})
    ]
    assert expected == ["a", "b", "", ""]
