"""The HTML report: what it shows, what is missing, and that text of models cannot do anything in it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from proxytune.config import parse_alpha
from proxytune.errors import UserError
from proxytune.records import Metric
from proxytune.report import charts as report_charts
from proxytune.report import findings
from proxytune.report import page as report_html
from proxytune.report import token_view as report_tokens
from proxytune.report.charts import COLORS, svg, themed_svg
from proxytune.report.design import asset
from proxytune.report.escape import clipped, embedded, in_markdown, visible
from proxytune.report.page import Report
from proxytune.report.runs import notes_table
from proxytune.report.sections import Section
from proxytune.report.tables import RoleRow, markdown, role_rows
from tests.support.checkout import ROOT
from tests.support.command_line import proxytune
from tests.support.hostile import HOSTILE, example, make_results, put, token, tokens_for
from tests.support.reports import run


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hostile folder."""
    return make_results(tmp_path_factory.mktemp("report") / "results")


@pytest.fixture(scope="module")
def made(results: Path) -> Report:
    """Its report."""
    return Report.read(results)


@pytest.fixture(scope="module")
def page(made: Report) -> str:
    """Its page."""
    return made.html()


class Elements(HTMLParser):
    """What a parser finds in a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self._in = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element and its attributes."""
        self.found.append((tag, dict(attrs)))
        self._in = tag

    def handle_data(self, data: str) -> None:
        """Text, or the content of a script."""
        (self.scripts if self._in == "script" else self.text).append(data)

    def handle_endtag(self, tag: str) -> None:
        """The end of a script is the end of its content."""
        self._in = ""


@pytest.fixture(scope="module")
def elements(page: str) -> Elements:
    """The parsed page."""
    parser = Elements()
    parser.feed(page)
    return parser


def section(made: Report, name: str) -> Section:
    """A section by its id."""
    return next(one for one in made.sections if one.id == name)


# Text of others


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_made_harmless_to_show(text: str) -> None:
    shown = visible(text)
    kinds = {unicodedata.category(char) for char in shown} - {"Cc"} | {
        c for c in shown if c < " " and c not in "\n\t"
    }
    assert not kinds & {"Cf", "Cs", "Zl", "Zp"} and not any(len(kind) == 1 for kind in kinds)
    shown.encode("utf-8")


def test_what_is_written_out_and_what_stays() -> None:
    assert visible("a\u202eb") == "a\u2039U+202E\u203ab" and visible("\ud83d") == "\u2039U+D83D\u203a"
    family = "\U0001f469\u200d\U0001f467 \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u4f60\u597d\n\t"
    assert visible(family) == family
    assert clipped("x" * 10, 4) == "xxxx\u2026 (6 characters more in predictions.jsonl)"


@pytest.mark.parametrize("text", HOSTILE)
def test_embedded_json_cannot_end_its_element(text: str) -> None:
    block = embedded({text: [text]})
    assert block.isascii() and not set(block) & set("<>&")
    assert json.loads(block) == {text: [text]}


def test_the_page_has_only_our_elements(elements: Elements) -> None:
    assert {tag for tag, _ in elements.found} <= {
        "html", "head", "meta", "title", "link", "style", "script", "body", "a", "div", "nav", "button",
        "main", "header", "h1", "h2", "h3", "p", "span", "i", "section", "figure", "figcaption", "details",
        "summary", "table", "caption", "thead", "tbody", "tr", "th", "td", "code", "noscript", "footer",
        "svg", "g", "path", "line", "text", "tspan", "rect",
    }  # fmt: skip
    names = {name for _, attributes in elements.found for name in attributes}
    assert not [name for name in names if name.startswith("on")]
    links = [
        attributes[key] for _, attributes in elements.found for key in ("href", "src") if key in attributes
    ]
    assert all(link == "data:," or str(link).startswith("#") for link in links)
    assert [tag for tag, _ in elements.found].count("script") == 3


def test_only_our_scripts_may_run(elements: Elements) -> None:
    early, data, js = (script for script in elements.scripts if script.strip())
    content = next(a["content"] for tag, a in elements.found if tag == "meta" and a.get("http-equiv"))
    assert content is not None and content.startswith("default-src 'none'")
    allowed = re.findall(r"'sha256-([^']+)'", content)
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in (early, js)]
    assert allowed == digests and isinstance(json.loads(data), dict)


def test_nothing_hostile_is_left_in_the_file(results: Path, made: Report, tmp_path: Path) -> None:
    made.write_html(tmp_path / "new" / "report.html")
    content = (tmp_path / "new" / "report.html").read_bytes().decode("utf-8")
    assert "<script>window.pwned" not in content and "<img" not in content and "<iframe" not in content
    assert "49" not in re.findall(r"\{\{.*?\}\} (\d+)", content)
    strange = {char for char in content if unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"}}
    assert strange <= {"\n", "\t"}


def test_hateful_text_is_veiled(elements: Elements, page: str) -> None:
    veiled = [attributes for _, attributes in elements.found if attributes.get("class") == "sensitive veiled"]
    assert len(veiled) >= 1
    assert page.count('class="texts" inert') == len(veiled)
    data = json.loads(next(script for script in elements.scripts if script.startswith("{")))
    assert {one["task"]: one["sensitive"] for one in data["sets"]} == {"gsm": False, "toxigen": True}


MARKDOWN = [
    *HOSTILE, "a|b", "a\\|b", "a\\\\|b", "|", "\\",
    "two\nlines\r\nthree\x0bfour\x85five", "**b** _i_ ~s~ `c`",
    "[x](javascript:alert(1)) ![y](http://z)", "mc1_all and snake_case", "<b>&amp;",
]  # fmt: skip


def cells_of(line: str) -> list[str]:
    """The cells of a line of a Markdown table, as GitHub splits it: at bars without a backslash before
    them."""
    assert line.startswith("| ") and line.endswith(" |")
    return re.split(r"(?<!\\)\|", line[1:-1])


@pytest.mark.parametrize("text", MARKDOWN)
def test_markdown_tables_survive(text: str) -> None:
    for shown in (text, in_markdown(text)):
        table = markdown(("name", text), [("one", shown), (shown, "two")])
        assert [len(cells_of(line)) for line in table.splitlines()] == [2] * 4
        table.encode("utf-8")
        assert not {unicodedata.category(char) for char in table} & {"Cf", "Cs", "Zl", "Zp"}


def test_markdown_shows_markup_and_leaves_names_and_figures() -> None:
    assert in_markdown("**b** <i> [x](y) `c` | _e_") == ("\\*\\*b\\*\\* &lt;i> [x\\](y) \\`c\\` \\| \\_e\\_")
    for plain in ("truthfulqa_mc", "82.0 [77.0, 87.0]", "ours 1.0, pass@10", "base, opener forced"):
        assert in_markdown(plain) == plain


def test_names_are_shown_in_markdown_tables_and_headings(tmp_path: Path) -> None:
    bad = "a|b\n# <img src=x> [c](javascript:d)"
    for role, score in (("base", 0.1), ("proxy", 0.6), ("tuned", 0.9)):
        done = run(role, score, system=bad)
        metrics = {bad: done.metrics["exact_match"]}
        put(tmp_path / "s" / "gsm" / role, done.model_copy(update={"headline": bad, "metrics": metrics}), [])
    put(tmp_path / "t" / "gsm" / "base", run("base", 0.2), [])
    done = proxytune("report", str(tmp_path), "--markdown", "--paper", "--examples", "1")
    assert done.exit_code == 0, done.output
    assert "<img" not in done.stdout and "\n# " not in done.stdout
    assert not re.search(r"(?<!\\)\]\(javascript", done.stdout)
    tables = re.findall(r"(?:^\|.*\n)+", done.stdout, re.MULTILINE)
    assert len(tables) > 2
    for table in tables:
        assert len({len(cells_of(line)) for line in table.splitlines()}) == 1, table


def test_every_text_of_the_page_is_made_harmless(tmp_path: Path) -> None:
    """Names too: no part of the page relies on another for that."""
    bad = "m\u202e\u2066etric\x07"
    for role, score in (("base", 0.1), ("proxy", 0.6), ("tuned", 0.9)):
        done = run(role, score, system="s\u202ex", trace="tokens" if role == "proxy" else "off")
        metrics = {bad: done.metrics["exact_match"]}
        rows = [example(0, "\ud800", True, id="\ud800\u202e", scores={bad: 1.0})]
        traces = [tokens_for(9)] if role == "proxy" else None
        changed = {"headline": bad, "metrics": metrics, "notes": ("n\u202e",), "n": 1}
        put(tmp_path / "s" / "gsm" / role, done.model_copy(update=changed), rows, traces)
    report = Report.read(tmp_path)
    report.write_html(tmp_path / "report.html")
    content = (tmp_path / "report.html").read_bytes().decode("utf-8")
    strange = {char for char in content if unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"}}
    assert strange <= {"\n", "\t"} and "\u2039U+202E\u203a" in content and "U+D800" in content
    for path in report.write_figures(tmp_path / "figures"):
        ElementTree.fromstring(path.read_text(encoding="utf-8"))


# The token-level view


def test_tokens_are_packed_and_can_be_read_back(made: Report) -> None:
    data = report_tokens.token_data(made.inputs.sets)
    gsm = next(one for one in data["sets"] if one["task"] == "gsm")
    item = gsm["items"][1]
    assert gsm["total"] == len(HOSTILE) == len(gsm["items"])
    assert [data["texts"][i] for i in item["tokens"]][1:6] == [" 1", "+", "2", "=", "3"]
    assert data["texts"][item["tokens"][0]] == visible(HOSTILE[1])
    base, proxy = (item["p"][data["roles"].index(role)] for role in ("base", "proxy"))
    assert (base[0], proxy[0]) == (2000, 9000) and proxy[-1] == 10_000
    first = item["top"][data["roles"].index("base")]
    assert data["texts"][first[0]] == visible(HOSTILE[2]) and first[1] == -1
    assert list(item["answers"]) == ["base", "expert", "proxy", "tuned"]
    assert item["answers"]["proxy"]["right"] is True and item["answers"]["base"]["right"] is False
    assert item["expected"] == "16"


def test_a_long_trace_is_cut_to_its_budget_and_says_so(made: Report) -> None:
    data = report_tokens.token_data(made.inputs.sets, budget=2 * 20)
    assert [(len(one["items"]), one["total"]) for one in data["sets"]] == [(2, 12), (2, 12)]
    [item] = report_tokens.token_data(made.inputs.sets, budget=4)["sets"][0]["items"]
    assert (len(item["tokens"]), item["length"], len(item["p"][0]), len(item["top"][0])) == (2, 8, 2, 2)


def test_other_roles_answer_only_the_same_question(tmp_path: Path) -> None:
    rows = [example(0, "a", True), example(1, "b", True)]
    other = [example(0, "c", False), {**example(1, "d", False), "question": "another"}]
    traced = run("proxy", 0.8, trace="tokens")
    put(tmp_path / "s" / "gsm" / "proxy", traced, rows, [tokens_for(0), tokens_for(1)])
    put(tmp_path / "s" / "gsm" / "base", run("base", 0.1, data_sha256="1" * 64), other)
    items = report_tokens.token_data(Report.read(tmp_path).inputs.sets)["sets"][0]["items"]
    assert [list(item["answers"]) for item in items] == [["base", "proxy"], ["proxy"]]


@pytest.mark.parametrize(
    ("lower_is_better", "score", "right"),
    [
        (False, 1.0, True),
        (False, 0.0, False),
        (False, None, None),
        (True, 1.0, False),
        (True, 0.0, True),
    ],
)
def test_right_and_wrong(lower_is_better: bool, score: float | None, right: bool | None) -> None:
    assert report_tokens.is_right(score, lower_is_better=lower_is_better) is right


# Figures and tables


def test_every_figure_is_an_svg_of_its_own(made: Report, tmp_path: Path) -> None:
    paths = made.write_figures(tmp_path / "figures")
    assert len(paths) == len({path.name for path in paths}) >= 12
    for path in paths:
        content = path.read_text(encoding="utf-8")
        tree = ElementTree.fromstring(content)
        assert tree.tag.endswith("svg") and 'role="graphics-symbol"' in content
        used = {name for node in tree.iter() for name in node.attrib}
        assert not [name for name in used if name.startswith("on") or name.endswith("href")]
        assert "url(" not in content and "var(" not in content


def test_the_page_draws_in_the_colours_of_its_scheme(made: Report) -> None:
    assert len(set(COLORS.values())) == len(COLORS)
    css = asset("design.css")
    for figure in made.figures:
        drawn = themed_svg(figure)
        assert not [color for color in COLORS.values() if f'"{color}"' in drawn]
        named = set(re.findall(r"var\(--([a-z]+)\)", drawn))
        assert named and all(css.count(f"--{name}: #") == 2 for name in named)


def test_figures_have_axes_with_units_intervals_and_tooltips(made: Report) -> None:
    drawn = {figure.name: svg(figure) for figure in made.figures}
    assert ">exact_match, %<" in drawn["score-gsm"] and "82.0" not in drawn["score-gsm"]
    assert 'aria-label="proxy; 80.0 [75.0, 85.0]; 12 examples"' in drawn["score-gsm"].replace(
        "100 ex", "12 ex"
    )
    assert "memory of weights and KV cache, MB" in drawn["price-memory-gsm"]
    better = {f.name: f.caption.split()[0] for f in made.figures if f.name.startswith("price-time")}
    assert better == {"price-time-gsm": "up", "price-time-toxigen": "down"}
    assert "position in the response, tokens" in drawn["positions-changed-gsm"]
    assert ">paper 13.5%<" in drawn["positions-changed-gsm"]
    assert ">alpha<" in drawn["alpha-gsm"] and "alpha 0.5; exact_match" in drawn["alpha-gsm"]
    assert "tokens that are corrected" in drawn["skip-score-gsm"]
    assert "published, 13B" in drawn["equations-gsm"]


def test_the_papers_figures_stand_beside_ours(made: Report) -> None:
    [part] = section(made, "results").parts
    [table] = part.tables
    lines = {row.cells[1]: row for row in table.rows if row.cells[0] == "gsm"}
    ours = lines[visible("<b onclick='pwned=8'>evil</b>")]
    assert (ours.mark, ours.cells[2:]) == (
        "strong", ("exact_match", "25.0", "20.0", "60.0", "80.0", "90.0", "84.6%", "12"),
    )  # fmt: skip
    paper = lines["paper, 13B (table 2)"]
    assert paper.mark == "published" and paper.cells[3:9] == ("6.6", "", "23.0", "26.4", "32.4", "76.5%")
    gap = next(figure for figure in part.figures if figure.name == "gap")
    assert ("gsm: paper, table 5", "70B", "76.0") in [row.cells for row in gap.table.rows]


def test_what_runs_say_beside_their_figures_is_shown(tmp_path: Path) -> None:
    silent = run("base", 0.1)
    put(tmp_path / "base", silent, [example(0, "x", True)])
    assert notes_table(tmp_path, [(tmp_path / "base", silent)]) == ()
    noted = run("proxy", 0.2).model_copy(update={"notes": ("the expert takes no system message",)})
    put(tmp_path / "proxy", noted, [example(0, "x", True)])
    [table] = notes_table(tmp_path, [(tmp_path / "base", silent), (tmp_path / "proxy", noted)])
    assert [row.cells for row in table.rows] == [("proxy", "proxy", "the expert takes no system message")]
    assert "the expert takes no system message" in Report.read(tmp_path).html()


def test_long_curves_are_grouped(tmp_path: Path) -> None:
    rows = [example(0, "x", True)]
    put(
        tmp_path / "s" / "gsm" / "proxy",
        run("proxy", 0.8, trace="tokens"),
        rows,
        [[token("a", 0.5, 0.6)] * 300],
    )
    report = Report.read(tmp_path)
    figure = next(figure for figure in report.figures if figure.name == "positions-changed-gsm")
    assert 32 < len(figure.table.rows) < 45
    assert figure.table.rows[-1].cells[0] == "positions 256 to 298"


def test_labels_do_not_hide_points() -> None:
    places = [(100.0, 100.0), (108.0, 100.0), (100.0, 100.0), (395.0, 10.0)]
    found = report_charts.sides(places, ["base", "proxy", "expert", "a long name at the edge"])
    assert (
        found[0] == "left" and found[1] == "right" and found[2] in ("above", "below") and found[3] == "left"
    )


@pytest.mark.parametrize("count", range(13))
def test_figures_fill_lines_of_six_parts(count: int) -> None:
    parts = [{"third": 2, "half": 3, "whole": 6}[span] for span in report_html.spans(count)]
    assert len(parts) == count and sum(parts) % 6 == 0
    ends = {sum(parts[: i + 1]) for i in range(count)}
    assert set(range(6, sum(parts) + 1, 6)) <= ends, "a figure never goes over the end of a line"


def test_points_over_few_tokens_are_faded(tmp_path: Path) -> None:
    rows = [example(i, "x", True) for i in range(25)]
    traces = [[token("a", 0.5, 0.6)] * (9 if i < 22 else 30) for i in range(25)]
    put(tmp_path / "s" / "gsm" / "proxy", run("proxy", 0.8, trace="tokens"), rows, traces)
    figures = {figure.name: figure for figure in Report.read(tmp_path).figures}
    changed = figures["positions-changed-gsm"]
    assert changed.caption.endswith("faded: fewer than 20 tokens")
    drawn = svg(changed)
    marks = re.findall(
        r'<path aria-label="position[^>]*? (\d+) tokens"[^>]*?(?:fill-)?opacity="([\d.]+)"', drawn
    )
    assert {(int(n) < 20, float(opacity) < 1) for n, opacity in marks} == {(True, True), (False, False)}


def test_a_curve_in_stretches_is_whole() -> None:
    data = [{"n": n, "at": i} for i, n in enumerate((50, 50, 5, 5, 40, 3))]
    found = report_charts.stretches(data)
    assert [(few, [d["at"] for d in part]) for few, part in found] == [
        (False, [0, 1]), (True, [1, 2, 3, 4]), (False, [4]), (True, [4, 5]),
    ]  # fmt: skip


# Findings


def trio(**scores: float) -> list[RoleRow]:
    """The rows of a system with these scores."""
    return role_rows([run(role, score) for role, score in scores.items()])


def test_findings_are_made_of_the_figures() -> None:
    assert findings.on_results(trio(base=0.1, proxy=0.82, tuned=0.9)) == (
        "With tiny, the proxy closes 90.0% on gsm of the gap between base and tuned."
    )
    assert findings.on_results(trio(base=0.1, proxy=0.5, tuned=0.11)) == (
        "No firm gap to close on gsm with tiny."
    )
    assert findings.on_results(trio(base=0.1)) == ""
    assert findings.on_price(trio(base=0.1, proxy=0.82, tuned=0.9)) == (
        "With tiny, the proxy takes 1.1 times the memory and 1.0 times the time per token of the tuned model."
    )
    assert findings.on_price(trio(proxy=0.82)) == ""


def test_findings_of_the_hostile_folder(made: Report) -> None:
    found = {one.id: one.finding for one in made.sections}
    missing = {one.id for one in made.sections if one.missing}
    assert {name for name, text in found.items() if not text} == missing == {"agreement"}
    assert found["failures"].startswith("On gsm the proxy breaks 1 and mends 6 of 12 items (p = 0.12)")
    assert found["tokens"].startswith(
        "On gsm the proxy's first choice is not the base's at 14.3% of 84 tokens"
    )
    assert found["skip"] == "On gsm even no corrected token gives 50.0, within the interval of all (50.0)."
    assert found["runs"] == "16 runs took 40 seconds and generated 16,000 tokens."
    assert found["alpha"] == "On gsm alpha 1 scores best, 50.0 beside 50.0 at 0."


def test_a_sentence_speaks_of_a_few_tasks() -> None:
    assert (
        findings.sentence(f"on t{i} x" for i in range(6))
        == "On t0 x; on t1 x; on t2 x; on t3 x; 2 more below."
    )
    assert findings.sentence([]) == "" and findings.listed(["a", "b", "c"]) == "a, b and c"


def test_failures_come_first(made: Report) -> None:
    tables = [table for part in section(made, "failures").parts for table in part.tables]
    first, last = tables[0], tables[-1]
    assert "base right, proxy wrong" in first.title and not first.folded and len(first.rows) == 1
    assert last.title == "base against proxy, in items"
    assert [row.cells[1:6] for row in last.rows if row.cells[0].endswith("gsm")] == [
        ("exact_match", "2", "1", "6", "3")
    ]
    assert all(table.folded for table in tables[1:-1] if "proxy right" in table.title)


# What is missing


def test_missing_pieces_name_the_command_that_makes_them(tmp_path: Path) -> None:
    put(tmp_path / "tiny" / "gsm" / "base", run("base", 0.2), [example(0, "x", True)])
    report = Report.read(tmp_path)
    missing = {one.id: one.command for one in report.sections if one.missing}
    assert missing == {
        "tokens": "proxytune eval gsm --system tiny --trace",
        "price": "proxytune eval gsm --system tiny --as all",
        "positions": "proxytune eval gsm --system tiny --trace",
        "ngrams": "proxytune eval gsm --system tiny --trace",
        "equations": "proxytune eval gsm --system tiny --trace",
        "alpha": "proxytune sweep-alpha gsm --system tiny --alphas 0:2:0.2",
        "skip": "proxytune sweep-alpha gsm --system tiny --alphas 0,first:1,first:4,first:16,1",
        "agreement": "proxytune eval gsm --system tiny --trace agreement",
        "failures": "proxytune eval gsm --system tiny --as all",
    }
    page = report.html()
    assert all(f"<code>{command}</code>" in page for command in missing.values())
    assert [one.id for one in report.sections if one.parts] == ["results", "runs"]


def test_the_published_runs_make_a_report() -> None:
    report = Report.read(ROOT / "results" / "published")
    tiles = report_html.tiles(report.inputs.rows)
    stored = {}
    for task in sorted(path.name for path in (ROOT / "results" / "published" / "demo").iterdir()):
        found = {
            role: json.loads((ROOT / "results" / "published" / "demo" / task / role / "run.json").read_text())
            for role in ("base", "proxy", "tuned")
        }
        stored[task] = {role: one["metrics"][one["headline"]]["value"] for role, one in found.items()}
    mc = stored.pop("truthfulqa_mc")
    assert abs(mc["tuned"] - mc["base"]) < 0.06, "at chance: no gap to close"
    shares = [(v["proxy"] - v["base"]) / (v["tuned"] - v["base"]) for v in stored.values()]
    assert [tile["gap"] for tile in tiles] == [*(f"{100 * share:.1f}%" for share in shares), "n/a"]
    assert "demo-mid: tuned" in report.html()


def test_a_metric_that_is_a_number_is_shown_as_it_is(tmp_path: Path) -> None:
    number = {"exact_match": Metric(value=12.5, unit="number")}
    for role in ("base", "proxy", "tuned"):
        put(tmp_path / "s" / "gsm" / role, run(role, 0.5).model_copy(update={"metrics": number}), [])
    drawn = svg(next(figure for figure in Report.read(tmp_path).figures if figure.name == "score-gsm"))
    assert ">exact_match<" in drawn and ">12.5<" in drawn


# The command


def test_the_command_writes_the_page_and_the_figures(results: Path, tmp_path: Path) -> None:
    page, figures = tmp_path / "a" / "report.html", tmp_path / "figures"
    done = proxytune("report", str(results), "--html", str(page), "--figures", str(figures))
    assert done.exit_code == 0, done.output
    assert page.stat().st_size < 3e6 and page.read_text().startswith("<!doctype html>")
    assert (figures / "score-gsm.svg").exists() and f"wrote {page}" in done.stdout
    again = proxytune("report", str(results), "--markdown", "--figures", str(figures))
    assert "### gsm: exact_match" in again.stdout and f"]({figures.as_posix()}/score-gsm.svg)" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--html", "x.html"], "no folder 'nowhere'"),
        (["{empty}", "--html", "x.html"], "no finished run"),
        (["{empty}", "--html", "{empty}"], "is a folder"),
        (["{empty}", "--html", "x.html", "--write"], "--write is for README files"),
    ],
)
def test_bad_commands_say_what_is_wrong(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = proxytune("report", *(a.format(empty=tmp_path) for a in arguments))
    assert done.exit_code == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_without_the_extra_the_command_says_how_to_install_it(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'proxytune\[report\]'"):
        Report.read(results)


def test_reports_load_no_model() -> None:
    code = "import sys, proxytune.report.page\nprint({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"


def test_tables_are_of_runs_that_belong_together(tmp_path: Path) -> None:
    rows = [example(0, "x", True)]
    few = {"limit": 20, "data_sha256": "2" * 64}
    for role in ("base", "proxy", "tuned"):
        put(
            tmp_path / "s" / "gsm" / role / "limit=20-1",
            run(role, {"proxy": 0.6}.get(role, 0.5), **few),
            rows,
        )
    for alpha in ("0", "0.5"):
        other = run("proxy", 0.1, alpha=parse_alpha(alpha), **few)
        put(tmp_path / "s" / "gsm" / "proxy" / "a" / f"alpha={alpha}", other, rows)
    put(tmp_path / "s" / "gsm" / "base" / "forced", run("base", 0.3, forced=" So", **few), rows)
    put(tmp_path / "s" / "gsm" / "expert" / "limit=30-1", run("expert", 0.7, data_sha256="3" * 64), rows)
    inputs = Report.read(tmp_path).inputs
    assert [(row.label, row.score.value) for row in inputs.rows] == [
        ("base", 0.5), ("base, opener forced", 0.3), ("proxy", 0.6), ("tuned", 0.5),
    ]  # fmt: skip
    assert inputs.others == 3


def test_two_systems_have_figures_of_their_own(tmp_path: Path) -> None:
    for system in ("one", "two"):
        traced = run("proxy", 0.8, system=system, trace="tokens")
        put(tmp_path / system / "gsm" / "proxy", traced, [example(0, "x", True)], [tokens_for(0)])
    figures = {figure.name: figure.title for figure in Report.read(tmp_path).figures}
    assert figures["positions-shift-gsm"].startswith("one, gsm: how far")
    assert figures["positions-shift-gsm-2"].startswith("two, gsm: how far")


def test_text_has_enough_contrast_in_both_schemes() -> None:
    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    schemes = re.findall(r":root[^{]*\{([^}]*)\}", asset("design.css"))[:2]
    for scheme in schemes:
        colors = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", scheme))
        for name in (
            "ink",
            "muted",
            "base",
            "antiexpert",
            "expert",
            "proxy",
            "tuned",
            "published",
            "good",
            "bad",
        ):
            for behind in ("paper", "card", "soft"):
                low, high = sorted((luminance(colors[name]), luminance(colors[behind])))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (name, behind)
    light = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", schemes[0]))
    assert light.items() >= COLORS.items() - {("published", COLORS["published"])}


def test_the_papers_curve_is_drawn_for_its_task(tmp_path: Path) -> None:
    traced = run("proxy", 0.8, task="alpaca_farm", trace="tokens")
    put(
        tmp_path / "s" / "alpaca_farm" / "proxy",
        traced,
        [example(0, "x", True)],
        [[token("a", 0.5, 0.6)] * 90],
    )
    figures = {figure.name: figure for figure in Report.read(tmp_path).figures}
    drawn = svg(figures["positions-changed-alpaca_farm"])
    assert drawn.count("paper, 13B, read off its plot; position") == 6
