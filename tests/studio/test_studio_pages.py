"""Runs and Run in a real Chromium, and what another site or a hostile run folder cannot do."""

from __future__ import annotations

import http.client
import http.server
import json
import shutil
import socketserver
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from studio_server import RunningStudio, studio_process

from mlx_zh.stages.run_list import RunList, key_of
from mlx_zh.studio.frame import PAGES

MARKUP = "<img src=x onerror=window.hacked=1>"
SECRET = "the content of a file that is none of the studio's business"


def write(path: Path, *lines: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def train(folder: Path, steps: int) -> None:
    lines = [
        {"step": step, "epoch": step / 50, "loss": 2 / step, "elapsed_seconds": step} for step in range(1, steps)
    ]
    write(folder / "sft" / "metrics.jsonl", {"step": 0, "eval_loss": 2.5}, *lines)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStudio]:
    """A studio with a finished run, a failed one, one whose every text is markup, and a link that leads elsewhere."""
    folder = tmp_path_factory.mktemp("studio") / "project"
    runs = folder / "runs"
    done = {"outputs": {"a": "b"}, "seconds": 60}
    train(runs / "good", 45)
    write(runs / "good" / "pipeline.json", {"stages": {"sft": done, "report": done}})
    train(runs / "bad", 5)
    write(runs / "bad" / "pipeline.json", {"stages": {"sft": {"outputs": None}}})
    write(runs / "bad" / "ended.json", {"how": "failed", "why": "rows.jsonl:3: no answer. Correct the row."})
    hostile = runs / MARKUP
    train(hostile, 5)
    write(hostile / "pipeline.json", {"stages": {"sft": {"outputs": None}}})
    write(hostile / "ended.json", {"how": "failed", "why": MARKUP})
    write(hostile / "sft" / "warnings.jsonl", {"text": MARKUP})
    (hostile / "run.log").write_text(MARKUP)
    text = f"# {MARKUP}\nmodel: {{path: '{MARKUP}'}}\ndata: {{sft: {{train: [{{name: '{MARKUP}'}}]}}}}\n"
    (hostile / "recipe.yaml").write_text(text, encoding="utf-8")
    (folder.parent / "secret.txt").write_text(SECRET)
    (runs / "link").symlink_to(folder.parent)
    with studio_process(folder) as studio:
        yield studio


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


def test_the_whole_server_is_behind_the_guard(running: RunningStudio) -> None:
    status, page, _ = get(running, "/")
    assert status == 200 and "nonce=" in page
    version = page.partition("/_nicegui/")[2].partition("/")[0]
    paths = [page.path for page in PAGES]
    paths += [
        f"/_nicegui/{version}/static/nicegui.js",
        "/_nicegui_ws/socket.io/?EIO=4&transport=polling",
        "/favicon.ico",
    ]
    for path in paths:
        assert get(running, path)[0] in (200, 400)
        assert get(running, path, Cookie="")[0] == 403
        assert get(running, path, Host="evil.example")[0] == 421
        assert get(running, path, Origin="http://evil.example")[0] == 403
        _, _, answer = get(running, path)
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]
    for path in ("/docs", "/openapi.json", "/redoc"):
        assert "swagger" not in get(running, path)[1].lower()


def test_nothing_outside_is_reached_by_any_parameter(running: RunningStudio) -> None:
    values = ["../../secret.txt", "../secret.txt", str(running.folder.parent / "secret.txt"), "link", "..", "a\x00b"]
    for page in PAGES:
        for value in values:
            query = "&".join(f"{name}={quote(value)}" for name in ("run", "runs", "exam", "stage", "recipe", "file"))
            status, text, _ = get(running, f"{page.path}?{query}")
            assert status == 200 and SECRET not in text
    for value in values:
        assert SECRET not in get(running, f"/{quote(value)}")[1]
        assert SECRET not in get(running, f"/_nicegui/3/static/{quote(value, safe='')}")[1]


def test_nothing_is_written_where_the_studio_was_started(running: RunningStudio) -> None:
    assert sorted(path.name for path in running.folder.iterdir()) == ["runs"]


@pytest.mark.parametrize(("language", "width", "dark"), [("en", 1400, False), ("zh", 390, True)])
def test_runs_are_listed_searched_chosen_and_opened(
    running: RunningStudio, browser_page: Callable[..., Any], language: str, width: int, dark: bool
) -> None:
    page = browser_page(running, width=width, language=language, dark=dark)
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


def test_a_curve_grows_while_the_page_is_open(running: RunningStudio, browser_page: Callable[..., Any]) -> None:
    folder = running.folder / "runs" / "growing"
    train(folder, 5)
    write(folder / "pipeline.json", {"stages": {}})
    page = browser_page(running, f"/run?run={key(running, 'growing')}")
    page.get_by_text("4", exact=True).wait_for()
    with (folder / "sft" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "epoch": 0.1, "loss": 0.123456, "elapsed_seconds": 5}) + "\n")
    page.get_by_text("0.1235").wait_for()
    page.get_by_text("5", exact=True).wait_for()
    shutil.rmtree(folder)
    page.get_by_text("no such run here").wait_for()


def test_a_failed_run_says_why(running: RunningStudio, browser_page: Callable[..., Any]) -> None:
    page = browser_page(running, f"/run?run={key(running, 'bad')}")
    assert "rows.jsonl:3: no answer" in page.get_by_role("alert").inner_text()


def test_markup_in_names_recipes_warnings_and_logs_stays_text(
    running: RunningStudio, browser_page: Callable[..., Any]
) -> None:
    page = browser_page(running)
    page.get_by_role("link", name=MARKUP).wait_for()
    page.goto(f"{running.base}/run?run={key(running, MARKUP)}")
    page.locator(".z-log").wait_for()
    assert page.get_by_text(MARKUP).count() >= 4  # name and model, reason, warning, log
    for each in PAGES:
        page.goto(f"{running.base}{each.path}?run={key(running, MARKUP)}&runs={key(running, MARKUP)}")
        page.wait_for_selector(".z-brand")
    assert page.evaluate("window.hacked") is None


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


def test_another_site_in_the_same_browser_reaches_nothing(running: RunningStudio, chromium: Any) -> None:
    """It is even same-site: another port of 127.0.0.1, so its requests carry the cookie."""
    version = get(running, "/")[1].partition("/_nicegui/")[2].partition("/")[0]
    with socketserver.TCPServer(("127.0.0.1", 0), _Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        context = chromium.new_context()
        page = context.new_page()
        page.goto(running.address)
        page.wait_for_url(f"{running.base}/")
        page.goto(f"http://127.0.0.1:{server.server_address[1]}/")
        outcome = page.evaluate(_ATTACKS.replace("VERSION", version), running.base)
        assert outcome == dict.fromkeys(("read", "post", "script", "socket", "frame"), "refused")
        page.evaluate(
            "base => { document.body.innerHTML = `<form method=post action='${base}/'></form>`;"
            " document.forms[0].submit(); }",
            running.base,
        )
        page.wait_for_url(f"{running.base}/")
        assert page.locator("body").inner_text().strip() == "refused"
        context.close()
        server.shutdown()


def test_two_studios_run_side_by_side_each_with_its_own_token(
    running: RunningStudio, studio_at: Callable[..., RunningStudio], tmp_path: Path
) -> None:
    second = studio_at(tmp_path)
    assert second.port != running.port and second.token != running.token
    assert get(second, "/", Cookie=f"mlx-zh-studio-{second.port}={running.token}")[0] == 403
    assert get(second, "/")[0] == get(running, "/")[0] == 200
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
