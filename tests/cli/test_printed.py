"""What commands print, line by line, of records whose figures are all different."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from proxytune.api_spec import ApiSpec
from proxytune.cli import analysis_tables, console, side_by_side
from proxytune.cli.commands import check, demo, evaluate, reproduce, score, stored, systems
from proxytune.cli.reproduce_plan import _bytes
from proxytune.cli.tune import command as tune
from proxytune.config import ExpertSpec, ModelSpec, System, parse_alpha
from proxytune.errors import UserError
from proxytune.options import JudgeOptions
from proxytune.records import Completion, Cost, FinishReason, Metric, RoleMemory, Run, TracedToken
from proxytune.report.tables import role_rows
from proxytune.training_record import CurvePoint
from tests.support.reports import run
from tests.support.tables import cells

SCORES = {"base": 0.1, "expert": 0.5, "proxy": 0.82, "tuned": 0.9}


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def costly(mode: Any = "generate", **more: Any) -> Run:
    """A run whose counts are all different."""
    cost = Cost(
        seconds=12.34, prefill_seconds=2.34, generated_tokens=1236, process_peak=2_540_000_000, row_steps=500,
        examined=40, accepted=30, memory={"base": RoleMemory(weights=3_000_000, kv_peak=400_000)},
    )  # fmt: skip
    metrics = {
        "faulty": Metric(value=1 / 9, n=9), "length": Metric(value=12.5, unit="number"),
        "exact_match": Metric(value=0.4, low=0.25, high=0.75, n=8),
    }  # fmt: skip
    return run("proxy", 0.4, mode=mode).model_copy(update={"cost": cost, "n": 9, "metrics": metrics, **more})


# Runs


def test_a_run_is_printed_with_its_metrics_and_its_price(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_run(costly(), Path("there"), json_only=False)
    assert capsys.readouterr().out.splitlines() == [
        "tiny as proxy on gsm: 9 examples",
        f"  {'exact_match':22} {'40.0 [25.0, 75.0]':28} over 8 of 9",
        f"  {'faulty':22} {'':28} 1 of 9",
        f"  {'length':22} 12.5",
        "  1236 tokens in 10.0 s (8.09 ms each), prompts 2.3 s, memory 3.4 MB (the process 2.5 GB)",
        "  speculation: 75% of drafts accepted, 2.47 tokens per step",
        "stored in there",
    ]
    console.print_run(costly("likelihood"), Path("there"), json_only=False)
    assert capsys.readouterr().out.splitlines()[4] == (
        "  9 items in 12.3 s (1371.1 ms each), memory 3.4 MB (the process 2.5 GB)"
    )
    bare = costly(cost=Cost(seconds=3.0, generated_tokens=10))
    smoke = bare.model_copy(update={"spec": bare.spec.model_copy(update={"data": "plumbing"})})
    console.print_run(smoke, Path("there"), json_only=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny as proxy on gsm: 9 examples (smoke data)"
    assert lines[4] == "  10 tokens in 3.0 s (300.00 ms each), memory " and lines[5] == "stored in there"
    console.print_run(costly(), Path("there"), json_only=True)
    assert json.loads(capsys.readouterr().out)["cost"]["accepted"] == 30


def test_all_roles_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run(role, value, alpha=parse_alpha("first:2")) for role, value in SCORES.items()]
    evaluate.print_all(runs, json_only=True, verbose=False)
    found = json.loads(capsys.readouterr().out)
    assert (found["task"], found["n"], found["gap_closed"]) == ("gsm", 100, pytest.approx(0.9))
    assert list(found["runs"]) == list(SCORES) and "cost" not in found["runs"]["proxy"]
    assert {name: found["runs"]["proxy"][name] for name in ("system", "task", "as", "alpha")} == {
        "system": "tiny", "task": "gsm", "as": "proxy", "alpha": "first:2",
    }  # fmt: skip
    evaluate.print_all(runs[:1], json_only=True, verbose=True)
    found = json.loads(capsys.readouterr().out)
    assert found["gap_closed"] is None and found["runs"]["base"]["cost"]["generated_tokens"] == 1000


def test_a_listed_run(capsys: pytest.CaptureFixture[str]) -> None:
    from proxytune.analysis.listing import ListedRun

    changed = run("proxy", 0.4, limit=12, alpha=parse_alpha(0.5)).spec  # its own alpha, not the system's
    done = run("proxy", 0.4).model_copy(update={"spec": changed})
    finished, unfinished = (ListedRun(Path("f"), s, done, 7) for s in ("finished", "unfinished"))  # type: ignore[arg-type]
    assert stored._line(finished) == ("f", "finished", "7", "exact_match 40.0 [35.0, 45.0]")
    assert stored._line(unfinished) == ("f", "unfinished", "7 of 12", "")
    assert stored._line(ListedRun(Path("f"), "unreadable", problem="torn")) == ("f", "unreadable", "", "")
    waiting = done.model_copy(update={"metrics": {"unjudged": Metric(value=1.0)}, "headline": "unjudged"})
    assert stored._line(ListedRun(Path("f"), "finished", waiting, 7))[2:] == ("7", "not judged")
    assert stored._as_json(finished) == {
        "folder": "f", "status": "finished", "system": "tiny", "task": "gsm", "as": "proxy", "alpha": "0.5",
        "examples": 7, "metric": "exact_match", "command": None, "problem": None,
        "score": done.metrics["exact_match"].model_dump(),
    }  # fmt: skip
    torn = stored._as_json(ListedRun(Path("f"), "unreadable", problem="torn"))
    assert (torn["problem"], torn["system"], torn["score"], torn["examples"]) == ("torn", None, None, 0)


def test_how_far_judging_is_is_said_ten_times(capsys: pytest.CaptureFixture[str]) -> None:
    told = console.judging_progress()
    for done in range(1, 26):
        told(done, 25)
    assert [line.removeprefix("judged ") for line in capsys.readouterr().err.splitlines()] == [
        f"{done}/25" for done in (3, 5, 8, 10, 13, 15, 18, 20, 23, 25)
    ]


@pytest.mark.parametrize(
    ("line", "agreed"), [("y\n", True), (" YES \n", True), ("n\n", False), ("\n", False), ("", False)]
)
def test_only_a_yes_is_one(line: str, agreed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(line))
    assert console.asked_on_terminal() is agreed


def test_a_vocabulary_is_strict_or_intersect() -> None:
    assert console.read_system("demo").vocab == "strict"
    assert console.read_system("demo", "intersect").vocab == "intersect"
    with pytest.raises(UserError, match="--vocab 'loose' must be strict or intersect"):
        console.read_system("demo", "loose")


# Responses


def traced(*pairs: tuple[str, str]) -> tuple[TracedToken, ...]:
    """Tokens, each with what the base would have chosen."""
    return tuple(TracedToken(text, 1, {}, {"base": base, "proxy": text}, 1.0) for text, base in pairs)


def test_changed_tokens_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    trace = traced((" a", " a"), (" b", " x"), (" c", " c"), ("</s>", "y"))
    ended = Completion("0", 0, " a b c", (1, 2, 3, 4), "eos", 0.0, trace=trace)
    assert side_by_side.response_tokens(ended) == trace[:3]
    for reason in set(get_args(FinishReason)) - {"eos"}:  # only the end is no token of the response
        assert side_by_side.response_tokens(replace(ended, finish_reason=reason)) == trace
    assert side_by_side.changed_places(trace) == [1, 3]
    base = Completion("0", 0, " plain", (1,), "eos", 0.0)
    side_by_side.show_side_by_side({"base": base, "proxy": ended})
    out = capsys.readouterr().out
    assert cells(out) == [["base", "proxy"], ["plain", "a[ b] c"]]
    assert out.splitlines()[-1] == (
        "1 of 3 tokens of the proxy are not the base's first choice (in [brackets])"
    )


# Systems and checks


def test_what_systems_are_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert systems.model_name(ModelSpec(model=f"{tmp_path}/m")) == "./m"
    assert systems.model_name(ModelSpec(adapter="a")) == "adapter a" and systems.model_name(None) == ""
    assert systems.model_name(ApiSpec(api="http://h/v1", model="m")) == "m at http://h/v1"
    two = (ExpertSpec(model="e", weight=0.5), ExpertSpec(adapter="f"))
    assert systems._experts(System(base=ModelSpec(model="b"), experts=two)) == "0.5 * e + 1 * adapter f"
    assert systems._experts(System(base=ModelSpec(model="b"), expert=ModelSpec(model="e"))) == "e"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_999, "1000.00 kB"), (10**6, "1.00 MB"),
     (1_234_567_890, "1.23 GB"), (10**9, "1.00 GB")],
)  # fmt: skip
def test_sizes_of_a_check(count: int, text: str) -> None:
    assert check._size(count) == text


def test_numbers_of_parameters() -> None:
    assert [check._count(n) for n in (99_999_999, 10**8, 1_230_000, 13 * 10**9)] == [
        "100.00M", "0.10B", "1.23M", "13.00B",
    ]  # fmt: skip
    role: Any = SimpleNamespace(special={"bos": ("<s>", 1)})
    assert check._special(role, "bos") == "<s> (1)" and check._special(role, "pad") == "none"
    assert check._special(SimpleNamespace(special={}), "pad") == "?"  # type: ignore[arg-type]


def test_memory_of_a_check(capsys: pytest.CaptureFixture[str]) -> None:
    def role(name: str, weights: int | None, shared: str | None = None) -> Any:
        return SimpleNamespace(name=name, weights=weights, shared_with=shared)

    memory = SimpleNamespace(
        weights={"base": 2_000_000, "expert": 3000}, total=2_003_000, kv_batch=70_000, kv_per_token=700,
        sequences=4, length=25, free=5 * 10**9,
    )  # fmt: skip
    roles = (role("base", 1), role("expert", 1, "antiexpert"), role("tuned", None))
    found: Any = SimpleNamespace(memory=memory, roles=roles)
    check._print_memory(found)
    assert capsys.readouterr().out.splitlines() == [
        "weights     2.00 MB of the models that decode together (base 2.00 MB, expert 3.00 kB; expert shares "
        "antiexpert's; tuned not known)",
        "KV cache    700 B per token; 70.00 kB for 4 sequences of 25 tokens",
        "free        5.00 GB",
    ]


# Code and tuning


def test_the_account_of_code_that_was_run(capsys: pytest.CaptureFixture[str]) -> None:
    ran: Any = SimpleNamespace(
        samples=20, passed=11, timed_out=3, flips=2, compared=19, rerun=4, broken=0, lost=0
    )
    score._print_account(ran)
    assert capsys.readouterr().out == (
        "  20 samples run, 11 passed, 3 timed out; 2 of 19 stored verdicts flipped (4 run once more, alone)\n"
    )
    ran.broken, ran.lost = 5, 6
    score._print_account(ran)
    _, broken, lost = capsys.readouterr().out.splitlines()
    assert broken.startswith("  5 samples were not run") and lost.startswith("  6 samples have no verdict")


def test_an_estimate_of_a_training(capsys: pytest.CaptureFixture[str]) -> None:
    need = SimpleNamespace(
        parameters=8000, trainable=1250, bytes=3 * 2**30, parts={"weights": 2**31, "gradients": 2**30}
    )
    job = SimpleNamespace(
        estimate=need, train=SimpleNamespace(ids=((1,),) * 1200, tokens=34567, longest=2048),
        held_out=SimpleNamespace(ids=((1,),) * 150), learning_rate=2e-5, notes=("cut",),
        method=SimpleNamespace(name="lora"), spec=SimpleNamespace(model="small"),
    )  # fmt: skip
    tune._print_estimate(job, False)
    assert capsys.readouterr().out.splitlines() == [
        "lora on small: 1,250 of 8,000 parameters are trained (15.6%)",
        "1,200 examples, 34,567 tokens, the longest has 2,048; 150 held out; learning rate 2e-05",
        "memory about 3.00 GiB by estimate: weights 2.00, gradients 1.00",
        "note: cut",
    ]
    tune._print_estimate(job, True)
    assert json.loads(capsys.readouterr().out) == {
        "method": "lora", "model": "small", "parameters": 8000, "trainable": 1250, "examples": 1200,
        "held_out": 150, "tokens": 34567, "longest": 2048, "learning_rate": 2e-5,
        "memory_bytes": 3 * 2**30, "memory_parts": {"weights": 2**31, "gradients": 2**30}, "notes": ["cut"],
    }  # fmt: skip


def test_what_a_training_came_to(capsys: pytest.CaptureFixture[str]) -> None:
    curve = (
        CurvePoint(step=1, loss=2.5), CurvePoint(step=2, held_out=1.5), CurvePoint(step=3, loss=0.5),
        CurvePoint(step=4, loss=0.75, held_out=1.75),
    )  # fmt: skip
    record: Any = SimpleNamespace(
        curve=curve, request=SimpleNamespace(method="lora"), trainable=1250, parameters=8000, steps=40,
        tokens_seen=98765, seconds=61.26, peak_bytes=3 * 2**29, best_step=30,
    )  # fmt: skip
    tune._print_record(record, Path("out"), False)
    assert capsys.readouterr().out.splitlines() == [
        "lora: 1,250 of 8,000 parameters, 40 steps, 98,765 tokens in 61.3 s, memory 1.50 GiB",
        "loss 2.5000 to 0.7500, held out 1.5000",
        "kept: the weights of step 30",
        f'stored in out; try: proxytune generate "..." --system {Path("out", "system.yaml")} --compare',
    ]
    record.model_dump = lambda mode, exclude: {"mode": mode, "exclude": sorted(exclude)}
    tune._print_record(record, Path("out"), True)
    assert json.loads(capsys.readouterr().out) == {
        "mode": "json", "exclude": ["curve"], "folder": "out",
    }  # fmt: skip
    record.best_step, record.curve = None, curve[:1]
    tune._print_record(record, Path("out"), False)
    assert capsys.readouterr().out.splitlines()[1] == "loss 2.5000 to 2.5000"


# The demo


def extras(**more: Any) -> list[demo.Extra]:
    """The control, and the model of middle size."""
    return [
        demo.Extra(demo.CONTROL, "base_opener_forced", run("base", 0.3, forced=" So", **more)),
        demo.Extra(demo.MIDDLE, "tuned_mid", run("tuned", 0.7, system="demo-mid", **more)),
    ]


def test_the_table_of_the_demo() -> None:
    rows = role_rows([run(role, value) for role, value in SCORES.items()])
    table = demo._table(rows, extras())
    assert table.title == "gsm: exact_match, %" and [column.header for column in table.columns][:2] == [
        "as", "score [95%]",
    ]  # fmt: skip
    named = list(zip(table.columns[0].cells, table.columns[1].cells, table.rows, strict=True))
    assert [(name, score, line.style) for name, score, line in named] == [
        ("base", "10.0 [5.0, 15.0]", None), ("base, opener forced", "30.0 [25.0, 35.0]", "dim"),
        ("expert", "50.0 [45.0, 55.0]", None), ("proxy", "82.0 [77.0, 87.0]", "bold"),
        ("tuned", "90.0 [85.0, 95.0]", None), ("tuned, middle size", "70.0 [65.0, 75.0]", "dim"),
    ]  # fmt: skip


def test_the_demo_as_json_has_its_extra_lines_where_they_belong() -> None:
    rows = role_rows([run(role, value) for role, value in SCORES.items()])
    entry = demo._as_json(rows, {"gsm": extras()})["tasks"]["gsm"]
    assert {name: entry[name] for name in ("n", "proxy", "base_opener_forced", "tuned_mid", "metric")} == {
        "n": 100, "proxy": 0.82, "base_opener_forced": 0.3, "tuned_mid": 0.7, "metric": "exact_match",
    }  # fmt: skip
    assert entry["gap_closed"] == pytest.approx(0.9)
    assert list(entry["rows"]) == [*SCORES, "base_opener_forced", "tuned_mid"]
    assert (
        entry["rows"]["expert"]["memory_bytes"] == 600_000 and entry["rows"]["proxy"]["ms_per_token"] == 2.0
    )
    assert entry["rows"]["tuned_mid"]["score"]["value"] == 0.7
    other = demo._as_json(rows, {"gsm": extras(data_sha256="1" * 64)})["tasks"]["gsm"]
    assert "tuned_mid" not in other and list(other["rows"]) == list(SCORES)


# Recipes


def test_options_with_a_name_and_a_value() -> None:
    assert reproduce.named(["a=b", "c=d=e"], "--path", "NAME=DIR") == {"a": "b", "c": "d=e"}
    for text in ("a", "=b", "a=", ""):
        with pytest.raises(UserError, match=f"--path '{text}' must be NAME=DIR"):
            reproduce.named(["x=y", text], "--path", "NAME=DIR")


@pytest.mark.parametrize(
    ("usd", "download", "options", "problem"),
    [
        (0.0, 10.0, {}, None),
        (0.0, 1e13, {}, "add --yes to agree"),
        (0.0, None, {}, "add --yes to agree"),
        (0.5, 10.0, {}, "add --yes to agree"),
        (None, 10.0, {}, "add --yes to agree"),
        (0.5, None, {"yes": True}, None),
        (0.5, 10.0, {"yes": True, "max_cost": 0.5}, None),
        (0.51, 10.0, {"yes": True, "max_cost": 0.5}, "the estimate of 0.51 USD is over --max-cost 0.5"),
        (None, 10.0, {"yes": True, "max_cost": 0.5}, None),
    ],
)
def test_consent_to_a_recipe(
    usd: float | None,
    download: float | None,
    options: Any,
    problem: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    plan: Any = SimpleNamespace(usd=usd, download=download)
    asked: Any = SimpleNamespace(judging=JudgeOptions(**options))
    if problem is None:
        reproduce._agree(plan, asked)
        return
    with pytest.raises(UserError, match=problem):
        reproduce._agree(plan, asked)


def test_bytes_of_a_plan() -> None:
    assert [_bytes(count) for count in (None, 0, 2_500_000.0)] == ["unknown", "nothing", "2.5 MB"]


# Analyses


def test_numbers_and_ranges_of_analyses() -> None:
    assert analysis_tables.number(Metric(value=0.12345, low=0.1, high=0.2)) == "0.123 [0.100, 0.200]"
    assert analysis_tables.number(Metric(value=0.12345, low=0.1)) == "0.123"
    assert (analysis_tables._range(3, 3), analysis_tables._range(3, 4)) == ("3", "3-4")
    assert analysis_tables._text("x" * 300) == "x" * 300
    assert analysis_tables._text("x" * 301) == "x" * 297 + "..."
    assert analysis_tables._curve_columns("unjudged") == ("score", "loops, %", "tokens", "n")
    assert analysis_tables._curve_columns("acc")[0] == "acc, %"
