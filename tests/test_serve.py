"""`mlx-zh serve`: what other programs get at its address, and who may ask."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from project import Project

from mlx_zh import chat, serve
from mlx_zh.errors import ServerError
from mlx_zh.stages import served_models, serving
from mlx_zh.stages.command import recipe_or_model
from mlx_zh.stages.served_models import parsed_messages
from mlx_zh.stages.serving import RunningServer
from mlx_zh.stages.serving_address import Address

QUESTION = "第一个字？"
ASKED = [{"role": "user", "content": QUESTION}]


@contextmanager
def served(*arguments: str) -> Iterator[RunningServer]:
    """A server of the recipe in the current folder, at a free port."""
    parsed = serve._arguments(["recipe.yaml", "--port", "0", *arguments])
    with serve._open(parsed, recipe_or_model(parsed.target, parsed.overrides)) as running:
        thread = threading.Thread(target=running.run)
        thread.start()
        try:
            yield running
        finally:
            running.stop()
            thread.join()


def ask(running: RunningServer, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """The status and the answer to a request; with a body it is a POST."""
    connection = http.client.HTTPConnection("127.0.0.1", running.address.port, timeout=60)
    data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET" if data is None else "POST", path, data, names)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    try:
        return response.status, json.loads(text)
    except ValueError:
        return response.status, text


def shown(text: str) -> str:
    """A text without white space and half characters at its ends: mlx-lm's server shows half characters."""
    return text.strip().rstrip("\ufffd").strip()


def said(running: RunningServer, **body: Any) -> str:
    """The greedy answer to a chat."""
    status, answer = ask(
        running, "/v1/chat/completions", {"messages": ASKED, "temperature": 0, "max_tokens": 8} | body
    )
    assert status == 200, answer
    return shown(str(answer["choices"][0]["message"]["content"]))


def test_each_stage_of_a_run_answers_as_in_the_chat(project: Project) -> None:
    project.recipe["data"]["system"] = "你很简短。"
    project.write_recipe()
    project.train()
    expected = {}
    for stage, adapter in (("base", "none"), ("sft", "sft")):
        options = ("--adapter", adapter, "--prompt", QUESTION, "--temp", "0", "--max-tokens", "8")
        result = project.run(chat.main, *options)
        assert result.status == 0
        expected[stage] = shown(result.out)
    assert expected["base"] != expected["sft"]
    with served() as running:
        _, models = ask(running, "/v1/models")
        assert [model["id"] for model in models["data"]] == ["tiny-sft", "tiny-base"]
        assert said(running) == expected["sft"]
        assert said(running, model="tiny-base") == expected["base"]
        assert said(running, model="tiny-sft") == expected["sft"]  # no keys of the base are left in a cache
        other = [{"role": "system", "content": "说英语。"}, *ASKED]
        assert said(running, messages=other) != "" and said(running, messages=ASKED) == expected["sft"]
        _, streamed = ask(
            running,
            "/v1/chat/completions",
            {"messages": ASKED, "temperature": 0, "max_tokens": 8, "stream": True},
        )
        events = [line[6:] for line in streamed.splitlines() if line.startswith("data: ")]
        assert events.pop() == "[DONE]"
        pieces = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events]
        assert shown("".join(pieces)) == expected["sft"]


def test_what_cannot_be_answered_is_said(project: Project) -> None:
    with served() as running:

        def refused(body: Any) -> str:
            status, answer = ask(running, "/v1/chat/completions", body)
            assert 400 <= status < 500, answer
            return str(answer["error"])

        assert "choose from tiny" in refused({"model": "gpt-4", "messages": ASKED})
        assert "reads no files" in refused({"adapters": "/etc", "messages": ASKED})
        assert "reads no files" in refused({"draft_model": "org/other", "messages": ASKED})
        image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}]}]
        assert "must be text" in refused({"messages": image})
        assert "must be the user's" in refused({"messages": [*ASKED, {"role": "assistant", "content": "好"}]})
        assert "enable_thinking" in refused({"messages": ASKED, "chat_template_kwargs": {"x": 1}})
        assert "tokens" in refused({"messages": [{"role": "user", "content": "长" * 40_000}]})
        assert refused({})
        for body in (b"{", b"[]", b"\xff\xfe", b"[" * 100_000):
            try:
                status, _ = ask(running, "/v1/chat/completions", body)
            except (http.client.HTTPException, ConnectionError):
                continue  # mlx-lm's server hangs up on what is not text
            assert status == 400
        assert ask(running, "/etc/passwd")[0] == 404
        assert said(running) is not None  # it still answers


VOCABULARY = 10**6  # tokens, more than the tiny model has

# Settings with which mlx-lm's computation fails, or writes outside its arrays.
IMPOSSIBLE: list[dict[str, Any]] = [
    *({"logit_bias": {str(token): 5}} for token in (VOCABULARY, -VOCABULARY)),
    *({"logit_bias": {"1": value}} for value in (None, float("nan"), "x")),
    *({"stop": stop} for stop in ([1], [""], {"a": 1}, 5, ["a"] * 999, [["a"]])),
    *({"seed": seed} for seed in (2**70, -1)),
    *({name: float("nan")} for name in ("temperature", "top_p", "min_p", "frequency_penalty")),
    *({name: 10**12} for name in ("top_k", "max_tokens", "repetition_context_size")),
    *({"xtc_probability": 1, "xtc_threshold": 0.9}, {"n": 2}, {"stream": True, "stream_options": "x"}),
    *(
        {"response_format": kind}
        for kind in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {}}, "x")
    ),
    *({"chat_template_kwargs": kwargs} for kwargs in ([1], {"enable_thinking": "yes"})),
]


def test_no_request_ends_the_server(project: Project) -> None:
    with served() as running:
        expected = said(running)
        for body in IMPOSSIBLE:
            status, answer = ask(running, "/v1/chat/completions", {"messages": ASKED, "max_tokens": 2} | body)
            assert status == 400 and answer["error"]["message"], body
        for prompt in (["a", "b"], [1, 2], "", None, "a" * 100_000):
            status, answer = ask(running, "/v1/completions", {"prompt": prompt, "max_tokens": 2})
            assert status == 400 and answer["error"]["message"], prompt
        names = ("temperature", "top_p", "max_tokens", "stop", "seed", "logit_bias", "stream", "top_k", "n", "tools")
        assert said(running, **(dict.fromkeys(names) | {"temperature": 0, "max_tokens": 8})) == expected
        assert said(running, top_k=VOCABULARY, xtc_probability=0) == expected
        assert said(running) == expected


def test_a_computation_that_fails_is_told_and_others_are_answered(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error while a sampler is compiled leaves mlx's random state unusable: a new one is set."""
    with served() as running:
        expected = said(running)
        monkeypatch.setattr(serving, "check_settings", lambda *_: None)
        status, answer = ask(
            running, "/v1/chat/completions", {"messages": ASKED, "xtc_probability": 1.0, "xtc_threshold": 0.9}
        )
        assert 400 <= status < 500 and "could not be computed" in answer["error"]["message"]
        assert said(running) == expected
        assert said(running, temperature=1.0) is not None


def test_a_model_by_its_name(project: Project) -> None:
    with served() as running:
        name = ask(running, "/v1/models")[1]["data"][0]["id"]
        assert ask(running, f"/v1/models/{name}")[1]["object"] == "model"
        status, answer = ask(running, "/v1/models/gpt-4")
        assert status == 404 and name in answer["error"]["message"]


def test_a_body_without_an_end_is_not_read(project: Project) -> None:
    with served() as running:
        for length in ("-1", "x", "９"):
            headers = {"Content_Length": length.encode("utf-8").decode("latin-1")}
            assert ask(running, "/v1/chat/completions", b"{}", **headers)[0] == 400


def test_a_client_that_hangs_up_leaves_no_traceback(project: Project) -> None:
    body = json.dumps({"messages": ASKED, "max_tokens": 300, "stream": True}).encode()
    with served() as running:
        for _ in range(4):
            with socket.create_connection(("127.0.0.1", running.address.port)) as client:
                client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
                client.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
                client.recv(20)
        assert said(running) is not None
    assert "Traceback" not in project.capsys.readouterr().err


def test_only_this_machine_and_its_programs_may_ask(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(serve.KEY_VARIABLE, "secret")
    with served("--allowed-origins", "https://chat.example.com/") as running:
        key = "Bearer secret"
        assert ask(running, "/v1/models", Authorization=key)[0] == 200
        assert ask(running, "/v1/models")[0] == 401
        assert ask(running, "/v1/models", Authorization="Bearer secre")[0] == 401
        assert ask(running, "/v1/chat/completions", {"messages": ASKED})[0] == 401
        for host in ("evil.example", "127.0.0.1.evil.example", "169.254.1.1", ""):
            assert ask(running, "/v1/models", Host=host, Authorization=key)[0] == 403, host
        for host in ("localhost:8080", "host.docker.internal:8080", "[::1]:9", "127.0.0.1"):
            assert ask(running, "/v1/models", Host=host, Authorization=key)[0] == 200, host
        for origin in ("https://evil.example", "null", "http://localhost.evil.example", "https://chat.example.com.x"):
            assert ask(running, "/v1/models", Origin=origin, Authorization=key)[0] == 403, origin
        for origin in ("https://chat.example.com", "http://localhost:3000", "app://-", "file://"):
            assert ask(running, "/v1/models", Origin=origin, Authorization=key)[0] == 200, origin


@given(st.text(max_size=40))
def test_no_other_origin_or_host_is_admitted(name: str) -> None:
    address = Address()
    assert not address.admits(f"https://{name}.example.com")
    assert address.refusal({"Host": f"{name}.example.com"}) is not None


def test_an_address_that_is_not_local_answers_to_any_name() -> None:
    assert Address("0.0.0.0").refusal({"Host": "my-mac.local:8080"}) is None
    assert Address("127.0.0.1").refusal({"Host": "my-mac.local:8080"}) is not None


def test_messages_become_those_of_training() -> None:
    tool = {"type": "function", "function": {"name": "time", "parameters": {}}}
    parsed = parsed_messages(ASKED, [tool], "简短。")
    assert [message.role for message in parsed] == ["tools", "system", "user"]
    assert parsed_messages([{"role": "developer", "content": "甲"}, *ASKED], None, "乙")[0].content == "甲"
    with pytest.raises(ServerError):
        parsed_messages("你好")


def test_a_taken_port_is_an_error_with_a_remedy(project: Project) -> None:
    with served() as running:
        result = project.run(serve.main, "--port", str(running.address.port))
    assert result.status == 2 and "--port" in result.err


def test_a_stage_that_is_not_there(project: Project) -> None:
    result = project.run(serve.main, "--stage", "sft")
    assert result.status == 2 and "mlx-zh sft" in result.err
    result = project.run(serve.main, "--stage", "fused")
    assert result.status == 2 and "mlx-zh fuse" in result.err


def test_a_server_that_others_reach_without_a_key_warns(project: Project) -> None:
    command = [sys.executable, "-u", "-m", "mlx_zh.serve", "recipe.yaml", "--port", "0", "--host", "0.0.0.0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("Ctrl-C"):
                break
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0 and errors == ""
    assert serve.KEY_VARIABLE in "".join(lines) and any("curl http://0.0.0.0:" in line for line in lines)


def test_limits_of_the_server_follow_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_models.device, "free_bytes", lambda: 3 << 30)

    class Bot:
        sampling = served_models.Chatbot.__dataclass_fields__["sampling"].default_factory()  # type: ignore[misc]

    assert served_models.server_settings(Bot()).prompt_cache_bytes == 1 << 30  # type: ignore[arg-type]
