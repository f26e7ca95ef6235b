"""The bodies of the commands that show what there is: score, report, tasks, systems. None of them loads a
model."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from proxytune.cli_run import NOT_ALLOWED, Code, console, print_json
from proxytune.config import ModelSpec, System, load_system, system_names
from proxytune.errors import UserError
from proxytune.records import Run
from proxytune.results import write_atomically
from proxytune.tasks import Task

DEMO_TABLE = re.compile(r"(<!-- demo-table -->\n).*?(<!-- /demo-table -->)", re.DOTALL)


def score(task: str, file: Path, code: Code, data: str | None, *, json_only: bool) -> None:
    """Score a file of predictions."""
    from proxytune.report import percent
    from proxytune.tasks import get_task, read_source, score_file
    from proxytune.tasks.execution import Execution

    asked, execution = get_task(task), None
    if (sandbox := code.open(asked)) is not None:
        examples = () if data is None else read_source(asked, data).examples
        execution = Execution(sandbox, {example.id: example.target for example in examples})
    found = score_file(asked, file, execution)
    if asked.execute is not None and found.headline == asked.headline:
        print(f"note: {NOT_ALLOWED}", file=sys.stderr)
    if json_only:
        print_json(found.model_dump(mode="json"))
        return
    print(f"{task}, {found.n} examples of {file}")
    for name, metric in found.metrics.items():
        print(f"  {name:22} {percent(metric):28} {metric.value!r}")
    if execution is not None:
        told = f"{execution.samples} samples run, {execution.passed} passed, {execution.timed_out} timed out"
        stored = f"{execution.flips} of {execution.compared} stored verdicts flipped"
        print(f"  {told}; {stored} ({execution.rerun} run once more, alone)")
        if execution.broken:
            told = "samples failed unrun: their problems need other libraries (--code-python)"
            print(f"  {execution.broken} {told}")
    if found.dropped_duplicates:
        print(f"  {found.dropped_duplicates} rows were left out: equal to an earlier row of the same id")
    if found.renumbered_ids:
        print(
            f"  {found.renumbered_ids} rows share their id with a different row; they were scored separately"
        )


def report(root: Path, *, markdown: bool, write: bool) -> None:
    """The finished runs under `root`: tables on stdout, or README.md files."""
    from proxytune import report as tables

    if not root.is_dir():
        raise UserError(f"no folder '{root}': `proxytune eval` makes it, or name another")
    if write:
        runs, _ = tables.main_runs(_published(root))
        write_atomically(root / "README.md", tables.results_readme(tables.read_paper(), runs).encode())
        print(f"wrote {root / 'README.md'}")
        _write_demo_table(Path("README.md"), runs)
        return
    runs, others = tables.main_runs(root)
    rows = tables.role_rows(runs)
    if not rows:
        raise UserError(f"no finished run in '{root}': `proxytune eval` makes one")
    for task, own in tables.by_task(rows).items():
        if markdown:
            print(f"### {task}: {own[0].metric}\n\n{tables.markdown_table(own)}")
        else:
            console().print(tables.rich_table(own))
    if others:
        print(f"{others} finished runs with other settings are not shown: name their folder to see them")


def _published(root: Path) -> Path:
    """Where the runs lie that the README files are about: a folder of their own in the checkout, so that
    one's own runs never meet them."""
    own = root / "published"
    return own if own.is_dir() else root


def _write_demo_table(path: Path, found: Sequence[Run]) -> None:
    """Put the demo's tables between the markers of the README, where there are markers."""
    from proxytune import report as tables

    text = path.read_text(encoding="utf-8") if path.exists() else ""
    runs = [run for run in found if run.spec.system.name in ("demo", "demo-mid")]
    if not runs or not DEMO_TABLE.search(text):
        return
    parts = [
        f"**{task}** ({own[0].metric}, %, {own[0].n} questions)\n\n{tables.markdown_table(own)}"
        for task, own in tables.by_task(tables.role_rows(runs)).items()
    ]
    content = "\n".join(parts)
    filled = DEMO_TABLE.sub(lambda match: match[1] + content + match[2], text)
    write_atomically(path, filled.encode())
    print(f"wrote the demo table in {path}")


def tasks(*, json_only: bool) -> None:
    """The registry of tasks."""
    from proxytune.tasks import TASKS

    if json_only:
        named = {
            task.name: {
                "summary": task.summary,
                "data": task.data,
                "headline": task.headline,
                "judged_headlines": list(task.judged_headlines),
                "metrics": list(task.metric_names),
                "judge": task.judge,
                "missing_judge": missing_judge(task),
                "modes": ["generate", *(["likelihood"] if task.likelihood else [])],
                "sampling": task.sampling.model_dump(mode="json"),
            }
            for task in TASKS.values()
        }
        print_json({"tasks": named})
        return
    rows = [
        (task.name, task.summary, ", ".join(_metrics(task)), _judge(task), task.data)
        for task in TASKS.values()
    ]
    _print_table(("task", "what it measures", "metrics (the first is shown)", "judge", "data"), rows)


def _metrics(task: Task) -> tuple[str, ...]:
    """The metrics of a task; the judge's where it says nothing without one."""
    return task.metric_names or task.judged_headlines


def _judge(task: Task) -> str:
    """The default judge of a task, and what keeps it from judging here now."""
    if task.judge is None:
        return ""
    missing = missing_judge(task)
    return task.judge.replace(",", ", ") + (f" ({missing})" if missing else "")


def missing_judge(task: Task) -> str | None:
    """What the default judge of a task lacks here now: a key, a package, its files; None if nothing."""
    if task.judge is None:
        return None
    if "/" not in task.judge:  # behind an API
        if importlib.util.find_spec("openai") is None:
            return "needs: pip install 'proxytune[judges]'"
        named = os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL")
        return None if named else "needs OPENAI_API_KEY"
    from huggingface_hub import try_to_load_from_cache

    here = all(isinstance(try_to_load_from_cache(m, "config.json"), str) for m in task.judge.split(","))
    return None if here else "not downloaded yet"


def systems(*, json_only: bool) -> None:
    """The systems in configs/systems."""
    found = [load_system(name) for name in system_names()]
    if json_only:
        print_json(
            {"systems": {system.name: system.model_dump(mode="json", exclude_none=True) for system in found}}
        )
        return
    rows = [
        (
            system.name,
            model_name(system.base),
            _experts(system),
            model_name(system.antiexpert),
            model_name(system.tuned),
        )
        for system in found
    ]
    _print_table(("system", "base", "expert", "antiexpert", "tuned"), rows)


def _experts(system: System) -> str:
    """The experts of a system, with weights where there are several."""
    specs = system.expert_specs
    if len(specs) == 1:
        return model_name(specs[0])
    return " + ".join(f"{spec.weight:g} * {model_name(spec)}" for spec in specs)


def model_name(spec: ModelSpec | None) -> str:
    """How a table names a model; folders under the one where the user stands as the user would write them."""
    if spec is None:
        return ""
    name = spec.model or f"adapter {spec.adapter}"
    return name.replace(f"{Path.cwd()}/", "./")


def _print_table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """A plain table that wraps in its cells."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console().print(table)
