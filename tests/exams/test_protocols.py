"""Prompts to the character, written out by hand from the programs that the benchmarks are published with."""

from __future__ import annotations

from typing import get_args

import pytest

from mlx_zh.corpus.conversation import Message
from mlx_zh.exams.csvfile import Question
from mlx_zh.exams.protocols import protocols
from mlx_zh.recipe import Evaluate

SHOTS = (
    Question("0", "水的化学式是____。", ("H2O", "CO2", "O2", "N2"), "A"),
    Question("1", "1+1等于", ("1", "2", "3", "4"), "B"),
)
ASKED = Question("7", " 下列属于{哺乳}动物的是\n", ("鲨鱼", "海豚", "青蛙", "企鹅 "), "B")

# hkust-nlp/ceval, evaluators/llama.py: generate_few_shot_prompt and format_example.
OFFICIAL_CEVAL = """以下是中国关于自然考试的单项选择题，请选出其中的正确答案。

水的化学式是____。
A. H2O
B. CO2
C. O2
D. N2
答案：A

1+1等于
A. 1
B. 2
C. 3
D. 4
答案：B

 下列属于{哺乳}动物的是

A. 鲨鱼
B. 海豚
C. 青蛙
D. 企鹅 
答案："""

# haonan-li/CMMLU, src/mp_utils.py: gen_prompt and format_example.
OFFICIAL_CMMLU = """以下是关于自然的单项选择题，请直接给出正确答案的选项。

题目：水的化学式是____。
A. H2O
B. CO2
C. O2
D. N2
答案是：A

题目：1+1等于
A. 1
B. 2
C. 3
D. 4
答案是：B

题目： 下列属于{哺乳}动物的是

A. 鲨鱼
B. 海豚
C. 青蛙
D. 企鹅 
答案是："""

# EleutherAI/lm-evaluation-harness: description, then doc_to_text (the question stripped), " ", the letter, "\n\n".
HARNESS_CEVAL = """以下是中国关于自然的单项选择题，请选出其中的正确答案。

水的化学式是____。
A. H2O
B. CO2
C. O2
D. N2
答案： A

1+1等于
A. 1
B. 2
C. 3
D. 4
答案： B

下列属于{哺乳}动物的是
A. 鲨鱼
B. 海豚
C. 青蛙
D. 企鹅 
答案："""
HARNESS_CMMLU = HARNESS_CEVAL.replace(
    "以下是中国关于自然的单项选择题，请选出其中的正确答案。", "以下是关于自然的单项选择题，请直接给出正确答案的选项。"
)


@pytest.mark.parametrize(
    ("protocol", "form", "expected"),
    [
        ("official", "ceval", OFFICIAL_CEVAL),
        ("official", "cmmlu", OFFICIAL_CMMLU),
        ("lm-eval", "ceval", HARNESS_CEVAL),
        ("lm-eval", "cmmlu", HARNESS_CMMLU),
    ],
)
def test_text_prompts(protocol: str, form: str, expected: str):
    assert protocols()[protocol].text(form, "自然", SHOTS, ASKED) == expected


def test_without_worked_examples_the_header_stays():
    # C-Eval's README: "k is 0 in the zero-shot case" of the same prompt; CMMLU's gen_prompt with num_few_shot=0.
    assert protocols()["official"].text("ceval", "自然", (), SHOTS[1]) == (
        "以下是中国关于自然考试的单项选择题，请选出其中的正确答案。\n\n1+1等于\nA. 1\nB. 2\nC. 3\nD. 4\n答案："
    )
    assert protocols()["official"].text("cmmlu", "自然", (), SHOTS[1]) == (
        "以下是关于自然的单项选择题，请直接给出正确答案的选项。\n\n题目：1+1等于\nA. 1\nB. 2\nC. 3\nD. 4\n答案是："
    )


def test_the_harness_scores_a_blank_and_a_letter():
    assert protocols()["lm-eval"].continuation.format(answer="C") == " C"
    assert protocols()["official"].continuation.format(answer="C") == "C"


def test_chat_has_ceval_s_system_message_and_shots_as_turns():
    # hkust-nlp/ceval, evaluators/chatgpt.py: generate_few_shot_prompt and format_example.
    assert protocols()["chat"].messages("ceval", "自然", SHOTS, ASKED) == [
        Message("system", "你是一个中文人工智能助手，以下是中国关于自然考试的单项选择题，请选出其中的正确答案。"),
        Message(
            "user",
            "以下是中国关于自然考试的单项选择题，请选出其中的正确答案。\n\n"
            "水的化学式是____。\nA. H2O\nB. CO2\nC. O2\nD. N2\n答案：",
        ),
        Message("assistant", "A"),
        Message("user", "1+1等于\nA. 1\nB. 2\nC. 3\nD. 4\n答案："),
        Message("assistant", "B"),
        Message("user", " 下列属于{哺乳}动物的是\n\nA. 鲨鱼\nB. 海豚\nC. 青蛙\nD. 企鹅 \n答案："),
    ]


@pytest.mark.parametrize("protocol", ["zero-shot-chat", "generate"])
def test_zero_shot_chat_is_one_question(protocol: str):
    # hkust-nlp/ceval, evaluators/chatgpt.py: eval_subject with few_shot=False.
    assert protocols()[protocol].shots == 0
    assert protocols()[protocol].messages("ceval", "自然", (), SHOTS[1]) == [
        Message("system", "你是一个中文人工智能助手，以下是中国关于自然考试的单项选择题，请选出其中的正确答案。"),
        Message(
            "user",
            "以下是中国关于自然考试的单项选择题，请选出其中的正确答案。\n\n1+1等于\nA. 1\nB. 2\nC. 3\nD. 4\n答案：",
        ),
    ]
    # haonan-li/CMMLU, src/llama3.py: the whole prompt as one user message.
    assert protocols()[protocol].messages("cmmlu", "自然", (), SHOTS[1]) == [
        Message(
            "user",
            "以下是关于自然的单项选择题，请直接给出正确答案的选项。\n\n"
            "题目：1+1等于\nA. 1\nB. 2\nC. 3\nD. 4\n答案是：",
        ),
    ]


def test_cloze_shows_no_options_and_scores_their_texts():
    cloze = protocols()["cloze"]
    assert cloze.messages("ceval", "自然", SHOTS[1:], ASKED) == [
        Message("system", "请用中文回答。"),
        Message("user", "1+1等于"),
        Message("assistant", "2"),
        Message("user", " 下列属于{哺乳}动物的是\n"),
    ]
    assert cloze.messages("cmmlu", "自然", (), ASKED) == cloze.messages("ceval", "自然", (), ASKED)
    assert cloze.candidates(ASKED) == ("鲨鱼", "海豚", "青蛙", "企鹅")
    assert protocols()["chat"].candidates(ASKED) == ("A", "B", "C", "D")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("C", "C"),
        ("B. 海豚", "B"),
        ("(D) 企鹅", "D"),
        ("\n  A\n", "A"),
        ("选C", "C"),
        ("选项 D 是对的", "D"),
        ("答案是B。", "B"),
        ("答案是：C", "C"),
        ("答案：A", "A"),
        ("答案为选项D", "D"),
        ("答案应该是 B", "B"),
        ("这道题的答案选C", "C"),
        ("正确的一项是B", "B"),
        ("正确选项是D", "D"),
        ("故选A。", "A"),
        ("因此选项C正确", "C"),
        ("所以B选项正确", "B"),
        ("只有D符合题意", "D"),
        ("The correct answer is C.", "C"),
        ("答案是A。不，再想想，答案是B。", "B"),  # the last match of a rule
        ("Answer: D", "D"),  # and not the A that it begins with
        ("", None),
        ("我不知道", None),
        ("也许A或B", None),
        ("Animals such as dolphins", None),
        ("答案是CO2", None),  # a formula is no letter
        ("Because of this", None),
    ],
)
def test_a_letter_is_found_by_rule_or_not_at_all(answer: str, letter: str | None):
    assert protocols()["generate"].letter_in(answer) == letter


def test_the_recipe_offers_exactly_these_protocols():
    assert set(get_args(Evaluate.model_fields["protocol"].annotation)) == set(protocols())


def test_every_protocol_says_where_it_is_from_and_in_which_version():
    for protocol in protocols().values():
        assert protocol.version >= 1
        assert any(named in protocol.source for named in ("ceval", "`chat`", "lm_eval"))
        assert set(protocol.forms) == {"ceval", "cmmlu"}
    assert len({protocol.fingerprint() for protocol in protocols().values()}) == len(protocols())
