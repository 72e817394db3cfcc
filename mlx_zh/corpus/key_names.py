"""What a key means that no format has: the words in its name tell, and its value whether the row still says the same.

media      image_path, videoUrl, 图片          what the row is about is not in its text
learned    is_train, loss_weight, trainable    false or 0: not to be learned
unlearned  masked, ignore_loss, no_loss        true or 1: not to be learned
good       is_correct, preferred, thumbs_up    false: an answer not to imitate
bad        is_wrong, rejected, thumbs_down     true: the same
rejected   rejected_answer                     the other answer of a pair
system     system_prompt, systemMessage        another name of `system`
history    chat_history, previous_messages     earlier turns
mark       chosen_rating, score_chosen         of a pair's better answer
margin     margin, reward_margin               by how much it is better
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

import yaml

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_LONGEST = 60  # characters of a name that are looked at
_NO = ("false", "no", "否", "不", "f", "n")
_YES = ("true", "yes", "是", "y", "t")


@cache
def _table() -> Mapping[str, Any]:
    table: dict[str, Any] = yaml.safe_load(files(__package__).joinpath("key_names.yaml").read_text(encoding="utf-8"))
    return {kind: frozenset(words) if isinstance(words, list) else words for kind, words in table.items()}


@lru_cache(maxsize=4096)
def kind_of_name(name: str) -> str:
    """What a key of this name says, one of the words above; "" for any other."""
    name, table = name[:_LONGEST].strip(), _table()
    if name in table["chinese"]:
        return str(table["chinese"][name])
    if any(word in name for word in table["chinese_media"]):
        return "media"
    words = {word.lower() for word in _WORD.findall(name)}
    if not words:
        return ""
    if words & table["media"]:
        return "media"
    return _switch(words, table) or _judgement(words, table) or _turns(words, table) or _mark(words, table)


Words = frozenset[str] | set[str]


def _switch(words: Words, table: Mapping[str, Any]) -> str:
    off = table["unlearned"] | table["negation"]
    core = table["learned"] | table["unlearned"]
    if not words & core or not words <= core | off | table["around_switches"]:
        return ""
    return "unlearned" if words & off else "learned"


def _judgement(words: Words, table: Mapping[str, Any]) -> str:
    """The kind of a name that judges an answer. correct_answer is an answer, is_correct_answer says yes or no."""
    judged = table["good"] | table["bad"]
    asks = bool(words & table["asked"])
    if words & judged and words <= judged | table["answer"] | table["asked"] | table["around_marks"]:
        if words & table["answer"] and not asks:
            return "rejected" if words & table["bad"] else ""
        if asks or not words & table["rejected"]:
            return "bad" if words & table["bad"] else "good"
    return "rejected" if words & table["rejected"] else ""


def _turns(words: Words, table: Mapping[str, Any]) -> str:
    named = table["system"] | table["around_system"]
    if words & table["system"] and words & table["around_system"] and words <= named:
        return "system"
    return "history" if words & table["past"] and words <= table["past"] | table["around_past"] else ""


def _mark(words: Words, table: Mapping[str, Any]) -> str:
    if "chosen" in words and words & table["mark"]:
        return "mark"
    return "margin" if "margin" in words and words <= {"margin"} | table["mark"] else ""


def number_of(value: Any) -> float | None:
    """The number that a value is, also as a text, as tables have it; None for true, false and anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        try:
            value = float(value) if len(value) < _LONGEST else None
        except ValueError:
            return None
    return float(value) if isinstance(value, int | float) and value == value and abs(value) < 1e300 else None


def says_no(value: Any) -> bool:
    """Whether a value is false or 0, also as a text."""
    return value is False or number_of(value) == 0 or (isinstance(value, str) and value.strip().lower() in _NO)


def says_yes(value: Any) -> bool:
    """Whether a value is true or another number than 0, also as a text."""
    number = number_of(value)
    said = isinstance(value, str) and value.strip().lower() in _YES
    return value is True or said or (number is not None and number != 0)


def is_list_of_switches(value: Any) -> bool:
    """Whether a value is a list of numbers, or of true and false: one for each token or turn."""
    return isinstance(value, list) and bool(value) and all(isinstance(part, int | float) for part in value)
