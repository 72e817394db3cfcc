"""The language in which this program speaks to its user on the terminal."""

from __future__ import annotations

import os

from mlx_zh.language.catalogue import Language, fill

# The first of these that is set decides, as for other programs (POSIX, "Environment Variables").
_VARIABLES = ("MLX_ZH_LANG", "LC_ALL", "LC_MESSAGES", "LANG")


def reader_language() -> Language:
    """`zh` if MLX_ZH_LANG or the locale names Chinese (zh, zh_CN.UTF-8, zh-Hans …), else `en`."""
    name = next((value for variable in _VARIABLES if (value := os.environ.get(variable))), "")
    return "zh" if name.lower().startswith("zh") else "en"


def say(code: str, /, **values: object) -> str:
    """The wording of a code of the catalogue in the reader's language. Raises what `fill` raises."""
    return fill(code, values, reader_language())
