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
from functools import lru_cache
from typing import Any

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_LONGEST = 60  # characters of a name that are looked at


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_MEDIA = _set("image images img imgs picture pictures photo photos video videos audio audios pixel wav")
_CHINESE_MEDIA = ("图片", "图像", "视频", "音频")
_CHINESE = {
    **dict.fromkeys(("权重", "是否训练"), "learned"),
    **dict.fromkeys(("是否正确", "是否采纳", "是否通过"), "good"),
    **dict.fromkeys(("系统", "系统提示", "系统提示词"), "system"),
    **dict.fromkeys(("历史", "历史对话", "对话历史"), "history"),
}
_LEARNED = _set("loss losses train training trainable trained learn learnable weight weights supervised")
_UNLEARNED = _set("mask masks masked masking ignore ignored skip skipped exclude excluded")
_NEGATION = frozenset(("no", "not", "without"))
_SWITCH_WORDS = (
    _LEARNED
    | _UNLEARNED
    | _NEGATION
    | _set("is do to be on for in use should has the calculate calc compute with sample example row")
    | _set("message turn token tokens target targets label labels response reply answer output")
    | _set("assistant scale value flag per")
)
_GOOD = _set("good correct desirable preferred chosen accepted approved liked upvoted thumbs")
_BAD = _set("bad wrong incorrect undesirable rejected disliked downvoted down")
_ANSWER = _set("answer answers response responses reply replies output outputs completion completions")
_ASKED = frozenset(("is", "was", "marked"))
_JUDGED_WORDS = _GOOD | _BAD | _ANSWER | _ASKED | frozenset(("the", "up", "as"))
_REJECTED = frozenset(("rejected", "dispreferred", "nonpreferred"))
_SYSTEM_WORDS = _set("system sys prompt message instruction text content msg")
_PAST = frozenset(("history", "histories", "previous", "past"))
_HISTORY_WORDS = _PAST | _set("chat dialog dialogue conversation conversations message messages turns")
_MARKS = _set("score scores rating ratings reward rewards")
_NO = ("false", "no", "否", "不", "f", "n")
_YES = ("true", "yes", "是", "y", "t")


@lru_cache(maxsize=4096)
def kind_of_name(name: str) -> str:
    """What a key of this name says, one of the words above; "" for any other."""
    name = name[:_LONGEST].strip()
    if name in _CHINESE:
        return _CHINESE[name]
    if any(word in name for word in _CHINESE_MEDIA):
        return "media"
    listed = [word.lower() for word in _WORD.findall(name)]
    words = set(listed)
    if not words:
        return ""
    if words & _MEDIA:
        return "media"
    if words <= _SWITCH_WORDS and words & (_LEARNED | _UNLEARNED):
        return "unlearned" if words & (_UNLEARNED | _NEGATION) else "learned"
    if words <= _JUDGED_WORDS and words & (_GOOD | _BAD):
        if words & _ANSWER and not words & _ASKED:  # correct_answer is an answer, is_correct_answer says yes or no
            return "rejected" if words & _BAD else ""
        if not words & _REJECTED or words & _ASKED:
            return "bad" if words & _BAD else "good"
    if words & _REJECTED:
        return "rejected"
    if listed[0] in ("system", "sys") and words <= _SYSTEM_WORDS and len(words) > 1:
        return "system"
    if words <= _HISTORY_WORDS and words & _PAST:
        return "history"
    if "chosen" in words and words & _MARKS:
        return "mark"
    if "margin" in words and words <= {"margin", *_MARKS}:
        return "margin"
    return ""


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
