"""Questions to a model behind an OpenAI-compatible address, with time limits and retries.

The key comes from the environment variable `KEY_VARIABLE` alone, and is neither stored nor shown. It is sent over
https, or to this machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import local
from typing import Any
from urllib.parse import urlsplit

from mlx_zh.errors import JudgeError, RefusedByJudge
from mlx_zh.system.downloads import LIMITS, STATUS, host, reason_of
from mlx_zh.system.escaping import one_line
from mlx_zh.system.json_text import parse_json
from mlx_zh.system.redaction import cut, redact

KEY_VARIABLE = "MLX_ZH_JUDGE_KEY"
_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
_READ = 300.0  # seconds without a byte: a large model may think for minutes before it answers
_RETRIED = (408, 429, 500, 502, 503, 504)
_REFUSED = (400, 413, 422, 451)  # this question, because of its length or its content; others may be answered
_TRIES = 4
_LONGEST_PAUSE = 60.0  # seconds that a server may ask for
_LARGEST = 4 << 20  # bytes of a response
_EXCERPT = 200


@dataclass
class ChatApi:
    """A model at an address such as https://HOST/v1. Several threads may ask at once.

    Raises JudgeError for an address that cannot be used.
    """

    url: str
    model: str
    max_tokens: int = 1024
    pause: float = 1.0  # seconds before the second try; doubled before each further one
    _threads: local = field(default_factory=local, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise JudgeError(
                f"{host(self.url) or redact(self.url)} is no address of a judge. Write it as https://HOST/v1, or "
                "http://127.0.0.1:PORT/v1 for a server on this machine."
            )
        if "@" in parts.netloc:
            raise JudgeError(
                f"the address of the judge at {host(self.url)} holds a user name or password. Leave it out, and put "
                f"the key into the environment variable {KEY_VARIABLE}."
            )
        if self._key and parts.scheme == "http" and parts.hostname not in _THIS_MACHINE:
            raise JudgeError(
                f"{host(self.url)} would get the key in {KEY_VARIABLE} over http, where everybody on the way can "
                f"read it. Use https, or unset {KEY_VARIABLE} if this judge needs no key."
            )

    @property
    def name(self) -> str:
        """The model and the host, for messages and records."""
        return f"{self.model} ({host(self.url)})"

    @property
    def _key(self) -> str:
        return os.environ.get(KEY_VARIABLE, "").strip()

    def ask(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The model's answer, sampled at temperature 0.

        Raises JudgeError if none comes, and RefusedByJudge if the server refuses this question.
        """
        for attempt in range(1, _TRIES + 1):
            wait = self._pause(attempt)
            try:
                status, headers, body = self._post(messages)
            except _network_errors() as error:
                if attempt == _TRIES:
                    raise JudgeError(
                        f"the judge at {host(self.url)} does not answer: {reason_of(error, self.url)}. Check the "
                        "address and the network, then run the same command again; verdicts so far are kept."
                    ) from error
            else:
                if status == 200:
                    return self._content(body)
                wait = _asked_for(headers, wait)
                if status not in _RETRIED or attempt == _TRIES or wait > _LONGEST_PAUSE:
                    raise self._failure(status, body)
            time.sleep(wait)
        raise AssertionError

    def _pause(self, attempt: int) -> float:
        return self.pause * 2 ** (attempt - 1)

    def _post(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of the response. Raises the errors of httpx2."""
        values = {"model": self.model, "messages": list(messages), "temperature": 0, "max_tokens": self.max_tokens}
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        body = bytearray()
        with self._client().stream("POST", self._address(), json=values, headers=headers) as answer:
            for piece in answer.iter_bytes():
                body += piece
                if len(body) > _LARGEST:
                    raise JudgeError(f"the judge at {host(self.url)} sent more than {_LARGEST >> 20} MB at once.")
            return answer.status_code, answer.headers, bytes(body)

    def _client(self) -> Any:
        """This thread's HTTP client. It follows no redirection, which could carry the key elsewhere."""
        import httpx2

        if not hasattr(self._threads, "client"):
            limits = httpx2.Timeout(_READ, connect=LIMITS.connect)
            self._threads.client = httpx2.Client(follow_redirects=False, timeout=limits)
        return self._threads.client

    def _address(self) -> str:
        base = self.url.rstrip("/")
        return base if base.endswith("/chat/completions") else f"{base}/chat/completions"

    def _content(self, body: bytes) -> str:
        try:
            content = parse_json(body)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise JudgeError(
                f"{host(self.url)} answered, but not as an OpenAI-compatible server does: {_excerpt(body)}. Check "
                "the address; most end with /v1."
            ) from error
        return content if isinstance(content, str) else ""

    def _failure(self, status: int, body: bytes) -> JudgeError:
        said = f" It says: {text}" if (text := _excerpt(body)) else ""
        if status in _REFUSED:
            return RefusedByJudge(f"the judge at {host(self.url)} refuses a question (status {status}).{said}")
        if 300 <= status < 400:
            return JudgeError(
                f"the judge at {host(self.url)} sends on to another address (status {status}), which is not followed "
                "because the key would go there too. Give the address that it names."
            )
        advice = {
            401: f"Put a valid key into the environment variable {KEY_VARIABLE}.",
            403: f"Put a valid key into the environment variable {KEY_VARIABLE}.",
            404: f"Check the address, and that it serves a model called {self.model}.",
        }
        reason = STATUS.get(status, f"the server answers {status}")
        rest = advice.get(status, "Run the same command again later; verdicts so far are kept.")
        return JudgeError(f"the judge at {host(self.url)} gives no answer: {reason}. {rest}{said}")


def _network_errors() -> tuple[type[Exception], ...]:
    import httpx2

    return (httpx2.RequestError, httpx2.InvalidURL)


def _asked_for(headers: Mapping[str, str], usual: float) -> float:
    """Seconds until the next try: what the server asks for, but not less than usual."""
    asked = headers.get("Retry-After", "")
    return max(float(asked), usual) if asked.isascii() and asked.isdecimal() and len(asked) < 10 else usual


def _excerpt(body: bytes) -> str:
    """The beginning of a response on one line, without secrets."""
    text = cut(body[:20_000].decode("utf-8", errors="replace"), _EXCERPT)
    return one_line(redact(text))[:_EXCERPT]
