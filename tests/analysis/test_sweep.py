"""Loops by hand, curves over alpha and late skip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from proxytune.analysis.sweeps import ends_in_loop, find_sweeps, skip, sweep
from proxytune.errors import UserError
from proxytune.report.sweeps import sweep_figures, sweep_table
from tests.support.made_runs import response, write

LOOPS = [
    ("the cat sat. the cat sat. the cat sat. the cat", True),  # 4-gram, last copy cut off
    ("It was fine. " + "I am sorry, " * 3, True),  # with punctuation, after something else
    ("no " * 8, True),
    ("no " * 7, False),  # fewer than eight words
    (")" * 8, True),  # marks without spaces
    ("a b c d. a b c d. a b c", False),  # two copies and a bit
    ("a b c d. a b c d. a b c d", False),  # ... but for the last full stop
    ("a b c d. a b c d. a b c d.", True),
    ("the cat sat. " * 5 + "Then it left.", False),  # got out again
    ("hahahahahahahahahahaha", False),  # one word
    ("Exactly 3*4=12. Exactly 12+4=16. Exactly 16-3=13.", False),  # alike, not the same
    ("1 2 3 4 5 6 7 8 9 10", False),
    ("", False),
]


@pytest.mark.parametrize(("text", "loop"), LOOPS)
def test_what_a_loop_is(text: str, loop: bool) -> None:
    assert ends_in_loop(text) is loop


def swept(folder: Path, scores: dict[str, float], **spec: object) -> Path:
    """A sweep: alpha -> score. Half of the responses loop, and they are 10 and 20 tokens long."""
    responses = [response("so " * 9, tokens=20), response("so it is", tokens=10)]
    rows = [{"responses": text} for text in responses]
    for alpha, score in scores.items():
        name = f"alpha={alpha.replace(':', '-')}"
        write(folder / name, rows, metrics={"exact_match": score}, alpha=alpha, **spec)
    (folder / "sweep.json").write_text("{}")
    return folder


def test_a_sweep_is_ordered_and_counted(tmp_path: Path) -> None:
    scores = {"first:16": 0.3, "1": 0.5, "0.4": 0.4, "first:4": 0.2, "0": 0.1, "10": 0.0}
    folder = swept(tmp_path / "proxy" / "sweep", scores)
    found = sweep(folder)
    assert [point.alpha for point in found.points] == ["0", "0.4", "1", "10", "first:4", "first:16"]
    assert [point.score.value for point in found.points] == [0.1, 0.4, 0.5, 0.0, 0.2, 0.3]
    assert found.points[0].loops.value == 0.5 and found.points[0].tokens.value == 15.0
    assert (found.points[1].value, found.points[1].until) == (0.4, None)
    assert (found.points[4].value, found.points[4].until) == (None, 4)
    assert found.paper == () and found.metric == "exact_match" and found.points[0].truth is None
    assert find_sweeps(tmp_path) == [folder]


def test_the_paper_stands_beside_truthfulqa(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    judged = {"truth-info acc": 0.5, "truth acc": 0.9, "info acc": 0.6}
    write(folder / "alpha=1", [{}], metric="truth-info acc", metrics=judged, task="truthfulqa")
    found = sweep(folder)
    [point] = found.points
    assert point.truth is not None and point.info is not None
    assert (point.score.value, point.truth.value, point.info.value) == (0.5, 0.9, 0.6)
    assert len(found.paper) == 10
    assert (found.paper[1].alpha, found.paper[1].info) == (0.4, 0.9596083231334149)
    assert [p.truth for p in found.paper] == sorted(p.truth for p in found.paper)


def test_late_skip_takes_what_is_about_ending(tmp_path: Path) -> None:
    scores = {"0": 0.0, "first:4": 0.2, "first:1": 0.1, "1": 0.5, "0.4": 0.4, "warmup:5": 0.3}
    folder = swept(tmp_path / "sweep", scores)
    control = write(tmp_path / "control", [{}], role="base", forced=" Exactly", metrics={"exact_match": 0.05})
    found = skip(folder, control)
    assert [(p.alpha, p.until) for p in found.points] == [
        ("0", 0),
        ("first:1", 1),
        ("first:4", 4),
        ("1", None),
    ]
    assert found.control is not None and found.control.score.value == 0.05 and found.forced == " Exactly"
    assert len(found.csv().splitlines()) == 6
    assert skip(folder).control is None
    doubled = swept(tmp_path / "doubled", {"0": 0.0, "1": 0.5, "2": 0.4, "first:4:2": 0.2})
    assert [point.alpha for point in skip(doubled).points] == ["0", "first:4:2", "2"]


def test_a_point_without_a_score_has_none(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    broken = {"responses": response("so " * 9, reason="nan"), "fault": "nan"}
    waits: Any = {"metric": "unjudged", "metrics": {"unjudged": 1.0}, "task": "toxigen"}
    for alpha in ("0", "1"):
        rows = [broken, {"responses": response("so it is", tokens=3)}]
        write(folder / f"alpha={alpha}", rows, alpha=alpha, **waits)
    found = sweep(folder)
    assert [point.score for point in found.points] == [None, None]
    assert found.points[0].loops is not None and found.points[0].loops.value == 0.0
    assert found.points[0].tokens is not None and found.points[0].tokens.value == 3
    assert found.model_dump(mode="json")["points"][0]["score"] is None
    table = sweep_table(found)
    assert [row.cells[1] for row in table.rows] == ["not judged"] * 2
    assert [row.cells[-1] for row in table.rows] == ["0 of 2"] * 2 and sweep_figures(found) == []
    nothing = write(tmp_path / "s" / "alpha=0", [broken], **waits)
    assert sweep(nothing.parent).points[0].tokens is None


def test_other_sampling_is_no_sweep(tmp_path: Path) -> None:
    folder = swept(tmp_path / "sweep", {"0": 0.0, "1": 0.5})
    path = folder / "alpha=1" / "run.json"
    path.write_text(path.read_text().replace('"temperature":0.0', '"temperature":0.5'))
    with pytest.raises(UserError, match=r"differ \(temperature: 0.0 and 0.5\)"):
        sweep(folder)


def test_sweeps_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished sweep"):
        sweep(tmp_path)
    numbers = swept(tmp_path / "numbers", {"0": 0.0, "1": 0.5})
    with pytest.raises(UserError, match="no schedule first:t"):
        skip(numbers)
    with pytest.raises(UserError, match="several strengths"):
        skip(swept(tmp_path / "mixed", {"first:4": 0.0, "first:4:2": 0.5}))
    write(numbers / "alpha=2", [{}], data_sha256="other")
    with pytest.raises(
        UserError, match=r"not of one sweep: 'alpha=0' and 'alpha=2' differ \(examples: 2 and 1; items"
    ):
        sweep(numbers)
    good = swept(tmp_path / "good", {"first:4": 0.0})
    with pytest.raises(UserError, match="no control"):
        skip(good, write(tmp_path / "base", [{}], role="base"))
    with pytest.raises(UserError, match=r"not like the sweep: they differ \(examples: 1 and 2; items"):
        skip(good, write(tmp_path / "other", [{}], role="base", forced="x", data_sha256="other"))


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("x " * 8, True),
        ("x " * 7, False),
        ("a b " * 4, True),
        ("a b " * 3, False),
        ("a b c " * 3, True),
        ("a b c " * 3 + "a", True),
        ("a b c a b c a b", False),
        ("a b c d " * 3, True),
        ("a b c d " * 2, False),
        ("a b c " * 3 + "d", False),
        ("z " + "a b " * 4, True),
    ],
)
def test_the_least_that_is_a_loop(text: str, loop: bool) -> None:
    """Three copies, and eight words altogether."""
    assert ends_in_loop(text) is loop


def test_every_figure_of_a_point(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    rows = [
        {"responses": response("so " * 9, tokens=20) + response("a", tokens=4)},
        {"responses": response("b")},
    ]
    judged = {"GPT-true acc": 0.75, "GPT-info acc": 0.25, "GPT-true-info acc": 0.125}
    spec: Any = {
        "task": "truthfulqa",
        "metric": "GPT-true-info acc",
        "metrics": judged,
        "alpha": "first:3:0.5",
    }
    path = write(folder / "alpha=first-3-0.5", rows, **spec)
    control = write(tmp_path / "control", rows, role="base", forced="x", **spec)
    [point] = sweep(folder).points
    assert (point.alpha, point.value, point.until, point.n) == ("first:3:0.5", None, 3, 2)
    assert point.folder == str(path) and point.score is not None and point.score.value == 0.125
    assert point.truth is not None and point.info is not None
    assert (point.truth.value, point.info.value) == (0.75, 0.25)
    assert point.loops is not None and point.loops.value == pytest.approx(1 / 3)
    assert point.tokens is not None and point.tokens.value == pytest.approx(25 / 3)
    beside = skip(folder, control).control
    assert beside is not None and (beside.alpha, beside.value, beside.until) == ("0", 0.0, 0)
    assert (beside.folder, beside.n, beside.score) == (str(control), 2, point.score)


def test_what_ends_comes_before_what_does_not(tmp_path: Path) -> None:
    found = skip(swept(tmp_path / "s", {"2": 0.5, "1": 0.4, "first:9:2": 0.3, "first:10:2": 0.2, "0": 0.1}))
    assert [(point.alpha, point.until) for point in found.points] == [
        ("0", 0), ("first:9:2", 9), ("first:10:2", 10), ("2", None),
    ]  # fmt: skip
    assert found.metric == "exact_match" and found.forced is None and found.source.n == 2
    ordered = sweep(
        swept(tmp_path / "t", {"warmup:2": 0.1, "linear:0:1:3": 0.2, "first:1": 0.3, "10": 0.4, "9": 0.5})
    )
    assert [point.alpha for point in ordered.points] == ["9", "10", "linear:0:1:3", "warmup:2", "first:1"]


@pytest.mark.parametrize(("field", "key", "old"), [("name", "name", "made"), ("expert.model", "model", "e")])
def test_runs_of_other_models_are_no_sweep(field: str, key: str, old: str, tmp_path: Path) -> None:
    folder = swept(tmp_path / "sweep", {"0": 0.0, "first:2": 0.5})
    control = write(tmp_path / "control", [{}, {}], role="base", forced="x")
    assert skip(folder, control).control is not None
    for path, read, told in (
        (control / "run.json", lambda: skip(folder, control), f"{field}: other and {old}"),
        (folder / "alpha=first-2" / "run.json", lambda: sweep(folder), f"{field}: {old} and other"),
    ):
        text = path.read_text()
        assert text.count(f'"{key}":"{old}"') == 1
        path.write_text(text.replace(f'"{key}":"{old}"', f'"{key}":"other"'))
        with pytest.raises(UserError, match=rf"differ \({told}\)$"):
            read()
        path.write_text(text)
