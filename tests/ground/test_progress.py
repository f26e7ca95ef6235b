"""What a person sees while a run goes on."""

from __future__ import annotations

import time

import pytest

from proxytune import progress
from proxytune.progress import Progress, clock


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3723, "1:02:03")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_the_state_in_one_line() -> None:
    state = Progress("demo gsm", "exact_match")
    state.total, state.done, state.scores, state.tokens = 4, 2, [1.0], lambda: 50
    state.began = time.monotonic() - 10
    assert state.line() == "2/4, 5 tokens/s, exact_match 1.000"
    state.advance(0.0)
    assert state.line() == "3/4, 5 tokens/s, 0:10 left, exact_match 0.500"
    state.advance(None)
    assert state.line(ended=True) == "4/4, 5 tokens/s, exact_match 0.500, 0:10"


def test_a_log_gets_lines_even_before_an_example_is_finished(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.01)
    seen = ""
    with Progress("demo gsm", "exact_match") as shown:
        shown.begin(2, 1, [1.0], lambda: 7)
        while "1/2, " not in seen:
            time.sleep(0.01)
            seen += capsys.readouterr().err
        shown.advance(0.0)
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("demo gsm: 2/2, ")


def test_silence_when_not_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("x", "y", shown=False) as quiet:
        quiet.begin(1, 0, [], int)
        quiet.note("nothing")
        quiet.advance(1.0)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress("demo [gsm]", "exact_match") as shown:
        shown.begin(1, 0, [], int)
        shown.advance(1.0)
    assert "demo [gsm]" in capsys.readouterr().err
