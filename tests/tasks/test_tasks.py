"""Tasks: prompts, what is read from where, what is refused, what is stored."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxytune.demo import world
from proxytune.errors import UserError
from proxytune.records import Prompt
from proxytune.tasks import TASKS, get_task, read_source, score_file
from proxytune.tasks.data import Hub, read_file, unique_rows
from proxytune.tasks.truthfulqa import SYSTEM_PROMPT
from tests.support.answers import completions, jsonl

GSM = get_task("gsm")
ITEMS = [
    {"question": " How many? ", "answer": "500+500=<<500+500=1000>>1,000\n#### 1,000"},
    {"question": "How cold?", "answer": "#### -3"},
    {"question": "How much?", "answer": "0"},
]
HEADER = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"Unknown task 'gms'\. Did you mean: gsm\?"):
        get_task("gms")


# Reading


def test_gsm_rows_become_examples(tmp_path: Path) -> None:
    examples = read_source(GSM, str(jsonl(tmp_path / "t.jsonl", ITEMS))).examples
    user = "Answer the following question.\n\nQuestion: How many?"
    assert examples[0].prompt == Prompt(plain=f"{user}\nAnswer:", user=user, response_prefix="Answer:")
    assert [example.target["answer"] for example in examples] == ["1000", "-3", "0"]
    assert [example.id for example in examples] == ["0", "1", "2"]
    assert examples[0].target["question"] == " How many? ", "the stored question is the data's own"


def test_the_fingerprint_is_of_what_is_asked(tmp_path: Path) -> None:
    plain = jsonl(tmp_path / "t.jsonl", ITEMS)
    packed = tmp_path / "t.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    whole, same, two = (
        read_source(GSM, str(plain)),
        read_source(GSM, str(packed)),
        read_source(GSM, str(plain), 2),
    )
    assert whole.sha256 == same.sha256 != two.sha256
    assert (whole.name, same.name, len(two.examples)) == ("t.jsonl", "t.jsonl.gz", 2)


@pytest.mark.parametrize("name", world.TASKS)
def test_the_demo_world_comes_in_the_public_form(name: str) -> None:
    data = read_source(TASKS[name], "generated", 3)
    assert data.name == "generated" and len(data.examples) == 3
    assert data == read_source(TASKS[name], "generated", 3)
    assert data.examples == read_source(TASKS[name], "generated").examples[:3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no rows"),
        (b"\n\n", "has no rows"),
        (b'{"question": "a", "answer": "1"}\n{"question"\n', "line 2 is not JSON"),
        (b'{"question": "a", "answer": "1"}\n\n[1]\n', "line 3 must be a JSON object, not list"),
        (b'{"question": "a"}\n', "line 1: no field 'answer' \\(it has question\\)"),
        (b'{"question": "a", "answer": 7}\n', "line 1: field 'answer' must be text, not 7"),
        (b'{"question": "a", "answer": "#### none"}\n', "line 1: the answer has no number"),
        (b'{"question": "a", "answer": "1"}\n{"question": "\xe9"}', r"line 2 is not UTF-8 text \(byte 47\)"),
    ],
)
def test_bad_jsonl_is_an_error_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_source(GSM, str(tmp_path / "t.jsonl"))


def test_bad_files_are_errors(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"question": "a", "answer": "1"}\n' * 50)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-12])
    (tmp_path / "not.jsonl.gz").write_bytes(b"{}")
    (tmp_path / "t.parquet").write_bytes(b"")
    (tmp_path / "dir.jsonl").mkdir()
    for name, message in [
        ("none.jsonl", "no file '.*none.jsonl'"),
        ("cut.jsonl.gz", "cut short or is no gzip file"),
        ("not.jsonl.gz", "cut short or is no gzip file"),
        ("t.parquet", "cannot tell the format"),
        ("dir.jsonl", "is a folder"),
    ]:
        with pytest.raises(UserError, match=message):
            read_source(GSM, str(tmp_path / name))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Type,Question\nx,y\n", "line 2: no field 'Best Answer' \\(it has Type, Question\\)"),
        (HEADER + "a,b,c\n", "line 2: no field 'Best Answer'"),
        (HEADER + "a,b,c,d,e,f,g,h\n", "line 2 has more cells than the header"),
        (HEADER + 'a,b,"c,d,e,f,g\n', "line 2 is not CSV"),
        (HEADER, "has no rows"),
    ],
)
def test_bad_csv_is_an_error_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_source(get_task("truthfulqa"), str(tmp_path / "t.csv"))


def test_csv_keeps_line_breaks_byte_order_mark_and_all(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("\ufeff" + HEADER + 'a,b,"c\n""d""?",e,f,g; h.,i\n', encoding="utf-8")
    example = read_source(get_task("truthfulqa"), str(path)).examples[0]
    assert example.prompt.plain == 'c\n"d"?\n\nAnswer:' and example.target["Type"] == "a"
    assert example.prompt.system == SYSTEM_PROMPT and "nature.\\nIf a question" in SYSTEM_PROMPT


def test_text_lines_are_rows(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one\r\n\ntwo\u2028more\n", encoding="utf-8")
    table = read_file(tmp_path / "t.txt")
    assert table.rows == ({"text": "one"}, {"text": "two\u2028more"}) and table.numbers == (1, 3)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_must_leave_something(limit: int) -> None:
    with pytest.raises(UserError, match="at least 1"):
        read_source(GSM, "generated", limit)


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder with the hub's files and columns stands for the hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lists = {"correct_answers": ["Rome", "in Rome"], "incorrect_answers": ["Oslo"]}
    row = {"type": "t", "category": "c", "question": "Where?", "best_answer": "Rome", "source": "s", **lists}
    (tmp_path / "qa").mkdir()
    (tmp_path / "math").mkdir()
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "qa" / "validation.parquet")
    datasets.Dataset.from_list(ITEMS[:2]).to_parquet(tmp_path / "math" / "test.parquet")
    datasets.Dataset.from_list(ITEMS[2:]).to_parquet(tmp_path / "math" / "train.parquet")

    task = get_task("truthfulqa")
    local = replace(task, hub=replace(task.hub, id=str(tmp_path / "qa"), config=None))
    target = read_source(local, "hub").examples[0].target
    assert target["Best Answer"] == "Rome" and target["Correct Answers"] == "Rome; in Rome"

    gsm = replace(GSM, hub=replace(GSM.hub, id=str(tmp_path / "math"), config=None))
    asked = read_source(gsm, "hub", 1, shots=1)
    assert (
        asked.name == "hub"
        and "How much?\nAnswer: 0\n\nQuestion: How many?" in asked.examples[0].prompt.plain
    )

    with pytest.raises(UserError, match=r"cannot load '.*nowhere' from the hub: .*--data FILE"):
        read_source(replace(GSM, hub=Hub(str(tmp_path / "nowhere"), None, "test")), "hub")


# Few-shot items


def test_shots_stand_before_the_question_and_never_answer_it(tmp_path: Path) -> None:
    train, test = jsonl(tmp_path / "train.jsonl", ITEMS), jsonl(tmp_path / "test.jsonl", ITEMS[:1])
    data = read_source(GSM, str(test), shots=2, shots_from=str(train), seed=1)
    prompt = data.examples[0].prompt
    assert prompt.user.startswith("Answer the following question.\n\nQuestion: How ")
    assert prompt.plain == f"{prompt.user}\nAnswer:" and prompt.plain.count("Answer:") == 3
    assert prompt.plain.count("How many?") == 1
    assert data == read_source(GSM, str(test), shots=2, shots_from=str(train), seed=1)
    with pytest.raises(UserError, match="has 2 items that are not asked"):
        read_source(GSM, str(test), shots=3, shots_from=str(train))


def test_shots_that_cannot_be_had_are_refused(tmp_path: Path) -> None:
    test = str(jsonl(tmp_path / "test.jsonl", ITEMS))
    with pytest.raises(UserError, match="--shots-from FILE"):
        read_source(GSM, test, shots=1)
    with pytest.raises(UserError, match="negative"):
        read_source(GSM, test, shots=-1)
    with pytest.raises(UserError, match="has no few-shot form"):
        read_source(get_task("truthfulqa"), "generated", 1, shots=1)
    assert "Question:" in read_source(GSM, "generated", 1, shots=2).examples[0].prompt.plain


# Multiple choice


def test_options_are_the_best_answer_and_up_to_three_others(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        HEADER + "t,c,Where?,Rome,Rome,Oslo; Bonn.;;Bern; Kyiv,s\nt,c,Who?,I,I,you,s\n", encoding="utf-8"
    )
    four, two = read_source(get_task("truthfulqa_mc"), str(path)).examples
    lines = four.prompt.user.split("\n")
    assert lines[0] == "Where?" and [line[:3] for line in lines[1:]] == ["A. ", "B. ", "C. ", "D. "]
    assert all(line.endswith(".") and not line.endswith("..") for line in lines[1:])
    assert f"{four.target['mc_answer_idx']}. Rome." in lines
    assert four.prompt.plain == four.prompt.user + "\n\nThe answer is:" == four.target["mc_prompt"]
    assert sorted(line[3:] for line in two.prompt.user.split("\n")[1:]) == ["I.", "you."]


# Rows and scores


def test_rows_have_the_papers_fields() -> None:
    example = read_source(GSM, "generated", 1).examples[0]
    row = GSM.row(example, completions(" 1,000 is\nQuestion: 5"))
    assert list(row) == ["question", "answer", "model_output", "prediction"]
    assert row["model_output"] == " 1,000 is\n" and row["prediction"] == "1000"

    task = get_task("truthfulqa")
    row = task.row(read_source(task, "generated", 1).examples[0], completions(" Answer: so\n\nand so "))
    assert row["output"] == "so\nand so" and list(row)[-2:] == ["Source", "output"]

    task = get_task("truthfulqa_mc")
    example = read_source(task, "generated", 1).examples[0]
    row = task.row(example, completions(f" {example.target['mc_answer_idx']}"))
    assert list(row)[-5:] == ["mc_prompt", "mc_answer_idx", "mc_output", "parsed_output", "correct"]
    assert row["correct"] is True and task.row(example, completions("E"))["correct"] is None


@pytest.mark.parametrize("name", ["gsm", "truthfulqa", "truthfulqa_mc"])
def test_the_best_answer_scores_and_nonsense_does_not(name: str) -> None:
    task = TASKS[name]
    for example in read_source(task, "generated", 20).examples:
        target = example.target
        right = {"gsm": "answer", "truthfulqa": "Best Answer", "truthfulqa_mc": "mc_answer_idx"}[name]
        assert task.score_row(task.row(example, completions(" " + target[right])))[task.headline] == 1
        assert task.score_row(task.row(example, completions("nonsense"))).get(task.headline, 0) == 0


def test_invalid_letters_leave_the_papers_accuracy_only() -> None:
    task = get_task("truthfulqa_mc")
    rows = [{"mc_output": text, "mc_answer_idx": "A"} for text in ("A", "B", "?", "")]
    metrics = task.metrics(rows)
    assert {name: metric.value for name, metric in metrics.items()} == {
        "acc": 0.5, "acc_all": 0.25, "num_invalid_predictions": 2, "tot": 4
    }  # fmt: skip
    assert task.metrics(rows[2:])["acc"].value == 0, "no valid response at all"


def test_judged_rows_change_the_headline() -> None:
    task = get_task("truthfulqa")
    row = {"output": "so", "Correct Answers": "so", "Incorrect Answers": "no"}
    judged = task.metrics([{**row, "GPT-true acc": 1, "GPT-info acc": 0, "GPT-true-info acc": 0}])
    assert task.headline_of(judged) == "GPT-true-info acc" and judged["GPT-true acc"].value == 1
    assert task.headline_of(task.metrics([row])) == "reference_accuracy"


# Stored predictions


def stored(index: str, output: str) -> dict[str, Any]:
    """A row of our predictions.jsonl."""
    return {
        "id": index,
        "answer": "1",
        "model_output": output,
        "prediction": "ignored",
        "outputs": [],
        "scores": {},
    }


def test_our_own_predictions_are_scored_from_their_texts(tmp_path: Path) -> None:
    rows = [stored("0", "so 1"), stored("1", "so 2"), stored("1", "so 2"), stored("1", "so 1")]
    report = score_file(GSM, jsonl(tmp_path / "predictions.jsonl", rows))
    assert (report.n, report.dropped_duplicates, report.renumbered_ids) == (3, 1, 1)
    assert report.headline == "exact_match" and report.metrics["exact_match"].value == pytest.approx(2 / 3)
    assert report.model_dump(mode="json")["metrics"]["exact_match_numeric"]["value"] == pytest.approx(2 / 3)


def test_rows_without_ids_are_never_dropped() -> None:
    kept, dropped, renumbered = unique_rows([{"a": 1}, {"a": 1}])
    assert (len(kept), dropped, renumbered) == (2, 0, 0)


def test_a_file_of_another_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 1: no field 'mc_output'"):
        score_file(get_task("truthfulqa_mc"), jsonl(tmp_path / "p.jsonl", [stored("0", "1")]))
