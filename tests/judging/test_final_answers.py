"""The number that an answer states last: the table's own examples, and numbers written in every way."""

from __future__ import annotations

from fractions import Fraction

import hypothesis
import pytest
from hypothesis import strategies as st

from mlx_zh.judging.final_answers import final_number, same_number, table

EXAMPLES = [
    (entry.name, text, str(number))
    for part in (table().clean, table().statements, table().numbers)
    for entry in part
    for text, number in entry.examples.items()
]


def _value(text: str) -> Fraction | None:
    if text == "none":
        return None
    return Fraction(text[:-1]) / 100 if text.endswith("%") else Fraction(text)


@pytest.mark.parametrize(("entry", "text", "number"), EXAMPLES)
def test_the_examples_of_the_table(entry: str, text: str, number: str):
    assert final_number(text) == _value(number)


def test_every_entry_has_an_example():
    assert all(entry.examples for part in (table().clean, table().statements, table().numbers) for entry in part)


# Where answers put their result. No sentence has another number behind it.
SENTENCES = [
    "{}",
    "答案是 {}。",
    "答案：{}",
    "先算 3+4=7，再乘 2。\n所以最终答案为{}。",
    "\\boxed{{{}}}，用了 3 步",
    "#### {}",
    "= {}",
]
SENTENCES += [
    "The answer is {}.",
    "答案是 99。不对，应该是 {}。",
    "<think>也许是 5</think>\n**{}**",
    "3×4={}",
    "还剩 {} 个",
]


def _grouped(value: int) -> str:
    return f"{value:,}"


def _wide(value: int) -> str:
    return "".join(chr(ord(c) + 0xFEE0) for c in str(value))


WRITTEN = {
    "plain": str,
    "thousands": _grouped,
    "full-width": _wide,
    "decimal": lambda value: f"{value}.00",
    "as ten thousands": lambda value: (
        f"{value // 10_000}万{value % 10_000}" if value >= 10_000 and value % 10_000 else str(value)
    ),
    "LaTeX": lambda value: f"${value}$",
    "bold": lambda value: f"**{value}**",
    "unit": lambda value: f"{value} 元",
    "half of double": lambda value: f"{2 * value}/2",
}


@hypothesis.given(st.integers(0, 10**9), st.sampled_from(sorted(WRITTEN)), st.sampled_from(SENTENCES), st.booleans())
def test_a_number_is_read_however_it_is_written(value: int, form: str, sentence: str, negative: bool):
    negative = negative and form != "LaTeX" and form != "bold" and sentence != "3×4={}"
    text = sentence.format(("-" if negative else "") + WRITTEN[form](value))
    assert final_number(text) == (-value if negative else value)


def _in_chinese(value: int) -> str:
    """A numeral as it is read aloud, made from the right: an independent writer for the reader's test."""
    figures, places = "零一二三四五六七八九", ["", "十", "百", "千"]
    if value >= 10_000:
        high, low = divmod(value, 10_000)
        zero = "零" if low and (low < 1000) else ""
        return f"{_in_chinese(high)}万{zero}{_in_chinese(low) if low else ''}"
    text, zero = "", False
    for place in (3, 2, 1, 0):
        figure = value // 10**place % 10
        if figure:
            text += ("零" if zero and text else "") + figures[figure] + places[place]
            zero = False
        else:
            zero = True
    return text or "零"


@hypothesis.given(st.integers(0, 99_999_999), st.sampled_from(["{}", "答案是{}。", "所以等于{}", "结果为负{}"]))
def test_a_chinese_numeral_is_read(value: int, sentence: str):
    expected = -value if "负" in sentence else value
    assert final_number(sentence.format(_in_chinese(value))) == expected


@hypothesis.given(
    st.text(alphabet="0123456789.,/%-+=×^零一二十百千万亿点负分之答案是为：\\boxed{}() \n$#<think>", max_size=60)
)
def test_no_text_is_too_odd(text: str):
    number = final_number(text)
    assert number is None or isinstance(number, Fraction)


def test_a_fraction_without_an_end_may_be_rounded():
    third = Fraction(1, 3)
    assert same_number(Fraction(33, 100), third, "约 0.33")
    assert same_number(Fraction(3333, 10_000), third, "0.3333")
    assert not same_number(Fraction(3, 10), third, "0.3")  # one decimal is too few
    assert not same_number(Fraction(34, 100), third, "0.34")
    assert not same_number(Fraction(33, 100), Fraction(333, 1000), "0.33")  # 0.333 has an end: it must be met
