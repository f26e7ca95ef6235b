"""A run as a log of Inspect (inspect_ai), which `inspect view` opens. The format of these logs is not frozen:
it is written through their own Python API, with the extra `proxytune[inspect]`."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proxytune.errors import needs_extra
from proxytune.exports.format import Format
from proxytune.exports.stored import OWN_COLUMNS, StoredRun, in_path, responses
from proxytune.records import FAULT, JsonRow

STOP_REASONS = {"eos": "stop", "stop": "stop", "length": "max_tokens"}
"""Our reasons why a response ended, and Inspect's; a fault is `unknown` there."""


def files(folder: Path) -> dict[str, bytes]:
    """The log."""
    needs_extra("export inspect", "inspect_ai", "inspect")
    from inspect_ai.log import write_eval_log

    stored = StoredRun.read(folder)
    name = f"{in_path(stored.run.spec.task)}_{stored.name}.eval"
    with tempfile.TemporaryDirectory(prefix="proxytune-export-") as place:
        path = Path(place) / name
        write_eval_log(_log(stored), str(path))
        return {name: path.read_bytes()}


def _log(stored: StoredRun) -> Any:
    """The log of a run."""
    from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalSpec, EvalStats
    from inspect_ai.model import GenerateConfig, ModelUsage

    run, model = stored.run, f"proxytune/{stored.name}"
    spec, cost = run.spec, run.cost
    usage = ModelUsage(
        input_tokens=cost.prompt_tokens,
        output_tokens=cost.generated_tokens,
        total_tokens=cost.prompt_tokens + cost.generated_tokens,
    )
    return EvalLog(
        status="success",
        eval=EvalSpec(
            created=run.started,
            task=spec.task,
            dataset=EvalDataset(
                name=spec.data, samples=run.n, sample_ids=[row["id"] for row in stored.rows], shuffled=False
            ),
            model=model,
            model_generate_config=GenerateConfig(
                max_tokens=spec.sampling.max_new_tokens,
                temperature=spec.sampling.temperature,
                top_p=spec.sampling.top_p,
                top_k=spec.sampling.top_k,
                seed=spec.sampling.seed,
                stop_seqs=list(spec.sampling.stop) or None,
                num_choices=spec.sampling.n,
            ),
            model_args=stored.models,
            config=EvalConfig(limit=spec.limit, epochs=1),
            packages={"proxytune": run.made.proxytune, **run.made.packages},
            metadata={
                "role": spec.role,
                "alpha": spec.alpha.text,
                "headline": run.headline,
                "judge": run.judge,
                "notes": list(run.notes),
                "spec": spec.model_dump(mode="json"),
            },
        ),
        results=_results(stored),
        stats=EvalStats(
            started_at=run.started, completed_at=run.finished or run.started, model_usage={model: usage}
        ),
        samples=[_sample(stored, row, model) for row in stored.rows],
    )


def _results(stored: StoredRun) -> Any:
    """The metrics, the headline first, each with its interval."""
    from inspect_ai.log import EvalMetric, EvalResults, EvalScore

    run = stored.run
    scores = []
    for name in sorted(run.metrics, key=lambda name: name != run.headline):
        metric = run.metrics[name]
        if metric.n == 0:
            continue
        figures = {"mean": metric.value, "ci95_low": metric.low, "ci95_high": metric.high}
        scored, of = metric.over(run.n)
        scores.append(
            EvalScore(
                name=name,
                scorer=name,
                scored_samples=scored,
                unscored_samples=of - scored,
                metrics={
                    label: EvalMetric(name=label, value=value)
                    for label, value in figures.items()
                    if value is not None
                },
            )
        )
    return EvalResults(total_samples=run.n, completed_samples=run.n, scores=scores)


def _sample(stored: StoredRun, row: JsonRow, model: str) -> Any:
    """One example. All of its responses are choices of one output."""
    from inspect_ai.log import EvalSample
    from inspect_ai.model import (
        ChatCompletionChoice,
        ChatMessageAssistant,
        ChatMessageUser,
        ModelOutput,
    )
    from inspect_ai.scorer import Score

    asked, found = stored.asked(row), responses(row)
    output = ModelOutput(
        model=model,
        choices=[
            ChatCompletionChoice(
                message=ChatMessageAssistant(content=str(response["text"]), model=model, source="generate"),
                stop_reason=STOP_REASONS.get(response.get("finish_reason", ""), "unknown"),
            )
            for response in found
        ],
        error=row.get(FAULT),
    )
    answers = [choice.message for choice in output.choices[:1]]
    return EvalSample(
        id=row["id"],
        epoch=1,
        input=asked,
        target=stored.reference(row),
        messages=[ChatMessageUser(content=asked, source="input"), *answers],
        output=output,
        scores={
            name: Score(value=value, answer=output.completion)
            for name, value in row.get("scores", {}).items()
        },
        metadata={name: value for name, value in row.items() if name not in OWN_COLUMNS},
    )


def then(written: Sequence[str]) -> tuple[str, ...]:
    """How to look at it."""
    return (f"then: inspect view --log-dir {shlex.quote(str(Path(written[0]).parent))}",)


FORMAT = Format("an Inspect log (.eval) for `inspect view`; needs proxytune[inspect]", files, then)
