"""A real browser (headless Chromium through Playwright): the fixtures `browser` and `show`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.require import require_or_skip

CHROMIUM = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@dataclass
class Watched:
    """A page, and what it did that it must not do."""

    page: Any
    requests: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium: Debian's, or the one that Playwright has downloaded."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        require_or_skip("browser", "the package 'playwright' is not installed (pip install 'proxytune[dev]')")
        raise
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    with sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error as error:
            require_or_skip(
                "browser", f"no Chromium (apt-get install chromium-headless-shell): {str(error)[:200]}"
            )
            raise
        yield found
        found.close()


@pytest.fixture
def show(browser: Any) -> Iterator[Callable[..., Watched]]:
    """Opens a file, or an address; what it asks for and what goes wrong is written down."""
    contexts = []

    def opened(place: Path | str, *, scheme: str = "light", width: int = 1280) -> Watched:
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        contexts.append(context)
        watched = Watched(context.new_page())
        page = watched.page
        page.on("request", lambda request: watched.requests.append(request.url))
        page.on("pageerror", lambda error: watched.problems.append(str(error)))
        page.on("dialog", lambda dialog: watched.problems.append(f"dialog: {dialog.message}"))
        page.on(
            "console",
            lambda message: message.type in ("error", "warning") and watched.problems.append(message.text),
        )
        page.goto(place if isinstance(place, str) else place.as_uri())
        return watched

    yield opened
    for context in contexts:
        context.close()
