"""Results in which everything that can be hostile is: text that tries to be markup or code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from proxytune.config import TraceKind, parse_alpha
from proxytune.records import Run
from tests.support.reports import run

HOSTILE = [
    "<script>window.pwned = 1</script>",
    "</script><script>window.pwned = 2</script>",
    "<!--<script>",
    "<img src=x onerror='window.pwned = 3'>",
    '"><svg onload="window.pwned = 4">',
    "' onmouseover='window.pwned = 5' x='",
    "[x](javascript:window.pwned=6) javascript:window.pwned=6",
    "</textarea></title></style></noscript><iframe srcdoc='<script>parent.pwned = 7</script>'>",
    "{{ 7 * 7 }} {% raw %} ${7*7} `x`",
    "a\u2028b\u2029c \u202edesrever\u202c \u2066isolated",
    "\x00\x07\x1b[31m\x7f\x85 \ud800 \ufeff\u200b",
    "&lt;b&gt; &amp;amp; ]]> \\u003cscript\\u003e",
]
"""Responses, questions and tokens that try to be markup or code, or to disturb the page."""


def put(
    folder: Path, done: Run, rows: list[dict[str, Any]], traces: list[list[dict[str, Any]]] | None = None
) -> None:
    """A run folder."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(done.model_dump_json())
    lines = [json.dumps(row) for row in rows]
    (folder / "predictions.jsonl").write_text("".join(f"{line}\n" for line in lines))
    if traces is not None:
        packed = [
            json.dumps({"id": row["id"], "sample": 0, "tokens": tokens})
            for row, tokens in zip(rows, traces, strict=True)
        ]
        (folder / "trace.jsonl").write_text("".join(f"{line}\n" for line in packed))


def example(i: int, text: str, right: bool, **more: Any) -> dict[str, Any]:
    """A stored row whose question and response are hostile."""
    asked = HOSTILE[i % len(HOSTILE)]
    return {
        "id": f"{i}", "question": f"{asked} {i}", "answer": "16", "model_output": text, "prediction": "16",
        "scores": {"exact_match": float(right)}, "is_toxic": float(not right),
        "responses": [{"text": text, "finish_reason": "eos", "tokens": 3}], **more,
    }  # fmt: skip


def token(text: str, base: float, proxy: float, other: str | None = None) -> dict[str, Any]:
    """A traced token; `other` is what the base would have chosen."""
    text = text.encode("utf-8", "replace").decode()  # tokenizers give no unpaired surrogates
    other = None if other is None else other.encode("utf-8", "replace").decode()
    p = {"base": base, "expert": proxy, "antiexpert": base, "proxy": proxy}
    top = {"base": other or text, "expert": text, "antiexpert": other or text, "proxy": text}
    return {"text": text, "id": 1, "probability": p, "top": top, "alpha": 1.0}


def tokens_for(i: int) -> list[dict[str, Any]]:
    """A response of hostile tokens with an equation."""
    bad = HOSTILE[i % len(HOSTILE)]
    other = HOSTILE[(i + 1) % len(HOSTILE)]
    words = [token(bad, 0.2, 0.9, other), token(" 1", 0.5, 0.6), token("+", 0.9, 0.9), token("2", 0.4, 0.7)]
    return [*words, token("=", 0.9, 0.95), token("3", 0.8, 0.9), token(other, 0.5, 0.4), token("</s>", 1, 1)]


def make_results(root: Path, n: int = len(HOSTILE)) -> Path:
    """A folder of results in which everything that can be hostile is."""
    system = "<b onclick='pwned=8'>evil</b>"
    scores = {"base": 0.25, "expert": 0.6, "antiexpert": 0.2, "proxy": 0.8, "tuned": 0.9}
    texts = [HOSTILE[i % len(HOSTILE)] for i in range(n)]
    for task in ("gsm", "toxigen"):
        for role, score in scores.items():
            kind: TraceKind = "tokens" if role == "proxy" else "off"
            more = {"n": n, "notes": tuple(text.replace("\ud800", "?") for text in HOSTILE)}
            done = run(role, score, system=system, task=task, trace=kind).model_copy(update=more)
            if task == "toxigen":
                done = done.model_copy(
                    update={"headline": "overall", "metrics": {"overall": done.metrics["exact_match"]}}
                )
            rows = [
                example(i, texts[i], i % 3 > 0 if role == "proxy" else i % 4 == 0, scores={})
                if task == "toxigen"
                else example(i, texts[i], i % 3 > 0 if role == "proxy" else i % 4 == 0)
                for i in range(n)
            ]
            traces = [tokens_for(i) for i in range(n)] if role == "proxy" else None
            put(root / "evil" / task / role, done, rows, traces)
    rows = [example(i, texts[i], i % 2 == 0) for i in range(n)]
    sweep = root / "evil" / "gsm" / "proxy" / "sweep"
    for alpha in ("0", "0.5", "1", "2", "first:0", "first:2"):
        done = run("proxy", 0.5, system=system, alpha=parse_alpha(alpha)).model_copy(update={"n": n})
        put(sweep / f"alpha={alpha.replace(':', '-')}", done, rows)
    (sweep / "sweep.json").write_text("{}")
    return root
