"""HTML from values: whatever comes from a model, a data file or a recipe is escaped here and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Iterable

from mlx_zh.reporting.messages import Text

# C0 and C1 controls are no HTML; bidirectional controls could make text look like what it is not.
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Html(str):
    """Markup that may stand in a page as it is. Any other text is escaped."""

    __slots__ = ()


def escape(text: object) -> Html:
    """Text that cannot end an element, an attribute, a style or a script."""
    if isinstance(text, Html):
        return text
    clean = _CONTROLS.sub("\ufffd", str(text))
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;"), ("'", "&#39;")):
        clean = clean.replace(character, entity)
    return Html(clean)


def tag(name: str, *content: object, **attributes: object) -> Html:
    """An element; `class_` is `class`, other underscores are dashes; attributes that are None are left out."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{said}>{join(content)}</{name}>")


def join(parts: Iterable[object], between: str = "") -> Html:
    """Parts one after another, each escaped unless it is markup."""
    return Html(escape(between).join(spoken(part) if isinstance(part, Text) else escape(part) for part in parts))


def spoken(text: Text, element: str = "span") -> Html:
    """Both languages; the page shows one. Once where they are equal."""
    if text.zh == text.en:
        return escape(text.zh)
    zh = tag(element, text.zh, class_="zh", lang="zh-Hans")
    return Html(zh + tag(element, text.en, class_="en", lang="en"))
