"""Endpoints that misbehave: one line or, where another try helps, the verdicts; never a traceback, and never
without end."""

from __future__ import annotations

import email.utils
import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxytune import results
from proxytune.config import System
from proxytune.endpoints import CallLimits
from proxytune.endpoints.endpoint import Answer, _after, reported
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


def test_the_folder_is_locked_while_it_is_judged(endpoint: Endpoint, system: System, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    evaluated(system, "alpaca_farm", data="plumbing", limit=2, out=folder, progress=False)
    refusals: list[str] = []

    def again(done: int, total: int) -> None:
        with pytest.raises(UserError, match="another process is writing to") as raised:
            judge_run(folder, PairwiseJudge("m"))
        refusals.append(str(raised.value))

    made = judge_run(folder, PairwiseJudge("m", workers=1), again)
    assert made.headline == "win_rate" and len(refusals) == 2 and len(endpoint.seen) == 2
