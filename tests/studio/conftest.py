"""A studio in a process of its own, and pages of a real Chromium that must not report any error."""

from __future__ import annotations

import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nicegui")

_CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_START = 60  # seconds in which the studio must have printed its address


@dataclass(frozen=True)
class RunningStudio:
    """A studio that listens. `address` has the token, `base` has none and no final slash."""

    address: str
    base: str
    token: str
    process: subprocess.Popen[str]
    folder: Path

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.base.rpartition(":")[2])


@contextmanager
def studio_process(folder: Path, *options: str, **environment: str) -> Iterator[RunningStudio]:
    """The real studio for a folder, started as users do, on a free port; ended when the context ends."""
    command = [sys.executable, "-m", "mlx_zh.studio", str(folder), "--no-browser", *options]
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    for name in ("PYTEST_CURRENT_TEST", "NICEGUI_USER_SIMULATION"):
        variables.pop(name, None)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables, cwd=folder
    ) as process:
        try:
            address = _address(process)
            base, _, token = address.partition("/?token=")
            yield RunningStudio(address, base, token, process, folder)
        finally:
            process.terminate()
            process.wait(10)


def _address(process: subprocess.Popen[str]) -> str:
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    seen = ""
    while line := lines.get(timeout=_START):
        seen += line
        if match := re.search(r"http://\S+token=\S+", line):
            return match[0]
    raise AssertionError(f"the studio did not start:\n{seen}")


@pytest.fixture
def studio_at() -> Iterator[Callable[..., RunningStudio]]:
    """`studio_at(folder, *options, **environment)` starts a studio that ends with the test."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield lambda *arguments, **environment: stack.enter_context(studio_process(*arguments, **environment))


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium, shared by all tests. Skips where there is none."""
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


@pytest.fixture(scope="session")
def tea(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> Path:
    """A project with a run that has everything, see `prepared_project`; its cache is beside it, in `cache`."""
    from prepared_project import prepared_project

    folder: Path = tmp_path_factory.mktemp("tea")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_ZH_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        prepared_project(folder, model_folder())
    return folder
