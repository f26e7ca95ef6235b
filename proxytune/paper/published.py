"""The published figures (results/paper.json)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from proxytune.config import shipped


def read_paper() -> Mapping[str, Any]:
    """results/paper.json."""
    content: Mapping[str, Any] = json.loads(shipped("results/paper.json").read_text(encoding="utf-8"))
    return content


def stored_percent(paper: Mapping[str, Any], column: Mapping[str, Any], run: str | None) -> float | None:
    """The stored metric behind a cell of a published table, in percent; None where nothing was stored."""
    if run is None:
        return None
    return float(paper["stored"][column["task"]]["runs"][run][column["metric"]] * column["scale"])


def paper_gap_closed(paper: Mapping[str, Any], table: str, model_size: str) -> float:
    """The mean over a table's columns of the share of the gap closed, not capped (the paper's headline), from
    the stored metrics; from the printed cells where nothing was stored."""
    content = paper["tables"][table]
    rows = {row["role"]: row for row in content["rows"] if row["size"] == model_size}

    def percent(role: str, i: int) -> float:
        stored = stored_percent(paper, content["columns"][i], rows[role]["runs"][i])
        return float(rows[role]["printed"][i]) if stored is None else stored

    shares = []
    for i in range(len(content["columns"])):
        base, proxy, tuned = (percent(role, i) for role in ("base", "proxy", "tuned"))
        shares.append((proxy - base) / (tuned - base))
    return sum(shares) / len(shares)
