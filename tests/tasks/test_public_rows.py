"""Rows in the forms in which files and the hub publish them, and what an answer must have to be an option."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from proxytune.config import Mode
from proxytune.errors import UserError
from proxytune.tasks import get_task, read_source, score_file
from tests.support.answers import jsonl

HEADER = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
CSV = HEADER + (
    "a,b,Where is it?,Rome,Rome; in Rome,Oslo; Bonn; Bern,s\n"
    "a,b,Who did it?,It was Ann,It was Ann; Ann,Bob,s\n"
)  # fmt: skip
GENERATION: list[dict[str, Any]] = [
    {
        "type": "a",
        "category": "b",
        "question": "Where is it?",
        "best_answer": "Rome",
        "correct_answers": ["Rome", "in Rome"],
        "incorrect_answers": ["Oslo", "Bonn", "Bern"],
        "source": "s",
    },
    {
        "type": "a",
        "category": "b",
        "question": "Who did it?",
        "best_answer": "It was Ann",
        "correct_answers": ["It was Ann", "Ann"],
        "incorrect_answers": ["Bob"],
        "source": "s",
    },
]


def table(path: Path, content: str) -> str:
    """Write a CSV file; its path."""
    path.write_text(content, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("task", "mode"),
    [("truthfulqa", "generate"), ("truthfulqa_mc", "generate"), ("truthfulqa_mc", "likelihood")],
)
def test_the_hubs_rows_of_truthfulqa_are_those_of_its_csv(task: str, mode: Mode, tmp_path: Path) -> None:
    asked = get_task(task, mode)
    public = read_source(asked, table(tmp_path / "t.csv", CSV))
    hub = jsonl(tmp_path / "t.jsonl", GENERATION)
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(hub.read_bytes()))
    assert read_source(asked, str(hub)).examples == public.examples
    assert read_source(asked, str(packed)).sha256 == public.sha256


def test_the_hubs_choices_are_those_of_mc_task(tmp_path: Path) -> None:
    asked = get_task("truthfulqa_mc", "likelihood")
    targets = {"mc1_targets": {"Rome": 1, "Oslo": 0}, "mc2_targets": {"Rome": 1, "in Rome": 1, "Oslo": 0}}
    lists = {
        name: {"choices": list(answers), "labels": list(answers.values())}
        for name, answers in targets.items()
    }
    public = read_source(asked, str(jsonl(tmp_path / "public.jsonl", [{"question": "Where?", **targets}])))
    assert read_source(asked, str(jsonl(tmp_path / "hub.jsonl", [{"question": "Where?", **lists}]))) == (
        public.__class__(public.examples, "hub.jsonl", public.sha256)
    )
    lists["mc1_targets"]["labels"] = [1]
    with pytest.raises(UserError, match="line 1: `mc1_targets` must map answers"):
        read_source(asked, str(jsonl(tmp_path / "short.jsonl", [{"question": "Where?", **lists}])))


def test_stored_rows_with_the_hubs_names_are_scored(tmp_path: Path) -> None:
    rows = [{**row, "output": output} for row, output in zip(GENERATION, ("Rome", "Bob"), strict=True)]
    report = score_file(get_task("truthfulqa"), jsonl(tmp_path / "p.jsonl", rows))
    assert (report.n, report.metrics["reference_accuracy"].value) == (2, 0.5)


@pytest.mark.parametrize("mode", ["generate", "likelihood"])
@pytest.mark.parametrize(
    ("answer", "others", "message"), [(" ", "Oslo", "`Best"), ("Rome", " ; ", "`Incorrect")]
)
def test_an_empty_answer_is_no_option(
    mode: Mode, answer: str, others: str, message: str, tmp_path: Path
) -> None:
    path = table(tmp_path / "t.csv", f"{CSV}a,b,Where?,{answer},Rome,{others},s\n")
    with pytest.raises(UserError, match=rf"t\.csv' line 4: {message} Answer"):
        read_source(get_task("truthfulqa_mc", mode), path)


def test_an_empty_spelling_is_no_answer(tmp_path: Path) -> None:
    asked = get_task("triviaqa")
    row = {"question": "Who?", "answers": ["", " ", "Ann"], "question_id": "q"}
    (example,) = read_source(asked, str(jsonl(tmp_path / "t.jsonl", [row]))).examples
    assert example.target["answers"] == ["Ann"]
    with pytest.raises(UserError, match="line 1: no question with a list of answers"):
        read_source(asked, str(jsonl(tmp_path / "none.jsonl", [{**row, "answers": [""]}])))


# DS-1000


def newer(number: int | str, library: str = "Numpy") -> dict[str, Any]:
    """A problem as the newer release has it, in its file and on the hub."""
    meta = {
        "problem_id": 5,
        "library_problem_id": number,
        "library": library,
        "test_case_cnt": 1,
        "perturbation_type": "Surface",
        "perturbation_origin_id": 0,
    }
    texts = {
        "prompt": "Add.\n",
        "reference_code": "result = 1",
        "code_context": "def test_execution(s):\n  s",
    }
    return {**texts, "metadata": meta}


def test_the_newer_release_of_ds1000_is_read_from_its_file(tmp_path: Path) -> None:
    asked = get_task("ds1000")
    path = tmp_path / "ds1000.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(newer(3)) + "\n").encode()))
    (example,) = read_source(asked, str(path)).examples
    assert example.id == "Numpy/3" and example.target["perturbation_type"] == "Surface"
    assert "metadata" not in example.target and example.prompt.plain == "Add.\n"
    texts = read_source(asked, str(jsonl(tmp_path / "texts.jsonl", [newer("3")])))
    assert texts.examples == (example,)
    for bad, message in [
        (newer("three"), "line 1: `problem_id` must be the number of the problem"),
        ({**newer(3), "metadata": {}}, "line 1: no field 'lib'"),
        ({**newer(3), "metadata": "{}"}, "line 1: no field 'lib'"),
    ]:
        with pytest.raises(UserError, match=message):
            read_source(asked, str(jsonl(tmp_path / "bad.jsonl", [bad])))
