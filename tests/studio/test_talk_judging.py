"""What a reader of the Talk page says of answers, in the file of feedback as `prepare` reads it; and the arena."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_zh.corpus.formats import load_conversations
from mlx_zh.corpus.labelled import load_labelled
from mlx_zh.corpus.preferences import load_preferences
from mlx_zh.errors import DataError, StorageError, StudioError
from mlx_zh.exams.statistics import wilson
from mlx_zh.judging.agreement import votes_of
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.studio.blind import BlindArena
from mlx_zh.studio.conversation import Column, Judge, comparable, diverged, split_reasoning
from mlx_zh.studio.safe_markdown import LONGEST, safe_html
from mlx_zh.studio.talker import Settings

SETTINGS = Settings(system="请简短。")


def answered(columns: Sequence[Column], question: str, *answers: str, reason: str = "end") -> None:
    """Ask all columns, and let each give its answer in pieces, as the model's process does."""
    for column, answer in zip(columns, answers, strict=True):
        column.ask(question, SETTINGS, 7)
        column.heard({"is": "begin", "id": 1, "first": column.transcript.first, "dropped": 0, "thinks": False})
        for piece in answer:
            column.heard({"is": "piece", "id": 1, "text": piece})
        sampling = {"temperature": 0.7, "top_p": 0.95, "max_tokens": 512}
        origin = {"model": "m", "adapter": column.stage, "fingerprint": f"f-{column.stage}", "sampling": sampling}
        statistics = {"reason": reason, "generated": len(answer)}
        column.heard({"is": "end", "id": 1, "statistics": statistics, "origin": {**origin, "seed": 7}})


def columns_of(run: Path, *stages: str) -> list[Column]:
    return [Column(run, stage, stage.upper()) for stage in stages]


def pairs(file: Path) -> list[tuple[str, str]]:
    """Chosen and rejected, as DPO learns them."""
    return [(pair.chosen, pair.rejected) for pair in load_preferences(file)[0]]


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_the_better_answer_of_three_is_preferred_to_each_other_one(tmp_path: Path) -> None:
    columns, file = columns_of(tmp_path, "base", "sft", "dpo"), tmp_path / "feedback.jsonl"
    answered(columns, "老镇长是谁？", "不知道。", "叫王冬。 Welcome!", "叫王冬。")
    assert Judge(file).better(columns, 2) == 2
    assert pairs(file) == [("叫王冬。", "不知道。"), ("叫王冬。", "叫王冬。 Welcome!")]
    first = rows(file)[0]
    assert first["prompt"] == [{"role": "system", "content": "请简短。"}, {"role": "user", "content": "老镇长是谁？"}]
    assert (first["adapter"], first["fingerprint"], first["sampling"][1]["seed"]) == ("dpo", "f-dpo", 7)
    Judge(file).take_back(columns, 2)
    with pytest.raises(DataError, match="taken back"):
        pairs(file)
    Judge(file).better(columns, 1)  # another choice counts
    assert pairs(file) == [("叫王冬。 Welcome!", "不知道。"), ("叫王冬。 Welcome!", "叫王冬。")]


def test_good_bad_and_an_edit_become_data_and_can_be_taken_back(tmp_path: Path) -> None:
    [column], file = columns_of(tmp_path, "sft"), tmp_path / "feedback.jsonl"
    judge = Judge(file)
    answered([column], "你好", "您好！")
    answer = column.answers[-1]
    judge.say(answer, "good")
    assert [one.messages[-1].content for one in load_conversations(file)[0]] == ["您好！"]
    judge.say(answer, "bad")
    assert [(one.messages[-1].content, one.label) for one in load_labelled(file)[0]] == [("您好！", False)]
    judge.say(answer, "bad")  # pressed again
    with pytest.raises(DataError, match="taken back"):
        load_labelled(file)
    with pytest.raises(StudioError, match="nothing was changed"):
        judge.edit(column, " 您好！")
    judge.edit(column, "你好呀！")
    assert pairs(file) == [("你好呀！", "您好！")]
    assert column.transcript.turns[-1].content == "你好呀！"


def test_a_vote_that_was_taken_back_is_no_vote_for_the_agreement_of_judges(tmp_path: Path) -> None:
    columns, file = columns_of(tmp_path, "base", "sft"), tmp_path / "feedback.jsonl"
    answered(columns, "问", "甲", "乙")
    Judge(file).better(columns, 1)
    assert [choice for _, choice in votes_of(file)] == [1]
    Judge(file).take_back(columns, 1)
    assert votes_of(file) == []


def test_only_whole_answers_to_the_same_conversation_are_compared(tmp_path: Path) -> None:
    columns, judge = columns_of(tmp_path, "base", "sft"), Judge(tmp_path / "feedback.jsonl")
    answered(columns, "一", "甲", "甲")
    assert not comparable(columns) and not diverged(columns)
    answered(columns, "二", "甲", "乙")
    assert comparable(columns)
    answered(columns, "三", "丙", "丁")  # after different answers
    assert not comparable(columns) and diverged(columns)
    with pytest.raises(StudioError, match="different conversations"):
        judge.better(columns, 0)
    columns[0].go_on_from(columns[1])
    answered(columns, "四", "丙", "丁")
    assert comparable(columns)
    answered(columns, "五", "丙", "丁", reason="stopped")
    assert not comparable(columns)
    with pytest.raises(StudioError, match="broken off"):
        judge.say(columns[0].answers[-1], "good")


def test_a_question_without_an_answer_is_asked_again_or_replaced(tmp_path: Path) -> None:
    [column] = columns_of(tmp_path, "sft")
    column.ask("一", SETTINGS, 1)
    column.failed("the process ended")
    assert column.ask("二", SETTINGS, 1).turns == [("user", "二")] and len(column.answers) == 1
    column.stopped()
    assert column.retract() == "二" and column.retract() is None
    answered([column], "\ud800三", "好")
    assert [turn.content for turn in column.transcript.turns] == ["\ufffd三", "好"]


@pytest.mark.parametrize(
    ("text", "thinks", "parts"),
    [
        ("答", False, ("", "答", False)),
        ("<think>\n想\n</think>\n\n答", False, ("想", "答", False)),
        ("<think>\n想", False, ("想", "", True)),
        ("想\n</think>\n答", True, ("想", "答", False)),
        ("想", True, ("想", "", True)),
        ("a </think> b", False, ("", "a </think> b", False)),
    ],
)
def test_reasoning_stands_apart(text: str, thinks: bool, parts: tuple[str, str, bool]) -> None:
    assert split_reasoning(text, thinks) == parts


def arena_at(tmp_path: Path, seed: int = 5) -> BlindArena:
    first, second = columns_of(tmp_path / "tiny", "base", "sft")
    return BlindArena(RunFolder(tmp_path / "tiny"), (first, second), seed=seed)


def test_votes_of_the_blind_arena_count_for_the_model_behind_the_letter(tmp_path: Path) -> None:
    arena, orders = arena_at(tmp_path), []
    for number in range(12):
        arena.next()
        answered(arena.columns, f"问题{number}", "甲", f"乙{number}")
        orders.append(arena.swapped)
        arena.vote("A" if arena.swapped else "B")  # always for SFT, wherever it stands
    assert 2 < sum(orders) < 10
    contest = arena.tally()
    assert (contest.won, contest.lost, contest.interval) == (12, 0, wilson(12, 12)) and not contest.noise
    assert pairs(arena.run.feedback) == [(f"乙{number}", "甲") for number in range(12)]
    lines = rows(arena.folder.answers)
    assert [line["order"] == [1, 0] for line in lines] == orders and {line["order_seed"] for line in lines} == {5}
    again = arena_at(tmp_path)
    assert again.tally() == contest  # another visit
    for order in orders:  # the seed gives the order again
        again.next()
        assert again.swapped == order


def test_the_last_vote_of_the_arena_is_taken_back_and_given_anew(tmp_path: Path) -> None:
    arena = arena_at(tmp_path)
    with pytest.raises(StudioError, match="no vote"):
        arena.undo()
    arena.next()
    with pytest.raises(StudioError, match="complete"):
        arena.vote("A")
    answered(arena.columns, "问", "甲", "乙")
    arena.vote("both")
    with pytest.raises(StudioError, match="recorded already"):
        arena.vote("A")
    assert arena.tally().tied == 1
    arena.undo()
    assert (arena.tally().tied, votes_of(arena.run.feedback)) == (0, [])
    arena.vote("B" if arena.swapped else "A")
    assert (arena.tally().lost, arena.tally().won) == (1, 0) and pairs(arena.run.feedback) == [("甲", "乙")]
    arena.next()
    answered(arena.columns, "问", "甲", "甲 ")
    with pytest.raises(StudioError, match="the same"):
        arena.vote("A")


def test_votes_on_an_adapter_that_was_trained_again_do_not_count(tmp_path: Path) -> None:
    arena = arena_at(tmp_path)
    arena.next()
    answered(arena.columns, "问", "甲", "乙")
    arena.vote("A")
    arena.next()
    answered(arena.columns, "问", "甲", "丙")
    answer = arena.columns[1].answers[-1]
    assert answer.origin is not None
    object.__setattr__(answer.origin, "fingerprint", "another")
    assert arena.tally().won + arena.tally().lost == 0


TAGS = {
    "p",
    "br",
    "h3",
    "h4",
    "h5",
    "h6",
    "hr",
    "pre",
    "code",
    "small",
    "blockquote",
    "ul",
    "ol",
    "li",
    "div",
    "table",
}
TAGS |= {"tr", "th", "td", "strong", "em", "del", "a"}


class Reader(HTMLParser):
    """Checks what a browser would see: known tags, no attributes but those of links and numbers, all closed."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.open = "", list[str]()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS
        for name, value in attributes:
            assert (tag, name) in {("a", "href"), ("a", "target"), ("a", "rel"), ("ol", "start")}
            assert name != "href" or (value or "").startswith(("http://", "https://"))
        if tag not in ("br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError("a comment")


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(safe_html(text))
    reader.close()
    assert not reader.open
    return reader


PIECES = ["<script>", "</div>", "<img src=x onerror=alert(1)>", "[a](javascript:x)", "![p](https://e.f/p.png)", "```"]
PIECES += [
    "`",
    "**",
    "*",
    "~~",
    "\n",
    "- ",
    "1. ",
    "> ",
    "# ",
    "|",
    "|-|-|",
    "&lt;",
    '"',
    "'",
    '[b](https://a.b/"onclick=)',
]
PIECES += ["\u202e", "\x1b[2J", "你好", "_", "   ", "<!--", "](", "http://c.d", "\\", "---"]


@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=40).map("".join))
def test_no_text_of_a_model_becomes_html(text: str) -> None:
    read(text)


def test_markdown_looks_as_written() -> None:
    html = safe_html(
        "# 题\n**粗** *斜* `a<b` [x](https://a.b)\n\n1. 一\n   - 二\n2. 三\n\n|a|b|\n|-|-|\n|1|2|\n\n```py\n<b>\n```"
    )
    assert html == (
        "<h3>题</h3><p><strong>粗</strong> <em>斜</em> <code>a&lt;b</code> "
        '<a href="https://a.b" target="_blank" rel="noopener noreferrer nofollow">x</a></p>'
        "<ol><li>一<ul><li>二</li></ul></li><li>三</li></ol>"
        "<div><table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table></div>"
        "<small>py</small><pre><code>&lt;b&gt;</code></pre>"
    )
    assert (
        read("[k](javascript:alert(1)) <b>x</b> ![p](https://e.f/p.png)").text
        == "[k](javascript:alert(1)) <b>x</b> p"
    )
    assert "\u202e" not in safe_html("a\u202eb") and "\x1b" not in safe_html("\x1b[2J")
    assert safe_html("<" * (LONGEST + 1)) == "<pre>" + "&lt;" * (LONGEST + 1) + "</pre>"


def test_no_judgement_goes_through_a_link_out_of_the_run_folder(tmp_path: Path) -> None:
    theirs, run = tmp_path / "theirs", tmp_path / "run"
    theirs.write_text('{"half a line', encoding="utf-8")  # what a killed writer leaves is removed before a line
    run.mkdir()
    file = run / "feedback.jsonl"
    file.symlink_to(theirs)
    columns = columns_of(run, "base", "sft")
    answered(columns, "你好", "您好！", "哈喽")
    arena = BlindArena(RunFolder(run), (columns[0], columns[1]))
    for judge in (
        lambda: Judge(file).say(columns[0].answers[-1], "good"),
        lambda: Judge(file).better(columns, 1),
        lambda: Judge(file).take_back(columns, 1),
        lambda: Judge(file).edit(columns[0], "您好啊"),
        lambda: arena.vote("A"),
    ):
        with pytest.raises(StorageError, match="is a link out of the folder"):
            judge()
    assert theirs.read_text(encoding="utf-8") == '{"half a line'
    file.unlink()
    arena.folder.path.parent.mkdir()
    arena.folder.path.symlink_to(tmp_path)
    with pytest.raises(StorageError, match="is a link out of the folder"):
        arena.vote("A")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "theirs"]
    assert columns[0].answers[-1].said is None and arena.voted is None
