"""The paper's own predictions and prompts: scores equal to the last digit, prompts to the last character."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from proxytune.decoding.prompts import text_for
from proxytune.intervals import mean_metric
from proxytune.records import Prompt
from proxytune.tasks import get_task, read_source, score_file
from proxytune.tasks.scoring.rules import exact_match, last_number, numeric_equal, parse_letter
from tests.support.published import DS1000, HUMANEVAL, rows

CHAT = {f"llama2-chat-{size}{form}" for size in ("7B", "13B") for form in ("", "-helpful-prompt")}
GSM = [
    "dexperts-13B", "dexperts-gsm-13B", "llama2-13B", "llama2-chat-13B", "llama2-chat-7B", "llama2-gsm-13B",
    "llama2-gsm-7B", "llama2-gsm-lora-13B", "llama2-gsm-lora-13B-lr2e-5",
]  # fmt: skip
TRUTHFULQA = [
    "llama2-13B",
    *(f"{name}-helpful-prompt" for name in ("dexperts-13B", "llama2-chat-13B", "llama2-chat-7B")),
]
TOXIGEN = ["dexperts-13B", "llama2-13B", "llama2-chat-13B"]
ALPACA_FARM = ["dexperts-13B", "llama2-chat-13B", "llama2-chat-7B"]
NUMERIC = {
    "dexperts-13B": 0.27748294162244125,
    "dexperts-gsm-13B": 0.4382107657316149,
    "llama2-13B": 0.0667172100075815,
    "llama2-chat-13B": 0.34420015163002277,
    "llama2-chat-7B": 0.244882486732373,
    "llama2-gsm-13B": 0.510235026535254,
    "llama2-gsm-7B": 0.42153146322971946,
    "llama2-gsm-lora-13B": 0.32297194844579225,
    "llama2-gsm-lora-13B-lr2e-5": 0.13115996967399546,
}
"""Numeric equality of the stored `prediction`, which has lost the sign of whole numbers."""
SIGNS = {"dexperts-13B": -1, "llama2-chat-13B": 1, "llama2-chat-7B": 1, "llama2-gsm-lora-13B-lr2e-5": -1}
"""Items by which our `exact_match_numeric`, which reads the sign in the response, differs from that."""


def metrics(path: Path) -> Any:
    """A stored metrics file."""
    return json.loads(path.read_text(encoding="utf-8"))


def shown(prompt: Prompt, run: str) -> str:
    """The text that a run's model saw, or the base in a proxy run."""
    return text_for("llama2" if run in CHAT else "none", "direct", prompt)


@pytest.mark.parametrize("run", GSM)
@pytest.mark.every(3)
def test_gsm_scores(reference: Path, tmp_path: Path, run: str) -> None:
    folder = reference / "golden" / "gsm" / run
    packed = folder / "predictions.jsonl.gz"
    report = score_file(get_task("gsm"), packed)
    stored = metrics(folder / "metrics.json")["exact_match"]
    assert report.n == 1319 and report.metrics["exact_match"].value == stored

    plain = tmp_path / "predictions.jsonl"
    plain.write_bytes(gzip.decompress(packed.read_bytes()))
    assert score_file(get_task("gsm"), plain).metrics == report.metrics

    data = rows(packed)
    assert [last_number(row["model_output"]) for row in data] == [row["prediction"] for row in data]
    assert mean_metric([exact_match(row["prediction"], row["answer"]) for row in data]).value == stored
    assert (
        mean_metric([numeric_equal(row["prediction"], row["answer"]) for row in data]).value == NUMERIC[run]
    )
    fair = round(1319 * report.metrics["exact_match_numeric"].value)
    assert fair == round(1319 * NUMERIC[run]) + SIGNS.get(run, 0)


def test_gsm_data_and_prompts(reference: Path) -> None:
    data = read_source(get_task("gsm"), str(reference / "data" / "gsm8k" / "test.jsonl"))
    stored = rows(reference / "golden" / "gsm" / "llama2-13B" / "predictions.jsonl.gz")
    asked = [(example.target["question"], example.target["answer"]) for example in data.examples]
    assert asked == [(row["question"], row["answer"]) for row in stored]
    found = sorted((reference / "golden" / "gsm").glob("*/example_prompt.txt"))
    assert len(found) == 8
    for path in found:
        assert shown(data.examples[0].prompt, path.parent.name) == path.read_text(encoding="utf-8"), path


def test_gsm_shots_from_the_train_split(reference: Path) -> None:
    folder = reference / "data" / "gsm8k"
    train = str(folder / "train.jsonl.gz")
    data = read_source(get_task("gsm"), str(folder / "test.jsonl"), 5, shots=8, shots_from=train)
    assert all(example.prompt.plain.count("\nAnswer:") == 9 for example in data.examples)


@pytest.mark.parametrize("run", TRUTHFULQA)
def test_truthfulqa_scores(reference: Path, run: str) -> None:
    folder = reference / "golden" / "truthfulqa" / run
    report = score_file(get_task("truthfulqa"), folder / "open_results.jsonl.gz")
    assert report.n == 817 and report.headline == "GPT-true-info acc"
    for name, value in metrics(folder / "open_metrics.json").items():
        found = report.metrics[name].value
        assert found == value if name.endswith("acc") else found == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize("run", TRUTHFULQA)
def test_truthfulqa_mc_scores(reference: Path, run: str) -> None:
    folder = reference / "golden" / "truthfulqa" / run
    path = folder / "mc_results.jsonl.gz"
    report, data = score_file(get_task("truthfulqa_mc"), path), rows(path)
    stored = metrics(folder / "mc_metrics.json")
    assert report.n == 817 and report.headline == "acc"
    assert {name: report.metrics[name].value for name in stored} == stored
    assert report.metrics["acc_all"].value == sum(row["correct"] is True for row in data) / 817
    assert [parse_letter(row["mc_output"]) for row in data] == [row["parsed_output"] for row in data]


@pytest.mark.parametrize("run", TRUTHFULQA)
def test_truthfulqa_prompts(reference: Path, run: str) -> None:
    source = str(reference / "data" / "truthfulqa" / "TruthfulQA.csv")
    folder = reference / "golden" / "truthfulqa" / run
    examples = read_source(get_task("truthfulqa"), source).examples
    stored = rows(folder / "open_results.jsonl.gz")
    names = list(examples[0].target)
    assert [e.target for e in examples] == [{name: row[name] or "" for name in names} for row in stored]
    assert shown(examples[0].prompt, run) == (folder / "example_prompt.txt").read_text(encoding="utf-8")

    examples = read_source(get_task("truthfulqa_mc"), source).examples
    stored = rows(folder / "mc_results.jsonl.gz")
    assert len(examples) == len(stored) == 817
    assert [shown(example.prompt, run) for example in examples] == [row["mc_prompt"] for row in stored]
    assert [example.target["mc_answer_idx"] for example in examples] == [
        row["mc_answer_idx"] for row in stored
    ]
    assert shown(examples[0].prompt, run) == (folder / "example_mc_prompt.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("run", TOXIGEN)
def test_toxigen_scores_and_prompts(reference: Path, run: str) -> None:
    folder = reference / "golden" / "toxigen" / run
    report = score_file(get_task("toxigen"), folder / "predictions.jsonl.gz")
    stored, found = metrics(folder / "metrics.json"), {n: m.value for n, m in report.metrics.items()}
    assert report.n == 2800 and report.headline == "overall"
    assert list(found.items()) == list(stored.items())

    examples = read_source(get_task("toxigen"), str(reference / "data" / "toxigen")).examples
    data = rows(folder / "predictions.jsonl.gz")
    same = [
        all(example.target[k] == row[k] for k in example.target)
        for example, row in zip(examples, data, strict=True)
    ]
    assert sum(same) == 2800
    example_prompt = folder / "example_prompt.txt"
    if example_prompt.exists():
        equal = shown(examples[0].prompt, run) == example_prompt.read_text(encoding="utf-8")
        assert equal, "the text is hateful: it is not shown"
    else:
        assert run == "dexperts-13B"


@pytest.mark.parametrize("run", ALPACA_FARM)
def test_alpaca_farm_scores_and_prompts(reference: Path, run: str) -> None:
    folder = reference / "golden" / "alpaca_farm" / run
    report = score_file(get_task("alpaca_farm"), folder / "annotations.json.gz")
    stored, found = metrics(folder / "metrics.json"), report.metrics
    assert report.n == stored["n_total"] == 805 and report.headline == "win_rate"
    for name in ("win_rate", "n_wins", "n_wins_base", "n_draws", "n_total", "avg_length"):
        assert found[name].value == stored[name], name
    assert found["standard_error"].value == pytest.approx(stored["standard_error"], abs=1e-12)
    win_rate, controlled = found["win_rate"], found["length_controlled_win_rate"]
    assert (
        win_rate.low is not None and win_rate.low < stored["win_rate"] and controlled.value < win_rate.value
    )

    data = json.loads(gzip.decompress((folder / "annotations.json.gz").read_bytes()))
    examples = read_source(
        get_task("alpaca_farm"), str(reference / "data" / "alpaca_farm" / "alpaca_eval.json")
    ).examples
    assert [example.target for example in examples] == [
        {name: row[name] for name in ("instruction", "output_1", "generator_1", "dataset")} for row in data
    ]
    assert shown(examples[0].prompt, run) == (folder / "example_prompt.txt").read_text(encoding="utf-8")


def test_every_golden_run_is_scored_by_a_test(reference: Path) -> None:
    """27 runs with 31 files of metrics; those of code are in test_humaneval.py and test_ds1000.py, and both
    files of a HumanEval run give the same problems."""
    here = {"gsm": GSM, "truthfulqa": TRUTHFULQA, "toxigen": TOXIGEN, "alpaca_farm": ALPACA_FARM}
    tested = {**here, "codex_humaneval": list(HUMANEVAL), "ds1000": list(DS1000)}
    manifest = metrics(reference / "golden" / "manifest.json")["entries"]
    assert sorted((task, run) for task, runs in tested.items() for run in runs) == sorted(
        (entry["task"], entry["model"]) for entry in manifest
    )
    assert len(manifest) == 27
    assert len(list((reference / "golden").glob("*/*/*metrics.json"))) == 31


@pytest.mark.parametrize(
    "task", ["gsm", "truthfulqa", "truthfulqa_mc", "toxigen", "alpaca_farm", "humaneval"]
)
def test_a_folder_of_the_papers_results_stands_for_its_file(reference: Path, task: str) -> None:
    name = {"truthfulqa_mc": "truthfulqa", "humaneval": "codex_humaneval"}.get(task, task)
    folder = next(path for path in sorted((reference / "golden" / name).iterdir()) if "dexperts" in path.name)
    stored = metrics(
        folder
        / {"truthfulqa": "open_metrics.json", "truthfulqa_mc": "mc_metrics.json"}.get(task, "metrics.json")
    )
    found = {name: metric.value for name, metric in score_file(get_task(task), folder).metrics.items()}
    numbers = {key: value for key, value in stored.items() if not isinstance(value, str)}
    assert {key: found[key] for key in numbers} == pytest.approx(numbers, abs=1e-9)


def test_truthfulqa_targets_for_likelihood(reference: Path) -> None:
    """mc_task.json and TruthfulQA.csv say the same of all questions but for their order."""
    task, folder = get_task("truthfulqa_mc", "likelihood"), reference / "data" / "truthfulqa"
    listed = read_source(task, str(folder / "mc_task.json")).examples
    derived = read_source(task, str(folder / "TruthfulQA.csv")).examples
    assert len(listed) == len(derived) == 817
    assert {e.prompt.plain for e in listed} == {e.prompt.plain for e in derived}
    truths = {e.prompt.plain: sum(e.target["mc1_targets"].values()) for e in (*listed, *derived)}
    assert set(truths.values()) == {1}
