"""Finished runs for tables and reports."""

from __future__ import annotations

from typing import Any

from proxytune.config import ModelSpec, RunSpec, Sampling, System, parse_alpha
from proxytune.records import Cost, Metric, RoleMemory, Run
from tests.support.made_runs import MADE

MEMORY = {
    "base": RoleMemory(weights=8_000_000, kv_peak=1_000_000),
    "expert": RoleMemory(weights=500_000, kv_peak=100_000),
    "antiexpert": RoleMemory(weights=500_000, kv_peak=100_000),
    "tuned": RoleMemory(weights=8_000_000, kv_peak=1_000_000),
}


def run(role: str, score: float, *, system: str = "tiny", model: str = "nowhere", **changes: Any) -> Run:
    """A finished run of 100 examples."""
    models = System(name=system, base=ModelSpec(model=model))
    spec: dict[str, Any] = {
        "task": "gsm", "system": models, "role": role, "alpha": parse_alpha(1), "sampling": Sampling(),
        "data": "generated", "data_sha256": "0" * 64,
        **changes,
    }  # fmt: skip
    metric = Metric(value=score, low=max(score - 0.05, 0), high=min(score + 0.05, 1))
    cost = Cost(seconds=2.5, prefill_seconds=0.5, generated_tokens=1000, memory=MEMORY)
    return Run(
        status="done", spec=RunSpec(**spec), n=100, metrics={"exact_match": metric}, headline="exact_match",
        cost=cost, started="now", made=MADE,
    )  # fmt: skip
