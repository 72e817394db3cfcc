"""What `mlx-zh init` asks, one question a line: base model, time, use and name."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from mlx_zh.errors import RecipeError
from mlx_zh.language.reader import say
from mlx_zh.recipe_text.units import seconds_of, time_text
from mlx_zh.stages.first_recipe import USES, Use
from mlx_zh.system import console
from mlx_zh.system.redaction import redact

DEFAULT_BUDGET = "8h"  # a night
_NONE = ("0", "no", "none", "无", "不限", "没有")
_HALF = {"半小时": "30m", "半个小时": "30m", "一小时": "1h", "一个小时": "1h", "一晚": "8h", "一夜": "8h"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
Answer = TypeVar("Answer")


def plain(text: str) -> str:
    """An answer as it was meant: full-width letters and digits of a Chinese input method become ordinary ones."""
    return unicodedata.normalize("NFKC", text).strip()


def ask(question: str, default: str, understand: Callable[[str], Answer]) -> Answer:
    """Ask until `understand` takes the answer; an empty one means `default`.

    `understand` raises RecipeError, whose text is shown, for an answer that it does not take. Raises
    KeyboardInterrupt at the end of the input.
    """
    while True:
        try:
            answer = plain(input(f"{question} "))
        except EOFError:
            console.say()
            raise KeyboardInterrupt from None
        try:
            return understand(answer or default)
        except RecipeError as error:
            console.say(str(error))


def budget_of(answer: str) -> str | None:
    """A length of time as recipes write it, or None for no limit. Raises RecipeError."""
    answer = plain(answer)
    if answer.lower() in _NONE:
        return None
    seconds = seconds_of(_HALF.get(answer.replace(" ", ""), answer))
    if seconds is None:
        raise RecipeError(say("init-bad-budget", answer=answer))
    return time_text(seconds)


def name_of(answer: str) -> str:
    """The name of a run. Raises RecipeError."""
    answer = plain(answer)
    if not _NAME.fullmatch(answer) or redact(answer) != answer:
        raise RecipeError(say("init-bad-name", answer=answer))
    return answer


def use_of(answer: str) -> Use:
    """The use of a numbered answer. Raises RecipeError."""
    if answer not in ("1", "2"):
        raise RecipeError(say("init-bad-use", answer=answer))
    return USES[int(answer) - 1]


def ask_budget() -> str | None:
    """How long the run may take; None for no limit."""
    return ask(say("init-ask-budget", default=DEFAULT_BUDGET), DEFAULT_BUDGET, budget_of)


def ask_use() -> Use:
    """Whether a file of pairs is used for SFT alone or for DPO too, which is the default."""
    return ask(say("init-ask-use", default="2"), "2", use_of)


def default_name(path: Path) -> str:
    """A name from that of a file; one without letters and digits, or with a secret, gives my-model."""
    stem = plain(path.absolute().stem if path.is_file() else path.absolute().name)
    letters = re.sub(r"[._-]*[^A-Za-z0-9._-][^A-Za-z0-9]*", "-", stem).strip("._-")
    return letters if _NAME.fullmatch(letters) and redact(letters) == letters else "my-model"


def chosen(answer: str, listed: Sequence[str]) -> str:
    """The entry of a numbered list that an answer names by its number; any other answer is returned as it is."""
    number = int(answer) if re.fullmatch("[0-9]{1,3}", answer) else 0
    return listed[number - 1] if 1 <= number <= len(listed) else answer
