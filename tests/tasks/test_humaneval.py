"""HumanEval: prompts, what is cut from responses, pass@k, and completions that are run against the tests."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxytune.config import System
from proxytune.errors import UserError
from proxytune.options import RunOptions
from proxytune.records import Completion, JsonRow, Prompt
from proxytune.runs import evaluation as run
from proxytune.runs.decoders import decoder_here
from proxytune.runs.session import run_job
from proxytune.sandbox import NOT_APART
from proxytune.sandbox.sandbox import Sandbox
from proxytune.tasks import get_task, humaneval, read_source, score_file
from proxytune.tasks.scoring.rules import clean_code, pass_at_k
from proxytune.tasks.task import Execution
from tests.support.answers import jsonl
from tests.support.command_line import proxytune
from tests.support.published import HUMANEVAL
from tests.support.runs import QUIET
from tests.support.tiers import WHOLE

TASK = get_task("humaneval")
ADD = {
    "task_id": "HumanEval/0",
    "prompt": "def add(a, b):\n",
    "entry_point": "add",
    "test": "def check(f):\n    assert f(1, 2) == 3\n    assert f(0, 0) == 0\n",
    "canonical_solution": "    return a + b\n",
}
SLOW = "    import time; time.sleep(1)\n    return a + b"


@pytest.fixture(scope="module")
def problems(reference: Path) -> dict[str, JsonRow]:
    """The 164 problems."""
    with gzip.open(reference / "data" / "humaneval" / "HumanEval.jsonl.gz", "rt") as file:
        return {row["task_id"]: row for row in map(json.loads, file)}


def completed(*texts: str) -> list[Completion]:
    """Completions with these texts."""
    empty = Completion(example_id="0", sample=0, text="", token_ids=(), finish_reason="eos", logprob=0.0)
    return [replace(empty, sample=i, text=text) for i, text in enumerate(texts)]


# Prompts and settings


def test_prompts_are_the_problems_verbatim(reference: Path, problems: dict[str, JsonRow]) -> None:
    path = reference / "data" / "humaneval" / "HumanEval.jsonl.gz"
    examples = read_source(TASK, str(path)).examples
    assert len(examples) == 164 and [example.id for example in examples] == list(problems)
    for example in examples:
        text = problems[example.id]["prompt"]
        assert example.prompt == Prompt(plain=text, user=text)
    for name in HUMANEVAL:
        folder = reference / "golden" / "codex_humaneval" / name
        assert examples[0].prompt.plain == (folder / "example_prompt.txt").read_text(encoding="utf-8")
        with gzip.open(folder / "predictions.jsonl.gz", "rt", encoding="utf-8") as file:
            stored = [json.loads(line) for line in file]
        assert [row["prompt"] for row in stored] == [e.prompt.plain for e in examples for _ in range(20)]


def test_settings_are_the_papers() -> None:
    s = TASK.sampling
    assert (s.n, s.temperature, s.top_p, s.max_new_tokens) == (20, 0.8, 0.95, 512)
    assert s.stop == ("\nclass", "\ndef", "\n#", "\nif", "\nprint") and s.ban == ("pass", "...")


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder with the hub's columns stands for the hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "he").mkdir()
    datasets.Dataset.from_list([ADD]).to_parquet(tmp_path / "he" / "test.parquet")
    assert TASK.hub is not None and TASK.hub.id == "openai/openai_humaneval"
    local = replace(TASK, hub=replace(TASK.hub, id=str(tmp_path / "he")))
    assert (
        read_source(local, "hub").examples
        == read_source(TASK, str(jsonl(tmp_path / "t.jsonl", [ADD]))).examples
    )


# Post-processing


@pytest.mark.parametrize(
    ("raw", "stored"),
    [
        ("    return 1\n\n\n", "    return 1"),
        ("    x = 1\n    print(x)\n    return x", "    x = 1\n    return x"),
        ("    assert x\n    return 1\n  \tassert y  ", "    return 1"),
        ("    printed = 1\n    assertion = 2\n    return x # print", "    return x # print"),
        ("    return 1\nprint('a')\nassert f() == 1", "    return 1"),
        ("print", ""),
        ("  \n  return 1  \n", "  \n  return 1"),
        ("    x = (1,\n    assert_(2))", "    x = (1,"),
        ("    return 1\r\n    print(2)\r\n", "    return 1"),
    ],
)
def test_code_is_cleaned_as_in_the_paper(raw: str, stored: str) -> None:
    assert clean_code(raw) == stored
    example = read_source_one()
    assert TASK.row(example, completed(raw, raw))["completions"] == [stored, stored]


def read_source_one() -> Any:
    """The example of ADD."""
    table = humaneval.DataTable("'t'", "line", (ADD,), (1,))
    return TASK.examples(table, "")[0]


def test_golden_completions_are_clean_already(reference: Path) -> None:
    for name in HUMANEVAL:
        path = reference / "golden" / "codex_humaneval" / name / "predictions.jsonl.gz"
        with gzip.open(path, "rt", encoding="utf-8") as file:
            texts = [json.loads(line)["completion"] for line in file]
        assert [clean_code(text) for text in texts] == texts


# Scores


@pytest.mark.parametrize(
    ("n", "passed"), [(20, 0), (20, 1), (20, 7), (20, 10), (20, 11), (20, 20), (10, 1), (200, 3)]
)
def test_pass_at_k_is_the_share_of_subsets(n: int, passed: int) -> None:
    for k in (1, 10):
        product = 1 - math.prod(1 - k / i for i in range(n - passed + 1, n + 1)) if n - passed >= k else 1.0
        assert pass_at_k(n, passed, k) == pytest.approx(product, abs=1e-12)
    assert pass_at_k(n, passed, 1) == pytest.approx(passed / n)


def test_pass_at_k_wants_k_samples() -> None:
    assert pass_at_k(9, 9, 10) is None
    row = {"completions": [""] * 9, "passed": [True] * 3 + [False] * 6}
    assert TASK.scores(row) == {"pass@1": pytest.approx(1 / 3)}
    metrics = TASK.metrics([row])
    assert TASK.headline_of(metrics) == "pass@1"


def test_rows_that_were_not_run_have_no_score() -> None:
    metrics = TASK.metrics([{"completions": ["a"]}, {"completions": ["a"], "passed": [True]}])
    assert (metrics["not_run"].value, metrics["not_run"].n) == (0.5, 2)
    assert (metrics["pass@1"].value, metrics["pass@1"].n) == (1, 1)
    for none in (None, math.nan, "yes"):
        row = {"completions": ["a", "b"], "passed": [True, none]}
        assert TASK.scores(row) == {"not_run": 1.0}
    assert TASK.headline_of(TASK.metrics([{"completions": ["a"]}])) == "not_run"


def test_samples_of_a_problem_are_put_together(tmp_path: Path) -> None:
    base = {"task_id": "a", "prompt": "p"}
    rows = [{**base, "completion": "x", "passed": True}, {**base, "completion": "y", "passed": False}]
    rows += [{**base, "task_id": "b", "completion": "x", "passed": False}]
    report = score_file(TASK, jsonl(tmp_path / "p.jsonl", rows))
    assert report.n == 2 and report.metrics["pass@1"].value == 0.25 and report.execution is None
    with pytest.raises(UserError, match="line 2: no field 'completion' that is text"):
        score_file(TASK, jsonl(tmp_path / "q.jsonl", [rows[0], base]))
    with pytest.raises(UserError, match="line 1: no field 'task_id'"):
        score_file(TASK, jsonl(tmp_path / "r.jsonl", [{"completion": "x"}]))


def test_a_metric_says_how_many_problems_it_is_over(tmp_path: Path) -> None:
    """Ten samples of one problem and two of another: pass@10 is of the first alone."""
    rows = [{"task_id": "a", "completion": str(i), "passed": i == 0} for i in range(10)]
    rows += [{"task_id": "b", "completion": str(i), "passed": False} for i in range(2)]
    report = score_file(TASK, jsonl(tmp_path / "samples.jsonl_results.jsonl", rows))
    found = {name: (metric.value, metric.n) for name, metric in report.metrics.items()}
    assert report.n == 2 and found == {"pass@10": (1, 1), "pass@1": (pytest.approx(0.05), 2)}
    shown = proxytune("score", "humaneval", tmp_path / "samples.jsonl_results.jsonl").stdout.splitlines()
    assert [line.split()[-4:] for line in shown if "pass@10" in line] == [["over", "1", "of", "2"]]
    assert not any("of 2" in line for line in shown if "pass@1 " in line)
    rows[3]["passed"] = None
    part = score_file(TASK, jsonl(tmp_path / "part.jsonl", rows))
    assert {name: (metric.value, metric.n) for name, metric in part.metrics.items()} == {
        "not_run": (0.5, 2),
        "pass@1": (0, 1),
    }


def test_samples_in_the_benchmarks_own_form(box: Sandbox, tmp_path: Path) -> None:
    """Its files name the problem and the completion; a verdict beside a sample counts as a stored one."""
    rows: list[JsonRow] = [
        {"task_id": ADD["task_id"], "completion": text} for text in ("    return a + b", "    return 0")
    ]
    assert score_file(TASK, jsonl(tmp_path / "s.jsonl", rows)).headline == "not_run"
    execution = Execution(box, {ADD["task_id"]: ADD})
    report = score_file(TASK, tmp_path / "s.jsonl", execution)
    assert report.metrics["pass@1"].value == 0.5 and execution.compared == 0
    rows[1]["passed"] = False
    again = Execution(box, {ADD["task_id"]: ADD})
    assert score_file(TASK, jsonl(tmp_path / "r.jsonl", rows), again).metrics == report.metrics
    assert (again.compared, again.flips) == (1, 0)


@pytest.mark.parametrize("name", HUMANEVAL)
def test_golden_scores_from_stored_flags(reference: Path, name: str) -> None:
    folder = reference / "golden" / "codex_humaneval" / name
    report = score_file(TASK, folder / "predictions_results.jsonl.gz")
    stored = json.loads((folder / "metrics.json").read_text())["pass@10"]
    assert report.n == 164 and report.headline == "pass@10"
    found = report.metrics["pass@10"]
    assert found.value == pytest.approx(stored, abs=1e-12)
    assert report.metrics["pass@1"].value == pytest.approx(HUMANEVAL[name], abs=1e-12)
    assert found.low is not None and found.high is not None and found.low < stored < found.high


# Running


def test_completions_are_run(box: Sandbox) -> None:
    texts = ["    return a + b", "    return a - b", "    return", "    import os; os._exit(0)", "  retur ("]
    execution = Execution(box, {ADD["task_id"]: ADD})
    (row,) = humaneval.execute(
        [{"task_id": ADD["task_id"], "prompt": ADD["prompt"], "completions": texts}], execution
    )
    assert row["passed"] == [True, False, False, False, False] and row["result"][0] == "passed"
    assert row["result"][1] == "failed: AssertionError: " and "SyntaxError" in row["result"][4]
    counted = {"samples": 5, "passed": 1}
    none = dict.fromkeys(("timed_out", "broken", "in_process", "lost", "compared", "rerun", "flips"), 0)
    assert execution.report() == {"sandbox": box.backend, **counted, **none}


def test_a_sample_cannot_choose_where_it_is_judged(box: Sandbox) -> None:
    """A test that passes a function needs the sample's process, where it could forge; nothing else does."""
    asks = f"""    pass
import json, os, struct
text = json.dumps({NOT_APART!r}).encode()
for fd in range(3, 64):
    try: os.write(fd, struct.pack("!I", len(text)) + text)
    except OSError: pass
"""
    equal = "class E:\n    def __eq__(self, other): return True\ndef add(a, b): return E()\n"
    row = {"task_id": ADD["task_id"], "prompt": ADD["prompt"], "completions": [asks + equal]}
    execution = Execution(box, {ADD["task_id"]: ADD})
    (found,) = humaneval.execute([row], execution)
    assert found["passed"] == [False] and execution.in_process == 0
    given = {**ADD, "test": "def check(f):\n    assert f(len, 2)([1]) == 1\n"}
    execution = Execution(box, {ADD["task_id"]: given})
    (found,) = humaneval.execute([{**row, "completions": ["    return a", "    return b"]}], execution)
    assert found["passed"] == [True, False] and execution.in_process == 2


@pytest.mark.parametrize(
    ("prompt", "test", "apart"),
    [
        ("def f(x):\n", "def check(g):\n    assert g(1) is True\n", True),
        ("def f(x):\n", "def check(g):\n    y = [1]\n    assert g(y) is y\n", False),
        ("def f(x):\n", "def check(g):\n    assert helper(g(1))\n", False),
        ("def helper(x):\n    return x\ndef f(x):\n", "def check(g):\n    assert helper(g(1))\n", False),
        (
            'def helper(x):\n    return x\ndef f(x):\n    """."""\n',
            "def check(g):\n    assert helper(g(1))\n",
            True,
        ),
        ("class f:\n", "def check(g):\n    assert g(1).x\n", False),
        ("def f(x):\n", "def check(g:\n", False),
    ],
)
def test_which_tests_can_be_told_apart(prompt: str, test: str, apart: bool) -> None:
    assert (humaneval.check_apart(prompt, test, "f") is not None) == apart


def test_only_a_time_out_is_run_again(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(humaneval, "SECONDS", 0.4)
    monkeypatch.setattr(humaneval.program, "__defaults__", (0.4,))
    row = {
        "task_id": ADD["task_id"],
        "prompt": ADD["prompt"],
        "completions": [SLOW, SLOW, "    return 1", "    return a + b", "    return a + b"],
        "passed": [True, False, True, False, False],
        "result": ["passed", "timed out", "passed", "failed: x", "timed out"],
    }
    execution = Execution(box, {ADD["task_id"]: ADD})
    (found,) = humaneval.execute([row], execution)
    assert found["passed"] == [True, False, False, True, True] and found["result"][1] == "timed out"
    assert (execution.compared, execution.rerun, execution.flips) == (5, 2, 3)
    assert (execution.samples, execution.passed, execution.timed_out) == (5, 3, 1), "as it ended"


def test_rows_and_data_must_fit(box: Sandbox) -> None:
    row = {"task_id": "other", "prompt": "p", "completions": [""]}
    with pytest.raises(UserError, match="no problem 'other' in the data: name it with --data"):
        humaneval.execute([row], Execution(box, {}))
    with pytest.raises(UserError, match="the prompt of 'other' is not the one of the data"):
        humaneval.execute([row], Execution(box, {"other": ADD}))


def test_reference_solutions_pass_and_broken_ones_fail(box: Sandbox, problems: dict[str, JsonRow]) -> None:
    chosen = list(problems.values())[::8]
    rows = [
        {
            "task_id": item["task_id"],
            "prompt": item["prompt"],
            "completions": [item["canonical_solution"], ""],
        }
        for item in chosen
    ]
    found = humaneval.execute(rows, Execution(box, problems))
    assert [row["passed"] for row in found] == [[True, False]] * len(chosen)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["codellama-7B-t0.8", "dexperts-13B-t0.8"])
def test_golden_runs_executed_anew(
    box: Sandbox, reference: Path, problems: dict[str, JsonRow], name: str, tmp_path: Path
) -> None:
    """Every published verdict again: of all samples with PROXYTUNE_WHOLE=1, else of one problem in 20."""
    folder = reference / "golden" / "codex_humaneval" / name
    rows = gzip.decompress((folder / "predictions_results.jsonl.gz").read_bytes()).splitlines(keepends=True)
    chosen = rows if WHOLE else [row for at, row in enumerate(rows) if at // 20 % 20 == 0]
    (tmp_path / "chosen.jsonl").write_bytes(b"".join(chosen))
    execution = Execution(box, problems)
    report = score_file(TASK, tmp_path / "chosen.jsonl", execution)
    assert (execution.samples, execution.compared, execution.flips) == (len(chosen), len(chosen), 0)
    if WHOLE:
        stored = json.loads((folder / "metrics.json").read_text())["pass@10"]
        assert len(chosen) == 3280 and report.metrics["pass@10"].value == pytest.approx(stored, abs=1e-12)


# End to end


def test_a_run_with_and_without_leave_to_execute(box: Sandbox, trio: System, tmp_path: Path) -> None:
    data = jsonl(tmp_path / "t.jsonl", [{**ADD, "task_id": f"HumanEval/{i}"} for i in range(2)])
    sampling = TASK.sampling.model_copy(update={"n": 10, "max_new_tokens": 4, "ban": ()})
    job = run.plan(trio, "humaneval", "proxy", RunOptions(data=str(data), sampling=sampling))
    from proxytune.models.roles import Models

    models = Models(trio)
    blind = run_job(job, tmp_path / "blind", decoder_here(models), QUIET)
    assert blind.headline == "not_run" and blind.metrics["not_run"].value == 1
    seen = run_job(job, tmp_path / "seen", decoder_here(models), QUIET, box)
    assert seen.headline == "pass@10" and seen.metrics["pass@10"].value == 0 and seen.n == 2

    path = tmp_path / "blind" / "predictions.jsonl"
    items = {example.id: example.target for example in job.data.examples}
    assert score_file(TASK, path, Execution(box, items)).metrics == seen.metrics
    assert score_file(TASK, tmp_path / "seen" / "predictions.jsonl").metrics == seen.metrics


def test_score_from_the_command_line(box: Sandbox, tmp_path: Path) -> None:
    data = jsonl(tmp_path / "problems.jsonl", [ADD])
    rows = [
        {"task_id": ADD["task_id"], "prompt": ADD["prompt"], "completion": text}
        for text in ("    return a + b", "")
    ]
    path = jsonl(tmp_path / "predictions.jsonl", rows)

    blind = proxytune("score", "humaneval", path, "--json")
    assert blind.exit_code == 0 and "--allow-code-execution runs it" in blind.stderr
    assert json.loads(blind.stdout)["metrics"]["not_run"]["value"] == 1

    options = ("--allow-code-execution", "--sandbox", box.backend)
    lost = proxytune("score", "humaneval", path, *options)
    assert lost.exit_code == 2 and "name it with --data FILE|hub" in lost.stderr
    seen = proxytune("score", "humaneval", path, "--data", data, "--json", *options)
    content = json.loads(seen.stdout)
    assert content["metrics"]["pass@1"]["value"] == 0.5 and content["execution"]["samples"] == 2
    summary = proxytune("score", "humaneval", path, "--data", data, *options).stdout
    assert "2 samples run, 1 passed, 0 timed out; 0 of 0 stored verdicts flipped" in summary
    none = proxytune("score", "gsm", path, *options)
    assert none.exit_code == 2 and "task 'gsm' runs no code" in none.stderr
