"""Remove from texts what must not be shown or stored: tokens, passwords, credentials in URLs, the home folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

HIDDEN = "•••"
_MIN_LENGTH = 8  # characters of a secret; replacing shorter values would garble other words

_NAMES = re.compile(
    r"(^|[_-])(token|secret|password|passwd|credentials?|authorization|cookie|(api|access|secret|private)[_-]?key)$",
    re.IGNORECASE,
)
# Variables are secrets under more names, such as OPENAI_KEY, GITHUB_PAT and PGPASSWORD.
_VARIABLES = re.compile(r"(token|secret|passw(or)?d|credentials?|api_?key)$|(^|_)(key|pat|pass|auth)$", re.IGNORECASE)
_WORDS = (
    # A value after a name such as `token`: in a command line, the query of a URL or a header.
    (
        re.compile(
            r"((?:^|[\s?&;,'\"_.-])(?:hf_token|token|secret|password|passwd|signature|(?:api|access|secret|private)"
            r"[_-]?key)['\"]?\s*[=:]\s*['\"]?)[^\s&'\",;]+",
            re.IGNORECASE,
        ),
        rf"\g<1>{HIDDEN}",
    ),
    (re.compile(r"(--?(?:hf-)?(?:token|password|secret|api-key)\s+)\S+", re.IGNORECASE), rf"\g<1>{HIDDEN}"),
    (re.compile(r"(\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE), rf"\g<1>{HIDDEN}"),
    (re.compile(r"\b([a-z][a-z0-9+.-]*://)[^\s/\"<>]+@", re.IGNORECASE), rf"\g<1>{HIDDEN}@"),
    # Tokens with a known form: Hugging Face, GitHub, OpenAI and similar services, ModelScope, AWS, JSON web tokens.
    (re.compile(r"\b(?:hf_|api_org_)[A-Za-z0-9]{16,}"), HIDDEN),
    (re.compile(r"\b(?:ghp|gho|ghs|ghu|github_pat)_\w{20,}"), HIDDEN),
    (re.compile(r"\bsk-[A-Za-z0-9_-]{16,}"), HIDDEN),
    (re.compile(r"\bms-[0-9a-f]{8}-[0-9a-f-]{20,}"), HIDDEN),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), HIDDEN),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]+"), HIDDEN),
)


# All control characters except tab, line feed and the codes of bold, dim, underlined and coloured text. They can move
# the cursor, set the clipboard, hide a text, or make it look like another one.
_STYLE = r"(?:[0-4]|2[2-4]|3[1-69]|9[1-6])"
_CONTROLS = re.compile(
    rf"\x1b(?!\[(?:{_STYLE}(?:;{_STYLE})*)?m)|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)


def redact(text: str) -> str:
    """The text without anything that looks like a secret, and without the secrets in this process's environment."""
    for name, value in os.environ.items():
        if len(value) >= _MIN_LENGTH and (_NAMES.search(name) or _VARIABLES.search(name)):
            text = text.replace(value, HIDDEN)
    for pattern, replacement in _WORDS:
        text = pattern.sub(replacement, text)
    return text


def hide(text: str) -> str:
    """As `redact`, and the home folder becomes `~`. For texts that the user may pass on."""
    text = redact(text)
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


def hide_all(value: Any, hidden: Callable[[str], str] = hide) -> Any:
    """Plain values with `hidden` applied to every text; a value whose key names a secret is replaced as a whole."""
    if isinstance(value, dict):
        return {
            hidden(str(k)): HIDDEN if isinstance(v, str) and v and _NAMES.search(str(k)) else hide_all(v, hidden)
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return _hide_command([hide_all(v, hidden) for v in value])
    return hidden(value) if isinstance(value, str) else value


def printable(text: str) -> str:
    """The text without secrets and without control characters other than colour codes, for a terminal."""
    return _CONTROLS.sub("\ufffd", redact(text.replace("\r\n", "\n")))


def _hide_command(values: list[Any]) -> list[Any]:
    """Hide the value after an option such as `--token` in a list of command-line words."""
    for at, word in enumerate(values[:-1]):
        if isinstance(word, str) and word.startswith("-") and "=" not in word and _NAMES.search(word.lstrip("-")):
            values[at + 1] = HIDDEN
    return values
