"""Runs and Run in a real Chromium, and what another site or a hostile run folder cannot do."""

from __future__ import annotations

import http.client
import http.server
import json
import shutil
import socketserver
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hostile_project import HOSTILE, MARKUP, SECRET, train, write
from studio_server import RunningStudio

from mlx_zh.stages.run_list import RunList, key_of
from mlx_zh.studio.frame import PAGES


def get(
    studio: RunningStudio, path: str, method: str = "GET", **headers: str
) -> tuple[int, str, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", studio.port, timeout=20)
    names = {"Cookie": f"mlx-zh-studio-{studio.port}={studio.token}", **headers}
    connection.request(method, path, headers={k.replace("_", "-"): v for k, v in names.items()})
    answer = connection.getresponse()
    text = answer.read().decode("utf-8", "replace")
    connection.close()
    return answer.status, text, answer


def key(studio: RunningStudio, name: str) -> str:
    return next(info.key for info in RunList([studio.folder]).read() if info.name == name)


def test_the_whole_server_is_behind_the_guard(hostile_studio: RunningStudio) -> None:
    status, page, _ = get(hostile_studio, "/")
    assert status == 200 and "nonce=" in page
    version = page.partition("/_nicegui/")[2].partition("/")[0]
    paths = [page.path for page in PAGES]
    paths += [
        f"/_nicegui/{version}/static/nicegui.js",
        "/_nicegui_ws/socket.io/?EIO=4&transport=polling",
        "/favicon.ico",
    ]
    for path in paths:
        assert get(hostile_studio, path)[0] in (200, 400)
        assert get(hostile_studio, path, Cookie="")[0] == 403
        assert get(hostile_studio, path, Host="evil.example")[0] == 421
        assert get(hostile_studio, path, Origin="http://evil.example")[0] == 403
        _, _, answer = get(hostile_studio, path)
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]
    for path in ("/docs", "/openapi.json", "/redoc"):
        assert "swagger" not in get(hostile_studio, path)[1].lower()


def test_nothing_outside_is_reached_by_any_parameter(hostile_studio: RunningStudio) -> None:
    secret = hostile_studio.folder.parent / "secret.txt"
    values = ["../../secret.txt", "../secret.txt", str(secret), "link", "..", "a\x00b"]
    for page in PAGES:
        for value in values:
            query = "&".join(f"{name}={quote(value)}" for name in ("run", "runs", "exam", "stage", "recipe", "file"))
            status, text, _ = get(hostile_studio, f"{page.path}?{query}")
            assert status == 200 and SECRET not in text
    for value in values:
        assert SECRET not in get(hostile_studio, f"/{quote(value)}")[1]
        assert SECRET not in get(hostile_studio, f"/_nicegui/3/static/{quote(value, safe='')}")[1]


def test_nothing_is_written_where_the_studio_was_started(hostile_studio: RunningStudio) -> None:
    assert sorted(path.name for path in hostile_studio.folder.iterdir()) == ["runs"]


@pytest.mark.parametrize(
    ("language", "width", "dark"),
    [pytest.param("en", 1400, False, marks=pytest.mark.thorough), ("zh", 390, True)],
)
def test_runs_are_listed_searched_chosen_and_opened(
    hostile_studio: RunningStudio, browser_page: Callable[..., Any], language: str, width: int, dark: bool
) -> None:
    page = browser_page(hostile_studio, width=width, language=language, dark=dark)
    words = {"en": ("Failed", "Search", "Compare 2"), "zh": ("失败", "搜索", "对比 2 个")}[language]
    page.get_by_role("link", name="good").wait_for()
    assert page.get_by_text(words[0], exact=True).count() == 2
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.locator("tbody .q-checkbox" if width > 600 else ".z-run .q-checkbox")
    boxes.nth(0).click()
    boxes.nth(1).click()
    page.get_by_role("button", name=words[2]).wait_for()
    page.get_by_label(words[1]).fill("goo")
    page.get_by_role("link", name="bad").wait_for(state="detached")
    page.get_by_role("link", name="good").click()
    page.wait_for_url("**/run?run=*")
    page.locator(".z-chart canvas").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_curve_grows_while_the_page_is_open(
    hostile_studio: RunningStudio, browser_page: Callable[..., Any]
) -> None:
    folder = hostile_studio.folder / "runs" / "growing"
    train(folder, 5)
    write(folder / "pipeline.json", {"stages": {}})
    page = browser_page(hostile_studio, f"/run?run={key(hostile_studio, 'growing')}")
    page.get_by_text("4", exact=True).wait_for()
    with (folder / "sft" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "epoch": 0.1, "loss": 0.123456, "elapsed_seconds": 5}) + "\n")
    page.get_by_text("0.1235").wait_for()
    page.get_by_text("5", exact=True).wait_for()
    shutil.rmtree(folder)
    page.get_by_text("no such run here").wait_for()


def test_a_failed_run_says_why(hostile_studio: RunningStudio, browser_page: Callable[..., Any]) -> None:
    page = browser_page(hostile_studio, f"/run?run={key(hostile_studio, 'bad')}")
    assert "rows.jsonl:3: no answer" in page.get_by_role("alert").inner_text()


def test_markup_in_names_recipes_warnings_and_logs_stays_text(
    hostile_studio: RunningStudio, browser_page: Callable[..., Any]
) -> None:
    page = browser_page(hostile_studio)
    page.get_by_role("link", name=MARKUP).wait_for()
    hostile = key(hostile_studio, MARKUP)
    page.goto(f"{hostile_studio.base}/run?run={hostile}")
    page.locator(".z-log").wait_for()
    assert page.get_by_text(MARKUP).count() >= 4  # name and model, reason, warning, log
    assert page.evaluate("window.hacked") is None


@pytest.mark.thorough
def test_runs_are_compared_and_the_page_is_saved(
    hostile_studio: RunningStudio, browser_page: Callable[..., Any]
) -> None:
    runs = ",".join(key(hostile_studio, name) for name in ("first", "second", HOSTILE))
    page = browser_page(hostile_studio, f"/compare?runs={runs}", width=390)
    page.wait_for_selector(".z-compare canvas")
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    with page.expect_download() as download:
        page.locator("button", has_text="Save as one HTML file").click()
    assert download.value.suggested_filename.startswith("compare-first-second")
    saved = download.value.path().read_text()
    assert saved.startswith("<!doctype html>") and "+5.50" in saved and "<img" not in saved


def test_pages_say_what_is_missing_or_damaged(
    hostile_studio: RunningStudio, browser_page: Callable[..., Any]
) -> None:
    empty, broken = (f"?run={key(hostile_studio, name)}" for name in ("empty", "damaged"))
    page = browser_page(hostile_studio, f"/exams{empty}")
    page.get_by_text("This run has no exam results yet").wait_for()
    for path, said in (
        (f"/exams{broken}", "This run has no exam results yet"),
        (f"/data{empty}", "This run has no prepared data yet"),
        (f"/data{broken}", "The report of the prepared data is damaged"),
        (f"/export{empty}", "This run has no trained adapter yet"),
        (f"/export{broken}", "The summary of the exports is damaged"),
        ("/export?run=../../etc", "there is no such run here"),
    ):
        page.goto(f"{hostile_studio.base}{path}")
        page.get_by_text(said).wait_for()


class _Elsewhere(http.server.BaseHTTPRequestHandler):
    """Another site on this machine."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>elsewhere</title>")

    def log_message(self, *_: Any) -> None:
        pass


_ATTACKS = """async base => {
  const outcome = {};
  const attempt = async (name, work) => {
    try { outcome[name] = await work(); } catch { outcome[name] = 'refused'; }
  };
  await attempt('read', async () => (await fetch(base + '/', {credentials: 'include'})).status);
  await attempt('post', async () =>
    (await fetch(base + '/_nicegui/client/x/upload/1', {method: 'POST', credentials: 'include', body: 'x'})).status);
  await attempt('script', () => new Promise((good, bad) => {
    const script = document.createElement('script');
    script.onload = () => good('loaded'); script.onerror = bad;
    script.src = base + '/_nicegui/VERSION/static/socket.io.min.js';
    document.head.append(script);
  }));
  await attempt('socket', () => new Promise((good, bad) => {
    const socket = new WebSocket(base.replace('http', 'ws') + '/_nicegui_ws/socket.io/?EIO=4&transport=websocket');
    socket.onopen = () => good('open'); socket.onerror = bad;
  }));
  await attempt('frame', () => new Promise(good => {
    const frame = document.createElement('iframe');
    frame.onload = () => { try { good(frame.contentDocument ? 'blank' : 'refused'); } catch { good('refused'); } };
    frame.src = base + '/';
    document.body.append(frame);
  }));
  return outcome;
}"""


def test_another_site_in_the_same_browser_reaches_nothing(hostile_studio: RunningStudio, chromium: Any) -> None:
    """It is even same-site: another port of 127.0.0.1, so its requests carry the cookie."""
    version = get(hostile_studio, "/")[1].partition("/_nicegui/")[2].partition("/")[0]
    with socketserver.TCPServer(("127.0.0.1", 0), _Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        context = chromium.new_context()
        page = context.new_page()
        page.goto(hostile_studio.address)
        page.wait_for_url(f"{hostile_studio.base}/")
        page.goto(f"http://127.0.0.1:{server.server_address[1]}/")
        outcome = page.evaluate(_ATTACKS.replace("VERSION", version), hostile_studio.base)
        assert outcome == dict.fromkeys(("read", "post", "script", "socket", "frame"), "refused")
        page.evaluate(
            "base => { document.body.innerHTML = `<form method=post action='${base}/'></form>`;"
            " document.forms[0].submit(); }",
            hostile_studio.base,
        )
        page.wait_for_url(f"{hostile_studio.base}/")
        assert page.locator("body").inner_text().strip() == "refused"
        context.close()
        server.shutdown()


def test_two_studios_run_side_by_side_each_with_its_own_token(
    hostile_studio: RunningStudio,
    studio_at: Callable[..., RunningStudio],
    browser_page: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """The second one is for a folder without anything, and its pages say what to do."""
    second = studio_at(tmp_path)
    assert second.port != hostile_studio.port and second.token != hostile_studio.token
    assert get(second, "/", Cookie=f"mlx-zh-studio-{second.port}={hostile_studio.token}")[0] == 403
    assert get(second, "/")[0] == get(hostile_studio, "/")[0] == 200
    page = browser_page(second, width=390, language="zh")
    page.get_by_text("还没有训练记录").wait_for()
    page.goto(f"{second.base}/talk")
    page.get_by_text("还没有可以对话的训练").wait_for()
    page.close()
    second.process.terminate()
    assert second.process.wait(10) == 0


def test_a_run_removed_while_its_page_is_open_is_told_once(studio_at: Any, browser_page: Any, project: Path) -> None:
    folder = project / "runs" / "gone"
    folder.mkdir()
    (folder / "pipeline.json").write_text('{"stages": {}}', encoding="utf-8")
    page = browser_page(studio_at(project), f"/run?run={key_of(folder)}", language="zh")
    page.wait_for_selector("text=尚未训练")
    shutil.rmtree(folder)
    page.wait_for_selector(".q-notification >> text=这里没有这个训练")
    page.wait_for_timeout(3500)
    assert page.locator(".q-notification").count() == 1
