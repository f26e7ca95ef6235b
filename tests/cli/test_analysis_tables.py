"""The tables that `proxytune analyze` and `sweep-alpha` print, cell by cell, of analyses that are written by
hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from proxytune.analysis import failures, positions, sweeps, tokens
from proxytune.cli import analysis_tables as printed
from proxytune.errors import UserError
from tests.support.tables import cells

SOURCE = {"folder": "f", "system": "tiny", "task": "gsm", "role": "proxy", "alpha": "0.5", "n": 7}
QUIET = {"json_only": False, "csv_only": False}
RUN = Path("run")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "220")


def metric(value: float, low: float | None = None, high: float | None = None, **more: Any) -> dict[str, Any]:
    """A figure."""
    return {"value": value, "low": low, "high": high, **more}


def test_positions(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"first": 0, "last": 0, "n": 9, "changed": metric(0.5, 0.25, 0.75), "shift": metric(0.125, 0.1, 0.2)},
        {"first": 1, "last": 3, "n": 30, "changed": metric(0.25), "shift": metric(-0.0625)},
    ]
    found = positions.Positions.model_validate({
        "source": SOURCE, "responses": 4, "tokens": 39, "changed": metric(0.3125, 0.2, 0.4),
        "shift": metric(0.0312), "paper_changed": 0.135, "rows": rows[:1], "bands": rows,
    })  # fmt: skip
    monkeypatch.setattr(positions, "positions", lambda run: found)
    printed.positions(RUN, **QUIET)
    out = capsys.readouterr().out
    assert "tiny gsm as proxy, alpha 0.5: influence by position" in out
    assert cells(out) == [
        ["position", "tokens", "changed, %", "shift"],
        ["0", "9", "50.0 [25.0, 75.0]", "0.125 [0.100, 0.200]"], ["1-3", "30", "25.0", "-0.062"],
    ]  # fmt: skip
    *_, changed, shift, _ = out.splitlines()
    assert changed == ("changed over all 39 tokens, %: 31.2 [20.0, 40.0] (the paper, of its models: 13.5)")
    assert shift == "mean shift over all tokens: 0.031"
    monkeypatch.setattr(positions, "positions", lambda run: found.model_copy(update={"paper_changed": None}))
    printed.positions(RUN, **QUIET)
    assert "the paper" not in capsys.readouterr().out


def test_ngrams(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [
        {"token": "the", "n": 9, "shift": metric(0.5), "gram": "a b the c", "count": 3, "occurrences": 8,
         "paper": "a b the c 3/8"},
        {"token": "so", "n": None, "shift": None, "gram": "so it goes on", "count": 1, "occurrences": 2,
         "paper": "so it is 1/2"},
        {"token": "no", "n": 4, "shift": metric(-0.25)},
    ]  # fmt: skip
    found = tokens.Ngrams.model_validate({"source": SOURCE, "min_count": 3, "rows": rows})
    asked = list[dict[str, Any]]()

    def ngrams(run: Path, **given: Any) -> tokens.Ngrams:
        asked.append(given)
        return found

    monkeypatch.setattr(tokens, "ngrams", ngrams)
    printed.ngrams(RUN, 3, 20, "the,,so", **QUIET)
    out = capsys.readouterr().out
    assert cells(out) == [
        ["token", "n", "mean shift", "most common 4-gram", "the paper's"],
        ["the", "9", "0.500", "a b the c 3/8", "a b the c 3/8"],
        ["so", "", "", "so it goes on 1/2", "so it is 1/2"], ["no", "4", "-0.250", "", ""],
    ]  # fmt: skip
    assert out.splitlines()[-1] == "1 of 2 rows equal the paper's"
    printed.ngrams(RUN, 3, 20, None, **QUIET)
    out = capsys.readouterr().out
    assert cells(out)[1] == ["the", "9", "0.500", "a b the c 3/8"] and "rows equal" not in out
    printed.ngrams(RUN, 4, 5, "paper", **QUIET)
    assert asked[:2] == [
        {"min_count": 3, "top": 20, "words": ["the", "so"]}, {"min_count": 3, "top": 20, "words": None},
    ]  # fmt: skip
    assert asked[2]["words"] == tokens.paper_words() and (asked[2]["min_count"], asked[2]["top"]) == (4, 5)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file of predictions, without a trace"):
        printed.ngrams(tmp_path / "file", 3, 20, None, **QUIET)


def test_equations(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"rule": "paper", "left": {"tokens": 30, "mean": 0.5}, "right": {"tokens": 40, "mean": 0.25},
         "t": 2.34567, "df": 56.78, "p": 0.0123},
        {"rule": "corrected", "left": {"tokens": 3, "mean": None}, "right": {"tokens": 4, "mean": 0.125},
         "t": None, "df": None, "p": None},
    ]  # fmt: skip
    found = tokens.Equations.model_validate({
        "source": SOURCE, "responses": 9, "responses_with": 7, "rows": rows,
    })  # fmt: skip
    monkeypatch.setattr(tokens, "equations", lambda run: found)
    printed.equations(RUN, **QUIET)
    out = capsys.readouterr().out
    assert cells(out) == [
        ["rule", "left: tokens", "mean shift", "right: tokens", "mean shift", "Welch's t", "df", "p"],
        ["paper", "30", "0.500", "40", "0.250", "2.346", "56.78", "0.0123"],
        ["corrected", "3", "n/a", "4", "0.125", "n/a", "n/a", "n/a"],
    ]
    assert out.splitlines()[-1] == "7 of 9 responses hold an equation (corrected rule)"


def point(alpha: str, until: int | None, score: float | None, **more: Any) -> dict[str, Any]:
    """A point of a sweep over 8 of 9 examples."""
    own = None if score is None else metric(score, n=8)
    value = None if ":" in alpha else float(alpha)
    usual = {"truth": None, "info": None, "loops": metric(0.25), "tokens": metric(12.34, unit="number")}
    return {
        "alpha": alpha,
        "value": value,
        "until": until,
        "n": 9,
        "score": own,
        "folder": "f",
        **usual,
        **more,
    }


def test_skip(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    points = [point("0", 0, 0.25), point("first:4", 4, 0.5), point("1", None, None, loops=None, tokens=None)]
    found = sweeps.Skip.model_validate({
        "source": SOURCE, "metric": "acc", "points": points, "control": point("0", None, 0.75),
        "forced": " So",
    })  # fmt: skip
    asked = list[Any]()
    monkeypatch.setattr(sweeps, "skip", lambda *given: asked.append(given) or found)
    printed.skip(RUN, Path("control"), **QUIET)
    assert asked == [(RUN, Path("control"))]
    out = capsys.readouterr().out
    assert cells(out) == [
        ["corrected", "acc, %", "loops, %", "tokens", "n"], ["none", "25.0", "25.0", "12.3", "8 of 9"],
        ["first 4", "50.0", "25.0", "12.3", "8 of 9"], ["all tokens", "no score", "", "", "0 of 9"],
        ["none, opener ' So' forced", "75.0", "25.0", "12.3", "8 of 9"],
    ]  # fmt: skip
    assert out.splitlines()[-1] == (
        "loops: responses that end in 3 or more copies of the same words (8 words or marks at least)"
    )


def test_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    judged = {"truth": metric(0.5), "info": metric(0.75)}
    points = [point("0.5", None, 0.25, **judged), point("1", None, 0.5)]
    paper = [{"alpha": 0.2, "truth": 0.5, "info": 0.9}, {"alpha": 1.0, "truth": 0.625, "info": 0.25}]
    found = sweeps.Sweep.model_validate({
        "source": SOURCE, "metric": "acc", "points": points, "paper": paper,
    })  # fmt: skip
    printed.sweep_table(found)
    out = capsys.readouterr().out
    assert cells(out) == [
        ["alpha", "acc, %", "loops, %", "tokens", "n", "true, %", "informative, %"],
        ["0.5", "25.0", "25.0", "12.3", "8 of 9", "50.0", "75.0"],
        ["1", "50.0", "25.0", "12.3", "8 of 9", "", ""],
    ]
    assert out.splitlines()[-1] == (
        "the paper, 13B, alpha: true / informative, %: 0.2: 50.0 / 90.0; 1: 62.5 / 25.0"
    )
    printed.sweep_table(found.model_copy(update={"points": found.points[1:]}))
    out = capsys.readouterr().out
    assert "the paper" not in out and len(cells(out)[0]) == 5


def test_agreement(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def spread(median: float, mean: float) -> dict[str, float]:
        return {"median": median, "quarter": 0.0, "three_quarters": 9.0, "mean": mean}

    row = {
        "first": 0, "last": 3, "n": 30, "kl_proxy": spread(0.25, 0.5), "kl_base": spread(0.75, 1.5),
        "same_proxy": metric(0.875), "same_base": metric(0.125),
    }  # fmt: skip
    found = positions.Agreement.model_validate({
        "source": SOURCE, "tokens": 45, "kl_proxy": metric(0.0625), "kl_base": metric(0.375, 0.3, 0.4),
        "same_proxy": metric(0.75), "same_base": metric(0.5), "first_step": row, "rows": [row],
        "bands": [row], "paper_first_step": {"proxy": 0.02, "base": 1.25},
    })  # fmt: skip
    monkeypatch.setattr(positions, "agreement", lambda run: found)
    printed.agreement(RUN, **QUIET)
    out = capsys.readouterr().out
    assert cells(out)[-1] == ["0-3", "30", "0.250", "0.500", "0.750", "1.500", "87.5", "12.5"]
    *_, over, first = out.splitlines()
    assert over == (
        "over all 45 tokens: KL(tuned || proxy) 0.062, KL(tuned || base) 0.375 [0.300, 0.400] nats; "
        "same first choice: proxy 75.0%, base 50.0%"
    )
    assert first == (
        "medians at the first step: proxy 0.250, base 0.750 (the authors, AlpacaFarm 13B: 0.020, 1.250)"
    )


def test_failures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def item(name: str, right: str) -> dict[str, str]:
        return {"id": name, "right": right, "question": "q", "first": "one", "second": "two", "answer": "5"}

    items = [item(str(i), "first") for i in range(3)] + [item("9", "second")]
    found = failures.Failures.model_validate({
        "first": {**SOURCE, "role": "base"}, "second": SOURCE, "metric": "acc", "n": 40, "of": 41,
        "both_right": 20, "both_wrong": 16, "only_first": 3, "only_second": 1, "p": 0.62512, "items": items,
    })  # fmt: skip
    asked = list[Any]()
    monkeypatch.setattr(failures, "failures", lambda *given: asked.append(given) or found)
    printed.failures(RUN, Path("other"), "acc", 2, **QUIET)
    assert asked == [(RUN, Path("other"), "acc")]
    out = capsys.readouterr().out
    assert "acc on 40 of 41 items" in out
    assert cells(out)[:3] == [
        ["", "second right", "second wrong"], ["first right", "20", "3"], ["first wrong", "1", "16"],
    ]  # fmt: skip
    assert "first: tiny gsm as base\nsecond: tiny gsm as proxy, alpha 0.5\n" in out
    assert "McNemar's exact test: p = 0.625\n" in out
    assert "only the first is right: 2 of 3 items" in out and "only the second is right: 1 of 1 items" in out
    assert ["0", "q", "one", "two", "5"] in cells(out) and ["2", "q", "one", "two", "5"] not in cells(out)
    monkeypatch.setattr(failures, "failures", lambda *_: found.model_copy(update={"n": 41}))
    printed.failures(RUN, RUN, None, 0, **QUIET)
    out = capsys.readouterr().out
    assert "acc on 41 items" in out and "is right" not in out
