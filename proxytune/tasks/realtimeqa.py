"""RealTime QA: weekly news-quiz questions, nearly all with four choices. Kasai et al. 2023; paper, section 7.

Rows are those of github.com/realtimeqa/realtimeqa_public (`past/<year>/<date>_qa.jsonl`). The paper published
neither its prompt nor its code for this task, so the prompt is the one of its other multiple-choice task.
It compared the probabilities of the letters A to D: `--mode likelihood` does that with whole models. The
default mode reads a greedy response: the letter of a choice, or its text (scoring/choices.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from proxytune.config import Sampling
from proxytune.errors import UserError
from proxytune.records import Completion, Example, JsonRow, Prompt
from proxytune.tasks.data import DataTable, Hub
from proxytune.tasks.scoring import letters
from proxytune.tasks.scoring.choices import STOPS, read_choice
from proxytune.tasks.task import Task
from proxytune.tasks.truthfulqa_mc import PREFIX

LETTERS = "ABCDE"


def prepare(table: DataTable) -> DataTable:
    """Published rows with `choices` cleaned of blank ones and `answer` a letter.

    Rows with fewer than two choices (upstream has one in 2020) are dropped with a count.
    """
    kept = [(number, row) for number, row in zip(table.numbers, table.rows, strict=True) if _choices(row)]
    dropped = len(table.rows) - len(kept)
    if not kept:
        raise UserError(f"{table.where(0)}: `choices` must be a list of 2 to 5 texts")
    numbers, rows = zip(*kept, strict=True)
    table = replace(table, numbers=numbers, rows=rows)
    if dropped:
        note = f"{table.origin}: {dropped} rows dropped (fewer than two choices that are not blank)"
        table = replace(table, notes=(*table.notes, note))
    letters = iter([_letter(table, index) for index in range(len(table.rows))])
    return table.map(lambda row: {**row, "choices": _choices(row), "answer": next(letters)})


def _choices(row: JsonRow) -> list[str]:
    """The choices that are not blank; empty if the row cannot be asked."""
    given = row.get("choices")
    found = [c for c in given if isinstance(c, str) and c.strip()] if isinstance(given, list) else []
    return found if 2 <= len(found) <= len(LETTERS) else []


def _letter(table: DataTable, index: int) -> str:
    """The letter of the right choice among those that are not blank."""
    row = table.rows[index]
    given, choices = row.get("answer"), row["choices"]
    place = str(given[0] if isinstance(given, list) and len(given) == 1 else given)  # one row has a bare "1"
    if place not in map(str, range(len(choices))) or not choices[int(place)].strip():
        raise UserError(
            f"{table.where(index)}: `answer` must be a list with the place of the right choice, from 0 (the "
            "files of the current week have no answers yet)"
        )
    return LETTERS[sum(bool(c.strip()) for c in choices[: int(place)])]


def shown(row: JsonRow) -> str:
    """The question with its lettered choices."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False)]
    return "\n".join([row["question_sentence"].strip(), *lines])


def prompt(user: str, shots: str = "") -> Prompt:
    """The question and its choices; no system prompt."""
    return Prompt(plain=f"{shots}{user}\n\n{PREFIX}", user=shots + user, response_prefix=PREFIX)


def shot(row: JsonRow) -> str:
    """An item with the letter of its answer as a few-shot example."""
    return f"{shown(row)}\n\n{PREFIX} {row['answer']}.\n\n"


def examples(table: DataTable, shots: str) -> list[Example]:
    """Rows -> examples, known by their question ids."""
    made = []
    for row in table.rows:
        target = {
            "question_id": row["question_id"],
            "question_date": row.get("question_date", ""),
            "question_sentence": row["question_sentence"],
            "choices": row["choices"],
            "mc_answer_idx": row["answer"],
        }
        made.append(Example(id=row["question_id"], prompt=prompt(shown(row), shots), target=target))
    return made


def stored(example: Example, completions: Sequence[Completion]) -> JsonRow:
    """The response and the letter of the choice that it names."""
    output = completions[0].text
    return {**example.target, "mc_output": output, "parsed_output": _named(output, example.target)}


def score(row: JsonRow) -> dict[str, float]:
    """As for TruthfulQA's multiple choice: `accuracy` over valid responses, `accuracy_all` over all."""
    letter = _named(row["mc_output"], row)
    right = float(letter == row["mc_answer_idx"])
    return {**({"accuracy": right} if letter else {}), "accuracy_all": right, "invalid": float(not letter)}


def _named(output: str, row: JsonRow) -> str:
    """The letter of the choice that a response names, or ""; UserError where the row has no choices."""
    choices = _choices(row)
    if not choices:
        raise UserError(f"`choices` must be a list of 2 to {len(LETTERS)} texts: a response is read by them")
    return read_choice(output, LETTERS, choices)


TASK = Task(
    name="realtimeqa",
    summary="RealTime QA news quizzes: the right choice, by letter or text",
    data="past/ of github.com/realtimeqa/realtimeqa_public (about 25 questions a week), or its copy up to "
    "January 2024 in monsoon-nlp/relive-qa",
    licence="none given",
    items=3531,
    hub=Hub("monsoon-nlp/relive-qa", None, split="past", file="past/*/*_qa.jsonl"),
    formats={
        "past/**/*_qa.jsonl, hub": {
            "question_id": "the name of the question",
            "question_sentence": "the question",
            "choices": "a list of 2 to 5 choices",
            "answer": "a list with the place of the right one, from 0, as a text",
            "question_date": "when it was asked (optional)",
        },
    },
    columns=("question_id", "question_sentence", "answer"),
    prepare=prepare,
    sampling=Sampling(max_new_tokens=10, stop=tuple(STOPS)),
    identity="question_id",
    examples=examples,
    row=stored,
    scored=("mc_output", "mc_answer_idx"),
    asked="question_sentence",
    score_row=score,
    metric_names=("accuracy", "accuracy_all", "invalid"),
    headline="accuracy",
    shot=shot,
)
LIKELIHOOD = replace(
    TASK,
    summary="RealTime QA news quizzes: the most probable of the letters A to D",
    row=letters.most_probable(LETTERS),
    continuations=letters.letters_for(LETTERS, lambda example: len(example.target["choices"])),
    metric_names=("accuracy",),
    score_row=letters.score,
    scored=("parsed_output", "mc_answer_idx"),
)
TASK = replace(TASK, likelihood=LIKELIHOOD, choices=LIKELIHOOD)
