"""Who may reach the studio: every request is checked here before NiceGUI sees it.

The page can read runs and start training, so another site's page in the same browser must not reach it. That page
could send requests here, or make its own name lead to 127.0.0.1 (DNS rebinding). What is checked therefore: the Host
is this machine's own name with our port; the Origin of whatever changes something, and of each WebSocket, is ours; a
cookie shows that the browser once had the secret token.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextvars import ContextVar
from hmac import compare_digest
from http.cookies import CookieError, SimpleCookie
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, urlencode

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Asking(NamedTuple):
    """What a browser says of itself with a request."""

    cookies: Mapping[str, str]
    languages: str  # its header Accept-Language


ASKING: ContextVar[Asking] = ContextVar("asking")  # for the request that is answered
NONCE = "mlx_zh_nonce"  # the scope's key for the nonce of a page's scripts
_NAMES = ("127.0.0.1", "localhost", "[::1]")
_SAFE = ("GET", "HEAD")
_REFUSED_HEADERS = (b"access-control-", b"server", b"x-powered-by")
_IMMUTABLE = "/_nicegui/"  # NiceGUI's own scripts, whose addresses hold their version

# What NiceGUI needs beyond 'self': Vue compiles templates in the browser and NiceGUI evaluates what the server sends
# (unsafe-eval); elements carry style attributes (unsafe-inline for styles). Inline scripts need the page's nonce.
_POLICY = (
    "default-src 'none'; script-src 'self' 'nonce-{nonce}' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' {sockets}; media-src 'none'; "
    "object-src 'none'; frame-src 'none'; worker-src 'none'; manifest-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


class Guard:
    """The outermost ASGI application: checks a request, passes it on, and adds headers to the answer.

    `token` is the secret of this studio; `port` the one that it listens on; `denied` makes the page that says how to
    get in.
    """

    def __init__(self, app: App, token: str, port: int, denied: Callable[[Asking], str]) -> None:
        self.app = app
        self.token = token
        self.cookie = f"mlx-zh-studio-{port}"  # browsers send cookies to every port of a host
        self.hosts = {f"{name}:{port}" for name in _NAMES} | (set(_NAMES) if port == 80 else set())
        self.origins = {f"http://{host}" for host in self.hosts}
        self._denied = denied

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request or WebSocket."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = _headers(scope)
        cookies = _cookies(headers.get("cookie", ""))
        if scope["type"] not in ("http", "websocket"):
            return
        if (status := self._refusal(scope, headers)) is not None:
            await _refuse(scope, receive, send, status)
            return
        given = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1"))).get("token")
        if scope["type"] == "http" and scope["method"] == "GET" and given is not None and self._is_token(given):
            await self._admit(scope, send)
            return
        if not self._is_token(cookies.get(self.cookie, "")):
            await self._deny(scope, receive, send, cookies, headers)
            return
        scope["headers"] = [(name, value) for name, value in scope["headers"] if not name.startswith(b"x-forwarded-")]
        nonce = scope[NONCE] = secrets.token_urlsafe(16)
        reset = ASKING.set(Asking(cookies, headers.get("accept-language", "")))
        try:
            await self.app(scope, receive, self._with_headers(scope, send, nonce))
        finally:
            ASKING.reset(reset)

    def _is_token(self, text: str) -> bool:
        return compare_digest(text.encode(), self.token.encode())

    def _refusal(self, scope: Scope, headers: Mapping[str, str]) -> int | None:
        """The status for a request that is refused whoever sends it; None for one that may go on."""
        if headers.get("host", "").lower() not in self.hosts:
            return 421  # Misdirected Request
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in self.origins:
            return 403
        changes = scope["type"] == "websocket" or scope["method"] not in _SAFE
        if changes and (origin is None or origin.lower() != f"http://{headers['host'].lower()}"):
            return 403
        site = headers.get("sec-fetch-site", "none")  # old browsers do not send it
        opens = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
        if site not in ("none", "same-origin") and (changes or not opens):
            return 403
        return None

    async def _admit(self, scope: Scope, send: Send) -> None:
        """Exchange the token for a cookie and go to the same page without it.

        A page of our own does so, not a redirect: a browser that followed a link from elsewhere would not send a
        SameSite=Strict cookie with a redirect.
        """
        rest = urlencode([(k, v) for k, v in parse_qsl(scope["query_string"].decode("latin-1")) if k != "token"])
        path = "/" + quote(scope["path"].lstrip("/\\"))  # never `//`, which would name another host
        target = f"{path}?{rest}".rstrip("?").replace("&", "&amp;")
        cookie = f"{self.cookie}={self.token}; HttpOnly; SameSite=Strict; Path=/"
        body = f'<!doctype html><meta http-equiv="refresh" content="0;url={target}"><title>mlx-zh</title>'
        extra = [("set-cookie", cookie), ("content-type", "text/html; charset=utf-8")]
        await _answer(send, 200, body, [*extra, *self._headers("")])

    async def _deny(
        self, scope: Scope, receive: Receive, send: Send, cookies: Mapping[str, str], headers: Mapping[str, str]
    ) -> None:
        if scope["type"] == "websocket":
            await _refuse(scope, receive, send, 403)
            return
        body = self._denied(Asking(cookies, headers.get("accept-language", "")))
        await _answer(send, 403, body, [("content-type", "text/html; charset=utf-8"), *self._headers("")])

    def _with_headers(self, scope: Scope, send: Send, nonce: str) -> Send:
        ours = self._headers(nonce)
        immutable = str(scope["path"]).startswith(_IMMUTABLE) and "/dynamic_resources/" not in scope["path"]

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [
                    (name, value)
                    for name, value in message.get("headers", [])
                    if not name.lower().startswith(_REFUSED_HEADERS)
                ]
                if not (immutable and message["status"] == 200):
                    kept = [(name, value) for name, value in kept if name.lower() != b"cache-control"]
                    kept.append((b"cache-control", b"no-store"))
                names = {name.lower() for name, _ in kept}
                added = [(n.encode(), v.encode()) for n, v in ours if n.encode() not in names]
                message = {**message, "headers": kept + added}
            await send(message)

        return sent

    def _headers(self, nonce: str) -> list[tuple[str, str]]:
        # Older Safari does not take 'self' for WebSockets; a policy cannot name an IPv6 address.
        sockets = " ".join(sorted(f"ws://{host}" for host in self.hosts if "[" not in host))
        return [
            ("content-security-policy", _POLICY.format(nonce=nonce or secrets.token_urlsafe(16), sockets=sockets)),
            ("x-frame-options", "DENY"),
            ("x-content-type-options", "nosniff"),
            ("referrer-policy", "no-referrer"),
            ("cross-origin-opener-policy", "same-origin"),
            ("cross-origin-resource-policy", "same-origin"),
            ("permissions-policy", "camera=(), microphone=(), geolocation=()"),
            ("cache-control", "no-store"),
        ]


def new_token() -> str:
    """A secret of 192 bits that fits in an address."""
    return secrets.token_urlsafe(24)


def _headers(scope: Scope) -> dict[str, str]:
    """A request's headers; one that was sent twice is empty where it decides something, so that it is refused."""
    headers: dict[str, str] = {}
    for raw, value in scope.get("headers", []):
        name = raw.decode("latin-1").lower()
        twice = name in headers and name in ("host", "origin")
        headers[name] = "" if twice else value.decode("latin-1")
    return headers


def _cookies(header: str) -> dict[str, str]:
    try:
        return {name: morsel.value for name, morsel in SimpleCookie(header).items()}
    except CookieError:
        return {}


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int) -> None:
    if scope["type"] == "websocket":
        await receive()  # "websocket.connect"; a close before it is accepted answers the handshake with 403
        await send({"type": "websocket.close", "code": 1008})
        return
    await _answer(send, status, "refused\n", [("content-type", "text/plain"), ("cache-control", "no-store")])


async def _answer(send: Send, status: int, body: str, headers: list[tuple[str, str]]) -> None:
    data = body.encode()
    pairs = [(name.encode(), value.encode()) for name, value in [*headers, ("content-length", str(len(data)))]]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": data})
