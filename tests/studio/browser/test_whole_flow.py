"""From a dropped spreadsheet to an exported model, on the page alone, in a real Chromium."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from studio_server import RunningStudio
from talk_runs import make_run

from mlx_zh.corpus.preferences import load_preferences
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.stages.run_list import key_of
from mlx_zh.studio import processes

FILE = "很长的中文文件名：客服问答（2024年第三季度，整理版）.xlsx"


def until(page: Any, happens: Callable[[], object], seconds: float = 200) -> None:
    """Wait for something outside the page, which goes on meanwhile."""
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it did not happen"
        page.wait_for_timeout(50)


def steps_of(run: RunFolder) -> list[int]:
    """The optimizer steps in the metrics, in the order in which they were written."""
    if not run.stage("sft").metrics.exists():
        return []
    lines = [json.loads(line) for line in run.stage("sft").metrics.read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


@pytest.fixture
def kefu(tea_studio: RunningStudio) -> Iterator[RunFolder]:
    """The folder of the run, which is ended with the test."""
    run = RunFolder(tea_studio.folder / "runs" / "kefu")
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
    book.save(tmp_path / FILE)
    return tmp_path / FILE


@pytest.mark.slow
def test_drop_train_stop_resume_compare_talk_vote_examine_export(
    tea_studio: RunningStudio,
    browser_page: Any,
    spreadsheet: Path,
    model_folder: Callable[..., Path],
    kefu: RunFolder,
) -> None:
    page = browser_page(tea_studio, "/new", language="zh")
    page.set_default_timeout(120_000)
    tea, model = RunFolder(tea_studio.folder / "runs" / "tea"), model_folder(max_position_embeddings=65536)
    other = RunFolder(make_run(model, tea_studio.folder, "other"))  # whose models surely give different answers
    start(page, spreadsheet, str(model))
    recipe = (tea_studio.folder / "kefu.yaml").read_text(encoding="utf-8")
    assert "epochs: 400" in recipe
    assert [path.name for path in (tea_studio.folder / "data").iterdir()] == [
        "很长的中文文件名-客服问答（2024年第三季度-整理版）.xlsx"
    ]
    stop_and_resume(page, kefu)
    compare(page, tea_studio, "kefu", "tea")
    talk(page, tea_studio, other)
    examine(page, tea_studio, tea)
    export(page, tea)


def start(page: Any, spreadsheet: Path, model: str) -> None:
    """Drop the file, choose the model, and set 400 epochs in the form, which the YAML follows."""
    page.wait_for_selector(".z-drop")
    page.set_input_files("input[type=file]", spreadsheet)
    page.get_by_text("61 行中有 60 行可用").wait_for()
    sample = page.locator(".z-sample").first
    assert "<script>alert(" in sample.inner_text()  # as text
    assert sample.locator(".z-learned").inner_text().startswith("第")
    page.get_by_label("模型", exact=True).click()
    page.get_by_role("option", name="其他模型").click()
    page.get_by_label("Hub 上的 ID、文件夹或 .gguf 文件").fill(model)
    page.get_by_label("训练的名称").fill("kefu")
    page.get_by_text("配方会写入 kefu.yaml").wait_for()
    page.get_by_text("够用", exact=True).wait_for()
    page.locator(".q-slider__track-container").press("PageUp")  # no limit: then nothing is measured first
    page.get_by_text("不限", exact=True).wait_for()
    page.get_by_text("高级：全部设置与 YAML 配方").click()
    page.get_by_label("sft.epochs").fill("400")
    page.locator(".cm-line", has_text="epochs: 400").wait_for()
    page.get_by_role("button", name="开始训练").click()
    page.wait_for_url("**/run?run=*")


def stop_and_resume(page: Any, run: RunFolder) -> None:
    """The curve grows; no step is lost when the run is stopped and resumed, and none is taken twice."""
    page.locator(".z-chart canvas").first.wait_for()
    figure = page.locator(".z-figure-name:text-is('SFT 步') + .z-figure")
    first = figure.inner_text()
    until(page, lambda: figure.inner_text() != first)
    page.get_by_role("button", name="停止").click()
    resume = page.get_by_role("button", name="继续")
    resume.wait_for()
    before = steps_of(run)
    assert before == list(range(1, len(before) + 1)) and not run.stage("sft").is_finished
    resume.click()
    until(page, lambda: len(steps_of(run)) > len(before) + 1)
    page.get_by_role("button", name="停止").click()
    resume.wait_for()
    after = steps_of(run)
    assert after == list(range(1, len(after) + 1))
    assert run.log.read_text(encoding="utf-8").count("$ mlx-zh run kefu.yaml") == 2


def compare(page: Any, studio: RunningStudio, *names: str) -> None:
    """Choose the runs in the list."""
    page.get_by_role("link", name="训练记录").click()
    for name in names:
        page.locator("tr", has=page.get_by_role("link", name=name, exact=True)).locator(".q-checkbox").click()
    page.get_by_role("button", name="对比 2 个").click()
    page.locator(".z-compare canvas").first.wait_for()
    assert "sft.epochs" in page.locator(".z-compare").inner_text()


def talk(page: Any, studio: RunningStudio, run: RunFolder) -> None:
    """Ask base, SFT and DPO; the vote is in the file, as `prepare` reads it."""
    page.goto(f"{studio.base}/talk?run={key_of(run.path)}")
    page.get_by_text("设置", exact=True).click()
    page.get_by_label("回答最长词元数").fill("12")
    page.get_by_label("回答最长词元数").press("Tab")
    page.locator(".z-composer textarea").fill("茶怎么泡？")
    page.locator(".z-composer textarea").press("Enter")
    page.locator(".z-vote-button", has_text="SFT").click()
    page.get_by_text("已记录：SFT 更好").wait_for()
    pairs = load_preferences(run.feedback)[0]
    assert [pair.prompt[-1].content for pair in pairs] == ["茶怎么泡？"] * 2  # SFT is preferred to the other two
    assert pairs[0].chosen == pairs[1].chosen and pairs[0].rejected != pairs[1].rejected


def examine(page: Any, studio: RunningStudio, run: RunFolder) -> None:
    """Filter the questions that were won; the navigation stays with the run."""
    page.goto(f"{studio.base}/data?run={key_of(run.path)}")
    page.get_by_role("link", name="评测").click()
    won = page.get_by_role("button", name="答对了")
    count = int(won.inner_text().split()[-1])
    won.click()
    page.get_by_text(f"第 1–20 题，共 {count} 题").wait_for()


def export(page: Any, run: RunFolder) -> None:
    """Export the adapter for PEFT."""
    page.get_by_role("link", name="导出").click()
    page.get_by_text("还没有导出").wait_for()
    page.get_by_text("mlx-zh fuse runs/tea 'export.formats=[mlx]'").wait_for()
    page.get_by_text("peft", exact=True).click()
    page.get_by_text("mlx", exact=True).click()
    page.get_by_text("mlx-zh fuse runs/tea 'export.formats=[peft]'").wait_for()
    page.get_by_role("button", name="导出", exact=True).click()
    page.get_by_text("导出完成。").wait_for()
    page.get_by_text("runs/tea/fused/peft", exact=True).wait_for()
    assert (run.fused / "peft" / "adapter_model.safetensors").is_file()
