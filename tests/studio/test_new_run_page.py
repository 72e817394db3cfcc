"""From a dropped spreadsheet to a started run, in a real Chromium; stop and resume."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.studio import processes

pytest.importorskip("nicegui")


def until(happens: Callable[[], object], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def steps_of(run: RunFolder) -> list[int]:
    """The optimizer steps in the metrics, in the order in which they were written."""
    if not run.stage("sft").metrics.exists():
        return []
    lines = [json.loads(line) for line in run.stage("sft").metrics.read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


@pytest.fixture
def kefu(project: Path) -> Iterator[RunFolder]:
    """The folder of the run, which is ended with the test."""
    run = RunFolder(project / "runs" / "kefu")
    yield run
    while (left := processes.running(run)) is not None:
        os.kill(left.process, signal.SIGKILL)
        time.sleep(0.1)


@pytest.fixture
def spreadsheet(tmp_path: Path) -> Path:
    import openpyxl

    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(["问题", "答案"])
    for number in range(60):
        sheet.append([f"第{number}个问题？<script>alert({number})</script>", f"第{number}个回答。"])
    sheet.append(["没有答案", ""])
    path = tmp_path / "很长的中文文件名：客服问答（2024年第三季度，整理版）.xlsx"
    book.save(path)
    return path


def test_from_a_spreadsheet_to_a_run_that_is_stopped_and_resumed(
    studio_at: Any,
    browser_page: Any,
    project: Path,
    spreadsheet: Path,
    model_folder: Callable[..., Path],
    kefu: RunFolder,
) -> None:
    page = browser_page(studio_at(project), "/new", language="zh")
    page.wait_for_selector(".z-drop")
    page.set_input_files("input[type=file]", spreadsheet)
    page.get_by_text("61 行中有 60 行可用").wait_for()
    sample = page.locator(".z-sample").first
    assert "<script>alert(" in sample.inner_text()  # as text
    assert sample.locator(".z-learned").inner_text().startswith("第")
    page.get_by_label("模型", exact=True).click()
    page.get_by_role("option", name="其他模型").click()
    page.get_by_label("Hub 上的 ID、文件夹或 .gguf 文件").fill(str(model_folder()))
    name = page.get_by_label("训练的名称")
    name.fill("kefu")
    page.get_by_text("配方会写入 kefu.yaml").wait_for()
    page.get_by_text("够用", exact=True).wait_for(timeout=100_000)
    page.locator(".q-slider__track-container").press("PageUp")  # no limit: then nothing is measured first
    page.get_by_text("不限", exact=True).wait_for()
    page.get_by_text("高级：全部设置与 YAML 配方").click()
    epochs = page.get_by_label("sft.epochs")
    epochs.fill("400")
    page.locator(".cm-line", has_text="epochs: 400").wait_for()  # the YAML follows the form
    page.get_by_role("button", name="开始训练").click()
    page.wait_for_url("**/run?run=*", timeout=100_000)

    recipe = (project / "kefu.yaml").read_text(encoding="utf-8")
    assert "epochs: 400" in recipe and str(model_folder()) in recipe
    assert [path.name for path in (project / "data").iterdir()] == [
        "很长的中文文件名-客服问答（2024年第三季度-整理版）.xlsx"
    ]
    run = kefu
    until(lambda: len(steps_of(run)) >= 3)
    page.locator(".z-chart canvas").first.wait_for(timeout=100_000)  # the curve on the page Run
    page.get_by_role("button", name="停止").click()
    resume = page.get_by_role("button", name="继续")
    resume.wait_for(timeout=100_000)
    before = steps_of(run)
    assert before == list(range(1, len(before) + 1)) and not run.stage("sft").is_finished

    resume.click()
    until(lambda: len(steps_of(run)) > len(before) + 1)
    page.get_by_role("button", name="停止").click()
    resume.wait_for(timeout=100_000)
    after = steps_of(run)
    assert after == list(range(1, len(after) + 1))  # no step was lost, and none taken twice
    assert run.log.read_text(encoding="utf-8").count("$ mlx-zh run kefu.yaml") == 2


def test_a_name_that_is_refused_stays_and_the_page_says_why(studio_at: Any, browser_page: Any, project: Path) -> None:
    page = browser_page(studio_at(project), "/new", width=390, language="zh")
    name = page.get_by_label("训练的名称")
    page.wait_for_selector("text=qwen3")  # the models are listed, and the first draft is made
    name.fill("我的模型")
    page.wait_for_selector("text=/^name 必须是.*我的模型/")
    page.wait_for_selector("text=/^第 \\d+ 行：name/")
    assert name.input_value() == "我的模型"
    name.fill("kefu-2")
    page.wait_for_selector("text=/name 必须是/", state="detached")
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
