"""Sentences of the terminal in Chinese.

The code holds them in English, where they are read with the code that prints them. `console.yaml` has the Chinese
wording of each. As with gettext, the English wording is the key. The fields of an f-string are numbered in it:
`f"{path} is not a file."` has the key `{0} is not a file.`
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from heapq import merge
from importlib.resources import files
from string import Formatter
from typing import NamedTuple

from mlx_zh.language import other_names, system_errors
from mlx_zh.language.catalogue import Language, catalogue
from mlx_zh.language.notice import Notice
from mlx_zh.language.reader import reader_language

_DEEPEST = 6  # sentences within sentences, such as the reason within an error
_JOINTS = ("\n", ". ", ": ", "; ")  # between sentences that the code puts together


def in_readers_language(text: str, language: Language | None = None) -> str:
    """`text` in the reader's language; English where `console.yaml` has no wording for it."""
    language = language or reader_language()
    if isinstance(text, Notice):
        return text.text(language)
    return text if language == "en" else _chinese(text, _DEEPEST)


def as_sentence(text: str, language: Language | None = None) -> str:
    """A sentence that has no full stop yet, with one, in the reader's language."""
    language = language or reader_language()
    return in_readers_language(text, language) + ("。" if language == "zh" else ".")


def label(text: str, language: Language | None = None) -> str:
    """A cell of a table in the reader's language.

    `console.yaml` has short labels in brackets, `[time]`: elsewhere the bare word may be the name of a key or a file.
    """
    chinese = wordings().get(f"[{text}]") if (language or reader_language()) == "zh" else None
    return chinese.strip("[]") if chinese else in_readers_language(text, language)


def _chinese(text: str, depth: int) -> str:
    if depth == 0 or not any("a" <= letter.lower() <= "z" for letter in text):
        return text
    whole = _whole(text, depth)
    if whole is not None:
        return whole
    if (labelled := _after_label(text, depth)) is not None:
        return labelled
    for joint in _JOINTS:
        parts = text.split(joint)
        if len(parts) > 1:
            stop = joint.rstrip(" ") if joint == ". " else ""  # a full stop belongs to the sentence that it ends
            english = [part + stop for part in parts[:-1]] + parts[-1:]
            chinese = [_chinese(part, depth - 1) for part in english]
            return _joined(chinese, joint.removeprefix(stop)) if chinese != english else text
    return text


def _after_label(text: str, depth: int) -> str | None:
    """A whole wording, which may hold full stops, after a label such as a path; None if there is none."""
    position = -1
    for _ in range(_LABELS):
        position = text.find(": ", position + 1)
        if position < 0:
            return None
        label, rest = text[:position], text[position + 2 :]
        if (whole := _whole(rest, depth)) is not None:
            return f"{_chinese(label, depth - 1)}：{whole}"
    return None


_LABELS = 3  # labels before a sentence, such as a file's and a key's


def _joined(sentences: Sequence[str], joint: str) -> str:
    """Sentences put together; after a Chinese stop there is no space."""
    text = sentences[0]
    for sentence in sentences[1:]:
        text += (joint.strip(" ") if text.endswith(_STOPS) else joint) + sentence
    return text


_STOPS = ("。", "！", "？", "：", "；", "，", "）", "”")


def _whole(text: str, depth: int) -> str | None:
    """The wording of a whole sentence, its fields filled in; None if there is none."""
    for sentence in _candidates(text):
        values = _fields(text, sentence.literals)
        if values is not None:
            return sentence.chinese.format(*(_chinese(value, depth - 1) for value in values))
    return None


class _Sentence(NamedTuple):
    """A wording: the English text around its fields, and the Chinese format string."""

    literals: tuple[str, ...]
    chinese: str

    @property
    def size(self) -> int:
        """Characters of the English text around the fields."""
        return sum(map(len, self.literals))


def _candidates(text: str) -> Iterator[_Sentence]:
    """The wordings that `text` may have; those with more text around their fields come first."""
    table = _table()
    beginnings = (text[:_HEAD], "")  # "": begins with a field, or is shorter than a head
    return merge(*(table.get(head, ()) for head in beginnings), key=lambda sentence: -sentence.size)


_HEAD = 4  # characters of the beginning by which sentences are looked up


@cache
def _table() -> Mapping[str, Sequence[_Sentence]]:
    """The wordings by the beginning of their English text, the longest first.

    Those of notices are among them: a notice within an f-string is there as its English sentence.
    """
    table: dict[str, list[_Sentence]] = defaultdict(list)
    for english, chinese in [*wordings().items(), *_of_notices()]:
        texts = literals(english)
        table[texts[0][:_HEAD] if len(texts[0]) >= _HEAD else ""].append(_Sentence(texts, chinese))
    for english, chinese in [*other_names.in_both_languages(), *system_errors.in_both_languages()]:
        table[english[:_HEAD]].append(_Sentence((english,), chinese.replace("{", "{{").replace("}", "}}")))
    for sentences in table.values():
        sentences.sort(key=lambda sentence: -sentence.size)
    return table


def _of_notices() -> Iterator[tuple[str, str]]:
    """The wordings of the catalogue, with numbered fields in place of the named ones."""
    for wording in catalogue().values():
        names = [name for _, name, _, _ in Formatter().parse(wording.en) if name]
        if len(names) == len(set(names)):
            numbers = {name: f"{{{number}}}" for number, name in enumerate(names)}
            english = _renamed(wording.en, numbers)
            if sum(map(len, literals(english))) >= _LEAST:
                yield english, _renamed(wording.zh, numbers)


_LEAST = 12  # characters around its fields by which a notice is recognised within another sentence


def _renamed(wording: str, names: Mapping[str, str]) -> str:
    """A format string whose fields have the texts of `names`; literal braces stay doubled."""
    parts = []
    for literal, name, _, _ in Formatter().parse(wording):
        parts.append(literal.replace("{", "{{").replace("}", "}}"))
        if name is not None:
            parts.append(names[name])
    return "".join(parts)


@cache
def wordings() -> Mapping[str, str]:
    """`console.yaml`: English format strings with numbered fields, each with its Chinese one."""
    import yaml

    text = files(__package__).joinpath("console.yaml").read_text(encoding="utf-8")
    _Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # SafeLoader where libyaml is missing
    entries: dict[str, str] = yaml.load(text, Loader=_Loader)
    return entries


def literals(wording: str) -> tuple[str, ...]:
    """The text before, between and after the fields of a format string."""
    texts = [""]
    for literal, field, _, _ in Formatter().parse(wording):
        texts[-1] += literal
        if field is not None:
            texts.append("")
    return tuple(texts)


def _fields(text: str, around: Sequence[str]) -> list[str] | None:
    """The values of the fields in `text`; None if it does not have the texts of `around`. Takes linear time."""
    first, last = around[0], around[-1]
    if len(around) == 1:
        return [] if text == first else None
    if not text.startswith(first) or not text.endswith(last) or len(text) < len(first) + len(last):
        return None
    values, position, end = [], len(first), len(text) - len(last)
    for literal in around[1:-1]:
        next_one = text.find(literal, position, end)
        if next_one < 0:
            return None
        values.append(text[position:next_one])
        position = next_one + len(literal)
    return [*values, text[position:end]]
