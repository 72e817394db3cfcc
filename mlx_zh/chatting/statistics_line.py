"""The line below an answer."""

from __future__ import annotations

from mlx_zh.chatting.terminal import text_width
from mlx_zh.models.generate import Statistics

_ENDS = {"length": "已达长度上限 cut off", "stopped": "已中止 stopped"}


def describe(statistics: Statistics, name: str = "", width: int | None = None) -> str:
    """Tokens, speed, and how the answer ended. Within `width` columns; what matters least is left out."""
    parts = [
        f"{statistics.generated} tokens",
        f"{statistics.tokens_per_second:.1f} tokens/s",
        f"first after {statistics.seconds_to_first:.2f} s",
        f"prompt {statistics.prompt_new} new + {statistics.prompt_cached} cached",
    ]
    ends = [_ENDS[statistics.reason]] if statistics.reason in _ENDS else []
    while True:
        line = (f"{name}: " if name else "") + " · ".join([*parts, *ends])
        if width is None or text_width(line) <= width or len(parts) == 1:
            return line
        parts.pop()
