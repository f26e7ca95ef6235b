"""What one run has right and another wrong, and McNemar's exact test."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from proxytune.analysis.failures import failures
from proxytune.errors import UserError
from tests.support.made_runs import response, write


def rows(verdicts: str, who: str, score: str = "exact_match") -> list[dict[str, Any]]:
    """One row per letter: 1 is right."""
    return [
        {
            "question": f"q{i}",
            "answer": str(i),
            "scores": {score: float(v)},
            "responses": response(f"{who}{i}"),
        }
        for i, v in enumerate(verdicts)
    ]


def test_the_table_the_items_and_the_test(tmp_path: Path) -> None:
    first = write(tmp_path / "base", rows("110000000001", "b"), role="base")
    second = write(tmp_path / "proxy", rows("101111111101", "p"))
    found = failures(first, second)
    assert (found.both_right, found.both_wrong, found.only_first, found.only_second) == (2, 1, 1, 8)
    assert found.n == 12 and found.metric == "exact_match"
    assert found.p == pytest.approx(2 * (1 + 9) / 2**9)  # two-sided, of 9 items
    assert [item.id for item in found.items] == ["1", "2", "3", "4", "5", "6", "7", "8", "9"]
    lost = found.items[0]
    assert (lost.right, lost.question, lost.first, lost.second, lost.answer) == (
        "first",
        "q1",
        "b1",
        "p1",
        "1",
    )
    assert {item.right for item in found.items[1:]} == {"second"}
    assert found.csv().splitlines()[1] == "1,first,q1,b1,p1,1"


def test_equal_runs_differ_in_nothing(tmp_path: Path) -> None:
    one, other = (write(tmp_path / name, rows("10", name)) for name in ("a", "b"))
    found = failures(one, other)
    assert found.p == 1.0 and found.items == ()


def test_toxic_is_wrong(tmp_path: Path) -> None:
    def flagged(verdicts: str) -> list[dict[str, Any]]:
        return [
            {"text": "t", "is_toxic": int(v), "scores": {"women": float(v)}, "responses": response("x")}
            for v in verdicts
        ]

    first = write(tmp_path / "a", flagged("11"), task="toxigen", metric="overall", role="base")
    second = write(tmp_path / "b", flagged("01"), task="toxigen", metric="overall")
    found = failures(first, second)
    assert found.only_second == 1 and found.both_wrong == 1 and found.items[0].question == "t"
    second_row = {**flagged("0")[0], "is_toxic": math.nan, "scores": {}}
    unsure = write(tmp_path / "c", [*flagged("0"), second_row], task="toxigen", metric="overall")
    with pytest.raises(UserError, match=r"item '1' of '.*c' has no score by 'overall'"):
        failures(first, unsure)


def test_runs_that_cannot_be_compared(tmp_path: Path) -> None:
    one = write(tmp_path / "one", rows("1", "a"))
    with pytest.raises(UserError, match="not runs on the same items"):
        failures(one, write(tmp_path / "other", rows("1", "a"), data_sha256="other"))
    with pytest.raises(UserError, match=r"has no score by 'bleu': choose a --metric .* has exact_match"):
        failures(one, one, "bleu")
    half = [{"scores": {"exact_match": 0.5}, "question": "q"}]
    with pytest.raises(UserError, match=r"has the score 0\.5, which is neither right nor wrong"):
        failures(one, write(tmp_path / "half", half))
