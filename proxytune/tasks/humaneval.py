"""HumanEval: Python functions from their docstrings, run against unit tests. Chen et al. 2021; the paper's
4.3.

Prompt and rules are the paper's: the problem's text verbatim for every model (no chat format), 20 samples
at temperature 0.8 and top-p 0.95, 512 tokens, cut at the next top-level statement; lines that begin with
assert or print are dropped. A sample passes if problem, completion and tests together run to their end
within 3 seconds. pass@10 is the paper's metric; pass@1 is shown beside it.
"""

from __future__ import annotations

import ast
import builtins
import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from proxytune.config import Sampling
from proxytune.errors import UserError
from proxytune.records import Completion, Example, JsonRow, Prompt
from proxytune.sandbox import NOT_APART, Job, Program, Sandbox
from proxytune.tasks.data import DataTable, Hub
from proxytune.tasks.scoring.rules import clean_code, pass_at_k, verdict
from proxytune.tasks.task import NOT_RUN, Execution, Task

SECONDS = 3.0
"""The paper's limit."""
ALONE_SECONDS = 12.0
"""The limit of a sample that is run once more: it differs from its stored verdict by a time-out only."""
SAMPLING = Sampling(
    max_new_tokens=512,
    n=20,
    temperature=0.8,
    top_p=0.95,
    stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    ban=("pass", "..."),
)


def examples(table: DataTable, shots: str) -> list[Example]:
    """Problems -> examples, known by their task ids."""
    made = []
    for row in table.rows:
        target = {name: row[name] for name in ("task_id", "prompt", "entry_point", "test")}
        prompt = Prompt(plain=row["prompt"], user=row["prompt"])
        made.append(Example(id=row["task_id"], prompt=prompt, target=target))
    return made


def stored(example: Example, completions: Sequence[Completion]) -> JsonRow:
    """One row per problem; the paper's repository stores one per sample, which `gather` puts together."""
    row = {name: example.target[name] for name in ("task_id", "prompt")}
    return {**row, "completions": [clean_code(completion.text) for completion in completions]}


def gather(table: DataTable) -> DataTable:
    """One row per problem: rows with a `completion` (and perhaps `passed` and `result`) are put together in
    their order. The benchmark's own sample files have no `prompt`: the data has it."""
    table.require(("task_id",))
    found: dict[str, tuple[int, JsonRow]] = {}
    for index, row in enumerate(table.rows):
        if isinstance(row.get("completions"), list):
            found[f"@{index}"] = (table.numbers[index], row)
            continue
        if not isinstance(row.get("completion"), str):
            raise UserError(f"{table.where(index)}: no field 'completion' that is text")
        empty: JsonRow = {name: row[name] for name in ("task_id", "prompt") if name in row} | {
            "completions": []
        }
        _, whole = found.setdefault(row["task_id"], (table.numbers[index], empty))
        before = len(whole["completions"])
        whole["completions"].append(row["completion"])
        for name in ("passed", "result"):
            if name in row or name in whole:
                whole.setdefault(name, [None] * before).append(row.get(name))
    numbers, rows = zip(*found.values(), strict=True)
    return replace(table, rows=rows, numbers=numbers)


def score(row: JsonRow) -> dict[str, float | None]:
    """pass@10, where there are ten samples, and pass@1 from the row's verdicts, or that there are none."""
    passed = row.get("passed")
    whole = isinstance(passed, list) and len(passed) == len(row["completions"]) and len(passed) > 0
    if not isinstance(passed, list) or not whole or any(verdict(one) is None for one in passed):
        return {NOT_RUN: 1.0, "pass@10": None, "pass@1": None}
    return {f"pass@{k}": pass_at_k(len(passed), sum(map(bool, passed)), k) for k in (10, 1)}


# Running


def program(item: Mapping[str, str], completion: str, seconds: float = SECONDS) -> Program:
    """Problem and completion, judged by the tests in another process; or the paper's program, in which the
    tests follow, where they cannot be told apart from it."""
    texts = item["prompt"], item["test"], item["entry_point"]
    check = check_apart(*texts)
    if check is None:
        return whole_program(item, completion, seconds)
    text = f"{item['prompt']}{completion}\n{_imports(item['test'])}"
    return Program(text, seconds=seconds, main=False, check=check)


def whole_program(item: Mapping[str, str], completion: str, seconds: float = SECONDS) -> Program:
    """The paper's program: problem, completion, tests, and the call that runs them."""
    text = f"{item['prompt']}{completion}\n{item['test']}\ncheck({item['entry_point']})"
    return Program(text, seconds=seconds, main=False)


@functools.lru_cache(maxsize=1024)
def check_apart(prompt: str, test: str, entry_point: str) -> str | None:
    """The tests as a text that calls the program from another process. None where they need what is not
    there: other functions of the program than the prompt's own, the identity of objects, or a class."""
    tests, given = _parsed(test), _parsed(prompt) or _parsed(f"{prompt}\n    pass\n")
    if tests is None or given is None:
        return None
    if any(isinstance(node, ast.Compare) and _compares_identity(node) for node in ast.walk(tests)):
        return None
    if any(isinstance(n, ast.ClassDef | ast.AsyncFunctionDef) and n.name == entry_point for n in given.body):
        return None
    wanted = {node.id for node in ast.walk(tests) if isinstance(node, ast.Name)} - _bound(tests)
    wanted -= {*dir(builtins), entry_point}
    if wanted - _at_top(given):
        return None
    needed = prompt if wanted else ""
    text = f"{needed}\n{entry_point} = call({entry_point!r})\n{test}\ncheck({entry_point})\n"
    return None if _parsed(text) is None else text


def _parsed(text: str) -> ast.Module | None:
    """The syntax tree of a text, if it has one."""
    try:
        return ast.parse(text)
    except SyntaxError:
        return None


def _compares_identity(node: ast.Compare) -> bool:
    """Whether objects are asked to be the same; None, True and False are the same everywhere."""
    sides = [node.left, *node.comparators]
    pairs = zip(sides, node.ops, sides[1:], strict=False)
    return any(
        isinstance(op, ast.Is | ast.IsNot)
        and not (isinstance(left, ast.Constant) or isinstance(right, ast.Constant))
        for left, op, right in pairs
    )


def _bound(tree: ast.Module) -> set[str]:
    """All names that a text gives a value, in whatever scope."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            found.add(node.name)
    return found


def _at_top(tree: ast.Module) -> set[str]:
    """The names that a text gives a value outside of functions and classes."""
    inner = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    named = {node.name for node in tree.body if isinstance(node, inner)}
    return named | _bound(ast.Module([node for node in tree.body if not isinstance(node, inner)], []))


def _imports(test: str) -> str:
    """What the tests import outside of functions: in the paper's program the completion has it, too."""
    found = [node for node in ast.parse(test).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return "".join(f"{ast.unparse(node)}\n" for node in found)


def execute(rows: Sequence[JsonRow], execution: Execution) -> list[JsonRow]:
    """The rows with `passed` and `result` of every completion, each run in a sandbox of its own; equal
    programs are run once."""
    asked = [(item_of(row, execution.items), completion) for row in rows for completion in row["completions"]]
    programs = [program(item, completion) for item, completion in asked]
    ended = run_each(programs, execution)
    programs = [
        whole_program(*one) if ended[apart] == NOT_APART else apart
        for one, apart in zip(asked, programs, strict=True)
    ]
    ended |= run_each([one for one in programs if one not in ended], execution)
    execution.in_process += sum(not one.check for one in programs)
    results = [ended[one] for one in programs]
    before = [verdict for row in rows for verdict in _verdicts(row)]
    results = settle(execution, programs, results, before)
    made, at = [], 0
    for row in rows:
        own = results[at : at + len(row["completions"])]
        at += len(own)
        made.append({**row, "result": own, "passed": [result == "passed" for result in own]})
    return made


def run_each(programs: Sequence[Program], execution: Execution) -> dict[Program, str]:
    """The results of programs, each in a sandbox of its own; equal ones are run once."""
    different = list(dict.fromkeys(programs))
    outcomes = execution.sandbox.map([Job((one,))] for one in different)
    return {one: outcome.results[0] for one, (outcome,) in zip(different, outcomes, strict=True)}


def item_of(row: JsonRow, items: Mapping[str, JsonRow]) -> JsonRow:
    """The problem of a row; UserError where there is none or its text is another."""
    item = items.get(row["task_id"])
    if item is None:
        raise UserError(f"no problem '{row['task_id']}' in the data: name it with --data FILE|hub")
    if item["prompt"] != row.get("prompt", item["prompt"]):
        raise UserError(f"the prompt of '{row['task_id']}' is not the one of the data: wrong --data?")
    return item


def _verdicts(row: JsonRow) -> list[tuple[bool | None, str | None]]:
    """The stored verdict and its reason for each completion of a row; None where there is none."""
    n = len(row["completions"])
    passed, result = row.get("passed", [None] * n), row.get("result", [""] * n)
    passed = [None if verdict(one) is None else bool(one) for one in passed]
    if len(passed) != n or len(result) != n:
        raise UserError(f"'{row['task_id']}' has verdicts for another number of completions")
    return list(zip(passed, result, strict=True))


def settle(
    execution: Execution,
    programs: Sequence[Program],
    results: list[str],
    before: Sequence[tuple[bool | None, str | None]],
) -> list[str]:
    """Final results, and the account of them.

    A result that differs from the stored verdict where one of the two is a time-out may be due to
    the machine, not the code. Such a sample is run once more, alone and with a longer limit.
    """
    final = list(results)
    alone = Sandbox(execution.sandbox.backend, execution.sandbox.python.executable, workers=1)
    for index, (result, (passed, reason)) in enumerate(zip(results, before, strict=True)):
        execution.compared += passed is not None
        if passed is not None and (result == "passed") != passed and "timed out" in (result, reason):
            execution.rerun += 1
            again = replace(programs[index], seconds=ALONE_SECONDS)
            final[index] = alone.run(Job((again,))).results[0]
        execution.flips += passed is not None and (final[index] == "passed") != passed
    execution.samples += len(final)
    execution.passed += final.count("passed")
    execution.timed_out += final.count("timed out")
    return final


TASK = Task(
    name="humaneval",
    summary="HumanEval: functions from docstrings, run against unit tests (model-written code)",
    data="HumanEval.jsonl.gz of github.com/openai/human-eval, or openai/openai_humaneval",
    licence="MIT",
    items=164,
    hub=Hub("openai/openai_humaneval", None, split="test"),
    formats={
        "HumanEval.jsonl.gz, hub": {
            "task_id": "the name of the problem",
            "prompt": "the function up to its docstring",
            "entry_point": "the name of the function",
            "test": "code that defines check(candidate)",
        },
    },
    columns=("task_id", "prompt", "entry_point", "test"),
    sampling=SAMPLING,
    examples=examples,
    row=stored,
    gather=gather,
    execute=execute,
    scored=("task_id",),
    asked="prompt",
    files=("predictions_results.jsonl", "predictions.jsonl"),
    score_row=score,
    metric_names=(),
    headline=NOT_RUN,
    judged_headlines=("pass@10", "pass@1"),
)
