"""The playground: the page at `/`, and what a browser makes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import unescape
from typing import Any

import pytest

from proxytune.config import System, load_system
from proxytune.models.roles import Models
from proxytune.server.playground.page import ANYWHERE, example_prompts, playground_html
from proxytune.terminal.text import is_suspect
from tests.support.browser import Watched, browser, show
from tests.support.servers import Served, served

__all__ = ["browser", "show"]  # fixtures
ROLES = {"demo": "proxy", "demo/base": "base"}
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u202eback"
KEY = "a-long-enough-key"


def test_the_page_holds_everything_and_allows_nothing_else() -> None:
    page, policy = playground_html(load_system("demo"), ROLES)  # type: ignore[arg-type]
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:|/docs)""", page)
    assert "default-src 'none'" in policy and "unsafe" not in policy and "connect-src 'self'" in policy
    data = json.loads(page.partition('id="playground-data">')[2].partition("</script>")[0])
    assert data["models"] == [{"role": "base", "model": "demo/base"}, {"role": "proxy", "model": "demo"}]
    assert data["alpha"] == "1" and len(data["examples"]) == 4
    assert data["examples"][0]["expected"] == "80" and "Jinin has 52 beads" in data["examples"][0]["prompt"]


def test_names_of_others_are_shown_and_not_obeyed() -> None:
    spec = {"model": "demo://base"}
    system = System.model_validate({"name": EVIL, "description": EVIL, "base": spec})
    page, _ = playground_html(system, {EVIL: "base"})
    assert page.count("<script") == 3 and "<img" not in page and not any(map(is_suspect, page))
    assert "\u2039U+202E\u203aback" in unescape(page)
    assert [one.prompt for one in example_prompts(system)] == [ANYWHERE]


@pytest.fixture(scope="module")
def demo() -> Iterator[Served]:
    """A server of the demo."""
    with served(Models(load_system("demo"))) as found:
        yield found


@pytest.fixture
def page(demo: Served, show: Callable[..., Watched]) -> Iterator[Watched]:
    """The playground of the demo, watched: it asks its own server only, and nothing goes wrong."""
    watched = show(demo.url)
    yield watched
    assert watched.problems == []
    assert [url for url in watched.requests if not url.startswith((f"{demo.url}/", "data:"))] == []
    demo.wait_idle()


def text_of(page: Any, role: str) -> str:
    """The answer of a role as it is shown, without the mark of its end."""
    spans = page.locator(f".panel.{role} .response span:not(.over)").all_text_contents()
    return "".join(spans).replace("↵\n", "\n")


def run(page: Any) -> None:
    """Press Enter in the prompt, and wait for all answers."""
    with settled(page):
        page.locator("#prompt").press("Enter")


@contextmanager
def settled(page: Any) -> Iterator[None]:
    """Do something that has roles answer, and wait for their answers."""
    before = int(page.locator("#answers").get_attribute("data-finished") or 0)
    yield
    page.locator(f"#answers[data-finished='{before + 1}']").wait_for(timeout=60_000)


def fragment(page: Any) -> dict[str, str]:
    """What the link says."""
    found: dict[str, str] = page.evaluate(
        "() => Object.fromEntries(new URLSearchParams(location.hash.slice(1)))"
    )
    return found


@pytest.mark.slow
def test_one_key_press_shows_the_idea(page: Watched) -> None:
    shown = page.page
    with settled(shown):  # the prompt of the demo world is there, and has the focus
        shown.keyboard.press("Enter")
    assert text_of(shown, "base").endswith("The answer is 110.")
    assert text_of(shown, "proxy").endswith("Exactly 52-12=40. Exactly 40*2=80. The answer is 80.")
    assert text_of(shown, "expert").endswith("The answer is 60.")
    assert (
        shown.locator("#status").inner_text().startswith("3 of 30 tokens of the proxy are not what the base")
    )
    changed = shown.locator(".panel.proxy .response span.changed")
    assert [text.strip() for text in changed.all_text_contents()] == ["Answer", "Exactly", "Exactly"]
    assert "rgba" in str(changed.first.get_attribute("style")), "shaded"
    looked = shown.locator(".looking .inspector")
    assert "Token 14 of the proxy" in looked.inner_text(), "the token that moved most is looked at"
    assert looked.locator("tbody th").all_text_contents() == ["base", "expert", "antiexpert", "proxy"]
    assert looked.locator("tbody tr").first.locator(".one").count() == 5
    assert sum("/v1/chat/completions" in url for url in page.requests) == 5


@pytest.mark.slow
def test_tokens_are_reached_with_pointer_and_keyboard(page: Watched) -> None:
    shown = page.page
    run(shown)
    looked = shown.locator(".looking .inspector")
    shown.locator(".panel.proxy .response span").nth(2).hover()
    assert "Token 3 of the proxy" in looked.inner_text() and "Roughly" in looked.inner_text()
    shown.locator(".panel.proxy .response span").nth(2).focus()
    shown.keyboard.press("ArrowRight")
    assert "Token 4 of the proxy" in looked.inner_text()
    shown.keyboard.press("End")
    assert "here the answer ends" in looked.inner_text()
    shown.locator(".panel.base .response span").first.hover()
    assert "Token 1 of the base" in looked.inner_text()
    assert looked.locator("tbody th").all_text_contents() == ["base"]


@pytest.mark.slow
def test_the_slider_changes_the_proxy_alone(page: Watched) -> None:
    shown = page.page
    run(shown)
    before = len(page.requests)
    with settled(shown):
        shown.locator("#alpha").press("Home")
    assert text_of(shown, "proxy") == text_of(shown, "base"), "alpha 0 is the base"
    assert len(page.requests) == before + 1
    assert shown.locator("#alpha-text").input_value() == "0" == fragment(shown)["alpha"]
    assert shown.locator("#status").inner_text().startswith("0 of ")
    with settled(shown):
        shown.locator("#alpha-text").fill("first:3")
        shown.locator("#alpha-text").press("Tab")
    assert "Exactly" in text_of(shown, "proxy"), "a schedule: only the first tokens are steered"


@pytest.mark.slow
def test_a_link_reproduces_what_is_shown(page: Watched, show: Callable[..., Watched], demo: Served) -> None:
    shown = page.page
    shown.locator("#prompt").fill("Where is it & why?\n#100% «é»")
    shown.locator("summary", has_text="More settings").click()
    for name, value in {
        "temperature": "1.5",
        "seed": "7",
        "tokens": "20",
        "system": "Be <b>kind</b>.",
    }.items():
        shown.locator(f"#{name}").fill(value)
    shown.locator("#format").select_option("plain")
    shown.locator("#alpha-text").fill("0.45")
    run(shown)
    wanted = {role: text_of(shown, role) for role in ("base", "proxy", "tuned")}
    other = show(shown.url)
    other.page.locator("#answers[data-finished='1']").wait_for(timeout=60_000)
    assert {role: text_of(other.page, role) for role in wanted} == wanted
    assert other.page.locator("#prompt").input_value() == "Where is it & why?\n#100% «é»"
    assert other.page.locator("#alpha").input_value() == "0.45" and other.problems == []
    other.page.locator("#seed").evaluate("(field) => { field.value = '8'; }")
    run(other.page)
    assert text_of(other.page, "proxy") != wanted["proxy"], "another seed is another answer"


@pytest.mark.slow
def test_tokens_arrive_live_and_can_be_stopped(page: Watched, demo: Served) -> None:
    shown = page.page
    shown.locator("summary", has_text="More settings").click()
    shown.locator("#tokens").fill("1800")
    shown.locator("#temperature").fill("4")
    shown.locator("#seed").fill("3")  # with this one it does not end by itself before 1,761 tokens
    shown.locator("#prompt").press("Enter")
    shown.locator(".panel.proxy.busy .response span").nth(5).wait_for(timeout=60_000)
    shown.keyboard.press("Escape")
    shown.locator("#stop:disabled").wait_for()
    demo.wait_idle()
    assert re.fullmatch(r"stopped after \d+ tokens", shown.locator(".panel.proxy .end").inner_text())


@pytest.mark.slow
def test_what_is_wrong_is_a_line_beside_its_role(page: Watched) -> None:
    shown = page.page
    shown.locator("#alpha-text").fill("much")
    run(shown)
    assert "alpha 'much' is not a number" in shown.locator(".panel.proxy .end").inner_text()
    assert text_of(shown, "base"), "the others answer"
    shown.locator("#prompt").fill("  ")
    shown.locator("#prompt").press("Enter")
    assert shown.locator("#status").inner_text() == "Write a prompt first."
    page.problems[:] = [line for line in page.problems if "400 (Bad Request)" not in line]


def stream(texts: list[str]) -> str:
    """What a server would stream of a model that says this."""
    top = [{"text": EVIL, "id": 1, "probability": 0.5}]
    records = [
        {"text": text, "id": 2, "offset": 0, "end": False, "alpha": 1.0}
        | {"probability": {"base": 0.1, "proxy": 0.9}, "top": {"base": top, "proxy": top}}
        for text in texts
    ]
    chunks = [{"choices": [{"index": 0, "finish_reason": "stop", "proxytune_trace": records}]}]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


@pytest.mark.slow
def test_hostile_text_is_shown_and_not_obeyed(page: Watched) -> None:
    shown = page.page
    shown.locator("#prompt").fill(EVIL)
    run(shown)
    assert shown.locator("#prompt").input_value() == EVIL
    said = {"content_type": "text/event-stream", "body": stream([EVIL, "\x1b[2J\u2066", "\n\t"])}
    shown.route("**/v1/**", lambda route: route.fulfill(**said))
    run(shown)
    answer = shown.locator(".panel.proxy .response")
    assert answer.locator("*").count() == 3, "three tokens, and no element of theirs"
    text = answer.inner_text()
    assert "<script>alert(1)</script>" in text
    assert "\u2039U+202E\u203aback\u2039U+001B\u203a[2J\u2039U+2066\u203a↵" in text
    assert "\u2039U+202E\u203aback" in shown.locator(".looking .inspector").inner_text()
    assert not any(map(is_suspect, shown.locator("#answers").inner_text()))
    shown.unroute("**/v1/**")
    failed = {"status": 400, "json": {"error": {"message": EVIL}}}
    shown.route("**/v1/**", lambda route: route.fulfill(**failed))
    run(shown)
    assert "<script>alert(1)</script>" in shown.locator(".panel.base .end").inner_text()
    page.problems[:] = [line for line in page.problems if "400 (Bad Request)" not in line]


@pytest.mark.slow
def test_a_server_that_is_gone_is_said(page: Watched) -> None:
    shown = page.page
    shown.route("**/v1/**", lambda route: route.abort())
    run(shown)
    assert "is it still running?" in shown.locator(".panel.proxy .end").inner_text()
    page.problems[:] = [line for line in page.problems if "net::ERR_FAILED" not in line]


@pytest.mark.slow
def test_a_key_is_asked_for_where_the_server_has_one(show: Callable[..., Watched], demo: Served) -> None:
    models = next(iter(demo.server.service.batches.values())).decoder.models
    with served(models, key=KEY) as guarded:
        watched = show(guarded.url)
        shown = watched.page
        run(shown)
        assert "the API key is missing" in shown.locator(".panel.base .end").inner_text()
        shown.locator("#key").fill(KEY)
        run(shown)
        assert text_of(shown, "proxy").endswith("The answer is 80.")
        assert KEY not in shown.url
        assert all("401" in line for line in watched.problems)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_it_fits_and_follows_the_theme(
    show: Callable[..., Watched], demo: Served, scheme: str, width: int
) -> None:
    watched = show(demo.url, scheme=scheme, width=width)
    shown = watched.page
    run(shown)
    assert shown.evaluate("() => document.documentElement.scrollWidth") <= width
    assert shown.locator("html").get_attribute("data-theme") == scheme
    wide = shown.locator(".panels > *").evaluate_all(
        "(nodes) => nodes.filter((n) => n.scrollWidth > n.clientWidth + 1).map((n) => n.className)"
    )
    assert wide == [] and watched.problems == []
