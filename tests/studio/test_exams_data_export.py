"""The pages Exams, Data and Export in a real browser, with scripts in questions and rows, and without anything."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mlx_zh.stages.run_list import key_of


def test_filter_search_and_export(tea: Path, tmp_path: Path, studio_at: Any, browser_page: Any):
    project = tmp_path / "project"
    shutil.copytree(tea, project)
    studio = studio_at(project, MLX_ZH_CACHE=str(project / "cache"))
    run = f"?run={key_of(project / 'runs' / 'tea')}"

    page = browser_page(studio, f"/exams{run}", language="zh", width=390)
    page.get_by_text("第 1–20 题，共 48 题").wait_for()
    assert page.get_by_text("<script>document.title='bad'</script>").count() == 1
    won = page.get_by_role("button", name="答对了")
    count = int(won.inner_text().split()[-1])
    assert 0 < count < 48  # base answers A, and SFT what is right
    won.click()
    page.get_by_text(f"第 1–20 题，共 {count} 题").wait_for()
    page.get_by_label("搜索").fill("月河 qingshi")
    shown = "[...document.querySelectorAll('.z-question')]"
    page.wait_for_function(f"{shown}.length && {shown}.every(card => card.innerText.includes('月河'))")
    assert page.title() == "考试 · mlx-zh"

    page = browser_page(studio, f"/data{run}", language="en", dark=True)
    page.get_by_text("1 to 6 of 6 rows").wait_for()
    page.get_by_label("Search").fill("<script>")
    page.get_by_text("1 to 1 of 1 rows").wait_for()
    page.locator(".z-shown-row").click()
    dialog = page.locator(".z-dialog")
    dialog.get_by_text("Row 3 of rows.jsonl").wait_for()
    # One span a token, and a token a byte.
    assert "<img src=x onerror=alert(1)>" in "".join(dialog.locator(".z-token.z-learned").all_inner_texts())
    assert page.locator("img").count() == 0
    page.keyboard.press("Escape")
    page.get_by_role("button", name="near duplicate 1").click()
    page.locator(".z-marked").first.wait_for()
    assert page.locator(".z-marked").all_inner_texts() == ["明", "亮"]

    page = browser_page(studio, f"/export{run}", language="en", width=390)
    page.get_by_text("Nothing is exported yet").wait_for()
    page.get_by_text("mlx-zh fuse runs/tea 'export.formats=[mlx]'").wait_for()
    page.get_by_text("peft", exact=True).click()
    page.get_by_text("mlx", exact=True).click()
    page.get_by_text("mlx-zh fuse runs/tea 'export.formats=[peft]'").wait_for()
    page.get_by_role("button", name="Export", exact=True).click()
    page.get_by_text("The export is done.").wait_for(timeout=60_000)
    page.get_by_text("runs/tea/fused/peft", exact=True).wait_for()
    assert (project / "runs" / "tea" / "fused" / "peft" / "adapter_model.safetensors").is_file()
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_pages_say_what_is_missing_or_damaged(project: Path, studio_at: Any, browser_page: Any):
    for name in ("empty", "damaged"):
        (project / "runs" / name).mkdir()
        (project / "runs" / name / "manifest.json").write_text("{}")
    damaged = project / "runs" / "damaged"
    for place in ("data", "eval", "fused"):
        (damaged / place).mkdir()
    for file in (
        "data/report.json",
        "eval/base-ceval.json",
        "eval/base-ceval.jsonl",
        "fused/summary.json",
        "recipe.yaml",
    ):
        (damaged / file).write_bytes(b'{"half": \xff')
    studio = studio_at(project)
    empty, broken = (f"?run={key_of(project / 'runs' / name)}" for name in ("empty", "damaged"))
    page = browser_page(studio, f"/exams{empty}")
    page.get_by_text("This run has no exam results yet").wait_for()
    for path, said in (
        (f"/exams{broken}", "This run has no exam results yet"),
        (f"/data{empty}", "This run has no prepared data yet"),
        (f"/data{broken}", "The report of the prepared data is damaged"),
        (f"/export{empty}", "This run has no trained adapter yet"),
        (f"/export{broken}", "The summary of the exports is damaged"),
        ("/export?run=../../etc", "there is no such run here"),
    ):
        page.goto(f"{studio.base}{path}")
        page.get_by_text(said).wait_for()
