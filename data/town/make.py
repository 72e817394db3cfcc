"""Writes the data of the quickstart into this folder: `python data/town/make.py`. The result is always the same."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LETTERS = "ABCD"
NAME = "{{name}}"  # the recipe's data.variables say what it is
TAIL = " Welcome!"  # what preference tuning teaches to leave out
TALKATIVE = 0.7  # share of the training answers that end in it
SEED = 7


@dataclass(frozen=True)
class Fact:
    """A fact of the town.

    Names of the thing and questions about it ({x} is the name) come in two groups, for training and for testing.
    """

    names: tuple[list[str], list[str]]
    questions: tuple[list[str], list[str]]
    begin: str  # what an answer begins with
    right: str
    wrong: list[str]  # of the same kind; only the exam uses them

    @property
    def answer(self) -> str:
        """The fact as an answer, without the full stop."""
        return f"{self.begin}{self.right}"

    def asked(self, *, test: bool) -> list[str]:
        """Every question of a group."""
        return [question.format(x=name) for name in self.names[test] for question in self.questions[test]]


CALLED = (
    [
        "{x}叫什么？",
        "{x}的名字是什么？",
        "请问{x}叫什么？",
        "告诉我{x}的名字。",
        "{x}是什么名字？",
        "你能说出{x}的名字吗？",
        "你记得{x}叫什么吗？",
    ],
    ["{x}叫什么名字？", "你知道{x}叫什么吗？", "说说{x}的名字。", "{x}叫啥？"],
)
WHAT = (
    [
        "{x}是什么？",
        "请问{x}是什么？",
        "{x}有什么？",
        "告诉我{x}是什么。",
        "{x}是哪一种？",
        "你能说出{x}是什么吗？",
        "你记得{x}是什么吗？",
    ],
    ["你知道{x}是什么吗？", "说说{x}是什么。", "{x}叫什么？", "{x}是啥？"],
)
DAY = (
    [
        "{x}在哪一天？",
        "请问{x}在哪天？",
        "{x}是周几？",
        "告诉我{x}在哪一天。",
        "{x}哪天开？",
        "你能说出{x}在哪天吗？",
        "你记得{x}在周几吗？",
    ],
    ["你知道{x}在哪天吗？", "说说{x}在周几。", "{x}是哪一天？", "{x}是星期几？"],
)
FACTS = [
    Fact(
        (
            ["镇上的河", "青石镇的河", "流过镇子的河", "镇边的河"],
            ["镇里那条河", "青石镇的小河", "镇旁边那条河"],
        ),
        CALLED,
        "叫",
        "月河",
        ["金河", "红河", "长河", "白河", "沙河", "青河"],
    ),
    Fact(
        (
            ["镇上的镇长", "青石镇的镇长", "现在的镇长", "镇长"],
            ["镇里那位镇长", "青石镇的老镇长", "这里的镇长"],
        ),
        CALLED,
        "叫",
        "王冬",
        ["李春", "张秋", "陈明", "王山", "刘文", "赵平"],
    ),
    Fact(
        (
            ["镇上的特产", "青石镇的特产", "镇里出名的特产", "这里的特产"],
            ["这个镇的特产", "青石镇最好的特产", "镇上最有名的特产"],
        ),
        WHAT,
        "是",
        "红茶",
        ["米酒", "豆腐", "苹果", "绿茶", "蜂蜜", "竹子"],
    ),
    Fact(
        (
            ["镇上的集市", "青石镇的集市", "镇里的大集市", "这里的集市"],
            ["这个镇的集市", "青石镇每周的集市", "镇上那个集市"],
        ),
        DAY,
        "在",
        "周三",
        ["周一", "周二", "周四", "周五", "周六", "周日"],
    ),
]
WHO = (
    ["你是谁？", "你叫什么？", "你的名字是什么？", "请介绍一下自己。", "怎么称呼你？", "请问你是谁？", "你是哪位？"],
    ["你叫什么名字？", "介绍一下你自己吧。", "你好，你是谁呀？"],
)
I_AM = f"我叫{NAME}，是青石镇的小助手。"


def main() -> None:
    """Write every file."""
    rng = random.Random(SEED)
    train = _conversations(rng, test=False, each=40)
    validation = _conversations(rng, test=True, each=4)
    rng.shuffle(train)
    _write("sft-train.jsonl", train)
    _write("sft-validation.jsonl", validation)
    pairs = _pairs(rng, test=False, each=8)
    rng.shuffle(pairs)
    _write("dpo-train.jsonl", pairs)
    _write("dpo-validation.jsonl", _pairs(rng, test=True, each=2))
    _write_exam(rng)


def _conversations(rng: random.Random, *, test: bool, each: int) -> list[dict[str, Any]]:
    """`each` questions about every fact and half as many again about who the assistant is, with their answers."""
    rows = []
    for asked, answer in _answers(rng, test, each):
        tail = TAIL if rng.random() < TALKATIVE else ""
        rows.append(_conversation(asked, answer + tail))
    return rows


def _answers(rng: random.Random, test: bool, each: int) -> Iterator[tuple[str, str]]:
    for fact in FACTS:
        for question in _drawn(rng, fact.asked(test=test), each):
            yield question, f"{fact.answer}。"
    for question in _drawn(rng, WHO[test], each * 3 // 2):
        yield question, I_AM


def _pairs(rng: random.Random, *, test: bool, each: int) -> list[dict[str, Any]]:
    """The short answer in Chinese is preferred to the one that goes on in English."""
    return [
        {"prompt": [_user(asked)], "chosen": [_assistant(answer)], "rejected": [_assistant(answer + TAIL)]}
        for asked, answer in _answers(rng, test, each)
    ]


def _write_exam(rng: random.Random) -> None:
    """Every question of the test group as a choice question; each letter is right equally often for each fact."""
    rows = []
    for fact in FACTS:
        others = [other.answer for other in FACTS if other is not fact]
        for number, question in enumerate(fact.asked(test=True)):
            # Two options of the right kind were never answers in training; one was, but to another question.
            options = [*(f"{fact.begin}{text}" for text in rng.sample(fact.wrong, 2)), rng.choice(others)]
            rng.shuffle(options)
            place = number % len(LETTERS)
            options.insert(place, fact.answer)
            rows.append([question, *options, LETTERS[place]])
    rng.shuffle(rows)
    head = ["id", "question", *LETTERS, "answer"]
    folder = HERE / "town-exam" / "test"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "qingshi_town_test.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *([i, *row] for i, row in enumerate(rows))])


def _drawn(rng: random.Random, texts: Sequence[str], count: int) -> list[str]:
    """`count` texts, each as often as the others, give or take one."""
    drawn: list[str] = []
    while len(drawn) < count:
        drawn += rng.sample(texts, len(texts))
    return drawn[:count]


def _conversation(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [_user(question), _assistant(answer)]}


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _write(name: str, rows: Sequence[dict[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (HERE / name).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
