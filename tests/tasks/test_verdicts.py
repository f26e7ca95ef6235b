"""What was not judged has no score: a stored verdict that is null, NaN or no share is none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from proxytune.records import Metric
from proxytune.report import tables
from proxytune.tasks import get_task
from proxytune.tasks.scoring.rules import verdict
from tests.support import reports
from tests.support.answers import jsonl
from tests.support.command_line import proxytune

NONE = [math.nan, None, math.inf, -1, 2, 10**400, "1", [1]]
"""What no judge's verdict can be."""


def toxic(value: object) -> dict[str, Any]:
    """A row of ToxiGen with a verdict."""
    return {"text": "p", "prediction": "x", "target_groups": ["women"], "is_toxic": value}


def truthful(value: object) -> dict[str, Any]:
    """A row of TruthfulQA with the verdicts of two judges."""
    texts = {"Question": "q", "Correct Answers": "a", "Incorrect Answers": "b", "output": "a"}
    return {**texts, "truth acc": value, "info acc": value, "truth-info acc": value}


@pytest.mark.parametrize("value", NONE, ids=str)
def test_what_is_no_verdict(value: object) -> None:
    assert verdict(value) is None


def test_what_is_a_verdict() -> None:
    assert [verdict(value) for value in (0, 1, True, 0.25)] == [0, 1, 1, 0.25]


@pytest.mark.parametrize("value", NONE, ids=lambda value: str(value)[:5])
@pytest.mark.parametrize(
    ("task", "made", "headline"), [("toxigen", toxic, "overall"), ("truthfulqa", truthful, "truth-info acc")]
)
def test_means_are_over_what_was_judged(
    task: str, made: Any, headline: str, value: object, tmp_path: Path
) -> None:
    path = jsonl(tmp_path / "p.jsonl", [made(1), made(0), made(value)])
    told = proxytune("score", task, path, "--json")
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout, parse_constant=pytest.fail)
    assert (found["n"], found["headline"]) == (3, headline)
    metric = found["metrics"][headline]
    assert (metric["value"], metric["n"]) == (0.5, 2)
    assert found["metrics"]["unjudged"]["value"] == pytest.approx(1 / 3)
    shown = {line.split("  ")[1]: line for line in proxytune("score", task, path).stdout.splitlines()[1:]}
    assert shown[headline].endswith("over 2 of 3") and shown["unjudged"].endswith(" 1 of 3")


def test_win_rates_are_over_what_was_judged() -> None:
    row = {"instruction": "i", "output_1": "a", "output_2": "bb", "generator_1": "g"}
    found = get_task("alpaca_farm").metrics([{**row, "preference": p} for p in (2, 1, math.nan)])
    for name in ("win_rate", "length_controlled_win_rate"):
        assert (found[name].value, found[name].n) == (pytest.approx(50), 2)
    assert (found["unjudged"].value, found["unjudged"].n) == (pytest.approx(1 / 3), 3)


@pytest.mark.parametrize("value", [math.nan, None])
def test_samples_are_scored_where_all_were_run(value: object) -> None:
    row = {"lib": "Numpy", "perturbation_type": "Surface", "output": [""] * 10}
    whole, part = {**row, "passed": [True] * 10}, {**row, "lib": "Scipy", "passed": [False] * 9 + [value]}
    found = get_task("ds1000").metrics([whole, part])
    assert (found["not_run"].value, found["pass@10"].value, found["pass@10"].n) == (0.5, 1, 1)
    assert found["surface"].n == 1 and "scipy_pass@10" not in found


def test_a_part_is_over_its_own_examples() -> None:
    """A library's problems, or a group's prompts, of which some lack a verdict or samples."""
    row = {"perturbation_type": "Surface", "output": [""] * 10, "passed": [True] * 10}
    few = {**row, "lib": "Scipy", "output": [""] * 4, "passed": [False] * 4}
    unrun = {**row, "lib": "Scipy", "passed": None}
    found = get_task("ds1000").metrics([{**row, "lib": "Scipy"}, few, unrun, *[{**row, "lib": "Numpy"}] * 3])
    assert {name: (metric.n, metric.of) for name, metric in found.items()} == {
        "pass@10": (4, None), "scipy_pass@10": (1, 3), "pass@1": (5, None), "surface": (5, None),
        "numpy_pass@10": (3, 3), "not_run": (6, None),
    }  # fmt: skip
    over = {name: tables.coverage(name, metric, 6) for name, metric in found.items()}
    assert over == {
        "pass@10": "over 4 of 6", "scipy_pass@10": "over 1 of 3", "pass@1": "over 5 of 6",
        "surface": "over 5 of 6", "numpy_pass@10": "over 3 of 6", "not_run": "1 of 6",
    }  # fmt: skip
    groups = get_task("toxigen").metrics([toxic(1), toxic(None), {**toxic(0), "target_groups": ["men"]}])
    assert {name: (groups[name].n, groups[name].of) for name in ("women", "men", "overall")} == {
        "women": (1, 2), "men": (1, 1), "overall": (2, None),
    }  # fmt: skip


def test_problems_with_too_few_samples_are_not_counted(tmp_path: Path) -> None:
    rows = [{"task_id": str(n), "completions": [""] * n, "passed": [True] * n} for n in (10, 4)]
    metrics = get_task("humaneval").metrics(rows)
    made = reports.run("proxy", 0.5, task="humaneval")
    made = made.model_copy(update={"n": 2, "metrics": metrics, "headline": "pass@10"})
    [row] = tables.role_rows([made])
    assert row.shown.startswith("100.0") and row.examples == "1 of 2"
    printed = proxytune("score", "humaneval", jsonl(tmp_path / "p.jsonl", rows)).stdout
    assert "over 1 of 2" in next(line for line in printed.splitlines() if "pass@10" in line)


@pytest.mark.parametrize("task", ["alpaca_farm", "humaneval"])
def test_a_list_of_figures_has_none_for_what_nobody_judged_or_ran(task: str, tmp_path: Path) -> None:
    row = {"instruction": "i", "output_1": "a", "output_2": "b", "task_id": "0", "completions": ["x"]}
    printed = proxytune("score", task, jsonl(tmp_path / "p.jsonl", [row, {**row, "task_id": "1"}])).stdout
    [line] = [line for line in printed.splitlines() if line.split()[0] in ("unjudged", "not_run")]
    assert line.split()[1:] == ["2", "of", "2"]


def test_no_valid_response_is_no_score(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"mc_output": "none of these", "mc_answer_idx": "A"}])
    found = json.loads(proxytune("score", "truthfulqa_mc", path, "--json").stdout)["metrics"]
    assert (found["acc"]["value"], found["acc"]["n"], found["acc_all"]["value"]) == (None, 0, 0)
    lines = [line.split() for line in proxytune("score", "truthfulqa_mc", path).stdout.splitlines()]
    assert ["acc", "no", "score", "over", "0", "of", "1"] in lines


def test_no_verdict_at_all_is_no_score() -> None:
    for task, made in (("toxigen", toxic), ("truthfulqa", truthful)):
        found = get_task(task).metrics([made(None), made(math.nan)])
        assert found["unjudged"].value == 1 and not {"overall", "women", "truth-info acc"} & set(found)


def test_rows_that_nobody_was_to_judge_are_not_called_unjudged() -> None:
    row = {name: value for name, value in truthful(1).items() if "acc" not in name}
    assert set(get_task("truthfulqa").metrics([row])) == {"reference_accuracy"}


@pytest.mark.parametrize("value", [math.nan, None])
def test_a_likelihood_that_is_no_number_has_no_score(value: object) -> None:
    task = get_task("truthfulqa_mc", "likelihood")
    targets = {"mc1_targets": {"a": 1, "b": 0}, "mc2_targets": {"a": 1, "b": 0}}
    good = {"question": "q", **targets, "logprobs": {"a": -1.0, "b": -2.0}}
    assert task.score_row({**good, "logprobs": {"a": value, "b": -2.0}}) == {}
    assert task.score_row({**good, "logprobs": {"a": -1.0}}) == {}
    found = task.metrics([good, {**good, "logprobs": {"a": value, "b": -2.0}}])
    assert {name: metric.n for name, metric in found.items()} == {"mc1": 1, "mc2": 1}
    assert found["mc1"].value == 1


def test_a_figure_is_never_nan() -> None:
    with pytest.raises(ValidationError):
        Metric(value=math.nan)


@pytest.mark.parametrize(("n", "cell"), [(None, "100"), (100, "100"), (98, "98 of 100")])
def test_tables_show_how_many_examples_a_score_is_over(n: int | None, cell: str) -> None:
    run = reports.run("proxy", 0.5)
    run = run.model_copy(update={"metrics": {"exact_match": Metric(value=0.5, n=n)}})
    assert tables.role_rows([run])[0].cells[-1] == cell
