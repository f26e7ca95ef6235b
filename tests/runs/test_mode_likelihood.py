"""Multiple choice by likelihood: targets, mc1 and mc2 by hand, log-probabilities against full forwards."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from proxytune import results
from proxytune.config import load_system
from proxytune.errors import UserError
from proxytune.options import RunOptions
from proxytune.runs import evaluation as run
from proxytune.tasks import get_task, read_source, score_file
from proxytune.tasks.truthfulqa_mc import PRIMER
from tests.support import oracle, tiny, tiny_system
from tests.support.answers import json_list
from tests.support.command_line import proxytune
from tests.support.runs import evaluated, unfinish

TASK = get_task("truthfulqa_mc", "likelihood")
ITEM = {
    "question": "Where? ",
    "mc1_targets": {"Rome.": 1, "Oslo.": 0, "Bonn.": 0},
    "mc2_targets": {"Rome.": 1, "In Rome.": 1, "Oslo.": 0, "Bonn.": 0},
}


def test_the_benchmarks_form(tmp_path: Path) -> None:
    example = read_source(TASK, json_list(tmp_path / "mc_task.json", [ITEM])).examples[0]
    assert example.prompt.plain == "Q: Where?\nA:"
    assert TASK.continuations is not None
    assert TASK.continuations(example) == [" Rome.", " Oslo.", " Bonn.", " In Rome."]
    primed = read_source(TASK, str(tmp_path / "mc_task.json"), shots=6).examples[0].prompt
    assert primed.plain == "".join(PRIMER) + "Q: Where?\nA:" and primed.plain.count("\nA: ") == 6
    with pytest.raises(UserError, match="the primer of 'truthfulqa_mc' has 6 items"):
        read_source(TASK, str(tmp_path / "mc_task.json"), shots=7)


def test_targets_from_the_csv_and_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = (
        "Type",
        "Category",
        "Question",
        "Best Answer",
        "Correct Answers",
        "Incorrect Answers",
        "Source",
    )
    path = tmp_path / "t.csv"
    path.write_text(",".join(columns) + "\nt,c,Where? ,Rome.,Rome.; In Rome.,Oslo.; Bonn.,s\n")
    assert read_source(TASK, str(path)).examples[0].target == ITEM

    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    row: dict[str, Any] = {"question": ITEM["question"]}
    for name in ("mc1_targets", "mc2_targets"):
        row[name] = {"choices": list(ITEM[name]), "labels": list(ITEM[name].values())}  # type: ignore[attr-defined]
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "hub" / "validation.parquet")
    assert TASK.hub is not None and TASK.hub.config == "multiple_choice"
    local = replace(TASK, hub=replace(TASK.hub, id=str(tmp_path / "hub"), config=None))
    assert read_source(local, "hub").examples[0].target == ITEM


@pytest.mark.parametrize(
    "change",
    [
        {"mc1_targets": {"a": 1}},
        {"mc2_targets": ["a"]},
        {"mc1_targets": {"a": 1, "b": 2}},
        {"mc2_targets": 0},
    ],
)
def test_targets_need_true_and_false_answers(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"item 1: `mc._targets` must map answers to 1 \(true\) or 0"):
        read_source(TASK, json_list(tmp_path / "m.json", [{**ITEM, **change}]))


def test_mc1_and_mc2_by_hand() -> None:
    row = {**ITEM, "logprobs": {"Rome.": -2.0, "Oslo.": -1.0, "Bonn.": -3.0, "In Rome.": -0.5}}
    mass = {text: math.exp(p) for text, p in row["logprobs"].items()}  # type: ignore[attr-defined]
    share = (mass["Rome."] + mass["In Rome."]) / sum(mass.values())
    assert TASK.score_row(row) == {"mc1": 0.0, "mc2": pytest.approx(share)}
    row["logprobs"]["Oslo."] = -2.0  # type: ignore[index]
    assert TASK.score_row(row)["mc1"] == 0, "a tie is not the best answer"
    row["logprobs"] = {text: p - 5000 for text, p in row["logprobs"].items()}  # type: ignore[attr-defined]
    assert 0 < TASK.score_row(row)["mc2"] < 1, "long answers do not underflow"


def test_log_probabilities_of_base_and_proxy(tmp_path: Path) -> None:
    system = load_system(tiny_system.write(tmp_path))
    models = {
        role: AutoModelForCausalLM.from_pretrained(tmp_path / role, dtype=torch.float64).eval()
        for role in ("base", "expert", "antiexpert")
    }
    data = json_list(tmp_path / "m.json", [ITEM, {**ITEM, "question": "Whither?"}])
    for role, alpha in (("base", 0.0), ("proxy", 0.7)):
        out = tmp_path / role / "run"
        strength = {"alpha": alpha} if role == "proxy" else {}
        settings: dict[str, Any] = {"mode": "likelihood", "data": data, "out": out, "progress": False}
        made = evaluated(system, "truthfulqa_mc", as_=role, **settings, **strength)
        assert made.headline == "mc1" and set(made.metrics) == {"mc1", "mc2"}
        prompts = [tiny.tokenizer()(f"Q: {asked}\nA:")["input_ids"] for asked in ("Where?", "Whither?")]
        assert made.cost.prompt_tokens == sum(map(len, prompts)), "once for all answers to a question"
        for row in results.read_rows(out):
            for text, logprob in row["logprobs"].items():
                ids = tiny.tokenizer()(f"Q: {row['question'].strip()}\nA:")["input_ids"]
                expected = 0.0
                for token in tiny.tokenizer()(f" {text}", add_special_tokens=False)["input_ids"]:
                    base, expert, anti = (oracle.last_logits(m, ids) for m in models.values())
                    combined = base + alpha * (expert - anti)
                    expected += float(combined.log_softmax(-1)[token])
                    ids = [*ids, token]
                assert logprob == pytest.approx(expected, abs=1e-9)
        assert score_file(TASK, out / results.PREDICTIONS).metrics == made.metrics


def test_resume_and_folders(tmp_path: Path) -> None:
    system = load_system(tiny_system.write(tmp_path))
    settings: dict[str, Any] = {"mode": "likelihood", "limit": 8, "out": tmp_path / "run", "progress": False}
    made = evaluated(system, "truthfulqa_mc", **settings)
    assert made.n == 8 and made.spec.data == "generated", "the demo world has the targets too"
    path = tmp_path / "run" / results.PREDICTIONS
    whole = path.read_bytes()
    unfinish(tmp_path / "run", 5)
    assert evaluated(system, "truthfulqa_mc", **settings).metrics == made.metrics
    assert path.read_bytes() == whole
    with pytest.raises(UserError, match="mode is likelihood there and generate now"):
        evaluated(system, "truthfulqa_mc", **{**settings, "mode": "generate"})
    job = run.plan(system, "truthfulqa_mc", "proxy", RunOptions(mode="likelihood"))
    assert job.folder(Path("results")).name.startswith("mode=likelihood-")


def test_the_command(tmp_path: Path) -> None:
    yaml = tiny_system.write(tmp_path)
    asked = ("eval", "truthfulqa_mc", "--system", str(yaml), "--mode", "likelihood", "--limit", "4", "--json")
    made = proxytune(*asked, "--verbose", "--out", str(tmp_path / "run"))
    assert made.exit_code == 0 and json.loads(made.stdout)["spec"]["mode"] == "likelihood", made.output
    scored = ["score", "truthfulqa_mc", str(tmp_path / "run" / results.PREDICTIONS)]
    assert "mc2" in proxytune(*scored).stdout
    for arguments, message in [
        ([*asked, "--trace"], "leave --trace out"),
        (
            ["eval", "gsm", "--mode", "likelihood"],
            "has no likelihood mode: truthfulqa_mc, realtimeqa have one",
        ),
    ]:
        refused = proxytune(*arguments)
        assert refused.exit_code == 2 and message in refused.stderr
