"""The report's page in a real browser: headless Chromium, spoken to over the pipes of its DevTools protocol."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fabricated
import pytest
import yaml

from mlx_zh.reporting.findings import gather
from mlx_zh.reporting.page import page
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.system.storage import write_text

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--lang=en-US",
    "--remote-debugging-pipe",
)


class Browser:
    """One page; `problems` are console errors, exceptions and refused or failed requests."""

    def __init__(self, program: str, profile: Path) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._number = 0
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        # The protocol's pipes are descriptors 3 (commands) and 4 (answers); a shell puts them there.
        wires = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", wires, program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_read, to_write),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._answers = os.fdopen(self._from, "rb")
        targets = self._call("Target.getTargets", {}, session=False)["targetInfos"]
        target = next(found["targetId"] for found in targets if found["type"] == "page")
        attached = self._call("Target.attachToTarget", {"targetId": target, "flatten": True}, session=False)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable", {})

    def open(self, address: str) -> None:
        """Load a page anew and wait for it."""
        self._call("Page.navigate", {"url": "about:blank"})
        self._call("Page.navigate", {"url": address})
        ready = "new Promise(r => document.readyState === 'complete' ? r(1) : addEventListener('load', () => r(1)))"
        assert self.ask(ready) == 1

    def ask(self, expression: str) -> Any:
        """A JavaScript expression's value."""
        options = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        found = self._call("Runtime.evaluate", options)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def size(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", metrics)

    def close(self) -> None:
        self._call("Browser.close", {}, session=False)
        self._process.wait(20)
        os.close(self._to)
        self._answers.close()

    def _call(self, method: str, params: dict[str, Any], *, session: bool = True) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer.get("method", ""), answer.get("params", {}))

    def _read(self) -> dict[str, Any]:
        data = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser went away"
            data += byte
        return json.loads(data)

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        wrong = method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert")
        wrong = wrong or (method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"))
        if wrong or method in ("Runtime.exceptionThrown", "Network.loadingFailed"):
            self.problems.append(json.dumps(params)[:500])


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    found = Browser(program, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


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
