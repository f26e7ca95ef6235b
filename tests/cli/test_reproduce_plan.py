"""What a recipe takes before it is run: judgements, money, memory and downloads, of made-up models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from proxytune.cli import reproduce_plan as plans
from proxytune.cli.reproduce_plan import Planned, RecipePlan
from proxytune.config import System
from proxytune.judges import Estimate
from proxytune.options import JudgeOptions
from proxytune.paper.cost import Need, SystemPlan
from proxytune.paper.recipes import load_recipe
from proxytune.tasks import TASKS
from tests.support.hostile import put
from tests.support.reports import run

SYSTEM = System.model_validate(
    {"name": "mine", **{r: {"model": r} for r in ("base", "expert", "antiexpert")}}
)
GB = 10**9


def planned(task: str, role: Any, judge: str | None, folder: Path = Path("nowhere")) -> Planned:
    """A run of a recipe."""
    return Planned(SYSTEM, task, role, folder, judge)


class Paid:
    """A judge that costs a dollar for each thousand characters."""

    def __init__(self, model: str, options: JudgeOptions) -> None:
        assert options.max_cost is None, "an estimate has no limit"
        self.model = model

    def forecast(self, count: int, characters: float) -> Estimate:
        """Of so many items of this length."""
        tokens = int(count * characters)
        return Estimate(count, 0, tokens, 0, None if self.model == "free" else tokens / 1000, 0.0)

    def estimate(self, rows: Any) -> Estimate:
        """Of stored rows."""
        return Estimate(len(rows), 0, 7, 0, 0.5, 0.0)


@pytest.fixture
def judges(monkeypatch: pytest.MonkeyPatch) -> None:
    """alpaca_farm is judged behind an API, toxigen here."""
    kinds: dict[Any, Any] = {
        TASKS["alpaca_farm"].judge_kind: SimpleNamespace(paid=True, make=Paid, models=lambda model: ()),
        TASKS["toxigen"].judge_kind: SimpleNamespace(
            paid=False, models=lambda model: tuple(model.split(","))
        ),
    }
    monkeypatch.setattr(plans, "JUDGES", kinds)
    monkeypatch.setattr(plans.cost, "judge_need", lambda name: Need(name, name == "here", GB, GB / 2))
    monkeypatch.setattr(plans, "free_memory", lambda where: 3 * GB)


def plan(
    *runs: Planned, limit: int | None = None, needs: dict[str, Need] | None = None, **more: Any
) -> RecipePlan:
    """A plan of one system."""
    asked = tuple((one.task, one.role) for one in runs)
    system = SystemPlan(SYSTEM, asked, needs or {}, more.get("missing", ()), more.get("left_out", ()))
    return RecipePlan(load_recipe("table2"), (system,), runs, limit, JudgeOptions(max_cost=5.0), False)


def finished(folder: Path, judge: str | None) -> Path:
    """A finished run of two rows in a folder."""
    done = run("proxy", 0.5, task="alpaca_farm").model_copy(update={"judge": judge})
    put(folder, done, [{"id": "0", "scores": {}}, {"id": "1", "scores": {}}])
    return folder


def test_who_judges_a_run(tmp_path: Path, judges: None) -> None:
    usual = TASKS["toxigen"].judge
    found = [planned("toxigen", "base", judge) for judge in ("default", "none", "own", None)]
    assert [one.judge_model for one in found] == [usual, None, "own", None]
    assert [one.judge_key for one in found][:2] == ["toxigen default", "toxigen none"]
    assert [plans.paid(one) for one in found] == [False] * 4
    assert plans.paid(planned("alpaca_farm", "base", "x")) and not plans.paid(
        planned("alpaca_farm", "base", "none")
    )
    assert plans.judge_models(planned("toxigen", "base", "a,b")) == ("a", "b")
    assert plans.judge_models(found[1]) == () and not found[0].judged and found[0].done is None
    done = planned("alpaca_farm", "proxy", "x", finished(tmp_path / "f", "x"))
    assert (
        done.judged and done.done is not None and not planned("alpaca_farm", "proxy", "y", done.folder).judged
    )
    running = run("proxy", 0.5).model_copy(update={"status": "running"})
    put(tmp_path / "g", running, [])
    assert planned("gsm", "proxy", None, tmp_path / "g").done is None


def test_what_judging_costs(tmp_path: Path, judges: None) -> None:
    """805 instructions of 647 characters with their baselines; an output of 2,000, of a base of 6,800."""
    base, tuned = (planned("alpaca_farm", role, "x", Path(role)) for role in ("base", "tuned"))
    stored = planned("alpaca_farm", "proxy", "x", finished(tmp_path / "f", None))
    judged = planned("alpaca_farm", "expert", "x", finished(tmp_path / "g", "x"))
    free = planned("toxigen", "base", "default")
    made = plan(base, tuned, stored, judged, free)
    assert {place: (e.calls, e.usd) for place, e in made.estimates.items()} == {
        "base": (805, 805 * 7447 / 1000), "tuned": (805, 805 * 2647 / 1000), str(stored.folder): (2, 0.5),
        str(judged.folder): (0, 0.0),
    }  # fmt: skip
    assert made.usd == pytest.approx((805 * 7447 + 805 * 2647) / 1000 + 0.5)
    assert plan(base, limit=10).usd == pytest.approx(10 * 7.447) and plan(
        base, limit=900
    ).usd == pytest.approx(5994.835)
    unknown = planned("alpaca_farm", "tuned", "free")
    assert plan(base, unknown).usd is None and plan(free).usd == 0
    lines = list(plans._judge_lines(made))
    assert lines[0] == (
        f"  judge   alpaca_farm: x behind an API: 1612 judgements, about {805 * 10094 + 7} tokens, about "
        "8126.17 USD"
    )
    assert list(plans._judge_lines(plan(judged))) == ["  judge   alpaca_farm: x: all runs are judged"]
    assert next(plans._judge_lines(plan(unknown))).endswith("tokens, unknown")
    assert list(
        plans._judge_lines(plan(planned("toxigen", "base", "none"), planned("gsm", "base", None)))
    ) == ["  judge   toxigen: none; `proxytune judge` can judge the runs later"]
    assert list(plans._judge_lines(plan(planned("toxigen", "base", "here,away")))) == [
        "  judge   toxigen: here, 1.0 GB in memory, on disk; away, 1.0 GB in memory, to download, 500.0 MB"
    ]


def test_what_is_downloaded_and_held(judges: None) -> None:
    needs = {
        "base": Need("big", True, 4 * GB, 0.0), "expert": Need("small", False, 2 * GB, 1.5 * GB),
        "antiexpert": Need("small", False, 2 * GB, 1.5 * GB),
    }  # fmt: skip
    runs = (planned("gsm", "base", None), planned("gsm", "proxy", None), planned("toxigen", "base", "own"))
    made = plan(*runs, needs=needs, left_out=("this",))
    assert made.needs.keys() == {"big", "small", "own"} and made.download == 2 * GB, (
        "each once, with the judge"
    )
    lines = list(plans.lines(made))
    assert lines[0] == f"table2: {made.recipe.title} (table 2 of the paper)"
    assert lines[1:9] == [
        "  system  mine: 3 runs", "          gsm as base, proxy", "          toxigen as base",
        "          left out: this", "  model   base big: 4.0 GB in memory, on disk",
        "  model   expert small: 2.0 GB in memory, to download, 1.5 GB",
        "  model   antiexpert small: 2.0 GB in memory, to download, 1.5 GB",
        "  memory  mine: 8.0 GB of weights at once",
    ]  # fmt: skip
    assert lines[-2:] == [
        "  free    3.0 GB of memory on this machine's GPUs and CPU",
        "  in all  3 runs; models to download: 2.0 GB; judges: nothing to pay",
    ]
    lost = plan(*runs, needs={**needs, "tuned": Need("x", False, None, None)}, missing=("tuned 'x'",))
    assert lost.download is None and "  missing tuned 'x'" in list(plans.lines(lost))
    assert list(plans.lines(lost))[-1].startswith("  in all  3 runs; models to download: unknown; ")
    assert "  memory  mine: unknown of weights at once and the missing models" in list(plans.lines(lost))
    coded = plan(planned("humaneval", "base", None))
    assert any(line.startswith("  code    model-written code") for line in plans.lines(coded))
    assert not any(line.startswith("  code") for line in lines)


def test_each_system_has_its_own_runs(judges: None) -> None:
    other = SYSTEM.model_copy(update={"name": "other"})
    runs = (planned("gsm", "base", None), Planned(other, "gsm", "tuned", Path("nowhere"), None))
    two = tuple(SystemPlan(system, (), {}, (), ()) for system in (SYSTEM, other))
    made = replace(plan(*runs), systems=two)
    assert [line for line in plans.lines(made) if " as " in line] == [
        "          gsm as base", "          gsm as tuned",
    ]  # fmt: skip


def test_a_plan_as_json(tmp_path: Path, judges: None) -> None:
    done = planned("alpaca_farm", "proxy", "x", finished(tmp_path / "f", "x"))
    found = plan(done, planned("gsm", "base", None), missing=("m",), left_out=("l",)).as_json()
    assert found == {
        "recipe": "table2",
        "runs": [
            {"system": "mine", "task": "alpaca_farm", "as": "proxy", "judge": "x", "done": True,
             "folder": str(tmp_path / "f")},
            {"system": "mine", "task": "gsm", "as": "base", "judge": None, "done": False,
             "folder": "nowhere"},
        ],
        "memory_bytes": {"mine": 0}, "download_bytes": 0, "judge_usd": 0, "missing": ["m"], "left_out": ["l"],
    }  # fmt: skip
    assert plans._count([done, done]) == "2 runs (2 done already)"
