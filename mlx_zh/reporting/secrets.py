"""What a report must not show: tokens, passwords, credentials in addresses, and whose computer it was."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

HIDDEN = "•••"

_NAMES = re.compile(
    r"(^|[_-])(token|secret|password|passwd|credentials?|authorization|cookie|(api|access|secret|private)[_-]?key)$",
    re.IGNORECASE,
)
_WORDS = (
    # A value after a telling name, as in a command line, an address's query or a header.
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
    (re.compile(r"\b([a-z][a-z0-9+.-]*://)[^\s/@]+@", re.IGNORECASE), rf"\g<1>{HIDDEN}@"),
    # Tokens that are known by their form: Hugging Face, GitHub, OpenAI and alike, ModelScope, AWS, JSON web tokens.
    (re.compile(r"\b(?:hf_|api_org_)[A-Za-z0-9]{16,}"), HIDDEN),
    (re.compile(r"\b(?:ghp|gho|ghs|ghu|github_pat)_\w{20,}"), HIDDEN),
    (re.compile(r"\bsk-[A-Za-z0-9_-]{16,}"), HIDDEN),
    (re.compile(r"\bms-[0-9a-f]{8}-[0-9a-f-]{20,}"), HIDDEN),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), HIDDEN),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]+"), HIDDEN),
)


def hide(text: str) -> str:
    """The text without what looks like a secret; the home folder becomes `~`."""
    for pattern, replacement in _WORDS:
        text = pattern.sub(replacement, text)
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


def hide_all(value: Any) -> Any:
    """Plain values with every text hidden, and whole where its key says that it is a secret."""
    if isinstance(value, dict):
        return {
            hide(str(k)): HIDDEN if isinstance(v, str) and v and _NAMES.search(str(k)) else hide_all(v)
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return _hide_command([hide_all(v) for v in value])
    return hide(value) if isinstance(value, str) else value


def _hide_command(values: list[Any]) -> list[Any]:
    """A list of words, as a command line is: the word after `--token` is one."""
    for at, word in enumerate(values[:-1]):
        if isinstance(word, str) and word.startswith("-") and "=" not in word and _NAMES.search(word.lstrip("-")):
            values[at + 1] = HIDDEN
    return values
