"""What a notebook shows: a response with its trace in the report's token view, a run as a row of a table.

The view is a page of its own in a frame, so that its styles and the notebook's do not meet. The frame loads
nothing and cannot reach the notebook."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from html import escape
from typing import Any

from jinja2 import Environment, StrictUndefined

from proxytune.config import Role
from proxytune.records import Completion, Run
from proxytune.report.design import THEME, TOKENS, asset, source_hash, styles
from proxytune.report.escape import embedded, visible
from proxytune.report.tables import role_rows
from proxytune.report.token_view import response_data

LOWEST, HIGHEST = 500, 1000
"""Pixels of a frame's height."""
PER_LINE, PER_LINE_TOKENS = 26, 14
"""Pixels of a line of the view, and about the tokens in one."""


def response_html(completion: Completion) -> str | None:
    """The token view of a traced response of the proxy; None for others, which a notebook shows as text."""
    traced = completion.trace
    if not traced or "proxy" not in traced[0].probability:
        return None
    return comparison_html("", {"proxy": completion})


def comparison_html(asked: str, responses: Mapping[Role, Completion]) -> str:
    """One prompt, the proxy's response to it token by token, and what the other roles answered."""
    early, js = asset(THEME), asset(TOKENS) + asset("report.js")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(asset("notebook.html.j2"))
    page = template.render(
        css=styles(asset("report.css")),
        early=early,
        js=js,
        hashes=f"{source_hash(early)} {source_hash(js)}",
        data=embedded(response_data(asked, responses)),
    )
    lines = len(responses["proxy"].trace) // PER_LINE_TOKENS + 4 * len(responses)
    height = min(LOWEST + PER_LINE * lines, HIGHEST)
    return (
        f'<iframe title="Proxy-tuned response" sandbox="allow-scripts" srcdoc="{escape(page)}" '
        f'style="width: 100%; height: {height}px; border: 0"></iframe>'
    )


def run_html(run: Run) -> str:
    """A run as a table of one row: what was run, its figure, and what that is over."""
    [row] = role_rows([run])
    cells = {
        "task": run.spec.task,
        "system": run.spec.system.name,
        "as": row.role if row.role != "proxy" else f"proxy, alpha {run.spec.alpha.text}",
        run.headline: row.shown,
        "n": row.examples,
        "tokens": f"{run.cost.generated_tokens:,}",
        "status": run.status,
    }
    heads = "".join(f"<th>{escape(visible(name))}</th>" for name in cells)
    values = "".join(f"<td>{escape(visible(str(value)))}</td>" for value in cells.values())
    return f"<table><thead><tr>{heads}</tr></thead><tbody><tr>{values}</tr></tbody></table>"


def show_in_notebooks() -> None:
    """Have IPython show responses and runs this way, where this runs in it."""
    shell = _shell()
    if shell is not None:
        html = shell.display_formatter.formatters["text/html"]
        html.for_type(Completion, response_html)
        html.for_type(Run, run_html)


def _shell() -> Any:
    """The running IPython, or None."""
    ipython = sys.modules.get("IPython")
    return None if ipython is None else ipython.get_ipython()
