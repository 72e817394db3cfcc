"""Every page in both languages, wide and narrow, light and dark: no console error, nothing wider than the page."""

from __future__ import annotations

from typing import Any

import pytest
from hostile_project import MARKUP
from studio_server import RunningStudio

from mlx_zh.stages.run_list import key_of
from mlx_zh.studio.frame import PAGES


@pytest.mark.parametrize(
    ("language", "dark", "name"),
    [
        ("zh", True, "tea"),
        ("en", False, MARKUP),
        pytest.param("en", True, "tea", marks=pytest.mark.thorough),
        pytest.param("zh", False, MARKUP, marks=pytest.mark.thorough),
    ],
)
def test_no_page_complains_or_is_wider_than_its_window(
    tea_studio: RunningStudio,
    hostile_studio: RunningStudio,
    browser_page: Any,
    language: str,
    dark: bool,
    name: str,
) -> None:
    studio = tea_studio if name == "tea" else hostile_studio
    page = browser_page(studio, language=language, dark=dark)
    run = key_of(studio.folder / "runs" / name)
    for each in PAGES:
        page.set_viewport_size({"width": 1400, "height": 900})
        page.goto(f"{studio.base}{each.path}?run={run}&runs={run}")
        page.wait_for_selector(".nicegui-content > *")
        page.wait_for_function("window.socket?.connected ?? true")
        if name == "tea":
            assert page.locator(".z-error").count() == 0, each.path
        for width in (1400, 390):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_function(f"document.documentElement.scrollWidth <= {width}")  # a chart follows a bit later
        assert page.evaluate("window.hacked") is None
        assert page.locator("html").get_attribute("lang") == {"zh": "zh-CN", "en": "en-US"}[language]
