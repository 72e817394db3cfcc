"""Pages of a real Chromium that must not report any error, and the studios that these tests share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile_project import hostile_project
from studio_server import RunningStudio, studio_process

from mlx_zh.studio.projects import LANGUAGE_COOKIE

_CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


# Not longer than this folder: Playwright runs an event loop in this thread, which others may need.
@pytest.fixture(scope="package")
def chromium() -> Iterator[Any]:
    """A headless Chromium, shared by the tests of this folder. Skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    program = next((path for name in _CHROMIUM if (path := shutil.which(name))), None)
    with playwright.sync_playwright() as driver:
        if program is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip("there is no Chromium")
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def visitor(chromium: Any) -> Any:
    """The cookies and the cache that all pages share: Chromium compiles NiceGUI's scripts once."""
    return chromium.new_context()


@pytest.fixture
def browser_page(visitor: Any) -> Iterator[Callable[..., Any]]:
    """`browser_page(studio, path="/", width=1400, language="en", dark=False)`: a page of the studio in Chromium.

    The test fails if the page reported an error, which includes whatever its Content-Security-Policy refused.
    """
    errors: list[str] = []
    pages = []

    def open_page(
        studio: RunningStudio, path: str = "/", *, width: int = 1400, language: str = "en", dark: bool = False
    ) -> Any:
        visitor.add_cookies([{"name": LANGUAGE_COOKIE, "value": language, "url": studio.base}])
        page = visitor.new_page()
        pages.append(page)
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme="dark" if dark else "light")
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
    for page in pages:
        page.close()
    assert not errors, errors


@pytest.fixture(scope="package")
def tea_studio(tea: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStudio]:
    """A studio for a copy of the project `tea`."""
    project = tmp_path_factory.mktemp("studio") / "project"
    shutil.copytree(tea, project)
    with studio_process(project, MLX_ZH_CACHE=str(project / "cache")) as studio:
        yield studio


@pytest.fixture(scope="package")
def hostile_studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStudio]:
    """A studio for the runs of `hostile_project`."""
    with studio_process(hostile_project(tmp_path_factory.mktemp("studio") / "project")) as studio:
        yield studio
