"""The Talk page in a real Chromium: ask, stop, vote, take back, edit, and the blind arena, with hostile words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from studio_server import RunningStudio
from talk_runs import make_run

from mlx_zh.corpus.preferences import load_preferences
from mlx_zh.stages.run_list import key_of
from mlx_zh.system.locks import locked

HOSTILE = "<img src=x onerror=alert(1)><script>alert(1)</script> \u202e**粗**"


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "feedback.jsonl").read_text("utf-8").splitlines()]


def settled(page: Any, work: Callable[[], object], run: Path, count: int) -> list[dict[str, Any]]:
    """Do something on the page, and wait until the file of feedback has so many rows."""
    work()
    for _ in range(200):
        if (run / "feedback.jsonl").exists() and len(found := rows(run)) >= count:
            return found
        page.wait_for_timeout(50)
    raise AssertionError("no row was written")


def test_talking_voting_and_the_arena(
    model_folder: Callable[..., Path], tea_studio: RunningStudio, browser_page: Callable[..., Any]
) -> None:
    studio, project = tea_studio, tea_studio.folder
    model = model_folder(max_position_embeddings=65536)  # that of `tea`: the process has it already
    run, training = make_run(model, project), make_run(model, project, "training")
    with locked(training, "sft"):  # a run at work has the machine
        page = browser_page(studio, f"/talk?run={key_of(run)}")
        page.on("dialog", lambda dialog: pytest.fail("a script of the model's ran"))
        page.wait_for_selector("text=A training run is at work: training. Talking takes about", timeout=60_000)
        page.click(".z-example >> nth=0")
        page.wait_for_selector("text=agree first")
        assert page.locator(".z-answer").count() == 0
        page.click("text=Talk all the same")
        page.wait_for_selector("text=loaded with the first question")
    page.click("text=Settings")
    for name, value in (("Longest answer, tokens", "12"), ("Seed", "7"), ("System prompt", "请简短。")):
        page.fill(f"[aria-label='{name}']", value)
        page.press(f"[aria-label='{name}']", "Tab")
    page.fill(".z-composer textarea", HOSTILE)
    page.press(".z-composer textarea", "Enter")
    page.wait_for_selector(".z-vote-button", timeout=60_000)
    assert page.inner_text(".z-asked") == HOSTILE
    assert page.locator(".z-answer").count() == 3 and page.locator(".z-answer-text img, .z-asked b").count() == 0

    found = settled(page, lambda: page.dblclick(".z-vote-button >> text=DPO"), run, 2)
    assert [(row["choice"], row["adapter"]) for row in found] == [(1, "dpo"), (1, "dpo")]
    assert {row["sampling"][0]["seed"] for row in found} == {7} and found[0]["prompt"][1]["content"] == HOSTILE
    assert len(load_preferences(run / "feedback.jsonl")[0]) == 2
    found = settled(page, lambda: page.click("text=Take back"), run, 4)
    assert [row["choice"] for row in found[2:]] == ["withdrawn", "withdrawn"]
    found = settled(page, lambda: page.click("[aria-label='Good'] >> nth=1"), run, 5)
    assert (found[4]["choice"], found[4]["adapter"]) == ("good", "sft")
    page.click("[aria-label^='Edit'] >> nth=2")
    page.fill(".z-edit-text textarea", "应有的回答")
    found = settled(page, lambda: page.dblclick("text='Record'"), run, 6)
    assert (found[5]["choice"], found[5]["edited"]) == ("edited", "应有的回答")
    page.wait_for_selector("text=edited by you")

    page.click("text=New conversation")
    page.click("text=Settings")
    for name, value in (("Longest answer, tokens", "30000"), ("Temperature", "0")):
        page.fill(f"[aria-label='{name}']", value)
        page.press(f"[aria-label='{name}']", "Tab")
    page.click(".z-example >> nth=0")
    page.wait_for_selector(".z-answer-text >> nth=0")
    page.wait_for_function("document.querySelector('.z-answer-text').innerText.length > 3")
    page.click("[aria-label='Stop']")
    page.wait_for_selector("[aria-label='Send']:visible")
    assert any("stopped" in text for text in page.locator(".z-answer").all_inner_texts())

    page.goto(f"{page.url}&mode=blind")
    page.wait_for_selector("text=No votes yet")
    page.click("text=Settings")
    page.fill("[aria-label='Longest answer, tokens']", "12")
    page.press("[aria-label='Longest answer, tokens']", "Tab")
    page.click(".z-example >> nth=0")
    page.wait_for_selector("text=A is better", timeout=60_000)
    assert page.locator(".z-answer-title").all_inner_texts() == ["A", "B"]
    found = settled(page, lambda: page.dblclick("text=A is better"), run, 7)
    page.wait_for_selector("text=95 % interval")
    names = page.locator(".z-answer-title").all_inner_texts()
    assert sorted(names) in (["A · Base", "B · DPO"], ["A · DPO", "B · Base"])
    assert found[6]["choice"] == (names[0] == "A · DPO")
    settled(page, lambda: page.click("text=Take back"), run, 8)
    page.wait_for_selector("text=A is better")
