"""Questions to a model behind an OpenAI-compatible address, and where the key goes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from mlx_zh.errors import JudgeError, RefusedByJudge
from mlx_zh.system import chat_api
from mlx_zh.system.chat_api import KEY_VARIABLE, ChatApi

KEY = "sk-only-for-the-judge-0123456789"
MESSAGES = [{"role": "user", "content": "哪个更好？"}]
SAID = {"choices": [{"message": {"role": "assistant", "content": "判定：1"}}]}


class Server:
    """Gives the responses of `plan`, (status, headers, body), one after another, and the last one from then on."""

    def __init__(self) -> None:
        self.plan: list[tuple[int, dict[str, str], bytes]] = [(200, {}, json.dumps(SAID).encode())]
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, dict(self.headers), body))
                status, headers, content = outer.plan.pop(0) if len(outer.plan) > 1 else outer.plan[0]
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def fails(self, status: int, said: str = "", **headers: str) -> None:
        self.plan.insert(0, (status, {name.replace("_", "-"): text for name, text in headers.items()}, said.encode()))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


def _api(url: str) -> ChatApi:
    return ChatApi(url, "judge-model", pause=0.0)


def test_the_question_and_the_answer(server: Server):
    assert _api(server.url).ask(MESSAGES) == "判定：1"
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert "Authorization" not in headers
    assert body == {"model": "judge-model", "messages": MESSAGES, "temperature": 0, "max_tokens": 1024}


def test_an_address_may_name_the_whole_path(server: Server):
    _api(f"{server.url}/chat/completions").ask(MESSAGES)
    assert server.requests[0][0] == "/v1/chat/completions"


def test_the_key_is_sent_as_a_header_and_stands_nowhere_else(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    api = _api(server.url)
    server.fails(401, f"the key {KEY} is not valid")
    with pytest.raises(JudgeError) as error:
        api.ask(MESSAGES)
    assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in str(error.value) and KEY not in repr(api) and KEY not in api.name
    assert KEY_VARIABLE in str(error.value)


def test_no_other_key_of_the_environment_is_sent(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    _api(server.url).ask(MESSAGES)
    assert "Authorization" not in server.requests[0][1]


def test_a_key_does_not_travel_in_clear(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with pytest.raises(JudgeError, match="over http"):
        _api("http://judge.example/v1")
    _api("https://judge.example/v1")
    _api("http://localhost:11434/v1")


@pytest.mark.parametrize("url", ["", "judge.example/v1", "ftp://judge.example", "https://", "http:///v1"])
def test_an_address_that_is_none_is_refused(url: str):
    with pytest.raises(JudgeError, match="no address of a judge"):
        _api(url)


def test_a_password_in_the_address_is_refused_and_not_shown():
    with pytest.raises(JudgeError, match="user name or password") as error:
        _api(f"https://me:{KEY}@judge.example/v1")
    assert KEY not in str(error.value)


def test_a_redirection_is_not_followed(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    server.fails(307, Location=f"{server.url}/elsewhere")
    with pytest.raises(JudgeError, match="another address"):
        _api(server.url).ask(MESSAGES)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(server: Server, status: int):
    server.fails(status, Retry_After="0")
    server.fails(status)
    assert _api(server.url).ask(MESSAGES) == "判定：1"
    assert len(server.requests) == 3


def test_what_lasts_ends_after_four_tries(server: Server):
    server.plan = [(503, {}, b"")]
    with pytest.raises(JudgeError, match="overloaded"):
        _api(server.url).ask(MESSAGES)
    assert len(server.requests) == 4


def test_nobody_waits_for_an_hour(server: Server):
    server.plan = [(429, {"Retry-After": "3600"}, b"")]
    with pytest.raises(JudgeError, match="too many requests"):
        _api(server.url).ask(MESSAGES)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 413, 422, 451])
def test_a_question_may_be_refused(server: Server, status: int):
    server.plan = [(status, {}, '{"error": "内容不当"}'.encode())]
    with pytest.raises(RefusedByJudge, match="内容不当"):
        _api(server.url).ask(MESSAGES)
    assert len(server.requests) == 1


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"choices": []}', b'{"choices": [{}]}', b"[" * 5000])
def test_a_response_of_another_form_is_an_error(server: Server, body: bytes):
    server.plan = [(200, {}, body)]
    with pytest.raises(JudgeError, match="OpenAI-compatible"):
        _api(server.url).ask(MESSAGES)


def test_a_reply_without_text_is_empty(server: Server):
    server.plan = [(200, {}, b'{"choices": [{"message": {"content": null}}]}')]
    assert _api(server.url).ask(MESSAGES) == ""


def test_a_response_without_end_is_cut(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chat_api, "_LARGEST", 1 << 20)
    server.plan = [(200, {}, b"x" * (1 << 21))]
    with pytest.raises(JudgeError, match="more than 1 MB"):
        _api(server.url).ask(MESSAGES)


def test_nobody_there_is_one_paragraph(server: Server):
    server.http.server_close()
    with pytest.raises(JudgeError, match="does not answer"):
        _api(server.url).ask(MESSAGES)
