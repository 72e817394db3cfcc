"""A studio in a process of its own, and pages of a real Chromium that must not report any error."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from studio_server import RunningStudio, studio_process

pytest.importorskip("nicegui")

_CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture
def studio_at() -> Iterator[Callable[..., RunningStudio]]:
    """`studio_at(folder, *options, **environment)` starts a studio that ends with the test."""
    with ExitStack() as stack:
        yield lambda *arguments, **environment: stack.enter_context(studio_process(*arguments, **environment))


@pytest.fixture(scope="module")  # not longer: Playwright runs an event loop in this thread, which others may need
def chromium() -> Iterator[Any]:
    """A headless Chromium, shared by a module's tests. Skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    program = next((path for name in _CHROMIUM if (path := shutil.which(name))), None)
    with playwright.sync_playwright() as driver:
        if program is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip("there is no Chromium")
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def browser_page(chromium: Any) -> Iterator[Callable[..., Any]]:
    """`browser_page(studio, path="/", width=1400, language="en", dark=False)`: a page of the studio in Chromium.

    The test fails if the page reported an error, which includes whatever its Content-Security-Policy refused.
    """
    errors: list[str] = []
    contexts = []

    def open_page(
        studio: RunningStudio, path: str = "/", *, width: int = 1400, language: str = "en", dark: bool = False
    ) -> Any:
        context = chromium.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
            locale={"en": "en-US", "zh": "zh-CN"}[language],
        )
        contexts.append(context)
        context.add_cookies([{"name": "mlx-zh-language", "value": language, "url": studio.base}])
        page = context.new_page()
        page.on("console", lambda message: message.type == "error" and errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(studio.address)
        page.wait_for_url(f"{studio.base}/")
        if path != "/":
            page.goto(f"{studio.base}{path}")
        page.wait_for_selector(".z-brand")
        page.wait_for_function("window.socket?.connected ?? true")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors, errors


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project folder without runs."""
    folder = tmp_path / "project"
    (folder / "runs").mkdir(parents=True)
    return folder
