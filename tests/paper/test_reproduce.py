"""Recipes: what they run, what they say it takes, and that they run to the end."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from proxytune import results
from proxytune.config import ModelSpec, load_system
from proxytune.errors import UserError
from proxytune.paper import cost as reproduce
from proxytune.paper import published
from proxytune.paper import recipes as paper
from proxytune.report import paper_tables as report_paper
from tests.support import public_items
from tests.support.checkout import ROOT, environment
from tests.support.command_line import proxytune
from tests.support.endpoint import Endpoint
from tests.support.reports import run

pytestmark = pytest.mark.usefixtures("somewhere_else")

RECIPES = ("table2", "table3", "table4", "table5")
GB = 1e9


def plan(*arguments: object) -> dict[str, Any]:
    """The plan of a recipe."""
    done = proxytune("reproduce", *arguments, "--plan", "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny system with a few items of all tasks, judged by nobody."""
    folder = tmp_path_factory.mktemp("system")
    path = public_items.write_system(folder, window=128)  # a response ends there
    tasks = (
        "alpaca_farm",
        "gsm",
        "toxigen",
        "truthfulqa",
        "truthfulqa_mc",
        "humaneval",
        "ds1000",
        "triviaqa",
    )
    data = {task: str(public_items.write(task, folder)) for task in tasks}
    own = json.dumps(data), json.dumps({"alpaca_farm": "none", "toxigen": "none", "truthfulqa": "none"})
    text = re.sub(r"^data: .*$", f"data: {own[0]}\njudges: {own[1]}", path.read_text(), flags=re.MULTILINE)
    path.write_text(text)
    return path


# Recipes


def test_every_recipe_parses_and_names_its_command() -> None:
    assert tuple(paper.recipe_names()) == RECIPES
    for name in RECIPES:
        recipe = paper.load_recipe(name)
        header = (ROOT / "configs" / "recipes" / f"{name}.yaml").read_text().split("title:")[0]
        commands = re.findall(r"^#   (proxytune .*)$", header, re.MULTILINE)
        assert commands and all(shlex.split(c)[1:3] == ["reproduce", name] for c in commands)
        assert recipe.table == name.removeprefix("table") and recipe.name == name


def test_the_lines_of_the_tables_are_runs_of_ours() -> None:
    lines = {name: paper.published_lines(paper.load_recipe(name), published.read_paper()) for name in RECIPES}
    first = lines["table2"][0]
    assert (first.size, first.role) == ("7B", "tuned")
    assert first.keys[1] == ("llama2-13b-chat", "gsm", "expert"), (
        "the 7B chat model is the 13B system's expert"
    )
    assert [line.keys[0] for line in lines["table3"]] == [
        (f"llama2-{size}-chat", "truthfulqa", role)
        for size in ("13b", "70b")
        for role in ("base", "proxy", "tuned")
    ]
    keys = {key[:2] for line in lines["table5"] for key in line.keys}
    assert keys == {
        (f"llama2-{size}-{task}", task) for size in ("13b", "70b") for task in ("gsm", "triviaqa")
    }


def test_bad_recipes_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Unknown recipe 'tabel2'\. Did you mean: table2"):
        paper.load_recipe("tabel2")
    good = paper.load_recipe("table4").model_dump()
    for change, message in [
        ({"table": "99"}, "no table 99"),
        ({"columns": good["columns"][:1]}, "with 1 columns"),
        ({"systems": {"13B": "llama2-14b-code"}}, "no system 'llama2-14b-code'"),
        ({"columns": [{"task": "humanevil", "metrics": ["x"]}] * 2}, "Did you mean: humaneval"),
    ]:
        with pytest.raises(ValueError, match=message):
            paper.Recipe.model_validate(good | change)


# Plans


def test_the_plan_of_table_2() -> None:
    found = plan("table2")
    assert len(found["runs"]) == 35 and not any(run["done"] for run in found["runs"])
    assert found["memory_bytes"]["llama2-13b-chat"] / GB == pytest.approx(26.03 + 2 * 13.48, abs=0.01)
    assert found["memory_bytes"]["llama2-70b-chat"] / GB == pytest.approx(137.95 + 2 * 13.48, abs=0.01)
    assert found["download_bytes"] / GB == pytest.approx(
        2 * 13.48 + 2 * 26.03 + 2 * 137.95 + 2 * 13.48 + 1.42, abs=0.05
    ), "each model once, with the judges"
    assert 5 < found["judge_usd"] < 40, "the paper paid about 20.5 USD for one model, with GPT-4"
    text = proxytune("reproduce", "table2", "--plan").stdout
    for part in (
        "53.0 GB of weights at once, and 1.9 MB of KV cache",
        "gpt-4.1 behind an API",
        "openai/gsm8k",
    ):
        assert part in text
    small = plan("table2", "--limit", 80)
    assert small["judge_usd"] == pytest.approx(found["judge_usd"] * 80 / 805, rel=1e-3)
    assert plan("table2", "--judge", "alpaca_farm=none")["judge_usd"] == 0


def test_models_that_nobody_published(yaml: Path) -> None:
    found = plan("table5")
    assert len(found["missing"]) == 8 and "models/llama2-gsm-7b" in "".join(found["missing"])
    refused = proxytune("reproduce", "table5", "--yes")
    assert (
        refused.exit_code == 2
        and "--path llama2-gsm-7b=DIR" in refused.stderr
        and "--skip-missing" in refused.stderr
    )
    tiny = yaml.parent / "expert"
    found = plan("table5", "--path", f"llama2-gsm-7b={tiny}", "--skip-missing")
    shown = {(run["system"], run["task"], run["as"]) for run in found["runs"]}
    assert ("llama2-13b-gsm", "gsm", "proxy") in shown and ("llama2-70b-gsm", "gsm", "proxy") in shown
    assert ("llama2-13b-gsm", "gsm", "tuned") not in shown
    assert ("llama2-13b-triviaqa", "triviaqa", "base") in shown, "the base is published"
    assert {role for _, task, role in shown if task == "triviaqa"} == {"base"}
    wrong = proxytune("reproduce", "table5", "--path", f"llama2-gsm={tiny}", "--plan")
    assert wrong.exit_code == 2 and "llama2-gsm-7b" in wrong.stderr
    for option, text in (("--path", "llama2-gsm-7b"), ("--judge", "gsm")):
        bad = proxytune("reproduce", "table5", option, text, "--plan")
        assert bad.exit_code == 2 and f"{option} '{text}' must be" in bad.stderr


def test_an_adapter_may_stand_for_an_unpublished_model(tmp_path: Path) -> None:
    adapter = tmp_path / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    paths = {"llama2-gsm-7b": adapter, "llama2-gsm-13b": adapter}
    system = reproduce.with_paths(load_system("llama2-13b-gsm"), paths)
    assert system.expert == ModelSpec(adapter=str(adapter), dtype="float16")
    assert system.tuned == ModelSpec(model="meta-llama/Llama-2-13b-hf", adapter=str(adapter), dtype="float16")


# Running


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.every(4)
def test_a_recipe_runs_to_the_end_and_again(recipe: str, yaml: Path, tmp_path: Path) -> None:
    asked = ("reproduce", recipe, "--system", yaml, "--limit", 2, "--kv-memory", "64MB")
    done = proxytune(*asked)
    assert done.exit_code == 0, done.output
    columns = paper.load_recipe(recipe).columns
    tasks = {column.task for column in columns}
    roles = {"base", "proxy", "tuned"} | ({"expert"} if recipe != "table3" else set())
    found = results.find_runs(tmp_path / "results")
    assert {(run.spec.task, run.spec.role) for _, run in found} == {(t, r) for t in tasks for r in roles}
    assert f"Table {recipe[-1]} of the paper" in done.stdout and "ours" in done.stdout
    before = {path: path.read_bytes() for path in (tmp_path / "results").rglob("*.json*")}
    again = proxytune(*asked, "--json")
    assert again.exit_code == 0 and "loading" not in again.stderr, "nothing is left to do"
    assert len(json.loads(again.stdout)["runs"]) == len(found)
    assert before == {path: path.read_bytes() for path in (tmp_path / "results").rglob("*.json*")}
    assert f"{len(found)} runs ({len(found)} done already)" in again.stderr


@pytest.mark.every(2)
def test_consent_to_what_a_judge_costs(
    endpoint: Endpoint,
    yaml: Path,
    tmp_path: Path,
) -> None:
    asked = ("reproduce", "table2", "--system", yaml, "--limit", 2, "--kv-memory", "64MB")
    paid = (*asked, "--judge", "alpaca_farm=gpt-4o-mini")
    silent = proxytune(*paid)
    assert silent.exit_code == 2 and "add --yes" in silent.stderr and not (tmp_path / "results").exists()
    dear = proxytune(*paid, "--yes", "--max-cost", "0.000001")
    assert dear.exit_code == 2 and "over --max-cost" in dear.stderr and not (tmp_path / "results").exists()
    done = proxytune(*paid, "--yes", "--max-cost", "1")
    assert done.exit_code == 0, done.output
    judged = [run for _, run in results.find_runs(tmp_path / "results") if run.spec.task == "alpaca_farm"]
    assert {run.judge for run in judged} == {"gpt-4o-mini"} and len(judged) == 4
    found = plan(*paid[1:])
    assert found["judge_usd"] == 0 and all(run["done"] for run in found["runs"])


def test_the_makefile_runs_the_recipes() -> None:
    for recipe in RECIPES:
        shown = subprocess.run(
            ["make", "-n", "--no-print-directory", f"reproduce-{recipe}", "SYSTEM=demo", "ARGS=--limit 2"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        command = shlex.split(shown.strip().splitlines()[-1])
        assert command[1:] == ["reproduce", recipe, "--system", "demo", "--limit", "2"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_demo_runs_every_recipe(recipe: str, tmp_path: Path) -> None:
    code = ("--allow-code-execution",) if recipe == "table4" else ()
    done = subprocess.run(
        [sys.executable, "-m", "proxytune", "reproduce", recipe, "--system", "demo", "--limit", "10", *code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"Table {recipe[-1]} of the paper" in done.stdout and "ours" in done.stdout
    assert all(run.n >= 10 for _, run in results.find_runs(tmp_path / "results"))


# Our figures beside the paper's


@pytest.mark.parametrize("order", [1, -1])
def test_of_runs_of_as_many_roles_those_with_most_examples_count(order: int) -> None:
    few = run("proxy", 0.9, data_sha256="1" * 64).model_copy(update={"n": 3})
    assert [one.n for one in paper.runs_by_key([few, run("proxy", 0.5)][::order]).values()] == [100]


def test_gaps_are_means_over_the_columns_that_have_one(yaml: Path) -> None:

    recipe = paper.load_recipe("table5")
    scores = {"base": 0.1, "proxy": 0.82, "tuned": 0.9}
    name = "llama2-13b-gsm"
    runs = paper.runs_by_key([run(role, score, system=name) for role, score in scores.items()])
    assert list(runs) == [(name, "gsm", role) for role in scores]
    line = report_paper.gaps(recipe, paper.read_paper(), runs)
    assert line.startswith("Gap closed") and "paper 84.05% (13B), 86.90% (70B)" in line
    assert "ours 90.00% (13B, 1 of 2 columns)" in line
    table = report_paper.markdown_side_by_side(recipe, paper.read_paper(), runs)
    assert "| 13B | proxy | (55.9) | 43.90<br>ours 82.0 [77.0, 87.0], n = 100 |" in table
    own = paper.runs_by_key([run(role, score, system="mine") for role, score in scores.items()])
    table = report_paper.markdown_side_by_side(recipe, paper.read_paper(), own)
    assert "| mine | proxy |  | ours 82.0 [77.0, 87.0], n = 100 |" in table
