"""Finished runs written by hand: run.json, predictions.jsonl and trace.jsonl with known figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from proxytune.config import RunSpec, Sampling, System, parse_alpha
from proxytune.records import Metric, Provenance, Run, TaskFacts

SYSTEM = System.model_validate({
    "name": "made",
    "base": {"model": "b"},
    "expert": {"model": "e"},
    "antiexpert": {"model": "a"},
    "tuned": {"model": "t"},
})  # fmt: skip
MADE = Provenance(
    proxytune="0",
    git_commit=None,
    python="3",
    packages={},
    device="cpu",
    platform="x",
    threads=1,
    command="x",
)


def token(text: str, base: float, proxy: float, **more: Any) -> dict[str, Any]:
    """A traced token. `top_base`, `top_proxy`, `top_tuned` and `kl` (of proxy and base) can be given."""
    top = {role: more.get(f"top_{role}", text) for role in ("base", "proxy", "tuned")}
    found = {"text": text, "id": 0, "probability": {"base": base, "proxy": proxy}, "top": top, "alpha": 1.0}
    if "kl" in more:
        found["divergence"] = dict(zip(("proxy", "base"), more["kl"], strict=True))
    return found


def write(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    traces: Sequence[Sequence[Mapping[str, Any]]] = (),
    metric: str = "exact_match",
    metrics: Mapping[str, float] | None = None,
    facts: Mapping[str, Any] | None = None,
    **spec: Any,
) -> Path:
    """A run folder. A row gets id, scores and responses where it has none; traces[i] is of row i."""
    settings = {"task": "gsm", "role": "proxy", "alpha": "1", "data": "generated", "data_sha256": "0"} | spec
    settings["alpha"] = parse_alpha(settings["alpha"])
    settings.setdefault("trace", "tokens" if traces else "off")
    run = Run(
        status="done",
        spec=RunSpec(system=SYSTEM, sampling=Sampling(), **settings),
        n=len(rows),
        metrics={name: Metric(value=value) for name, value in (metrics or {metric: 0.5}).items()},
        headline=metric,
        facts=None if facts is None else TaskFacts.model_validate(facts),
        started="x",
        made=MADE,
    )
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(run.model_dump_json())
    responses = [{"text": "", "finish_reason": "length", "tokens": 1}]
    whole = [{"id": str(i), "scores": {}, "responses": responses, **row} for i, row in enumerate(rows)]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in whole))
    lines = [{"id": str(i), "sample": 0, "tokens": list(tokens)} for i, tokens in enumerate(traces)]
    if traces:
        (folder / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def response(text: str, *, reason: str = "eos", tokens: int = 1) -> list[dict[str, Any]]:
    """The `responses` of a row with one response."""
    return [{"text": text, "finish_reason": reason, "tokens": tokens}]
