"""DS-1000: data-science problems over seven libraries. Lai et al. 2023; the paper's section 4.3.

The paper takes 200 of the 1,000 problems in Completion mode (`DataFrame.sample(200, random_state=42)` over
the libraries in the order of `LIBRARIES`), 20 samples at temperature 0.8 and top-p 0.95; the prompt is the
problem's text, ended by a line break. pass@10 is its metric; by library also pass@10, by kind of
perturbation the plain share of samples that pass.

Both releases are read. The folder release (one row per problem, what the paper used):
`test_generate_pickle` writes each case's input and answer, the sample takes the place of `[insert]` in
`code_context`, and `test_code` compares what it wrote. The newer one on the hub: `code_context` defines
`test_execution`. The published figures need the libraries of 2022 (Python 3.7.10, numpy 1.21.6, pandas
1.3.5, ...): `--code-python` names an interpreter.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from proxytune.config import Sampling
from proxytune.errors import UserError
from proxytune.records import Completion, Example, JsonRow, Prompt
from proxytune.sandbox import MIB, NOT_APART, Job, Limits, Outcome, Program, Sandbox
from proxytune.tasks.data import DataTable, Hub
from proxytune.tasks.scoring.rules import clean_code, pass_at_k, verdict
from proxytune.tasks.task import NOT_EXECUTED, NOT_RUN, Execution, Task

LIBRARIES = ("Pandas", "Numpy", "Matplotlib", "Tensorflow", "Scipy", "Sklearn", "Pytorch")
ALL, SUBSET, SUBSET_SEED = 1000, 200, 42
CASE_SECONDS, ANSWER_SECONDS = 60.0, 300.0
LIMITS = Limits(memory=16384 * MIB, processes=512, open_files=1024, tmp_bytes=1024 * MIB, total=16384 * MIB)
FOLDERS = {"input/": b"", "ans/": b"", "result/": b""}
SAMPLING = Sampling(
    max_new_tokens=512,
    n=20,
    temperature=0.8,
    top_p=0.95,
    stop=("\n</code>", "\n# SOLUTION END", "\nEND SOLUTION"),
    ban=("pass", "..."),
    ban_first=("</",),
)

IN_PROCESS = ("Matplotlib",)
"""Libraries whose problems look at the sample's figure in its own process."""
_RUN = """
def run(code, given):
    import pickle
    names = pickle.loads(given)
    exec(code, names)
    found = {}
    for name, value in names.items():
        try:
            found[name] = pickle.dumps(value)
        except Exception:
            pass  # a module, say
    return found
"""
"""What a sample of the newer release runs in; ds1000_check.py calls it."""
_CHECK = Path(__file__).parent / "programs" / "ds1000_check.py"
_IMPORT = re.compile(r"^\s*(?:import|from)\s+([\w.]+)", re.MULTILINE)
_PRELOADED = ("numpy", "pandas", "scipy", "sklearn", "matplotlib", "seaborn", "PIL", "torch")
"""Loaded once for all samples of a problem. Not tensorflow, whose threads do not survive a fork."""
_CLEARS = ("plt.show()", "plt.clf()", "plt.close()", "savefig")
_TEXTS = ("lib", "prompt", "reference_code", "code_context")


# Problems


def public(row: JsonRow) -> JsonRow:
    """A row of the newer release, in the hub or in ds1000.jsonl.gz, under the names of the folder release."""
    meta = row.get("metadata")
    if not isinstance(meta, Mapping) or "lib" in row:
        return row
    number = str(meta.get("library_problem_id"))
    named = {
        "lib": meta.get("library"),
        "problem_id": int(number) if number.isdecimal() else number,
        "perturbation_type": meta.get("perturbation_type", ""),
    }
    return named | {name: value for name, value in row.items() if name != "metadata"}


def prepare(table: DataTable) -> DataTable:
    """The whole set -> the paper's 200 in its order; a smaller file is taken as it is."""
    if len(table.rows) != ALL or not all(row.get("lib") in LIBRARIES for row in table.rows):
        return table
    places = sorted(
        range(ALL), key=lambda i: (LIBRARIES.index(table.rows[i]["lib"]), int(table.rows[i]["problem_id"]))
    )
    drawn = np.random.RandomState(SUBSET_SEED).choice(ALL, size=SUBSET, replace=False)
    chosen = [places[int(at)] for at in drawn]
    return replace(
        table,
        rows=tuple(table.rows[place] for place in chosen),
        numbers=tuple(table.numbers[place] for place in chosen),
    )


def name_of(row: JsonRow) -> str:
    """The id of a problem: `Pandas/0`."""
    return f"{row['lib']}/{row['problem_id']}"


def examples(table: DataTable, shots: str) -> list[Example]:
    """Problems -> examples."""
    made = []
    for index, row in enumerate(table.rows):
        if not isinstance(row.get("problem_id"), int):
            raise UserError(f"{table.where(index)}: `problem_id` must be the number of the problem")
        if not is_new(row) and not isinstance(row.get("test_code"), str):
            raise UserError(f"{table.where(index)}: no field 'test_code' (and no newer form)")
        text = row["prompt"] if row["prompt"].endswith("\n") else row["prompt"] + "\n"
        made.append(Example(id=name_of(row), prompt=Prompt(plain=text, user=text), target=row))
    return made


def is_new(row: JsonRow) -> bool:
    """Whether a problem has the form of the newer release."""
    return "def test_execution" in row["code_context"]


def stored(example: Example, completions: Sequence[Completion]) -> JsonRow:
    """The row that the paper's repository stores, and the kind of perturbation."""
    target = example.target
    return {
        "lib": target["lib"],
        "problem_id": target["problem_id"],
        "prompt": target["prompt"],
        "solution": target["reference_code"],
        "output": [clean_code(completion.text) for completion in completions],
        "perturbation_type": target.get("perturbation_type", ""),
    }


def score(row: JsonRow) -> dict[str, float | None]:
    """pass@10 overall and of the row's library, pass@1, and the share that passes under its perturbation;
    or that the row was not run."""
    passed, kind = row.get("passed"), row.get("perturbation_type")
    ten, one, found = None, None, dict[str, float | None]()
    if isinstance(passed, list) and passed and all(verdict(sample) is not None for sample in passed):
        count, n = sum(map(bool, passed)), len(passed)
        ten, one = pass_at_k(n, count, 10), count / n
    else:
        found[NOT_RUN] = 1.0
    found |= {"pass@10": ten, f"{row['lib'].lower()}_pass@10": ten, "pass@1": one}
    return found | ({kind.lower(): one} if kind else {})


# Running


def execute(rows: Sequence[JsonRow], execution: Execution) -> list[JsonRow]:
    """The rows with `passed` and `result` of every sample. The samples of one problem share a sandbox,
    because their imports take longer than they do."""
    sandbox = execution.sandbox.limited(LIMITS)
    items = [item_of(row, execution.items) for row in rows]
    answers = [made[0] if made else None for made in sandbox.map([answer_jobs(item) for item in items])]
    made = []
    judged = run_samples(sandbox, rows, items, answers)
    for row, item, answer, (results, in_process) in zip(rows, items, answers, judged, strict=True):
        if answer is not None and not ready(answer):
            results = [f"{NOT_EXECUTED}no answers to compare with: {result_of(answer)}"] * len(row["output"])
            execution.broken += len(results)
        execution.samples += len(results)
        execution.passed += results.count("passed")
        execution.timed_out += results.count("timed out")
        execution.in_process += in_process
        verdicts = {"result": results, "passed": [result == "passed" for result in results]}
        made.append({"perturbation_type": item.get("perturbation_type", ""), **row, **verdicts})
    return made


def run_samples(
    sandbox: Sandbox, rows: Sequence[JsonRow], items: Sequence[JsonRow], answers: Sequence[Outcome | None]
) -> list[tuple[list[str], int]]:
    """The results of each row's samples, and how many were judged in their own process. None where there are
    no answers."""
    lists = [row["output"] if ready(answer) else [] for row, answer in zip(rows, answers, strict=True)]
    problems = list(zip(items, answers, lists, strict=True))
    apart = sandbox.map([sample_job(item, answer, one) for one in own] for item, answer, own in problems)
    first = [[result_of(outcome) for outcome in outcomes] for outcomes in apart]
    again = [
        [sample_job(item, answer, own[at], apart=False) for at, one in enumerate(found) if one == NOT_APART]
        for (item, answer, own), found in zip(problems, first, strict=True)
    ]
    made = []
    for (item, _, own), found, outcomes in zip(problems, first, sandbox.map(again), strict=True):
        second = iter(outcomes)
        results = [result_of(next(second)) if one == NOT_APART else one for one in found]
        made.append((results, len(own) if item["lib"] in IN_PROCESS else len(outcomes)))
    return made


def item_of(row: JsonRow, items: Mapping[str, JsonRow]) -> JsonRow:
    """The problem of a row; UserError where there is none, its text is another, or the row has no samples."""
    if not isinstance(row.get("output"), list):
        raise UserError(f"{name_of(row)}: no list of samples under 'output'")
    item = items.get(name_of(row))
    if item is None:
        raise UserError(f"no problem '{name_of(row)}' in the data: name it with --data FILE|hub")
    if item["prompt"] != row["prompt"]:
        raise UserError(f"the prompt of '{name_of(row)}' is not the one of the data: wrong --data?")
    return item


def cases(item: JsonRow) -> range:
    """The numbers of a problem's test cases; one without cases is still run once."""
    return range(1, max(1, int(item["test_case_cnt"])) + 1)


def answer_jobs(item: JsonRow) -> list[Job]:
    """The job that writes a problem's inputs and answers; none in the newer release, which has them."""
    if is_new(item):
        return []
    code = item["test_generate_pickle"]
    programs = [Program(code, ANSWER_SECONDS, argv=("--test_case", str(case))) for case in cases(item)]
    return [Job(tuple(programs), FOLDERS | _extra(item), collect=("input/*", "ans/*"))]


def _extra(item: JsonRow) -> dict[str, bytes]:
    """Further files of a problem."""
    return {name: text.encode() for name, text in (item.get("extra_files") or {}).items()}


def sample_job(item: JsonRow, answer: Outcome | None, solution: str, *, apart: bool = True) -> Job:
    """One sample: its program for every case, then the check, which is another process. What the sample
    writes meets the answers only there; a plot's answer is read by the problem's own program. The newer
    release is one program, whose tests run in the check, if they can be taken `apart`."""
    imports = tuple(
        dict.fromkeys(
            name
            for name in _IMPORT.findall(item["code_context"] + "\n" + item.get("test_code", ""))
            if name.partition(".")[0] in _PRELOADED
        )
    )
    reader = _CHECK.read_text(encoding="utf-8")
    if answer is None and (item["lib"] in IN_PROCESS or not apart):
        text = f"{item['code_context']}\ncode = {solution!r}\ntest_execution(code)\n"
        text += "test_string(code)\n" if "def test_string" in item["code_context"] else ""
        return Job((Program(text, CASE_SECONDS),), imports=imports)
    if answer is None:
        text = f"{reader}\ncheck_new(*{(item['code_context'], solution)!r}, call('run'))\n"
        return Job((Program(_RUN, CASE_SECONDS, check=text),), imports=imports)
    plot = item["lib"] in IN_PROCESS
    solution = without_clears(solution) if plot else solution
    given = {name: content for name, content in answer.files.items() if plot or name.startswith("input/")}
    program = item["code_context"].replace("[insert]", solution)
    runs = [Program(program, CASE_SECONDS, argv=("--test_case", str(case))) for case in cases(item)]
    wanted = [base64.b64encode(answer.files.get(f"ans/ans{case}.pkl", b"")).decode() for case in cases(item)]
    call = (item["test_code"], solution, int(item["test_type"]) == 3, wanted)
    check = Program("", CASE_SECONDS, check=f"{reader}\ncheck(*{call!r})\n")
    return Job((*runs, check), FOLDERS | _extra(item) | given, imports=imports)


def without_clears(solution: str) -> str:
    """A plotting sample without the lines that would empty or write the figure before it is looked at."""
    return "\n".join(line for line in solution.split("\n") if not any(text in line for text in _CLEARS))


def ready(answer: Outcome | None) -> bool:
    """Whether a problem's inputs and answers are there. The generator of a problem may need a library that is
    not installed, or an older one."""
    return answer is None or answer.passed


def result_of(outcome: Outcome) -> str:
    """The result of a sample: the check decides; where it fails, the reason is the first that went wrong."""
    if outcome.results[-1] == "passed":
        return "passed"
    return next(result for result in outcome.results if result != "passed")


TASK = Task(
    name="ds1000",
    summary="DS-1000: completions of data-science code, run against tests (model-written code)",
    data="github.com/xlang-ai/DS-1000 or xlangai/DS-1000: the paper's 200 of 1,000 problems",
    licence="CC BY-SA 4.0",
    items=SUBSET,
    hub=Hub("xlangai/DS-1000", None, split="test"),
    formats={
        "ds1000.jsonl.gz, hub": {
            "prompt": "the problem",
            "reference_code": "a solution",
            "code_context": "code that defines test_execution(solution)",
            "metadata": "library, library_problem_id and perturbation_type",
        },
        "the folder release, as rows": {
            "prompt": "the problem",
            "reference_code": "a solution",
            "code_context": "the code around a solution",
            "test_code": "code that compares results",
            "lib": "the library",
            "problem_id": "the number of the problem in it",
            "perturbation_type": "Origin, Surface, ... (optional)",
        },
    },
    columns=_TEXTS,
    sampling=SAMPLING,
    public=public,
    prepare=prepare,
    examples=examples,
    row=stored,
    execute=execute,
    scored=("lib", "prompt", "solution"),
    asked="prompt",
    libraries=("pandas", "numpy", "matplotlib", "tensorflow", "scipy", "sklearn", "torch"),
    score_row=score,
    metric_names=(),
    headline=NOT_RUN,
    judged_headlines=("pass@10", "pass@1"),
)
