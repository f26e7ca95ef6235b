"""An example whose logits are no numbers ends alone, with a reason that is stored and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from proxytune import results
from proxytune.config import Sampling, System
from proxytune.records import FAULT, Cost
from proxytune.report import tables
from proxytune.runs.steered import generate
from proxytune.tasks import TASKS, get_task, score_file
from tests.support import tiny
from tests.support.answers import json_list, jsonl
from tests.support.command_line import proxytune
from tests.support.runs import evaluated

BAD = "z"
SHORT = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> System:
    """A model that cannot read one letter: the square of its embedding overflows in the first norm."""
    folder, model = tmp_path_factory.mktemp("half"), tiny.build("llama", max_position_embeddings=1024)
    [token] = tiny.tokenizer().encode(BAD, add_special_tokens=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = 1e200  # type: ignore[operator]
    return System(name="half", base=tiny.spec(tiny.save(folder / "half", model)))


def questions(folder: Path) -> str:
    """Three, one of which holds the letter."""
    texts = ["How many are two?", "How many zebras?", "How many are three?"]
    return str(
        jsonl(
            folder / "items.jsonl", [{"question": t, "answer": f"so\n#### {n}"} for n, t in enumerate(texts)]
        )
    )


def test_a_response(half: System, tmp_path: Path) -> None:
    out = tmp_path / "run"
    made = evaluated(half, "gsm", as_="base", out=out, data=questions(tmp_path), sampling=SHORT)
    rows = results.read_rows(out)
    assert made.n == 3 and [row.get(FAULT) for row in rows] == [None, "nan", None]
    assert rows[1]["scores"] == {} and rows[1]["responses"][0]["finish_reason"] == "nan"
    assert made.metrics["faulty"].value == pytest.approx(1 / 3)
    sound = [row for row in rows if FAULT not in row]
    rest = get_task("gsm").metrics(sound)
    assert {name: value for name, value in made.metrics.items() if name != "faulty"} == rest
    assert score_file(get_task("gsm"), out / results.PREDICTIONS).metrics == made.metrics
    assert json.loads((out / results.RUN).read_text())["metrics"]["faulty"]["value"] > 0
    assert evaluated(half, "gsm", as_="base", out=out, data=questions(tmp_path), sampling=SHORT) == made


def test_log_probabilities(half: System, tmp_path: Path) -> None:
    """A text that the model cannot read has none; the others of the batch do."""
    targets = {"Rome.": 1, "Oslo.": 0, "Bonn.": 0}
    items = [
        {"question": q, "mc1_targets": t, "mc2_targets": t}
        for q, t in (("Where?", targets), ("Where?", {**targets, "Graz is it.": 0}), ("Why?", targets))
    ]
    data, out = json_list(tmp_path / "mc.json", items), tmp_path / "run"
    made = evaluated(half, "truthfulqa_mc", as_="base", out=out, data=data, mode="likelihood")
    rows = results.read_rows(out)
    assert [row.get(FAULT) for row in rows] == [None, "nan", None]
    assert rows[1]["logprobs"]["Graz is it."] is None and rows[1]["logprobs"]["Rome."] < 0
    assert rows[0]["logprobs"] == {name: rows[1]["logprobs"][name] for name in targets}
    assert made.metrics["faulty"].value == pytest.approx(1 / 3) and made.metrics["mc2"].low is not None
    task = get_task("truthfulqa_mc", "likelihood")
    assert score_file(task, out / results.PREDICTIONS).metrics == made.metrics
    json.dumps(rows, allow_nan=False)


def test_the_command_line_says_it(half: System, tmp_path: Path) -> None:
    path = tmp_path / "half.yaml"
    path.write_text(yaml.safe_dump({"base": {"model": half.base.model, "dtype": "float64"}}))
    said = proxytune("generate", "a z", "--system", path, "--as", "base", "--json")
    assert said.exit_code == 0 and json.loads(said.stdout)["responses"][0]["finish_reason"] == "nan"
    assert "broken off: the logits became NaN or infinite" in said.stderr
    system = ("--system", path, "--as", "base", "--max-new-tokens", "6")
    said = proxytune("eval", "gsm", *system, "--data", questions(tmp_path), "--out", tmp_path / "o")
    assert said.exit_code == 0 and ["faulty", "1", "of", "3"] in map(str.split, said.stdout.splitlines())


def test_in_python(half: System) -> None:
    with pytest.warns(UserWarning, match="1 of 3 responses were broken off"):
        found = generate(half, ["a b", "a z", "c"], as_="base", sampling=SHORT)
    assert [completion.fault for completion in found] == [None, "nan", None] and found[1].text == ""


@pytest.mark.parametrize("name", sorted(TASKS))
def test_where_nothing_could_be_scored(name: str) -> None:
    """The headline is there all the same, over no example."""
    task = get_task(name)
    metrics = task.metrics([{"id": "0", FAULT: "nan"}])
    assert metrics[task.headline_of(metrics)].n == 0
    assert metrics["faulty"].value == 1.0 and task.headline_of(metrics) in metrics
    assert task.scores({FAULT: "nan"}) == {}


def test_time_per_token_is_of_decoding_alone(half: System, tmp_path: Path) -> None:
    made = evaluated(half, "gsm", as_="base", out=tmp_path, data=questions(tmp_path), sampling=SHORT)
    cost = made.cost
    assert 0 < cost.prefill_seconds < cost.seconds
    [row] = tables.role_rows([made])
    assert row.ms_per_token == pytest.approx(
        1000 * (cost.seconds - cost.prefill_seconds) / cost.generated_tokens
    )
    assert row.ms_per_item is None
    old = cost.model_dump(mode="json")
    del old["prefill_seconds"]
    [row] = tables.role_rows([made.model_copy(update={"cost": Cost.model_validate(old)})])
    assert row.ms_per_token == pytest.approx(1000 * cost.seconds / cost.generated_tokens)


def test_likelihoods_have_a_time_per_item(half: System, tmp_path: Path) -> None:
    targets: dict[str, Any] = {"Rome.": 1, "Oslo.": 0}
    item = {"question": "Where?", "mc1_targets": targets, "mc2_targets": targets}
    data = json_list(tmp_path / "mc.json", [item, item])
    made = evaluated(half, "truthfulqa_mc", as_="base", out=tmp_path / "r", data=data, mode="likelihood")
    [row] = tables.role_rows([made])
    assert row.ms_per_token is None and row.ms_per_item == pytest.approx(1000 * made.cost.seconds / 2)
    assert row.cells[-2] == f"{row.ms_per_item:.0f} / item"
