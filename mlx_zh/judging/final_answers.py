"""The number that an answer states last, by the table of final_answers.yaml."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

_LONGEST = 8_000  # characters; of a longer answer the end is read
_MOST_DIGITS = 40  # of a number; a longer one is noise
_STATEMENTS, _CLAUSE = 16, 300  # statements that are looked at, and characters behind each

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?"
_UNITS = {"万亿": 10**12, "亿": 10**8, "万": 10**4}
_FIGURES = dict(zip("零〇一二两三四五六七八九", (0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9), strict=True))
_PLACES = {"十": 10, "百": 100, "千": 1000}
_HAN = r"[零〇一二两三四五六七八九十百千万亿]{1,30}(?:点[零〇一二三四五六七八九]{1,20})?"
# A minus sign; after a digit, a bracket or a letter it is a subtraction.
_SIGN = r"(?:(?<![\d)%a-z])(?<![\d)%a-z]\ )-|负\s?)"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})?(?:"
    rf"(?P<mixed>\d+)(?:\s+|又)(?P<over>\d+)\s?/\s?(?P<under>\d+)"
    rf"|(?P<power>{_DIGITS})\s?×\s?10\s?\^\s?\{{?(?P<exponent>-?\d{{1,3}})\}}?"
    rf"|(?P<base>{_DIGITS})\s?\^\s?\{{?(?P<times>-?\d{{1,3}})\}}?"
    rf"|(?P<above>\d+)\s?/\s?(?P<below>\d+)(?![\d.])"
    rf"|(?P<denominator>\d+|{_HAN})分之(?P<numerator>{_DIGITS}|{_HAN})"
    rf"|(?P<many>(?:{_DIGITS}\s?(?:万亿|亿|万)){{1,3}}(?:\d+)?)"
    rf"|(?<![a-z\d.^])(?P<plain>{_DIGITS}|(?<!\d)\.\d+)(?P<percent>\s?%)?"
    r")",
    re.IGNORECASE,
)
_HUNDREDTHS = re.compile(rf"(?P<sign>负)?百分之(?P<value>{_DIGITS}|{_HAN})")
_NUMERAL = re.compile(rf"(?P<sign>负)?(?P<value>{_HAN})")
# What a Chinese numeral begins that is no number: 一个, 十分, 万一 and others.
_NO_NUMERAL = re.compile(
    r"[一两](?:个|种|些|样|般|定|起|直|下|点|次|旦|切|致|者|方)|十分|千万|万一|万分|百般|一一|三角|四周"
)
_UNIT = rf"\s?(?!分之)(?:(?!{_HAN})[\u4e00-\u9fffa-z]){{0,3}}\s?[.。!]?\s*"
_VERBS = re.compile(r"(?:等于|得到?|还剩|剩下?|一?共有?|总共|合计|需要?|=)\s*")


@dataclass(frozen=True)
class Entry:
    """A line of final_answers.yaml; the head of that file explains the fields."""

    name: str
    says: str
    examples: Mapping[str, str]
    pattern: str = ""
    replace: str = " "


@dataclass(frozen=True)
class Table:
    """The parts of final_answers.yaml."""

    version: int
    clean: tuple[Entry, ...]
    statements: tuple[Entry, ...]
    numbers: tuple[Entry, ...]


@cache
def table() -> Table:
    """The table of final_answers.yaml."""
    text = files(__package__).joinpath("final_answers.yaml").read_text(encoding="utf-8")
    data: dict[str, Any] = yaml.safe_load(text)
    parts = ("clean", "statements", "numbers")
    return Table(data["version"], *(tuple(Entry(**fields) for fields in data[part]) for part in parts))


def final_number(answer: str) -> Fraction | None:
    """The number that an answer states last, exactly; None where it states none."""
    text = _plain(answer)
    stated = [match.end() for entry in table().statements for match in _compiled(entry.pattern).finditer(text)]
    for end in sorted(stated, reverse=True)[:_STATEMENTS]:
        clause = re.split(r"[。;!?\n]|\.(?!\d)", text[end : end + _CLAUSE].lstrip(), maxsplit=1)[0]
        if (number := _stated(clause)) is not None:
            return number
    whole = re.fullmatch(rf"\s*(?P<value>负?{_HAN}){_UNIT}", text, re.IGNORECASE)
    if whole is not None and _NO_NUMERAL.match(text.lstrip()) is None:
        return _numeral(whole["value"])
    return _last(text)


def same_number(answer: Fraction, reference: Fraction, written: str = "") -> bool:
    """Whether two numbers are the same.

    Where the reference has no end as a decimal, such as 1/3, the answer may be rounded to two decimals or more;
    `written` is the answer's text.
    """
    if answer == reference:
        return True
    decimals = max((len(match) for match in re.findall(r"\.(\d{2,})", _nfkc(written))), default=0)
    endless = any(reference.denominator % p == 0 for p in _other_primes(reference.denominator))
    return endless and decimals >= 2 and round(reference, decimals) == answer


def _other_primes(denominator: int) -> list[int]:
    """A divisor of the denominator that is prime to 10, in a list; empty where there is none."""
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return [denominator] if denominator > 1 else []


def _nfkc(text: str) -> str:
    """The text in NFKC form, in which 1½ is not 11/2, 5² not 52, and ① no number."""
    return unicodedata.normalize("NFKC", "".join(_KINDS.get(_kind(c), "") + c if ord(c) > 127 else c for c in text))


_KINDS = {"<fraction>": " ", "<super>": "^"}


def _kind(character: str) -> str:
    return unicodedata.decomposition(character).partition(" ")[0]


def _plain(answer: str) -> str:
    """The answer in NFKC form and without markup."""
    # NFKC would write one half as 1⁄2, with a sign of its own.
    text = _nfkc(_CIRCLED.sub(" ", answer[-_LONGEST:]))[-_LONGEST:].replace("\u2044", "/").translate(_SIGNS)
    text = re.sub(r"([ \t]){2,}", r"\1", re.sub(r"\s*\n\s*", "\n", text))
    for entry in table().clean:
        text = _compiled(entry.pattern).sub(entry.replace, text)
    return text


_CIRCLED = re.compile("[\u2460-\u2473\u2776-\u2793]")
_SIGNS = str.maketrans({"−": "-", "–": "-", "﹣": "-", "負": "负", "點": "点", "萬": "万", "億": "亿", "兩": "两"})


def _stated(clause: str) -> Fraction | None:
    """The number of a clause behind a statement: the right side of an equation, or what the clause begins with.

    A clause that begins with words has its last number behind them.
    """
    _, equals, right = clause.rpartition("=")
    if equals:
        clause = right
    begins = re.match(r"[\s:约大概共为是($]{0,8}", clause)
    rest = clause[begins.end() :] if begins else clause
    for pattern, read in ((_HUNDREDTHS, _hundredths), (_NUMBER, _number)):
        if match := pattern.match(rest):
            return read(match)
    if (numeral := _NUMERAL.match(rest)) and _NO_NUMERAL.match(rest) is None:
        return _numeral(numeral[0])
    return _last(clause)


def _last(text: str) -> Fraction | None:
    """The last number of a text that can be read."""
    found: list[tuple[int, Fraction]] = []
    for pattern, read in ((_NUMBER, _number), (_HUNDREDTHS, _hundredths)):
        found += [(m.end(), value) for m in pattern.finditer(text) if (value := read(m)) is not None]
    for verb in _VERBS.finditer(text):
        match = _NUMERAL.match(text, verb.end())
        if match and _NO_NUMERAL.match(text, verb.end()) is None and (value := _numeral(match[0])) is not None:
            found.append((match.end(), value))
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _number(match: re.Match[str]) -> Fraction | None:
    """The value of a match of `_NUMBER`; None for a fraction with 0 below, or too many digits."""
    if sum(map(str.isdigit, match[0])) > _MOST_DIGITS:
        return None
    part = match.groupdict()
    value: Fraction | None
    if part["mixed"]:
        value = _divided(int(part["over"]), int(part["under"]))
        value = None if value is None else int(part["mixed"]) + value
    elif part["power"]:
        value = _decimal(part["power"]) * Fraction(10) ** int(part["exponent"])
    elif part["base"]:
        base, times = _decimal(part["base"]), int(part["times"])
        value = base**times if abs(times) <= _MOST_DIGITS and (base or times > 0) else None
    elif part["above"]:
        value = _divided(int(part["above"]), int(part["below"]))
    elif part["denominator"]:
        above, below = _either(part["numerator"]), _either(part["denominator"])
        value = None if above is None or below is None else _divided(above, below)
    elif part["many"]:
        value = _many(part["many"])
    else:
        value = _decimal(part["plain"]) / (100 if part["percent"] else 1)
    return None if value is None else -value if part["sign"] else value


def _hundredths(match: re.Match[str]) -> Fraction | None:
    value = _either(match["value"])
    return None if value is None else value / (-100 if match["sign"] else 100)


def _divided(above: int | Fraction, below: int | Fraction) -> Fraction | None:
    return Fraction(above) / below if below else None


def _decimal(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))


def _many(text: str) -> Fraction:
    """Numbers with 亿 and 万, one after the other: their sum."""
    total = Fraction(0)
    for digits, unit in re.findall(rf"({_DIGITS})\s?(万亿|亿|万|)", text):
        total += _decimal(digits) * _UNITS.get(unit, 1)
    return total


def _either(text: str) -> Fraction | None:
    return _decimal(text) if text[0].isdecimal() else _numeral(text)


def _numeral(text: str) -> Fraction | None:
    """The value of a Chinese numeral; None for characters that are none together."""
    negative, text = text.startswith("负"), text.removeprefix("负")
    whole, _, decimals = text.partition("点")
    value = _digit_by_digit(whole) if not set(whole) & (_PLACES.keys() | set("万亿")) else _by_places(whole)
    if value is None:
        return None
    result = Fraction(value)
    if decimals:
        result += Fraction(_digit_by_digit(decimals) or 0, 10 ** len(decimals))
    return -result if negative else result


def _digit_by_digit(text: str) -> int | None:
    """一二三 as 123; None for an empty text, or for several figures that begin with two (两三 is about two)."""
    if not text or (len(text) > 1 and "两" in text):
        return None
    return int("".join(str(_FIGURES[character]) for character in text))


def _by_places(text: str) -> int | None:
    """A numeral with 十, 百, 千, 万 and 亿; None where their order is not that of a number."""
    for unit, size in (("亿", 10**8), ("万", 10**4)):
        before, separator, after = text.rpartition(unit)
        if separator:
            high = _by_places(before) if before else None
            low = 0 if not after else _by_places(after)
            return None if high is None or low is None or low >= size else high * size + low
    return _below_ten_thousand(text)


def _below_ten_thousand(text: str) -> int | None:
    total, figure, last = 0, None, 10_000
    for position, character in enumerate(text):
        if character in _FIGURES:
            if figure:  # two figures without a place between them
                return None
            figure = _FIGURES[character]
            continue
        place = _PLACES[character]
        if place >= last or (figure is None and not (place == 10 and position == 0)):
            return None
        total, figure, last = total + (figure if figure is not None else 1) * place, None, place
    return total + (figure or 0)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE | re.DOTALL | re.MULTILINE | re.VERBOSE)
