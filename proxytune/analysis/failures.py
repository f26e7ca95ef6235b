"""Where one run fails and another does not: the items, and McNemar's test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from scipy import stats

from proxytune.analysis.analysis import Analysis, Figures, Source, finished
from proxytune.comparison import comparable, unlike
from proxytune.errors import UserError
from proxytune.records import UNSCORED, JsonRow, Run
from proxytune.results import read_rows
from proxytune.tasks.own import facts_of


class Disagreement(Figures):
    """An item that exactly one of two runs has right."""

    id: str
    right: Literal["first", "second"]
    """Which run has it right."""
    question: str
    first: str
    """The response of the first run, as it was generated."""
    second: str
    answer: str
    """What the row holds as its reference, "" where it holds none."""


class Failures(Analysis):
    """Two runs on the same items."""

    name: ClassVar[str] = "failures"
    first: Source
    second: Source
    metric: str
    n: int
    """Items that have a score in both runs."""
    of: int
    """Items of the runs."""
    both_right: int
    both_wrong: int
    only_first: int
    only_second: int
    p: float
    """McNemar's exact test (two-sided binomial over the items that exactly one has right)."""
    items: tuple[Disagreement, ...]
    """First those that only the first run has right."""

    @property
    def table(self) -> Sequence[Disagreement]:
        return self.items


def failures(first: Path, second: Path, metric: str | None = None) -> Failures:
    """What one run has right and the other wrong, by `metric` (the headline by default).

    Items that have no score in one of the two are left out. UserError where the runs were not made under the
    same conditions, where no item is left, or where the metric does not mark an item right or wrong.
    """
    runs = [finished(first), finished(second)]
    one, other = runs
    if not comparable(runs, metric):
        raise UserError(f"'{first}' and '{second}' cannot be compared: they differ ({unlike(one, other)})")
    name = metric or one.headline
    rows = {row["id"]: row for row in read_rows(first)}
    beside = {row["id"]: row for row in read_rows(second)}
    both = {
        key: (_right(row, one, name, first), _right(beside[key], other, name, second))
        for key, row in rows.items()
        if key in beside
    }
    right = {key: pair for key, pair in both.items() if None not in pair}
    if not right:
        named = ", ".join(dict.fromkeys(name for row in rows.values() for name in row["scores"]))
        raise UserError(
            f"no item of '{first}' and '{second}' has a score by '{name}': choose a --metric of right or "
            f"wrong (it has {named or 'none: judge the runs first'})"
        )
    only_first = [key for key, pair in right.items() if pair == (True, False)]
    only_second = [key for key, pair in right.items() if pair == (False, True)]
    discordant = len(only_first) + len(only_second)
    return Failures(
        first=Source.of(first, one),
        second=Source.of(second, other),
        metric=name,
        n=len(right),
        of=len(both),
        both_right=sum(pair == (True, True) for pair in right.values()),
        both_wrong=sum(pair == (False, False) for pair in right.values()),
        only_first=len(only_first),
        only_second=len(only_second),
        p=float(stats.binomtest(len(only_first), discordant, 0.5).pvalue) if discordant else 1.0,
        items=tuple(
            _item(rows[key], beside[key], one, "first" if right[key][0] else "second")
            for key in (*only_first, *only_second)
        ),
    )


def _right(row: JsonRow, run: Run, metric: str, folder: Path) -> bool | None:
    """Whether a stored row is right; None where it has no score."""
    column = facts_of(run).fault_column
    if column is not None and metric == run.headline:
        score = 1.0 - row[column] if row.get(column) in (0, 1) else None
    else:
        score = row["scores"].get(metric)
    if score not in (None, 0.0, 1.0):
        named = ", ".join(row["scores"])
        raise UserError(
            f"item '{row['id']}' of '{folder}' has the score {score:g}, which is neither right nor wrong, by "
            f"'{metric}': choose a --metric of right or wrong (it has {named})"
        )
    return None if score is None or metric in UNSCORED else bool(score == 1.0)


def _item(first: JsonRow, second: JsonRow, run: Run, right: Literal["first", "second"]) -> Disagreement:
    """One item with both responses."""
    asked = facts_of(run).asked
    answers = (first.get(column) for column in ANSWERS)
    answer = next((answer for answer in answers if answer not in (None, "")), "")
    return Disagreement(
        id=first["id"],
        right=right,
        question=str(first.get(asked, "")),
        first=_response(first),
        second=_response(second),
        answer=answer if isinstance(answer, str) else ", ".join(map(str, answer)),
    )


ANSWERS = ("answer", "answers", "Best Answer", "mc_answer_idx")
"""Columns in which rows hold their reference, the first that is there."""


def _response(row: JsonRow) -> str:
    """The first response of a row, or what it chose where given texts were compared."""
    logprobs = row.get("logprobs")
    if isinstance(logprobs, dict):
        return str(max(logprobs, key=lambda text: float(logprobs[text])))
    return str(row["mc_output"] if logprobs else row["responses"][0]["text"])
