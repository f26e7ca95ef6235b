"""What `proxytune tasks` says of the rows of every task: such rows are read, and no field of them is named in
vain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from proxytune.config import Mode
from proxytune.errors import UserError
from proxytune.tasks import TASKS, get_task, read_source
from tests.support.answers import jsonl
from tests.support.checkout import ROOT

OLD_DS1000 = {
    "prompt": "Add it.\n",
    "reference_code": "r = 1",
    "code_context": "exec(code)",
    "test_code": "assert r == 1",
    "lib": "Numpy",
    "problem_id": 1,
    "perturbation_type": "Origin",
}
CSV = {"Question": "Where?", "Best Answer": "Rome", "Incorrect Answers": "Oslo; Bonn"}
LISTS: dict[str, Any] = {"question": "Where?", "best_answer": "Rome", "incorrect_answers": ["Oslo", "Bonn"]}
TARGETS = {"question": "Where?", "mc1_targets": {"Rome": 1, "Bonn": 0}, "mc2_targets": {"Rome": 1, "Bonn": 0}}
CHOICES = {"choices": ["Rome", "Bonn"], "labels": [1, 0]}
ROWS: dict[tuple[str, Mode, str], dict[str, Any]] = {
    ("alpaca_farm", "generate", "alpaca_eval.json, hub"): {
        "instruction": "Name a nut.",
        "output": "Walnut.",
        "generator": "g",
        "dataset": "d",
    },
    ("gsm", "generate", "test.jsonl, hub"): {"question": "1 + 1?", "answer": "It is #### 2"},
    ("toxigen", "generate", "prompts/hate_GROUP_1k.txt (a folder of them, or one)"): {"text": "- a\\n-"},
    ("toxigen", "generate", "hub"): {"text": "- a\\n-", "split": "hate_women_1k"},
    ("toxigen", "generate", "prompts that are chosen already (.jsonl)"): {
        "text": "- a\n-",
        "target_groups": ["women"],
        "label": "hate",
    },
    ("truthfulqa", "generate", "TruthfulQA.csv"): {**CSV, "Correct Answers": "Rome; in Rome"},
    ("truthfulqa", "generate", "hub (generation)"): {**LISTS, "correct_answers": ["Rome", "in Rome"]},
    ("truthfulqa_mc", "generate", "TruthfulQA.csv"): CSV,
    ("truthfulqa_mc", "generate", "hub (generation)"): LISTS,
    ("truthfulqa_mc", "likelihood", "mc_task.json"): TARGETS,
    ("truthfulqa_mc", "likelihood", "hub (multiple_choice)"): {
        "question": "Where?",
        "mc1_targets": CHOICES,
        "mc2_targets": CHOICES,
    },
    ("truthfulqa_mc", "likelihood", "TruthfulQA.csv"): {**CSV, "Correct Answers": "Rome; in Rome"},
    ("humaneval", "generate", "HumanEval.jsonl.gz, hub"): {
        "task_id": "T/0",
        "prompt": "def f(a):\n",
        "entry_point": "f",
        "test": "def check(f): pass",
    },
    ("ds1000", "generate", "ds1000.jsonl.gz, hub"): {
        "prompt": "Add it.\n",
        "reference_code": "r = 1",
        "code_context": "def test_execution(code): pass",
        "metadata": {"library": "Numpy", "library_problem_id": 1, "perturbation_type": "Origin"},
    },
    ("ds1000", "generate", "the folder release, as rows"): OLD_DS1000,
    ("triviaqa", "generate", "hub, or unfiltered-web-dev.json"): {
        "question": "Who?",
        "answer": {"value": "Ann", "aliases": ["Ann", "Anna"]},
        "question_id": "q",
    },
    ("triviaqa", "generate", "dev.jsonl of the paper"): {"question": "Who?", "answers": ["Ann"]},
    ("triviaqa", "generate", "train.jsonl of the paper"): {
        "prompt": "Question: Who?\nAnswer:",
        "completion": " Ann",
    },
    ("realtimeqa", "generate", "past/**/*_qa.jsonl, hub"): {
        "question_id": "20230105_1",
        "question_sentence": "Who?",
        "choices": ["Ann", "Bob"],
        "answer": ["0"],
        "question_date": "2023/01/05",
    },
}


def written(row: dict[str, Any], folder: Path, form: str) -> str:
    """A file with the row: a line of text where the form is a list of texts."""
    if form.startswith("prompts/"):
        path = folder / "hate_women_1k.txt"
        path.write_text(row["text"] + "\n", encoding="utf-8")
        return str(path)
    return str(jsonl(folder / "rows.jsonl", [row]))


def named() -> set[tuple[str, Mode, str]]:
    """Every form that a task names."""
    return {
        (name, mode, form)
        for name, task in TASKS.items()
        for mode, own in (("generate", task), ("likelihood", task.likelihood))
        if own is not None and (mode == "generate" or own.formats != task.formats)
        for form in own.formats
    }


def test_every_form_has_a_row_here() -> None:
    assert named() == ROWS.keys() and {name for name, _, _ in ROWS} == TASKS.keys()


@pytest.mark.parametrize(("task", "mode", "form"), ROWS)
def test_such_rows_are_read_and_need_their_fields(task: str, mode: Mode, form: str, tmp_path: Path) -> None:
    row, asked = ROWS[task, mode, form], get_task(task, mode)
    fields = asked.formats[form]
    assert row.keys() == fields.keys()
    assert len(read_source(asked, written(row, tmp_path, form)).examples) == 1
    for name, holds in fields.items():
        less = {key: value for key, value in row.items() if key != name}
        if "(optional)" in holds:
            assert read_source(asked, written(less, tmp_path, form)).examples
        elif less:
            with pytest.raises(UserError):
                read_source(asked, written(less, tmp_path, form))


def test_the_page_names_every_field() -> None:
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    for task, mode, form in ROWS:
        for name in get_task(task, mode).formats[form]:
            assert f"`{name}`" in page, (task, form, name)
