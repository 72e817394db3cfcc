"""The guard in front of the studio: which requests it lets through, and what it adds to the answers."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_zh.studio.safety import Guard, new_token

PORT = 8765
TOKEN = "3t1gZDa5F7SxUA4sxgI-gsBM2vzzzGrg"  # not a new one: test processes must agree on the names of tests
COOKIE = f"mlx-zh-studio-{PORT}={TOKEN}"
HERE = f"127.0.0.1:{PORT}"
OURS = {"host": HERE, "cookie": COOKIE, "origin": f"http://{HERE}"}


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Stands for NiceGUI: answers everything, and with headers that must not get out."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    headers = [(b"access-control-allow-origin", b"*"), (b"server", b"x"), (b"cache-control", b"public")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"inside"})


GUARD = Guard(application, TOKEN, PORT, lambda asking: "how to get in")


def finish(work: Coroutine[Any, Any, None]) -> None:
    """Run what never waits, without an event loop: Playwright has one in this thread."""
    with pytest.raises(StopIteration):
        work.send(None)


def ask(
    method: str = "GET",
    path: str = "/",
    query: str = "",
    *,
    kind: str = "http",
    repeated: tuple[tuple[str, str], ...] = (),
    **headers: str,
) -> tuple[int, dict[str, str], str]:
    """Status, headers and body of the answer; of a WebSocket 101 or 403."""
    pairs = [(name.replace("_", "-"), value) for name, value in headers.items()]
    scope = {
        "type": kind,
        "method": method,
        "path": path,
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in (*pairs, *repeated)],
    }
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": f"{kind}.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    finish(GUARD(scope, receive, send))
    if kind == "websocket":
        return (101 if sent[0]["type"] == "websocket.accept" else 403), {}, ""
    names = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], names, b"".join(message.get("body", b"") for message in sent[1:]).decode()


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "[::1]", "LOCALHOST"])
def test_this_machine_s_own_names_are_let_in_with_the_cookie(name: str) -> None:
    assert ask(host=f"{name}:{PORT}", cookie=COOKIE)[::2] == (200, "inside")


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        f"evil.example:{PORT}",
        f"127.0.0.1.evil.example:{PORT}",
        f"localhost.:{PORT}",
        f"0.0.0.0:{PORT}",
        f"127.0.0.2:{PORT}",
        "127.0.0.1",
        f"127.0.0.1:{PORT + 1}",
        f"user@127.0.0.1:{PORT}",
        f"127.0.0.1:{PORT}, evil.example",
        "",
    ],
)
def test_another_host_is_refused_even_with_the_cookie(host: str) -> None:
    """A page whose name was made to lead to 127.0.0.1 still sends its own name."""
    for more in ({}, {"x_forwarded_host": HERE}):
        status, headers, body = ask(host=host, cookie=COOKIE, **more)
        assert (status, body) == (421, "refused\n")
        assert not any(name.startswith("access-control") for name in headers)
    assert ask(kind="websocket", host=host, cookie=COOKIE, origin=f"http://{host}")[0] == 403


def test_a_request_with_two_hosts_or_two_origins_is_refused() -> None:
    assert ask(**OURS, repeated=(("host", HERE),))[0] == 421
    assert ask("POST", **OURS, repeated=(("origin", f"http://{HERE}"),))[0] == 403


ELSEWHERE = ["http://evil.example", "null", "", f"https://{HERE}", f"http://127.0.0.1:{PORT + 1}", "file://"]


@pytest.mark.parametrize("origin", ELSEWHERE)
def test_another_origin_can_neither_change_anything_nor_open_a_websocket(origin: str) -> None:
    headers = {"host": HERE, "cookie": COOKIE, "origin": origin}
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        assert ask(method, "/_nicegui/client/x/upload/1", **headers)[0] == 403
    assert ask("GET", "/_nicegui_ws/socket.io/", "transport=polling", **headers)[0] == 403
    assert ask(kind="websocket", path="/_nicegui_ws/socket.io/", **headers)[0] == 403


def test_without_an_origin_nothing_is_changed_either() -> None:
    headers = {"host": HERE, "cookie": COOKIE}
    assert ask("POST", **headers)[0] == 403
    assert ask(kind="websocket", **headers)[0] == 403
    assert ask("GET", **headers)[0] == 200


def test_the_origin_must_be_the_host_that_was_asked() -> None:
    """`localhost` and `127.0.0.1` are two origins to a browser."""
    assert ask("POST", **{**OURS, "origin": f"http://localhost:{PORT}"})[0] == 403
    assert ask("POST", **OURS)[0] == 200
    assert ask(kind="websocket", **OURS)[0] == 101


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_another_site_may_link_to_a_page_and_not_load_parts_of_it(site: str) -> None:
    """Another port of this machine is `same-site`, so its pages' requests carry the cookie."""
    headers = {"host": HERE, "cookie": COOKIE, "sec_fetch_site": site}
    assert ask(**headers, sec_fetch_mode="no-cors", sec_fetch_dest="script")[0] == 403
    assert ask(**headers, sec_fetch_mode="navigate", sec_fetch_dest="iframe")[0] == 403
    assert ask(**headers, sec_fetch_mode="navigate", sec_fetch_dest="document")[0] == 200


@pytest.mark.parametrize("cookie", ["", "mlx-zh-studio-8765=", f"mlx-zh-studio-8766={TOKEN}", f"{COOKIE}x", "=;=,"])
def test_without_the_cookie_a_page_says_how_to_get_in(cookie: str) -> None:
    for path in ("/", "/_nicegui/3/static/nicegui.js", "/_nicegui_ws/socket.io/", "/_nicegui/client/1/upload/1"):
        status, _, body = ask(path=path, host=HERE, cookie=cookie)
        assert (status, body) == (403, "how to get in")
    assert ask(kind="websocket", **{**OURS, "cookie": cookie})[0] == 403
    assert ask("POST", **{**OURS, "cookie": cookie})[0] == 403


def test_the_token_becomes_a_cookie_and_leaves_the_address() -> None:
    status, headers, body = ask(path="/run", query=f"run=a%26b&token={TOKEN}", host=HERE)
    assert status == 200
    assert headers["set-cookie"] == f"{COOKIE}; HttpOnly; SameSite=Strict; Path=/"
    assert 'url=/run?run=a%26b"' in body and TOKEN not in body
    assert headers["referrer-policy"] == "no-referrer" and headers["cache-control"] == "no-store"


def test_tokens_are_long_and_new() -> None:
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100 and all(len(token) == 32 for token in tokens)  # 32 characters of 6 bits


@pytest.mark.parametrize("token", ["", "x", f"{TOKEN[:-1]}", f"{TOKEN}=", TOKEN[::-1], "令牌"])
def test_a_wrong_or_stale_token_gives_no_cookie(token: str) -> None:
    status, headers, _ = ask(query=f"token={token}", host=HERE)
    assert status == 403 and "set-cookie" not in headers


def test_the_token_is_taken_only_from_a_get() -> None:
    assert "set-cookie" not in ask("POST", query=f"token={TOKEN}", host=HERE, origin=f"http://{HERE}")[1]
    assert ask(kind="websocket", query=f"token={TOKEN}", host=HERE, origin=f"http://{HERE}")[0] == 403


@given(st.text(max_size=30), st.text(max_size=30))
def test_the_way_to_the_page_without_the_token_stays_on_this_host(path: str, rest: str) -> None:
    from urllib.parse import quote

    _, headers, body = ask(path=f"/{path}", query=f"q={quote(rest)}&token={TOKEN}", host=HERE)
    target = body.partition("url=")[2].partition('"')[0]
    assert target.startswith("/") and not target.startswith(("//", "/\\"))
    assert body.count('"') == 4 and body.count("<") == 4  # nothing of the address became markup
    assert "\n" not in headers["set-cookie"]


def test_every_answer_has_the_headers() -> None:
    _, headers, _ = ask(**OURS)
    assert headers["x-frame-options"] == "DENY"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert not {"access-control-allow-origin", "server"} & headers.keys()
    policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
    assert (
        policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    )
    assert "'unsafe-inline'" not in policy["script-src"] and "http" not in policy["script-src"]


def test_the_nonce_of_scripts_is_new_in_each_answer() -> None:
    policies = {ask(**OURS)[1]["content-security-policy"] for _ in range(20)}
    assert len(policies) == 20


def test_nicegui_s_own_files_may_be_kept_by_the_browser() -> None:
    assert ask(path="/_nicegui/3/static/nicegui.js", **OURS)[1]["cache-control"] == "public"
    assert ask(path="/_nicegui/3/dynamic_resources/x", **OURS)[1]["cache-control"] == "no-store"


def test_what_a_proxy_would_say_is_not_believed() -> None:
    """NiceGUI puts X-Forwarded-Prefix into its page."""
    seen: list[bytes] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(name for name, _ in scope["headers"])
        await application(scope, receive, send)

    guard = Guard(inner, TOKEN, PORT, lambda asking: "")

    async def send(message: Any) -> None:
        pass

    headers = [(name.encode(), value.encode()) for name, value in OURS.items()] + [(b"x-forwarded-prefix", b"//evil")]
    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": headers}
    finish(guard(scope, send, send))
    assert b"host" in seen and b"x-forwarded-prefix" not in seen
