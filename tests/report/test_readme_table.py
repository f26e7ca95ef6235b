"""The small table of the README."""

from __future__ import annotations

import re

from proxytune.report import tables as readme
from proxytune.report.tables import main_runs
from tests.support.checkout import ROOT
from tests.support.reports import run

SCORES = {"base": 0.1, "antiexpert": 0.0, "expert": 0.5, "proxy": 0.82, "tuned": 0.9}


def test_the_table_in_the_readme_is_of_the_published_runs() -> None:
    made = readme.readme_table([found for _, found in main_runs(ROOT / "results" / "published")[0]])
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [shown] = re.findall(r"<!-- demo-table -->\n(.*?)<!-- /demo-table -->", text, re.DOTALL)
    assert shown == made
    assert [line.split()[1] for line in made.splitlines()[2:]] == ["gsm", "truthfulqa", "humaneval"]


def test_a_line_never_mixes_figures() -> None:
    whole = [run(role, score, system="demo") for role, score in SCORES.items()]
    cells = "10.0 [5.0, 15.0] | 50.0 [45.0, 55.0] | 82.0 [77.0, 87.0] | 90.0 [85.0, 95.0]"
    assert readme.readme_table(whole).splitlines()[2:] == [f"| gsm (exact_match, %) | {cells} | 100 |"]
    other_items = [*whole[:4], run("tuned", 0.9, system="demo", data_sha256="another")]
    other_system = [run(role, score) for role, score in SCORES.items()]
    for partly in (whole[:4], other_items, other_system):
        assert readme.readme_table(partly).splitlines()[2:] == []
