"""What models and judges of a recipe take, and which runs stand in its cells, worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from proxytune import hub
from proxytune.config import ModelSpec, Sampling, System, parse_alpha
from proxytune.errors import UserError
from proxytune.models import checkpoint
from proxytune.paper import cost, recipes
from proxytune.paper.cost import Need, RecipeChoice, SystemPlan
from proxytune.paper.published import paper_gap_closed, read_paper, stored_percent
from proxytune.paper.recipes import Column, Line, our_gap_closed, own_lines, published_lines, runs_by_key
from proxytune.records import Metric, Run
from tests.support.reports import run

LLAMA, LLAMA_13 = "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-13b-hf"
SEVEN, THIRTEEN = 6_738_415_616, 13_015_864_320
ROBERTA = "tomh/toxigen_roberta"


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What the hub's cache holds."""
    names: set[str] = set()
    monkeypatch.setattr(hub, "stored", lambda name, kind="model": name in names)
    return names


# What a model takes


@pytest.mark.parametrize(
    ("spec", "weights", "download"),
    [
        ({}, 2.0 * SEVEN, 2.0 * SEVEN),
        ({"dtype": "float16"}, 2.0 * SEVEN, 2.0 * SEVEN),
        ({"dtype": "bfloat16"}, 2.0 * SEVEN, 2.0 * SEVEN),
        ({"dtype": "float32"}, 4.0 * SEVEN, 2.0 * SEVEN),
        ({"dtype": "float64"}, 8.0 * SEVEN, 2.0 * SEVEN),
        ({"dtype": "float32", "quantization": "8bit"}, 1.0 * SEVEN, 2.0 * SEVEN),
        ({"quantization": "4bit"}, 0.5 * SEVEN, 2.0 * SEVEN),
    ],
)
def test_a_published_model(spec: dict[str, Any], weights: float, download: float, on_disk: set[str]) -> None:
    made = ModelSpec(model=LLAMA, **spec)
    assert cost.need_of(made) == Need(LLAMA, False, weights, download)
    on_disk.add(LLAMA)
    assert cost.need_of(made) == Need(LLAMA, True, weights, 0.0)


def test_other_models(on_disk: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cost.need_of(ModelSpec(adapter="a")) == Need("adapter a", True, 0.0, 0.0)
    assert cost.need_of(ModelSpec(model="o/n")) == Need("o/n", False, None, None)
    on_disk.add("o/n")
    assert cost.need_of(ModelSpec(model="o/n")) == Need("o/n", True, None, 0.0)
    monkeypatch.setattr(checkpoint, "bytes_needed", lambda spec: 7.0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for name in ("/m", "./m", "../m", "~/m", "demo://m", "here"):
        assert cost.need_of(ModelSpec(model=name)) == Need(name, True, 7.0, 0.0)


def test_judges_that_run_here(on_disk: set[str]) -> None:
    truth = "allenai/truthfulqa-truth-judge-llama2-7B"
    assert cost.judge_need(f"{ROBERTA}#BAD") == Need(ROBERTA, False, 4.0 * 355_361_794, 4.0 * 355_361_794)
    assert cost.judge_need(truth) == Need(truth, False, 2.0 * SEVEN, 2.0 * SEVEN)
    assert cost.judge_need("o/n") == Need("o/n", False, None, None)
    on_disk.update((ROBERTA, "o/n"))
    assert cost.judge_need(ROBERTA) == Need(ROBERTA, True, 4.0 * 355_361_794, 0.0)
    assert cost.judge_need("o/n") == Need("o/n", True, None, 0.0)
    for name in ("/m", "./m", "../m", "~/m", "demo://m"):
        assert cost.judge_need(name) == Need(name, True, None, 0.0)


def plan(models: dict[str, Need], **more: Any) -> SystemPlan:
    """A plan of a system of Llamas."""
    small = {"model": LLAMA}
    system = System.model_validate({
        "name": "s", "base": {"model": LLAMA_13, "dtype": "float32"}, "expert": small, "antiexpert": small,
        "tuned": {"model": LLAMA_13}, **more,
    })  # fmt: skip
    return SystemPlan(system, (("gsm", "base"), ("triviaqa", "proxy")), models, (), ())


def needs(**bytes_of: float | None) -> dict[str, Need]:
    """Needs by the name of a model."""
    return {name: Need(LLAMA, False, size, 0.0) for name, size in bytes_of.items()}


@pytest.mark.parametrize(
    ("sizes", "memory"),
    [
        ({"base": 5.0, "expert": 2.0, "antiexpert": 1.0}, 8.0),
        ({"base": 5.0, "expert": 2.0, "tuned": 6.0}, 7.0),
        ({"base": 5.0, "expert": 2.0, "tuned": 9.0}, 9.0),
        ({"tuned": 9.0}, 9.0),
        ({}, 0),
        ({"base": None, "tuned": 9.0}, None),
        ({"base": 5.0, "tuned": None}, None),
    ],
)
def test_the_memory_of_a_system(sizes: dict[str, float | None], memory: float | None) -> None:
    assert plan(needs(**sizes)).memory == memory


def test_the_cache_of_a_token() -> None:
    """409,600 numbers of four bytes for the base, 262,144 of two for each small model; tuned runs alone."""
    models = {
        "base": Need(LLAMA_13, False, 1.0, 0.0), "tuned": Need("o/n", False, 1.0, 0.0),
        **needs(expert=1.0, antiexpert=1.0),
    }  # fmt: skip
    assert cost.kv_per_token(plan(models)) == 409_600 * 4 + 2 * 262_144 * 2
    assert cost.kv_per_token(plan({**models, "expert": Need("o/n", True, 1.0, 0.0)})) is None
    assert cost.kv_per_token(plan({})) == 0.0


def test_where_items_come_from(on_disk: set[str]) -> None:
    of_hub = "openai/gsm8k on the hub"
    found = cost.sources([plan({}, data={"triviaqa": "generated"})])
    assert found == {"gsm": f"{of_hub} (to download)", "triviaqa": "generated"}
    on_disk.add("openai/gsm8k")
    assert cost.sources([plan({})])["gsm"] == f"{of_hub} (on disk)"
    assert cost.CONFIRM == 100_000_000 and cost.MODELS_FOLDER == "models"


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    for spec in (ModelSpec(model="./m"), ModelSpec(model="o/n"), ModelSpec(model="o/n", adapter="m")):
        assert cost.absent(spec) is None
    assert cost.absent(ModelSpec(model="./x")) == "no folder './x'"
    assert cost.absent(ModelSpec(model="demo://x")) == "no folder 'demo://x'"
    assert cost.absent(ModelSpec(model="./m", adapter="x")) == "no folder 'x'"
    assert cost.absent(ModelSpec(model="./x", adapter="y")) == "no folder './x'"


def test_the_order_of_a_plan_and_what_it_leaves_out(on_disk: set[str]) -> None:
    system = plan({}).system
    lines = [
        Line("s", role, tuple(("s", task, role) for task in ("triviaqa", "gsm")), None)
        for role in ("tuned", "proxy", "base")
    ]  # fmt: skip
    found = cost._plan(system, lines, RecipeChoice())
    assert found.runs == (
        ("triviaqa", "base"), ("triviaqa", "proxy"), ("gsm", "base"), ("gsm", "proxy"), ("triviaqa", "tuned"),
        ("gsm", "tuned"),
    )  # fmt: skip
    assert (
        set(found.models) == {"base", "expert", "antiexpert", "tuned"}
        and found.missing == found.left_out == ()
    )
    own = system.model_copy(update={"data": {"gsm": "generated"}})
    found = cost._plan(own, lines, RecipeChoice())
    assert found.runs == (("gsm", "base"), ("gsm", "proxy"), ("gsm", "tuned"))
    assert found.left_out == ("triviaqa: 's' names its own data, and none for this task",)
    lost = system.model_copy(update={"expert": ModelSpec(model="./x")})
    found = cost._plan(lost, lines, RecipeChoice())
    assert len(found.runs) == 6 and found.missing == ("expert: no folder './x'",)
    assert set(found.models) == {"base", "antiexpert", "tuned"}
    found = cost._plan(lost, lines, RecipeChoice(skip_missing=True))
    assert {role for _, role in found.runs} == {"base", "tuned"} and set(found.models) == {"base", "tuned"}
    assert found.left_out == (
        "triviaqa as proxy: its models are missing", "gsm as proxy: its models are missing",
    )  # fmt: skip


def test_the_systems_of_a_recipe(tmp_path: Path, on_disk: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "bytes_needed", lambda spec: 7.0)
    recipe = recipes.load_recipe("table5")
    first, *_ = names = list(recipe.unpublished)
    known = ", ".join(names)
    many = dict.fromkeys("zyxwvutsrqpa", tmp_path)
    for paths, bad in ((many, "a"), ({first: tmp_path, "b": tmp_path}, "b")):
        with pytest.raises(UserError) as raised:
            cost.plan_systems(recipe, RecipeChoice(paths=paths))
        assert str(raised.value) == f"--path {bad}=...: the models that can be named are {known}"
    with pytest.raises(UserError, match=r"are none: all models of this recipe are published$"):
        cost.plan_systems(recipes.load_recipe("table2"), RecipeChoice(paths={"x": tmp_path}))
    plans = cost.plan_systems(recipe, RecipeChoice(paths={first: tmp_path}))
    systems = [plan.system.name for plan in plans]
    assert systems == list(
        dict.fromkeys(key[0] for line in published_lines(recipe, read_paper()) for key in line.keys)
    )
    models = [spec.model for plan in plans for spec in (plan.system.expert, plan.system.tuned) if spec]
    assert str(tmp_path) in models and len({*models}) > 2
    [own] = cost.plan_systems(recipe, RecipeChoice(system="llama2-13b-gsm"))
    assert own.system.name == "llama2-13b-gsm" and {task for task, _ in own.runs} == {"gsm", "triviaqa"}


# Figures of the paper


def test_the_papers_gap_is_the_mean_over_columns() -> None:
    """Stored metrics where there are some, printed cells elsewhere."""
    paper: Any = {
        "stored": {"t": {"runs": {"b": {"m": 0.1}, "p": {"m": 0.4}, "d": {"m": 0.5}}}},
        "tables": {
            "9": {
                "columns": [{"task": "t", "metric": "m", "scale": 100.0}, {"task": None, "metric": None}],
                "rows": [
                    {"size": "X", "role": role, "printed": [0.0, printed], "runs": [run, None]}
                    for role, run, printed in (
                        ("base", "b", 20.0),
                        ("proxy", "p", 30.0),
                        ("tuned", "d", 60.0),
                    )
                ]
                + [
                    {"size": "Y", "role": role, "printed": [1.0, 1.0], "runs": [None, None]}
                    for role in ("base",)
                ],
            }
        },
    }
    column = paper["tables"]["9"]["columns"][0]
    assert (
        stored_percent(paper, column, "p") == pytest.approx(40)
        and stored_percent(paper, column, None) is None
    )
    assert paper_gap_closed(paper, "9", "X") == pytest.approx((0.3 / 0.4 + 10 / 40) / 2)
    assert set(read_paper()) >= {"stored", "tables", "analyses"}


def test_the_lines_of_a_table() -> None:
    recipe = recipes.load_recipe("table5")
    lines = published_lines(recipe, read_paper())
    assert [(line.size, line.role) for line in lines[:4]] == [
        ("7B", "expert"), ("13B", "base"), ("13B", "proxy"), ("13B", "tuned"),
    ]  # fmt: skip
    assert lines[0].keys == (
        ("llama2-13b-triviaqa", "triviaqa", "expert"), ("llama2-13b-gsm", "gsm", "expert"),
    )  # fmt: skip
    assert lines[2].published is not None and lines[2].published["printed"] == [55.9, 43.9]
    mine = own_lines(recipe, read_paper(), "mine", ("base", "antiexpert", "proxy"))
    assert mine == [
        Line("mine", role, (("mine", "triviaqa", role), ("mine", "gsm", role)), None)
        for role in ("base", "proxy")
    ]  # fmt: skip


# Runs in cells


@pytest.mark.parametrize("order", [1, -1])
def test_which_runs_stand_in_the_cells(order: int) -> None:
    """One item set for all roles: the one with most roles, however few its examples."""
    few = [run(role, 0.5, data_sha256="1").model_copy(update={"n": 3}) for role in ("base", "proxy")]
    many = [run("base", 0.9)]
    found = runs_by_key([*few, *many][::order])
    assert {key: made.n for key, made in found.items()} == {
        ("tiny", "gsm", "base"): 3, ("tiny", "gsm", "proxy"): 3,
    }  # fmt: skip
    half = run("proxy", 0.9, alpha=parse_alpha(0.5))
    assert runs_by_key([half, run("proxy", 0.5)][::order])[("tiny", "gsm", "proxy")].spec.alpha.end == 1
    left = [
        run("base", 0.5, forced="x"),
        run("base", 0.5, mode="likelihood"),
        run("base", 0.5, mode="choices"),
    ]
    assert runs_by_key(left[::order]) == {}
    other = run("tuned", 0.5, system="other", task="triviaqa")
    assert set(runs_by_key([other, run("base", 0.1)][::order])) == {
        ("other", "triviaqa", "tuned"), ("tiny", "gsm", "base"),
    }  # fmt: skip


def test_what_of_a_run_is_not_the_papers() -> None:
    usual = Sampling(max_new_tokens=512)
    assert recipes.unlike_the_paper(run("proxy", 0.5, sampling=usual)) == []
    changed = usual.model_copy(update={"temperature": 0.7, "n": 2})
    half = parse_alpha(0.5)
    proxy = run("proxy", 0.5, sampling=changed, shots=4, alpha=half)
    assert recipes.unlike_the_paper(proxy) == ["temperature 0.7", "n 2", "shots 4", "alpha 0.5"]
    assert recipes.unlike_the_paper(run("base", 0.5, sampling=usual, alpha=half)) == []


def scored(made: Run, **metrics: float) -> Run:
    """A run with these metrics, all over its 100 examples."""
    found = {name: Metric(value=v, low=v - 0.01, high=v + 0.01, n=100) for name, v in metrics.items()}
    return made.model_copy(update={"metrics": found, "headline": next(iter(metrics))})


def test_the_metric_that_a_column_shows() -> None:
    column = Column(task="gsm", metrics=("best", "second"))
    made = run("base", 0.5)
    assert recipes.shown_metric(column, scored(made, second=0.1, best=0.2)) == "best"
    assert recipes.shown_metric(column, scored(made, second=0.1)) == "second"
    assert recipes.shown_metric(column, made) is None


def test_our_gap_is_the_mean_over_the_columns_that_have_one() -> None:
    recipe = recipes.load_recipe("table5")
    lines = [
        Line("X", role, (("s", "triviaqa", role), ("s", "gsm", role)), None)
        for role in ("tuned", "base", "proxy")
    ]
    trivia = {"base": 0.1, "proxy": 0.4, "tuned": 0.5}
    gsm = {"base": 0.2, "proxy": 0.3, "tuned": 0.6}
    runs: Any = {}
    for task, metric, scores in (("triviaqa", "acc", trivia), ("gsm", "exact_match", gsm)):
        for role, score in scores.items():
            runs["s", task, role] = scored(run(role, score, system="s", task=task), **{metric: score})
    found = our_gap_closed(recipe, lines, runs)
    assert found is not None and found[0] == pytest.approx((0.75 + 0.25) / 2) and found[1] == 2
    smoke = runs["s", "gsm", "proxy"]
    plumbing = smoke.model_copy(update={"spec": smoke.spec.model_copy(update={"data": "plumbing"})})
    assert our_gap_closed(recipe, lines, {**runs, ("s", "gsm", "proxy"): plumbing}) == (
        pytest.approx(0.75),
        1,
    )
    del runs["s", "triviaqa", "tuned"]
    assert our_gap_closed(recipe, lines, runs) == (pytest.approx(0.25), 1)
    assert our_gap_closed(recipe, lines, {}) is None and our_gap_closed(recipe, lines[:2], runs) is None
