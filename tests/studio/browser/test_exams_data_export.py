"""The pages Exams and Data in a real browser, with scripts in questions and rows."""

from __future__ import annotations

from typing import Any

from studio_server import RunningStudio

from mlx_zh.stages.run_list import key_of


def test_questions_and_rows_are_filtered_and_searched(tea_studio: RunningStudio, browser_page: Any):
    studio, run = tea_studio, f"?run={key_of(tea_studio.folder / 'runs' / 'tea')}"
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
    assert page.title() == "评测 · mlx-zh"

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
