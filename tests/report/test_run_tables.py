"""The tables of runs and of trainings, column by column: every figure here is another, so that none can stand
in the place of another."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from proxytune.api_spec import ApiSpec
from proxytune.config import ExpertSpec, ModelSpec, System, parse_alpha
from proxytune.records import Cost, Metric, RoleMemory, Run
from proxytune.report import runs as run_tables
from proxytune.report import tables
from proxytune.report.charts import ReportTable
from proxytune.training_record import CurvePoint, TrainingRecord, TuningRequest
from tests.support.hostile import put
from tests.support.made_runs import MADE
from tests.support.reports import run

SCORES = {"base": 0.1, "expert": 0.5, "proxy": 0.82, "tuned": 0.9}
ROOT = Path("results")


def line(table: ReportTable, place: int = 0) -> dict[str, str]:
    """A line of a table by its columns."""
    return dict(zip(table.columns, table.rows[place].cells, strict=True))


def costly(role: str = "proxy", **more: Any) -> Run:
    """A run whose counts are all different."""
    memory = {
        "base": RoleMemory(weights=3_000_000, kv_peak=400_000),
        "tuned": RoleMemory(weights=70_000_000, kv_peak=5_000_000),
    }
    cost = Cost(
        seconds=12.34, prefill_seconds=2.34, prompt_tokens=77, generated_tokens=1236, memory=memory,
        process_peak=2_540_000_000, preemptions=3, sessions=2, row_steps=500, drafted=90, examined=40,
        accepted=30,
    )  # fmt: skip
    changed = {"cost": cost, "n": 9, "started": "2026-03-04T05:06:07+00:00"}
    metric = {"exact_match": Metric(value=0.4, low=0.25, high=0.75, n=8)}
    return run(role, 0.4, **more).model_copy(update={**changed, "metrics": metric})


def test_every_column_of_what_runs_took() -> None:
    found = [
        (ROOT / "tiny" / "gsm", costly(alpha=parse_alpha("0.5"))),
        (ROOT / "b", costly("base", mode="likelihood", alpha=parse_alpha("0.5"))),
        (ROOT / "c", run("base", 0.1).model_copy(update={"cost": Cost()})),
    ]
    table = run_tables.cost_table(ROOT, found)
    assert table.title == "3 runs: cost and speed" and table.words == 3
    # 1236 tokens in 12.34 - 2.34 = 10 seconds; 30 of 40; 1236 / 500
    assert line(table) == {
        "folder": str(Path("tiny", "gsm")), "as": "proxy, alpha 0.5", "alpha": "0.5", "examples": "8 of 9",
        "score": "40.0 [25.0, 75.0]", "seconds": "12.3", "prefill": "2.3", "tokens": "1236",
        "tokens / s": "124", "drafts accepted": "75%", "tokens / step": "2.47", "memory": "3.4 MB",
        "process": "2.5 GB", "preemptions": "3", "sessions": "2", "started (UTC)": "2026-03-04 05:06:07",
    }  # fmt: skip
    assert line(table, 1) | {"as": "", "alpha": "", "tokens / s": ""} == line(table) | {
        "folder": "b", "as": "", "alpha": "", "tokens / s": "", "memory": "3.4 MB",
    }  # fmt: skip
    assert (line(table, 1)["as"], line(table, 1)["alpha"], line(table, 1)["tokens / s"]) == ("base", "", "")
    bare = line(table, 2)
    empty = ("tokens / s", "drafts accepted", "tokens / step", "memory", "process")
    assert [bare[name] for name in empty] == [""] * 5 and bare["tokens"] == bare["preemptions"] == "0"


@pytest.mark.parametrize(("count", "folded"), [(10, False), (11, True)])
def test_many_runs_are_folded_away(count: int, folded: bool) -> None:
    found = [(ROOT / str(i), run("base", 0.1)) for i in range(count)]
    assert run_tables.cost_table(ROOT, found).folded is folded


def test_the_models_of_every_system_role_by_role() -> None:
    spec = {"dtype": "float32", "quantization": "int8", "chat": "tokenizer"}
    whole = System(
        name="one", base=ModelSpec(model="b"), antiexpert=ModelSpec(model="a"),
        experts=(ExpertSpec(adapter="x", **spec), ExpertSpec(model="e2", dtype="float16")),
        tuned=ModelSpec(model="t"),
    )  # fmt: skip
    api = ApiSpec(api="http://127.0.0.1:9/v1", model="m", top_logprobs=7, route="chat")
    behind = System(name="two", base=api, expert=ModelSpec(model="e"))
    found = [(ROOT, run("base", 0.1).model_copy(update={"spec": run("base", 0.1).spec.model_copy(
        update={"system": system})})) for system in (whole, behind, whole)]  # fmt: skip
    table = run_tables.systems_table(found)
    assert table.columns == ("system", "role", "model", "dtype", "quantization", "prompt format")
    assert table.folded and table.words == 6 and table.title == "Systems"
    assert [one.cells for one in table.rows] == [
        ("one", "base", "b", "auto", "none", "none"),
        ("one", "expert", "adapter x", "float32", "int8", "tokenizer"),
        ("one", "expert", "e2", "float16", "none", "none"),
        ("one", "antiexpert", "a", "auto", "none", "none"),
        ("one", "tuned", "t", "auto", "none", "none"),
        ("two", "base", "m at http://127.0.0.1:9/v1", "behind an API", "7 tokens visible", "chat"),
        ("two", "expert", "e", "auto", "none", "none"),
    ]


def test_runs_made_alike_share_a_line_and_have_their_own_commands() -> None:
    made = MADE.model_copy(update={
        "proxytune": "1.2", "git_commit": "0123456789abcdef", "device": "cuda", "threads": 4,
        "python": "3.11", "platform": "Linux", "packages": {"torch": "2", "rich": "3"},
        "command": "eval gsm",
    })  # fmt: skip
    here = run("base", 0.1, data="file.jsonl", data_sha256="89abcdef0123" + "f" * 52)
    again = run("proxy", 0.2, task="xsum")
    found = [
        (ROOT / "a", here.model_copy(update={"made": made})),
        (ROOT / "b", again.model_copy(update={"made": made.model_copy(update={"command": "other"})})),
        (ROOT / "c", run("base", 0.1)),
    ]
    provenance, commands = run_tables.made_table(found)
    assert provenance.folded and commands.folded and (provenance.words, commands.words) == (7, 6)
    assert line(provenance) == {
        "runs": "2", "proxytune": "1.2", "commit": "0123456789ab", "device": "cuda", "threads": "4",
        "platform": "Python 3.11 on Linux", "packages": "torch 2, rich 3",
    }  # fmt: skip
    assert (line(provenance, 1)["runs"], line(provenance, 1)["commit"]) == ("1", "not in a checkout")
    assert [line(commands, place) for place in (0, 1)] == [
        {"command": "eval gsm", "task": "gsm", "as": "base", "data": "file.jsonl",
         "sha256 of the items": "89abcdef0123", "seed": "0"},
        {"command": "other", "task": "xsum", "as": "proxy", "data": "generated",
         "sha256 of the items": "0" * 12, "seed": "0"},
    ]  # fmt: skip


def training(**more: Any) -> TrainingRecord:
    """A finished training."""
    request = TuningRequest(method="lora", model="demo://antiexpert", settings={}, data_sha256="0")
    curve = (
        CurvePoint(step=1, loss=2.5, learning_rate=1.25e-4),
        CurvePoint(step=3, held_out=1.75),
        CurvePoint(step=4, loss=0.5, held_out=0.625, learning_rate=5e-5),
    )
    content: dict[str, Any] = {
        "status": "finished", "request": request, "result": "adapter",
        "antiexpert": ModelSpec(model="demo://antiexpert"), "examples": 1200, "held_out": 150, "tokens": 3,
        "parameters": 8000, "trainable": 1250, "estimated_bytes": 4.4e6, "steps": 40, "best_step": 30,
        "seconds": 61.26, "tokens_seen": 98765, "peak_bytes": 7_200_000, "curve": curve, "provenance": MADE,
    }  # fmt: skip
    return TrainingRecord.model_validate({**content, **more})


def test_every_column_of_what_trainings_took() -> None:
    found = [(ROOT / "out" / "e", training()), (ROOT / "f", training(best_step=None))]
    table = run_tables.trainings_table(ROOT, found)
    assert line(table) == {
        "folder": str(Path("out", "e")), "method": "lora", "model": "demo://antiexpert", "trained": "1,250",
        "of all": "15.6%", "steps": "40", "tokens": "98,765", "seconds": "61.3", "memory": "7.2 MB",
        "by estimate": "4.4 MB", "best step": "30",
    }  # fmt: skip
    assert line(table, 1)["best step"] == "" and table.words == 3


def test_the_loss_and_that_of_held_out_examples_are_drawn_apart() -> None:
    figure = run_tables.loss_figure(ROOT / "out" / "e", training())
    assert (figure.name, figure.title) == ("loss-e", "e: loss of lora")
    assert figure.caption == "1,200 examples, 98,765 tokens; dashed: 150 held-out examples"
    assert figure.table.columns == ("step", "loss", "held out", "learning rate") and figure.table.folded
    assert [row.cells for row in figure.table.rows] == [
        ("1", "2.5000", "", "1.25e-04"),
        ("3", "", "1.7500", "0.00e+00"),
        ("4", "0.5000", "0.6250", "5.00e-05"),
    ]
    learned, held, dots = (layer["data"]["values"] for layer in figure.layers)
    assert learned == [{"step": 1, "loss": 2.5}, {"step": 4, "loss": 0.5}]
    assert held == dots == [
        {"step": 3, "loss": 1.75, "label": "held out, step 3: 1.7500"},
        {"step": 4, "loss": 0.625, "label": "held out, step 4: 0.6250"},
    ]  # fmt: skip
    y = figure.layers[0]["encoding"]["y"]
    assert y["title"] == "loss, nats per learned token" and y["scale"]["zero"] is False
    alone = run_tables.loss_figure(ROOT / "e", training(curve=training().curve[:1]))
    assert len(alone.layers) == 1 and alone.caption == "1,200 examples, 98,765 tokens"


def test_only_finished_trainings_are_found(tmp_path: Path) -> None:
    for name, status in (("b", "finished"), ("a", "finished"), ("c", "unfinished")):
        (tmp_path / name).mkdir()
        training(status=status).write(tmp_path / name)
    assert [folder.name for folder, _ in run_tables.find_trainings(tmp_path)] == ["a", "b"]


# Rows


def row_of(**more: Any) -> tables.RoleRow:
    """A line of a table."""
    [row] = tables.role_rows([run("proxy", 0.4)])
    return dataclasses.replace(row, **more)


def test_what_a_label_says_beside_the_role() -> None:
    assert row_of().label == "proxy"
    whole = row_of(role="base", forced=" So", details="alpha 0.4", remark="smoke data")
    assert whole.label == "base, opener forced, alpha 0.4 (smoke data)"
    assert row_of(forced="").label == "proxy, opener forced", "by no text too"


def test_the_cells_of_a_line() -> None:
    row = row_of(system="s", n=30, gap_closed=0.0, memory=999_999_999, ms_per_token=0.126)
    assert row.cells == ("s", "proxy", "40.0 [35.0, 45.0]", "0.0%", "1000.0 MB", "0.13", "30")
    none = row_of(score=None, metric="unjudged", memory=10**9, ms_per_token=None, ms_per_item=12.6)
    assert none.cells[2:] == ("not judged", "n/a", "1.0 GB", "13 / item", "0 of 100")
    assert row_of(role="base", ms_per_token=None).cells[3:6] == ("", "10.2 MB", "")
    forced = row_of(role="base", gap_closed=-0.256)
    assert forced.cells[3] == "-25.6%", "of a control too, and below nothing"


def test_time_is_per_token_or_per_item() -> None:
    cost = Cost(seconds=3.0, prefill_seconds=1.0, generated_tokens=400)
    told = [
        run("base", 0.1, mode=mode).model_copy(update={"cost": cost, "n": 8})
        for mode in ("generate", "likelihood", "choices")
    ]
    # 2 seconds of decoding over 400 tokens, 3 seconds over 8 examples
    assert [(row.ms_per_token, row.ms_per_item) for row in tables.role_rows(told)] == [
        (5.0, None), (None, 375.0), (None, 375.0),
    ]  # fmt: skip
    nothing = run("base", 0.1, mode="choices").model_copy(update={"n": 0})
    silent = run("base", 0.2).model_copy(update={"cost": Cost(seconds=1.0)})
    rows = tables.role_rows([nothing, silent])
    assert [(row.ms_per_token, row.ms_per_item) for row in rows] == [(None, None)] * 2


@pytest.mark.parametrize(
    ("name", "metric", "over", "shown"),
    [
        ("pass@1", Metric(value=0.5, n=3), "", "50.0"),
        ("pass@1", Metric(value=0.5, n=2), "over 2 of 3", "50.0"),
        ("pass@1", Metric(value=0.5), "", "50.0"),
        ("pass@1", Metric(value=0.0, n=0), "over 0 of 3", "no score"),
        ("faulty", Metric(value=1 / 3, n=3), "1 of 3", ""),
        ("unjudged", Metric(value=2 / 3), "2 of 3", ""),
        ("not_run", Metric(value=0.25, n=8), "2 of 8", ""),
    ],
)
def test_over_how_many_a_figure_is(name: str, metric: Metric, over: str, shown: str) -> None:
    assert (tables.coverage(name, metric, 3), tables.figure(name, metric)) == (over, shown)


def test_numbers_and_intervals_in_their_unit() -> None:
    assert tables.percent(Metric(value=0.1234, low=0.1)) == "12.3", "half an interval is none"
    assert tables.percent(Metric(value=0.1234, high=0.2)) == "12.3"
    assert tables.percent(Metric(value=1234567.0, unit="number")) == "1.23457e+06"


def test_a_run_that_another_repeats_has_no_line_of_its_own() -> None:
    twice = [run("base", 0.1), run("tuned", 0.9), run("base", 0.1), run("base", 0.2)]
    assert [(row.role, row.shown) for row in tables.role_rows(twice)] == [
        ("base", "10.0 [5.0, 15.0]"), ("base", "20.0 [15.0, 25.0]"), ("tuned", "90.0 [85.0, 95.0]"),
    ]  # fmt: skip


def test_rows_come_by_task_then_system_in_the_order_they_were_found() -> None:
    asked = [("b", "xsum"), ("a", "gsm"), ("b", "gsm"), ("a", "xsum")]
    rows = tables.role_rows([run("base", 0.1, system=s, task=t) for s, t in asked])
    assert [(row.system, row.task) for row in rows] == [
        ("b", "xsum"), ("a", "xsum"), ("b", "gsm"), ("a", "gsm"),
    ]  # fmt: skip


def test_no_gap_is_told_from_ends_that_do_not_agree() -> None:
    def gap(*others: Run) -> float | None:
        rows = tables.role_rows([run("proxy", 0.5), *others])
        return next(row.gap_closed for row in rows if row.role == "proxy")

    base, tuned, top = run("base", 0.1), run("tuned", 0.9), run("tuned", 0.8)
    again = run("base", 0.1, trace="tokens")
    assert gap(base, tuned) == pytest.approx(0.5) and gap(base, again, tuned) == pytest.approx(0.5)
    assert gap(base, tuned, top) is None
    assert gap(run("base", 0.1, forced=" So"), tuned) is None, "a forced opener is no base"


def test_the_summary_is_of_the_conditions_that_most_rows_share() -> None:
    few = [run(role, 0.3, data_sha256="1" * 64) for role in ("base", "tuned")]
    whole = [run(role, score) for role, score in SCORES.items()]
    waiting = {"metrics": {"unjudged": Metric(value=1.0)}, "headline": "unjudged"}
    other = run("base", 0.3, task="xsum").model_copy(update=waiting)
    equal = run("base", 0.4, task="xsum")
    found = tables.summary(tables.role_rows([*few, *whole, other, equal]))["tasks"]
    gap = {"gap_closed": pytest.approx(0.9)}
    assert found == {"gsm": {"n": 100, **SCORES, **gap}, "xsum": {"n": 100, "base": None}}


def test_the_table_for_the_terminal() -> None:
    rows = tables.role_rows([run(role, score) for role, score in SCORES.items()])
    table = tables.rich_table(rows)
    assert table.title == "gsm: exact_match, %"
    assert [(str(c.header), c.justify) for c in table.columns] == [
        ("as", "left"), ("score [95%]", "right"), ("gap closed", "right"), ("memory", "right"),
        ("ms / token", "right"), ("n", "right"),
    ]  # fmt: skip
    assert [one.style for one in table.rows] == [None, None, "bold", None]
    waiting = [dataclasses.replace(row, score=None, metric="not_run", apart="n 3") for row in rows]
    assert tables.rich_table(waiting).title == "gsm: not executed (n 3)"


def test_the_readmes_lines_are_whole_and_in_order() -> None:
    def four(task: str, **more: Any) -> list[Run]:
        return [run(role, score, system="demo", task=task, **more) for role, score in SCORES.items()]

    some = [four("humaneval")[0].model_copy(update={"n": 50}), *four("humaneval")[1:]]
    shown = [*four("truthfulqa"), *four("xsum"), *some, *four("gsm")]
    lines = tables.readme_table(shown).splitlines()
    assert lines[0] == "| task | base | expert | proxy | tuned | n |"
    assert [one.split()[1] for one in lines[2:]] == ["gsm", "truthfulqa"], "no task of its own, nor two n"
    assert len(tables.readme_table(four("gsm", data="plumbing")).splitlines()) == 2, "smoke data is no figure"
    two = [*four("gsm"), run("proxy", 0.3, system="demo", alpha=parse_alpha("0.5"))]
    assert len(tables.readme_table(two).splitlines()) == 2, "which of two proxies is shown would be chance"


def test_the_runs_that_a_table_is_about(tmp_path: Path) -> None:
    made = {
        "s/gsm/base": run("base", 0.1),
        "s/gsm/base/forced": run("base", 0.2, forced=" So"),
        "s/gsm/base/other": run("base", 0.3, forced=" So", data_sha256="1" * 64),
        "s/gsm/proxy/sweep/a": run("proxy", 0.4, alpha=parse_alpha("0.5")),
        "s/xsum/base/limit": run("base", 0.5, task="xsum", limit=3),
        "t/gsm/base/limit": run("base", 0.6, system="t", limit=3),
    }
    for name, one in made.items():
        put(tmp_path / name, one, [])
    main, others = tables.main_runs(tmp_path)
    shown = {folder.relative_to(tmp_path).as_posix() for folder, _ in main}
    assert shown == {"s/gsm/base", "s/gsm/base/forced", "s/xsum/base/limit", "t/gsm/base/limit"}
    assert others == 2
