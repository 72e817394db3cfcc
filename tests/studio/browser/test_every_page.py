"""Every page in both languages, wide and narrow, light and dark: no console error, nothing wider than the page."""

from __future__ import annotations

from typing import Any

import pytest
from studio_server import RunningStudio

from mlx_zh.stages.run_list import key_of
from mlx_zh.studio.frame import PAGES


@pytest.mark.parametrize(
    ("language", "dark"),
    [
        ("zh", True),
        ("en", False),
        *(pytest.param(*case, marks=pytest.mark.thorough) for case in (("zh", False), ("en", True))),
    ],
)
def test_no_page_complains_or_is_wider_than_its_window(
    tea_studio: RunningStudio, browser_page: Any, language: str, dark: bool
) -> None:
    page = browser_page(tea_studio, language=language, dark=dark)
    run = key_of(tea_studio.folder / "runs" / "tea")
    for each in PAGES:
        page.set_viewport_size({"width": 1400, "height": 900})
        page.goto(f"{tea_studio.base}{each.path}?run={run}")
        page.wait_for_selector(".nicegui-content > *")
        page.wait_for_function("window.socket?.connected ?? true")
        assert page.locator(".z-error").count() == 0, each.path
        for width in (1400, 390):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_function(f"document.documentElement.scrollWidth <= {width}")  # a chart follows a bit later
        assert page.locator("html").get_attribute("lang") == {"zh": "zh-CN", "en": "en-US"}[language]
