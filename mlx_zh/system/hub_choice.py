"""Which hub `hub: auto` uses: Hugging Face (or the mirror in HF_ENDPOINT) if it answers, else ModelScope.

The answer holds for the process. Nothing is asked before something must be downloaded.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from urllib.parse import urlsplit

from mlx_zh.errors import DownloadError
from mlx_zh.language.notice import Notice
from mlx_zh.system import downloads, modelscope
from mlx_zh.system.downloads import host

TITLES = {"huggingface": "Hugging Face", "modelscope": "ModelScope"}  # in the order in which they are preferred

_listeners: list[Callable[[str], None]] = []


def announce_with(show: Callable[[str], None]) -> None:
    """Let `show` print the line that says which hub is used."""
    _listeners[:] = [show]


@dataclass(frozen=True, slots=True)
class Answers:
    """The chosen hub (None if none answered), and why each hub that did not answer failed, by name."""

    hub: str | None
    failed: dict[str, str]


def addresses() -> dict[str, str]:
    """The address of each hub."""
    from mlx_zh.system.huggingface import endpoint

    return {"huggingface": endpoint(), "modelscope": modelscope.endpoint()}


@cache
def answers() -> Answers:
    """Ask the hubs, once per process and for `downloads.LIMITS.choose` seconds at most.

    ModelScope is asked only if Hugging Face does not answer at once. If it answers first, Hugging Face gets a little
    more time.
    """
    limits, start = downloads.LIMITS, time.monotonic()
    results: queue.Queue[tuple[str, str | None]] = queue.Queue()
    heard: dict[str, str | None] = {}  # None: the hub answered

    def ask(name: str) -> None:
        address = addresses()[name]
        threading.Thread(target=lambda: results.put((name, unreachable(address, limits.choose))), daemon=True).start()

    def listen(end: float, done: Callable[[], bool]) -> None:
        while not done() and (left := end - time.monotonic()) > 0:
            with suppress(queue.Empty):
                heard.update([results.get(timeout=left)])

    first, second = TITLES
    ask(first)
    listen(start + limits.head_start, lambda: first in heard)
    if heard.get(first, "silent"):
        ask(second)
        listen(start + limits.choose, lambda: None in heard.values() or len(heard) == len(TITLES))
        listen(min(start + limits.choose, time.monotonic() + limits.head_start), lambda: first in heard)
    silent = f"no answer within {limits.choose:g} s"
    chosen = next((name for name in TITLES if heard.get(name, silent) is None), None)
    failed = {name: heard.get(name, silent) or "" for name in TITLES if heard.get(name, silent)}
    return Answers(chosen, {} if chosen == first else failed)


def chosen(label: str) -> str:
    """The hub to download `label` from; says so once. Raises DownloadError if none answers."""
    result = answers()
    if result.hub is None:
        tried = "; ".join(f"{TITLES[name]} ({host(addresses()[name])}): {why}" for name, why in result.failed.items())
        raise DownloadError(
            f"{label} could not be downloaded: no hub answers. Tried: {tried}. Check the network; set HF_ENDPOINT to "
            "a mirror that you can reach, or HTTPS_PROXY to your proxy; or give the path of a folder that you "
            "downloaded another way."
        )
    _say(result.hub, bool(result.failed))
    return result.hub


@cache
def _say(hub: str, other_failed: bool) -> None:
    address, other = host(addresses()[hub]), next(name for name in TITLES if name != hub)
    line = Notice("hub-used", hub=TITLES[hub], address=address)
    if other_failed:
        line = Notice("hub-fallback", hub=TITLES[hub], address=address, other=host(addresses()[other]))
    for show in _listeners:
        show(line)


def unreachable(address: str, seconds: float) -> str | None:
    """Why `address` gives no HTTP response within `seconds`; None if it gives any."""
    import urllib.error
    import urllib.request

    parts = urlsplit(address)
    if parts.scheme not in ("http", "https"):
        return "it is not an http(s) address"
    try:
        name = parts.netloc.rpartition("@")[2]  # urllib treats a user name and password as part of the host
        request = urllib.request.Request(f"{parts.scheme}://{name}{parts.path}", method="HEAD")
        with urllib.request.urlopen(request, timeout=seconds):
            return None
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return type(getattr(error, "reason", error)).__name__ if isinstance(error, OSError) else "an invalid address"
