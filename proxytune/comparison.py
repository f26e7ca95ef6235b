"""Which runs may stand beside each other in a table, a chart or a gap, and what tells the others apart.

A figure is never mixed: two runs are compared only where they were asked the same items in the same way, and
where the same judge and the same metric count. This is the one place that decides it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from proxytune.config import AlphaSchedule, Mode, Sampling
from proxytune.intervals import gap_closed
from proxytune.records import UNSCORED, Metric, Run
from proxytune.results import Value, settings

_ASKED = ("task", "mode", "data", "shots")
_VARIED = ("forced", "alpha", "defer", "trace", "limit", "data")
"""Settings that runs under the same conditions may differ in, beside their models."""
_MODELS = tuple(f"system.{part}" for part in ("name", "base", "expert", "antiexpert", "tuned", "vocab"))


@dataclass(frozen=True)
class Conditions:
    """What has to be the same for two figures to stand beside each other. Which models answered, as which
    role, with which alpha or forced opener, is what is compared."""

    task: str
    mode: Mode
    data_sha256: str
    """Of the item set: prompts, few-shot items and targets."""
    sampling: Sampling
    judge: str | None
    metric: str
    visible: int | None = None
    """How many tokens of a position the base shows, where it is behind an API: fewer give another
    distribution, and leave out other items."""


def conditions(run: Run, metric: str | None = None) -> Conditions:
    """The conditions of a run's headline, or of another of its metrics."""
    spec = run.spec
    return Conditions(
        spec.task,
        spec.mode,
        spec.data_sha256,
        spec.sampling,
        run.judge,
        metric or run.headline,
        None if spec.system.endpoint is None else spec.system.endpoint.top_logprobs,
    )


def models_of(run: Run) -> str:
    """What makes two runs ones of the same system: its name and its models."""
    system = run.spec.system
    plain = {"alpha": AlphaSchedule(), "description": "", "data": {}, "judges": {}}
    return system.model_copy(update=plain).model_dump_json()


def comparable(runs: Sequence[Run], metric: str | None = None) -> bool:
    """Whether these runs may stand beside each other, by their headlines or by one metric."""
    return len({conditions(run, metric) for run in runs}) == 1


def gap(base: Run, steered: Run, tuned: Run, metric: str) -> float | None:
    """The gap that a run closed. None where it is not firm, where the three are not runs of one system under
    the same conditions, or where an example of one of them lacks its score."""
    three = (base, steered, tuned)
    if not comparable(three, metric) or len({models_of(run) for run in three}) > 1:
        return None
    low, at, high = (_whole(run, metric) for run in three)
    return None if low is None or at is None or high is None else gap_closed(low, at, high)


def _whole(run: Run, metric: str) -> Metric | None:
    """A score of a run; None where an example lacks it: it is of fewer items than the others then."""
    found = run.figure(metric)
    return None if found is None or found.lacks(run.n) or UNSCORED & run.metrics.keys() else found


# What tells runs apart


def unlike(one: Run, other: Run) -> str:
    """The conditions and the models in which two runs differ, for a message: `temperature: 0.0 and 0.7`."""
    a, b = _conditions(one) | _models(one), _conditions(other) | _models(other)
    names = [name for name in a | b if a.get(name) != b.get(name)]
    return "; ".join(f"{_short(n)}: {_value(a.get(n))} and {_value(b.get(n))}" for n in names)


def apart(runs: Sequence[Run]) -> list[str]:
    """For each of several runs the conditions in which they differ, their metric aside: `300 examples,
    temperature 0.7`. The items have no better name than their hash, which is told where nothing else does."""
    told = [_conditions(run) for run in runs]
    names = [name for name in told[0] if name not in ("items", "metric")]
    found = _texts(told, names)
    items = {(text, one["items"]) for text, one in zip(found, told, strict=True)}
    return found if len(items) == len(set(found)) else _texts(told, [*names, "items"])


def details(runs: Sequence[Run]) -> list[str]:
    """For each of several runs of a system under the same conditions what tells it from the others of its
    role, and its models where these are not the same in all runs: `alpha 0.4, trace tokens`. An alpha that is
    not the system's own is always told."""
    told, models = [settings(run.spec) for run in runs], [_models(run) for run in runs]
    named = {name for one in models for name in one}
    changed = {name for name in named if len({one.get(name) for one in models}) > 1}
    same: dict[tuple[str, bool], list[Mapping[str, Value]]] = {}
    for run, own in zip(runs, told, strict=True):
        same.setdefault(_role(run), []).append(own)
    varied = {
        role: {name for name in _VARIED if len({one[name] for one in like}) > 1}
        for role, like in same.items()
    }
    found = []
    for run, own in zip(runs, told, strict=True):
        names = varied[_role(run)] | changed
        if run.spec.role != "proxy":
            names -= {"alpha"}
        elif run.spec.alpha != run.spec.system.alpha:
            names |= {"alpha"}
        found.append(", ".join(_text(name, own.get(name)) for name in sorted(names)))
    return found


def _role(run: Run) -> tuple[str, bool]:
    """As which role a run answered, and whether its opener was forced."""
    return run.spec.role, run.spec.forced is not None


def _conditions(run: Run) -> dict[str, Value]:
    """Conditions by the names that a reader is told."""
    asked = settings(run.spec)
    own = {name: asked[name] for name in asked if name in _ASKED or name.startswith("sampling.")}
    last = {"judge": run.judge, "metric": run.headline, "items": run.spec.data_sha256}
    return {"examples": run.n, **own, **last}


def _models(run: Run) -> dict[str, Value]:
    """The models of a run's system, setting by setting."""
    return {name: value for name, value in settings(run.spec).items() if name.startswith(_MODELS)}


def _texts(told: Sequence[Mapping[str, Value]], names: Sequence[str]) -> list[str]:
    """For each of several runs those of these settings in which they differ."""
    shown = [name for name in names if len({one[name] for one in told}) > 1]
    return [", ".join(_text(name, one[name]) for name in shown) for one in told]


def _text(name: str, value: Value) -> str:
    """A setting as a reader is told it."""
    return f"{value} examples" if name == "examples" else f"{_short(name)} {_value(value)}"


def _short(name: str) -> str:
    """A dotted name without what it is of."""
    return name.removeprefix("sampling.").removeprefix("system.")


def _value(value: Value) -> str:
    """A value as a person reads it; hashes in short."""
    text = "none" if value is None else str(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{40,}", text) else text
