"""A finished run as exports read it: what was asked, answered and scored, whatever its task is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from proxytune.analysis import failures
from proxytune.api_spec import ApiSpec
from proxytune.records import JsonRow, Run, TaskFacts
from proxytune.runs import verdicts
from proxytune.tasks.own import facts_of

OWN_COLUMNS = ("id", "scores", "responses")
"""Columns of a stored row that every task has."""


@dataclass(frozen=True)
class StoredRun:
    """A run with its rows, whose texts every encoding of Unicode can write."""

    run: Run
    rows: Sequence[JsonRow]

    @classmethod
    def read(cls, folder: Path) -> StoredRun:
        """UserError where the folder holds no finished run, or less than it lists."""
        run, rows = verdicts.read_whole(folder)
        return cls(run, [_writable(row) for row in rows])

    @cached_property
    def facts(self) -> TaskFacts:
        """Of its task."""
        return facts_of(self.run)

    @property
    def name(self) -> str:
        """The system and the role, as one part of a path."""
        return in_path(f"{self.run.spec.system.name}-{self.run.spec.role}")

    @property
    def models(self) -> dict[str, str]:
        """Every model that the role decodes with, by its role."""
        spec = self.run.spec
        system, proxy = spec.system, spec.role == "proxy"
        experts = system.expert_specs if proxy or spec.role == "expert" else ()
        named: dict[str, Any] = {
            "base": system.base if proxy or spec.role == "base" else None,
            "antiexpert": system.antiexpert if proxy or spec.role == "antiexpert" else None,
            "tuned": system.tuned if spec.role == "tuned" else None,
            **{f"expert{place or ''}": expert for place, expert in enumerate(experts)},
        }
        return {
            role: str(model)
            if isinstance(model, ApiSpec)
            else " with adapter ".join(filter(None, (model.model, model.adapter)))
            for role, model in named.items()
            if model is not None
        }

    def asked(self, row: JsonRow) -> str:
        """What an example asks."""
        return str(row.get(self.facts.asked, ""))

    def reference(self, row: JsonRow) -> list[str]:
        """The answers that count as right, where the row holds any."""
        found: Any = next((row[name] for name in failures.ANSWERS if row.get(name) not in (None, "")), [])
        return [str(answer) for answer in found] if isinstance(found, list) else [str(found)]

    def score(self, row: JsonRow) -> float | None:
        """What an example adds to the headline; None where it has no such score."""
        found = row.get("scores", {}).get(self.run.headline)
        if found is None and self.facts.fault_column is not None:
            found = row.get(self.facts.fault_column)
        return None if found is None else float(found)


def _writable(value: Any) -> Any:
    """A value in which half a surrogate pair, which other tools refuse, is written out (`\\ud83d`)."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, list):
        return [_writable(one) for one in value]
    if isinstance(value, dict):
        return {_writable(name): _writable(one) for name, one in value.items()}
    return value


def responses(row: JsonRow) -> list[JsonRow]:
    """The responses of a row as they were generated."""
    found: list[JsonRow] = row.get("responses") or []
    return found


def in_path(text: str) -> str:
    """The text as one part of a path."""
    return re.sub(r"[^A-Za-z0-9.,=_+-]+", "-", text).strip("-.") or "unnamed"
