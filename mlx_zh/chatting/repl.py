"""The chat at the terminal: reading messages, answering, and the slash commands."""

from __future__ import annotations

import contextlib
import difflib
import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from mlx_zh.chatting.chatbot import Answer, Chatbot
from mlx_zh.chatting.terminal import Screen, side_by_side, text_width, unechoed_keys, wrap
from mlx_zh.chatting.transcript import Transcript
from mlx_zh.errors import MlxZhError
from mlx_zh.language.translation import in_readers_language
from mlx_zh.models.generate import Statistics
from mlx_zh.system.crashes import record_crash
from mlx_zh.system.interrupts import stop_on_interrupt

# Command -> usage, Chinese and English description, method of Repl.
COMMANDS = {
    "/help": ("/help", "显示帮助", "show this help", "help"),
    "/system": ("/system [TEXT|none]", "查看或设置系统提示", "show or set the system prompt", "system"),
    "/reset": ("/reset", "清空对话", "start over; the system prompt stays", "reset"),
    "/retry": ("/retry", "重新回答上一个问题", "answer the last question again", "retry"),
    "/undo": ("/undo", "撤回上一轮问答", "take back the last exchange", "undo"),
    "/temp": ("/temp [NUMBER]", "温度，0 为不随机", "show or set temperature; 0 is greedy", "temp"),
    "/think": ("/think [MODE]", "是否先思考再回答", "think first: on, off or auto", "think"),
    "/save": ("/save FILE", "把对话存为 JSON", "save the conversation as JSON", "save"),
    "/load": ("/load FILE", "载入存下的对话", "load a saved conversation", "load"),
    "/adapter": ("/adapter [DIR|none]", "更换或卸下适配器", "show, change or remove the adapter", "adapter"),
    "/compare": ("/compare", "微调前后并排回答", "base and tuned answers side by side", "compare"),
    "/exit": ("/exit", "退出", "leave (or Ctrl-D)", "leave"),
}
KEYS = (
    ("Enter", "发送", "send"),
    ("Alt+Enter, \\ Enter", "换行", "new line"),
    ('"""…"""', "多行文本，空行也可以", "a block of lines"),
    ("Ctrl-C", "中止回答（不退出）", "stop the answer, not the program"),
    ("↑ ↓, Ctrl-R", "历史记录，搜索", "history, search"),
    ("Tab", "补全命令", "complete a command"),
    ("Ctrl-X Ctrl-E", "用 $EDITOR 编辑", "edit in $EDITOR"),
)
# A Chinese input method writes ／ or 、 for the key of "/", and may write wide letters and a wide space after it.
_COMMAND = re.compile(r"[/／、]([^\W\d]\w*)(?:\s+(.*))?", re.DOTALL)
# What other chat programs call these commands, and Chinese names.
_OTHER_NAMES = {
    "/exit": ("/quit", "/q", "/bye", "/close", "/退出", "/再见"),
    "/help": ("/h", "/commands", "/帮助"),
    "/reset": ("/clear", "/new", "/清空", "/重置"),
    "/retry": ("/regenerate", "/regen", "/again", "/重试"),
    "/undo": ("/back", "/撤回", "/撤销"),
    "/temp": ("/temperature", "/温度"),
    "/think": ("/thinking", "/思考"),
    "/save": ("/export", "/保存"),
    "/load": ("/open", "/载入"),
    "/adapter": ("/lora", "/适配器"),
    "/compare": ("/diff", "/对比", "/比较"),
    "/system": ("/prompt", "/系统"),
}
_MODES = {"on": "on", "off": "off", "auto": "auto", "开": "on", "关": "off", "自动": "auto"}
_SYNONYMS = {other: name for name, others in _OTHER_NAMES.items() for other in others}


@dataclass
class Repl:
    """One chat."""

    bot: Chatbot
    screen: Screen
    read: Callable[[], str]  # returns the next message; raises EOFError at the end
    transcript: Transcript = field(default_factory=Transcript)
    _running: bool = True

    def run(self) -> None:
        """Read and answer until /exit or Ctrl-D. An error that the user causes is shown, and the chat goes on."""
        while self._running:
            try:
                text = self.read()
                if text.strip():
                    self.handle(text)
            except EOFError:
                break
            except KeyboardInterrupt:
                self.screen.note("Ctrl-D 或 /exit 退出 · leaves")
            except MlxZhError as problem:
                self.screen.error(str(problem))
            except (SystemExit, BrokenPipeError):
                raise
            except BaseException as problem:  # the chat goes on; libraries in Rust raise what is no Exception
                self.screen.error(in_readers_language(record_crash(problem)))

    def handle(self, text: str) -> None:
        """Run a command, or ask the model. Raises MlxZhError."""
        command = command_in(text)
        if command is None:
            self.transcript.ask(text)
            self._answer()
            return
        name, argument = command
        if name not in COMMANDS:
            near = nearest_command(name)
            hint = f"是不是 {near}？ maybe {near}?" if near else "见 /help · see /help"
            self.screen.error(f"没有命令 {name} · unknown command {name}; {hint}")
            return
        getattr(self, "_" + COMMANDS[name][3])(argument)

    def _answer(self) -> None:
        prompt = self._prompt()
        pieces = []
        with unechoed_keys(), stop_on_interrupt() as stopped:
            for piece in self.bot.stream(prompt, stopped):
                pieces.append(piece)
                self.screen.write(piece)
        text = "".join(pieces)
        if not text.endswith("\n") and text:
            self.screen.line()
        if text.strip():
            self.transcript.answer(text)
        else:
            self.screen.note("（没有回答 · no answer; /retry asks again）")
        self.screen.note(describe(self.bot.session.statistics))
        self.screen.line()

    def _prompt(self) -> list[int]:
        prompt, dropped = self.bot.fit(self.transcript)
        if dropped:
            self.screen.note(
                f"上下文已满，最早的 {dropped} 轮不再参考 · the context ({self.bot.context} tokens) is full: "
                f"the oldest {dropped} exchange{'s' if dropped > 1 else ''} left it"
            )
        return prompt

    def _help(self, _: str) -> None:
        rows = [row[:3] for row in COMMANDS.values()]
        self.screen.heading("命令 Commands")
        self._table(rows)
        self.screen.heading("按键 Keys")
        self._table(list(KEYS))

    def _table(self, rows: list[tuple[str, str, str]]) -> None:
        first, second = (max(text_width(row[i]) for row in rows) + 2 for i in (0, 1))
        narrow = 2 + first + second + max(text_width(row[2]) for row in rows) >= self.screen.width
        for usage, chinese, english in rows:
            left = "  " + usage + " " * (first - text_width(usage))
            if narrow:
                lines = wrap(f"{chinese}\n{english}", max(20, self.screen.width - text_width(left)))
                self.screen.line(left + ("\n" + " " * text_width(left)).join(lines))
            else:
                self.screen.line(left + chinese + " " * (second - text_width(chinese)) + english)

    def _system(self, text: str) -> None:
        if text:
            self.transcript.system = None if text.lower() == "none" else text
        self.screen.note(f"system: {self.transcript.system or 'none'}")

    def _reset(self, _: str) -> None:
        self.transcript.reset()
        self.screen.note("对话已清空 · the conversation is empty")

    def _retry(self, _: str) -> None:
        if self.transcript.retract_answer():
            self._answer()
        else:
            self.screen.error("nothing to retry: no question has been asked")

    def _undo(self, _: str) -> None:
        if not self.transcript.undo():
            self.screen.error("nothing to undo: the conversation is empty")
            return
        left = math.ceil(len(self.transcript.turns) / 2)
        self.screen.note(f"已撤回一轮，余 {left} 轮 · one exchange taken back, {left} left")

    def _temp(self, text: str) -> None:
        if text:
            self.bot.sampling = replace(self.bot.sampling, temperature=temperature(text))
        self.screen.note(f"temperature: {self.bot.sampling.temperature:g}")

    def _think(self, text: str) -> None:
        if text:
            self.bot.renderer = self.bot.renderer.with_thinking(thinking_mode(text))
        self.screen.note(f"thinking: {self.bot.renderer.mode}")

    def _save(self, text: str) -> None:
        path = _path(text, "/save FILE")
        count = self.transcript.save(path)
        self.screen.note(f"已保存 {count} 条消息 · saved to {path}")
        if self.transcript.pending:
            self.screen.note("最后一个问题还没有回答，没有保存 · the last question has no answer and was left out")

    def _load(self, text: str) -> None:
        path = _path(text, "/load FILE")
        self.transcript = Transcript.load(path)
        waiting = "; the last question waits: /retry answers it" if self.transcript.pending else ""
        self.screen.note(f"已载入 {len(self.transcript.turns)} 条消息 · loaded {path}{waiting}")

    def _adapter(self, text: str) -> None:
        if text:
            self.bot.swap(None if text.lower() == "none" else _path(text, "/adapter DIR"))
        self.screen.note(f"adapter: {self.bot.adapter or 'none'}")

    def _compare(self, _: str) -> None:
        if not self.transcript.turns:
            self.screen.error("nothing to compare: ask something first")
            return
        prompt = self._prompt()
        try:
            with unechoed_keys(), stop_on_interrupt() as stopped:
                base, tuned = self.bot.compare(
                    prompt, stopped, lambda name, done: self.screen.progress(f"{name}: {done} tokens …")
                )
        finally:
            self.screen.done()
        self._show(("微调前 base", base), (f"微调后 tuned ({(self.bot.adapter or Path()).name})", tuned))

    def _show(self, left: tuple[str, Answer], right: tuple[str, Answer]) -> None:
        texts = [side[1].text.strip() or "（没有回答 · no answer）" for side in (left, right)]
        rows = side_by_side(texts[0], texts[1], self.screen.width, (left[0], right[0]))
        for row in rows or []:
            self.screen.line(row)
        for (heading, answer), text in zip((left, right), texts, strict=True):
            if rows is None:
                self.screen.heading(heading)
                self.screen.line(text)
            self.screen.note(describe(answer.statistics, heading.split()[1] if rows else ""))

    def _leave(self, _: str) -> None:
        self._running = False


def command_in(text: str) -> tuple[str, str] | None:
    """The command in a message, as `/name`, and what follows it; None where the message is for the model."""
    match = _COMMAND.fullmatch(text)
    if match is None:
        return None
    name = "/" + unicodedata.normalize("NFKC", match[1]).lower()
    if not name.isascii() and name not in _SYNONYMS:
        return None
    return name, (match[2] or "").strip()


def nearest_command(name: str) -> str | None:
    """The command that someone who typed `name` most likely means, or None."""
    if name in _SYNONYMS:
        return _SYNONYMS[name]
    if completed := [command for command in COMMANDS if command.startswith(name)]:
        return completed[0]
    near = difflib.get_close_matches(name, [*COMMANDS, *_SYNONYMS], 1)
    return _SYNONYMS.get(near[0], near[0]) if near else None


def describe(statistics: Statistics, name: str = "") -> str:
    """The line below an answer: tokens, speed, and how it ended."""
    parts = [
        f"{statistics.generated} tokens",
        f"{statistics.tokens_per_second:.1f} tokens/s",
        f"first after {statistics.seconds_to_first:.2f} s",
        f"prompt {statistics.prompt_new} new + {statistics.prompt_cached} cached",
    ]
    if statistics.reason == "length":
        parts.append("已达长度上限 cut off")
    elif statistics.reason == "stopped":
        parts.append("已中止 stopped")
    return (f"{name}: " if name else "") + " · ".join(parts)


def temperature(text: str) -> float:
    """A temperature, 0 to 10, from text. Raises MlxZhError."""
    with contextlib.suppress(ValueError):
        value = float(text)
        if 0 <= value <= 10:
            return value
    raise MlxZhError(f"the temperature must be a number from 0 (greedy) to 10, got {text!r}")


def thinking_mode(text: str) -> str:
    """A mode of thinking (on, off or auto) from text. Raises MlxZhError."""
    mode = _MODES.get(unicodedata.normalize("NFKC", text).strip().lower())
    if mode is None:
        raise MlxZhError(f"thinking is on, off or auto, got {text!r}")
    return mode


def _path(text: str, usage: str) -> Path:
    if not text:
        raise MlxZhError(f"a path is missing: {usage}")
    path = Path(text.strip("'\""))
    try:
        return path.expanduser()
    except RuntimeError as problem:  # ~NAME of a user who does not exist
        raise MlxZhError(f"{path}: there is no user of that name; write the folder out") from problem
