"""The bodies of the commands that show what there is: score, report, systems. None of them loads a model."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from proxytune.cli.commands.evaluate import NOT_ALLOWED, Code, console, print_json
from proxytune.config import ModelSpec, System, load_system, system_names
from proxytune.errors import UserError
from proxytune.records import Run
from proxytune.results import write_atomically

if TYPE_CHECKING:
    from proxytune.paper.recipes import Recipe

DEMO_TABLE = re.compile(r"(<!-- demo-table -->\n).*?(<!-- /demo-table -->)", re.DOTALL)


def score(task: str, file: Path, code: Code, data: str | None, *, json_only: bool) -> None:
    """Score a file of predictions."""
    from proxytune.report.tables import percent
    from proxytune.tasks import get_task, read_source, score_file
    from proxytune.tasks.task import Execution

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


@dataclass(frozen=True, kw_only=True)
class ReportRequest:
    """What the options of `report` said."""

    markdown: bool = False
    write: bool = False
    examples: int = 0
    show_hateful: bool = False


def report(root: Path, asked: ReportRequest) -> None:
    """The finished runs under `root`: tables on stdout, or README.md files."""
    from proxytune.paper.published import read_paper
    from proxytune.report import paper_tables as report_paper
    from proxytune.report import tables

    if not root.is_dir():
        raise UserError(f"no folder '{root}': `proxytune eval` makes it, or name another")
    if asked.write:
        runs = [run for _, run in tables.main_runs(_published(root))[0]]
        write_atomically(root / "README.md", report_paper.results_readme(read_paper(), runs).encode())
        print(f"wrote {root / 'README.md'}")
        _write_demo_table(Path("README.md"), runs)
        return
    found, others = tables.main_runs(root)
    if not found:
        raise UserError(f"no finished run in '{root}': `proxytune eval` makes one")
    for task, own in tables.by_task(tables.role_rows([run for _, run in found])).items():
        if asked.markdown:
            print(f"### {task}: {own[0].metric}\n\n{tables.markdown_table(own)}")
        else:
            console().print(tables.rich_table(own))
    print_beside_paper([run for _, run in found], as_markdown=asked.markdown)
    _print_examples(found, asked)
    if others:
        print(f"{others} finished runs with other settings are not shown: name their folder to see them")


def print_beside_paper(runs: Sequence[Run], *, as_markdown: bool, only: Recipe | None = None) -> None:
    """The paper's tables that these runs belong to, with their figures beside the paper's."""
    from proxytune.paper.published import read_paper
    from proxytune.report import paper_tables as tables

    paper, by_key = read_paper(), tables.by_key(runs)
    for recipe in tables.compared(paper, by_key) if only is None else [only]:
        if as_markdown:
            print(f"### {tables.title(recipe)}\n\n{tables.markdown_side_by_side(recipe, paper, by_key)}")
        else:
            console().print(tables.rich_side_by_side(recipe, paper, by_key))
        if line := tables.gaps(recipe, paper, by_key):
            print(f"{line}\n")


def _print_examples(found: Sequence[tuple[Path, Run]], asked: ReportRequest) -> None:
    """Responses of every role to the first examples of each task."""
    if not asked.examples:
        return
    from proxytune.report import examples as report_text

    for shown in report_text.examples(found, asked.examples, show_hateful=asked.show_hateful):
        if asked.markdown:
            print(report_text.markdown_example(shown))
        else:
            console().print(report_text.rich_example(shown))


def _published(root: Path) -> Path:
    """Where the runs lie that the README files are about: a folder of their own in the checkout, so that
    one's own runs never meet them."""
    own = root / "published"
    return own if own.is_dir() else root


def _write_demo_table(path: Path, found: Sequence[Run]) -> None:
    """Put the demo's tables between the markers of the README, where there are markers."""
    from proxytune.report import tables

    text = path.read_text(encoding="utf-8") if path.exists() else ""
    named = [run for run in found if run.spec.system.name in ("demo", "demo-mid")]
    runs = [run for run in named if run.spec.remark is None]
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
    print_table(("system", "base", "expert", "antiexpert", "tuned"), rows)


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


def print_table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """A plain table that wraps in its cells."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console().print(table)
