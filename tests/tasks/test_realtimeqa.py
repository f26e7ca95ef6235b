"""RealTime QA: rows as they are upstream (blank choices, repeated ids), letters, and both modes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxytune import results
from proxytune.config import load_system
from proxytune.decoding.prompts import text_for
from proxytune.errors import UserError
from proxytune.records import Completion
from proxytune.tasks import get_task, read_source, score_file
from tests.support import tiny_system
from tests.support.answers import jsonl
from tests.support.runs import evaluated, unfinish

TASK, BY_LIKELIHOOD = get_task("realtimeqa"), get_task("realtimeqa", "likelihood")


def item(name: str, choices: list[str], answer: Any, sentence: str = "Who won?") -> dict[str, Any]:
    """A row of a weekly file."""
    row = {"question_date": "2023/01/05", "question_source": "CNN", "question_url": "u", "evidence": ""}
    return {"question_id": name, "question_sentence": sentence, "choices": choices, "answer": answer, **row}


FOUR = ["Ann", "Bob", "Cid", "Dan"]


def completed(text: str, logprob: float = 0.0) -> Completion:
    """A completion with this text."""
    return Completion(example_id="0", sample=0, text=text, token_ids=(), finish_reason="eos", logprob=logprob)


def test_the_prompt_is_that_of_the_papers_other_choice_task(tmp_path: Path) -> None:
    prompt = read_source(TASK, str(jsonl(tmp_path / "d.jsonl", [item("a", FOUR, ["2"])]))).examples[0].prompt
    user = "Who won?\nA. Ann\nB. Bob\nC. Cid\nD. Dan"
    assert prompt.plain == f"{user}\n\nThe answer is:"
    assert text_for("llama2", "direct", prompt) == f"[INST] {user} [/INST] The answer is:"
    assert text_for("llama2", "in_ensemble", prompt) == f"[INST] {user} [/INST] The answer is:"


def test_blank_choices_move_the_letter(tmp_path: Path) -> None:
    rows = [
        item("a", FOUR, ["3"]),
        item("b", ["Ann", "", "Cid", "Dan", "None of the above"], ["4"]),
        item("c", ["TRUE", "FALSE"], "1"),
    ]
    examples = read_source(TASK, str(jsonl(tmp_path / "d.jsonl", rows))).examples
    assert [e.target["mc_answer_idx"] for e in examples] == ["D", "D", "B"]
    assert examples[1].target["choices"] == ["Ann", "Cid", "Dan", "None of the above"]


def test_equal_rows_are_dropped_and_different_ones_numbered(tmp_path: Path) -> None:
    one, other = item("a", FOUR, ["0"]), item("a", FOUR, ["1"], "Who lost?")
    data = read_source(TASK, str(jsonl(tmp_path / "d.jsonl", [one, one, other, item("b", ["", ""], [])])))
    assert [example.id for example in data.examples] == ["a", "a#2"]
    assert data.examples[1].target["question_sentence"] == "Who lost?"
    first, second = data.notes
    assert "1 rows dropped (fewer than two choices" in first
    assert "1 rows dropped (equal to an earlier one of the same question_id), 1 numbered" in second


def test_the_public_files(reference: Path) -> None:
    folder = reference / "data" / "realtimeqa"
    counts = {
        "past_2022_qa.jsonl.gz": 810,
        "past_2023_qa.jsonl.gz": 1419,
        "past_2023_qa_nota.jsonl.gz": 1426,
        "backnumber_2020_qa.jsonl.gz": 855,
        "past_2026_qa.jsonl": 420,
    }
    for name, count in counts.items():
        assert len(read_source(TASK, str(folder / name)).examples) == count, name
    data = read_source(TASK, str(folder / "past_2023_qa.jsonl.gz"))
    assert [e.id for e in data.examples if "#" in e.id] == ["20230414_20#2"]
    assert "10 rows dropped" in data.notes[0] and "1 numbered" in data.notes[0]
    with pytest.raises(UserError, match="the files of the current week have no answers"):
        read_source(TASK, str(folder / "20260717_qa_public.jsonl"))
    shown = read_source(
        TASK, str(folder / "past_2026_qa.jsonl"), 2, shots=3, shots_from=str(folder / "past_2025_qa.jsonl.gz")
    )
    assert all(e.prompt.plain.count("The answer is:") == 4 for e in shown.examples)


def test_the_copy_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder with the copy's layout: a file per week, others beside it, and a bare "1" in one row."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    past = tmp_path / "hub" / "past"
    for year, name, answer in (("2022", "20220617_0", ["2"]), ("2023", "20230616_20", "1")):
        (past / year).mkdir(parents=True)
        week = name.split("_")[0]
        jsonl(past / year / f"{week}_qa.jsonl", [item(name, FOUR, answer)])
        other = [item(name, [*FOUR[:3], "None of the above"], answer)]
        jsonl(past / year / f"{week}_qa_nota.jsonl", other)
        jsonl(past / year / f"{week}_gcs.jsonl", [{"question_id": name, "search_result": []}])
    assert TASK.hub is not None and TASK.hub.id == "monsoon-nlp/relive-qa"
    local = replace(TASK, hub=replace(TASK.hub, id=str(tmp_path / "hub")))
    found = {e.id: e.target["mc_answer_idx"] for e in read_source(local, "hub").examples}
    assert found == {"20220617_0": "C", "20230616_20": "B"}


@pytest.mark.parametrize(
    ("text", "letter"), [(" B. Bob", "B"), ("(C)", "C"), (" Bob", "B"), ("42", ""), ("Both", "")]
)
def test_a_response_names_a_choice_by_letter_or_text(tmp_path: Path, text: str, letter: str) -> None:
    example = read_source(TASK, str(jsonl(tmp_path / "d.jsonl", [item("a", FOUR, ["1"])]))).examples[0]
    row = TASK.row(example, [completed(text)])
    assert row["parsed_output"] == letter
    scores = TASK.score_row(row)
    assert scores["accuracy_all"] == float(letter == "B") and scores["invalid"] == float(not letter)
    assert ("accuracy" in scores) == bool(letter)


def test_stored_rows_are_read_by_their_choices(tmp_path: Path) -> None:
    row = {"question_id": "a", "choices": FOUR, "mc_output": "Because Dan", "mc_answer_idx": "D"}
    assert score_file(TASK, jsonl(tmp_path / "p.jsonl", [row])).metrics["accuracy"].value == 1
    for choices in (None, ["Ann"], "Ann"):
        with pytest.raises(UserError, match="line 1: `choices` must be a list of 2 to 5 texts"):
            score_file(TASK, jsonl(tmp_path / "p.jsonl", [{**row, "choices": choices}]))


def test_the_most_probable_letter(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [item("a", FOUR, ["1"])])
    example = read_source(BY_LIKELIHOOD, str(path)).examples[0]
    assert BY_LIKELIHOOD.continuations is not None
    texts = BY_LIKELIHOOD.continuations(example)
    assert tuple(texts) == (" A", " B", " C", " D")
    row = BY_LIKELIHOOD.row(example, [completed(t, p) for t, p in zip(texts, (-3, -1, -1, -9), strict=True)])
    assert row["parsed_output"] == "B" and BY_LIKELIHOOD.score_row(row) == {"accuracy": 1.0}


@pytest.mark.parametrize("mode", ["generate", "likelihood"])
def test_both_modes_end_to_end(tmp_path: Path, mode: Any) -> None:
    system = load_system(tiny_system.write(tmp_path))
    data = str(jsonl(tmp_path / "d.jsonl", [item(str(i), FOUR[: 2 + i % 3], [str(i % 2)]) for i in range(8)]))
    settings: dict[str, Any] = {"data": data, "limit": 8, "progress": False, "mode": mode}
    made = evaluated(system, "realtimeqa", out=tmp_path / "run", **settings)
    assert made.n == 8 and made.spec.mode == mode and made.headline == "accuracy"
    path = tmp_path / "run" / results.PREDICTIONS
    whole = path.read_bytes()
    unfinish(tmp_path / "run", 3)
    again = evaluated(system, "realtimeqa", out=tmp_path / "run", **settings)
    assert again.metrics == made.metrics and path.read_bytes() == whole
    report = score_file(get_task("realtimeqa", mode), path)
    assert report.metrics == made.metrics
