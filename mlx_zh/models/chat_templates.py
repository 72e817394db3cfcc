"""A tokenizer's chat templates by name. Most tokenizers have one; some have a second one for tools, and so on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEFAULT = "default"  # the name of the template that a conversation without tools is written with


def named_templates(template: Any) -> dict[str, str]:
    """The templates by name, from a tokenizer's `chat_template`: a text, a table by name, or None."""
    if isinstance(template, Mapping):
        return {str(name): text for name, text in template.items() if isinstance(text, str)}
    return {DEFAULT: template} if isinstance(template, str) else {}


def default_template(template: Any) -> str:
    """The text of the template named `default`; "" if there is none."""
    return named_templates(template).get(DEFAULT, "")
