"""What a notebook shows: executed for real, and opened in a browser."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import proxytune
from proxytune import DecodeOptions, RunOptions, Sampling
from proxytune.records import Completion, Run
from proxytune.report import notebook
from tests.support import tiny_system
from tests.support.browser import Watched, browser, show
from tests.support.require import require_demo

__all__ = ["browser", "show"]  # fixtures
SHORT = Sampling(max_new_tokens=8)
PLAIN = DecodeOptions(progress=False)
HOSTILE = '<img src=x onerror=alert(1)>"</iframe><script>alert(2)</script>\u202e'
CELLS = (
    "import proxytune\nfrom proxytune import Sampling\nmodel = proxytune.load('demo')\nmodel",
    "prompt = 'Answer the following question.\\n\\nQuestion: Jinin has 52 beads. Jinin sells 12. "
    "How many beads does Jinin have now?'\n"
    "[response] = model.generate([prompt], sampling=Sampling(max_new_tokens=48), trace=True)\nresponse",
    "model.compare(prompt, sampling=Sampling(max_new_tokens=48))",
    "model.evaluate('gsm', limit=3, out='run')",
)


def formatters(monkeypatch: pytest.MonkeyPatch) -> dict[type, Any]:
    """An IPython that runs, and what it was told to show."""
    told: dict[type, Any] = {}
    html = SimpleNamespace(for_type=told.__setitem__)
    shell = SimpleNamespace(display_formatter=SimpleNamespace(formatters={"text/html": html}))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    return told


def test_outside_a_notebook_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    notebook.show_in_notebooks()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    notebook.show_in_notebooks()


def test_responses_and_runs_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = formatters(monkeypatch)
    with proxytune.load(tiny_system.write(tmp_path), decode=PLAIN) as model:
        assert set(told) == {Completion, Run}
        [traced] = model.generate(["ab"], sampling=SHORT, trace=True)
        [base] = model.generate(["ab"], as_="base", sampling=SHORT, trace=True)
        [plain] = model.generate(["ab"], sampling=SHORT)
        made = model.evaluate("gsm", limit=2, out=tmp_path / "run", options=RunOptions(sampling=SHORT))
        compared = model.compare(HOSTILE, sampling=SHORT)
    assert told[Completion](traced).startswith("<iframe") and told[Completion](plain) is None
    assert told[Completion](base) is None, "a token view is of a proxy"
    shown = told[Run](made)
    assert "<th>exact_match</th>" in shown and "<td>2</td>" in shown and "proxy, alpha 1" in shown
    html = compared._repr_html_()
    assert html.count("<iframe") == html.count("</iframe>") == 1
    assert "<img" not in html and "<script>alert" not in html and 'sandbox="allow-scripts"' in html


def opened(show: Any, folder: Path, html: str) -> Watched:
    """Outputs of cells, as a notebook puts them into its page."""
    path = folder / "cells.html"
    path.write_text(f"<!doctype html><meta charset=utf-8><body>{html}</body>", encoding="utf-8")
    watched: Watched = show(path)
    return watched


@pytest.mark.slow
def test_hostile_text_stays_text_in_the_frame(show: Any, tmp_path: Path) -> None:
    with proxytune.load(tiny_system.write(tmp_path), decode=PLAIN) as model:
        compared = model.compare(HOSTILE, sampling=SHORT)
    watched = opened(show, tmp_path, compared._repr_html_())
    frame = watched.page.frame_locator("iframe")
    assert "<img src=x onerror=alert(1)>" in frame.locator(".asked").inner_text()
    assert watched.problems == [] and len(watched.requests) == 1


@pytest.mark.slow
def test_a_notebook_shows_the_token_view(show: Any, tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    require_demo()
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    made = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(made, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    last = [cell.outputs[-1]["data"] for cell in made.cells]
    assert last[0]["text/plain"].startswith("SteeredModel(demo: base,") and "text/html" not in last[0]
    assert "traced" in last[1]["text/plain"] and "Run(gsm as proxy" in last[3]["text/plain"]
    watched = opened(show, tmp_path, "<hr>".join(data["text/html"] for data in last[1:]))
    first, second = (watched.page.frame_locator("iframe").nth(place) for place in (0, 1))
    assert first.locator("#tokens-response span").count() > 10
    first.locator("#tokens-response span").nth(2).click()
    assert first.locator(".inspector tr").count() == 5
    assert second.locator(".answer").count() == 4 and "52 beads" in second.locator(".asked").inner_text()
    assert "exact_match" in watched.page.locator("body > table").inner_text()
    assert watched.problems == [] and len(watched.requests) == 1
