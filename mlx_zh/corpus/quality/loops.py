"""Replies that go round in circles: the same words again and again, and lists with broken numbers."""

from __future__ import annotations

import re
from collections import Counter

_ASKED_FOR = re.compile(
    r"重复|重複|反复|复制|[一二三四五六七八九十百千\d]+\s?[遍次]|repeat|copies|times\b", re.IGNORECASE
)
_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_NO_LETTERS = re.compile(r"[\W_]+|\d{7,}")
_HAN = re.compile(r"[\u3400-\u9fff]")
_WINDOW, _TAIL = 1000, 300  # letters that are compared with each other, and those at the end, where loops are
_GRAM, _LATIN_GRAM = 10, 25  # letters of an n-gram: in a mostly Chinese text, and in others
_FEWEST_GRAMS = 60
_REPEATED = 0.5  # share of the n-grams that stood in the same window before
_OFTEN = 4  # how often the commonest n-gram must stand in the window
_EXCERPT = 40

# A number at the beginning of a line that is no decimal, nor the first part of 1.1 or of 4. a.
_ITEM = re.compile(r"^([ \t]*(?:[-*+] )?)([1-9]\d{0,2})([.、．)）])(?!\d)[ \t]*(?![a-z][.)])(\S.*)$", re.MULTILINE)
_TWICE = re.compile(r"^[ \t]*(\d{1,3})[.、．)）] ?\1[.、．)）]\s", re.MULTILINE)
_NUMBERS = 3  # items that a list needs for its numbers to be judged
_EQUAL_ITEMS = 3  # equal items that a list needs to be one that repeats itself, if they are half of all


def repetition(prompt: str, reply: str) -> str | None:
    """The n-gram that a looping reply says most often; None for other replies.

    Half of the n-grams in 1,000 letters in a row, or in the last 300, have stood there before. Code does not count,
    nor does a reply that was asked to repeat something.
    """
    if len(reply) < _FEWEST_GRAMS:
        return None
    letters = _NO_LETTERS.sub("", _CODE.sub("", reply))
    size = _GRAM if len(_HAN.findall(letters[:_WINDOW])) * 2 > len(letters[:_WINDOW]) else _LATIN_GRAM
    windows = (letters[start : start + _WINDOW] for start in range(0, len(letters), _WINDOW // 2))
    for window in (letters[-_TAIL:], *windows):
        count = len(window) - size + 1
        if count < _FEWEST_GRAMS:
            break
        if len({window[i : i + size] for i in range(count)}) > (1 - _REPEATED) * count:
            continue
        (gram, times), *_ = Counter(window[i : i + size] for i in range(count)).most_common(1)
        if times >= _OFTEN and _ASKED_FOR.search(prompt) is None:
            return gram
    return None


def numbering(prompt: str, reply: str) -> str | None:
    """The item with which a numbered list goes wrong: a number twice, one left out, or an item three times.

    A new list may start at 1 at any item. Numbers that start elsewhere, or count down, have a meaning of their own.
    None for replies without such a list.
    """
    del prompt
    if reply.count("\n") < _NUMBERS - 1:
        return None
    reply = _CODE.sub("", reply)
    twice = _TWICE.search(reply)
    if twice is not None:
        return twice.group().strip()[:_EXCERPT]
    items = [(match[1] + match[3], int(match[2]), match[4].strip()) for match in _ITEM.finditer(reply)]
    if len(items) < _NUMBERS:
        return None
    text, times = Counter(text for _, _, text in items).most_common(1)[0]
    if times >= _EQUAL_ITEMS and 2 * times >= len(items) and len(text) > 1:
        return f"{times} × {text}"[:_EXCERPT]
    return _wrong_number(items)


def _wrong_number(items: list[tuple[str, int, str]]) -> str | None:
    """The first item whose number does not follow, among those with its indentation and its mark."""
    last: dict[str, int] = {}
    judged = {form for form, number, _ in items if number == 1}
    for form, number, text in items:
        before = last.get(form)
        if form not in judged or (before is None and number != 1):
            continue
        if before is not None and number not in (before + 1, 1):
            return f"{before} → {number}. {text}"[:_EXCERPT]
        if before == number == 1:
            return f"1 → 1. {text}"[:_EXCERPT]
        last[form] = number
    return None
