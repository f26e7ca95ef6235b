"""By position in the response: where the proxy's token is not the base's first choice (paper, C.2), and how
far base and proxy are from the directly tuned model (the authors' rebuttal)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
import pandas as pd

from proxytune.analysis.analysis import (
    FLOATS,
    Analysis,
    Figures,
    Source,
    bands,
    finished,
    mean,
    published,
    ratio_over_responses,
    share,
    steered_tokens,
    tokens_of,
)
from proxytune.errors import UserError
from proxytune.records import Metric

Row = TypeVar("Row", bound=Figures)


class PositionRow(Figures):
    """The responses' tokens at positions first..last (0 is the first token of a response)."""

    first: int
    last: int
    n: int
    """Tokens."""
    changed: Metric
    """Share on which the proxy's first choice is not the base's, with a Wilson interval."""
    shift: Metric
    """Mean of p_proxy - p_base of the chosen token, with a t interval."""


class Positions(Analysis):
    """Influence by position in one traced run of a proxy."""

    name: ClassVar[str] = "positions"
    source: Source
    responses: int
    """Those that have a token which is counted."""
    tokens: int
    changed: Metric
    """Over all tokens but end-of-sequence; the interval is over responses."""
    shift: Metric
    paper_changed: float | None
    """The share that the paper gives for the task (of other models)."""
    rows: tuple[PositionRow, ...]
    """One per position, or for the first of them."""
    bands: tuple[PositionRow, ...]
    """The same in groups of positions, for a table that a person reads."""

    @property
    def table(self) -> Sequence[PositionRow]:
        return self.rows


def positions(folder: Path, singles: int | None = None) -> Positions:
    """Share of changed first choices and mean shift, by position; of long responses the first `singles`
    positions. UserError without a trace of a proxy."""
    run = finished(folder)
    tokens = steered_tokens(folder, run)
    tokens["changed"] = tokens["changed"].astype(float)
    last = int(tokens["position"].max())
    each = [(at, at) for at in range(last + 1)][:singles]
    return Positions(
        source=Source.of(folder, run),
        responses=int(tokens["response"].nunique()),
        tokens=len(tokens),
        changed=over_responses(tokens, "changed"),
        shift=over_responses(tokens, "shift").model_copy(update={"unit": "number"}),
        paper_changed=published("changed_top1")["share"].get(run.spec.task),
        rows=by_position(tokens, each, _position_row),
        bands=by_position(tokens, bands(last), _position_row),
    )


def over_responses(tokens: pd.DataFrame, column: str) -> Metric:
    """The mean of a column over all tokens, with an interval over responses."""
    grouped = tokens.groupby("response")[column]
    return ratio_over_responses(grouped.sum().to_numpy(FLOATS), grouped.count().to_numpy(FLOATS))


def by_position(
    tokens: pd.DataFrame,
    ranges: Sequence[tuple[int, int]],
    row: Callable[[int, int, pd.DataFrame], Row],
) -> tuple[Row, ...]:
    """One row per range of positions."""
    ordered = tokens.sort_values("position", kind="stable")
    at = ordered["position"].to_numpy()
    made = []
    for first, last in ranges:
        begin, end = np.searchsorted(at, [first, last + 1])
        made.append(row(first, last, ordered.iloc[begin:end]))
    return tuple(made)


def _position_row(first: int, last: int, tokens: pd.DataFrame) -> PositionRow:
    return PositionRow(
        first=first,
        last=last,
        n=len(tokens),
        changed=share(int(tokens["changed"].sum()), len(tokens)),
        shift=mean(tokens["shift"].to_numpy(FLOATS)),
    )


class Spread(Figures):
    """How a quantity is distributed over tokens."""

    median: float
    quarter: float
    """25% of the tokens are below."""
    three_quarters: float
    mean: float


class AgreementRow(Figures):
    """How near base and proxy are to the tuned model at positions first..last."""

    first: int
    last: int
    n: int
    kl_proxy: Spread
    """KL(tuned || proxy) in nats."""
    kl_base: Spread
    """KL(tuned || base)."""
    same_proxy: Metric
    """Share of tokens at which proxy and tuned have the same first choice, with a Wilson interval."""
    same_base: Metric


class Agreement(Analysis):
    """Agreement with direct tuning, on the outputs of one run (of the proxy, or of the tuned model)."""

    name: ClassVar[str] = "agreement"
    source: Source
    """On the outputs of `source.role`."""
    tokens: int
    """End-of-sequence included: where to end is part of what is compared."""
    kl_proxy: Metric
    """Mean over all tokens, in nats; the intervals are over responses."""
    kl_base: Metric
    same_proxy: Metric
    same_base: Metric
    first_step: AgreementRow
    paper_first_step: dict[str, float]
    """The authors' medians at the first step of AlpacaFarm: `proxy` and `base`."""
    rows: tuple[AgreementRow, ...]
    """One per position, or for the first of them."""
    bands: tuple[AgreementRow, ...]

    @property
    def table(self) -> Sequence[AgreementRow]:
        return self.rows


def agreement(folder: Path, singles: int | None = None) -> Agreement:
    """Divergence from the tuned model and shared first choices, by position; of long responses the first
    `singles` positions. UserError unless the run was traced with `--trace agreement`."""
    run = finished(folder)
    if run.spec.role not in ("proxy", "tuned"):
        raise UserError(
            f"the run in '{folder}' is of the {run.spec.role}: agreement is of proxy and tuned runs"
        )
    tokens = tokens_of(folder, run, "agreement")
    for role in ("proxy", "base"):
        tokens[f"same_{role}"] = (tokens[f"top_{role}"] == tokens["top_tuned"]).astype(float)
    last = int(tokens["position"].max())
    rows = by_position(tokens, [(at, at) for at in range(last + 1)][:singles], _agreement_row)
    number = {"unit": "number"}
    published_medians = published("kl_first_step")
    return Agreement(
        source=Source.of(folder, run),
        tokens=len(tokens),
        kl_proxy=over_responses(tokens, "kl_proxy").model_copy(update=number),
        kl_base=over_responses(tokens, "kl_base").model_copy(update=number),
        same_proxy=over_responses(tokens, "same_proxy"),
        same_base=over_responses(tokens, "same_base"),
        first_step=rows[0],
        paper_first_step={role: published_medians[role] for role in ("proxy", "base")},
        rows=rows,
        bands=by_position(tokens, bands(last), _agreement_row),
    )


def _agreement_row(first: int, last: int, tokens: pd.DataFrame) -> AgreementRow:
    return AgreementRow(
        first=first,
        last=last,
        n=len(tokens),
        kl_proxy=_spread(tokens["kl_proxy"]),
        kl_base=_spread(tokens["kl_base"]),
        same_proxy=share(int(tokens["same_proxy"].sum()), len(tokens)),
        same_base=share(int(tokens["same_base"].sum()), len(tokens)),
    )


def _spread(values: pd.Series[float]) -> Spread:
    low, middle, high = np.quantile(values.to_numpy(FLOATS), [0.25, 0.5, 0.75])
    return Spread(
        median=float(middle), quarter=float(low), three_quarters=float(high), mean=float(values.mean())
    )
