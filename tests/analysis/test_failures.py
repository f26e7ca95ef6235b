"""What one run has right and another wrong, and McNemar's exact test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from proxytune.analysis.failures import _response, failures
from proxytune.errors import UserError
from tests.support.command_line import proxytune
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


def test_items_that_one_run_lacks_are_left_out(tmp_path: Path) -> None:
    whole, cut = (write(tmp_path / name, rows(v, name)) for name, v in (("whole", "1011"), ("cut", "11")))
    for pair in ((whole, cut), (cut, whole)):
        found = failures(*pair)
        assert (found.n, found.of, found.both_right, [item.id for item in found.items]) == (2, 2, 1, ["1"])


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


def test_items_without_a_verdict_are_left_out_and_counted(tmp_path: Path) -> None:
    def judged(verdicts: Sequence[float], role: str) -> Path:
        made = [{"text": "t", "is_toxic": v, "scores": {}, "responses": response("x")} for v in verdicts]
        return write(tmp_path / role, made, task="toxigen", metric="overall", role=role)

    first, second = judged([1, 1, math.nan, 0], "base"), judged([0, math.nan, 0, 0], "proxy")
    found = failures(first, second)
    assert (found.n, found.of, found.only_second, found.both_right) == (2, 4, 1, 1)
    printed = proxytune("analyze", "failures", first, second)
    assert "overall on 2 of 4 items" in printed.stdout
    with pytest.raises(UserError, match=r"no item of .* has a score by 'overall'.*judge the runs first"):
        failures(judged([math.nan], "expert"), judged([math.nan], "tuned"))


def test_runs_that_cannot_be_compared(tmp_path: Path) -> None:
    one = write(tmp_path / "one", rows("1", "a"))
    with pytest.raises(UserError, match=r"cannot be compared: they differ \(items: 0 and other"):
        failures(one, write(tmp_path / "other", rows("1", "a"), data_sha256="other"))
    with pytest.raises(UserError, match=r"no item .* has a score by 'bleu'.* has exact_match"):
        failures(one, one, "bleu")
    half = [{"scores": {"exact_match": 0.5}, "question": "q"}]
    with pytest.raises(UserError, match=r"has the score 0\.5, which is neither right nor wrong"):
        failures(one, write(tmp_path / "half", half))


@pytest.mark.parametrize(
    ("columns", "answer"),
    [
        ({"answer": "7", "answers": ["a"]}, "7"),
        ({"answer": "", "answers": ["a", 3]}, "a, 3"),
        ({"answer": None, "Best Answer": "b", "mc_answer_idx": "C"}, "b"),
        ({"mc_answer_idx": "C"}, "C"),
        ({}, ""),
    ],
)
def test_the_reference_of_an_item(columns: dict[str, Any], answer: str, tmp_path: Path) -> None:
    first, second = ({"scores": {"exact_match": value}, **columns} for value in (0.0, 1.0))
    found = failures(write(tmp_path / "a", [first]), write(tmp_path / "b", [second]))
    assert [(item.answer, item.right, item.question) for item in found.items] == [(answer, "second", "")]


def test_the_response_of_an_item() -> None:
    assert _response({"responses": [{"text": "a"}, {"text": "b"}]}) == "a"
    assert _response({"logprobs": {"x": -3.0, "y": -1.0, "z": -2.0}}) == "y"
    assert _response({"logprobs": [-3.0, -1.0], "mc_output": "B", "responses": [{"text": ""}]}) == "B"


def test_another_metric_than_the_headline(tmp_path: Path) -> None:
    made = [
        [{"scores": {"exact_match": 1.0, "f1": f1}, "question": "q"} for f1 in values]
        for values in ([1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0])
    ]
    first, second = (write(tmp_path / name, rows) for name, rows in zip("ab", made, strict=True))
    found = failures(first, second, "f1")
    assert (found.metric, found.both_right, found.both_wrong, found.only_second) == ("f1", 2, 1, 1)
    assert failures(first, second).both_right == 4
    assert (found.first.folder, found.second.folder) == (str(first), str(second))
    with pytest.raises(UserError, match=r"has no|has a score by 'unjudged'"):
        failures(first, second, "unjudged")
