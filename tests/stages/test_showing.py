"""Rows at the console: what is learned stands out, and no character is invisible or moves the cursor."""

from __future__ import annotations

import sys
from collections.abc import Callable

import hypothesis
import pytest
from hypothesis import strategies as st

from mlx_zh.corpus.conversation import Conversation, Message, Preference
from mlx_zh.stages.showing import in_colour, painted, plain_segments, visible
from mlx_zh.system.redaction import printable

ROLES = {"system": "系统：", "user": "用户：", "assistant": "助手：", "chosen": "好：", "rejected": "差："}
ITEM = Conversation((Message("user", "你好"), Message("assistant", "您好")), "a:1")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes stdout a terminal; called in the test, because pytest changes stdout after the fixtures."""

    def make() -> None:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.delenv("NO_COLOR", raising=False)

    return make


def test_what_is_learned_is_green_and_the_rest_dim(terminal: Callable[[], None]) -> None:
    terminal()
    assert painted([("你好", False), ("您好", True)]) == "\x1b[2m你好\x1b[0m\x1b[32m您好\x1b[0m"


def test_no_color_is_respected(terminal: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal()
    assert in_colour()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not in_colour()
    assert painted([("你好", False), ("您好", True)]) == "你好⟦您好⟧"


def test_roles_stand_before_what_they_say() -> None:
    assert painted(plain_segments(ITEM, ROLES)) == "用户： 你好\n助手： ⟦您好⟧"
    pair = Preference((Message("user", "你好"),), "您好", "滚", "a:1")
    assert painted(plain_segments(pair, ROLES)) == "用户： 你好\n好： ⟦您好⟧\n差： 滚"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("一\n二\t三", "一\n二\t三"),
        ("a\x00b", "a␀b"),
        ("\x1b[8m藏", "␛[8m藏"),
        ("\r\n", "␍\n"),
        ("\x7f\x85", "␡<U+0085>"),
        ("abc\u202edef\u200b", "abc<U+202E>def<U+200B>"),
        ("\ue000", "<U+E000>"),
        ("👨\u200d👩", "👨\u200d👩"),
    ],
)
def test_control_characters_are_shown(text: str, shown: str) -> None:
    assert visible(text) == shown


@hypothesis.given(st.text())
def test_nothing_in_a_row_reaches_the_terminal_as_a_control_character(text: str) -> None:
    shown = visible(text)
    assert not any(ord(c) < 32 and c not in "\n\t" for c in shown)
    assert "\x1b" not in shown and printable(shown).count("\ufffd") == text.count("\ufffd")
