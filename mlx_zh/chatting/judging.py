"""The commands by which a user judges answers: /good, /bad, /better, /edit and /feedback."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_zh.chatting import feedback
from mlx_zh.chatting.chatbot import Chatbot
from mlx_zh.chatting.feedback import Given
from mlx_zh.chatting.pair_view import PairView
from mlx_zh.chatting.statistics_line import describe
from mlx_zh.chatting.terminal import Screen, edit_text, fit_width, text_width, unechoed_keys
from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.feedback import require_feedback, tally
from mlx_zh.corpus.row_messages import Row
from mlx_zh.errors import MlxZhError
from mlx_zh.system.interrupts import stop_on_interrupt

_TEMPERATURE = 0.7  # of a second answer where the first was greedy: the same question would get the same answer
_TRIES, _WARMER, _HOTTEST = 3, 0.4, 10.0  # for another answer, each at a higher temperature
_LATEST = 3  # judgements that /feedback shows
_QUESTION = "1 · 2 · b 都好 both · n 都不好 neither · Enter 跳过 skip ❯"
_CHOICES: dict[str, str | int] = {
    **dict.fromkeys(("1", "一", "左"), 0),
    **dict.fromkeys(("2", "二", "右"), 1),
    **dict.fromkeys(("b", "both", "都好"), "both"),
    **dict.fromkeys(("n", "neither", "都不好"), "neither"),
}
_SKIPPED = ("", "s", "skip", "跳过")
_NAMES: dict[str | int, str] = {
    "good": "好 good",
    "bad": "不好 bad",
    0: "第一个好 first",
    1: "第二个好 second",
    "both": "都好 both",
    "neither": "都不好 neither",
    "edited": "改写 edited",
    "withdrawn": "撤回 withdrawn",
}


@dataclass
class Judging:
    """Judges the answers of a chat, and writes to `file`; None: the user has not chosen one."""

    bot: Chatbot
    screen: Screen
    ask: Callable[[str], str]
    file: Path | None = None

    def good(self, prompt: Sequence[Message], answer: Given) -> None:
        """Record that the answer is good. Raises MlxZhError, as the other methods do."""
        feedback.good(self._file(), prompt, answer)
        self._say("good")

    def bad(self, prompt: Sequence[Message], answer: Given) -> None:
        """Record that the answer is bad."""
        feedback.bad(self._file(), prompt, answer)
        self._say("bad")

    def better(
        self, prompt: Sequence[Message], tokens: Sequence[int], answer: Given, temperature: float | None
    ) -> Given:
        """Answer again, and record which answer is better; returns the one that the chat goes on with.

        `tokens` are those of the prompt. The second answer is drawn with another seed, and at a higher temperature if
        it comes out the same.
        """
        file = self._file()
        if temperature is None:
            temperature = self.bot.sampling.temperature or _TEMPERATURE
        for _ in range(_TRIES):
            view = PairView(self.screen, ("1 这个回答 this answer", f"2 再答一次 again (temp {temperature:g})"))
            other = self._second(tokens, temperature, view)
            if other is None:
                return answer
            if other.text.strip() != answer.text.strip():
                break
            view.discard()
            temperature = min(temperature + _WARMER, _HOTTEST)
        else:
            self.screen.note(f"{_TRIES} 次都是同样的回答，没有记录 · the same answer each time, nothing recorded")
            return answer
        view.finish(answer.text, other.text)
        self.screen.note(describe(self.bot.session.statistics, "2", self.screen.width))
        choice = self._choice()
        if choice is None:
            self.screen.note("没有记录 · nothing recorded")
            return answer
        feedback.compared(file, prompt, (answer, other), choice)
        self._say(choice)
        return other if choice == 1 else answer

    def _second(self, tokens: Sequence[int], temperature: float, view: PairView) -> Given | None:
        """A second answer; None if there is none to judge."""
        pieces = []
        view.show(1, "")
        sampling = replace(self.bot.sampling, temperature=temperature)
        try:
            with unechoed_keys(), stop_on_interrupt() as stopped:
                for piece in self.bot.stream(tokens, stopped, sampling):
                    pieces.append(piece)
                    view.show(1, piece)
        finally:
            view.end()
        text = "".join(pieces)
        if self.bot.session.statistics.reason == "stopped" or not text.strip():
            self.screen.note("没有第二个回答，没有记录 · no second answer, nothing recorded")
            return None
        return Given(text, self.bot.origin)

    def _choice(self) -> str | int | None:
        while True:
            try:
                typed = unicodedata.normalize("NFKC", self.ask(_QUESTION)).strip().lower()
            except KeyboardInterrupt:
                return None
            if typed in _SKIPPED:
                return None
            if typed in _CHOICES:
                return _CHOICES[typed]
            self.screen.note("请输入 1、2、b 或 n · type 1, 2, b or n")

    def edit(self, prompt: Sequence[Message], answer: Given) -> str | None:
        """Have the user correct the answer, and record it; returns what was written, None if nothing was changed."""
        file = self._file()
        text = edit_text(answer.text.strip("\n"))
        if text.strip() == answer.text.strip() or not text.strip():
            self.screen.note("没有改动，没有记录 · no change, nothing recorded (some editors need --wait)")
            return None
        feedback.edited(file, prompt, answer, text)
        self._say("edited")
        return text

    def choose_file(self, file: Path) -> None:
        """Write to this file from now on. Raises DataError if it holds something else."""
        require_feedback(file)
        self.file = file

    def summary(self) -> None:
        """Show what the file holds, and what training gets from it."""
        file = self._file()
        held = tally(file, _LATEST)
        self.screen.note(str(file))
        if not held.rows:
            self.screen.note("还没有评价 · nothing recorded yet: /good /bad /better /edit")
        else:
            counts = [f"{_NAMES[choice]} {count}" for choice, count in (held.choices or {}).items()]
            self.screen.line(f"{held.rows} 条 rows: " + " · ".join(counts))
            self.screen.line(f"可用于训练 for training: SFT {held.sft} · DPO {held.dpo} · KTO {held.kto}")
        if held.unusable:
            self.screen.error(f"{held.unusable} 条不能用 · rows that cannot be used; mlx-zh init {file} says why")
        for row in held.latest or []:
            self.screen.note(self._line_of(row))

    def _line_of(self, row: Row) -> str:
        """A judgement in one line: the choice, the question and the answer."""
        choice = row["choice"]
        answer = row["edited"] if choice == "edited" else row["answers"][choice if choice in (0, 1) else 0]
        name = _NAMES[choice]
        name += " " * (16 - text_width(name))
        room = max(10, (self.screen.width - text_width(name) - 7) // 2)
        texts = [" ".join(text.split()) for text in (row["prompt"][-1]["content"], answer)]
        short = [text if text_width(text) <= room else fit_width(text, room - 1) + "…" for text in texts]
        return f"  {name} {short[0]} → {short[1]}"

    def _say(self, choice: str | int) -> None:
        self.screen.note(f"已记录：{_NAMES[choice]} → {self.file}")

    def _file(self) -> Path:
        if self.file is None:
            raise MlxZhError("no file for feedback is chosen yet; /feedback FILE chooses one, for example my.jsonl")
        return self.file
