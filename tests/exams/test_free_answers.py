"""The letter that is read off a free answer: the table's own examples, what a reader takes, and CMMLU's extractor."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from mlx_zh.exams.free_answers import Rule, free_answer_letter, free_answer_rules

DOCS = Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"
EXAMPLES = [(rule.name, text, letter) for rule in free_answer_rules().all() for text, letter in rule.examples.items()]


@pytest.mark.parametrize(("rule", "text", "letter"), EXAMPLES)
def test_the_examples_of_the_table(rule: str, text: str, letter: str):
    assert (free_answer_letter(text) or "none") == letter


def test_every_rule_has_an_example():
    assert all(rule.examples for rule in free_answer_rules().all())


def _documented(rule: Rule) -> str:
    text, letter = next(iter(rule.examples.items()))
    return f"| {rule.says} | `` {text} `` | {letter} |".replace("\n", "⏎")


def test_the_documents_show_the_rules_with_their_first_examples():
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    first = lines.index(_documented(free_answer_rules().rules[0]))
    expected = [_documented(rule) for rule in free_answer_rules().rules]
    assert lines[first : first + len(expected)] == expected
    assert lines[first + len(expected)] == ""


# What a reader takes from each.
READ = {
    "A": [
        "Ａ",
        "a",
        "答案：A",
        "正确答案A",
        "故选A。",
        "A：台湾岛",
        "答案是：\nA. 台湾岛",
        "the answer is a.",
        "A. dolphin",
        "答案是A，因为B、C、D都错",
        "答案是A，B错误",
        "本题答案为A",
        r"答案为 \textbf{A}",
        "答案是A,B错在忽略了条件",
    ],
    "B": [
        "答案：Ｂ",
        "选 B",
        "选项B正确",
        "B. 文本",
        "B、海豚",
        "B海豚",
        "B（海豚）",
        "Ⓑ",
        "𝐁",
        "b",
        '{"answer": "B"}',
        "Option B",
        "A、C、D均不符合题意，故B",
        "B。因为海豚用肺呼吸，而A是鱼，C是两栖动物，D是鸟。",
        "选B，A、C错误。",
        "答案是B不是A",
        "B\n\n解析：A选项错误，C选项错误，D选项错误。",
        "答案：B\n解析：A错误，因为……；C、D也不对。",
        "不选A，选B",
        "It is B",
        "A. 鲨鱼是鱼类；B. 海豚是哺乳动物；C. 青蛙是两栖类。因此，正确答案是B。",
        "### 答案\nB",
        "<think>\n答案是A</think>\n答案是B",
        "首先，A选项描述的是鱼类，不符合题意。其次，B选项描述的是海豚，符合题意。综上，选B。",
        r"根据题意，答案是 $B$。",
        "**答案**：B",
        "答案是A。不对，应该是B。",
        "The answer is A. Wait, actually it's B.",
    ],
    "C": [
        "c。",
        "答案是【C】",
        "A和B都不对，选C",
        "排除A、B、D，选C",
        "答案在B和C之间，我选C",
        "I would choose C.",
        "故正确答案为C",
        "在A、B、C、D四个选项中，正确的是C",
        "A，B，C，D四个选项中，C最合适",
        "答案不是A，也不是B，而是C",
        "C is the correct answer",
        "A项正确，B项正确，C项错误，D项正确，故选C。",
        "The answer is C because A and B are wrong.",
        "说法不正确的是C",
        "答案是A……等等，重新计算，答案应为C。",
        "A选项不能选，故选C",
        "\\mathrm{C}",
    ],
    "D": [
        "D.",
        "选d",
        "答案选 D 项",
        "答案选（Ｄ）",
        "A、B、C都错，只有D对",
        "答案不是A或B，而是D",
        r"\boxed{D. 企鹅}",
        "最终答案是：\n\n$$\\boxed{D}$$",
        "D because penguins are birds",
        "The best answer is **D**.",
        "因此正确选项为 D。",
    ],
    "none": [
        "",
        "我不知道",
        "我无法回答这个问题",
        "以上都不对",
        "A,B,C,D",
        "A/B/C/D",
        "答案是A、C",
        "答案：ACD",
        "选A、B",
        "多选题，选ABD",
        "Both A and B",
        "Banana",
        "Because",
        "答案是DNA",
        "维生素C",
        "答案是苹果（Apple）",
        "除了C，其他都错",
        "答案是第二个选项",
        "<think>答案是A",
        "答案不是B",
        "A项正确，B项正确，C项错误，D项正确。",
        "The answer could be A or B",
        "A man walked",
        "The answer is neither A nor B",
        "给出的选项有A、B、C、D",
        "选项A：鲨鱼；选项B：海豚；选项C：青蛙；选项D：企鹅",
        "1. A\n2. B",
        "答案是A还是B？我不确定",
        "I'm not sure",
        "C语言",
        "答案是B超",
        "答案是A，B",
        "B不是正确答案",
        "A不能选",
        "没有选A的理由",
        "选B还是选C？",
        "I would not choose B",
    ],
}


@pytest.mark.parametrize(("letter", "text"), [(letter, text) for letter, texts in READ.items() for text in texts])
def test_what_a_reader_takes(letter: str, text: str):
    assert (free_answer_letter(text) or "none") == letter


# What extract_choice of CMMLU (src/mp_utils.py at d6e7b71) returned for each text; "random" is its guess.
SAME_AS_CMMLU = {
    "A": "A",
    "C. 青蛙": "C",
    "答案是B": "B",
    "答案是：C": "C",
    "答案为选项D": "D",
    "答案选项为 A": "A",
    "故选C。": "C",
    "选择B": "B",
    "B选项正确": "B",
    "正确的选项是D": "D",
    "答案应该是A": "A",
    "选项C正确": "C",
    "选择答案 D": "D",
    "答案：B": "B",
    "只有A符合题意": "A",
    "答案选项：C": "C",
    "经分析，B最终当选": "B",
    "那么是：D": "D",
    "我认为B更好": "B",
    "正确的是C": "C",
    "答案选B": "B",
    "答案：\nB": "B",
    "（B）": "B",
    "**A**": "A",
    "【答案】D": "D",
    r"\boxed{B}": "B",
    "答案不是A，而是B": "B",
    "The answer is (C)": "C",
}
# Where we differ on purpose: it takes the first capital of a word or list, and guesses where there is no letter.
OTHER_THAN_CMMLU = {
    "A和C不合题意，B正确": ("A", "B"),
    "A和B都不对，选C": ("A", "C"),
    "A. 错误 B. 正确 C. 错误": ("A", "B"),
    "A项正确，B项正确": ("A", "none"),
    "答案是A或B": ("A", "none"),
    "ABCD": ("A", "none"),
    "Apple": ("A", "none"),
    "Banana": ("B", "none"),
    "答案是CO2": ("C", "none"),
    "答案为维生素C": ("C", "none"),
    "Ｄ": ("random", "D"),
    "b": ("random", "B"),
    "不知道": ("random", "none"),
}


@pytest.mark.parametrize(("text", "letter"), SAME_AS_CMMLU.items())
def test_as_cmmlu_s_own_extractor(text: str, letter: str):
    assert free_answer_letter(text) == letter


@pytest.mark.parametrize(("text", "theirs", "letter"), [(t, *both) for t, both in OTHER_THAN_CMMLU.items()])
def test_other_than_cmmlu_s_own_extractor(text: str, theirs: str, letter: str):
    assert (free_answer_letter(text) or "none") == letter != theirs


OPTIONS = ("鲨鱼", "海豚", "C语言", "青蛙")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("海豚", "B"),
        ("海豚。", "B"),
        ("**青蛙**", "D"),
        ("C语言", "C"),
        ("答案是海豚。", "B"),
        ("海豚和青蛙", None),
        ("企鹅", None),
        ("D. 海豚", "D"),  # the letter counts, whatever stands beside it
    ],
)
def test_an_option_s_text_alone_gives_its_letter(text: str, letter: str | None):
    assert free_answer_letter(text, OPTIONS) == letter


def test_an_option_that_is_there_twice_gives_no_letter():
    assert free_answer_letter("海豚", ("海豚", "海豚", "鱼", "鸟")) is None


PIECES = [
    *"ABCDabcdＡ（）()[]{}【】*、，。：？\n ",
    *("答案", "是", "选", "选项", "不是", "而是", "应该", "和", "或", "正确", "错", "如果", "所以"),
    *("<think>", "</think>", "\\boxed{", "answer ", "海豚", "\ud800", "\u202e"),
]


@hypothesis.given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join) | st.text(max_size=60))
def test_any_text_gives_a_letter_that_it_names(text: str):
    letter = free_answer_letter(text, OPTIONS)
    assert letter is None or letter in "ABCD"


@pytest.mark.parametrize("letter", "ABCD")
@pytest.mark.parametrize(
    "frame", ["{}", "**{}**", "（{}）", "答案是{}", "【答案】{}", "\\boxed{{{}}}", "故选{}。", "Answer: {}"]
)
def test_no_letter_is_favoured(frame: str, letter: str):
    for written in (letter, letter.lower(), chr(ord(letter) + 0xFEE0)):
        assert free_answer_letter(frame.format(written)) == letter
