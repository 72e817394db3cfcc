"""The letter that a free answer gives, by the rules of free_answers.yaml."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

# Terms that begin with a letter; the letter there is no answer.
_TERMS = "股|超|语言|细胞|型|级|类|族|大调|小调|盘|座|轮|淋巴|站|杯|卡|区|线|点|组|栋|端|字|面|角|市|国|打印纸"
_JOIN = r"(?:\s*(?:、|和|与|及|以及|或者?|还是|/|&|\band\b|\bor\b)\s*\(?)?"
_LETTERS = (
    r"(?<![a-z0-9])(?P<letters>(?>[a-d](?:"
    + _JOIN
    + r"[a-d](?![a-z0-9]|'[a-z])|[a-d](?=[a-d]{0,4}(?![a-z0-9]))){0,5}))"
    r"(?![a-z0-9+#%°℃=]|'[a-z]|\s*[-=]\s*[a-z0-9])(?!\s?(?:" + _TERMS + r"))"
    r"(?!(?<=(?-i:[Aa-d]))[ \t]+(?!because|since|as\b|is\b|and\b|or\b|but\b|would\b|due\b|option|[a-d]\b)[a-z])"
)
_END = r"(?:\Z|[.。,;!?\n)]|吧|了|哦|呢|\s)"
_MARK = r"[.、:)]"
_SIMPLIFIED = str.maketrans("選擇應確項為錯對認會還誤當∶", "选择应确项为错对认会还误当:")
_LONGEST = 8_000  # characters; of a longer answer the end is read


@dataclass(frozen=True)
class Rule:
    """A pattern of free_answers.yaml; the head of that file explains the fields."""

    name: str
    says: str
    pattern: str  # as it is written in the file
    examples: Mapping[str, str]  # text -> letter, or "none"
    replace: str = " "
    single: bool = False
    agree: bool = False

    @property
    def text(self) -> str:
        """All that decides how an answer is read."""
        return f"{self.pattern} -> {self.replace} {self.single} {self.agree}"


@dataclass(frozen=True)
class Rules:
    """The three parts of free_answers.yaml."""

    clean: tuple[Rule, ...]
    ignore: tuple[Rule, ...]
    rules: tuple[Rule, ...]

    def all(self) -> tuple[Rule, ...]:
        """Every rule, in the order in which they are applied."""
        return (*self.clean, *self.ignore, *self.rules)


@cache
def free_answer_rules() -> Rules:
    """The table of free_answers.yaml."""
    data: dict[str, list[dict[str, Any]]] = yaml.safe_load(
        files(__package__).joinpath("free_answers.yaml").read_text(encoding="utf-8")
    )
    return Rules(**{part: tuple(Rule(**fields) for fields in data[part]) for part in ("clean", "ignore", "rules")})


def free_answer_letter(answer: str, options: Sequence[str] = ()) -> str | None:
    """The letter, A to D, that a free answer gives; None where it gives none or several.

    `options` are the texts of A to D. An answer that is one of these texts, and no other, gives its letter.
    """
    text = _plain(answer)
    if letter := _option(text, options):
        return letter
    table = free_answer_rules()
    for rule in table.ignore:
        text = _compiled(rule.pattern).sub(rule.replace, text)
    for rule in table.rules:
        matches = [found for match in _compiled(rule.pattern).finditer(text) if (found := _letters(match))]
        if rule.single:
            matches = [found for found in matches if len(found) == 1]
        if matches:
            decided = set(matches) if rule.agree else {matches[-1]}
            return matches[-1] if len(decided) == 1 and len(matches[-1]) == 1 else None
    named = re.search(r"(?:答案|应?选择?)(?:是|为|:)?([^。\n]+)|\banswer\s*(?:is|:)([^.\n]+)", text, re.IGNORECASE)
    return _option(next(filter(None, named.groups())), options) if named else None


def _plain(answer: str) -> str:
    """The answer in NFKC form, in simplified characters as far as the rules name them, and without markup."""
    text = unicodedata.normalize("NFKC", answer[-_LONGEST:])
    text = "".join(character for character in text if unicodedata.category(character) != "Cf")
    text = text.translate(_SIMPLIFIED)
    text = _one_blank(text)
    for rule in free_answer_rules().clean:
        text = _compiled(rule.pattern).sub(rule.replace, text)
    return _one_blank(text)


def _one_blank(text: str) -> str:
    """The text without empty lines, and with one blank where there were several."""
    return "\n".join(" ".join(line.split()) for line in text.splitlines() if line.strip())


def _letters(match: re.Match[str]) -> str:
    """The different letters of a match, in capitals."""
    letters = next((text for name, text in match.groupdict().items() if name.startswith("letters") and text), "")
    letters = re.sub(r"and|or", "", letters, flags=re.IGNORECASE)
    return "".join(dict.fromkeys(re.findall("[A-D]", letters.upper())))


def _option(text: str, options: Sequence[str]) -> str | None:
    """The letter of the only option that has this text. A text of one character is no option's text but a letter."""
    said = _bare(text)
    same = [letter for letter, option in zip("ABCD", options, strict=False) if _bare(option) == said]
    return same[0] if len(same) == 1 and len(said) > 1 else None


def _bare(text: str) -> str:
    """The letters and digits of a text in lower case."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text).casefold()))


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """The regular expression that a pattern of the table stands for."""
    count = pattern.count("LETTERS")
    for number in range(count):
        pattern = pattern.replace("LETTERS", _LETTERS.replace("<letters>", f"<letters{number}>"), 1)
    pattern = pattern.replace("END", _END).replace("MARK", _MARK)
    # Verbose, because a folded text of YAML has a blank where its lines meet.
    return re.compile(pattern, re.IGNORECASE | re.DOTALL | re.MULTILINE | re.VERBOSE)
