"""The report's page in a real browser."""

from __future__ import annotations

import json

import fabricated
import pytest
import yaml

from mlx_zh.reporting.findings import gather
from mlx_zh.reporting.page import page
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.system.storage import write_text


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    folder = fabricated.write_run(tmp_path_factory.mktemp("run"), steps=40, questions={"ceval": 6, "cmmlu": 4})
    samples = json.loads((folder / "samples.json").read_text())
    samples["answers"]["dpo"][0] = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    (folder / "samples.json").write_text(json.dumps(samples))
    found = gather(RunFolder(folder), yaml.safe_dump(fabricated.RECIPE), name="invented", bootstrap=100, seed=0)
    write_text(folder / "report.html", page(found, "2026-01-01 00:00"))
    return (folder / "report.html").as_uri()


def test_the_page_loads_without_a_complaint_and_without_the_network(browser, report):
    browser.open(report)
    assert browser.problems == []
    assert {address.partition("#")[0] for address in browser.requests} <= {report, "about:blank"}
    assert browser.ask("window.hacked") is None
    assert browser.ask("document.querySelector('.replies:first-child, .replies').textContent").count("<script>") == 1


def test_the_missions_tables_are_shown(browser, report):
    browser.open(f"{report}#lang=en")
    rows = "[...document.querySelectorAll('table[data-exam=%s] tbody th')].map(e => e.innerText)"
    rest = ["STEM", "Social Sciences", "Humanities", "Other"]
    assert browser.ask(rows % "ceval") == ["Average", "Average (hard)", *rest]
    assert browser.ask(rows % "cmmlu") == ["Average", *rest, "China-specific"]
    heads = browser.ask("[...document.querySelectorAll('table[data-exam=ceval] thead th')].map(e => e.innerText)")
    assert heads == ["Category", "base", "SFT", "DPO", "Change (DPO − base)", "Verdict"]
    assert browser.ask("document.querySelectorAll('svg.curves').length") == 6
    assert browser.ask("document.querySelectorAll('svg.dots').length") == 2


def test_the_language_is_that_of_the_address_or_the_browser_and_can_be_switched(browser, report):
    heading = "document.querySelector('#summary h2').innerText"
    browser.open(f"{report}#lang=zh")
    assert (browser.ask(heading), browser.ask("document.documentElement.lang")) == ("摘要", "zh-Hans")
    assert browser.ask("document.title") == "invented 微调报告"
    browser.ask("document.querySelector('label[for=lang-en]').click()")
    assert (browser.ask(heading), browser.ask("document.documentElement.lang")) == ("At a glance", "en")
    assert browser.ask("document.title") == "invented: fine-tuning report"
    browser.open(report)
    assert browser.ask(heading) == "At a glance"  # the browser was started in English
    assert browser.ask("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    seen = browser.ask("[...document.querySelectorAll('h2, h3, th, dt, summary')].map(e => e.innerText).join(' ')")
    assert not [letter for letter in seen if "\u4e00" <= letter <= "\u9fff"]
    assert browser.problems == []


def test_pointing_at_a_curve_shows_its_values(browser, report):
    browser.open(f"{report}#lang=en")
    point = """(() => {
        const svg = document.querySelector('#sft svg.curves'), box = svg.getBoundingClientRect();
        const x = box.left + box.width * 468 / 480;
        svg.dispatchEvent(new PointerEvent('pointermove', {clientX: x, clientY: box.top + 50}));
        const said = [...svg.closest('figure').querySelectorAll('.key b')].map(e => e.textContent);
        svg.dispatchEvent(new PointerEvent('pointerleave'));
        return said.concat(svg.closest('figure').querySelector('.key b').textContent);
    })()"""
    raw, smoothed, validation, gone = browser.ask(point)
    assert [text.partition(":")[0] for text in (raw, smoothed, validation)] == ["40"] * 3 and gone == ""
    assert raw != smoothed


@pytest.mark.parametrize("width", [360, 800, 1400])
def test_the_page_fits_its_window(browser, report, width):
    browser.size(width, 800)
    browser.open(f"{report}#lang=en")
    assert browser.ask("document.documentElement.scrollWidth") <= width
    wide = browser.ask(
        "[...document.querySelectorAll('.wide:has(.exam)')].filter(e => e.scrollWidth > e.clientWidth).length"
    )
    assert wide == 0
    assert browser.problems == []
