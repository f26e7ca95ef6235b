"""The sentence at the head of a section: what its figures say, made of the same numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from proxytune.analysis import failures, positions, sweeps, tokens
from proxytune.records import Metric, Run
from proxytune.report.figures import in_percent
from proxytune.report.tables import RoleRow, alike

MOST = 4
"""Tasks of which a sentence speaks; the others are counted."""
LATER = 8
"""The position from which a response has begun."""
FIRM = 0.05
NOTABLE = 0.01
"""The mean shift from which a token is named."""


def chance(p: float) -> str:
    """A p-value in words."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def sentence(parts: Iterable[str]) -> str:
    """The parts as one sentence, "" for none."""
    found = [part for part in parts if part]
    if len(found) > MOST:
        found = [*found[:MOST], f"{len(found) - MOST} more below"]
    text = "; ".join(found)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)


def on_results(rows: Sequence[RoleRow]) -> str:
    """How much of the gap each proxy closes; the scores where there is no proxy."""
    parts = []
    for system in dict.fromkeys(row.system for row in rows):
        own = [row for row in rows if row.system == system and row.role == "proxy"]
        firm = [f"{100 * row.gap_closed:.1f}% on {_named(row)}" for row in own if row.gap_closed is not None]
        loose = [_named(row) for row in own if row.gap_closed is None]
        if firm:
            parts.append(f"with {system}, the proxy closes {listed(firm)} of the gap between base and tuned")
        if loose:
            parts.append(f"no firm gap to close on {listed(loose)}" + ("" if firm else f" with {system}"))
    return sentence(parts)


def _named(row: RoleRow) -> str:
    """A task, with what tells this table of it from others, and the row from others of its role."""
    told = ", ".join(part for part in (row.apart, row.details) if part)
    return f"{row.task} ({told})" if told else row.task


def on_tokens(found: Sequence[positions.Positions]) -> str:
    """At how many tokens the proxy decides."""
    return sentence(
        f"on {one.source.task} the proxy's first choice is not the base's at "
        f"{100 * one.changed.value:.1f}% of {one.tokens:,} tokens in {one.responses:,} responses"
        for one in found
    )


def on_price(rows: Sequence[RoleRow]) -> str:
    """What the proxy needs beside the tuned model, or beside the base where none was tuned."""
    parts = []
    for system in dict.fromkeys(row.system for row in rows):
        tables = alike([row for row in rows if row.system == system and not row.forced])
        roles = [{row.role: row for row in own} for own in tables]
        for beside in ("tuned", "base"):
            pairs = [(own["proxy"], own[beside]) for own in roles if {"proxy", beside} <= own.keys()]
            memory = [one.memory / other.memory for one, other in pairs if one.memory and other.memory]
            time = [
                one.ms_per_token / other.ms_per_token
                for one, other in pairs
                if one.ms_per_token and other.ms_per_token
            ]
            needs = [
                f"{_between(times)} times the {what}"
                for times, what in ((memory, "memory"), (time, "time per token"))
                if times
            ]
            if needs:
                parts.append(f"with {system}, the proxy takes {listed(needs)} of the {beside} model")
                break
    return sentence(parts)


def _between(values: Sequence[float]) -> str:
    """One number, or from the lowest to the highest."""
    ends = list(dict.fromkeys((f"{min(values):.1f}", f"{max(values):.1f}")))
    return " to ".join(ends)


def on_positions(found: Sequence[positions.Positions]) -> str:
    """How often the base is overruled at the first token, and later."""
    parts = []
    for one in found:
        later = [band for band in one.bands if band.first >= LATER]
        n = sum(row.n for row in later)
        share = sum(row.n * row.changed.value for row in later) / n if n else 0.0
        parts.append(
            f"on {one.source.task} the first token is another than the base's in "
            f"{100 * one.rows[0].changed.value:.0f}% of responses"
            + (f", tokens from position {LATER} on in {100 * share:.0f}%" if n else "")
        )
    return sentence(parts)


def on_ngrams(found: Sequence[tuple[str, tokens.Ngrams]]) -> str:
    """The most promoted tokens per task."""
    parts = []
    for task, one in found:
        rows = [row for row in one.rows if row.shift is not None and row.shift.value >= NOTABLE][:3]
        named = [f"“{row.token}” ({100 * row.shift.value:+.0f} points)" for row in rows if row.shift]
        if named:
            parts.append(f"on {task} most promoted are {listed(named)}")
    return sentence(parts)


def on_equations(found: Sequence[tokens.Equations]) -> str:
    """Whether the reasoning or the arithmetic is moved, by the corrected rule."""
    parts = []
    for one in found:
        row = next((row for row in one.rows if row.rule == "corrected"), None)
        if row is None or row.left.mean is None or row.right.mean is None:
            continue
        left, right = 100 * row.left.mean, 100 * row.right.mean
        firm = row.p is not None and row.p < FIRM
        more = "reasoning" if abs(left) > abs(right) else "arithmetic"
        verdict = f"the {more} is moved more" if firm else "no firm difference"
        p = "" if row.p is None else f" ({chance(row.p)})"
        parts.append(
            f"tokens left of the equals sign move by {left:+.1f} points, right of it by {right:+.1f}: "
            f"{verdict}{p}"
        )
    return sentence(parts)


def on_alpha(found: Sequence[sweeps.Sweep]) -> str:
    """The best alpha of every sweep, beside 1 and 0."""
    parts = []
    for one in found:
        sign = -1 if one.source.lower_is_better else 1
        scores = {p.value: p.score for p in one.points if p.value is not None and p.score is not None}
        if not scores:
            continue
        # of equals the paper's setting is named
        best = max(scores, key=lambda at: (sign * scores[at].value, at == 1))
        others = [f"{_score(scores[at])} at {at:g}" for at in (1.0, 0.0) if at in scores and at != best]
        beside = f" beside {listed(others)}" if others else ""
        parts.append(f"on {one.source.task} alpha {best:g} scores best, {_score(scores[best])}{beside}")
    return sentence(parts)


def _score(metric: Metric) -> str:
    """A score in percent, or the number that it is."""
    return f"{in_percent(metric.value, metric):.1f}"


def on_skip(found: Sequence[sweeps.Skip]) -> str:
    """The fewest corrected tokens that do as well as all of them."""
    parts = []
    for one in found:
        task, scores = one.source.task, {p.until: p.score for p in one.points if p.score is not None}
        whole = scores.pop(None, None)
        if whole is None or whole.low is None or whole.high is None:
            continue
        low, high = whole.low, whole.high
        near = [at for at, score in scores.items() if at is not None and low <= score.value <= high]
        if not near:
            parts.append(f"on {task} no schedule comes into the interval of all ({_score(whole)})")
            continue
        steered = f"correcting the first {min(near)} tokens" if min(near) else "even no corrected token"
        within = f"within the interval of all ({_score(whole)})"
        parts.append(f"on {task} {steered} gives {_score(scores[min(near)])}, {within}")
    return sentence(parts)


def on_agreement(found: Sequence[positions.Agreement]) -> str:
    """How often base and proxy choose as tuned does, on the proxy's outputs where there are some."""
    own = [one for one in found if one.source.role == "proxy"] or list(found)
    return sentence(
        f"on {one.source.task} the tuned model's first choice is the proxy's at "
        f"{100 * one.same_proxy.value:.1f}% of tokens, the base's at {100 * one.same_base.value:.1f}%"
        for one in own
    )


def on_failures(found: Sequence[failures.Failures]) -> str:
    """What the proxy breaks, and what it mends."""
    return sentence(
        f"on {one.first.task} the proxy breaks {one.only_first} and mends {one.only_second} of {one.n} items "
        f"({chance(one.p)})"
        for one in found
    )


def on_runs(runs: Sequence[Run]) -> str:
    """What all of it took."""
    seconds, made = sum(run.cost.seconds for run in runs), sum(run.cost.generated_tokens for run in runs)
    took = f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
    took = took if seconds < 7200 else f"{seconds / 3600:.1f} hours"
    return sentence([f"{len(runs)} runs took {took} and generated {made:,} tokens"])
