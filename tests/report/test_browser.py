"""The HTML report in a real browser (headless Chromium through Playwright), opened from disk."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import Watched, browser, show
from tests.support.command_line import proxytune
from tests.support.hostile import example, make_results, put, token
from tests.support.reports import run

pytestmark = pytest.mark.slow
__all__ = ["browser", "show"]  # fixtures
DEMO = [
    ["eval", "gsm", "--as", "all", "--limit", "40"],
    ["eval", "truthfulqa", "--as", "all", "--limit", "40"],
    ["eval", "gsm", "--as", "proxy", "--limit", "40", "--trace", "agreement"],
    ["eval", "truthfulqa", "--as", "proxy", "--limit", "40", "--trace"],
    ["sweep-alpha", "gsm", "--limit", "20", "--alphas", "0,first:1,first:4,0.5,1,1.5"],
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on the demo system, made as a user makes it."""
    folder = tmp_path_factory.mktemp("demo")
    with inside(folder):
        for arguments in (*DEMO, ["report", "results", "--html", "report.html"]):
            done = proxytune(*arguments)
            assert done.exit_code == 0, (arguments, done.output, done.exception)
    return folder / "report.html"


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Stand in a folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on responses that try to be code."""
    folder = tmp_path_factory.mktemp("hostile")
    make_results(folder / "results")
    return report(folder)


def report(folder: Path) -> Path:
    """The report on `folder/results`."""
    path = folder / "report.html"
    done = proxytune("report", str(folder / "results"), "--html", str(path))
    assert done.exit_code == 0, done.output
    return path


def unfold(page: Any) -> None:
    """Open everything that a click opens."""
    for fold in page.locator("details").all():
        fold.evaluate("node => { node.open = true; }")


def picture(watched: Watched, name: str) -> None:
    """A screenshot to look at, where PROXYTUNE_SCREENSHOTS names a folder for it."""
    if folder := os.environ.get("PROXYTUNE_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        watched.page.screenshot(path=Path(folder) / f"{name}.png", full_page="full" in name)


def test_the_demo_report_opens_without_requests_or_errors(show: Callable[..., Watched], demo: Path) -> None:
    watched = show(demo)
    page = watched.page
    for name in ("results", "tokens", "price", "positions", "ngrams", "alpha", "skip", "agreement", "runs"):
        assert page.locator(f"#{name} .missing").count() == 0, name
        assert page.locator(f"#{name} :is(figure, table, #tokens-list)").count() > 0, name
    gaps = [float(tile.split("%")[0]) for tile in page.locator(".tile .big").all_inner_texts()]
    assert len(gaps) == 2 and min(gaps) > 60, "tables are of the runs at the system's own alpha"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    picture(watched, "light-top")
    picture(watched, "light-full")
    assert watched.requests == [demo.as_uri()] and watched.problems == []


def test_hovering_and_focusing_tokens_shows_what_each_role_says(
    show: Callable[..., Watched], demo: Path
) -> None:
    watched = show(demo)
    page = watched.page
    tokens, inspector = page.locator("#tokens-response span"), page.locator("#tokens-inspector")
    tokens.nth(1).hover()
    assert inspector.inner_text().startswith("Token 2 of ")
    roles = inspector.locator("tbody th").all_inner_texts()
    assert roles == ["base", "expert", "antiexpert", "proxy"]
    cells = inspector.locator("tbody td").all_inner_texts()
    assert all(cell.endswith("%") for cell in cells[0::3]) and all(cells[2::3])
    tokens.nth(1).focus()
    page.keyboard.press("ArrowRight")
    assert inspector.inner_text().startswith("Token 3 of ")
    page.keyboard.press("Home")
    assert inspector.inner_text().startswith("Token 1 of ") and "Exactly" in inspector.inner_text()
    assert "Roughly" in inspector.locator("tbody tr").first.inner_text(), "the base would have chosen it"
    assert page.locator("#tokens-response span.changed").count() >= 1
    page.locator("#tokens").scroll_into_view_if_needed()
    picture(watched, "light-tokens")
    answers = page.locator("#tokens-chosen .answer .role").all_inner_texts()
    assert answers == ["base", "expert", "proxy", "tuned"]
    assert watched.problems == []


def test_filters_order_search_and_pages(show: Callable[..., Watched], demo: Path) -> None:
    watched = show(demo)
    page = watched.page
    items, status = page.locator("#tokens-list li"), page.locator("#tokens-status")
    assert items.count() == 10 and status.inner_text() == "40 of 40 responses"
    page.get_by_role("button", name="Next page").click()
    assert "11–20 of 40" in page.locator(".pages").inner_text()  # noqa: RUF001
    page.select_option("#tokens-outcome", "wrong")
    wrong = int(status.inner_text().split()[0])
    page.select_option("#tokens-outcome", "right")
    assert wrong + int(status.inner_text().split()[0]) == 40
    assert set(page.locator("#tokens-list .first span:last-child").all_inner_texts()) == {"right"}
    page.select_option("#tokens-outcome", "all")
    page.select_option("#tokens-order", "most")
    shifts = []
    for i in range(5):
        items.nth(i).click()
        summary = page.locator("#tokens-chosen p.small.muted").nth(1).inner_text()
        shifts.append(float(summary.split("mean shift ")[1].split(" points")[0]))
    assert shifts == sorted(shifts, reverse=True)
    page.select_option("#tokens-set", "1")
    page.fill("#tokens-words", "what does")
    found = page.locator("#tokens-list .question").all_inner_texts()
    assert found and all("what does" in question.lower() for question in found)
    page.fill("#tokens-words", "no question has this")
    assert items.count() == 0 and "No response fits" in page.locator("#tokens-chosen").inner_text()
    page.fill("#tokens-words", "")
    items.first.focus()
    page.keyboard.press("ArrowDown")
    assert items.nth(1).get_attribute("aria-selected") == "true"
    assert watched.problems == []


def test_themes(show: Callable[..., Watched], demo: Path) -> None:
    watched = show(demo, scheme="dark")
    page = watched.page
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(paper)
    button = page.locator("#theme")
    assert button.inner_text() == "Theme: as the system"
    picture(watched, "dark-top")
    picture(watched, "dark-full")
    button.click()
    assert button.inner_text() == "Theme: light" and page.evaluate(paper) != dark
    mark = page.locator("#figure-score-gsm svg path[aria-roledescription='point']").nth(3)
    light = mark.evaluate("node => getComputedStyle(node).fill")
    page.reload()
    assert button.inner_text() == "Theme: light", "the choice is kept"
    button.click()
    assert page.evaluate(paper) == dark
    assert mark.evaluate("node => getComputedStyle(node).fill") != light, "drawings follow the scheme"
    assert watched.problems == []


def test_drawings_tell_their_figures(show: Callable[..., Watched], demo: Path) -> None:
    watched = show(demo)
    page, tip = watched.page, watched.page.locator("#tip")
    page.locator("#figure-score-gsm svg path[aria-label^='proxy; ']").first.hover()
    assert tip.is_visible() and tip.inner_text().startswith("proxy\n")
    drawing = page.locator("#figure-alpha-gsm .drawing")
    drawing.focus()
    page.keyboard.press("ArrowRight")
    assert tip.inner_text().startswith("alpha 0\n")
    page.keyboard.press("ArrowRight")
    assert tip.inner_text().startswith("alpha 0.5\n") and "alpha 0.5" in page.locator("#live").inner_text()
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    assert watched.problems == []


def test_a_narrow_screen_does_not_scroll_sideways(show: Callable[..., Watched], demo: Path) -> None:
    watched = show(demo, width=390)
    assert watched.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    chosen = watched.page.locator("#tokens-chosen")
    assert chosen.evaluate("node => node.scrollWidth <= node.clientWidth"), "nothing is cut off beside it"
    picture(watched, "narrow-full")


def test_chart_text_is_readable_on_a_phone(show: Callable[..., Watched], demo: Path) -> None:
    page = show(demo, width=390).page
    unfold(page)
    sizes = page.evaluate(
        """() => [...document.querySelectorAll('figure svg')].flatMap((svg) => {
          const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
          const size = (text) => parseFloat(getComputedStyle(text).fontSize) * scale;
          return [...svg.querySelectorAll('text')].map(size);
        })"""
    )
    assert len(sizes) > 200 and min(sizes) >= 11
    for drawing in page.locator(".drawing").all():
        assert drawing.evaluate("node => node.scrollWidth <= node.clientWidth"), "drawings need no scrolling"


@pytest.mark.parametrize("width", [390, 1400])
def test_tables_that_scroll_say_so(show: Callable[..., Watched], demo: Path, width: int) -> None:
    page = show(demo, width=width).page
    unfold(page)
    page.wait_for_timeout(100)  # the observer comes after the layout
    found = page.evaluate(
        """() => [...document.querySelectorAll('.scroll')].map((box) =>
          [box.scrollWidth > box.clientWidth + 1, box.previousElementSibling.getClientRects().length > 0])"""
    )
    assert all(wider is cued for wider, cued in found)
    assert any(wider for wider, _ in found) or width > 390
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("width", [1400, 1000])
def test_figures_fill_their_lines(show: Callable[..., Watched], demo: Path, width: int) -> None:
    page = show(demo, width=width).page
    unfold(page)
    lines = page.evaluate(
        """() => [...document.querySelectorAll('.figures')].flatMap((grid) => {
          const edge = grid.getBoundingClientRect().right;
          const last = new Map();
          for (const figure of grid.children) {
            const box = figure.getBoundingClientRect();
            last.set(box.top, Math.max(last.get(box.top) || 0, box.right));
          }
          return [...last.values()].map((right) => edge - right);
        })"""
    )
    assert len(lines) > 10 and max(lines) < 2


def test_the_page_is_short_and_begins_with_findings(show: Callable[..., Watched], demo: Path) -> None:
    page = show(demo, width=1400).page
    assert page.evaluate("document.documentElement.scrollHeight") < 6500
    shown = page.evaluate("[...document.querySelectorAll('section')].map((section) => section.id)")
    assert shown[:2] == ["results", "tokens"]
    for name in shown:
        first = page.locator(f"#{name} h2 + p")
        assert first.get_attribute("class") in ("finding", "missing"), name
        assert any(char.isdigit() for char in first.inner_text()) or "missing" in str(
            first.get_attribute("class")
        )


def test_sections_without_data_are_one_line(show: Callable[..., Watched], tmp_path: Path) -> None:
    put(tmp_path / "results" / "tiny" / "gsm" / "base", run("base", 0.2), [example(0, "x", True)])
    page = show(report(tmp_path), width=1400).page
    empty = page.locator("section.empty")
    assert empty.count() == 9
    assert max(empty.evaluate_all("all => all.map((one) => one.getBoundingClientRect().height)")) < 40


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize(
    "scores", [(0.1, 0.9, 0.9), (0.1, 0.1, 0.9), (0.1, 0.5, 0.9), (0.5, 0.51, 0.52), (0.1, 0.88, 0.9)]
)
def test_labels_stand_under_their_dots(
    show: Callable[..., Watched], tmp_path: Path, width: int, scores: tuple[float, float, float]
) -> None:
    for task in ("gsm", "triviaqa", "truthfulqa", "realtimeqa", "alpaca_farm"):
        for role, score in zip(("base", "proxy", "tuned"), scores, strict=True):
            put(tmp_path / "results" / "tiny" / task / role, run(role, score, task=task), [])
    page = show(report(tmp_path), width=width).page
    tiles = page.evaluate(
        """() => [...document.querySelectorAll('.tile')].map((tile) => {
          const boxes = (all) => Object.fromEntries([...tile.querySelectorAll(all)].map((one) => {
            const { left, right, top, bottom } = one.getBoundingClientRect();
            return [one.className, { left, right, top, bottom }];
          }));
          return { dots: boxes('.way i'), names: boxes('.names span'), tile: tile.getBoundingClientRect() };
        })"""
    )
    assert len(tiles) == 5
    for tile in tiles:
        dots, names = tile["dots"], tile["names"]
        for role, dot in dots.items():
            middle = (dot["left"] + dot["right"]) / 2
            assert names[role]["left"] - 1 <= middle <= names[role]["right"] + 1
            assert names[role]["top"] >= dot["bottom"] - 8 and names[role]["bottom"] <= tile["tile"]["bottom"]
            for other in dots.keys() - {role}:
                a, b = names[role], names[other]
                apart = a["right"] <= b["left"] or b["right"] <= a["left"]
                assert apart or a["bottom"] <= b["top"] + 1 or b["bottom"] <= a["top"] + 1, (role, other)
        ring, dot, bar = dots["tuned"], dots["proxy"], dots["base"]
        assert ring["right"] - ring["left"] >= dot["right"] - dot["left"] + 8, "seen around the proxy's dot"
        assert bar["bottom"] - bar["top"] >= ring["bottom"] - ring["top"] + 3, "and the bar beyond both"


def test_a_long_response_is_cut_and_says_so(show: Callable[..., Watched], tmp_path: Path) -> None:
    words = [token(f" w{i % 50}", 0.5, 0.6) for i in range(30_000)]
    done = run("proxy", 0.8, trace="tokens").model_copy(update={"n": 2})
    rows = [example(0, "long", True), example(1, "short", True)]
    put(tmp_path / "results" / "s" / "gsm" / "proxy", done, rows, [words, words[:3]])
    path = report(tmp_path)
    assert path.stat().st_size < 1e6
    watched = show(path)
    page = watched.page
    assert "2 of 2 responses" in page.locator("#tokens-status").inner_text()
    assert page.locator("#tokens-response span").count() == 4000
    assert "the first 4,000 of 30,000 tokens" in page.locator("#tokens-chosen").inner_text()
    page.locator("#tokens-list li").nth(1).click()
    assert "the first" not in page.locator("#tokens-chosen").inner_text()
    assert watched.problems == []


def test_hostile_text_does_nothing(show: Callable[..., Watched], hostile: Path) -> None:
    watched = show(hostile)
    page = watched.page
    assert page.locator("#tokens-list li").count() == 10, "ToxiGen comes after gsm"
    for item in page.locator("#tokens-list li").all():
        item.click()
        for span in page.locator("#tokens-response span").all():
            span.hover()
    picture(watched, "hostile-full")
    unfold(page)
    for unveil in page.locator(".unveil").all():
        unveil.click()
    page.select_option("#tokens-set", "1")
    page.get_by_role("button", name="Show text that is hateful").click()
    for item in page.locator("#tokens-list li").all():
        item.click()
    assert page.evaluate("window.pwned") is None
    assert page.locator("main iframe, main img, main textarea, main script, main b[onclick]").count() == 0
    assert watched.requests == [hostile.as_uri()] and watched.problems == []


def test_hateful_text_waits_until_it_is_asked_for(show: Callable[..., Watched], hostile: Path) -> None:
    page = show(hostile).page
    page.select_option("#tokens-set", "1")
    assert page.locator(".tokens-view").is_hidden() and page.locator("#tokens-list li").count() == 0
    veiled = page.locator(".sensitive.veiled .texts").first
    assert veiled.evaluate("node => node.inert && getComputedStyle(node).filter") == "blur(9px)"
    page.locator(".sensitive .unveil").first.click()
    assert page.locator(".sensitive .texts").first.evaluate("node => getComputedStyle(node).filter") == "none"
    page.get_by_role("button", name="Show text that is hateful").last.click()


def test_tens_of_thousands_of_tokens_stay_responsive(show: Callable[..., Watched], tmp_path: Path) -> None:
    n, length = 400, 190
    rows = [example(i, f"response {i}", i % 2 == 0) for i in range(n)]
    words = [token(f" w{i}", (i % 7) / 10, (i % 11) / 11, f" v{i}") for i in range(length)]
    done = run("proxy", 0.8, trace="tokens").model_copy(update={"n": n})
    put(tmp_path / "results" / "s" / "gsm" / "proxy", done, rows, [words] * n)
    path = report(tmp_path)
    assert path.stat().st_size < 5e6
    watched = show(path)
    page = watched.page
    assert f"{n} of {n} responses" in page.locator("#tokens-status").inner_text(), "76,000 tokens"
    assert page.locator("#tokens-root *").count() < 3000, "only what is looked at is in the document"
    begin = time.monotonic()
    for order in ("most", "least", "long", "file"):
        page.select_option("#tokens-order", order)
    page.fill("#tokens-words", "response 399")
    assert page.locator("#tokens-list li").count() == 1
    took = (time.monotonic() - begin) / 5
    print(f"{took * 1000:.0f} ms per change")
    assert took < 1.0, "a change of order, filter or search"
    assert watched.problems == []
