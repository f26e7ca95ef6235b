"""A task of my own: word problems, right where the last number of the response is the answer.

    proxytune eval ./my_task.py --system demo --data my_items.jsonl

Runs are kept under the name of this file and the hash of its content: once it is changed, it is another task.
Everything that the task needs is in this one file."""

from __future__ import annotations

import re
from collections.abc import Sequence

from proxytune.config import Sampling
from proxytune.records import Completion, Example, JsonRow, Prompt
from proxytune.tasks import Task, data


def prompt(question: str, shots: str) -> Prompt:
    """What the models see. `plain` is for models without a chat format. `user` is the message to a chat
    model, whose response is made to begin with `response_prefix`."""
    user = f"Answer the following question.\n\n{shots}Question: {question}"
    return Prompt(plain=f"{user}\nAnswer:", user=user, response_prefix="Answer:")


def shot(row: JsonRow) -> str:
    """An item as a few-shot example (--shots N). Without this function --shots is refused."""
    return f"Question: {row['question']}\nAnswer: {row['answer']}\n\n"


def examples(table: data.DataTable, shots: str) -> list[Example]:
    """Rows of the file -> examples. An id must stay the same: it is what an interrupted run continues by. The
    target is whatever the score needs."""
    return [
        Example(id=str(place), prompt=prompt(row["question"], shots), target=row)
        for place, row in enumerate(table.rows)
    ]


def row(example: Example, completions: Sequence[Completion]) -> JsonRow:
    """What is stored of an example. With -n there are several completions."""
    return {**example.target, "output": completions[0].text.strip()}


def score(row: JsonRow) -> dict[str, float | None]:
    """The scores of a stored row, by name: 0 to 1. The means over all rows are the metrics."""
    numbers = re.findall(r"-?\d+", row["output"])
    return {"accuracy": float(bool(numbers) and numbers[-1] == row["answer"])}


TASK = Task(
    summary="word problems: the last number of the response",
    columns=("question", "answer"),  # texts that every row of the data must have
    sampling=Sampling(max_new_tokens=128),  # the settings that count as usual: greedy, 128 tokens
    examples=examples,
    shot=shot,
    row=row,
    scored=("output", "answer"),  # texts of a stored row that `score` needs
    asked="question",  # the column of a stored row that reports show
    score_row=score,
    metric_names=("accuracy",),
    headline="accuracy",  # the metric that tables show
    lower_is_better=False,
)
