"""The conversation: its turns, undo and retry, the part that fits into the context, and its file."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mlx_zh.corpus.conversation import Message
from mlx_zh.errors import DataError, MlxZhError, StorageError
from mlx_zh.system.json_text import parse_json
from mlx_zh.system.storage import json_line, storage_errors, write_text


class ContextError(MlxZhError):
    """The last message alone does not fit into the model's context."""


@dataclass
class Transcript:
    """A system message and turns: user, assistant, user, … A user message at the end waits for its answer."""

    system: str | None = None
    turns: list[Message] = field(default_factory=list)
    first: int = 0  # the first turn that the model sees; earlier turns no longer fit, but are saved

    def ask(self, text: str) -> None:
        """Add a user message; it replaces one that has no answer."""
        if self.pending:
            self.turns.pop()
        self.turns.append(Message("user", text))

    def answer(self, text: str) -> None:
        """Add the assistant's reply to the waiting user message."""
        self.turns.append(Message("assistant", text))

    @property
    def pending(self) -> bool:
        """Whether a user message waits for its answer."""
        return len(self.turns) % 2 == 1

    @property
    def question(self) -> list[Message]:
        """The messages that the model answers: system message and visible turns up to the last user message."""
        turns = self.turns if self.pending else self.turns[:-1]
        return [*self._system(), *turns[self.first :]]

    def retract_answer(self) -> bool:
        """Remove the last answer, so that its question waits again. Returns false if there is no question."""
        if self.turns and not self.pending:
            self.turns.pop()
        return self.pending

    def undo(self) -> bool:
        """Remove the last question and its answer. Returns false if there is none."""
        if not self.turns:
            return False
        del self.turns[-1 if self.pending else -2 :]
        self.first = min(self.first, len(self.turns))
        return True

    def reset(self) -> None:
        """Remove all turns; the system message stays."""
        self.turns, self.first = [], 0

    def fit(self, render: Callable[[list[Message]], list[int]], limit: int, reserve: int) -> tuple[list[int], int]:
        """The prompt's tokens, and the number of exchanges that were dropped now so that it fits.

        Prompt and `reserve` tokens of answer must fit into `limit` tokens. If they do not, the oldest exchanges are
        dropped until half of the context is free, because after every drop the model must read the rest again.
        Raises ContextError if the last message alone does not fit.
        """
        prompt = render(self.question)
        if len(prompt) + reserve <= limit:
            return prompt, 0
        turns = self.question[len(self._system()) :]

        def fits(drop: int) -> bool:
            return len(render([*self._system(), *turns[2 * drop :]])) <= limit // 2

        exchanges = len(turns) // 2
        dropped = bisect.bisect_left(range(exchanges), True, key=fits)
        prompt = render([*self._system(), *turns[2 * dropped :]])
        if len(prompt) >= limit:
            raise ContextError(
                f"the message is too long: it takes {len(prompt)} tokens with the system message, and the context "
                f"holds {limit}, the answer included; shorten it, or raise --max-context if the model allows more"
            )
        self.first += 2 * dropped
        return prompt, dropped

    def save(self, path: Path) -> int:
        """Write `{"messages": [...]}` on one line, as training data is; returns the number of turns written.

        A question that waits for its answer is left out. Only a saved chat is overwritten: raises StorageError for
        any other file, and MlxZhError if nothing has been answered.
        """
        with storage_errors(path):
            exists = path.exists()
        if exists:
            try:
                Transcript.load(path)
            except DataError as problem:
                raise StorageError(f"{path} exists and is not a saved chat; choose another name") from problem
        turns = self.turns[:-1] if self.pending else self.turns
        if not turns:
            raise MlxZhError("nothing to save: no question has been answered yet")
        messages = [{"role": m.role, "content": m.content} for m in [*self._system(), *turns]]
        write_text(path, json_line({"messages": messages}))
        return len(turns)

    @classmethod
    def load(cls, path: Path) -> Transcript:
        """Read a file that `save` wrote, or a list of messages. Raises DataError."""
        try:
            document = parse_json(path.read_text(encoding="utf-8-sig"))
        except OSError as problem:
            raise DataError(f"cannot read {path}: {problem.strerror or problem}") from problem
        except UnicodeDecodeError as problem:
            raise DataError(f"{path} is not UTF-8 text (byte {problem.start}); convert it to UTF-8") from problem
        except ValueError as problem:
            raise DataError(f"{path} is not JSON: {problem}") from problem
        rows = document.get("messages") if isinstance(document, dict) else document
        if not isinstance(rows, list):
            raise DataError(f'{path}: expected {{"messages": [...]}} or a list of messages')
        if problems := _problems(rows):
            raise DataError(f"{path}: " + "; ".join(problems[:5]) + (" …" if len(problems) > 5 else ""))
        messages = [Message(row["role"], _whole(row["content"])) for row in rows]
        system = messages.pop(0).content if messages and messages[0].role == "system" else None
        return cls(system, messages)

    def _system(self) -> list[Message]:
        return [Message("system", self.system)] if self.system else []


def _whole(text: str) -> str:
    """The text with half of a surrogate pair replaced: JSON may hold one, and UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _problems(rows: list[object]) -> list[str]:
    """The errors in a list of messages, one text each."""
    problems: list[str] = []
    roles: list[object] = []
    for number, row in enumerate(rows, 1):
        role = row.get("role") if isinstance(row, dict) else None
        content = row.get("content") if isinstance(row, dict) else None
        if not isinstance(row, dict):
            problems.append(f"message {number} is not an object")
        elif role not in ("system", "user", "assistant"):
            problems.append(f"message {number}: role must be system, user or assistant, got {role!r}")
        elif not isinstance(content, str):
            problems.append(f"message {number}: content must be a text, got {type(content).__name__}")
        elif not content.strip():
            problems.append(f"message {number}: content is empty")
        roles.append(role)
    start = 1 if roles and roles[0] == "system" else 0
    for number, role in enumerate(roles[start:], start + 1):
        expected = "user" if (number - start) % 2 else "assistant"
        if not problems and role != expected:
            problems.append(f"message {number} must be from {expected}, got {role!r}")
    return problems
