"""A real headless Chromium for tests of pages, and what it saw: console errors and requests.

Debian's `chromium`, or the one that OBM_CHROMIUM names, driven by Playwright. Without one the tests
skip; with OBM_NEEDS_BROWSER=1, as in CI, they fail instead.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SCREENSHOTS = Path(os.environ.get("OBM_SCREENSHOTS", "runs/screenshots"))
"""Where tests leave pictures of pages for people to look at."""
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 900}


def find_chromium() -> str:
    """Path of the browser; skips the test, or fails it in CI, where there is none."""
    named = os.environ.get("OBM_CHROMIUM")
    found = named or shutil.which("chromium") or shutil.which("chromium-browser")
    if found:
        return found
    reason = "no Chromium; apt-get install chromium, or set OBM_CHROMIUM"
    if os.environ.get("OBM_NEEDS_BROWSER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@contextmanager
def chromium() -> Iterator[Any]:
    """A running browser (Playwright's `Browser`)."""
    path = find_chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # as root, which CI is, Chromium starts only without its sandbox
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Tab:
    """One open page, and everything that went wrong on it.

    Attributes:
        page: Playwright's `Page`.
        errors: console errors, warnings and uncaught exceptions, as text.
        requests: addresses asked for beside the page itself; `data:` and `blob:` stay within it.
    """

    def __init__(self, browser: Any, path: Path, *, scheme: str, viewport: dict[str, int]) -> None:
        self.context = browser.new_context(
            color_scheme=scheme, viewport=viewport, accept_downloads=True
        )
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._on_request)
        self._address = path.resolve().as_uri()
        self.page.goto(self._address)

    def screenshot(self, name: str, *, full: bool = False) -> Path:
        """Leave a picture `<name>.png` in SCREENSHOTS."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        self.page.screenshot(path=str(path), full_page=full)
        return path

    def overflows(self) -> bool:
        """Whether the page is wider than the window, so that a phone would scroll sideways."""
        return bool(
            self.page.evaluate(
                "document.documentElement.scrollWidth > document.documentElement.clientWidth"
            )
        )

    def close(self) -> None:
        """Close the page and its context."""
        self.context.close()

    def _on_console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def _on_request(self, request: Any) -> None:
        inside = request.url.split("#")[0] == self._address
        if not inside and not request.url.startswith(("data:", "blob:")):
            self.requests.append(request.url)


@contextmanager
def open_page(
    browser: Any, path: Path, *, scheme: str = "light", viewport: dict[str, int] = DESKTOP
) -> Iterator[Tab]:
    """Open a file in a tab of its own.

    Args:
        browser: of `chromium`.
        path: an HTML file.
        scheme: "light" or "dark", what the reader's system prefers.
        viewport: width and height of the window in CSS pixels.
    """
    tab = Tab(browser, path, scheme=scheme, viewport=viewport)
    try:
        yield tab
    finally:
        tab.close()
