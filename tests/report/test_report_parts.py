"""The rest of the report part by part: the token view's data, what sections name, the paper's tables with
ours in them, and a run in a notebook."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from proxytune.config import Sampling, parse_alpha
from proxytune.errors import UserError
from proxytune.paper import recipes
from proxytune.paper.published import read_paper
from proxytune.records import Completion, Metric, Run, TaskFacts, TracedToken
from proxytune.report import examples, notebook, paper_tables, sections, token_view
from proxytune.report import page as report_page
from proxytune.report.charts import Figure, ReportTable
from proxytune.report.escape import clipped
from proxytune.report.tables import role_rows
from tests.support.hostile import example, put, token
from tests.support.reports import run

# The token view


@pytest.mark.parametrize(
    ("score", "right"),
    [
        (None, None), (0.0, False), (0.49, False), (0.5, True), (1.0, True), (1.01, False), (50.0, False),
        (50.1, True),
    ],
)  # fmt: skip
def test_what_counts_as_right(score: float | None, right: bool | None) -> None:
    assert token_view.is_right(score, lower_is_better=False) is right
    assert token_view.is_right(score, lower_is_better=True) is (None if right is None else not right)


def test_what_was_asked_and_expected() -> None:
    row = {"question": "q", "prompt": "p", "mine": "m", "instruction": "", "answer": "", "answers": ["a", 5]}
    assert token_view.asked(row, TaskFacts()) == "q" and token_view.asked({}, TaskFacts()) == ""
    assert token_view.asked({"mine": "m"}, TaskFacts(asked="mine")) == "m"
    assert token_view.asked(row, TaskFacts(asked="mine", file="f.py")) == "m", "a task of one's own says it"
    assert token_view.expected(row) == "a; 5" and token_view.expected({"target": 7}) == "7"
    assert token_view.expected({"answer": "x", "Best Answer": "b"}) == "b" and token_view.expected({}) == ""


def test_a_text_that_just_fits_is_whole() -> None:
    assert clipped("abcd", 4) == "abcd" and clipped("abcde", 4).startswith("abcd\u2026 (1 characters more")


def traced(n: int) -> Completion:
    """A response of n tokens, the base's first choice at every second of them."""
    tokens = tuple(
        TracedToken(
            f"t{i}", i, {"base": 0.25, "proxy": 0.66666}, {"base": f"t{i - i % 2}", "proxy": f"t{i}"}, 1.0
        )
        for i in range(n)
    )  # fmt: skip
    return Completion("0", 0, "said", tuple(range(n)), "eos", 0.0, trace=tokens)


def test_one_prompt_in_the_token_view(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Completion("0", 0, "plain", (1, 2), "length", 0.0)
    found = token_view.response_data("why?", {"proxy": traced(3), "base": base})
    [alone] = found["sets"]
    [item] = alone["items"]
    assert (found["texts"], found["scale"]) == (["t0", "t1", "t2"], 10_000)
    assert found["roles"] == ("base", "expert", "antiexpert", "proxy")
    assert found["answers"] == ("base", "expert", "proxy", "tuned")
    assert item["answers"] == {
        "base": {"text": "plain", "right": None, "end": "length", "n": 2},
        "proxy": {"text": "said", "right": None, "end": "eos", "n": 3},
    }
    assert (item["asked"], item["expected"], item["tokens"]) == ("why?", "", [0, 1, 2])
    assert item["p"] == [[2500] * 3, [None] * 3, [None] * 3, [6667] * 3]
    assert item["top"] == [[-1, 0, -1], [None] * 3, [None] * 3, [-1] * 3] and "length" not in item
    monkeypatch.setattr(token_view, "RESPONSE_TOKENS", 2)
    [cut] = token_view.response_data("why?", {"proxy": traced(3)})["sets"][0]["items"]
    assert (cut["tokens"], cut["length"]) == ([0, 1], 3)
    [whole] = token_view.response_data("why?", {"proxy": traced(2)})["sets"][0]["items"]
    assert "length" not in whole


def test_the_budget_is_shared_by_the_sets(tmp_path: Path) -> None:
    for task in ("gsm", "xsum"):
        rows = [example(i, "x", True) for i in range(3)]
        traces = [[token(f"{task}{i}", 0.5, 0.6) for i in range(4)]] * 3
        put(tmp_path / "s" / task / "proxy", run("proxy", 0.8, task=task, trace="tokens"), rows, traces)
    sets = report_page.Report.read(tmp_path).inputs.sets
    assert [len(one["items"]) for one in token_view.token_data(sets, 24)["sets"]] == [3, 3]
    found = token_view.token_data(sets, 23)
    assert [len(one["items"]) for one in found["sets"]] == [2, 2]
    first = found["sets"][0]
    assert (first["system"], first["alpha"], first["metric"], first["sensitive"]) == (
        "tiny", "1", "exact_match", False,
    )  # fmt: skip
    assert token_view.token_data([])["sets"] == []


def test_which_run_of_a_role_a_reader_expects() -> None:
    usual = run("proxy", 0.5)
    pairs = [
        (Path("a/b/c"), usual), (Path("a/b/c/d"), usual), (Path("b/b/c"), usual),
        (Path("a/b"), run("proxy", 0.5, trace="tokens")), (Path("a/b/c"), run("proxy", 0.5, trace="tokens")),
        (Path("a"), run("proxy", 0.5, alpha=parse_alpha(0.5))),
    ]  # fmt: skip
    found = sorted(pairs, key=token_view.plainness)
    assert [pairs.index(pair) for pair in found] == [3, 0, 2, 4, 1, 5]


def test_answers_beside_a_proxy_are_on_its_items_where_there_are_some() -> None:
    proxy = run("proxy", 0.8, trace="tokens")
    found: list[tuple[Path, Run]] = [
        (Path("p"), proxy),
        (Path("other items"), run("base", 0.1, data_sha256="1" * 64)),
        (Path("b"), run("base", 0.2)),
        (Path("forced"), run("base", 0.3, forced=" So")),
        (Path("t"), run("tuned", 0.9, data_sha256="1" * 64)),
        (Path("warm"), run("expert", 0.9, sampling=Sampling(temperature=1.0))),
        (Path("model"), run("antiexpert", 0.9, model="another")),
        (Path("task"), run("expert", 0.9, task="xsum")),
    ]
    others = token_view._others(proxy, found)
    assert {role: str(folder) for role, (folder, _) in others.items()} == {"base": "b", "tuned": "t"}
    only_forced = [pair for pair in found if str(pair[0]) != "b" and pair[1].spec.role == "base"][1:]
    assert token_view._others(proxy, only_forced) == {}, "what an opener made of the base is not its answer"


def test_tokens_are_shown_beside_the_text_that_they_make(tmp_path: Path) -> None:
    """Of several samples the first, whose text is the answer that is shown."""
    folder = tmp_path / "s" / "gsm" / "proxy"
    rows, traces = [example(i, "x", True) for i in range(2)], [[token(text, 0.5, 0.6)] for text in "ab"]
    put(folder, run("proxy", 0.8, trace="tokens"), rows, traces)
    lines = [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]
    others = [line | {"sample": n, "tokens": [token("z", 0.1, 0.2)]} for line in lines for n in (1, 2)]
    every = sorted([*lines, *others], key=lambda line: (line["id"], line["sample"]))
    (folder / "trace.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in every))
    found = token_view.token_data(report_page.Report.read(tmp_path).inputs.sets)
    assert found["texts"] == ["a", "b"] and [one["tokens"] for one in found["sets"][0]["items"]] == [[0], [1]]


# Sections


def inputs(*runs: Run, root: Path = Path("r")) -> sections.Inputs:
    """Of runs that lie side by side."""
    found = tuple((root / str(place), one) for place, one in enumerate(runs))
    return sections.Inputs(root, found, tuple(role_rows(runs)), 0, (), {})


def test_hints_name_the_system_and_task_of_a_proxy() -> None:
    base, proxy = run("base", 0.1, system="one"), run("proxy", 0.2, system="two", task="xsum")
    assert inputs(base, proxy).usual == ("two", "xsum") and inputs(base).usual == ("one", "gsm")
    own = proxy.model_copy(update={"facts": TaskFacts(file="my task.py")})
    assert inputs(own).command("eval", "--trace") == "proxytune eval 'my task.py' --system two --trace"


def test_the_control_of_a_sweep_is_a_forced_base_on_its_items() -> None:
    swept = Path("r") / "sweep"
    found = [
        (swept / "a", run("proxy", 0.5)),
        (Path("r") / "plain", run("base", 0.1)),
        (Path("r") / "other", run("base", 0.3, forced=" So", data_sha256="1" * 64)),
        (Path("r") / "expert", run("expert", 0.3, forced=" So")),
        (Path("r") / "control", run("base", 0.3, forced=" So")),
    ]
    whole = replace(inputs(run("proxy", 0.5)), found=tuple(found))
    assert sections._control(whole, swept) == Path("r") / "control"
    assert sections._control(replace(whole, found=tuple(found[:4])), swept) is None


def test_tokens_are_ranked_by_the_largest_count_that_leaves_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: Any = SimpleNamespace(folder=Path("f"))

    def ranked(counts: dict[int, int]) -> int | None:
        def ngrams(folder: Path, min_count: int, top: int) -> Any:
            assert top == 60
            if counts[min_count] < 0:
                raise UserError("no token is as frequent")
            return SimpleNamespace(min_count=min_count, rows=(None,) * counts[min_count])

        monkeypatch.setattr(sections.tokens, "ngrams", ngrams)
        found = sections._ngrams(chosen)
        return None if found is None else found.min_count

    assert ranked({100: 8, 30: 9, 10: 9, 3: 9}) == 100 and ranked({100: -1, 30: 7, 10: 8, 3: 9}) == 10
    assert ranked({100: -1, 30: 1, 10: 2, 3: 0}) == 3 and ranked(dict.fromkeys((100, 30, 10, 3), -1)) is None


def test_a_sweep_is_drawn_from_three_alphas_on(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = list[Any]()
    monkeypatch.setattr(sections.sweeps, "find_sweeps", lambda root: [Path("a"), Path("b")])
    monkeypatch.setattr(sections.findings, "on_alpha", lambda found: f"{len(found)} sweeps")
    monkeypatch.setattr(sections, "sweep_figures", lambda one: drawn.append(one) or [])
    values = {Path("a"): (0.0, None, 1.0), Path("b"): (0.0, 0.5, 1.0)}
    monkeypatch.setattr(
        sections.sweeps,
        "sweep",
        lambda f: SimpleNamespace(points=[SimpleNamespace(value=v) for v in values[f]]),
    )
    sections.alpha_section(inputs(run("proxy", 0.5)))
    assert [[p.value for p in one.points] for one in drawn] == [[0.0, 0.5, 1.0]]


def test_what_does_not_fit_is_left_out_with_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    def make(folder: Path) -> str:
        if folder.name == "bad":
            raise UserError("it does not fit")
        return folder.name

    assert [sections.attempt(make, Path(name)) for name in ("good", "bad")] == ["good", None]
    assert capsys.readouterr().err == "note: left out of the page: it does not fit\n"


def test_a_base_and_a_proxy_of_each_system_and_task_are_compared(tmp_path: Path) -> None:
    made = {
        "a forced base": run("base", 0.3, forced=" So"), "base": run("base", 0.1),
        "again/base": run("base", 0.2), "a forced proxy": run("proxy", 0.3, forced=" So"),
        "proxy": run("proxy", 0.5),
        "other": run("proxy", 0.5, data_sha256="1" * 64), "tuned": run("tuned", 0.9),
        "x/base": run("base", 0.1, task="xsum"), "x/proxy": run("proxy", 0.5, task="xsum", model="another"),
    }  # fmt: skip
    for name, one in made.items():
        put(tmp_path / name, one, [])
    (tmp_path / "z").mkdir()
    found = [(tmp_path / name, one) for name, one in made.items()]
    found.append((tmp_path / "z", run("base", 0.1, system="without predictions")))
    whole = replace(inputs(run("proxy", 0.5)), found=tuple(found))
    assert list(sections._pairs(whole)) == [(tmp_path / "base", tmp_path / "proxy")]


def test_a_part_has_its_first_figures_open() -> None:
    one, two = (Figure(name, "t", "c", ReportTable("t", (), ()), ()) for name in ("a", "b"))
    table = ReportTable("t", (), ())
    [part] = sections.parts_of([one, None, two], table, shown=1)
    assert (part.figures, part.further, part.tables, part.sensitive) == ((one,), (two,), (table,), False)
    [whole] = sections.parts_of([one, two], sensitive=True)
    assert (whole.figures, whole.further, whole.sensitive) == ((one, two), (), True)
    assert list(sections.parts_of([None])) == [] and len(list(sections.parts_of([], table))) == 1


def test_what_the_page_is_about() -> None:
    early = run("base", 0.1, system="b").model_copy(update={"started": "2026-01-02T03", "finished": None})
    late = run("base", 0.1, system="a", task="xsum").model_copy(
        update={"started": "2026-01-01T03", "finished": "2026-01-03T05"}
    )
    assert report_page._subtitle(inputs(early, late, early)) == (
        "Systems: b, a. 3 runs on gsm, xsum; the latest of 2026-01-03."
    )


def test_examples_in_one_line() -> None:
    assert examples.plain("a\n\n b \n") == "a / b"
    assert examples.plain("x" * 400) == "x" * 400 and examples.plain("x" * 401) == "x" * 400 + " ..."


# The paper's tables


def coded(role: str, score: float, system: str = "llama2-13b-code", n: int = 160, **more: Any) -> Run:
    """A run of humaneval with 160 of 164 problems scored."""
    sampling = recipes.TASKS["humaneval"].sampling
    made = run(role, score, system=system, task="humaneval", **{"sampling": sampling, **more})
    metrics = {"pass@10": Metric(value=score, low=score - 0.0625, high=score + 0.0625, n=n)}
    return made.model_copy(update={"metrics": metrics, "headline": "pass@10", "n": 164})


def test_our_figures_stand_under_the_papers() -> None:
    recipe, paper = recipes.load_recipe("table4"), read_paper()
    waiting = coded("base", 0.25).model_copy(update={"metrics": {}, "headline": "not_run"})
    changed = coded("proxy", 0.5, "llama2-70b-code", shots=2, alpha=parse_alpha(0.5))
    runs = recipes.runs_by_key([waiting, changed, coded("tuned", 0.75, "mine"), coded("base", 0.5, "mine")])
    columns, rows = paper_tables.side_by_side(recipe, paper, runs)
    assert columns == ["size", "as", "HumanEval (CodexEval)", "DS-1000"]
    cell = {(row[0], row[1]): row[2].split("\n") for row in rows}
    assert cell["13B", "base"][1] == "ours: not executed, n = 164"
    assert cell["70B", "proxy"][1] == "ours 50.0 [43.8, 56.2], n = 160 of 164, shots 2, alpha 0.5"
    assert cell["mine", "tuned"] == ["ours 75.0 [68.8, 81.2], n = 160 of 164"]
    assert [row[:2] for row in rows[-2:]] == [["mine", "base"], ["mine", "tuned"]], "roles that have runs"
    assert len(cell["13B", "proxy"]) == 1 and all("ours" not in row[3] for row in rows)
    unjudged = coded("base", 0.25).model_copy(update={"metrics": {}, "headline": "other"})
    assert paper_tables._ours(
        recipe, recipes.published_lines(recipe, paper)[1], 0, recipes.runs_by_key([unjudged])
    ) == ("ours: no pass@10, n = 164")


@pytest.mark.parametrize(
    ("stored", "printed", "shown"),
    [(0.5, 50.0, "50.00"), (0.5, 50.05, "50.00"), (0.5, 50.06, "50.00 (50.06 printed)"), (None, 7.5, "(7.5)"),
     (0.5, 49.94, "50.00 (49.94 printed)")],
)  # fmt: skip
def test_printed_figures_that_differ_are_shown(stored: float | None, printed: float, shown: str) -> None:
    paper = {"stored": {"gsm": {"runs": {"r": {"acc": stored}}}}}
    column = {"task": "gsm", "metric": "acc", "scale": 100.0}
    row = {"printed": [printed], "runs": [None if stored is None else "r"]}
    assert paper_tables._published(paper, column, row, 0) == shown


def test_the_gap_in_one_line() -> None:
    recipe, paper = recipes.load_recipe("table4"), read_paper()
    runs = recipes.runs_by_key(
        [coded(role, s, "mine", 164) for role, s in (("base", 0.25), ("proxy", 0.5), ("tuned", 0.75))]
    )
    assert paper_tables.gaps(recipe, paper, runs) == (
        "Gap closed, mean over the columns, not capped: ours 50.00% (mine, 1 of 2 columns)."
    )
    assert paper_tables.gaps(recipe, paper, {}) == ""
    assert [r.name for r in paper_tables.compared(paper, runs, asked=True)] == ["table4"]
    assert paper_tables.compared(paper, runs, asked=False) == []
    assert paper_tables.title(recipe) == f"Table 4 of the paper: {recipe.title} (%)"


# Notebooks


def test_a_run_as_a_row() -> None:
    made = run("proxy", 0.4, alpha=parse_alpha(0.5))
    html = notebook.run_html(made)
    heads, values = (part.split("</tr>")[0] for part in html.split("<tr>")[1:])
    assert heads.replace("</th>", "").split("<th>")[1:] == [
        "task", "system", "as", "exact_match", "n", "tokens", "status",
    ]  # fmt: skip
    assert values.replace("</td>", "").split("<td>")[1:] == [
        "gsm", "tiny", "proxy, alpha 0.5", "40.0 [35.0, 45.0]", "100", "1,000", "done",
    ]  # fmt: skip
    assert "<td>base</td>" in notebook.run_html(run("base", 0.4))


@pytest.mark.parametrize(
    ("tokens", "roles", "height"), [(28, 1, 500 + 26 * 6), (13, 2, 500 + 26 * 8), (400, 1, 1000)]
)
def test_the_height_of_a_frame(tokens: int, roles: int, height: int) -> None:
    responses: dict[Any, Completion] = {"proxy": traced(tokens)}
    responses |= {role: traced(1) for role in ("base", "expert")[: roles - 1]}
    assert f"height: {height}px" in notebook.comparison_html("", responses)
