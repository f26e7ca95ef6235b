"""AlpacaFarm: 805 open instructions; how often a judge prefers the response to text_davinci_003's. Dubois et
al. 2023; the paper's section 4.1.

Rows have the fields of the annotations.json that the paper's judge (alpaca_eval 0.3.1 with GPT-4) wrote, so
`score` reads those files, those of newer versions of that tool, and rows that judges/pairwise.py judged.
"""

from __future__ import annotations

from collections.abc import Sequence

from proxytune.config import Sampling
from proxytune.errors import UserError
from proxytune.intervals import mean_metric
from proxytune.records import Completion, Example, JsonRow, Metric, Prompt
from proxytune.tasks.data import DataTable, Hub
from proxytune.tasks.scoring.win_rate import length_controlled_win_rate, win_rate, wins
from proxytune.tasks.task import UNJUDGED, Task


def examples(table: DataTable, shots: str) -> list[Example]:
    """Rows of alpaca_eval.json -> examples, known by their place: the bare instruction is the prompt."""
    made = []
    for index, row in enumerate(table.rows):
        if not row["instruction"].strip():
            raise UserError(f"{table.where(index)}: the instruction is empty")
        target = {
            "instruction": row["instruction"],
            "output_1": row["output"],
            "generator_1": row.get("generator", ""),
            "dataset": row.get("dataset", ""),
        }
        text = Prompt(plain=row["instruction"], user=row["instruction"])
        made.append(Example(id=str(index), prompt=text, target=target))
    return made


def stored(example: Example, completions: Sequence[Completion]) -> JsonRow:
    """An annotation without the judge's part."""
    return {**example.target, "output_2": completions[0].text.strip()}


def score(row: JsonRow) -> dict[str, float]:
    """1, 0.5 or 0 for a judged row, under the name of the mean that progress shows; or that it is not
    judged."""
    won = wins(row.get("preference"))
    return {UNJUDGED: 1.0} if won is None else {"win_rate": won}


def totals(rows: Sequence[JsonRow]) -> dict[str, Metric]:
    """The paper's figures over the judged rows under its names, and the length-controlled win rate."""
    judged = [(row, share) for row in rows if (share := wins(row.get("preference"))) is not None]
    won = [share for _, share in judged]
    found = win_rate(won, mean_metric(won)) if judged else {}
    mean_length = sum(len(row["output_2"]) for row in rows) / len(rows)
    found["avg_length"] = Metric(value=int(mean_length), unit="number", n=len(rows))
    if judged and all(isinstance(row.get("output_1"), str) for row, _ in judged):
        lengths = [(len(row["output_2"]), len(row["output_1"])) for row, _ in judged]
        mine, theirs = zip(*lengths, strict=True)
        found["length_controlled_win_rate"] = length_controlled_win_rate(won, mine, theirs)
    return found


TASK = Task(
    name="alpaca_farm",
    summary="AlpacaFarm instructions: how often a judge prefers the response to text_davinci_003's",
    data="alpaca_eval.json of tatsu-lab/alpaca_eval",
    licence="CC BY-NC 4.0",
    items=805,
    hub=Hub("tatsu-lab/alpaca_eval", None, split="eval", file="alpaca_eval.json"),
    formats={
        "alpaca_eval.json, hub": {
            "instruction": "the prompt",
            "output": "the baseline's response",
            "generator": "who wrote it (optional)",
            "dataset": "the part that it is from (optional)",
        },
    },
    columns=("instruction", "output"),
    sampling=Sampling(max_new_tokens=2048, stop=("\n\nComment:",)),
    examples=examples,
    row=stored,
    scored=("output_2",),
    asked="instruction",
    files=("annotations.json", "predictions.jsonl"),
    score_row=score,
    totals=totals,
    metric_names=(),
    headline=UNJUDGED,
    judged_headlines=("win_rate",),
    judge_reads=("instruction", "output_1"),
    judge="gpt-4.1",
    judge_kind="pairwise",
)
