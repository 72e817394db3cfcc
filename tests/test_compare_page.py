"""The page of a comparison in a real browser."""

from __future__ import annotations

import json
import re

import pytest
from small_runs import paired, write_exam, write_run
from test_compare import OTHER, read

from mlx_zh.reporting.compare_page import compare_page
from mlx_zh.system.storage import write_json, write_text

CHINESE = re.compile("[\u4e00-\u9fff]")


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    runs = tmp_path_factory.mktemp("runs")
    first = write_run(runs / "first")
    second = write_run(runs / "second", OTHER, sft={"batch_size": 32})
    third = write_run(runs / "third").rename(runs / "<img src=x onerror='window.hacked = 1'>")
    hostile = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    for run, answers in zip((first, second, third), (*paired(12, 1), paired(12, 1)[0]), strict=True):
        write_exam(run, {"base": "10" * 100, "sft": answers}, title="My exam")
        write_json(run / "samples.json", {"prompts": [hostile], "answers": {"base": ["?"], "sft": [hostile]}})
    write_text(runs / "compare.html", compare_page(read(first, second, third), "2026-01-01 00:00"))
    return (runs / "compare.html").as_uri()


def test_the_page_shows_everything_without_a_complaint_and_without_the_network(browser, address):
    browser.open(f"{address}#lang=en")
    assert browser.problems == []
    assert {address.partition("#")[0] for address in browser.requests} <= {address, "about:blank"}
    assert browser.ask("window.hacked") is None
    titles = browser.ask("[...document.querySelectorAll('h2')].map(e => e.innerText)")
    assert titles[:4] == ["At a glance", "Is the comparison fair?", "What the recipes set differently", "Exams"]
    heads = browser.ask("[...document.querySelectorAll('table[data-exam=my] thead th')].map(e => e.innerText)")
    assert heads[:4] == ["Category", "base", "first · SFT", "second · SFT"] and len(heads) == 5
    tested = browser.ask("[...document.querySelectorAll('table[data-exam=my] .test > span')].map(e => e.innerText)")
    assert tested == ["+5.50 better", "0.00 within noise"]


def test_the_axis_can_be_switched(browser, address):
    browser.open(f"{address}#lang=en")
    shown = "[...document.querySelectorAll('.along')].filter(e => e.offsetHeight).map(e => e.className)"
    assert browser.ask(shown) == ["along scored_tokens"]  # a step of the second run holds twice as many
    for axis, at in (("hours", [1, 2]), ("step", [1, 2]), ("scored_tokens", [100, 200])):
        browser.ask(f"document.querySelector('label[for=axis-sft-{axis}]').click()")
        assert browser.ask(shown) == [f"along {axis}"]
        points = browser.ask(f"document.querySelector('.{axis} .key').dataset.x")
        assert [float(x) for x in points.split()] == at
    assert browser.problems == []


def test_both_languages_are_whole(browser, address):
    browser.open(f"{address}#lang=zh")
    assert browser.ask("document.title").endswith("对比")
    texts = "[...document.querySelectorAll('h2, section:not(#summary) > .note, .checks td')].map(e => e.innerText)"
    texts = [text for text in browser.ask(texts) if text]
    assert len(texts) > 20 and [text for text in texts if not CHINESE.search(text)] == []
    browser.ask("document.querySelector('label[for=lang-en]').click()")
    seen = json.dumps(browser.ask("document.querySelector('.page').innerText"), ensure_ascii=False).replace(
        "中文", ""
    )
    assert not CHINESE.search(seen)


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_page_fits_its_window(browser, address, width, language):
    browser.size(width, 800)
    browser.open(f"{address}#lang={language}")
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.problems == []
