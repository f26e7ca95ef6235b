"""TriviaQA: every published form of the data, the paper's rule and the benchmark's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxytune.errors import UserError
from proxytune.records import Completion, Example, Prompt
from proxytune.tasks import get_task, read_source, score_file
from proxytune.tasks.triviaqa import normalise_answer, stored
from tests.support import tiny_system
from tests.support.answers import completions, jsonl
from tests.support.command_line import proxytune

TASK = get_task("triviaqa")
DEV = {"question": "Who?", "answers": ["Ann", "Ann B."], "question_id": "tc_1"}
FORMS: dict[str, dict[str, Any]] = {
    "dev": DEV,
    "flashrag": {"id": "tc_1", "question": "Who?", "golden_answers": ["Ann", "Ann B."]},
    "llm-foundry": {
        "context": "Question: Who?\nAnswer:",
        "answer": "Ann",
        "aliases": ["Ann B.", "Ann"],
        "id": "tc_1",
    },
    "original": {
        "Question": "Who?",
        "QuestionId": "tc_1",
        "Answer": {"Value": "Ann", "Aliases": ["Ann", "Ann B."], "NormalizedAliases": ["ann"]},
    },
    "hub": {
        "question": "Who?",
        "question_id": "tc_1",
        "answer": {"value": "Ann", "aliases": ["Ann B.", "Ann"], "normalized_aliases": ["ann", "ann b"]},
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_all_published_forms_are_one(tmp_path: Path, form: str) -> None:
    data = read_source(TASK, str(jsonl(tmp_path / "d.jsonl", [FORMS[form]])))
    assert [(e.id, e.target) for e in data.examples] == [("tc_1", DEV)]
    assert data.examples[0].prompt.plain == "Question: Who?\nAnswer:"
    assert data.sha256 == read_source(TASK, str(jsonl(tmp_path / "e.jsonl", [DEV]))).sha256


def test_the_original_file_and_the_training_file(tmp_path: Path) -> None:
    path = tmp_path / "web-dev.json"
    path.write_text(json.dumps({"Data": [FORMS["original"]], "Version": 1.0}))
    assert read_source(TASK, str(path)).examples[0].target == DEV
    train = {"prompt": "Question: Where?\nAnswer:", "completion": " Rome"}
    train_file = str(jsonl(tmp_path / "train.jsonl", [train]))
    data = read_source(TASK, str(path), shots=1, shots_from=train_file)
    assert data.examples[0].prompt.plain == "Question: Where?\nAnswer: Rome\n\nQuestion: Who?\nAnswer:"


def test_the_public_samples(reference: Path) -> None:
    folder = reference / "data" / "triviaqa"
    counts = {"flashrag_test_1000.jsonl": 1000, "triviaqa_sm_sub.jsonl.gz": 3000, "triviaqa_sample.json": 1}
    for name, count in counts.items():
        examples = read_source(TASK, str(folder / name)).examples
        assert len(examples) == count
        assert all(
            TASK.score_row(TASK.row(e, completions(" " + e.target["answers"][0])))["acc"] for e in examples
        )


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_list([FORMS["hub"]]).to_parquet(tmp_path / "hub" / "validation.parquet")
    other = {**FORMS["hub"], "question": "Where?", "question_id": "tc_2"}
    datasets.Dataset.from_list([other]).to_parquet(tmp_path / "hub" / "train.parquet")
    assert TASK.hub is not None and (TASK.hub.id, TASK.hub.config) == (
        "mandarjoshi/trivia_qa",
        "unfiltered.nocontext",
    )
    local = replace(TASK, hub=replace(TASK.hub, id=str(tmp_path / "hub"), config=None))
    example = read_source(local, "hub", shots=1).examples[0]
    assert example.target == DEV
    assert example.prompt.plain == "Question: Where?\nAnswer: Ann\n\nQuestion: Who?\nAnswer:"


@pytest.mark.parametrize(
    "row", [{"question": "Who?"}, {"question": "Who?", "answers": [1]}, {"answers": ["a"]}]
)
def test_rows_without_question_or_answers_are_refused(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="line 1: no question with a list of answers"):
        read_source(TASK, str(jsonl(tmp_path / "d.jsonl", [row])))


@pytest.mark.parametrize(
    ("output", "acc", "em", "f1"),
    [
        (" Sunset Boulevard", 1, 1, 1),
        (" SUNSET boulevard \n", 1, 1, 1),
        (" Sunset Boulevard.", 0, 1, 1),
        (" The Sunset Boulevard", 0, 1, 1),
        (" Sunset", 0, 0, 2 / 3),
        (" It was Cats", 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_the_papers_rule_beside_the_benchmarks(output: str, acc: float, em: float, f1: float) -> None:
    row = TASK.row(
        read_source_one({"question": "?", "answers": ["West Sunset Drive", "Sunset Boulevard"]}),
        completions(output),
    )
    assert row["output"] == output.split("\n")[0].strip() and row["correct"] == bool(acc)
    assert TASK.score_row(row) == {"acc": acc, "em": em, "f1": pytest.approx(f1)}


def read_source_one(row: dict[str, Any]) -> Any:
    """The example of one row."""
    from proxytune.tasks.data import DataTable

    assert TASK.prepare is not None
    return TASK.examples(TASK.prepare(DataTable("here", "row", (row,), (1,))), "")[0]


def test_normalisation_is_the_benchmarks() -> None:
    assert normalise_answer("The_Cat\u2019s  \u2018pyjamas\u2019, an A!") == "cat s pyjamas"


def test_settings_and_stored_predictions(tmp_path: Path) -> None:
    assert TASK.sampling.max_new_tokens == 20 and TASK.sampling.stop == ("\n",)
    rows = [{"prediction": p, "answers": ["Ann"]} for p in ("ann", "Ann.", "Bob", "ANN")]
    report = score_file(TASK, jsonl(tmp_path / "p.jsonl", rows))
    assert report.headline == "acc" and report.metrics["acc"].value == 0.5
    assert report.metrics["em"].value == 0.75 and report.metrics["acc"].low is not None
    assert report.metrics["tot"].value == 4
    with pytest.raises(UserError, match=r"q\.jsonl' line 1: a TriviaQA row needs `answers`"):
        score_file(TASK, jsonl(tmp_path / "q.jsonl", [{"prediction": "a"}]))


@pytest.mark.parametrize(
    ("text", "kept", "right"),
    [(" Ann\nBob", "Ann", True), ("\nAnn", "", False), ("Bob\nAnn", "Bob", False), ("ANN ", "ANN", True)],
)
def test_a_response_is_what_stands_before_its_first_line_break(text: str, kept: str, right: bool) -> None:
    target = {"question": "?", "answers": ["Ann"]}
    row = stored(Example("0", Prompt("?", "?"), target), [Completion("0", 0, text, (), "eos", 0.0)])
    assert row == {**target, "output": kept, "correct": right}


def test_the_files_of_the_papers_code(tmp_path: Path) -> None:
    """Its run_eval.py stores the columns of dev.jsonl, `output` and `correct` (none was published)."""
    rows = [
        {"question": "?", "answers": ["Ann "], "question_id": f"q{i}", "output": p, "correct": p == "ANN"}
        for i, p in enumerate(("ANN", "Ann."))
    ]
    report = score_file(TASK, jsonl(tmp_path / "predictions.jsonl", [*rows, rows[0]]))
    assert (report.metrics["acc"].value, report.n, report.dropped_duplicates) == (0.5, 2, 1)
    assert score_file(TASK, tmp_path).metrics == report.metrics, "a folder stands for the file in it"


def test_eval_end_to_end(tmp_path: Path) -> None:
    yaml = tiny_system.write(tmp_path)
    data = str(jsonl(tmp_path / "d.jsonl", [{**DEV, "question_id": str(i)} for i in range(8)]))
    train = str(jsonl(tmp_path / "t.jsonl", [{**DEV, "question": f"Where {i}?"} for i in range(3)]))
    asked = ["eval", "triviaqa", "--system", str(yaml), "--data", data, "--limit", "8", "--shots", "2"]
    made = proxytune(*asked, "--shots-from", train, "--out", str(tmp_path / "run"), "--json", "--verbose")
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    assert found["n"] == 8 and list(found["metrics"]) == ["acc", "em", "f1", "tot"]
    assert found["spec"]["shots"] == 2
    report = score_file(TASK, tmp_path / "run" / "predictions.jsonl")
    assert report.metrics["f1"].value == found["metrics"]["f1"]["value"]


def test_what_people_answered_counts_too(tmp_path: Path) -> None:
    answer = {"Value": "Ann", "Aliases": ["Ann"], "HumanAnswers": ["Annie", "Ann"]}
    row = {"Question": "Who?", "QuestionId": "tc_1", "Answer": answer}
    [example] = read_source(TASK, str(jsonl(tmp_path / "d.jsonl", [row]))).examples
    assert example.target["answers"] == ["Ann", "Annie"]
