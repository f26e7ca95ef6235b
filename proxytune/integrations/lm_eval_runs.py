"""lm-eval's files of results as runs of ours, one per task, so that `proxytune report` shows them.

lm-eval's own figures are taken as they are. A figure that is a mean over documents gets our interval."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from proxytune import __version__
from proxytune.config import RunSpec, Sampling, System, parse_alpha
from proxytune.errors import UserError
from proxytune.integrations.lm_eval_requests import sampling_of
from proxytune.intervals import mean_metric
from proxytune.provenance import provenance
from proxytune.records import FAULT, Cost, JsonRow, Metric, Run
from proxytune.results import COST, PREDICTIONS, RUN, RunFolder, differences, folder_for, read_run, settings

PREFIX = "lm-eval:"
"""How the names of lm-eval's tasks begin in our runs."""


def write_runs(results: Path, root: Path) -> list[Path]:
    """Store every task of a file of results that a system gave (`results_*.json`, with its samples beside it)
    as a run under `root`. -> the runs' folders. A run of the same settings is replaced."""
    content = json.loads(results.read_text(encoding="utf-8"))
    folders = []
    for name in content["configs"]:
        task = _Evaluated(name, content, _samples(results, name))
        folder = _free(folder_for(root, task.spec, task.defaults), task.spec)
        _store(folder, task.rows, task.run)
        folders.append(folder)
    return folders


def _store(folder: Path, rows: Sequence[JsonRow], run: Run) -> None:
    """Write a whole run; one that is there goes first (lm-eval's own files keep it)."""
    for name in (RUN, PREDICTIONS, COST):
        (folder / name).unlink(missing_ok=True)
    begun = run.model_copy(update={"status": "running", "finished": None, "metrics": {}})
    with RunFolder.open(folder, begun) as opened:
        for row in rows:
            opened.append(row)
        opened.finish(run, [row["id"] for row in rows])


def _samples(results: Path, task: str) -> dict[int, dict[str, JsonRow]]:
    """Document -> filter -> what lm-eval stored of it."""
    stamp = re.search(r"\d{4}-\d\d-\d\dT.*$", results.stem)
    path = results.with_name(f"samples_{task}_{stamp[0] if stamp else ''}.jsonl")
    found: dict[int, dict[str, JsonRow]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["doc_id"], {})[row["filter"]] = row
    return found


def _free(folder: Path, spec: RunSpec) -> Path:
    """The folder, or one in it where it has a run of other settings (shots, a chat template, documents)."""
    try:
        taken = bool(differences(read_run(folder).spec, spec))
    except UserError:
        return folder  # no run, or none that can be read
    digest = hashlib.sha256(json.dumps(settings(spec), sort_keys=True).encode()).hexdigest()[:8]
    return folder / f"settings-{digest}" if taken else folder


@dataclass(frozen=True)
class _Evaluated:
    """One task of a file of results."""

    name: str
    content: Mapping[str, Any]
    samples: Mapping[int, Mapping[str, JsonRow]]

    @property
    def _model(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.content["config"]["proxytune"]
        return found

    @property
    def _generated(self) -> bool:
        return bool(self.content["configs"][self.name]["output_type"] == "generate_until")

    @property
    def spec(self) -> RunSpec:
        """Everything that decided the outputs."""
        counts = self.content["n-samples"][self.name]
        config = self.content["configs"][self.name]
        documents = [next(iter(by_filter.values()))["doc_hash"] for by_filter in self.samples.values()]
        form = [self.content.get("system_instruction"), bool(self.content.get("chat_template"))]
        form.append(self.content.get("fewshot_as_multiturn"))  # how they are asked, whoever is
        return RunSpec(
            task=f"{PREFIX}{self.name}",
            system=System.model_validate(self._model["system"]),
            role=self._model["role"],
            alpha=parse_alpha(self._model["alpha"]),
            sampling=sampling_of(config["generation_kwargs"], None) if self._generated else Sampling(),
            data=str(config.get("dataset_path") or self.name),
            data_sha256=hashlib.sha256(json.dumps([documents, form]).encode()).hexdigest(),
            limit=counts["effective"] if counts["effective"] < counts["original"] else None,
            shots=int(self.content["n-shot"].get(self.name) or 0),
            mode="generate" if self._generated else "likelihood",
        )

    @property
    def defaults(self) -> RunSpec:
        """The spec of the task as a whole under the system's own alpha."""
        spec = self.spec
        return spec.model_copy(update={"alpha": spec.system.alpha, "limit": None})

    @property
    def rows(self) -> list[JsonRow]:
        """One per document."""
        return [self._row(document, by_filter) for document, by_filter in self.samples.items()]

    def _row(self, document: int, by_filter: Mapping[str, JsonRow]) -> JsonRow:
        first = next(iter(by_filter.values()))
        asked = [list(arguments.values()) for arguments in first["arguments"].values()]
        if self._generated:
            responses: list[JsonRow] = [{"text": text} for texts in first["resps"] for text in texts]
        else:
            responses = [_likelihood(own, resps[0]) for own, resps in zip(asked, first["resps"], strict=True)]
        row: JsonRow = {"id": str(document), "prompt": asked[0][0], "target": first["target"]}
        row |= {"filtered": {name: one["filtered_resps"] for name, one in by_filter.items()}}
        if any("logprob" in response and response["logprob"] is None for response in responses):
            return {
                "id": row["id"],
                "prompt": row["prompt"],
                FAULT: "nan",
                "scores": {},
                "responses": responses,
            }
        scores = {
            _named(metric, name): float(one[metric])
            for name, one in by_filter.items()
            for metric in one["metrics"]
            if isinstance(one[metric], int | float) and math.isfinite(one[metric])
        }
        return {**row, "scores": scores, "responses": responses}

    @property
    def run(self) -> Run:
        """The finished run."""
        found = self.content["results"][self.name]
        rows = self.rows
        metrics: dict[str, Metric] = {}
        for key, value in found.items():
            metric, comma, chain = key.partition(",")
            if (
                comma
                and not metric.endswith("_stderr")
                and isinstance(value, int | float)
                and math.isfinite(value)
            ):
                name = _named(metric, chain)
                metrics[name] = _metric(
                    float(value), [r["scores"][name] for r in rows if name in r["scores"]]
                )
        if not metrics:
            raise UserError(f"lm-eval gave no figure for '{self.name}': its files have the responses")
        alone = len(self.content["configs"]) == 1
        shared = (
            () if alone else (f"{len(self.content['configs'])} tasks ran together: cost is not told apart",)
        )
        began = float(self.content["date"])
        ended = began + float(self.content["total_evaluation_time_seconds"])
        return Run(
            status="done",
            spec=self.spec,
            n=len(rows),
            metrics=metrics,
            headline=next(iter(metrics)),
            cost=Cost.model_validate(self._model.get("cost", {}) if alone else {}),
            notes=(f"lm-eval {self.content['lm_eval_version']}", *self._model["notes"], *shared),
            started=_time(began),
            finished=_time(ended),
            made=provenance(__version__, _device(), torch.get_num_threads()),
        )


def _likelihood(asked: Sequence[Any], answer: Any) -> JsonRow:
    """A scored text: its log-probability, null where it is no number. lm-eval stores numbers as texts."""
    logprob = float(answer[0] if isinstance(answer, list) else answer)
    return {"text": asked[-1], "logprob": logprob if math.isfinite(logprob) else None}


def _named(metric: str, chain: str) -> str:
    """A figure with the chain of filters before it, where there is one."""
    return metric if chain == "none" else f"{metric},{chain}"


def _metric(value: float, scores: Sequence[float]) -> Metric:
    """A figure of lm-eval's; with our interval where it is the mean of the documents' scores."""
    if scores and math.isclose(math.fsum(scores) / len(scores), value, abs_tol=1e-9):
        share = all(0 <= score <= 1 for score in scores)
        return mean_metric(scores).model_copy(update={} if share else {"unit": "number"})
    return Metric(value=value, unit="number", n=len(scores) or None)


def _device() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
