"""The chat's feedback and settings: commands, files, and what a terminal shows. The answers come from a script."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_zh.chatting import feedback
from mlx_zh.chatting.chatbot import Chatbot
from mlx_zh.chatting.commands import COMMANDS, command_in
from mlx_zh.chatting.completion import completer
from mlx_zh.chatting.feedback import Given, Origin
from mlx_zh.chatting.pair_view import PairView
from mlx_zh.chatting.repl import Repl
from mlx_zh.chatting.statistics_line import describe
from mlx_zh.chatting.terminal import Screen, Wrapper, edit_text, text_width, wrap
from mlx_zh.chatting.transcript import Transcript
from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.formats import load_conversations
from mlx_zh.corpus.preferences import load_preferences
from mlx_zh.errors import AdapterError, DataError, MlxZhError
from mlx_zh.models.generate import Sampling, Statistics

PROMPT = [Message("user", "你好")]


@dataclass
class ScriptedBot:
    """Gives the answers of `script`, one after the other."""

    script: list[str]
    sampling: Sampling = field(default_factory=Sampling)
    stages: dict[str, Path] = field(default_factory=dict)
    adapter: Path | None = None
    origin: Origin | None = None
    seed: int | None = None
    context: int = 2048
    drawn: list[float] = field(default_factory=list)  # the temperature of each answer
    loaded: Any = field(default_factory=lambda: SimpleNamespace(source="tiny"))
    session: Any = field(default_factory=lambda: SimpleNamespace(statistics=Statistics(3, 4, 5, 0.1, 20.0)))

    def fit(self, transcript: Transcript) -> tuple[list[int], int]:
        return [1], 0

    def stream(
        self, prompt: Sequence[int], stop: Callable[[], bool], sampling: Sampling | None = None
    ) -> Iterator[str]:
        used = sampling or self.sampling
        self.drawn.append(used.temperature)
        self.origin = Origin("tiny", "none", "f", used, len(self.drawn))
        yield from self.script.pop(0)

    def set_seed(self, seed: int | None) -> None:
        self.seed = seed

    def name_of(self, folder: Path | None) -> str:
        return "none" if folder is None else folder.name


@pytest.fixture
def chat(tmp_path: Path) -> Any:
    """A chat that is fed with lines; `.say` returns what it shows."""
    lines: list[str] = []

    def read() -> str:
        if not lines:
            raise EOFError
        return lines.pop(0)

    bot: Any = ScriptedBot([])
    session: Any = Repl(
        bot, Screen(io.StringIO(), fixed_width=80), read, feedback=tmp_path / "run" / "feedback.jsonl"
    )

    def say(*texts: str, script: Sequence[str] = ()) -> str:
        lines.extend(texts)
        bot.script = list(script)
        session.screen.stream = io.StringIO()
        session.run()
        shown: str = session.screen.stream.getvalue()
        return shown

    session.say = say
    return session


def recorded(chat: Any) -> list[dict[str, Any]]:
    file = chat._judging.file
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def editor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Make EDITOR a program that changes its file; `text` is what it holds."""
    program = tmp_path / "my editor.py"
    program.write_text(
        f"import sys\nfrom pathlib import Path\nfile = Path(sys.argv[1])\ntext = file.read_text('utf-8')\n{code}\n"
    )
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", f"{sys.executable} '{program}'")


def test_nothing_is_recorded_unless_asked(chat: Any) -> None:
    chat.say("你好", "/retry", "/undo", "/feedback", script=["一", "二"])
    assert recorded(chat) == [] and not chat._judging.file.parent.exists()


def test_a_vote_records_the_conversation_and_where_the_answer_came_from(chat: Any) -> None:
    chat.transcript.system = "简短。"
    shown = chat.say("你好", "/good", "再见", "/bad", script=["好", "走"])
    assert "已记录：好 good" in shown and "已记录：不好 bad" in shown
    first, second = recorded(chat)
    assert first["prompt"] == [{"role": "system", "content": "简短。"}, {"role": "user", "content": "你好"}]
    assert [first[name] for name in ("kind", "version", "choice", "answers")] == ["feedback", 1, "good", ["好"]]
    assert [first[name] for name in ("model", "adapter", "fingerprint")] == ["tiny", "none", "f"]
    assert first["sampling"] == [{"temperature": 0.7, "top_p": 0.95, "max_tokens": 1024, "seed": 1}]
    assert first["time"].endswith("Z") and len(first["time"]) == 20
    assert [message["content"] for message in second["prompt"]] == ["简短。", "你好", "好", "再见"]
    assert (second["choice"], second["answers"]) == ("bad", ["走"])


@pytest.mark.parametrize(
    ("typed", "choice", "goes_on_with"),
    [
        ("1", 0, "甲"),
        ("2", 1, "乙"),
        ("２", 1, "乙"),
        ("both", "both", "甲"),
        ("N", "neither", "甲"),
        ("都不好", "neither", "甲"),
    ],
)
def test_better_compares_two_answers(chat: Any, typed: str, choice: str | int, goes_on_with: str) -> None:
    shown = chat.say("你好", "/better", "?", typed, script=["甲", "乙"])
    assert "请输入 1、2、b 或 n" in shown
    assert "甲                                     │ 乙" in shown
    (row,) = recorded(chat)
    assert (row["answers"], row["choice"]) == (["甲", "乙"], choice)
    assert [one["seed"] for one in row["sampling"]] == [1, 2]
    assert chat.transcript.turns == [Message("user", "你好"), Message("assistant", goes_on_with)]


def test_better_can_be_skipped_and_needs_another_answer(chat: Any) -> None:
    assert "没有记录" in chat.say("你好", "/better", "", script=["甲", "乙"])
    assert "已记录：第二个好 second" in chat.say("/better", "2", script=["甲", "甲", "丙"])
    assert chat.bot.drawn[-3:] == pytest.approx([0.7, 1.1, 1.5])
    assert [row["answers"] for row in recorded(chat)] == [["甲", "丙"]]
    assert "3 次都是同样的回答" in chat.say("/better", script=["丙", "丙", "丙"])
    chat.bot.sampling = replace(chat.bot.sampling, temperature=0)
    chat.say("/better", "", script=["丁"])
    assert chat.bot.drawn[-1] == 0.7  # greedy would say the same again
    chat.say("/better 1.3", "", script=["丁"])
    assert chat.bot.drawn[-1] == 1.3
    assert "must be a number" in chat.say("/better hot")
    assert len(recorded(chat)) == 1


def test_edit_records_what_the_answer_should_have_been(
    chat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor(tmp_path, monkeypatch, "assert text == '上海\\n'; file.write_text('北京\\n在北方\\n', 'utf-8')")
    chat.say("首都？", "/edit", "/good", script=["上海"])
    edited, good = recorded(chat)
    assert (edited["choice"], edited["answers"], edited["edited"]) == ("edited", ["上海"], "北京\n在北方")
    assert chat.transcript.turns[1].content == "北京\n在北方"
    assert (good["answers"], good["model"], good["sampling"]) == (["北京\n在北方"], None, [None])  # a person wrote it


@pytest.mark.parametrize("code", ["", "file.write_text(' \\n')"])
def test_an_edit_that_changes_nothing_is_not_recorded(
    chat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    editor(tmp_path, monkeypatch, code)
    assert "没有改动" in chat.say("首都？", "/edit", script=["上海"])
    assert recorded(chat) == [] and chat.transcript.turns[1].content == "上海"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("no-such-editor", "no-such-editor did not run: No such file"),
        ("'", "is no command"),
        (f"{sys.executable} -c 'raise SystemExit(3)'", "ended with status 3"),
        (f"{sys.executable} -c 'import sys; open(sys.argv[1], \"wb\").write(bytes([255]))'", "did not save UTF-8"),
    ],
)
def test_an_editor_that_fails(monkeypatch: pytest.MonkeyPatch, command: str, message: str) -> None:
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", command)
    with pytest.raises(MlxZhError, match=message):
        edit_text("a")


def test_only_its_owner_can_read_what_is_edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = tmp_path / "seen"
    editor(tmp_path, monkeypatch, f"Path({str(seen)!r}).write_text(oct(file.parent.stat().st_mode))")
    assert edit_text("a") == "a"
    assert stat.S_IMODE(int(seen.read_text(), 8)) == 0o700


def test_without_a_run_the_user_chooses_the_file(chat: Any, tmp_path: Path) -> None:
    chat._judging.file = None
    assert "no file for feedback is chosen yet" in chat.say("你好", "/good", script=["好"])
    mine = tmp_path / "my votes.jsonl"
    shown = chat.say(f"/feedback {mine}", "/good", "/feedback")
    assert "还没有评价" in shown and "1 条 rows: 好 good 1" in shown
    assert "SFT 1 · DPO 0 · KTO 1" in shown
    assert [row["choice"] for row in recorded(chat)] == ["good"]


def test_a_file_of_something_else_is_never_written_to(chat: Any, tmp_path: Path) -> None:
    notes, data = tmp_path / "notes.txt", tmp_path / "data.jsonl"
    notes.write_text("my notes")
    data.write_text('{"instruction": "a", "output": "b"}\n')
    for other in (notes, data, tmp_path):
        assert chat.say(f"/feedback {other}")
        assert chat._judging.file.name == "feedback.jsonl"
        chat._judging.file, before = other, chat._judging.file
        chat.say("你好", "/good", script=["好"])
        chat._judging.file = before
    assert notes.read_text() == "my notes" and data.read_text().count("\n") == 1


def test_what_cannot_be_judged_says_so(chat: Any) -> None:
    for command in ("/good", "/bad", "/better", "/edit"):
        assert "there is no answer to judge" in chat.say(command)
    chat.transcript = Transcript(None, [Message("user", "问"), Message("assistant", "答")])  # as /load leaves it
    chat.say("/good")
    assert recorded(chat)[0]["model"] is None


def test_the_functions_need_no_terminal(tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    origin = Origin("m", "sft", "f", Sampling(0.5, 0.9, 64), 3)
    first, second = Given("甲", origin), Given("乙", origin)
    feedback.good(file, PROMPT, first)
    feedback.bad(file, PROMPT, second)
    feedback.compared(file, PROMPT, (first, second), 1)
    feedback.edited(file, PROMPT, first, "丙")
    assert [c.messages[-1].content for c in load_conversations(file)[0]] == ["乙", "丙"]
    assert [(p.chosen, p.rejected) for p in load_preferences(file)[0]] == [("乙", "甲"), ("丙", "甲")]
    with pytest.raises(DataError, match=r"this cannot be recorded.*are the same"):
        feedback.compared(file, PROMPT, (first, first), 0)
    assert len(file.read_text("utf-8").splitlines()) == 4


def test_the_summary_fits_the_terminal(chat: Any) -> None:
    long = "很长的问题" * 30
    shown = chat.say(long, "/good", "/better", "1", "/feedback", script=["长回答" * 40, "b" * 90])
    last = shown[shown.index("条 rows") :]
    assert "SFT 1 · DPO 1 · KTO 2" in last
    assert max(text_width(line) for line in last.splitlines()) <= 80


# Settings


def test_settings_have_commands(chat: Any) -> None:
    assert "top-p: 0.5" in chat.say("/top-p 0.5") and chat.bot.sampling.top_p == 0.5
    assert "max tokens: 64" in chat.say("/max_tokens 64") and chat.bot.sampling.max_tokens == 64
    assert "seed: 5" in chat.say("/seed 5") and "seed: random" in chat.say("/seed none")
    assert "temperature: 0.2" in chat.say("/temperature ０.２") and chat.bot.sampling.temperature == 0.2
    for bad in ("/top-p 0", "/top-p 2", "/top-p x", "/max-tokens 0", "/max-tokens 1.5", "/max-tokens -3", "/seed -1"):
        assert "must be a" in chat.say(bad)
    assert (chat.bot.sampling.top_p, chat.bot.sampling.max_tokens) == (0.5, 64)


@pytest.mark.parametrize("leave", ["/quit", "/bye", "/exit", "/q", "、退出", "/再见"])
def test_a_chat_is_left_as_in_other_programs(chat: Any, leave: str) -> None:
    assert chat.say(leave, "never read") == "" and chat.transcript.turns == []
    chat._running = True
    chat.say()


def test_names_of_other_programs_work(chat: Any) -> None:
    chat.say("你好", script=["好"])
    assert "对话已清空" in chat.say("/clear") and chat.transcript.turns == []
    assert "命令 Commands" in chat.say("/?") and "命令 Commands" in chat.say("/？")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_read(name: str) -> None:
    assert command_in(name) == (name, "")
    assert command_in(name + " a b") == (name, "a b")


def test_markdown_is_written_for_md_files(chat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "chat.md"
    chat.transcript.system = "简短。"
    chat.say("你好\n世界", f"/save {file}", script=["# 好\n\n```\nx\n```"])
    english = file.read_text("utf-8")
    assert english.startswith(
        "<!-- mlx-zh chat -->\n\n# Chat\n\nModel tiny, adapter none\n\n## System prompt\n\n简短。"
    )
    assert english.endswith("## User\n\n你好\n世界\n\n## Assistant\n\n# 好\n\n```\nx\n```\n")
    monkeypatch.setenv("MLX_ZH_LANG", "zh")
    chat.say(f"/save {file}")
    assert "## 用户\n\n你好" in file.read_text("utf-8")
    (tmp_path / "notes.md").write_text("mine")
    assert "不是保存的对话" in chat.say(f"/save {tmp_path / 'notes.md'}")
    assert (tmp_path / "notes.md").read_text() == "mine"


@pytest.mark.parametrize("reason", ["end", "length", "stopped"])
@pytest.mark.parametrize("name", ["", "tuned"])
def test_statistics_take_one_line(reason: str, name: str) -> None:
    large = Statistics(123456, 1234567, 10240, 123.45, 1234.5, reason)
    line = describe(large, name, 80)
    assert text_width(line) <= 80 and "10240 tokens · 1234.5 tokens/s" in line
    assert ("cut off" in line, "stopped" in line) == (reason == "length", reason == "stopped")
    usual = describe(Statistics(46, 1200, 512, 0.42, 45.2), "", 80)
    assert usual == "512 tokens · 45.2 tokens/s · first after 0.42 s · prompt 46 new + 1200 cached"


# The terminal


def test_words_are_not_cut_while_an_answer_is_written() -> None:
    wrapper = Wrapper(10)
    assert [wrapper.feed(piece) for piece in ("hel", "lo wor", "ld, 你", "好。世界")] == [
        "",
        "hello ",
        "\nworld, ",
        "你\n好。世",
    ]
    assert wrapper.finish() == "界\n" and wrapper.rows == 3


@given(
    st.text(alphabet="ab 你好。，\n(wo)r-,", max_size=80),
    st.integers(4, 20),
    st.lists(st.integers(1, 5), max_size=40),
)
def test_wrapped_text_keeps_every_character_however_it_arrives(text: str, width: int, cuts: list[int]) -> None:
    streamed, whole = Wrapper(width), Wrapper(width)
    shown, rest = "", text
    for cut in cuts:
        shown, rest = shown + streamed.feed(rest[:cut]), rest[cut:]
    shown += streamed.feed(rest) + streamed.finish()
    assert shown == whole.feed(text) + whole.finish()
    assert "".join(shown.split()) == "".join(text.split())
    assert max(map(text_width, shown.split("\n"))) <= width
    assert streamed.rows == shown.count("\n")


def test_wrapping_while_writing_agrees_with_wrapping_at_once() -> None:
    text = "苹果公司发布了 Apple silicon 芯片，用 Python 训练模型。一家人\n\n  indented " * 5
    wrapper = Wrapper(24)
    shown = wrapper.feed(text) + wrapper.finish()
    assert [line.rstrip() for line in shown.removesuffix("\n").split("\n")] == wrap(text, 24)


class Terminal(io.StringIO):
    """A terminal that understands what the program uses: moving up, and clearing to the end."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        shown = [""]
        for part in self.getvalue().replace("\r", "").split("\x1b["):
            number = "".join(c for c in part[:3] if c.isdigit())
            rest = part[len(number) :]
            if rest.startswith("A") and number:
                row = len(shown) - 1 - int(number)
                assert row >= 0, "the cursor has left the screen"
                shown = [*shown[:row], ""]
                rest = rest[1:]
            elif rest.startswith("J"):
                rest = rest[1:]
            first, *others = rest.split("\n")
            shown[-1] += first
            shown += others
        return shown


def view(width: int, height: int) -> tuple[PairView, Terminal]:
    terminal = Terminal()
    screen = Screen(terminal, live=True, fixed_width=width, fixed_height=height)
    screen.line("before")
    return PairView(screen, ("左 base", "右 dpo")), terminal


def test_two_answers_are_written_one_after_the_other_and_end_side_by_side() -> None:
    pair, terminal = view(80, 24)
    for index, text in enumerate(("一个比较长的回答。" * 8, "short")):
        pair.show(index, "")
        for letter in text:
            pair.show(index, letter)
    assert terminal.lines()[:2] == ["before", "左 base"] and "右 dpo" in terminal.lines()
    pair.finish("一个比较长的回答。" * 8, "short")
    shown = terminal.lines()
    assert shown[0] == "before" and shown[1].startswith("左 base ") and shown[1].endswith("│ 右 dpo")
    assert len(shown) == 1 + 2 + 4 + 1 and shown[-1] == ""  # 8 * 18 columns in columns of 38 are 4 lines
    assert "".join(shown).count("short") == 1


@pytest.mark.parametrize(("width", "height"), [(60, 24), (80, 6)])
def test_answers_that_do_not_fit_side_by_side_stay_as_they_were_written(width: int, height: int) -> None:
    pair, terminal = view(width, height)
    long = "一个比较长的回答。" * 12
    pair.show(0, long)
    pair.show(1, "short")
    before = terminal.lines()
    pair.finish(long, "short")
    assert before[-2:] == ["右 dpo", ""]  # the word waits for its end
    assert terminal.lines() == [*before[:-1], "short", ""]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("/sa", ["/save"]),
        ("/adapter ", ["sft", "dpo", "none"]),
        ("/adapter d", ["dpo"]),
        ("/compare sft d", ["dpo"]),
        ("/save {folder}/ch", ["at.json"]),
        ("/load {folder}/ch", ["at.json"]),
        ("/feedback {folder}/ch", ["at.json"]),
        ("/temp {folder}/ch", []),
        ("你好 ", []),
    ],
)
def test_tab_completes_commands_paths_and_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, expected: list[str]
) -> None:
    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.document import Document

    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "chat.json").touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    complete = completer(sorted(COMMANDS), ["sft", "dpo"])
    document = Document(typed.format(folder=tmp_path / "files"))
    assert [one.text for one in complete.get_completions(document, CompleteEvent())] == expected


# Adapters by name


def test_adapters_have_the_names_of_stages(tmp_path: Path) -> None:
    bot = Chatbot.__new__(Chatbot)
    bot.stages = {"sft": tmp_path / "sft"}
    assert bot.named("sft") == bot.named(" SFT") == tmp_path / "sft"
    assert bot.named("none") is None and bot.named("base") is None
    assert bot.named("~") == Path(os.path.expanduser("~"))
    assert bot.name_of(tmp_path / "sft") == "sft" and bot.name_of(None) == "none"
    with pytest.raises(AdapterError, match="no adapter of dpo here; /adapter takes sft, none or a folder"):
        bot.named("dpo")


def test_errors_of_the_chat_are_in_the_readers_language(chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_ZH_LANG", "zh")
    shown = chat.say("/good", "/retry", "/temp 20", "/save")
    assert all(text in shown for text in ("没有可以重答的问题", "温度必须是 0", "缺少路径：/save FILE")), shown
    assert "there is no answer" not in shown
