"""A run in the schema of Every Eval Ever (github.com/evaleval/every_eval_ever), version 0.3.0: one JSON with
the headline and its interval, and a JSONL with a line per example.

The files lie under `data/` as in that repository. They get the same names and content whenever the run is
exported. What the schema asks and a run does not know (who evaluated, whether the weights are open) is
`unknown` or `other`."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from proxytune.errors import UserError
from proxytune.exports.format import Format
from proxytune.exports.stored import StoredRun, in_path, responses
from proxytune.intervals import RESAMPLES
from proxytune.records import FAULT, JsonRow, Metric
from proxytune.tasks import TASKS

VERSION = "0.3.0"
DEVELOPER = "proxytune"
"""Of a steered system, which is nobody's model: the systems and models are named in the details."""
UNITS: Mapping[str, tuple[str, int | None]] = {
    "share": ("proportion", 1),
    "percent": ("percent", 100),
    "number": ("number", None),
}
"""Our units, those of the schema, and the highest score."""


def files(folder: Path) -> dict[str, bytes]:
    """The record of the run and those of its examples."""
    record = _Record(StoredRun.read(folder))
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in record.samples]
    samples = "".join(f"{line}\n" for line in lines).encode()
    whole = json.dumps(record.aggregate(samples), indent=2, ensure_ascii=False, allow_nan=False)
    return {f"{record.place}.json": f"{whole}\n".encode(), record.samples_place: samples}


@dataclass(frozen=True)
class _Record:
    """A run on its way into the schema."""

    stored: StoredRun

    @cached_property
    def metric(self) -> Metric:
        """The headline; UserError where there is none to report."""
        found = self.stored.run.score
        if found is None:
            raise UserError(
                f"the run has no score ({self.stored.run.headline}): judge it, or run its code, first"
            )
        return found

    @property
    def model_id(self) -> str:
        """The system as a role, in the form of a model of the hub."""
        return f"{DEVELOPER}/{self.stored.name}"

    @cached_property
    def seconds(self) -> str:
        """When the run was finished, as the schema counts time."""
        run = self.stored.run
        ended = datetime.fromisoformat(run.finished or run.started)
        return f"{ended.replace(tzinfo=ended.tzinfo or UTC).timestamp():.1f}"

    @property
    def evaluation_id(self) -> str:
        """As the schema advises."""
        return f"{self.stored.run.spec.task}/{self.model_id.replace('/', '_')}/{self.seconds}"

    @property
    def result_id(self) -> str:
        """The key that examples name."""
        return f"{self.stored.run.spec.task}.{self.stored.run.headline}"

    @cached_property
    def place(self) -> str:
        """The path of the record without its ending."""
        run = self.stored.run
        content = hashlib.sha256(run.model_dump_json(exclude={"cost", "metrics", "made"}).encode()).digest()
        name = uuid.UUID(bytes=content[:16], version=4)
        return f"data/{in_path(run.spec.task)}/{self.model_id}/{name}"

    @property
    def samples_place(self) -> str:
        """The path of the examples."""
        return f"{self.place}_samples.jsonl"

    def aggregate(self, samples: bytes) -> JsonRow:
        """The record of the run."""
        run = self.stored.run
        library = {"name": "proxytune", "version": run.made.proxytune}
        lines = len(self.samples)
        return {
            "schema_version": VERSION,
            "evaluation_id": self.evaluation_id,
            "evaluation_timestamp": run.started,
            "retrieved_timestamp": self.seconds,
            "source_metadata": {
                "source_name": "proxytune",
                "source_type": "evaluation_run",
                "source_organization_name": "unknown",
                "evaluator_relationship": "other",
            },
            "eval_library": {
                **library,
                "additional_details": {**run.made.packages, "git_commit": str(run.made.git_commit)},
            },
            "model_info": {
                "name": self.stored.name,
                "id": self.model_id,
                "developer": DEVELOPER,
                "inference_engine": library,
                "additional_details": self._model_details(),
            },
            "evaluation_results": [self._result()],
            "detailed_evaluation_results": {
                "format": "jsonl",
                "file_path": self.samples_place,
                "hash_algorithm": "sha256",
                "checksum": hashlib.sha256(samples).hexdigest(),
                "total_rows": lines,
                "additional_details": {"examples_without_a_score": str(run.n - lines)},
            },
        }

    def _model_details(self) -> dict[str, str]:
        spec = self.stored.run.spec
        alpha = {"alpha": spec.alpha.text} if spec.role == "proxy" else {}
        known = {"deployment_type": "self_deployed", "model_availability": "unknown"}
        return {**known, "role": spec.role, **alpha, **self.stored.models}

    def _result(self) -> JsonRow:
        """The headline, with the other metrics in its details."""
        run, metric = self.stored.run, self.metric
        unit, most = UNITS[metric.unit]
        bounds = {} if most is None else {"score_type": "continuous", "min_score": 0, "max_score": most}
        judge = {} if run.judge is None else {"additional_details": {"judge": run.judge}}
        uncertainty: JsonRow = {"num_samples": run.n if metric.n is None else metric.n}
        if metric.low is not None and metric.high is not None:
            uncertainty["confidence_interval"] = {
                "lower": metric.low,
                "upper": metric.high,
                "confidence_level": 0.95,
                "method": "percentile bootstrap over examples",
            }
            uncertainty["num_bootstrap_samples"] = RESAMPLES
        return {
            "evaluation_result_id": self.result_id,
            "evaluation_name": run.spec.task,
            "source_data": self._source(),
            "evaluation_timestamp": run.started,
            "metric_config": {
                "metric_id": f"proxytune.{self.result_id}",
                "metric_name": run.headline,
                "metric_unit": unit,
                "lower_is_better": self.stored.facts.lower_is_better,
                **bounds,
                **judge,
            },
            "score_details": {
                "score": metric.value,
                "details": {
                    name: _in_words(one) for name, one in run.metrics.items() if name != run.headline
                },
                "uncertainty": uncertainty,
            },
            "generation_config": self._generation(),
        }

    def _source(self) -> JsonRow:
        """Where the items come from."""
        spec, n = self.stored.run.spec, self.stored.run.n
        task = TASKS.get(spec.task)
        if spec.data == "hub" and task is not None and task.hub is not None:
            place = {"source_type": "hf_dataset", "hf_repo": task.hub.id, "hf_split": task.hub.split}
            return {"dataset_name": task.hub.id, **place, "samples_number": n}
        details = {"sha256": spec.data_sha256, "items": str(n)}
        return {"dataset_name": spec.data, "source_type": "other", "additional_details": details}

    def _generation(self) -> JsonRow:
        """How responses were decoded."""
        spec = self.stored.run.spec
        plain = {"temperature", "top_p", "top_k", "max_new_tokens"}
        others = {name: str(value) for name, value in spec.sampling if name not in plain}
        more = {"shots": str(spec.shots), "mode": spec.mode, "forced": str(spec.forced or "")}
        return {
            "generation_args": {
                "temperature": spec.sampling.temperature,
                "top_p": spec.sampling.top_p,
                "top_k": spec.sampling.top_k,
                "max_tokens": spec.sampling.max_new_tokens,
                "execution_command": self.stored.run.made.command,
            },
            "additional_details": {**others, **more},
        }

    @cached_property
    def samples(self) -> list[JsonRow]:
        """The examples that have a score: the schema knows no others."""
        found = ((row, self.stored.score(row)) for row in self.stored.rows if not row.get(FAULT))
        return [self._sample(row, score) for row, score in found if score is not None]

    def _sample(self, row: JsonRow, score: float) -> JsonRow:
        asked, reference = self.stored.asked(row), self.stored.reference(row)
        best = 0.0 if self.stored.facts.lower_is_better else float(UNITS[self.metric.unit][1] or 1)
        scores = {f"score.{name}": str(value) for name, value in row.get("scores", {}).items()}
        return {
            "schema_version": VERSION,
            "evaluation_id": self.evaluation_id,
            "model_id": self.model_id,
            "evaluation_name": self.stored.run.spec.task,
            "evaluation_result_id": self.result_id,
            "sample_id": row["id"],
            "sample_hash": hashlib.sha256("".join([asked, *reference]).encode()).hexdigest(),
            "interaction_type": "single_turn",
            "input": {"raw": asked, "reference": reference},
            "output": {"raw": [str(response["text"]) for response in responses(row)]},
            "messages": None,
            "answer_attribution": [],
            "evaluation": {"score": score, "is_correct": score == best},
            "metadata": scores,
        }


def _in_words(metric: Metric) -> str:
    """A metric beside the headline."""
    value = "no score" if metric.n == 0 else f"{metric.value!r}"
    between = "" if metric.low is None or metric.high is None else f" [{metric.low!r}, {metric.high!r}]"
    return f"{value}{between} {metric.unit}" + ("" if metric.n is None else f", n {metric.n}")


def then(written: Sequence[str]) -> tuple[str, ...]:
    """What is left to do."""
    return (f"then: fill in `source_organization_name` and `evaluator_relationship` in {written[0]}",)


FORMAT = Format("Every Eval Ever's record and _samples.jsonl, under data/", files, then)
