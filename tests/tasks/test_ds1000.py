"""DS-1000: the paper's 200 problems, their prompts, and samples that are run against the problems' tests."""

from __future__ import annotations

import datetime
import io
import json
import pickle
import re
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from proxytune.errors import UserError
from proxytune.records import Completion, JsonRow
from proxytune.sandbox.sandbox import Sandbox
from proxytune.tasks import ds1000, get_task, read_source, score_file
from proxytune.tasks.programs.ds1000_check import NoData, Reader, answer_of, old_parser, without_prints
from proxytune.tasks.task import Execution
from tests.support import published
from tests.support.published import DS1000
from tests.support.tiers import WHOLE

TASK = get_task("ds1000")
LIBRARIES = {
    "Pandas": 55,
    "Numpy": 41,
    "Matplotlib": 38,
    "Tensorflow": 9,
    "Scipy": 18,
    "Sklearn": 23,
    "Pytorch": 16,
}
KINDS = {"Origin": 91, "Surface": 25, "Semantic": 48, "Difficult-Rewrite": 36}
NEW = {
    "prompt": "Problem:\nAdd one.\nA:\n<code>\nx = 1\n</code>\nresult = ... # put solution in this variable",
    "reference_code": "result = x + 1",
    "metadata": {
        "problem_id": 7,
        "library_problem_id": 3,
        "library": "Numpy",
        "test_case_cnt": 1,
        "perturbation_type": "Semantic",
        "perturbation_origin_id": 2,
    },
    "code_context": "import numpy as np\nexec_context = '''\nx = 1\n[insert]\n'''\n\n"
    "def test_execution(solution: str):\n    env = {}\n"
    "    exec(exec_context.replace('[insert]', solution), env)\n    assert np.all(env['result'] == 2)\n\n"
    "def test_string(solution: str):\n    assert 'for' not in solution\n",
}
"""A problem in the form of the hub's release."""


@pytest.fixture(scope="module")
def problems(reference: Path) -> dict[str, JsonRow]:
    """The paper's 200 problems by id, in its order."""
    source = str(reference / "data" / "ds1000" / "ds1000_completion.jsonl.gz")
    return {example.id: example.target for example in read_source(TASK, source).examples}


def asked(item: JsonRow, *samples: str) -> JsonRow:
    """A stored row with these samples."""
    names = {"lib": item["lib"], "problem_id": item["problem_id"], "prompt": item["prompt"]}
    return {**names, "solution": item["reference_code"], "output": list(samples)}


def results(box: Sandbox, item: JsonRow, *samples: str) -> list[str]:
    """How samples of one problem end."""
    (row,) = ds1000.execute([asked(item, *samples)], Execution(box, {ds1000.name_of(item): item}))
    assert row["passed"] == [result == "passed" for result in row["result"]]
    found: list[str] = row["result"]
    return found


# Problems


def test_the_papers_200_are_drawn_in_its_order(reference: Path, problems: dict[str, JsonRow]) -> None:
    subset = (reference / "data" / "ds1000" / "paper_subset_200.jsonl").read_text().splitlines()
    assert list(problems) == [ds1000.name_of(json.loads(line)) for line in subset]
    assert Counter(item["lib"] for item in problems.values()) == LIBRARIES
    assert Counter(item["perturbation_type"] for item in problems.values()) == KINDS


def test_prompts_are_the_papers(reference: Path, problems: dict[str, JsonRow]) -> None:
    source = str(reference / "data" / "ds1000" / "ds1000_completion.jsonl.gz")
    examples = read_source(TASK, source).examples
    for name in DS1000:
        folder = reference / "golden" / "ds1000" / name
        assert examples[0].prompt.plain == (folder / "example_prompt.txt").read_text(encoding="utf-8")
        stored = published.rows(folder / "predictions.jsonl.gz")
        assert [(row["prompt"], row["solution"]) for row in stored] == [
            (item["prompt"], item["reference_code"]) for item in problems.values()
        ]
    for example in examples:
        text = example.target["prompt"]
        assert example.prompt.plain == text + "\n" * (not text.endswith("\n")) == example.prompt.user
    assert sum(not example.target["prompt"].endswith("\n") for example in examples) == 21


def test_settings_are_the_papers() -> None:
    s = TASK.sampling
    assert (s.n, s.temperature, s.top_p, s.max_new_tokens) == (20, 0.8, 0.95, 512)
    assert s.stop == ("\n</code>", "\n# SOLUTION END", "\nEND SOLUTION")
    assert s.ban == ("pass", "...") and s.ban_first == ("</",)


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, box: Sandbox) -> None:
    """A local folder with the hub's columns stands for the hub; its problems bring their tests along."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "ds").mkdir()
    datasets.Dataset.from_list([NEW]).to_parquet(tmp_path / "ds" / "test.parquet")
    assert TASK.hub is not None and TASK.hub.id == "xlangai/DS-1000"
    (example,) = read_source(replace(TASK, hub=replace(TASK.hub, id=str(tmp_path / "ds"))), "hub").examples
    assert example.id == "Numpy/3" and example.prompt.plain == NEW["prompt"] + "\n"
    found = results(
        box,
        example.target,
        "result = x + 1",
        "result = x",
        "for i in [1]: result = 2",
        "import os; os._exit(0)",
    )
    assert [result.partition(":")[0] for result in found] == ["passed", "failed", "failed", "failed"]


def test_a_smaller_file_is_taken_as_it_is_and_must_be_whole(tmp_path: Path) -> None:
    row = {"lib": "Numpy", "problem_id": 1, "prompt": "p", "reference_code": "r", "code_context": "[insert]"}
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({**row, "test_code": ""}))
    assert [example.id for example in read_source(TASK, str(path)).examples] == ["Numpy/1"]
    for bad, message in [
        (row, "line 1: no field 'test_code'"),
        ({**row, "test_code": "", "problem_id": "1"}, "line 1: `problem_id` must be the number"),
        ({**row, "code_context": None}, "line 1: no field 'code_context'"),
    ]:
        path.write_text(json.dumps(bad))
        with pytest.raises(UserError, match=message):
            read_source(TASK, str(path))


# Rows and scores


def test_rows_have_the_papers_fields(problems: dict[str, JsonRow]) -> None:
    example = TASK.examples(ds1000.DataTable("'t'", "line", (problems["Pandas/136"],), (1,)), "")[0]
    text = "x = 1\nprint(x)\n  assert x\nresult = x\n"
    completions = [Completion("0", i, text, (), "eos", 0.0) for i in range(2)]
    row = TASK.row(example, completions)
    assert list(row)[:5] == ["lib", "problem_id", "prompt", "solution", "output"]
    assert row["output"] == ["x = 1\nresult = x"] * 2 and TASK.scores(row) == {"not_run": 1.0}


def test_scores_by_library_and_perturbation() -> None:
    row = {"lib": "Numpy", "perturbation_type": "Surface", "output": [""] * 20}
    metrics = TASK.metrics([{**row, "passed": [True] + [False] * 19}, {**row, "passed": [False] * 20}])
    values = {name: metric.value for name, metric in metrics.items()}
    assert values == pytest.approx(
        {"pass@10": 0.25, "numpy_pass@10": 0.25, "pass@1": 0.025, "surface": 0.025}
    )
    assert TASK.headline_of(metrics) == "pass@10" and metrics["pass@10"].low is not None


@pytest.mark.parametrize("name", DS1000)
def test_golden_metrics_are_means_over_the_200(reference: Path, name: str) -> None:
    """No verdicts are stored: what can be checked is that our grouping is the one of the stored figures."""
    stored = json.loads((reference / "golden" / "ds1000" / name / "metrics.json").read_text())
    by_lib = sum(count * stored["by_lib"][f"{lib.lower()}_pass@10"] for lib, count in LIBRARIES.items()) / 200
    assert by_lib == pytest.approx(stored["pass@10"], abs=1e-12)
    passed = [20 * count * stored["by_perturbation_type"][kind.lower()] for kind, count in KINDS.items()]
    assert passed == pytest.approx([round(count) for count in passed], abs=1e-9)
    assert round(sum(passed)) == DS1000[name]
    report = score_file(TASK, reference / "golden" / "ds1000" / name / "predictions.jsonl.gz")
    assert report.n == 200 and report.headline == "not_run"


# The check


def test_the_old_parser_gives_the_words_of_code() -> None:
    parser = old_parser()
    words = [word for _, word in parser.st2list(parser.suite("for x in y:\n    a.assign(1)  # while\n"))]
    assert {"for", "assign", "x"} <= set(words) and "while" not in words
    with pytest.raises(SyntaxError):
        parser.suite("for x in")
    assert without_prints("a\nprint(b)\n  c.print()\nd") == "a\nd"


def test_plots_are_not_cleared() -> None:
    code = "plt.plot(x)\nplt.show()\nplt.clf()\nfig.savefig('a')\nplt.close()\nplt.close('all')"
    assert ds1000.without_clears(code) == "plt.plot(x)\nplt.close('all')"


# Running


PASSING = ["Pandas/136", "Pandas/76", "Numpy/120"]
OLDER = {
    "Pandas/39": "pandas 1: comparing text with numbers",
    "Pandas/63": "pandas 2: numbers in a column of text",
    "Pandas/88": "pandas 2: numbers in a column of text",
    "Pandas/120": "pandas 2: read_csv(delim_whitespace=)",
    "Pandas/184": "numpy 1: np.NAN",
    "Pandas/199": "pandas 1: str.split with positional arguments",
    "Pandas/209": "pandas 1: to_datetime with a loose format",
    "Pandas/210": "pandas 1: to_datetime with a loose format",
    "Pandas/221": "pandas 1: str.rsplit with positional arguments",
}
"""Problems whose own generator needs an older library than the pinned ones."""
HOSTILE = """
import os, pickle
class Hostile:
    def __reduce__(self):
        return (os.system, ("touch {canary}; touch /tmp/x; cat /etc/passwd",))
result = Hostile()
"""


def test_reference_code_passes_and_broken_code_fails(box: Sandbox, problems: dict[str, JsonRow]) -> None:
    for name in PASSING:
        item = problems[name]
        found = results(
            box, item, item["reference_code"], "result = None", "", "1 / 0", "raise SystemExit(0)", "("
        )
        assert found[0] == "passed", (name, found)
        assert all(result.startswith("failed") for result in found[1:]), (name, found)


def test_words_are_checked_where_the_problem_says_so(box: Sandbox, problems: dict[str, JsonRow]) -> None:
    item = next(i for i in problems.values() if i["lib"] == "Numpy" and int(i["test_type"]) == 3)
    code = item["reference_code"]
    found = results(box, item, code, f"{code}\nfor _ in []:\n    x = 1\nwhile False:\n    x = 1")
    assert found[0] == "passed" and "the words of the code" in found[1]


def test_a_hostile_pickle_stays_in_the_sandbox(
    box: Sandbox, problems: dict[str, JsonRow], tmp_path: Path
) -> None:
    item, canary = problems["Numpy/120"], tmp_path / "canary"
    found = results(box, item, HOSTILE.format(canary=canary), item["reference_code"])
    assert found[0].startswith("failed") and found[1] == "passed"
    assert not canary.exists()


FORGED = {
    "a function that runs": "return exec, (\"import sys; sys.modules['test_code'].test = lambda *_: 1\",)",
    "an object that equals everything": "return Equal, ()",
    "a listener in the check": "return __import__('builtins').getattr, (__import__('os'), 'system')",
}
"""What a result may do instead of being right: the body of its `__reduce__`."""


@pytest.mark.parametrize("body", FORGED.values(), ids=list(FORGED))
def test_a_result_cannot_decide(box: Sandbox, problems: dict[str, JsonRow], body: str) -> None:
    item = problems["Numpy/120"]
    code = f"class Equal:\n    def __eq__(self, other): return True\n    def __reduce__(self): {body}\n"
    (found,) = results(box, item, f"{code}result = df = Equal()")
    assert found.startswith("failed: ")


def test_results_are_read_without_running_them() -> None:
    numpy, pandas = pytest.importorskip("numpy"), pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [1, 2], "b": ["x", None], "c": pandas.to_datetime(["2020-01-01"] * 2)})
    plain = [
        frame, frame.a, frame.set_index(["a", "b"]), frame.index, frame.dtypes, frame.b.astype("category"),
        frame.a.astype("Int64"), frame.c[0], frame.c[0] - frame.c[1], pandas.NaT, pandas.NA,
        pandas.interval_range(0, 3), pandas.period_range("2020", periods=2, freq="D"),
        frame.c.dt.tz_localize("UTC"), numpy.arange(6).reshape(2, 3), numpy.float32(1.5), numpy.dtype("f4"),
        numpy.array([1, "a"], dtype=object), numpy.ma.array([1, 2], mask=[0, 1]), numpy.float64,
        {"a": [1, {2.0, None}]}, Decimal("1.5"), datetime.date(2020, 1, 1),
    ]  # fmt: skip
    sparse, torch = pytest.importorskip("scipy.sparse"), pytest.importorskip("torch")
    plain += [sparse.csr_matrix(numpy.eye(2)), torch.arange(4.0).view(2, 2), torch.float32]
    for protocol in (2, 4, 5):
        for value in plain:
            data = pickle.dumps(value, protocol)
            assert repr(Reader(io.BytesIO(data), set()).load()) == repr(value)
    answer = pickle.dumps(re.compile("a"))
    with pytest.raises(NoData, match=r"the result holds 're\._compile', which is no data"):
        Reader(io.BytesIO(answer), set()).load()
    assert Reader(io.BytesIO(answer), answer_of(answer)[1]).load() == re.compile("a")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"cpandas.core.frame\nDataFrame\n}(Vequals\ncbuiltins\nset\nub.", "changes a class or a function"),
        (b"cpandas.core.frame\nDataFrame\n)\x81}(Vequals\ncbuiltins\nset\nub.", "the method 'equals'"),
        (
            b"cpandas.core.frame\nDataFrame\n)\x81N}(V__class__\ncbuiltins\nset\nu\x86b.",
            "the method '__class__'",
        ),
        (b"cnumpy\nload\n(Vx\ntR.", "'numpy.load', which is no data"),
        (b"cpandas.core.arrays.base\noperator\n.", "'pandas.core.arrays.base.operator', which is no data"),
        (b"cos\nsystem\n(Vtrue\ntR.", "'os.system', which is no data"),
    ],
)
def test_a_result_changes_nothing(data: bytes, reason: str) -> None:
    pytest.importorskip("pandas")
    with pytest.raises(NoData, match=reason):
        Reader(io.BytesIO(b"\x80\x04" + data), set()).load()


NEWER = """
import copy
def generate_test_case(number):
    def define(number): return {"x": [1, 2 * number]}
    given = define(number)
    return given, [one + 7919 for one in copy.deepcopy(given)["x"]]
def exec_test(result, answer):
    return int(result == answer)
exec_context = 'x = test_input["x"]\\n[insert]\\n'
def test_execution(solution):
    code = exec_context.replace("[insert]", solution)
    for i in range(2):
        test_input, expected_result = generate_test_case(i + 1)
        test_env = {"test_input": test_input}
        exec(code, test_env)
        assert exec_test(test_env["result"], expected_result)
"""
"""The tests of the newer release, in its form."""


def test_the_newer_release_is_judged_from_outside(box: Sandbox) -> None:
    item = ds1000.public({**NEW, "code_context": NEWER})
    equal = "class E(list):\n    def __eq__(self, other): return True\nresult = E()"
    frames = "import sys\nframe = sys._getframe()\nwhile frame and 'expected_result' not in frame.f_locals:\n"
    frames += "    frame = frame.f_back\nresult = frame.f_locals['expected_result'] if frame else 0"
    fork = "import os\nif os.fork():\n    os.wait()\n    os._exit(0)\nresult = 0"
    samples = ["result = [i + 7919 for i in x]", "result = x", equal, frames, fork, ""]
    found = results(box, item, *samples)
    assert [one == "passed" for one in found] == [True] + [False] * 5, found


def test_a_newer_problem_whose_input_cannot_be_sent_is_judged_in_process(box: Sandbox) -> None:
    context = NEWER.replace("return given,", "return dict(given, f=lambda: 0),")
    item = ds1000.public({**NEW, "code_context": context})
    execution = Execution(box, {"Numpy/3": item})
    (row,) = ds1000.execute([asked(item, "result = [i + 7919 for i in x]", "result = x")], execution)
    assert row["passed"] == [True, False] and execution.in_process == 2


def test_samples_cannot_spoil_each_other(box: Sandbox, problems: dict[str, JsonRow]) -> None:
    item = problems["Numpy/120"]
    spoil = "import os\nos.makedirs('ans', exist_ok=True)\nopen('numpy.py', 'w').write('1/0')\n"
    spoil += "if os.fork() == 0:\n    import time\n    time.sleep(60)\nresult = 0"
    kill = "import os\nos.kill(os.getppid(), 9)\nos.kill(-1, 9) if os.getppid() == 1 else 0"
    found = results(box, item, spoil, kill, item["reference_code"])
    assert [result == "passed" for result in found] == [False, False, True]


@pytest.mark.slow
def test_an_endless_sample_is_timed_out(
    box: Sandbox, problems: dict[str, JsonRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ds1000, "CASE_SECONDS", 1.0)
    assert results(box, problems["Numpy/120"], "while True: pass") == ["timed out"]


def test_a_problem_that_cannot_be_set_up_is_counted_apart(box: Sandbox, problems: dict[str, JsonRow]) -> None:
    item = {**problems["Numpy/120"], "test_generate_pickle": "import no_such_library"}
    execution = Execution(box, {"Numpy/120": item})
    (row,) = ds1000.execute([asked(item, "a", "b")], execution)
    assert row["passed"] == [False, False] and (execution.samples, execution.broken) == (2, 2)
    assert row["result"][0].startswith("not run: no answers to compare with: failed: ModuleNotFoundError")


def test_rows_and_data_must_fit(box: Sandbox, problems: dict[str, JsonRow]) -> None:
    row = asked(problems["Numpy/120"], "")
    with pytest.raises(UserError, match="no problem 'Numpy/120' in the data: name it with --data"):
        ds1000.execute([row], Execution(box, {}))
    with pytest.raises(UserError, match="the prompt of 'Numpy/120' is not the one"):
        ds1000.execute([{**row, "prompt": "x"}], Execution(box, problems))
    with pytest.raises(UserError, match="Numpy/120: no list of samples under 'output'"):
        ds1000.execute([{**row, "output": "x"}], Execution(box, problems))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_reference_code_of_all_pandas_and_numpy_problems(box: Sandbox, problems: dict[str, JsonRow]) -> None:
    """With current libraries: what can be set up passes, what is broken fails, and the rest is listed. Of all
    problems with PROXYTUNE_WHOLE=1, of each fourth without."""
    both = [(name, item) for name, item in problems.items() if item["lib"] in ("Pandas", "Numpy")]
    assert len(both) == 96
    chosen = dict(both if WHOLE else both[::4])
    rows = [asked(item, item["reference_code"], "result = df = NotImplemented") for item in chosen.values()]
    found = ds1000.execute(rows, Execution(box, problems))
    by_name = dict(zip(chosen, found, strict=True))
    unset = {name for name, row in by_name.items() if "no answers to compare with" in row["result"][0]}
    missing = {name for name in unset if "ModuleNotFoundError" in by_name[name]["result"][0]}
    assert unset - missing <= set(OLDER)
    wrong = {
        name: row["result"] for name, row in by_name.items() if name not in unset and not row["passed"][0]
    }
    assert wrong == {}
    assert [name for name, row in by_name.items() if row["passed"][1]] == []
    assert len(chosen) - len(unset) >= (82 if WHOLE else 18)
