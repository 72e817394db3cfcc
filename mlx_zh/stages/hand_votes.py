"""Choosing by hand, in the terminal: two answers to a prompt in a hidden order, and 1, 2, both or neither."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass

from mlx_zh.corpus.samples import Sampled
from mlx_zh.errors import DataError
from mlx_zh.judging.verdicts import Vote
from mlx_zh.system import console
from mlx_zh.system.escaping import without_controls

_KEYS = {
    **dict.fromkeys(("1", "１", "一"), "1"),
    **dict.fromkeys(("2", "２", "二"), "2"),
    **dict.fromkeys(("b", "both", "3", "都好", "都行"), "both"),
    **dict.fromkeys(("n", "neither", "0", "都不好", "都不行"), "neither"),
    **dict.fromkeys(("s", "skip", "跳过", ""), "skip"),
    **dict.fromkeys(("q", "quit", "退出"), "quit"),
}


@dataclass(frozen=True)
class Voter:
    """Asks a person; `read` returns a line, and raises EOFError at the end of the input."""

    read: Callable[[str], str]

    @staticmethod
    def at_terminal() -> Voter:
        """The person at the terminal. Raises DataError if there is none."""
        if not sys.stdin.isatty():
            raise DataError("--by hand asks at a terminal, and the input is none. Use --by rule or --by judge there.")
        return Voter(input)

    def ask(self, sampled: Sampled, title: str) -> Vote | None:
        """The vote on two different answers to a prompt; None if the person stops."""
        first, second = shown_pair(sampled) or (0, 0)
        # Hidden, and the same each time that this prompt is shown.
        swapped = random.Random(f"order {sampled.id}").random() < 0.5
        shown = (second, first) if swapped else (first, second)
        console.say(f"\n[{title}] {_safe(sampled.prompt[-1].content)}")
        if sampled.reference is not None:
            console.say(f"(= {_safe(sampled.reference)})")
        for number, index in enumerate(shown, start=1):
            console.say(f"\n  {number}  {_safe(sampled.answers[index].text.strip())}")
        console.say()
        choice = self._choice()
        if choice == "quit":
            return None
        if choice in ("1", "2"):
            return (first, second, int(shown[int(choice) - 1] == second))
        return (first, second, choice)

    def _choice(self) -> str:
        while True:
            try:
                said = self.read("1 · 2 · b 都好 both · n 都不好 neither · s 跳过 skip · q 退出 quit > ")
            except EOFError:
                return "quit"
            if (choice := _KEYS.get(said.strip().lower())) is not None:
                return choice


def shown_pair(sampled: Sampled) -> tuple[int, int] | None:
    """The numbers of the first two answers with different texts; None where all are the same."""
    texts = [answer.text.strip() for answer in sampled.answers]
    other = next((i for i, text in enumerate(texts) if text != texts[0]), None) if texts else None
    return None if other is None else (0, other)


def _safe(text: str) -> str:
    return without_controls(text).replace("\n", "\n     ")
