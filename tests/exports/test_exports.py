"""Finished runs in the files of other tools, against what is stored."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from proxytune.config import Sampling, System
from proxytune.exports import FORMATS
from proxytune.exports.stored import StoredRun, in_path
from proxytune.records import Metric, Run
from proxytune.results import read_rows, read_run
from tests.support import made_runs, reports
from tests.support.command_line import proxytune, refused
from tests.support.require import require_or_skip

UUID4 = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
RESPONSES = made_runs.response(" 3 nuts, I think")
ROWS: list[dict[str, Any]] = [
    {"question": "1 + 2?", "answer": "3", "scores": {"exact_match": 1.0}, "responses": RESPONSES},
    {
        "question": 'Is "2", or\n3 \u202e?',
        "answer": "4",
        "scores": {"exact_match": 0.0},
        "responses": RESPONSES,
    },
    {"question": "Who?", "answer": "4", "fault": "nan", "scores": {}, "responses": RESPONSES},
]


def run_of(folder: Path, rows: list[dict[str, Any]] = ROWS, **spec: Any) -> Path:
    """A finished run with an interval and times."""
    path = made_runs.write(folder, rows, **spec)
    run = read_run(path)
    metric = next(iter(run.metrics.values())).model_copy(update={"low": 0.1, "high": 0.9, "n": 2})
    times = {"started": "2026-11-28T10:00:00+00:00", "finished": "2026-11-28T10:01:00+00:00"}
    changed = run.model_copy(update={**times, "metrics": {run.headline: metric}})
    (path / "run.json").write_text(changed.model_dump_json())
    return path


def exported(kind: str, run: Path, out: Path) -> list[Path]:
    """The files that the command says it wrote."""
    done = proxytune("export", kind, run, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    return [Path(path) for path in json.loads(done.stdout)["written"]]


def test_csv_has_a_line_per_example_with_its_scores(tmp_path: Path) -> None:
    [path] = exported("csv", run_of(tmp_path / "run", alpha="0.5"), tmp_path)
    lines = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))
    assert [line["question"] for line in lines] == [row["question"] for row in ROWS]
    assert [line["score.exact_match"] for line in lines] == ["1.0", "0.0", ""]
    assert [line["fault"] for line in lines] == ["", "", "nan"]
    assert list(lines[0]) == [
        *("run.system", "run.task", "run.as", "run.alpha", "id", "question", "answer", "fault"),
        *("score.exact_match", "response.text", "response.finish_reason", "response.tokens"),
    ]
    first = lines[0]
    assert (first["run.system"], first["run.as"], first["run.alpha"]) == ("made", "proxy", "0.5")
    assert first["response.text"] == " 3 nuts, I think"


@pytest.mark.parametrize(
    ("role", "models"),
    [
        ("base", {"base": "b"}),
        ("expert", {"expert": "e"}),
        ("antiexpert", {"antiexpert": "a"}),
        ("tuned", {"tuned": "t"}),
        ("proxy", {"base": "b", "expert": "e", "antiexpert": "a"}),
    ],
)
def test_a_run_names_the_models_that_its_role_decodes_with(
    tmp_path: Path, role: str, models: dict[str, str]
) -> None:
    record, _ = exported("every_eval_ever", run_of(tmp_path / "run", role=role), tmp_path)
    details = json.loads(record.read_text())["model_info"]["additional_details"]
    named = {name: details[name] for name in ("base", "expert", "antiexpert", "tuned") if name in details}
    assert named == models and ("alpha" in details) == (role == "proxy")


def test_csv_has_the_first_of_several_samples(tmp_path: Path) -> None:
    several = [*made_runs.response("first"), *made_runs.response("second")]
    [path] = exported("csv", run_of(tmp_path / "run", [{"responses": several}]), tmp_path)
    [line] = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
    assert line["response.text"] == "first"


def test_csv_has_lists_as_json(tmp_path: Path) -> None:
    [path] = exported("csv", run_of(tmp_path / "run", [{"answers": ["a", "b"]}]), tmp_path)
    [line] = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
    assert json.loads(line["answers"]) == ["a", "b"]


@pytest.mark.parametrize("kind", ["csv", "every_eval_ever"])
def test_half_a_surrogate_pair_is_written_out(kind: str, tmp_path: Path) -> None:
    row = {"question": "half \ud83d", "scores": {"exact_match": 1.0}, "responses": RESPONSES}
    *_, path = exported(kind, run_of(tmp_path / "run", [row]), tmp_path)
    assert "half " in path.read_text(encoding="utf-8") and "ud83d" in path.read_text(encoding="utf-8")


def test_every_eval_ever_says_what_the_run_says(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run")
    record, samples = exported("every_eval_ever", run, tmp_path)
    place = rf"data/gsm/proxytune/made-proxy/{UUID4}"
    assert re.fullmatch(rf"{place}\.json", record.relative_to(tmp_path).as_posix())
    found: dict[str, Any] = json.loads(record.read_text())
    assert found["schema_version"] == "0.3.0" and found["evaluation_timestamp"] == read_run(run).started
    assert found["evaluation_id"] == "gsm/proxytune_made-proxy/1795860060.0"
    assert found["retrieved_timestamp"] == "1795860060.0"
    assert found["source_metadata"]["source_type"] == "evaluation_run"
    assert found["eval_library"]["name"] == "proxytune" and found["eval_library"]["version"] == "0"
    details = found["model_info"]["additional_details"]
    models = {"base": "b", "expert": "e", "antiexpert": "a"}
    assert {name: details[name] for name in models} == models and "tuned" not in details
    assert (details["role"], details["alpha"]) == ("proxy", "1")
    [result] = found["evaluation_results"]
    assert result["score_details"]["score"] == 0.5
    uncertainty = result["score_details"]["uncertainty"]
    interval = uncertainty["confidence_interval"]
    assert (interval["lower"], interval["upper"], interval["confidence_level"]) == (0.1, 0.9, 0.95)
    assert uncertainty["num_samples"] == 2
    metric = result["metric_config"]
    assert (metric["metric_name"], metric["lower_is_better"]) == ("exact_match", False)
    assert (metric["metric_unit"], metric["min_score"], metric["max_score"]) == ("proportion", 0, 1)
    assert result["source_data"]["source_type"] == "other"

    detailed = found["detailed_evaluation_results"]
    assert re.fullmatch(rf"{place}_samples\.jsonl", detailed["file_path"])
    assert (tmp_path / detailed["file_path"]) == samples
    assert detailed["checksum"] == hashlib.sha256(samples.read_bytes()).hexdigest()
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(lines) == detailed["total_rows"] == 2, "an example without a score is none of the schema's"
    assert detailed["additional_details"] == {"examples_without_a_score": "1"}
    for line, row in zip(lines, read_rows(run), strict=False):
        assert line["evaluation_id"] == found["evaluation_id"] and line["sample_id"] == row["id"]
        assert line["evaluation_result_id"] == result["evaluation_result_id"]
        assert line["input"] == {"raw": row["question"], "reference": [row["answer"]]}
        assert line["output"] == {"raw": [" 3 nuts, I think"]} and line["messages"] is None
        right = row["scores"]["exact_match"]
        assert line["evaluation"] == {"score": right, "is_correct": right == 1.0}
    every = [
        value for part in (details, found["eval_library"]["additional_details"]) for value in part.values()
    ]
    assert all(isinstance(value, str) for value in every), "the schema has texts as details"


def rich(folder: Path, **spec: Any) -> Path:
    """A run whose figures and settings are all different."""
    sampling = Sampling(temperature=0.5, top_p=0.75, top_k=4, max_new_tokens=77, n=3, seed=5, stop=("x",))
    path = made_runs.write(folder, ROWS, **spec)
    run = read_run(path)
    metrics = {
        "length": Metric(value=12.5, unit="number", n=3),
        "exact_match": Metric(value=0.5, low=0.25, high=0.75, n=2),
        "none": Metric(value=0.0, n=0),
    }
    made = run.made.model_copy(update={"proxytune": "1.2", "git_commit": "abc", "packages": {"torch": "2"}})
    changed = run.model_copy(update={
        "started": "2026-11-28T10:00:00+00:00", "finished": None, "metrics": metrics, "judge": "gpt",
        "made": made.model_copy(update={"command": "eval gsm"}),
        "spec": run.spec.model_copy(update={
            "sampling": sampling, "shots": 2, "forced": " So", "data_sha256": "77",
        }),
    })  # fmt: skip
    (path / "run.json").write_text(changed.model_dump_json())
    return path


def test_every_field_of_a_record_of_every_eval_ever(tmp_path: Path) -> None:
    """Against the schema's own words: what it asks and a run does not know is `unknown` or `other`."""
    run = rich(tmp_path / "run")
    record, samples = exported("every_eval_ever", run, tmp_path)
    found = json.loads(record.read_text())
    [result] = found.pop("evaluation_results")
    detailed = found.pop("detailed_evaluation_results")
    library = {"name": "proxytune", "version": "1.2"}
    assert found == {
        "schema_version": "0.3.0", "evaluation_id": "gsm/proxytune_made-proxy/1795860000.0",
        "evaluation_timestamp": "2026-11-28T10:00:00+00:00", "retrieved_timestamp": "1795860000.0",
        "source_metadata": {
            "source_name": "proxytune", "source_type": "evaluation_run",
            "source_organization_name": "unknown", "evaluator_relationship": "other",
        },
        "eval_library": {**library, "additional_details": {"torch": "2", "git_commit": "abc"}},
        "model_info": {
            "name": "made-proxy", "id": "proxytune/made-proxy", "developer": "proxytune",
            "inference_engine": library,
            "additional_details": {
                "deployment_type": "self_deployed", "model_availability": "unknown", "role": "proxy",
                "alpha": "1", "base": "b", "antiexpert": "a", "expert": "e",
            },
        },
    }  # fmt: skip
    assert (detailed["format"], detailed["hash_algorithm"]) == ("jsonl", "sha256")
    others = result["generation_config"].pop("additional_details")
    assert (others["n"], others["seed"], others["shots"], others["mode"]) == ("3", "5", "2", "generate")
    assert (
        others["forced"] == " So" and not {"temperature", "top_p", "top_k", "max_new_tokens"} & others.keys()
    )
    assert result == {
        "evaluation_result_id": "gsm.exact_match", "evaluation_name": "gsm",
        "source_data": {
            "dataset_name": "generated", "source_type": "other",
            "additional_details": {"sha256": "77", "items": "3"},
        },
        "evaluation_timestamp": "2026-11-28T10:00:00+00:00",
        "metric_config": {
            "metric_id": "proxytune.gsm.exact_match", "metric_name": "exact_match",
            "metric_unit": "proportion",
            "lower_is_better": False, "score_type": "continuous", "min_score": 0, "max_score": 1,
            "additional_details": {"judge": "gpt"},
        },
        "score_details": {
            "score": 0.5, "details": {"length": "12.5 number, n 3", "none": "no score share, n 0"},
            "uncertainty": {
                "num_samples": 2, "num_bootstrap_samples": 2000,
                "confidence_interval": {
                    "lower": 0.25, "upper": 0.75, "confidence_level": 0.95,
                    "method": "percentile bootstrap over examples",
                },
            },
        },
        "generation_config": {"generation_args": {
            "temperature": 0.5, "top_p": 0.75, "top_k": 4, "max_tokens": 77, "execution_command": "eval gsm",
        }},
    }  # fmt: skip
    [first, second] = [json.loads(line) for line in samples.read_text().splitlines()]
    hashed = hashlib.sha256("".join(["1 + 2?", "3"]).encode()).hexdigest()
    assert first == {
        "schema_version": "0.3.0", "evaluation_id": found["evaluation_id"],
        "model_id": "proxytune/made-proxy",
        "evaluation_name": "gsm", "evaluation_result_id": "gsm.exact_match", "sample_id": "0",
        "sample_hash": hashed, "interaction_type": "single_turn",
        "input": {"raw": "1 + 2?", "reference": ["3"]}, "output": {"raw": [" 3 nuts, I think"]},
        "messages": None, "answer_attribution": [], "evaluation": {"score": 1.0, "is_correct": True},
        "metadata": {"score.exact_match": "1.0"},
    }  # fmt: skip
    assert second["sample_hash"] != hashed


@pytest.mark.parametrize(
    ("metric", "config", "uncertainty", "right"),
    [
        (Metric(value=50.0, unit="percent"), ("percent", 100), {"num_samples": 2}, 100.0),
        (Metric(value=12.5, low=1.0, unit="number"), ("number", None), {"num_samples": 2}, 1.0),
    ],
)
def test_units_of_every_eval_ever(
    metric: Metric, config: tuple[str, int | None], uncertainty: Any, right: float, tmp_path: Path
) -> None:
    rows = [{"scores": {"exact_match": score}, "responses": RESPONSES} for score in (right, right / 2)]
    path = made_runs.write(tmp_path / "run", rows, data="hub")
    run = read_run(path).model_copy(
        update={"metrics": {"exact_match": metric}, "started": "2026-11-28T10:00:00"}
    )
    (path / "run.json").write_text(run.model_dump_json())
    record, samples = exported("every_eval_ever", path, tmp_path)
    [result] = json.loads(record.read_text())["evaluation_results"]
    own = result["metric_config"]
    assert (own["metric_unit"], own.get("max_score")) == config and "additional_details" not in own
    assert result["score_details"]["uncertainty"] == uncertainty
    assert result["source_data"] == {
        "dataset_name": "openai/gsm8k", "source_type": "hf_dataset", "hf_repo": "openai/gsm8k",
        "hf_split": "test", "samples_number": 2,
    }  # fmt: skip
    assert json.loads(record.read_text())["retrieved_timestamp"] == "1795860000.0", (
        "a time without a zone is UTC"
    )
    found = [json.loads(line)["evaluation"]["is_correct"] for line in samples.read_text().splitlines()]
    assert found == [True, False]


def test_alpaca_eval_gets_both_sides(tmp_path: Path) -> None:
    rows = [
        {
            "dataset": "d",
            "instruction": "Do",
            "output_1": "base",
            "output_2": "ours",
            "generator_1": "davinci",
        },
        {"instruction": "Do more", "output_1": "b", "output_2": "o"},
    ]
    run = run_of(tmp_path / "run", rows, metric="unjudged", task="alpaca_farm", role="tuned")
    ours, theirs = exported("alpaca_eval", run, tmp_path)
    assert (ours.name, theirs.name) == ("model_outputs.json", "reference_outputs.json")
    assert json.loads(ours.read_text()) == [
        {"dataset": "d", "instruction": "Do", "output": "ours", "generator": "made-tuned"},
        {"dataset": "", "instruction": "Do more", "output": "o", "generator": "made-tuned"},
    ]
    assert json.loads(theirs.read_text()) == [
        {"dataset": "d", "instruction": "Do", "output": "base", "generator": "davinci"},
        {"dataset": "", "instruction": "Do more", "output": "b", "generator": ""},
    ]
    then = FORMATS["alpaca_eval"].then(["a b.json", "c.json"])
    assert then[0] == "then: alpaca_eval --model_outputs 'a b.json' --reference_outputs c.json"


def test_what_a_stored_run_knows_of_its_models_and_rows() -> None:
    api = {"api": "http://127.0.0.1:9/v1", "model": "m"}
    experts = [{"model": "e", "adapter": "x"}, {"adapter": "y"}]
    system = {"name": "a b/c", "base": api, "experts": experts, "antiexpert": {"model": "n"}}
    run = read_run_of(system, "proxy")
    found = StoredRun(run, ())
    assert found.name == "a-b-c-proxy" and found.models == {
        "base": "m at http://127.0.0.1:9/v1", "antiexpert": "n", "expert": "e with adapter x", "expert1": "y",
    }  # fmt: skip
    assert StoredRun(read_run_of(system, "expert"), ()).models == {
        "expert": "e with adapter x",
        "expert1": "y",
    }
    assert found.reference({"answer": "", "answers": ["a", 3]}) == ["a", "3"] and found.reference({}) == []
    assert found.score({"scores": {"exact_match": 0}}) == 0.0 and found.score({"scores": {}}) is None
    assert [in_path(text) for text in ("a/b c", "..", "-x.", "a=1,b+2_c")] == [
        "a-b-c",
        "unnamed",
        "x",
        "a=1,b+2_c",
    ]


def read_run_of(system: dict[str, Any], role: Any) -> Run:
    """A run of a system."""
    usual = reports.run("base", 0.5)
    spec = usual.spec.model_copy(update={"system": System.model_validate(system), "role": role})
    return usual.model_copy(update={"spec": spec})


def test_every_eval_ever_is_the_same_again_and_its_names_differ_by_run(tmp_path: Path) -> None:
    one = run_of(tmp_path / "one")
    first = exported("every_eval_ever", one, tmp_path)
    content = [path.read_bytes() for path in first]
    assert exported("every_eval_ever", one, tmp_path) == first
    assert [path.read_bytes() for path in first] == content
    half = exported("every_eval_ever", run_of(tmp_path / "half", alpha="0.5"), tmp_path)
    assert half[0].parent == first[0].parent and half[0] != first[0]


def test_a_bad_score_counts_as_bad_where_less_is_better(tmp_path: Path) -> None:
    rows = [{"text": "t", "is_toxic": verdict, "scores": {"women": verdict}} for verdict in (0.0, 1.0)]
    run = run_of(tmp_path / "run", rows, metric="overall", task="toxigen")
    record, samples = exported("every_eval_ever", run, tmp_path)
    assert json.loads(record.read_text())["evaluation_results"][0]["metric_config"]["lower_is_better"]
    lines = [json.loads(line)["evaluation"] for line in samples.read_text().splitlines()]
    assert lines == [{"score": 0.0, "is_correct": True}, {"score": 1.0, "is_correct": False}]


def test_a_task_of_ones_own_is_exported_without_its_file(tmp_path: Path) -> None:
    rows = [{"ask": "Where?", "answer": "Rome", "scores": {"miss": 1.0}, "responses": RESPONSES}]
    facts = {"asked": "ask", "lower_is_better": True, "file": "gone.py"}
    run = run_of(tmp_path / "run", rows, metric="miss", task="mine-12345678", facts=facts)
    record, samples = exported("every_eval_ever", run, tmp_path)
    [line] = [json.loads(line) for line in samples.read_text().splitlines()]
    assert line["input"] == {"raw": "Where?", "reference": ["Rome"]} and not line["evaluation"]["is_correct"]
    assert record.parts[-4] == "mine-12345678"


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run")
    refused(proxytune("export", "cvs", run), "Unknown format 'cvs'", "Did you mean: csv")
    refused(proxytune("export", "csv", tmp_path), "no run in")
    refused(proxytune("export", "csv", run, "--out", tmp_path / "no"), "no folder")
    unjudged = run_of(tmp_path / "unjudged", [{"text": "t"}], metric="unjudged", task="toxigen")
    refused(proxytune("export", "every_eval_ever", unjudged), "no score", "judge it")
    refused(proxytune("export", "alpaca_eval", run), "holds a run of 'gsm'")
    running = read_run(run).model_copy(update={"status": "running"})
    (run / "run.json").write_text(running.model_dump_json())
    for kind in FORMATS:
        if kind != "inspect":
            refused(proxytune("export", kind, run), "is not finished")


def test_without_inspect_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, find = run_of(tmp_path / "run"), importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "inspect_ai" else find(name, *more)
    )
    refused(proxytune("export", "inspect", run), "pip install 'proxytune[inspect]'")
    assert {path.name for path in run.iterdir()} == {"run.json", "predictions.jsonl"}


def test_inspect_reads_its_log(tmp_path: Path) -> None:
    if importlib.util.find_spec("inspect_ai") is None:
        require_or_skip(
            "inspect", "inspect_ai is not installed (an environment of its own: proxytune[inspect])"
        )
    from inspect_ai.log import read_eval_log

    run = run_of(tmp_path / "run")
    done = proxytune("export", "inspect", run)
    assert done.exit_code == 0 and "inspect view --log-dir" in done.stdout
    log = read_eval_log(str(run / "gsm_made-proxy.eval"))
    assert (log.status, log.eval.task, log.eval.model) == ("success", "gsm", "proxytune/made-proxy")
    assert log.results is not None and log.samples is not None
    [score] = log.results.scores
    assert {name: metric.value for name, metric in score.metrics.items()} == {
        "mean": 0.5,
        "ci95_low": 0.1,
        "ci95_high": 0.9,
    }
    assert (score.scored_samples, score.unscored_samples) == (2, 1)
    for sample, row in zip(log.samples, read_rows(run), strict=True):
        assert (sample.id, sample.input, sample.target) == (row["id"], row["question"], [row["answer"]])
        assert sample.output.completion == " 3 nuts, I think"
        assert {name: found.value for name, found in (sample.scores or {}).items()} == row["scores"]
        assert sample.output.error == row.get("fault")
