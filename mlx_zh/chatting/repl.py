"""The chat at the terminal: reading messages, answering, and the slash commands."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from mlx_zh.chatting import commands
from mlx_zh.chatting.chatbot import Chatbot, expanded
from mlx_zh.chatting.commands import COMMANDS, KEYS, command_in, nearest_command
from mlx_zh.chatting.feedback import Given
from mlx_zh.chatting.judging import Judging
from mlx_zh.chatting.markdown_export import MARKDOWN, save_markdown
from mlx_zh.chatting.pair_view import PairView
from mlx_zh.chatting.statistics_line import describe
from mlx_zh.chatting.terminal import Screen, Wrapper, text_width, unechoed_keys, wrap
from mlx_zh.chatting.transcript import Transcript
from mlx_zh.errors import MlxZhError
from mlx_zh.system.crashes import record_crash
from mlx_zh.system.interrupts import stop_on_interrupt

_ENDLESS = 1 << 30  # columns of what is no terminal


@dataclass
class Repl:
    """One chat. `feedback` is the file that judgements are written to; None: the user chooses one first."""

    bot: Chatbot
    screen: Screen
    read: Callable[[], str]  # returns the next message; raises EOFError at the end
    transcript: Transcript = field(default_factory=Transcript)
    ask: Callable[[str], str] | None = None  # returns the answer to a question; None: as a message is read
    feedback: Path | None = None
    _running: bool = True
    _given: dict[int, Given] = field(default_factory=dict)  # by turn: the model's answers of this chat
    _judging: Judging = field(init=False)

    def __post_init__(self) -> None:
        self._judging = Judging(self.bot, self.screen, self._question, self.feedback)

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
                self.screen.error(record_crash(problem))

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
        wrapper = Wrapper(self.screen.width if self.screen.live else _ENDLESS)
        try:
            with unechoed_keys(), stop_on_interrupt() as stopped:
                for piece in self.bot.stream(prompt, stopped):
                    pieces.append(piece)
                    self.screen.write(wrapper.feed(piece))
        finally:
            self.screen.write(wrapper.finish())
        text = "".join(pieces)
        if text.strip():
            self._answered(Given(text, self.bot.origin))
        else:
            self.screen.note("（没有回答 · no answer; /retry asks again）")
        self.screen.note(describe(self.bot.session.statistics, width=self.screen.width))
        self.screen.line()

    def _answered(self, given: Given) -> None:
        self.transcript.answer(given.text)
        self._given[len(self.transcript.turns) - 1] = given

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
            self.bot.sampling = replace(self.bot.sampling, temperature=commands.temperature(text))
        self.screen.note(f"temperature: {self.bot.sampling.temperature:g}")

    def _top_p(self, text: str) -> None:
        if text:
            self.bot.sampling = replace(self.bot.sampling, top_p=commands.top_p(text))
        self.screen.note(f"top-p: {self.bot.sampling.top_p:g}")

    def _max_tokens(self, text: str) -> None:
        if text:
            self.bot.sampling = replace(self.bot.sampling, max_tokens=commands.max_tokens(text))
        self.screen.note(f"max tokens: {self.bot.sampling.max_tokens}")

    def _seed(self, text: str) -> None:
        if text:
            self.bot.set_seed(commands.seed(text))
        chosen = "random" if self.bot.seed is None else str(self.bot.seed)
        last = "" if self.bot.origin is None else f" · 上一个回答 last answer: {self.bot.origin.seed}"
        self.screen.note(f"seed: {chosen}{last}")

    def _think(self, text: str) -> None:
        if text:
            self.bot.renderer = self.bot.renderer.with_thinking(commands.thinking_mode(text))
        self.screen.note(f"thinking: {self.bot.renderer.mode}")

    def _save(self, text: str) -> None:
        path = _path(text, "/save FILE")
        if path.suffix.lower() in MARKDOWN:
            count = save_markdown(self.transcript, path, self.bot.loaded.source, self.bot.name_of(self.bot.adapter))
        else:
            count = self.transcript.save(path)
        self.screen.note(f"已保存 {count} 条消息 · saved to {path}")
        if self.transcript.pending:
            self.screen.note("最后一个问题还没有回答，没有保存 · the last question has no answer and was left out")

    def _load(self, text: str) -> None:
        path = _path(text, "/load FILE")
        self.transcript = Transcript.load(path)
        self._given = {}
        waiting = "; the last question waits: /retry answers it" if self.transcript.pending else ""
        self.screen.note(f"已载入 {len(self.transcript.turns)} 条消息 · loaded {path}{waiting}")

    def _adapter(self, text: str) -> None:
        if text:
            self.bot.swap(self.bot.named(text))
        name = self.bot.name_of(self.bot.adapter)
        others = [known for known in (*self.bot.stages, "none") if known != name]
        self.screen.note(f"adapter: {name}" + ("" if text else f" (/adapter {' | '.join(others)} | DIR)"))

    def _compare(self, text: str) -> None:
        if not self.transcript.turns:
            self.screen.error("nothing to compare: ask something first")
            return
        folders = self._compared(text)
        headings = self._headings(folders)
        prompt = self._prompt()
        view = PairView(self.screen, headings)
        try:
            with unechoed_keys(), stop_on_interrupt() as stopped:
                answers = self.bot.compare(prompt, folders, stopped, view.show)
        except BaseException:
            view.end()
            raise
        view.finish(answers[0].text, answers[1].text)
        for heading, answer in zip(headings, answers, strict=True):
            self.screen.note(describe(answer.statistics, heading.split()[1], self.screen.width))

    def _compared(self, text: str) -> tuple[Path | None, Path | None]:
        """The two adapters to compare: those named; with one name, that and the loaded one; else base and loaded."""
        names = text.split()
        if len(names) > 2:
            raise MlxZhError(f"/compare takes two names at most, got {len(names)}: {text}")
        if len(names) == 2:
            first, second = (self.bot.named(name) for name in names)
        else:
            first, second = self.bot.named(names[0]) if names else None, self.bot.adapter
            if first == second and first is not None:
                first = None
        if first == second:
            known = ", ".join(["base", *self.bot.stages])
            raise MlxZhError(
                f"there is nothing to compare with: both are {self.bot.name_of(first)}; /compare A B takes two of "
                f"{known}, or folders of adapters"
            )
        return first, second

    def _headings(self, folders: tuple[Path | None, Path | None]) -> tuple[str, str]:
        def heading(folder: Path | None) -> str:
            if folder is None:
                return "微调前 base"
            name = self.bot.name_of(folder)
            return f"微调后 {name if name in self.bot.stages else f'tuned ({folder.name})'}"

        return heading(folders[0]), heading(folders[1])

    def _good(self, _: str) -> None:
        self._judging.good(self.transcript.question, self._last())

    def _bad(self, _: str) -> None:
        self._judging.bad(self.transcript.question, self._last())

    def _better(self, text: str) -> None:
        last = self._last()
        warmth = commands.temperature(text) if text else None
        chosen = self._judging.better(self.transcript.question, self._prompt(), last, warmth)
        self._replace(chosen)

    def _edit(self, _: str) -> None:
        text = self._judging.edit(self.transcript.question, self._last())
        if text is not None:
            self._replace(Given(text))
            self.screen.note("对话从改写后的回答继续 · the chat goes on with what you wrote")

    def _feedback(self, text: str) -> None:
        if text:
            self._judging.choose_file(expanded(text))
        self._judging.summary()

    def _last(self) -> Given:
        """The last answer. Raises MlxZhError if there is none."""
        turns = self.transcript.turns
        if not turns or self.transcript.pending:
            raise MlxZhError("there is no answer to judge: ask something first")
        given, text = self._given.get(len(turns) - 1), turns[-1].content
        return given if given is not None and given.text == text else Given(text)

    def _replace(self, given: Given) -> None:
        self.transcript.retract_answer()
        self._answered(given)

    def _question(self, question: str) -> str:
        if self.ask is not None:
            return self.ask(question)
        self.screen.note(question)
        return self.read()

    def _leave(self, _: str) -> None:
        self._running = False


def _path(text: str, usage: str) -> Path:
    if not text:
        raise MlxZhError(f"a path is missing: {usage}")
    return expanded(text)
