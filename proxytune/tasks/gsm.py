"""GSM8K: grade-school arithmetic, exact match of the last number. Cobbe et al. 2021; the paper's section 4.1.

Prompt and rules are the paper's: `Answer the following question.` before the question, greedy, 512 tokens, no
stop strings; the response is cut, commas between digits are dropped, and the last number is the prediction.
"""

from __future__ import annotations

from collections.abc import Sequence

from proxytune.config import Sampling
from proxytune.errors import UserError
from proxytune.records import Completion, Example, JsonRow, Prompt
from proxytune.tasks.data import DataTable, Hub
from proxytune.tasks.scoring.rules import (
    exact_match,
    exact_match_numeric,
    last_number,
    remove_commas,
    trim_gsm,
)
from proxytune.tasks.task import Task

INSTRUCTION = "Answer the following question."
PREFIX = "Answer:"


def prompt(question: str, shots: str = "") -> Prompt:
    """The paper's prompt; few-shot items come before the question, each followed by a blank line.

    Inside the proxy, a chat expert's context loses every `Answer:`, those of the shots included
    (decoding/prompts.py).
    """
    user = f"{INSTRUCTION}\n\n{shots}Question: {question.strip()}"
    return Prompt(plain=f"{user}\n{PREFIX}", user=user, response_prefix=PREFIX)


def shot(row: JsonRow) -> str:
    """An item with its worked solution as a few-shot example."""
    return f"Question: {row['question'].strip()}\nAnswer: {row['answer'].strip()}\n\n"


def gold(answer: str) -> str | None:
    """The number after `####` (the whole text without one), commas between digits dropped; None if it is no
    number."""
    text = remove_commas(answer.rpartition("####")[2].strip())
    return text if _is_number(text) else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def examples(table: DataTable, shots: str) -> list[Example]:
    """GSM8K rows -> examples, known by their place in the file."""
    made = []
    for index, row in enumerate(table.rows):
        answer = gold(row["answer"])
        if answer is None:
            raise UserError(f"{table.where(index)}: the answer has no number after '####'")
        target = {"question": row["question"], "answer": answer}
        made.append(Example(id=str(index), prompt=prompt(row["question"], shots), target=target))
    return made


def stored(example: Example, completions: Sequence[Completion]) -> JsonRow:
    """The row that the paper's repository stores."""
    output = trim_gsm(completions[0].text)
    return {**example.target, "model_output": output, "prediction": last_number(output)}


def score(row: JsonRow) -> dict[str, float]:
    """The paper's exact match, extracted anew from `model_output`, and the fair numeric one."""
    output, answer = trim_gsm(row["model_output"]), row["answer"]
    return {
        "exact_match": exact_match(last_number(output), answer),
        "exact_match_numeric": exact_match_numeric(output, answer),
    }


TASK = Task(
    name="gsm",
    summary="GSM8K word problems: the last number of the response",
    data="openai/gsm8k, test split, or test.jsonl of github.com/openai/grade-school-math",
    licence="MIT",
    items=1319,
    hub=Hub("openai/gsm8k", "main", split="test", train="train"),
    formats={
        "test.jsonl, hub": {
            "question": "the word problem",
            "answer": "the worked solution, the number after ####",
        },
    },
    columns=("question", "answer"),
    sampling=Sampling(max_new_tokens=512),
    examples=examples,
    row=stored,
    scored=("answer", "model_output"),
    asked="question",
    score_row=score,
    metric_names=("exact_match", "exact_match_numeric"),
    headline="exact_match",
    shot=shot,
)
