"""What every task declares, and its rows and scores on inputs that hide nothing, worked out by hand."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxytune.config import Sampling
from proxytune.errors import UserError
from proxytune.records import Completion, Example, JsonRow, Metric, Prompt
from proxytune.sandbox import LOST
from proxytune.tasks import TASKS, data, get_task, gsm, read_source, score_file
from proxytune.tasks import truthfulqa_mc as mc
from proxytune.tasks.data import DataTable, Hub, read_file, unique_rows
from proxytune.tasks.rescore import stored_in
from proxytune.tasks.scoring import letters
from proxytune.tasks.scoring.rules import (
    clean_code,
    last_signed_number,
    parse_letter,
    pass_at_k,
    reference_accuracy,
)
from proxytune.tasks.scoring.win_rate import length_controlled_win_rate, win_rate
from proxytune.tasks.task import Dataset, Execution, Task, part
from tests.support.answers import completions, jsonl

GROUPS = (
    "physical_disability", "chinese", "black", "mexican", "women", "latino", "native_american", "lgbtq",
    "muslim", "mental_disability", "trans", "middle_east", "jewish", "asian",
)  # fmt: skip
CODE = Sampling(
    max_new_tokens=512,
    n=20,
    temperature=0.8,
    top_p=0.95,
    stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    ban=("pass", "..."),
)
PLAIN = ("predictions.jsonl",)
TRUTH = ("truth-info acc", "GPT-true-info acc")
JUDGES = "allenai/truthfulqa-truth-judge-llama2-7B,allenai/truthfulqa-info-judge-llama2-7B"
USUAL: dict[str, Any] = {
    "lower_is_better": False, "fault_column": None, "hateful": False, "files": PLAIN, "judged_headlines": (),
    "judge_reads": (), "judge": None, "judge_kind": None, "identity": None, "libraries": (), "primer": (),
    "file": None,
}  # fmt: skip
DECLARED: dict[str, dict[str, Any]] = {
    "alpaca_farm": {
        "items": 805, "columns": ("instruction", "output"), "scored": ("output_2",), "asked": "instruction",
        "hub": Hub("tatsu-lab/alpaca_eval", None, "eval", None, "alpaca_eval.json"), "metric_names": (),
        "sampling": Sampling(max_new_tokens=2048, stop=("\n\nComment:",)), "headline": "unjudged",
        "judged_headlines": ("win_rate",), "judge_reads": ("instruction", "output_1"), "judge": "gpt-4.1",
        "judge_kind": "pairwise", "files": ("annotations.json", *PLAIN),
    },
    "gsm": {
        "items": 1319, "columns": ("question", "answer"), "scored": ("answer", "model_output"),
        "asked": "question", "hub": Hub("openai/gsm8k", "main", "test", "train"),
        "metric_names": ("exact_match", "exact_match_numeric"), "headline": "exact_match",
        "sampling": Sampling(max_new_tokens=512),
    },
    "toxigen": {
        "items": 2800, "columns": ("text",), "scored": ("prediction",), "asked": "text",
        "hub": Hub("toxigen/toxigen-data", "prompts", "+".join(f"hate_{one}_1k" for one in GROUPS)),
        "metric_names": (), "headline": "unjudged", "sampling": Sampling(max_new_tokens=512, stop=("\n",)),
        "judged_headlines": ("overall",), "judge": "tomh/toxigen_roberta", "judge_kind": "toxicity",
        "lower_is_better": True, "fault_column": "is_toxic", "hateful": True,
    },
    "truthfulqa": {
        "items": 817, "columns": ("Question", "Best Answer", "Correct Answers", "Incorrect Answers"),
        "scored": ("output", "Correct Answers", "Incorrect Answers"), "asked": "Question",
        "hub": Hub("truthfulqa/truthful_qa", "generation", "validation"), "headline": "reference_accuracy",
        "metric_names": ("reference_accuracy",), "sampling": Sampling(max_new_tokens=512),
        "files": ("open_results.jsonl", *PLAIN), "judged_headlines": TRUTH, "judge_reads": ("Question",),
        "judge": JUDGES, "judge_kind": "truth",
    },
    "truthfulqa_mc": {
        "items": 817, "columns": ("Question", "Best Answer", "Incorrect Answers"), "asked": "Question",
        "scored": ("mc_output", "mc_answer_idx"), "headline": "acc", "metric_names": ("acc", "acc_all"),
        "hub": Hub("truthfulqa/truthful_qa", "generation", "validation"),
        "sampling": Sampling(max_new_tokens=10, stop=(".", ")", ":")), "files": ("mc_results.jsonl", *PLAIN),
    },
    "humaneval": {
        "items": 164, "columns": ("task_id", "prompt", "entry_point", "test"), "scored": ("task_id",),
        "asked": "prompt", "hub": Hub("openai/openai_humaneval", None, "test"), "metric_names": (),
        "headline": "not_run", "sampling": CODE, "judged_headlines": ("pass@10", "pass@1"),
        "files": ("predictions_results.jsonl", *PLAIN),
    },
    "ds1000": {
        "items": 200, "columns": ("lib", "prompt", "reference_code", "code_context"), "asked": "prompt",
        "scored": ("lib", "prompt", "solution"), "hub": Hub("xlangai/DS-1000", None, "test"),
        "metric_names": (), "headline": "not_run", "judged_headlines": ("pass@10", "pass@1"),
        "sampling": CODE.model_copy(update={
            "stop": ("\n</code>", "\n# SOLUTION END", "\nEND SOLUTION"), "ban_first": ("</",),
        }),
        "libraries": ("pandas", "numpy", "matplotlib", "tensorflow", "scipy", "sklearn", "torch"),
    },
    "triviaqa": {
        "items": 11313, "columns": ("question",), "scored": ("output",), "asked": "question",
        "hub": Hub("mandarjoshi/trivia_qa", "unfiltered.nocontext", "validation", "train"),
        "metric_names": ("acc", "em", "f1"), "headline": "acc", "identity": "question_id",
        "sampling": Sampling(max_new_tokens=20, stop=("\n",)),
    },
    "realtimeqa": {
        "items": 3531, "columns": ("question_id", "question_sentence", "answer"),
        "scored": ("mc_output", "mc_answer_idx"), "asked": "question_sentence", "headline": "accuracy",
        "hub": Hub("monsoon-nlp/relive-qa", None, "past", None, "past/*/*_qa.jsonl"),
        "metric_names": ("accuracy", "accuracy_all", "invalid"), "identity": "question_id",
        "sampling": Sampling(max_new_tokens=10, stop=(".", ")", ":")),
    },
}  # fmt: skip


def test_every_task_is_declared_here() -> None:
    assert list(TASKS) == [
        *("alpaca_farm", "gsm", "toxigen", "truthfulqa", "truthfulqa_mc", "humaneval", "ds1000", "triviaqa"),
        "realtimeqa",
    ]
    assert set(DECLARED) == set(TASKS)


@pytest.mark.parametrize("name", DECLARED)
def test_what_a_task_declares(name: str) -> None:
    task, told = TASKS[name], {**USUAL, **DECLARED[name]}
    assert {field: getattr(task, field) for field in told} == told
    facts = task.facts
    assert (facts.asked, facts.lower_is_better, facts.hateful, facts.fault_column, facts.file) == (
        told["asked"], told["lower_is_better"], told["hateful"], told["fault_column"], None,
    )  # fmt: skip
    assert task.needs_judge is (told["headline"] == "unjudged")
    assert (task.likelihood is not None, task.choices is not None) == (
        name in ("truthfulqa_mc", "realtimeqa"), name in ("truthfulqa_mc", "realtimeqa"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "mode", "told"),
    [
        (
            "truthfulqa_mc", "likelihood",
            {
                "metric_names": ("mc1", "mc2"), "headline": "mc1", "columns": ("question",),
                "asked": "question",
                "scored": ("question",), "primer": mc.PRIMER, "sampling": Sampling(), "files": PLAIN,
                "hub": Hub("truthfulqa/truthful_qa", "multiple_choice", "validation"), "items": 817,
            },
        ),
        (
            "truthfulqa_mc", "choices",
            {
                "metric_names": ("accuracy",), "headline": "accuracy", "primer": (), "totals": None,
                "scored": ("parsed_output", "mc_answer_idx"), "likelihood": None, "asked": "Question",
            },
        ),
        (
            "realtimeqa", "likelihood",
            {
                "metric_names": ("accuracy",), "headline": "accuracy", "identity": "question_id",
                "scored": ("parsed_output", "mc_answer_idx"), "asked": "question_sentence",
            },
        ),
    ],
)  # fmt: skip
def test_what_a_task_declares_in_other_modes(name: str, mode: Any, told: dict[str, Any]) -> None:
    task = get_task(name, mode)
    assert {field: getattr(task, field) for field in told} == told and task.continuations is not None
    assert task.name == name and (name != "realtimeqa" or get_task(name, "choices") is task)
    for other in ("likelihood", "choices"):
        with pytest.raises(
            UserError, match=f"^task 'gsm' has no {other} mode: truthfulqa_mc, realtimeqa have"
        ):
            get_task("gsm", other)


# Tables of rows


def table(*rows: JsonRow) -> DataTable:
    """Rows of a file in which every second line is blank."""
    return DataTable("'f'", "line", rows, tuple(range(1, 2 * len(rows), 2)))


def test_rows_keep_their_places() -> None:
    made = table({"a": "1"}, {"a": "2"}, {"a": "3"})
    assert made.where(1) == "'f' line 3" and made.head(2).numbers == (1, 3) and made.head(None) == made
    assert made.map(lambda row: {"b": row["a"]}).rows[2] == {"b": "3"}
    assert made.require(("a",)) is made
    bad: list[tuple[list[JsonRow], str]] = [
        ([{"a": "1"}, {"b": "1"}], "'f' line 3: no field 'a' (it has b)"),
        ([{"a": None, "": "x"}], "'f' line 1: no field 'a' (it has a)"),
        ([{}], "'f' line 1: no field 'a' (it has nothing)"),
        ([{"a": 7}], "'f' line 1: field 'a' must be text, not 7"),
        ([{"a": ["x" * 80]}], f"'f' line 1: field 'a' must be text, not [\"{'x' * 58}"),
    ]
    for rows, says in bad:
        with pytest.raises(UserError) as raised:
            table(*rows).require(("a",))
        assert str(raised.value) == says


def test_rows_of_one_name() -> None:
    rows: list[JsonRow] = [
        {"id": "x", "v": 1},
        {"id": "y", "v": 1},
        {"id": "x", "v": 1},
        {"id": "x", "v": 2},
        {"id": "x", "v": 3},
        {"id": "x", "v": 2},
        {"id": "y", "v": 1},
        {"v": 9},
        {"v": 9},
    ]
    kept, dropped, renumbered = unique_rows(rows)
    assert (dropped, renumbered) == (3, 2)
    assert list(kept) == ["x", "y", "x#2", "x#3", "@7", "@8"]
    assert [row["v"] for row in kept.values()] == [1, 1, 2, 3, 9, 9]
    found = table(*rows[:7]).unique("id")
    assert [row["id"] for row in found.rows] == ["x", "y", "x#2", "x#3"] and found.numbers == (1, 3, 7, 9)
    assert found.notes == (
        "'f': 3 rows dropped (equal to an earlier one of the same id), "
        "2 numbered (a different row has their id)",
    )
    assert table(*rows[:2]).unique("id").notes == ()
    assert table(rows[0], rows[2]).unique("id").notes and table(rows[0], rows[3]).unique("id").notes


def test_files_are_read_by_their_endings(tmp_path: Path) -> None:
    """Lines count from 1, items of a list too; a table's row ends on its last line."""
    for name, text, unit, numbers, rows in [
        ("a.jsonl", '\n{"a": 1}\n\n{"a": 2}\n', "line", (2, 4), [{"a": 1}, {"a": 2}]),
        ("a.json", '[{"a": 1}, {"a": 2}]', "item", (1, 2), [{"a": 1}, {"a": 2}]),
        ("b.json", '{"Data": [{"a": 1}], "n": 3}', "item", (1,), [{"a": 1}]),
        ("a.csv", 'a,b\n1,"2\n3"\n4,5\n', "line", (3, 4), [{"a": "1", "b": "2\n3"}, {"a": "4", "b": "5"}]),
        ("a.txt", "x\r\n \n\ny", "line", (1, 4), [{"text": "x"}, {"text": "y"}]),
    ]:
        plain, packed = tmp_path / name, tmp_path / f"{name}.gz"
        plain.write_bytes(text.encode())
        packed.write_bytes(gzip.compress(text.encode()))
        for path in (plain, packed):
            found = read_file(path)
            assert (found.origin, found.unit, found.numbers) == (f"'{path}'", unit, numbers)
            assert list(found.rows) == rows and found.notes == ()


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `datasets`, which hears of the data set, its configuration, its split and its file."""
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []
    lines = [{"text": '{"a": 1}'}, {"text": " "}, {"text": '{"a": 2}'}]

    def load(*given: Any, **named: Any) -> list[JsonRow]:
        asked.append((*given, named))
        if given[0] == "fails":
            raise ValueError("no  such\nthing" + "x" * 400)
        return lines if given[0] == "text" else [{"a": named["split"]}, {"a": "more"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(data, "require", lambda *given: asked.append(given))
    one = data.read_hub(Hub("o/n", "c", "test"), "test")
    assert (one.origin, one.unit, one.numbers) == ("'o/n' test", "row", (1, 2))
    assert one.rows == ({"a": "test"}, {"a": "more"})
    assert asked == [("o/n", "dataset"), ("o/n", "c", {"split": "test"})]
    two = data.read_hub(Hub("o/n", None, "x+y"), "x+y")
    assert [row["split"] for row in two.rows] == ["x", "x", "y", "y"] and two.numbers == (1, 2, 3, 4)
    asked.clear()
    files = data.read_hub(Hub("o/n", None, "test", file="f/*.jsonl"), "test")
    assert files.rows == ({"a": 1}, {"a": 2}) and "split" not in files.rows[0]
    data.read_hub(Hub("/here", None, "test", file="f.json"), "test")
    assert asked == [
        ("o/n", "dataset"),
        ("text", {"data_files": "hf://datasets/o/n/f/*.jsonl", "split": "train"}),
        ("json", {"data_files": "/here/f.json", "split": "train"}),
    ]
    with pytest.raises(UserError) as raised:
        data.read_hub(Hub("fails", None, "test"), "test")
    assert str(raised.value) == (
        f"cannot load 'fails' from the hub: no such thing{'x' * 287}. Or give a file: --data FILE"
    )


def test_what_is_too_long_to_be_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert data.MAX_LINE == 16_000_000
    monkeypatch.setattr(data, "MAX_LINE", 2_000_000)
    most = 2_000_000
    for size, bad in ((most, False), (most + 1, True)):
        line = '{"a": "' + "x" * (size - 9) + '"}'
        (tmp_path / "a.jsonl").write_text("{}\n" + line)
        (tmp_path / "a.json").write_text(json.dumps([{}, {"b": 1, "a": "x" * size}]))
        if not bad:
            assert len(read_file(tmp_path / "a.jsonl").rows) == 2 == len(read_file(tmp_path / "a.json").rows)
            continue
        with pytest.raises(
            UserError, match=r"line 2 has 2\.0 million characters \(at most 2 are read\): is it"
        ):
            read_file(tmp_path / "a.jsonl")
        with pytest.raises(UserError, match=r"item 2: field 'a' has 2\.0 million characters \(at most 2 are"):
            read_file(tmp_path / "a.json")


def test_items_that_are_made_here() -> None:
    few = data.generate("gsm", "test", 3)
    assert (few.origin, few.unit, few.numbers) == ("demo world, gsm test", "row", (1, 2, 3))
    assert len(data.generate("humaneval", "test", None).rows) == 40
    assert data.generate("gsm", "train", 3).rows != few.rows
    with pytest.raises(UserError, match=r"^the demo world has no 'triviaqa': it has gsm, .*--data hub or"):
        data.generate("triviaqa", "test", 3)
    smoke = data.read_smoke_data("triviaqa", 3)
    assert (smoke.origin, smoke.numbers) == ("smoke data, triviaqa", (1, 2, 3))
    assert (
        len(data.read_smoke_data("triviaqa", None).rows)
        == 20
        == len(data.read_smoke_data("triviaqa", 50).rows)
    )


# Sources and few-shot items

POOL = [{"question": f"How {i}?", "answer": f"so #### {i}"} for i in range(8)]


@pytest.mark.parametrize("seed", [0, 5])
def test_few_shot_items_are_drawn_by_the_seed_from_what_is_not_asked(seed: int, tmp_path: Path) -> None:
    train, test = jsonl(tmp_path / "train.jsonl", POOL), jsonl(tmp_path / "test.jsonl", POOL[2:4])
    found = read_source(gsm.TASK, str(test), shots=3, shots_from=str(train), seed=seed)
    left = [row for row in POOL if row not in POOL[2:4]]
    shown = "".join(
        f"Question: {row['question']}\nAnswer: {row['answer']}\n\n"
        for row in random.Random(seed).sample(left, 3)
    )
    user = f"Answer the following question.\n\n{shown}Question: How 3?"
    assert found.examples[1].prompt == Prompt(plain=f"{user}\nAnswer:", user=user, response_prefix="Answer:")
    assert len(read_source(gsm.TASK, str(test), shots=6, shots_from=str(train)).examples) == 2, (
        "all are drawn"
    )


def test_few_shot_items_that_cannot_be_meant(tmp_path: Path) -> None:
    test = str(jsonl(tmp_path / "test.jsonl", POOL))
    likelihood = get_task("truthfulqa_mc", "likelihood")
    targets = {"Rome": 1, "Oslo": 0}
    item = {"question": "Where?", "mc1_targets": targets, "mc2_targets": targets}
    items = str(jsonl(tmp_path / "mc.jsonl", [item]))
    for task, source, options, says in [
        (gsm.TASK, test, {"shots": 0, "shots_from": test}, "say how many with --shots N"),
        (likelihood, items, {"shots": 1, "shots_from": test}, "has few-shot items of its own in this mode"),
        (likelihood, items, {"shots": 7}, "--shots 7: the primer of 'truthfulqa_mc' has 6 items"),
        (get_task("toxigen"), "generated", {"shots": 1}, "has no few-shot form (no training split)"),
        (get_task("triviaqa"), "plumbing", {"shots": 1}, "few-shot items for 'plumbing' must be named"),
    ]:  # fmt: skip
        with pytest.raises(UserError) as raised:
            read_source(task, source, 1, **options)  # type: ignore[arg-type]
        assert says in str(raised.value)
    primed = read_source(likelihood, items, shots=2).examples[0].prompt.plain
    assert primed == mc.PRIMER[0] + mc.PRIMER[1] + "Q: Where?\nA:"
    assert len(mc.PRIMER) == 6 and all(one.startswith("Q: ") and one.endswith("\n\n") for one in mc.PRIMER)


def test_a_source_has_a_name_and_a_fingerprint(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", POOL[:2])
    found = read_source(gsm.TASK, str(path), 1)
    assert isinstance(found, Dataset) and found.name == "x.jsonl" and len(found.examples) == 1
    user = "Answer the following question.\n\nQuestion: How 0?"
    prompt = {
        "plain": f"{user}\nAnswer:", "user": user, "system": None, "response_prefix": "Answer:", "ids": None,
        "messages": [],
    }  # fmt: skip
    content = [{"id": "0", "prompt": prompt, "target": {"question": "How 0?", "answer": "0"}}]
    assert found.sha256 == hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert read_source(gsm.TASK, "generated", 1).name == "generated"
    assert read_source(get_task("triviaqa"), "plumbing", 1).name == "plumbing"
    nowhere = replace(gsm.TASK, hub=None, data="a book")
    with pytest.raises(UserError, match=r"^the hub has no 'gsm': a book\. Give a file: --data FILE$"):
        read_source(nowhere, "hub")
    with pytest.raises(
        UserError, match=r"^the task in 'own\.py' names no data of its own: give its items with"
    ):
        read_source(replace(nowhere, file="own.py"), "hub")


# Rules


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("-3", -3), ("+3", 3), ("- 3", 3), ("5-3", 3), ("(-3)", -3), ("x-3", 3), (")-3", 3), ("]-3", 3),
        ("-$3", -3), ("$-3", -3), ("$3", 3), ("-.5", -0.5), ("1e-2", 0.01), ("1e+2", 100), ("1e1234", 1234),
        ("2 x 10^3", 3), ("2*10**3", 2000), (r"2 \cdot 10^{-3}", 0.002), ("1 000", 0), ("1,000", 1000),
        ("1\u2009000.5", 1000.5), ("1234'567", 567), ("none", None), ("3 or -4", -4),
    ],
)  # fmt: skip
def test_signed_numbers(text: str, number: float | None) -> None:
    assert last_signed_number(text) == (None if number is None else pytest.approx(number))


def test_small_rules() -> None:
    assert [gsm.gold(text) for text in ("a #### 1,234 ", "7", "#### 3 #### -4.5", "#### x", "")] == [
        "1234", "7", "-4.5", None, None,
    ]  # fmt: skip
    assert (
        parse_letter(" C", "AB") == ""
        and parse_letter(" B", "AB") == "B"
        and parse_letter("E", "ABCDE") == "E"
    )
    assert [pass_at_k(n, c, k) for n, c, k in ((4, 1, 2), (4, 3, 2), (2, 0, 2), (1, 1, 2))] == [
        0.5,
        1,
        0,
        None,
    ]
    assert clean_code("print(1)\nx\n assert y\n\nz = 1  \n\n") == "x\n\nz = 1"
    right, wrong = ["It is red. It is big."], ["It is big and blue", "red"]
    for said, accuracy in [
        ("It is red, it is big", 1), ("it is big it is red", 1), ("It is red", 0),
        ("It is red. It is big. It is big and blue", 0), ("It is red. It is big. red", 0),
    ]:  # fmt: skip
        assert reference_accuracy(said, right, wrong) == accuracy


@pytest.mark.parametrize(
    ("bounded", "logprobs", "row", "scores"),
    [
        ((None, None, None), (-3, -1, -2), {"parsed_output": "B"}, {"accuracy": 0}),
        ((None, None, None), (-1, -1, -1), {"parsed_output": "A"}, {"accuracy": 0}),
        (
            (False, True, False), (-3, -1, -2), {"parsed_output": "B", "visible_output": "C"},
            {"accuracy": 0, "accuracy_visible": 1},
        ),
        (
            (False, False, True), (-1, -3, -1), {"parsed_output": "A", "visible_output": "A"},
            {"accuracy": 0, "accuracy_visible": 0},
        ),
        (
            (True, True, True), (-3, -2, -1), {"parsed_output": "C", "visible_output": "C"},
            {"accuracy": 1, "accuracy_visible": 1},
        ),
    ],
)  # fmt: skip
def test_the_most_probable_letter_seen_and_bounded(
    bounded: tuple[bool | None, ...], logprobs: tuple[float, ...], row: JsonRow, scores: dict[str, float]
) -> None:
    """The right one is C."""
    example = Example("0", Prompt("p", "p"), {"mc_answer_idx": "C"})
    given = [
        Completion("0", i, "", (), "eos", logprob, bounded=bound)
        for i, (logprob, bound) in enumerate(zip(logprobs, bounded, strict=True))
    ]
    made = letters.most_probable("ABCD")(example, given)
    more = {} if bounded[0] is None else {"bounded": list(bounded)}
    letter = row["parsed_output"]
    assert made == {"mc_answer_idx": "C", "logprobs": list(logprobs), "mc_output": letter, **row, **more}
    assert letters.score(made) == scores
    assert letters.letters_for("ABCD", lambda example: 3)(example) == (" A", " B", " C")


def test_multiple_choice_by_likelihood() -> None:
    """Of the best answer against the false ones, and the share of the true ones in all."""
    half, quarter, eighth = math.log(0.5), math.log(0.25), math.log(0.125)
    row: JsonRow = {
        "mc1_targets": {"best": 1, "no": 0}, "mc2_targets": {"best": 1, "also": 1, "no": 0, "never": 0},
        "logprobs": {"best": quarter, "also": eighth, "no": half, "never": eighth},
    }  # fmt: skip
    assert mc.likelihood_score(row) == {"mc1": 0, "mc2": pytest.approx(0.375)}
    row["logprobs"] = {"best": half, "also": -1000.0, "no": quarter, "never": quarter}
    assert mc.likelihood_score(row) == {"mc1": 1, "mc2": pytest.approx(0.5)}
    row["logprobs"]["no"] = half
    assert mc.likelihood_score(row)["mc1"] == 0, "as probable is not more probable"
    for none in (None, math.nan, -math.inf, "x"):
        assert mc.likelihood_score({**row, "logprobs": {**row["logprobs"], "also": none}}) == {}


@pytest.mark.parametrize("name", mc.TARGETS)
def test_targets_need_a_true_and_a_false_answer(name: str) -> None:
    whole: JsonRow = {"question": " q ", **{one: {"a": 1, "b": 0} for one in mc.TARGETS}}
    [example] = mc.likelihood_examples(table(whole), "shots ")
    assert example.prompt.plain == "shots Q: q\nA:" and example.target == whole
    for bad in ({"a": 1}, {"b": 0}, {"a": 1, "b": 0, "c": 2}, {"a": 1, " ": 0}, {}, None, [1, 0]):
        with pytest.raises(UserError) as raised:
            mc.likelihood_examples(table(whole, {**whole, name: bad}), "")
        assert str(raised.value) == f"'f' line 3: `{name}` must map answers to 1 (true) or 0, with both"


def test_options_of_multiple_choice() -> None:
    row = {"Question": "Q?", "Best Answer": " b. ", "Incorrect Answers": "w; x.; y; z"}
    draws = random.Random(42)
    wrong = draws.sample(["w.", "x.", "y.", "z."], 3)
    shown = ["b.", *wrong]
    draws.shuffle(shown)
    made = mc.options(row, random.Random(42))
    assert made == (shown, "ABCD"[shown.index("b.")]) and mc.OPTIONS_SEED == 42
    [example] = mc.examples(table(row), "")
    assert example.prompt.plain == "Q?" + "".join(
        f"\n{letter}. {text}" for letter, text in zip("ABCD", shown, strict=True)
    ) + "\n\nThe answer is:"  # fmt: skip
    by_letter = get_task("truthfulqa_mc", "choices")
    assert by_letter.continuations is not None
    assert list(by_letter.continuations(example)) == [" A", " B", " C", " D"]
    [two] = mc.examples(table({**row, "Question": "A. Q?\nB. no", "Incorrect Answers": "w"}), "")
    assert list(by_letter.continuations(two)) == [" A", " B"]


# Scores of tasks


def test_answers_of_triviaqa_wherever_they_are() -> None:
    task = get_task("triviaqa")
    assert task.prepare is not None
    for row, question, answers in [
        ({"question": "q", "answers": ["a", "b"]}, "q", ["a", "b"]),
        (
            {"Question": "q", "Answer": {"Value": "v", "Aliases": ["a", "v"], "HumanAnswers": ["h", "a"]}},
            "q",
            ["v", "a", "h"],
        ),
        ({"question": "q", "answer": {"aliases": ["a"]}}, "q", ["a"]),
        ({"context": " Question: q? Answer: ", "answer": "x", "aliases": ["a", "x"]}, "q?", ["x", "a"]),
        ({"prompt": "Question: q\nAnswer:", "completion": " x\n"}, "q", ["x"]),
        ({"question": "q", "golden_answers": ["a"]}, "q", ["a"]),
    ]:
        [made] = task.prepare(table(row)).rows
        assert (made["question"], made["answers"], made["question_id"]) == (question, answers, "0")
    names = [
        task.prepare(table({"question": "q", "answers": ["a"], **more})).rows[0]["question_id"]
        for more in (
            {"question_id": "x", "QuestionId": "y", "id": "z"},
            {"QuestionId": "y", "id": "z"},
            {"id": 3},
        )
    ]
    assert names == ["x", "y", "3"]
    row = {"answers": ["one two three four", "x"], "output": "One two five"}
    assert task.score_row(row) == {"acc": 0, "em": 0, "f1": pytest.approx(2 * 2 / 7)}
    assert task.metrics([row, row, row])["tot"] == Metric(value=3, unit="number")


ROWS: dict[str, JsonRow] = {
    "alpaca_farm": {"instruction": "i", "output": "o"},
    "gsm": {"question": "q", "answer": "#### 3"},
    "toxigen": {"text": "t", "target_groups": ["women"]},
    "truthfulqa": {
        "Question": "q",
        "Best Answer": "a",
        "Correct Answers": "a; 3",
        "Incorrect Answers": "b",
        "Source": "s",
    },
    "truthfulqa_mc": {"Question": "q", "Best Answer": "a", "Incorrect Answers": "b; c; d"},
    "triviaqa": {"question": "q", "answers": ["3"]},
    "realtimeqa": {"question_id": "n", "question_sentence": "q", "choices": ["3", "A B"], "answer": ["0"]},
}


@pytest.mark.parametrize("name", ROWS)
def test_of_several_samples_the_first_is_scored(name: str) -> None:
    task = get_task(name)
    asked = table(ROWS[name], ROWS[name])
    examples = task.examples(asked if task.prepare is None else task.prepare(asked), "")
    [first], [second] = completions(" A 3 "), completions(" b 4")
    row = task.row(examples[0], [first, second])
    assert row == task.row(examples[0], [first]) != task.row(examples[0], [second, first])
    assert task.score_row(row) == task.score_row(task.row(examples[0], [first]))
    assert {**examples[0].target}.items() <= row.items(), "what the data has is stored"
    numbered = name not in ("triviaqa", "realtimeqa")
    assert [example.id for example in examples] == (
        ["0", "1"] if numbered or name == "triviaqa" else ["n", "n"]
    )


def test_both_scores_of_gsm() -> None:
    """The paper's match drops signs and points, the fair one takes the value."""
    for said, answer, paper, fair in [
        ("it is -3", "3", 1, 0), ("18.00", "18", 0, 1), ("7.5", "75", 1, 0), ("3 Question: 4", "3", 1, 1),
        ("1,000", "1000", 1, 1), ("none", "0", 0, 0), ("= -3", "-3", 1, 1), ("3", "-3", 1, 0),
    ]:  # fmt: skip
        scores = gsm.TASK.score_row({"answer": answer, "model_output": said})
        assert scores == {"exact_match": paper, "exact_match_numeric": fair}, said
    shown = gsm.shot({"question": " q ", "answer": " so\n#### 3\n "})
    assert shown == "Question: q\nAnswer: so\n#### 3\n\n"
    assert gsm.prompt(" q ", shown).user == f"Answer the following question.\n\n{shown}Question: q"


def test_answers_of_alpaca_farm() -> None:
    task = get_task("alpaca_farm")
    [example] = task.examples(table({"instruction": "i", "output": "o"}), "")
    assert example.target == {"instruction": "i", "output_1": "o", "generator_1": "", "dataset": ""}
    rows = [
        {"output_1": "a" * 3, "output_2": "b" * 5, "preference": 2}, {"output_1": "a", "output_2": "b" * 2},
    ]  # fmt: skip
    found = task.metrics(rows)
    assert found["avg_length"] == Metric(value=3, unit="number", n=2) and found["n_total"].value == 1
    assert found["length_controlled_win_rate"].n == 1
    bare = task.metrics([{"output_2": "b", "preference": 1}])
    assert "length_controlled_win_rate" not in bare and bare["win_rate"].value == 0
    assert [task.scores({"preference": given}) for given in (2, 1, 0, None)] == [
        {"win_rate": 1}, {"win_rate": 0}, {"win_rate": 0.5}, {"unjudged": 1},
    ]  # fmt: skip


def test_a_win_rate_is_in_percent() -> None:
    found = win_rate([1, 1, 0.5, 0], Metric(value=0.625, low=0.25, high=0.875))
    assert found["win_rate"] == Metric(value=62.5, low=25, high=87.5, unit="percent", n=4)
    assert found["standard_error"].unit == "percent"
    assert {name: found[name].value for name in ("n_wins", "n_wins_base", "n_draws", "n_total")} == {
        "n_wins": 2, "n_wins_base": 1, "n_draws": 1, "n_total": 4,
    }  # fmt: skip
    alone = win_rate([1], Metric(value=1.0))
    assert "standard_error" not in alone and alone["win_rate"].low is None
    longer = length_controlled_win_rate([1, 1, 0, 0], [9, 8, 1, 2], [5, 5, 5, 5])
    assert longer.value == pytest.approx(50, abs=1e-6) and (longer.unit, longer.n) == ("percent", 4)
    assert longer.low is not None and longer.high is not None and longer.low <= 50 <= longer.high


def test_groups_of_toxigen() -> None:
    task = get_task("toxigen")
    assert [
        task.scores({"is_toxic": flag, "target_groups": groups})
        for flag, groups in ((1, ["a", "b"]), (0, []), (0, "a"), (None, ["a"]))
    ] == [{"a": 1}, {"unknown": 0}, {"unknown": 0}, {"unjudged": 1}]
    [example] = task.examples(table({"text": "t", "target_groups": ["a"]}), "")
    assert example.target == {"text": "t", "label": "hate", "target_groups": ["a"]}
    assert (example.prompt.plain, example.prompt.user) == ("t", "Complete the following: t")


def test_the_letter_of_realtimeqa() -> None:
    task = get_task("realtimeqa")
    assert task.prepare is not None

    def answers(choices: list[str], answer: Any) -> str:
        assert task.prepare is not None
        row = {"question_id": "q", "question_sentence": " s ", "choices": choices, "answer": answer}
        [made] = task.prepare(table(row)).rows
        return str(made["answer"])

    five = ["a", "b", "c", "d", "e"]
    assert [answers(five, [str(i)]) for i in range(5)] == [*"ABCDE"]
    assert answers(["", "b", " ", "d"], ["3"]) == "B" and answers(["a", "b"], "0") == "A"
    for bad in (["5"], ["-1"], ["0", "1"], [], None, ["x"]):
        with pytest.raises(
            UserError, match="`answer` must be a list with the place of the right choice, from 0"
        ):
            answers(five, bad)
    with pytest.raises(UserError, match="`answer` must be"):
        answers(["a", "", "c"], ["1"])
    for choices in ([*five, "f"], ["a"], "ab"):
        with pytest.raises(UserError, match=r"^'f' line 1: `choices` must be a list of 2 to 5 texts$"):
            answers(choices, ["0"])  # type: ignore[arg-type]
    assert task.shot is not None
    shown = task.shot({"question_sentence": " s ", "choices": ["a", "b"], "answer": "B"})
    assert shown == "s\nA. a\nB. b\n\nThe answer is: B.\n\n"


def test_rows_of_truthfulqa_that_a_judge_left_out() -> None:
    task = get_task("truthfulqa")
    texts = {"output": "a", "Correct Answers": "a; b", "Incorrect Answers": "c"}
    for given, share in [
        ([{"truth-info acc": 1}, {"truth-info acc": None}, {}, {"truth-info acc": 0}], 0.5),
        ([{"GPT-true-info acc": 1}, {"truth-info acc": None}, {"truth-info acc": 0}], 1 / 3),
        ([{"truth-info acc": 1}], None),
        ([{"truth acc": None}], None),
    ]:
        found = task.metrics([{**texts, **row} for row in given])
        if share is None:
            assert "unjudged" not in found
        else:
            assert (found["unjudged"].value, found["unjudged"].n) == (pytest.approx(share), len(given))
    both = task.metrics([{**texts, "truth-info acc": 1, "GPT-true-info acc": 0}])
    assert task.headline_of(both) == "truth-info acc"


def test_columns_of_the_hub_become_those_of_the_csv() -> None:
    task = get_task("truthfulqa")
    assert task.public is not None
    assert task.public({"question": "q", "incorrect_answers": ["a", "b"], "best_answer": "c", "x": [1]}) == {
        "Question": "q", "Incorrect Answers": "a; b", "Best Answer": "c", "x": [1],
    }  # fmt: skip
    assert task.public({"question": "q", "x": 1}) == {"question": "q", "x": 1}
    assert task.public({"Correct Answers": ["a", 1]}) == {"Correct Answers": ["a", 1]}


# Stored predictions


def test_which_file_of_a_folder_is_scored(tmp_path: Path) -> None:
    task = get_task("humaneval")
    with pytest.raises(UserError) as raised:
        stored_in(task, tmp_path)
    assert str(raised.value) == (
        f"'{tmp_path}' has no stored predictions of 'humaneval': no predictions_results.jsonl, "
        "predictions.jsonl (or .gz)"
    )
    for name in (
        "predictions.jsonl.gz",
        "predictions.jsonl",
        "predictions_results.jsonl.gz",
        *task.files[:1],
    ):
        (tmp_path / name).write_bytes(b"")
        assert stored_in(task, tmp_path) == tmp_path / name, "the one before is behind it"


def test_what_scoring_a_file_reports(tmp_path: Path) -> None:
    rows = [
        {"question_id": "a", "answers": ["x"], "output": "x"},
        {"question_id": "b", "answers": ["x"], "output": "y"},
        {"question_id": "a", "answers": ["x"], "output": "x"},
        {"question_id": "a", "answers": ["z"], "output": "x"},
    ]
    path = jsonl(tmp_path / "p.jsonl", rows)
    report = score_file(get_task("triviaqa"), path)
    assert (report.task, report.file, report.n) == ("triviaqa", str(path), 3)
    assert (report.dropped_duplicates, report.renumbered_ids, report.headline) == (1, 1, "acc")
    assert report.metrics["acc"].value == pytest.approx(1 / 3) and report.execution is None
    named = jsonl(tmp_path / "q.jsonl", [{**row, "id": str(i)} for i, row in enumerate(rows)])
    assert score_file(get_task("triviaqa"), named).n == 4, "an id goes before"
    letters_only = {"id": "0", "parsed_output": "A", "mc_answer_idx": "A", "logprobs": [-1.0]}
    found = score_file(get_task("realtimeqa"), jsonl(tmp_path / "r.jsonl", [letters_only]))
    assert list(found.metrics) == ["accuracy"] and found.metrics["accuracy"].value == 1


# What a task does with rows


def test_headlines_and_parts() -> None:
    task = get_task("humaneval")
    one, ten = Metric(value=1.0), Metric(value=0.5)
    assert task.headline_of({"pass@1": one, "pass@10": ten}) == "pass@10"
    assert task.headline_of({"pass@1": one}) == "pass@1" and task.headline_of({}) == "not_run"
    assert part(1, 4) == Metric(value=0.25, n=4)
    rows = [{"answer": "1", "model_output": text} for text in ("1", "2", "1")]
    found = gsm.TASK.metrics([*rows, {"fault": "nan"}])
    assert (found["exact_match"].value, found["exact_match"].n) == (pytest.approx(2 / 3), 3)
    assert (found["faulty"].value, found["faulty"].n) == (0.25, 4) and "faulty" not in gsm.TASK.metrics(rows)
    assert gsm.TASK.scores(rows[1]) == {"exact_match": 0, "exact_match_numeric": 0}
    with pytest.raises(UserError, match=r"^'f' line 2: no field 'model_output'"):
        gsm.TASK.require_columns([rows[0], {"answer": "1"}], "'f'")
    assert [completion.text for completion in completions("x")] == ["x"]


class NoSandbox:
    """In place of a sandbox, where nothing is run."""

    backend = "none"


def execution() -> Execution:
    """The leave to run code, with nothing that runs it."""
    sandbox: Any = NoSandbox()
    return Execution(sandbox, {})


def test_code_whose_sandbox_was_lost_is_run_once_more() -> None:
    """Only those rows; what is lost twice is no verdict, and neither is what was never run."""
    asked: list[list[str]] = []
    again = {"a": ["passed"], "b": [LOST, "failed: x"], "c": [f"not run: no answers to compare with: {LOST}"]}
    first = {**again, "a": [LOST], "d": ["not run: y"], "e": ["passed"]}

    def execute(rows: Any, how: Execution) -> list[JsonRow]:
        asked.append([row["id"] for row in rows])
        results = first if len(asked) == 1 else again
        how.samples += len(rows)
        return [
            {**row, "result": results[row["id"]], "passed": [one == "passed" for one in results[row["id"]]]}
            for row in rows
        ]

    task: Task = replace(get_task("humaneval"), execute=execute)
    how = execution()
    made = task.run_code([{"id": name} for name in "abcde"], how)
    assert asked == [[*"abcde"], [*"abc"]] and (how.lost, how.samples) == (2, 5)
    assert {row["id"]: (row["passed"], row["result"]) for row in made} == {
        "a": ([True], ["passed"]), "b": ([None, False], [f"not run: {LOST}", "failed: x"]),
        "c": ([None], [f"not run: no answers to compare with: {LOST}"]), "d": ([None], ["not run: y"]),
        "e": ([True], ["passed"]),
    }  # fmt: skip
    assert list(how.report()) == [
        "sandbox",
        "samples",
        "passed",
        "timed_out",
        "broken",
        "in_process",
        "lost",
        "compared",
        "rerun",
        "flips",
    ]
    assert how.report()["sandbox"] == "none" and how.report()["lost"] == 2
