"""What every analysis shares: traced runs as a table of tokens, figures with intervals, and results that
write themselves as JSON and CSV.

Analyses read stored runs and traces only. They load no model and never touch torch, so they run on a laptop
and on runs that were made elsewhere.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict
from scipy import stats

from proxytune.config import Role, shipped
from proxytune.errors import UserError
from proxytune.intervals import INTERVAL_SEED, RESAMPLES
from proxytune.records import JsonRow, Metric, Run
from proxytune.results import TRACE, read_rows, read_run, read_traces
from proxytune.tasks.own import facts_of

FLOATS = np.float64


class Figures(BaseModel):
    """A frozen record of figures that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(Figures):
    """The run that an analysis is of."""

    folder: str
    system: str
    task: str
    role: Role
    alpha: str
    n: int
    """Examples in the run."""
    lower_is_better: bool = False
    """Whether its task's score counts what is bad."""
    hateful: bool = False
    """Whether its task's texts are hateful by design."""

    @classmethod
    def of(cls, folder: Path, run: Run) -> Source:
        """What identifies a run."""
        spec, facts = run.spec, facts_of(run)
        return cls(
            folder=str(folder),
            system=spec.system.name,
            task=spec.task,
            role=spec.role,
            alpha=spec.alpha.text,
            n=run.n,
            lower_is_better=facts.lower_is_better,
            hateful=facts.hateful,
        )

    @property
    def title(self) -> str:
        """The run in a few words."""
        alpha = f", alpha {self.alpha}" if self.role == "proxy" else ""
        return f"{self.system} {self.task} as {self.role}{alpha}"


class Analysis(Figures):
    """The result of an analysis: a table, and figures beside it. JSON is `model_dump(mode="json")`."""

    name: ClassVar[str]
    """The subcommand of `proxytune analyze`."""

    @property
    def table(self) -> Sequence[Figures]:
        """The records that are the lines of the CSV."""
        raise NotImplementedError

    def csv(self) -> str:
        """The table as CSV: a metric is three columns (`x`, `x_low`, `x_high`)."""
        lines = [dict(flat(row.model_dump(mode="json"))) for row in self.table]
        columns = list(dict.fromkeys(name for line in lines for name in line))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return text.getvalue()


def flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The columns of a nested record: a metric's value has the metric's own name, its bounds `_low` and
    `_high`, and where it is over examples these `_n`."""
    for key, value in row.items():
        name = prefix + key
        if isinstance(value, Mapping) and "value" in value and "unit" in value:
            yield name, value["value"]
            yield f"{name}_low", value["low"]
            yield f"{name}_high", value["high"]
            if value["n"] is not None:
                yield f"{name}_n", value["n"]
        elif isinstance(value, Mapping):
            yield from flat(value, f"{name}_")
        else:
            yield name, value


def published(name: str) -> dict[str, Any]:
    """The paper's figures for one analysis (`analyses` in results/paper.json)."""
    content = json.loads(shipped("results/paper.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = content["analyses"][name]
    return found


# Reading


def finished(folder: Path) -> Run:
    """The finished run of a folder; UserError where there is none."""
    run = read_run(folder)
    if run.status != "done":
        raise UserError(f"the run in '{folder}' is not finished: the command that began it continues it")
    return run


def tokens_of(folder: Path, run: Run, needs: str = "tokens") -> pd.DataFrame:
    """The trace of a run, one line per generated token.

    Columns: response (0, 1, ... in the order of the file), position (0 is the response's first token), text,
    end (it is the end-of-sequence token), alpha, `p_<role>` (probability of the token), `top_<role>` (the
    role's own first choice) and, where agreement was traced, `kl_proxy` and `kl_base` (KL(tuned || role) in
    nats). UserError if the run has no trace, or not the kind that `needs` names.
    """
    if run.spec.trace == "off" or (needs == "agreement" and run.spec.trace != "agreement"):
        spec, kind = run.spec, " agreement" if needs == "agreement" else ""
        command = f"proxytune eval {spec.task} --system {spec.system.name} --as {spec.role} --trace{kind}"
        raise UserError(f"the run in '{folder}' has no such trace: `{command}` makes one")
    kept = _KEPT.get()
    if kept is None:
        return _table(folder)
    if folder not in kept:
        kept[folder] = _table(folder)
    return kept[folder].copy()


_KEPT: ContextVar[dict[Path, pd.DataFrame] | None] = ContextVar("kept", default=None)


@contextmanager
def read_once() -> Iterator[None]:
    """Within it a trace is read once, however many analyses are of it: reading takes longer than they do."""
    before = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(before)


def _table(folder: Path) -> pd.DataFrame:
    """The tokens of a traced run, as `tokens_of`."""
    ends = {
        (row["id"], sample): response["finish_reason"] == "eos"
        for row in read_rows(folder)
        for sample, response in enumerate(row["responses"])
    }
    columns, traced = _Columns(), list[tuple[str, int]]()
    for number, trace in enumerate(read_traces(folder)):
        traced.append((trace["id"], trace["sample"]))
        columns.add(number, trace["tokens"])
    if sorted(ends) != sorted(traced):
        raise UserError(
            f"'{folder / TRACE}' does not hold every response: delete the folder and run it again"
        )
    tokens = pd.DataFrame(columns.values)
    if tokens.empty:
        raise UserError(f"the responses of the run in '{folder}' have no tokens")
    last = tokens["position"] == tokens.groupby("response")["position"].transform("max")
    ended = pd.Series([ends[one] for one in traced])
    tokens["end"] = last & ended[tokens["response"]].to_numpy()
    return tokens


class _Columns:
    """The columns of a table of tokens, filled response by response. What a token lacks is NaN."""

    def __init__(self) -> None:
        self.values: dict[str, list[Any]] = {}
        self._length = 0
        self._texts: dict[str, str] = {}

    def add(self, number: int, tokens: Sequence[JsonRow]) -> None:
        """The tokens of one response."""
        for position, token in enumerate(tokens):
            self._put("response", number)
            self._put("position", position)
            self._put("text", self._whole(token["text"]))
            self._put("alpha", token["alpha"])
            for role, p in token["probability"].items():
                self._put(f"p_{role}", p)
            for role, top in token["top"].items():
                self._put(f"top_{role}", self._whole(top))
            for role, kl in token.get("divergence", {}).items():
                self._put(f"kl_{role}", kl)
            self._length += 1
        for column in self.values.values():
            column += [math.nan] * (self._length - len(column))

    def _put(self, name: str, value: Any) -> None:
        column = self.values.setdefault(name, [])
        if len(column) < self._length:
            column += [math.nan] * (self._length - len(column))
        column.append(value)

    def _whole(self, text: str) -> str:
        """A text that a frame's column can hold: half a surrogate pair is written out. Each is kept once."""
        found = self._texts.get(text)
        if found is None:
            found = self._texts[text] = text.encode("utf-8", "backslashreplace").decode()
        return found


def steered_tokens(folder: Path, run: Run) -> pd.DataFrame:
    """`tokens_of` a run of the proxy without the end-of-sequence tokens (the paper's code leaves them out),
    with `changed` (the proxy's first choice is not the base's) and `shift` (probability of the token under
    the proxy less that under the base)."""
    if run.spec.role != "proxy":
        raise UserError(
            f"the run in '{folder}' is of the {run.spec.role}: this needs a traced run of the proxy"
        )
    tokens = tokens_of(folder, run)
    tokens = tokens[~tokens["end"]].copy()
    if tokens.empty:
        raise UserError(f"the responses of the run in '{folder}' are all empty")
    tokens["changed"] = tokens["top_proxy"] != tokens["top_base"]
    tokens["shift"] = tokens["p_proxy"] - tokens["p_base"]
    return tokens


# Figures with intervals


def share(hits: int, n: int) -> Metric:
    """A share with its 95% Wilson interval."""
    found = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    return Metric(value=hits / n, low=float(found.low), high=float(found.high))


def mean(values: Sequence[float] | np.ndarray) -> Metric:
    """A mean with its 95% t interval; none for a single value."""
    array = np.asarray(values, dtype=FLOATS)
    value = float(array.mean())
    if len(array) < 2:
        return Metric(value=value, unit="number")
    half = float(stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))
    return Metric(value=value, low=value - half, high=value + half, unit="number")


def ratio_over_responses(sums: np.ndarray, counts: np.ndarray) -> Metric:
    """sum(sums) / sum(counts) with a 95% percentile-bootstrap interval over responses, whose tokens depend on
    each other. Deterministic."""
    value, n = float(sums.sum() / counts.sum()), len(sums)
    if n < 2:
        return Metric(value=value)
    weights = np.random.default_rng(INTERVAL_SEED).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    low, high = np.quantile((weights @ sums) / (weights @ counts), [0.025, 0.975])
    return Metric(value=value, low=min(float(low), value), high=max(float(high), value))


EDGES = (0, 1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512)
"""Where groups of positions begin in tables for people."""


def bands(last: int, edges: Sequence[int] = EDGES) -> list[tuple[int, int]]:
    """Ranges of positions (first, last) that cover 0..last; each begins at an edge."""
    starts = [edge for edge in edges if edge <= last]
    return [(a, b - 1) for a, b in zip(starts, [*starts[1:], last + 1], strict=True)]
