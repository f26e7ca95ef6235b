"""What a person sees while a run goes on."""

from __future__ import annotations

import time

import pytest

from proxytune.terminal import WorkSoFar, progress
from proxytune.terminal.progress import Progress, clock


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3723, "1:02:03")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_the_state_in_one_line() -> None:
    state = Progress("demo gsm", "exact_match")
    work = WorkSoFar(open=((10, 30), (40, 50)), decode_seconds=10.0, prefill_seconds=90.0)
    state.total, state.done, state.scores, state.work = 4, 2, [1.0], lambda: work
    state.began = time.monotonic() - 10
    assert state.line() == "2/4, 5 tokens/s, 0:06 left, exact_match 1.000"
    state.advance(0.0)
    work = WorkSoFar(finished=1, finished_tokens=50, decode_seconds=10.0)
    assert state.line() == "3/4, 5 tokens/s, 0:00 left, exact_match 0.500"
    state.advance(None)
    assert state.line(ended=True) == "4/4, 5 tokens/s, exact_match 0.500, 0:10"


def test_texts_that_are_scored_take_a_time_per_item() -> None:
    state = Progress("demo truthfulqa_mc", "mc1")
    state.total, state.work = 5, lambda: WorkSoFar(scoring=True, unread=12)
    assert state.line() == "0/5"
    state.advance(1.0), state.advance(0.0)
    state.work = lambda: WorkSoFar(scoring=True, finished=8, unread=12, prefill_seconds=4.0)
    assert state.line() == "2/5, 2.00 s/item, 0:06 left, mc1 0.500"


def test_a_continued_run_says_how_fast_it_is_now() -> None:
    """90 examples are of an earlier session, whose time is not known here."""
    work = WorkSoFar(scoring=True, finished=20, unread=20, prefill_seconds=10.0)
    with Progress("demo truthfulqa_mc", "mc1", shown=False) as state:
        state.begin(100, 90, [1.0] * 90, lambda: work)
        assert state.line() == "90/100, 0:10 left, mc1 1.000"
        for _ in range(5):
            state.advance(0.0)
        assert state.line() == "95/100, 2.00 s/item, 0:10 left, mc1 0.947"


def test_the_time_left_never_grows() -> None:
    """Not even where the estimate does: longer responses than it looked like."""
    state, shown = Progress("demo gsm", "exact_match"), list[str]()
    state.total = 9
    for seconds, tokens in ((1.0, 10), (2.0, 30), (4.0, 40), (9.0, 41)):
        work = WorkSoFar(open=((tokens, 100),), decode_seconds=seconds)
        state.work = lambda work=work: work  # type: ignore[misc]
        shown.append(state.line().split(", ")[2])
    assert shown == ["0:09 left", "0:05 left", "0:05 left", "0:05 left"]


def test_a_log_gets_lines_even_before_an_example_is_finished(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.01)
    seen = ""
    with Progress("demo gsm", "exact_match") as shown:
        shown.begin(2, 1, [1.0], WorkSoFar)
        while "1/2, " not in seen:
            time.sleep(0.01)
            seen += capsys.readouterr().err
        shown.advance(0.0)
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("demo gsm: 2/2, ")


def test_silence_when_not_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("x", "y", shown=False) as quiet:
        quiet.begin(1, 0, [], WorkSoFar)
        quiet.note("nothing")
        quiet.advance(1.0)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress("demo [gsm]", "exact_match") as shown:
        shown.begin(1, 0, [], WorkSoFar)
        shown.advance(1.0)
    assert "demo [gsm]" in capsys.readouterr().err


def test_the_tokens_of_open_responses_count_for_how_long_one_is() -> None:
    """One response of 2 tokens has ended, another has 3 so far: 5 tokens for each that ends, not 2."""
    work = WorkSoFar(finished=1, finished_tokens=2, open=((3, 100),), decode_seconds=10.0)
    assert work.tokens_per_second == 0.5 and work.seconds_left() == pytest.approx(5 / 0.5, rel=1e-6)
    none = WorkSoFar(open=((3, 100), (1, 4)), decode_seconds=4.0)
    assert none.seconds_left() == pytest.approx(97 + 3), "as many as they may have, where none has ended"
