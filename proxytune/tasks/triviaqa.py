"""TriviaQA without context: trivia questions, exact match with one of the answers' spellings. Joshi et al.
2017; the paper's section 4.3.

`acc` is the paper's rule: the response, stripped and lower-cased, equals an answer treated the same way. `em`
and `f1` are the benchmark's own (its evaluation script's normalisation), which do not punish an article or a
full stop.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from proxytune.config import Sampling
from proxytune.errors import UserError
from proxytune.records import Completion, Example, JsonRow, Metric, Prompt
from proxytune.tasks.data import DataTable, Hub
from proxytune.tasks.task import Task

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "\u2018\u2019\u00b4`", " "))


# Reading


def prepare(table: DataTable) -> DataTable:
    """Any published form -> `question`, `answers` and `question_id`.

    The paper's dev.jsonl (`question`, `answers`), its training file (`prompt`, `completion`), the original
    JSON and the hub (an `answer` object), FlashRAG's (`golden_answers`), llm-foundry's (`context`,
    `aliases`).
    """
    rows = []
    for index, row in enumerate(table.rows):
        answers = [answer for answer in _answers(row) if answer != "" and not str(answer).isspace()]
        question = _question(row)
        if question is None or not answers or not all(isinstance(answer, str) for answer in answers):
            has = ", ".join(row) or "nothing"
            raise UserError(f"{table.where(index)}: no question with a list of answers (it has {has})")
        name = row.get("question_id") or row.get("QuestionId") or row.get("id") or str(index)
        rows.append({"question": question, "answers": answers, "question_id": str(name)})
    return DataTable(table.origin, table.unit, tuple(rows), table.numbers, table.notes)


def _question(row: JsonRow) -> str | None:
    """The question of a row, without the prompt's words around it."""
    for name in ("question", "Question"):
        if isinstance(row.get(name), str):
            return str(row[name])
    shown = row.get("context") or row.get("prompt")
    if not isinstance(shown, str):
        return None
    return shown.strip().removeprefix("Question:").removesuffix("Answer:").strip()


def _answers(row: JsonRow) -> list[Any]:
    """The accepted spellings of a row, the usual one first where the row has it."""
    given = row.get("answer") or row.get("Answer")
    if isinstance(given, Mapping):
        found = given.get("aliases") or given.get("Aliases") or []
        human = given.get("HumanAnswers") or []
        value = given.get("value") or given.get("Value")
        return list(dict.fromkeys([*([value] if value else []), *found, *human]))
    if isinstance(row.get("completion"), str):
        return [row["completion"].strip()]
    listed = row.get("answers") or row.get("golden_answers") or row.get("aliases")
    if not isinstance(listed, list):
        return []
    return list(dict.fromkeys([given, *listed])) if isinstance(given, str) else listed


# Prompts and rows


def prompt(question: str, shots: str = "") -> Prompt:
    """The paper's prompt. It has no chat form: a chat model gets the same text as its user's message."""
    text = f"{shots}Question: {question}\nAnswer:"
    return Prompt(plain=text, user=text)


def shot(row: JsonRow) -> str:
    """An item with its first answer as a few-shot example."""
    return f"Question: {row['question']}\nAnswer: {row['answers'][0]}\n\n"


def examples(table: DataTable, shots: str) -> list[Example]:
    """Rows -> examples, known by the benchmark's ids."""
    return [
        Example(id=row["question_id"], prompt=prompt(row["question"], shots), target=dict(row))
        for row in table.rows
    ]


def stored(example: Example, completions: Sequence[Completion]) -> JsonRow:
    """The row that the paper's code stores: the response before the first line break, and whether it is
    right."""
    row = {**example.target, "output": completions[0].text.split("\n")[0].strip()}
    return {**row, "correct": bool(score(row)["acc"])}


def named_output(table: DataTable) -> DataTable:
    """Rows that have the response under `prediction`, as other tasks do, have it under `output`."""

    def changed(row: JsonRow) -> JsonRow:
        return {**row, "output": row["prediction"]} if "prediction" in row and "output" not in row else row

    return table.map(changed)


# Scores


def normalise_answer(text: str) -> str:
    """The benchmark's normalisation: lower case, punctuation to spaces, no articles, single spaces."""
    text = text.replace("_", " ").lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def f1(prediction: str, answer: str) -> float:
    """Overlap of the words of two normalised texts."""
    predicted, expected = prediction.split(), answer.split()
    same = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * same / (len(predicted) + len(expected)) if same else 0.0


def score(row: JsonRow) -> dict[str, float]:
    """The paper's accuracy, and the benchmark's exact match and F1."""
    answers = row.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
        raise UserError("a TriviaQA row needs `answers`, a list of texts")
    output = row["output"].strip()
    plain, asked = normalise_answer(output), [normalise_answer(str(answer)) for answer in answers]
    return {
        "acc": float(output.lower() in {str(answer).strip().lower() for answer in answers}),
        "em": float(plain in asked),
        "f1": max(f1(plain, answer) for answer in asked),
    }


TASK = Task(
    name="triviaqa",
    summary="TriviaQA without context: the response is one of the accepted answers",
    data="mandarjoshi/trivia_qa, unfiltered.nocontext, validation, or the original JSON",
    licence="unknown",
    items=11313,
    hub=Hub("mandarjoshi/trivia_qa", "unfiltered.nocontext", split="validation", train="train"),
    formats={
        "hub, or unfiltered-web-dev.json": {
            "question": "the question",
            "answer": "{value: the usual spelling, aliases: all spellings}",
            "question_id": "its name (optional)",
        },
        "dev.jsonl of the paper": {
            "question": "the question",
            "answers": "a list of spellings (golden_answers and aliases too)",
        },
        "train.jsonl of the paper": {
            "prompt": "the question between Question: and Answer:",
            "completion": "the answer",
        },
    },
    columns=("question",),
    sampling=Sampling(max_new_tokens=20, stop=("\n",)),
    prepare=prepare,
    identity="question_id",
    examples=examples,
    row=stored,
    gather=named_output,
    scored=("output",),
    asked="question",
    score_row=score,
    totals=lambda rows: {"tot": Metric(value=len(rows), unit="number")},
    metric_names=("acc", "em", "f1"),
    headline="acc",
    shot=shot,
)
