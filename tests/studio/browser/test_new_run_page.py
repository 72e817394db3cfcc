"""The page New run in a real Chromium: names that are refused, empty projects, and uploads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nicegui")


def test_a_name_that_is_refused_stays_and_the_page_says_why(studio_at: Any, browser_page: Any, project: Path) -> None:
    page = browser_page(studio_at(project), "/new", width=390, language="zh")
    name = page.get_by_label("训练的名称")
    page.wait_for_selector("text=qwen3")  # the models are listed, and the first draft is made
    name.fill("我的模型")
    page.wait_for_selector("text=/^name 应为.*我的模型/i")
    page.wait_for_selector("text=/^第 \\d+ 行：name/i")
    assert name.input_value() == "我的模型"
    name.fill("kefu-2")
    page.wait_for_selector("text=/name 应为/i", state="detached")
    page.get_by_text("高级：全部设置").click()
    page.wait_for_selector("text=name: kefu-2")
    assert page.locator(".q-notification").count() == 0


def test_an_empty_project_leads_to_a_new_run(studio_at: Any, browser_page: Any, project: Path) -> None:
    studio = studio_at(project)
    (project / "runs").rmdir()
    for path in ("/", "/talk", "/exams"):
        page = browser_page(studio, path, width=390, language="zh")
        empty = page.locator(".z-empty")
        empty.get_by_role("button", name="新建训练").click()
        page.wait_for_selector(".z-drop")
        assert "mlx-zh run" not in empty.all_inner_texts()
    (project / "my recipe.yaml").write_text("name: tea\nmodel: {path: smollm2-135m-instruct}\n", encoding="utf-8")
    page = browser_page(studio, "/", width=390, language="zh")
    page.wait_for_selector("text=mlx-zh run 'my recipe.yaml'")


@pytest.mark.thorough
def test_the_same_file_can_be_dropped_again_and_a_failed_upload_is_told(
    studio_at: Any, browser_page: Any, project: Path, tmp_path: Path
) -> None:
    page = browser_page(studio_at(project), "/new", language="zh")
    page.wait_for_selector(".z-drop")
    file = tmp_path / "qa.csv"
    file.write_text("问题,答案\n你好,您好！\n再见,慢走。\n", encoding="utf-8")
    for _ in range(2):
        page.set_input_files("input[type=file]", file)
        page.wait_for_selector(".z-file >> text=qa.csv")
        page.get_by_label("移除").click()
        page.wait_for_selector(".z-file", state="detached")
    assert page.locator(".z-error").count() == 0
    page.evaluate(  # a connection that breaks off, of which the console says nothing
        "() => { const send = XMLHttpRequest.prototype.send;"
        "window.mend = () => XMLHttpRequest.prototype.send = send;"
        "XMLHttpRequest.prototype.send = function () {"
        "Object.defineProperty(this, 'readyState', { value: 4 }); setTimeout(this.onreadystatechange, 50); }; }"
    )
    page.set_input_files("input[type=file]", file)
    page.wait_for_selector(".z-error >> text=文件没有传过来")
    page.evaluate("() => window.mend()")
    page.set_input_files("input[type=file]", file)
    page.wait_for_selector(".z-file >> text=qa.csv")
    page.wait_for_selector(".z-error", state="detached")
    page.set_input_files("input[type=file]", {"name": "a.exe", "mimeType": "", "buffer": b"MZ"})
    page.wait_for_selector(".z-error >> text=不是数据文件")
    assert [path.name for path in (project / "data").iterdir()] == ["qa.csv"]
