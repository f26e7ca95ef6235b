"""What a person sees while a run goes on."""

from __future__ import annotations

import pytest

from proxytune import progress
from proxytune.progress import Progress, clock


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3723, "1:02:03")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_a_log_gets_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", -1.0)
    with Progress("demo gsm", "exact_match") as shown:
        shown.begin(total=4, done=2, scores=[1.0])
        shown.advance(0.0, 10)
        shown.advance(None, 20)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and lines[0].startswith("demo gsm: 3/4, ") and "exact_match 0.500" in lines[0]
    assert lines[-1].startswith("demo gsm: 4/4, ") and "left" in lines[0] and "left" not in lines[-1]


def test_silence_when_not_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("x", "y", shown=False) as quiet:
        quiet.begin(1, 0, [])
        quiet.note("nothing")
        quiet.advance(1.0, 1)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress("demo [gsm]", "exact_match") as shown:
        shown.begin(1, 0, [])
        shown.advance(1.0, 1)
    assert "demo [gsm]" in capsys.readouterr().err
