"""The terminal speaks the reader's language: every sentence of the code has one Chinese wording."""

from __future__ import annotations

import errno
import os
import re
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from sentences import WARNINGS, example
from wcwidth import wcswidth
from wordings import PACKAGE, sentences

from mlx_zh import cli
from mlx_zh.errors import StorageError
from mlx_zh.language import system_errors, translation
from mlx_zh.language.catalogue import Language, catalogue
from mlx_zh.language.notice import Notice
from mlx_zh.language.reader import reader_language
from mlx_zh.language.translation import in_readers_language, literals, wordings
from mlx_zh.system import console
from mlx_zh.system.arguments import wrapped
from mlx_zh.system.storage import storage_errors

CHINESE = re.compile("[\u4e00-\u9fff]")


@pytest.mark.parametrize(
    ("environment", "language"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_TW.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "MLX_ZH_LANG": "en"}, "en"),
        ({"LANG": "en_US.UTF-8", "MLX_ZH_LANG": "ZH"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "MLX_ZH_LANG": ""}, "zh"),
    ],
)
def test_the_environment_names_the_language(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], language: Language
) -> None:
    for name in ("MLX_ZH_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert reader_language() == language


def test_every_sentence_of_the_code_has_a_chinese_wording() -> None:
    missing = {text: place for text, place in sentences().items() if text not in wordings()}
    assert not missing


def test_every_wording_is_of_a_sentence_in_the_code() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    said = sentences()
    texts = [text.strip("[]") for text in wordings()]  # of a label, `[time]`, the word
    stale = [text for text in texts if text not in said and max(literals(text), key=len).strip() not in code]
    assert not [text for text in stale if text not in ARGPARSE]


# What argparse itself says.
ARGPARSE = {
    "options",
    "positional arguments",
    "show this help message and exit",
    "the following arguments are required: {0}",
    "unrecognized arguments: {0}",
}


@pytest.mark.parametrize(("english", "chinese"), wordings().items())
def test_a_wording_has_the_same_fields_and_says_their_values(english: str, chinese: str) -> None:
    names = [sorted(name for _, name, _, _ in string.Formatter().parse(side) if name) for side in (english, chinese)]
    assert names[0] == names[1]
    assert names[0] == [str(number) for number in range(len(names[0]))], "a field once in each wording"
    values = [f"<{name}>" for name in names[0]]
    assert in_readers_language(english.format(*values), "zh") == chinese.format(*values)


def test_no_english_sentence_is_there_twice() -> None:
    text = (translation.files("mlx_zh.language") / "console.yaml").read_text(encoding="utf-8")
    keys = [key.value for key, _ in yaml.compose(text).value]
    assert len(keys) == len(set(keys)) == len(wordings())


def test_a_label_is_translated_only_in_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_ZH_LANG", "zh")
    assert console.table([("total", "memory")], indent="") == "合计  内存"
    assert "memory" in in_readers_language("memory must be a list, found 3.", "zh"), "here it is a key's name"
    monkeypatch.setenv("MLX_ZH_LANG", "en")
    assert console.table([("total", "memory")], indent="") == "total  memory"


@pytest.fixture
def small_table(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        "{0} cannot be read ({1}). Download it again.": "无法读取 {0}（{1}）。请重新下载。",
        "the file is damaged": "文件已损坏",
        "{0} is not a key; did you mean {1}?": "{0} 不是配置项；您是不是要写 {1}？",
        "Check the network.": "请检查网络。",
        "{0} is {1}.": "{0} 是 {1}。",
    }
    monkeypatch.setattr(translation, "wordings", lambda: table)
    translation._table.cache_clear()
    yield
    translation._table.cache_clear()


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("a.gguf cannot be read (bad magic). Download it again.", "无法读取 a.gguf（bad magic）。请重新下载。"),
        (
            "a.gguf cannot be read (the file is damaged). Download it again.",
            "无法读取 a.gguf（文件已损坏）。请重新下载。",
        ),
        ("'lr' is not a key; did you mean 'x?'?", "'lr' 不是配置项；您是不是要写 'x?'？"),
        (
            "recipe.yaml, line 3: 'lr' is not a key; did you mean 'x'?",
            "recipe.yaml, line 3: 'lr' 不是配置项；您是不是要写 'x'？",
        ),
        ("It failed. Check the network.", "It failed. 请检查网络。"),
        ("Check the network. It failed.", "请检查网络。It failed."),
        ("one line\nCheck the network.", "one line\n请检查网络。"),
        ("x is y.", "x 是 y。"),
        ("x is y. And more", "x 是 y。And more"),
        ("nothing of this is known", "nothing of this is known"),
        ("你好", "你好"),
        ("", ""),
    ],
)
@pytest.mark.usefixtures("small_table")
def test_sentences_within_and_beside_sentences(english: str, chinese: str) -> None:
    assert in_readers_language(english, "zh") == chinese
    assert in_readers_language(english, "en") == english


@given(st.text(max_size=300))
def test_any_text_comes_out_whole(text: str) -> None:
    assert in_readers_language(text, "en") == text
    if not any("a" <= letter.lower() <= "z" for letter in text):
        assert in_readers_language(text, "zh") == text


def test_a_long_text_is_translated_in_linear_time() -> None:
    text = "{0} of {1} is ".join(f"x{i}. " for i in range(20_000))
    assert len(in_readers_language(text, "zh")) >= len(text) // 2


def test_a_notice_is_worded_by_its_code() -> None:
    notice = Notice("no-locks", folder="runs/x")
    assert in_readers_language(notice, "zh") == notice.text("zh") != str(notice)


@pytest.mark.parametrize("code", WARNINGS)
def test_a_notice_within_a_sentence_is_worded_too(code: str) -> None:
    notice = example(code)
    shown = in_readers_language(f"runs/x: {notice}", "zh")
    names = [name for _, name, _, _ in string.Formatter().parse(catalogue()[code].en) if name]
    if len(notice) - sum(len(f"<{name}>") for name in names) >= 12 and len(names) == len(set(names)):
        words = [text.strip("，。：； ") for text in literals(catalogue()[code].zh) if CHINESE.search(text)]
        assert words[0] in shown


def test_help_and_errors_of_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLX_ZH_LANG", "zh")
    with pytest.raises(SystemExit):
        cli.main(["sft", "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("用法：mlx-zh sft [-h]")
    assert "显示帮助并退出" in shown and "usage" not in shown
    with pytest.raises(SystemExit) as stop:
        cli.main(["stf"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("错误：没有名为 'stf' 的阶段；可选：init")


@given(st.text(alphabet="ab 中文，。", max_size=80), st.integers(4, 30))
def test_wrapped_lines_fit_and_keep_every_word(text: str, width: int) -> None:
    lines = list(wrapped(text, width))
    assert "".join("".join(lines).split()) == "".join(text.split())
    for line in lines:
        assert wcswidth(line) <= width or not re.search(r"\s|[中文][中文]", line)


def test_no_line_begins_with_a_stop() -> None:
    assert list(wrapped("一二三四，五六", 8)) == ["一二三", "四，五六"]


@pytest.mark.parametrize("number", system_errors.CHINESE)
def test_the_reason_that_the_system_gives_is_chinese_too(number: int, tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught, storage_errors(tmp_path / "数据"):
        raise OSError(number, os.strerror(number))
    told = in_readers_language(str(caught.value), "zh").replace(str(tmp_path), "")
    assert not re.search("[A-Za-z]", told), told
    assert in_readers_language(os.strerror(number), "zh") == system_errors.CHINESE[number]


def test_an_error_of_the_system_within_a_longer_text_is_left() -> None:
    text = f"row 3 says {os.strerror(errno.EACCES)} and more"
    assert in_readers_language(text, "zh") == text
