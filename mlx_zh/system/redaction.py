"""Remove from texts what must not be shown or stored: tokens, passwords, credentials in URLs, the home folder.

`system.secret_forms` has the patterns.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mlx_zh.system.escaping import CONTROLS
from mlx_zh.system.secret_forms import FORMS, HIDDEN, TRIGGER

_MIN_LENGTH = 8  # characters of a secret; replacing shorter values would garble other words

# Names whose values are secrets: of variables of the environment, and of keys of recipes and JSON files.
_NAMES = re.compile(
    r"(^|[_-])(token|secret|password|passwd|passphrase|credentials?|authorization|cookie"
    r"|(api|access|secret|private)[_-]?key)$",
    re.IGNORECASE,
)
_SPECIAL_TOKENS = re.compile(r"(^|[_-])(bos|eos|pad|unk|sep|cls|mask)[_-]token$", re.IGNORECASE)
_VARIABLES = re.compile(
    r"(token|secret|passw(or)?d|passphrase|credentials?|cookie|authorization|(api|access|secret|private)_?key)s?(_?\d+)?$"
    r"|(^|_)(key|pat|pass|pwd|pw|auth|sk|ak)(_?\d+)?$|^(sshpass|pgpassword)$|secret",
    re.IGNORECASE,
)
_NO_SECRETS = frozenset({"PWD", "OLDPWD", "HF_TOKEN_PATH"})
_NUMBER = re.compile(r"[0-9.]+")

_KEY_BEGINS = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_KEY_ENDS = re.compile(r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_KEY_LINES = re.compile(r"(?:(?:\s|\\[nr]){0,9}+[A-Za-z0-9+/=]{16,}+)*+")


# All control characters except tab, line feed and the codes of bold, dim, underlined and coloured text. They can move
# the cursor, set the clipboard, hide a text, or make it look like another one.
_STYLE = r"(?:[0-4]|2[2-4]|3[1-69]|9[1-6])"
_CONTROLS = re.compile(rf"\x1b(?!\[(?:{_STYLE}(?:;{_STYLE})*)?m)|(?!\x1b)[{CONTROLS}]")


def redact(text: str) -> str:
    """The text without anything that looks like a secret, and without the secrets in this process's environment."""
    return _redact(text, list(_secrets()))


def redacted(value: Any) -> Any:
    """As `redact`, for plain values: texts, and lists and mappings of them."""
    return hide_all(value, partial(_redact, secrets=list(_secrets())))


def hide(text: str) -> str:
    """As `redact`, and the home folder becomes `~`. For texts that the user may pass on."""
    return _without_home(redact(text))


def hide_all(value: Any, hidden: Callable[[str], str] = hide) -> Any:
    """Plain values with `hidden` applied to every text; a value whose key names a secret is replaced as a whole."""
    if isinstance(value, dict):
        return {
            hidden(str(k)): HIDDEN if v and isinstance(v, str) and _is_secret(str(k)) else hide_all(v, hidden)
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return _hide_command([hide_all(v, hidden) for v in value])
    return hidden(value) if isinstance(value, str) else value


def printable(text: str) -> str:
    """The text without secrets and without control characters other than colour codes, for a terminal."""
    return _CONTROLS.sub("\ufffd", redact(text.replace("\r\n", "\n")))


def cut(text: str, length: int) -> str:
    """The beginning of a text, for a redaction whose result is cut at `length`: so much more that no token is cut."""
    return text if len(text) <= length + _LONGEST_SECRET else text[: length + _LONGEST_SECRET]


_LONGEST_SECRET = 4096  # characters of a token or private key


def _redact(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        if secret not in text:
            continue
        if _NUMBER.fullmatch(secret):  # a longer number may contain it
            text = re.sub(rf"(?<![0-9A-Za-z.]){re.escape(secret)}(?![0-9A-Za-z.])", HIDDEN, text)
        else:
            text = text.replace(secret, HIDDEN)
    if TRIGGER.search(text) is None:
        return text
    text = _without_private_keys(text)
    for pattern, replacement in FORMS:
        text = pattern.sub(replacement, text)
    return text


def _secrets() -> Iterator[str]:
    """The secrets in the environment, the longest first, each also as JSON, HTML and URLs write it."""
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= _MIN_LENGTH and name not in _NO_SECRETS and _VARIABLES.search(name)
    }
    forms = {
        form
        for value in values
        for form in (value, json.dumps(value)[1:-1], repr(value)[1:-1], html.escape(value), quote(value, safe=""))
    }
    forms |= {quote(value) for value in values}
    yield from sorted(forms, key=len, reverse=True)


def _without_private_keys(text: str) -> str:
    """The text without blocks of private keys; of a block without an end, the lines that look like a key are gone."""
    if "PRIVATE KEY" not in text:
        return text
    parts, at, ends = [], 0, True
    while (begin := _KEY_BEGINS.search(text, at)) is not None:
        end = _KEY_ENDS.search(text, begin.end()) if ends else None
        ends = end is not None
        lines = _KEY_LINES.match(text, begin.end())
        parts += [text[at : begin.start()], HIDDEN]
        at = end.end() if end is not None else lines.end() if lines is not None else begin.end()
    return "".join([*parts, text[at:]])


def _is_secret(name: str) -> bool:
    return _NAMES.search(name) is not None and _SPECIAL_TOKENS.search(name) is None


def _without_home(text: str) -> str:
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


def _hide_command(values: list[Any]) -> list[Any]:
    """Hide the value after an option such as `--token` in a list of command-line words."""
    for at, word in enumerate(values[:-1]):
        if isinstance(word, str) and word.startswith("-") and "=" not in word and _is_secret(word.lstrip("-")):
            values[at + 1] = HIDDEN
    return values
