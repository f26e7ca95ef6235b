"""Code tasks without running code: programs, jobs and verdicts, against a sandbox that only answers."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from proxytune.errors import UserError
from proxytune.records import JsonRow
from proxytune.sandbox import NOT_APART, Job, Limits, Outcome, Program
from proxytune.tasks import ds1000, humaneval
from proxytune.tasks.data import DataTable
from proxytune.tasks.ds1000 import FOLDERS, answer_jobs, cases, result_of, sample_job
from proxytune.tasks.humaneval import check_apart, gather, program, whole_program
from proxytune.tasks.task import Execution


class Answers:
    """A sandbox that has an answer to every job, and runs none."""

    backend = "answers"
    python = SimpleNamespace(executable="python")

    def __init__(self, answer: Callable[[Job], Outcome]) -> None:
        self.answer, self.ran, self.limits = answer, list[Job](), Limits()

    def limited(self, limits: Limits) -> Answers:
        self.limits = limits
        return self

    def map(self, batches: Iterable[Sequence[Job]]) -> Iterator[list[Outcome]]:
        for batch in batches:
            self.ran += batch
            yield [self.answer(job) for job in batch]


def ended(*results: str, files: dict[str, bytes] | None = None) -> Outcome:
    """How the programs of a job ended."""
    return Outcome(results, tuple(0.0 for _ in results), files or {})


def execution(answer: Callable[[Job], Outcome], items: dict[str, JsonRow]) -> tuple[Execution, Answers]:
    """The leave to run code, with its sandbox."""
    box: Any = Answers(answer)
    return Execution(box, items), box


# HumanEval

ADD: JsonRow = {
    "task_id": "T/0", "prompt": 'def add(a, b):\n    """Add."""\n', "entry_point": "add",
    "test": "import math\ndef check(f):\n    assert f(1, 2) == 3\n",
}  # fmt: skip


def test_the_programs_of_a_sample() -> None:
    whole = whole_program(ADD, "    return a + b")
    assert whole == Program(
        f"{ADD['prompt']}    return a + b\n{ADD['test']}\ncheck(add)", seconds=3.0, main=False
    )
    apart = program(ADD, "    return a + b", seconds=7.0)
    assert (apart.code, apart.seconds, apart.main) == (
        f"{ADD['prompt']}    return a + b\nimport math\n",
        7.0,
        False,
    )
    assert apart.check == f"\nadd = call('add')\n{ADD['test']}\ncheck(add)\n"
    assert humaneval.SECONDS == 3.0 and humaneval.ALONE_SECONDS == 12.0
    assert whole_program(ADD, "", 7.0).seconds == 7.0
    identity = {**ADD, "test": "def check(f):\n    x = []\n    assert f(x, x) is x\n"}
    assert program(identity, "    return a", seconds=7.0) == whole_program(identity, "    return a", 7.0)


GIVEN = 'import os\nLIMIT = 3\ndef helper(x):\n    return x\ndef f(x):\n    """."""\n'


@pytest.mark.parametrize(
    ("test", "apart"),
    [
        ("def check(g):\n    assert helper(g(1)) == LIMIT\n", True),
        ("def check(g):\n    assert os.path and len([g(1)])\n", True),
        ("def check(g):\n    assert other(g(1))\n", False),
        ("import other as o\ndef check(g):\n    assert o(g(1))\n", True),
        ("import a.b\ndef check(g):\n    assert a.b.c(g(1))\n", True),
        ("def check(g):\n    for x in [1]:\n        assert g(x)\n", True),
        ("def check(g):\n    try:\n        g(1)\n    except ValueError as e:\n        assert e\n", True),
        ("def check(g):\n    assert g(1) is None and g(2) is not False\n", True),
        ("def check(g):\n    assert None is g(1) is g(2)\n", False),
        ("def check(g):\n    assert g(1) is not g(2)\n", False),
        ("def check(g):\n    assert (lambda y: y)(g(1))\n", True),
        ("class C: pass\ndef check(g):\n    assert C() != g(1)\n", True),
        ("async def h(): pass\ndef check(g):\n    assert h and g(1)\n", True),
    ],
)
def test_what_a_test_needs_of_a_program(test: str, apart: bool) -> None:
    text = check_apart(GIVEN, test, "f")
    assert (text is not None) is apart
    if text is not None:
        needs = any(word in test for word in ("helper", "LIMIT", "os."))
        assert text == f"{GIVEN if needs else ''}\nf = call('f')\n{test}\ncheck(f)\n"


def test_a_class_cannot_be_called_from_outside() -> None:
    test = "def check(g):\n    assert g(1)\n"
    for prompt, apart in [
        ("class f:\n    pass\n", False),
        ("async def f(x):\n    pass\n", False),
        ("class g:\n    pass\n", True),
        ("def f(x):\n", True),
        ("def f(x:\n", False),
    ]:
        assert (check_apart(prompt, test, "f") is not None) is apart
    assert check_apart("def f(x):\n", "def check(g:\n", "f") is None


def test_samples_of_a_problem_keep_their_verdicts() -> None:
    """A verdict that comes late, and one that is missing, stand beside the right sample."""
    rows: list[JsonRow] = [
        {"task_id": "a", "prompt": "p", "completion": "x"},
        {"task_id": "b", "completion": "y", "passed": True, "result": "passed"},
        {"task_id": "a", "prompt": "p", "completion": "z", "passed": False},
        {"task_id": "c", "completions": ["w"], "passed": [True]},
        {"task_id": "a", "prompt": "p", "completion": "v"},
        {"task_id": "c", "completions": ["u"]},
    ]
    found = gather(DataTable("'f'", "line", tuple(rows), (1, 3, 5, 7, 9, 11)))
    assert found.rows == (
        {"task_id": "a", "prompt": "p", "completions": ["x", "z", "v"], "passed": [None, False, None]},
        {"task_id": "b", "completions": ["y"], "passed": [True], "result": ["passed"]},
        rows[3], rows[5],
    )  # fmt: skip
    assert found.numbers == (1, 3, 7, 11)


def test_the_account_of_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal programs are run once; what cannot be judged apart is judged whole; a time-out is run alone."""
    ends = {"one": "passed", "two": "failed: x", "slow": "timed out", "late": "timed out", "odd": NOT_APART}
    alone: list[tuple[Any, ...]] = []

    def answer(job: Job) -> Outcome:
        (asked,) = job.programs
        word = next(word for word in ends if word in asked.code)
        return ended("passed" if word == "odd" and not asked.check else ends[word])

    class Alone:
        def __init__(self, backend: str, python: str, workers: int) -> None:
            alone.append((backend, python, workers))

        def run(self, job: Job) -> Outcome:
            (asked,) = job.programs
            alone.append((asked.seconds, "late" in asked.code))
            return ended("passed" if "late" in asked.code else "timed out")

    monkeypatch.setattr(humaneval, "Sandbox", Alone)
    how, box = execution(answer, {"T/0": ADD, "T/1": {**ADD, "task_id": "T/1"}})
    rows: list[JsonRow] = [
        {
            "task_id": "T/0",
            "prompt": ADD["prompt"],
            "completions": ["one", "two", "one", "slow", "odd"],
            "passed": [True, True, None, True, False],
            "result": ["passed", "passed", "", "passed", "failed: y"],
        },
        {
            "task_id": "T/1",
            "completions": ["late", "two"],
            "passed": [True, False],
            "result": ["passed", "timed out"],
            "kept": 1,
        },
    ]
    counted = ("samples", "passed", "timed_out", "in_process", "compared", "rerun", "flips")
    for name in counted:
        setattr(how, name, 100)
    made = humaneval.execute(rows, how)
    assert [row["result"] for row in made] == [
        ["passed", "failed: x", "passed", "timed out", "passed"], ["passed", "failed: x"],
    ]  # fmt: skip
    assert [row["passed"] for row in made] == [[True, False, True, False, True], [True, False]]
    assert made[1]["kept"] == 1
    assert len(box.ran) == 6, "five programs, and the odd one whole"
    assert alone == [("answers", "python", 1), (12.0, False), (12.0, True)]
    counts = [getattr(how, name) for name in counted]
    assert counts == [107, 104, 101, 101, 106, 102, 103], "more than before"


def test_rows_of_code_that_do_not_fit() -> None:
    row: JsonRow = {"task_id": "T/0", "completions": ["a", "b"]}
    assert humaneval._verdicts(row) == [(None, ""), (None, "")]
    stored = {**row, "passed": [1, None], "result": ["passed", "x"]}
    assert humaneval._verdicts(stored) == [(True, "passed"), (None, "x")]
    for bad in ({"passed": [True]}, {"result": ["x"]}, {"passed": [True] * 3}):
        with pytest.raises(UserError, match=r"^'T/0' has verdicts for another number of completions$"):
            humaneval._verdicts({**row, **bad})
    assert humaneval.item_of(row, {"T/0": ADD}) is ADD
    with pytest.raises(UserError, match=r"^the prompt of 'T/0' is not the one of the data: wrong --data\?$"):
        humaneval.item_of({**row, "prompt": "x"}, {"T/0": ADD})
    assert humaneval.score({"completions": [""] * 10, "passed": [True] + [False] * 9}) == {
        "pass@10": 1.0, "pass@1": pytest.approx(0.1),
    }  # fmt: skip
    none = {"not_run": 1.0, "pass@10": None, "pass@1": None}
    for passed in (None, [], [True], [True, None], "ab"):
        assert humaneval.score({**row, "passed": passed}) == none


# DS-1000

OLD: JsonRow = {
    "lib": "Pandas",
    "problem_id": 3,
    "prompt": "p",
    "reference_code": "r",
    "test_case_cnt": "2",
    "test_type": "3",
    "code_context": (
        "import numpy as np\nfrom pandas.core import x\nimport tensorflow\n[insert]\nimport numpy"
    ),
    "test_code": "  import scipy.sparse\ndef test(): pass",
    "test_generate_pickle": "make()",
    "extra_files": {"a.csv": "\u00e9"},
    "perturbation_type": "Surface",
}
ANSWER = ended(
    "passed", "passed", files={"input/input1.pkl": b"i", "ans/ans1.pkl": b"a", "ans/ans2.pkl": b"b"}
)


def test_the_jobs_of_a_problem() -> None:
    assert [list(cases({"test_case_cnt": count})) for count in (3, "1", 0)] == [[1, 2, 3], [1], [1]]
    [job] = answer_jobs(OLD)
    assert job.programs == tuple(Program("make()", 300.0, argv=("--test_case", case)) for case in ("1", "2"))
    assert job.files == {**FOLDERS, "a.csv": b"\xc3\xa9"} and job.collect == ("input/*", "ans/*")
    assert FOLDERS == {"input/": b"", "ans/": b"", "result/": b""}
    assert answer_jobs({**OLD, "code_context": "def test_execution(s): pass"}) == []


def test_the_job_of_a_sample() -> None:
    """Its program for every case, and then the check, which alone has the answers."""
    job = sample_job(OLD, ANSWER, "plt.show()\nx = 1")
    *runs, check = job.programs
    code = OLD["code_context"].replace("[insert]", "plt.show()\nx = 1")
    assert runs == [Program(code, 60.0, argv=("--test_case", case)) for case in ("1", "2")]
    wanted = [base64.b64encode(answer).decode() for answer in (b"a", b"b")]
    call = (OLD["test_code"], "plt.show()\nx = 1", True, wanted)
    assert (check.code, check.seconds) == ("", 60.0) and check.check.endswith(f"\ncheck(*{call!r})\n")
    assert job.files == {**FOLDERS, "a.csv": b"\xc3\xa9", "input/input1.pkl": b"i"} and job.collect == ()
    assert job.imports == ("numpy", "pandas.core", "scipy.sparse"), "tensorflow does not survive a fork"
    plot = sample_job({**OLD, "lib": "Matplotlib", "test_type": 1}, ANSWER, "plt.show()\nx = 1")
    assert "plt.show()" not in plot.programs[0].code and plot.files["ans/ans1.pkl"] == b"a"
    assert f"{('  import scipy.sparse' + chr(10) + 'def test(): pass', 'x = 1', False, wanted)!r}" in (
        plot.programs[-1].check
    )
    lacking = sample_job(OLD, ended("passed", files={}), "x")
    assert lacking.programs[-1].check.endswith(f"{(OLD['test_code'], 'x', True, ['', ''])!r})\n")


NEW: JsonRow = {**OLD, "code_context": "import torch\ndef test_execution(s): pass\ndef test_string(s): pass"}


@pytest.mark.parametrize(("library", "apart"), [("Pandas", True), ("Pandas", False), ("Matplotlib", True)])
def test_the_job_of_a_sample_of_the_newer_release(library: str, apart: bool) -> None:
    job = sample_job({**NEW, "lib": library, "test_code": ""}, None, "x = 1", apart=apart)
    [one] = job.programs
    assert one.seconds == 60.0 and job.imports == ("torch",) and job.files == {}
    if library == "Pandas" and apart:
        assert one.code == ds1000._RUN
        assert one.check.endswith(f"\ncheck_new(*{(NEW['code_context'], 'x = 1')!r}, call('run'))\n")
    else:
        assert one.code == f"{NEW['code_context']}\ncode = 'x = 1'\ntest_execution(code)\ntest_string(code)\n"
        assert one.check == ""
    plain = {**NEW, "code_context": "def test_execution(s): pass", "lib": "Matplotlib"}
    assert "test_string" not in sample_job(plain, None, "x").programs[0].code


def test_the_check_decides_and_the_first_fault_is_told() -> None:
    assert result_of(ended("failed: x", "passed")) == "passed"
    assert result_of(ended("passed", "timed out", "failed: y")) == "timed out"
    assert result_of(ended("passed", "failed: y")) == "failed: y"
    assert (
        ds1000.ready(None)
        and ds1000.ready(ended("passed"))
        and not ds1000.ready(ended("passed", "failed: x"))
    )


def test_the_account_of_problems() -> None:
    """One whose answers cannot be made is broken; samples that cannot be judged apart are run again whole."""
    items = {
        "Pandas/1": {**OLD, "problem_id": 1},
        "Pandas/2": {**OLD, "problem_id": 2, "test_generate_pickle": "fails"},
        "Numpy/3": {**NEW, "lib": "Numpy", "problem_id": 3, "test_code": ""},
        "Matplotlib/4": {**NEW, "lib": "Matplotlib", "problem_id": 4, "test_code": ""},
    }

    def answer(job: Job) -> Outcome:
        first, last = job.programs[0], job.programs[-1]
        if first.code == "fails":
            return ended("passed", "failed: no such library")
        if first.code == "make()":
            return ANSWER
        if "odd" in f"{first.code}{last.check}":
            return ended(NOT_APART) if last.check else ended("passed")
        slow = "slow" in f"{first.code}{last.check}"
        return ended(*["passed"] * (len(job.programs) - 1), "timed out" if slow else "passed")

    how, box = execution(answer, items)
    rows: list[JsonRow] = [
        {
            "lib": "Pandas",
            "problem_id": 1,
            "prompt": "p",
            "output": ["good", "slow"],
            "perturbation_type": "Own",
        },
        {"lib": "Pandas", "problem_id": 2, "prompt": "p", "output": ["good", "good", "good"]},
        {"lib": "Numpy", "problem_id": 3, "prompt": "p", "output": ["odd", "good"]},
        {"lib": "Matplotlib", "problem_id": 4, "prompt": "p", "output": ["good"]},
    ]
    counted = ("samples", "passed", "timed_out", "broken", "in_process")
    for name in counted:
        setattr(how, name, 100)
    made = ds1000.execute(rows, how)
    broken = "not run: no answers to compare with: failed: no such library"
    assert [row["result"] for row in made] == [
        ["passed", "timed out"], [broken] * 3, ["passed", "passed"], ["passed"],
    ]  # fmt: skip
    assert [row["passed"] for row in made] == [[True, False], [False] * 3, [True, True], [True]]
    assert [row["perturbation_type"] for row in made] == ["Own", "Surface", "Surface", "Surface"]
    counts = [getattr(how, name) for name in counted]
    assert counts == [108, 104, 101, 103, 102] and box.limits == ds1000.LIMITS
    mib = 1 << 20
    assert Limits(
        memory=16384 * mib, processes=512, open_files=1024, tmp_bytes=1024 * mib, total=16384 * mib
    ) == ds1000.LIMITS  # fmt: skip


def test_rows_of_problems_that_do_not_fit() -> None:
    items = {"Pandas/3": OLD}
    row: JsonRow = {"lib": "Pandas", "problem_id": 3, "prompt": "p", "output": []}
    assert ds1000.item_of(row, items) is OLD
    bad: list[tuple[JsonRow, str]] = [
        ({"output": None}, "Pandas/3: no list of samples under 'output'"),
        ({"problem_id": 4}, "no problem 'Pandas/4' in the data: name it with --data FILE|hub"),
        ({"prompt": "q"}, "the prompt of 'Pandas/3' is not the one of the data: wrong --data?"),
    ]
    for change, says in bad:
        with pytest.raises(UserError) as raised:
            ds1000.item_of({**row, **change}, items)
        assert str(raised.value) == says


def test_the_newer_release_is_named_as_the_older_one() -> None:
    meta = {"library": "Numpy", "library_problem_id": "12", "perturbation_type": "Origin", "problem_id": 5}
    assert ds1000.public({"prompt": "p", "metadata": meta}) == {
        "lib": "Numpy", "problem_id": 12, "perturbation_type": "Origin", "prompt": "p",
    }  # fmt: skip
    assert ds1000.public({"metadata": {"library": "X"}}) == {
        "lib": "X", "problem_id": "None", "perturbation_type": "",
    }  # fmt: skip
    for same in ({"lib": "X", "metadata": meta}, {"metadata": "x"}, {"prompt": "p"}):
        assert ds1000.public(same) == same
    rows = tuple({"lib": "Numpy", "problem_id": i} for i in range(1000))
    whole = DataTable("'f'", "line", rows, tuple(range(1, 1001)))
    drawn = ds1000.prepare(whole)
    assert len(drawn.rows) == 200 and all(
        row["problem_id"] == n - 1 for row, n in zip(drawn.rows, drawn.numbers, strict=True)
    )
    draws = np.random.RandomState(42).choice(1000, size=200, replace=False).tolist()
    assert [row["problem_id"] for row in drawn.rows] == draws
    short = DataTable("'f'", "line", rows[:999], tuple(range(1, 1000)))
    odd = DataTable("'f'", "line", ({"lib": "Other", "problem_id": 0}, *rows[1:]), tuple(range(1, 1001)))
    assert ds1000.prepare(short) is short and ds1000.prepare(odd) is odd
    mixed = [{"lib": ds1000.LIBRARIES[-1 - i % 7], "problem_id": str(i)} for i in range(1000)]
    ordered = sorted(mixed, key=lambda row: (ds1000.LIBRARIES.index(row["lib"]), int(row["problem_id"])))
    found = ds1000.prepare(DataTable("'f'", "line", tuple(mixed), tuple(range(1, 1001)))).rows
    assert list(found) == [ordered[at] for at in draws]


def test_the_scores_of_a_problem() -> None:
    row: JsonRow = {"lib": "Sklearn", "perturbation_type": "Difficult-Rewrite"}
    assert ds1000.score({**row, "passed": [True] + [False] * 9}) == {
        "pass@10": 1, "sklearn_pass@10": 1, "pass@1": 0.1, "difficult-rewrite": 0.1,
    }  # fmt: skip
    assert ds1000.score({**row, "passed": [True, False]}) == {
        "pass@10": None, "sklearn_pass@10": None, "pass@1": 0.5, "difficult-rewrite": 0.5,
    }  # fmt: skip
    for none in (None, [], [True, None]):
        assert ds1000.score({"lib": "Sklearn", "perturbation_type": "", "passed": none}) == {
            "not_run": 1, "pass@10": None, "sklearn_pass@10": None, "pass@1": None,
        }  # fmt: skip
