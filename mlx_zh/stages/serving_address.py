"""Where the server listens, and who may ask it."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

# Who may ask from a page: this machine, and programs whose pages are their own files. A page on the web may not.
_OWN_PAGES = ("app", "file", "tauri", "vscode-webview", "vscode-file")
_THIS_MACHINE = ("localhost", "host.docker.internal")


@dataclass(frozen=True)
class Address:
    """Where the server listens, and who may ask: a key, and origins beside those of this machine."""

    host: str = "127.0.0.1"
    port: int = 8080
    key: str = ""
    origins: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        return _is_loopback(self.host)

    @property
    def url(self) -> str:
        """The address that clients are given."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}/v1"

    def refusal(self, headers: Mapping[str, str]) -> str | None:
        """Why a request with these headers is refused; None if it is not.

        A page of the web that makes its own name point to this machine is known by `Host`, any other by `Origin`.
        """
        host = _host_in(f"http://{headers.get('Host', '')}")[1]
        if self.is_local and host not in _THIS_MACHINE and not _is_loopback(host):
            return f"this server answers to the names of this machine only, not to {host[:80]!r}"
        origin = headers.get("Origin")
        if origin is not None and not self.admits(origin):
            return f"pages of {origin[:80]} may not ask this server; start it with --allowed-origins to change that"
        given = headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if self.key and not hmac.compare_digest(given.encode(), self.key.encode()):
            return "the key is missing or wrong; send it as `Authorization: Bearer KEY`"
        return None

    def admits(self, origin: str) -> bool:
        """Whether a page of this origin may ask."""
        if origin in self.origins or "*" in self.origins:
            return True
        scheme, host = _host_in(origin)
        return _is_loopback(host) if scheme in ("http", "https") else scheme in _OWN_PAGES


def _host_in(origin: str) -> tuple[str, str]:
    """The scheme and the host of an origin, which ends with them and a port; twice "" for any other text."""
    try:
        parts = urlsplit(origin)
        host = parts.hostname or ""
    except ValueError:
        return "", ""
    return (parts.scheme, host) if origin.endswith(f"//{parts.netloc}") and "@" not in parts.netloc else ("", "")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
