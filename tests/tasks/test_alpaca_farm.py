"""AlpacaFarm: data, preferences of old and new judges, win rates plain and length-controlled, the export."""

from __future__ import annotations

import json
import math
import random
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import optimize

from proxytune.config import Sampling, load_system
from proxytune.decoding.prompts import text_for
from proxytune.errors import UserError
from proxytune.records import Completion
from proxytune.tasks import get_task, read_source, score_file
from proxytune.tasks.scoring.win_rate import length_controlled_win_rate, wins
from tests.support import tiny_system
from tests.support.answers import json_list
from tests.support.command_line import proxytune
from tests.support.runs import evaluated

TASK = get_task("alpaca_farm")
ITEMS = [
    {
        "instruction": f" Say {i}.\n",
        "output": f"{i} is said",
        "generator": "text_davinci_003",
        "dataset": "koala",
    }
    for i in range(8)
]


def annotation(preference: object, length: int = 4, baseline: int = 4) -> dict[str, Any]:
    """A row of annotations.json."""
    return {"output_1": "b" * baseline, "output_2": "m" * length, "preference": preference}


def values(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The metrics of rows."""
    return {name: metric.value for name, metric in TASK.metrics(rows).items()}


def test_the_bare_instruction_is_the_prompt(tmp_path: Path) -> None:
    example = read_source(TASK, json_list(tmp_path / "a.json", ITEMS)).examples[3]
    assert example.prompt.plain == " Say 3.\n" and example.id == "3"
    assert text_for("llama2", "direct", example.prompt) == "[INST]  Say 3.\n [/INST]"
    assert text_for("llama2", "in_ensemble", example.prompt) == "[INST]  Say 3. [/INST]"
    assert TASK.sampling == Sampling(max_new_tokens=2048, stop=("\n\nComment:",))
    completion = Completion("3", 0, " so\n", (), "eos", 0.0)
    assert TASK.row(example, [completion]) == {
        "instruction": " Say 3.\n",
        "output_1": "3 is said",
        "generator_1": "text_davinci_003",
        "dataset": "koala",
        "output_2": "so",
    }


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's repository has a loader script, so its JSON file is read: here from a local copy."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    json_list(tmp_path / "hub" / "alpaca_eval.json", ITEMS)
    assert TASK.hub is not None and TASK.hub.id == "tatsu-lab/alpaca_eval"
    local = replace(TASK, hub=replace(TASK.hub, id=str(tmp_path / "hub")))
    from_file = read_source(TASK, str(tmp_path / "hub" / "alpaca_eval.json"))
    assert read_source(local, "hub").examples == from_file.examples


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ("[]", "has no rows"),
        ('{"a": 1}', "must hold a JSON list of objects"),
        ("[1]", "item 1 must be a JSON object, not int"),
        ('[{"instruction": "a"}]', r"item 1: no field 'output' \(it has instruction\)"),
        ('[{"instruction": " ", "output": "b"}]', "item 1: the instruction is empty"),
        ("[", "is not JSON"),
    ],
)
def test_bad_files_are_errors(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_source(TASK, str(tmp_path / "a.json"))


@pytest.mark.parametrize(
    ("preference", "won"),
    [(1, 0), (2, 1), (0, 0.5), (1.5, 0.5), (1.25, 0.25), (None, None), (math.nan, None), (3, None),
     ("2", None), (True, None)],
)  # fmt: skip
def test_preferences(preference: object, won: float | None) -> None:
    assert wins(preference) == won


def test_the_papers_figures() -> None:
    found = values([annotation(p, length) for p, length in ((2, 10), (2, 11), (0, 4), (1, 4))])
    scores = [100.0, 100.0, 50.0, 0.0]
    assert found["win_rate"] == 62.5
    assert found["standard_error"] == pytest.approx(statistics.stdev(scores) / 2, abs=1e-12)
    counts = [found[name] for name in ("n_wins", "n_wins_base", "n_draws", "n_total", "avg_length")]
    assert counts == [2, 1, 1, 4, 7], "the mean length of 7.25 is cut, not rounded"
    assert "unjudged" not in found


def test_what_is_not_judged_leaves_the_win_rate() -> None:
    found = values([annotation(2), annotation(None), annotation(1), {"output_2": "abc"}])
    assert (found["win_rate"], found["n_total"], found["unjudged"]) == (50, 2, 0.5)
    nothing = TASK.metrics([{"output_2": "abc"}])
    assert set(nothing) == {"unjudged", "avg_length"} and TASK.headline_of(nothing) == "unjudged"
    assert TASK.metrics([annotation(2)])["win_rate"].value == 100, "one row has no standard error"


def test_a_judge_that_likes_length_alone_is_seen_through() -> None:
    draw = random.Random(1)
    lengths = [draw.randint(100, 3000) for _ in range(600)]
    spread = statistics.pstdev(lengths)
    chance = [1 / (1 + math.exp(-2 * math.tanh((n - 1000) / spread))) for n in lengths]
    won = [float(draw.random() < p) for p in chance]
    rows = [annotation(1 + w, n, 1000) for w, n in zip(won, lengths, strict=True)]
    found = TASK.metrics(rows)
    controlled, plain = found["length_controlled_win_rate"], found["win_rate"]
    assert plain.value > 60 and controlled.low is not None and controlled.high is not None
    assert controlled.low < 50 < controlled.high and controlled.unit == "percent"


def test_without_a_length_effect_both_win_rates_agree() -> None:
    equal = length_controlled_win_rate([1.0] * 300 + [0.0] * 100, [5] * 400, [5] * 400)
    assert equal.value == pytest.approx(75, abs=0.05)
    assert length_controlled_win_rate([1.0], [3], [2]).low is None


def test_a_side_that_always_wins_has_the_figure_worked_out_by_hand() -> None:
    """The ridge of 0.05 keeps it finite. With equal lengths the fit is a alone, where 50 (1 - p) = 0.05 a and
    p = 1 / (1 + exp(-a)): a = 5.2444, p = 99.4756%. With other lengths the maximum is found by scipy."""
    equal = length_controlled_win_rate([1.0] * 50, [25] * 50, [25] * 50)
    assert equal.value == pytest.approx(99.4756, abs=1e-3)
    assert length_controlled_win_rate([0.0] * 50, [25] * 50, [25] * 50).value == pytest.approx(
        0.5244, abs=1e-3
    )
    lengths = np.arange(50.0)
    x = np.tanh((lengths - 25) / (lengths - 25).std())

    def loss(ab: np.ndarray) -> float:
        return float(np.log1p(np.exp(-(ab[0] + ab[1] * x))).sum() + 0.025 * (ab @ ab))

    found = optimize.minimize(loss, [0.0, 0.0], tol=1e-12).x
    always = length_controlled_win_rate([1.0] * 50, list(range(50)), [25] * 50)
    assert always.value == pytest.approx(100 / (1 + math.exp(-found[0])), abs=1e-3)
    assert always.value == pytest.approx(99.45, abs=0.1) and always.low is not None and always.low > 99


def test_lengths_that_differ_by_one_character_count_too() -> None:
    """The longer output always wins: between equal lengths the model's would lose."""
    found = length_controlled_win_rate([0.0, 1.0, 0.0, 1.0], [5, 6, 5, 6], [5, 5, 5, 5])
    assert found.value < 20
    assert length_controlled_win_rate([1.0, 0.0, 1.0, 0.0], [5, 6, 5, 6], [5, 5, 5, 5]).value > 80


def test_newer_annotations_are_read_back(tmp_path: Path) -> None:
    rows = [{**annotation(p), "raw_completion": {"logprobs": None}} for p in (1.9, 1.2, None)]
    report = score_file(TASK, Path(json_list(tmp_path / "annotations.json", rows)))
    assert report.headline == "win_rate" and report.metrics["win_rate"].value == pytest.approx(55)
    assert report.metrics["unjudged"].value == pytest.approx(1 / 3)
    printed = proxytune("score", "alpaca_farm", str(tmp_path / "annotations.json")).stdout
    assert "win_rate               55.0 [" in printed and "n_total                2 " in printed


def test_export_for_the_alpaca_eval_tool(tmp_path: Path) -> None:
    system = load_system(tiny_system.write(tmp_path))
    data = json_list(tmp_path / "a.json", ITEMS)
    out = tmp_path / "run"
    evaluated(
        system,
        "alpaca_farm",
        data=data,
        out=out,
        sampling=Sampling(max_new_tokens=8),
        progress=False,
        limit=8,
    )
    done = proxytune("export", "alpaca_eval", str(out), "--json")
    written = [Path(path) for path in json.loads(done.stdout)["written"]]
    assert [path.name for path in written] == ["model_outputs.json", "reference_outputs.json"]
    mine, theirs = (json.loads(path.read_text()) for path in written)
    assert [row["instruction"] for row in mine] == [item["instruction"] for item in ITEMS]
    assert {row["generator"] for row in mine} == {"tiny-proxy"} and set(mine[0]) == set(ITEMS[0])
    assert theirs == [{**item} for item in ITEMS]
    for arguments, message in [
        (["export", "alpaca", str(out)], "Did you mean: alpaca_eval"),
        (["export", "alpaca_eval", str(tmp_path)], "no run in"),
        (["export", "alpaca_eval", str(out), "--out", str(tmp_path / "none")], "no folder"),
    ]:
        refused = proxytune(*arguments)
        assert refused.exit_code == 2 and message in refused.stderr
