"""A task in a Python file of one's own: its name, its mistakes, and that stored runs never run it."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxytune.errors import UserError
from proxytune.results import find_runs
from proxytune.runs import verdicts
from proxytune.tasks import TASKS, get_task, read_source
from proxytune.tasks.own import facts_of, read_task
from tests.support import made_runs
from tests.support.answers import jsonl
from tests.support.command_line import proxytune, refused

HEAD = """\
from proxytune.config import Sampling
from proxytune.records import Example, Prompt
from proxytune.tasks import Task

def examples(table, shots):
    return [Example(id=str(i), prompt=Prompt(plain=row["ask"], user=row["ask"]), target=row)
            for i, row in enumerate(table.rows)]

def row(example, completions):
    return {**example.target, "output": completions[0].text}

def score(row):
    return {"right": float(row["output"] == row["gold"])}
"""
"""Thirteen lines: what a test puts after it begins in line 14."""
TASK = """\
TASK = Task(
    summary="s", columns=("ask", "gold"), sampling=Sampling(max_new_tokens=4), examples=examples, row=row,
    scored=("output",), asked="ask", score_row=score, metric_names=("right",), headline="right",
)
"""
ITEMS = [{"ask": "Where?", "gold": "Rome"}, {"ask": "Who?", "gold": "Ann"}]


def task_file(folder: Path, text: str = HEAD + TASK, name: str = "mine.py") -> str:
    """Write a task file; its path."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def items(folder: Path) -> str:
    """Write the items; the file's path."""
    return str(jsonl(folder / "items.jsonl", ITEMS))


def test_a_task_is_named_by_its_file_and_its_content(tmp_path: Path) -> None:
    first = read_task(task_file(tmp_path))
    stem, _, digest = first.name.rpartition("-")
    assert stem == "mine" and len(digest) == 8 and first.file == str(tmp_path / "mine.py")
    assert read_task(str(tmp_path / "mine.py")) is first, "an unchanged file is run once"
    assert get_task(first.name) is first

    (tmp_path / "mine.py").write_text(HEAD + TASK + "\n", encoding="utf-8")
    assert read_task(str(tmp_path / "mine.py")).name != first.name
    odd = read_task(task_file(tmp_path, name="my task (2).py"))
    assert odd.name == f"my-task-2-{digest}"
    assert first.name not in TASKS


def test_its_likelihood_has_the_same_name_and_others_are_refused(tmp_path: Path) -> None:
    more = (
        "from dataclasses import replace\n"
        "TASK = replace(TASK, likelihood=replace(TASK, continuations=lambda example: [' a', ' b'],\n"
        "    row=lambda example, found: {**example.target, 'output': found[0].text}))\n"
    )
    path = task_file(tmp_path, HEAD + TASK + more)
    assert read_task(path, "likelihood").name == read_task(path).name
    assert read_source(read_task(path, "likelihood"), items(tmp_path)).examples
    with pytest.raises(UserError, match=r"'mine-[0-9a-f]{8}' has no likelihood mode"):
        read_task(task_file(tmp_path), "likelihood")


def test_dataclasses_and_postponed_annotations_work_in_the_file(tmp_path: Path) -> None:
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Item:\n    text: str\n"
    )
    assert read_task(task_file(tmp_path, text + HEAD + TASK)).headline == "right"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("x = 1\ny = 1 / 0\n", ("mine.py' line 2: ZeroDivisionError: division by zero",)),
        ("def f():\n    raise SystemExit('no')\n\nf()\n", ("mine.py' line 2: SystemExit: no",)),
        ("x = (\n", ("mine.py' line 1: SyntaxError",)),
        ("import nothing_of_that_name\n", ("mine.py' line 1: ModuleNotFoundError",)),
        ("x = '\0'\n", ("mine.py'", "null byte")),
        (HEAD, ("mine.py' has no TASK", "Task(...)")),
        (HEAD + "TASK = 'gsm'\n", ("mine.py' line 14: TASK is no Task, but str",)),
        (HEAD + "TASK = Task(summary='s')\n", ("mine.py' line 14: TypeError", "examples")),
        (HEAD + TASK.replace('("ask", "gold")', '"ask"'), ("line 14: field 'columns'", "tuple")),
        (
            HEAD + TASK.replace("score_row=score", "score_row=None"),
            ("line 14: field 'score_row'", "callable"),
        ),
    ],
)
def test_a_file_with_a_mistake_is_one_line_with_its_place(
    text: str, parts: tuple[str, ...], tmp_path: Path
) -> None:
    path = task_file(tmp_path, text)
    for command in (["eval", path, "--system", "demo"], ["tasks", path], ["score", path, "x.jsonl"]):
        refused(proxytune(*command), *parts)


def test_a_file_that_is_not_there_and_a_folder(tmp_path: Path) -> None:
    refused(proxytune("eval", tmp_path / "no.py"), "no task file", "no.py", "proxytune init task")
    (tmp_path / "folder.py").mkdir()
    refused(proxytune("eval", tmp_path / "folder.py"), "folder.py' is a folder")
    refused(proxytune("sweep-alpha", tmp_path / "no.py", "--alphas", "0,1"), "no task file")
    refused(proxytune("judge", tmp_path / "no.py", tmp_path), "no task file")


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ('row["ask"], user', 'row["asked"], user', "line 6: KeyError: 'asked'"),
        (
            "return [Example",
            "return [None for row in []] or 3 or [Example",
            "line 5, examples: a list of Example",
        ),
        ("id=str(i)", "id='0'", "line 5, examples: two examples have the id '0'"),
        ("target=row)", "target={'gold': {1}})", "line 5, examples: what it gives cannot be stored as JSON"),
        ("completions[0].text", "completions[1].text", "line 10: IndexError"),
        ("**example.target,", "'id': 'x',", "line 9, row: a dict is needed"),
        ('"output": completions', '"out": completions', "line 9, row: the row has no text 'output'"),
        ('row["gold"])}', 'row["golden"])}', "line 13: KeyError: 'golden'"),
        ('float(row["output"] == row["gold"])', '"yes"', "line 12, score: numbers by name"),
        ('float(row["output"] == row["gold"])', 'float("nan")', "line 12, score: numbers by name"),
    ],
)
def test_functions_are_tried_out_before_anything_is_decoded(
    old: str, new: str, part: str, tmp_path: Path
) -> None:
    assert HEAD.count(old) == 1
    task = read_task(task_file(tmp_path, HEAD.replace(old, new) + TASK))
    with pytest.raises(UserError) as found:
        read_source(task, items(tmp_path))
    assert part in str(found.value) and "mine.py' line" in str(found.value)


def test_a_score_that_fails_later_names_its_line(tmp_path: Path) -> None:
    text = HEAD.replace('row["gold"])}', 'row["gold"] and 1 / (row["output"] != "bad"))}')
    task = read_task(
        task_file(tmp_path, text.replace('row["output"] ==', '0 if not row["output"] else') + TASK)
    )
    assert read_source(task, items(tmp_path)).examples
    with pytest.raises(UserError, match=r"mine.py' line 13: ZeroDivisionError"):
        task.scores({"output": "bad", "gold": "Rome"})


MARK = "from pathlib import Path\nPath(__file__).with_name('ran').write_text('')\n"


def test_stored_runs_never_run_a_task(tmp_path: Path) -> None:
    """Not even where their task is called like a file that is there."""
    path = task_file(tmp_path, MARK + HEAD + TASK)
    rows = [
        {"ask": "Where?", "gold": "Rome", "output": "x", "scores": {"right": right}} for right in (1.0, 0.0)
    ]
    for role in ("base", "proxy"):
        made_runs.write(tmp_path / "results" / role, rows, metric="right", task=path, role=role)
    for command in (
        ["report", tmp_path / "results", "--examples", 1],
        ["report", tmp_path / "results", "--html", tmp_path / "page.html"],
        ["analyze", "failures", tmp_path / "results" / "base", tmp_path / "results" / "proxy"],
        ["runs", tmp_path / "results"],
        ["export", "csv", tmp_path / "results" / "proxy", "--out", tmp_path],
    ):
        done = proxytune(*command)
        assert done.exit_code == 0, (command, done.output)
    with pytest.raises(UserError, match="Unknown task"):
        verdicts.read_finished(path, tmp_path / "results" / "proxy")
    assert not (tmp_path / "ran").exists()
    read_task(path)
    assert (tmp_path / "ran").exists(), "the file would have left its mark"


def test_a_file_that_is_named_without_its_ending_is_found(tmp_path: Path) -> None:
    path = task_file(tmp_path)
    with pytest.raises(UserError, match=rf"There is a file of that name: '{path}'"):
        read_task(path.removesuffix(".py"))


def test_a_task_without_data_of_its_own_asks_for_a_file(tmp_path: Path) -> None:
    path = task_file(tmp_path)
    with pytest.raises(UserError, match=rf"the task in '{path}' names no data .* --data FILE"):
        read_source(read_task(path), "hub")


def test_a_run_of_another_version_of_the_file_is_refused(tmp_path: Path) -> None:
    old, row = read_task(task_file(tmp_path)), {"ask": "Where?", "gold": "Rome", "output": "x"}
    run = made_runs.write(tmp_path / "run", [row], task=old.name, facts=old.facts.model_dump())
    assert verdicts.read_finished(old.name, run)
    new = read_task(task_file(tmp_path, HEAD + TASK + "# new\n"))
    with pytest.raises(UserError, match=r"holds a run of 'mine-.*has changed"):
        verdicts.read_finished(new.name, run)


def test_a_run_tells_what_reports_need_where_its_task_is_not_known(tmp_path: Path) -> None:
    facts = {"asked": "ask", "lower_is_better": True, "hateful": True, "fault_column": None, "file": "m.py"}
    made_runs.write(tmp_path / "own", [{"ask": "Where?"}], task="m-12345678", facts=facts)
    made_runs.write(tmp_path / "old", [{"prompt": "Where?"}], task="m-87654321")
    made_runs.write(tmp_path / "known", [{"text": "t"}], task="toxigen", facts={"hateful": False})
    found = {folder.name: facts_of(run) for folder, run in find_runs(tmp_path)}
    assert found["own"].model_dump() == facts
    assert (found["old"].asked, found["old"].hateful) == ("prompt", False)
    assert found["known"].hateful, "a stored word cannot show hateful text"
    hidden = proxytune("report", tmp_path / "own", "--examples", 1).stdout
    assert "hateful text, hidden" in hidden and "Where?" not in hidden
