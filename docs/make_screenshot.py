"""Take the picture of the playground that the README shows.

    proxytune serve --system demo --port 8000
    python docs/make_screenshot.py http://127.0.0.1:8000 docs/images/playground.png

It does what a newcomer does: opens the page, presses Enter, and waits for the answers. Needs Playwright and a
Chromium, as the tests do.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

WIDTH, HEIGHT = 960, 900
CHROMIUM = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def main(url: str, target: str) -> None:
    """Write the picture."""
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(url)
        page.keyboard.press("Enter")
        page.locator("#answers[data-finished='1']").wait_for()
        page.locator("h1").click()  # the focus leaves the prompt
        whole = page.locator(".looking").bounding_box()
        assert whole is not None
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": whole["y"] + whole["height"] + 14}
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=target, clip=clip, full_page=True)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
