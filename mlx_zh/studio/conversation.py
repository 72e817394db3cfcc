"""The columns of the Talk page: in each, a conversation with one stage of a run, and what its reader says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlx_zh.chatting import feedback
from mlx_zh.chatting.feedback import Given, Origin
from mlx_zh.chatting.transcript import Transcript
from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.thinking import CLOSE, OPEN
from mlx_zh.errors import StorageError, StudioError
from mlx_zh.models.generate import Sampling
from mlx_zh.studio.talker import Question, Settings, whole
from mlx_zh.system.links import check_file

State = Literal["waiting", "writing", "done", "stopped", "failed"]
Said = Literal["good", "bad", "edited"]


@dataclass
class Answer:
    """An answer as it is written. `prompt` are the messages that it answers."""

    prompt: list[Message] = field(default_factory=list)
    text: str = ""
    thinks: bool = False  # the prompt ends inside of a thought
    state: State = "waiting"
    error: str = ""
    dropped: int = 0  # exchanges that left the context for it
    statistics: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin | None = None
    said: Said | None = None  # what its reader said of it
    before: str = ""  # its text before it was edited

    @property
    def parts(self) -> tuple[str, str, bool]:
        """Reasoning, answer, and whether the model still reasons."""
        return split_reasoning(self.text, self.thinks)

    @property
    def complete(self) -> bool:
        """Whether it can be judged: the model ended it, or reached the longest length, and it holds something."""
        return self.state == "done" and bool(self.text.strip())

    @property
    def given(self) -> Given:
        """The answer as the file of feedback takes it."""
        return Given(self.text, self.origin)


@dataclass
class Column:
    """A conversation with a stage of a run."""

    run: Path
    stage: str  # base, sft or dpo
    label: str
    transcript: Transcript = field(default_factory=Transcript)
    answers: list[Answer] = field(default_factory=list)  # of each question

    @property
    def last(self) -> Answer | None:
        """The last answer."""
        return self.answers[-1] if self.answers else None

    def ask(self, text: str, settings: Settings, seed: int) -> Question:
        """The question to send; the column then waits for its answer."""
        if self.transcript.pending and self.answers:
            self.answers.pop()
        self.transcript.system = settings.system
        self.transcript.ask(whole(text))
        self.answers.append(Answer())
        turns = [(turn.role, turn.content) for turn in self.transcript.turns]
        return Question(self.run, self.stage, turns, self.transcript.first, settings, seed)

    def heard(self, event: Mapping[str, Any]) -> None:
        """Take an event of `Talker.ask`."""
        answer = self.answers[-1]
        if event["is"] == "begin":
            self.transcript.first, answer.dropped = int(event["first"]), int(event["dropped"])
            answer.thinks, answer.state = bool(event["thinks"]), "writing"
            answer.prompt = self.transcript.question
        elif event["is"] == "piece":
            answer.text += event["text"]
        elif event["is"] == "end":
            answer.statistics, answer.origin = event["statistics"], _origin_in(event["origin"])
            answer.state = "stopped" if event["statistics"]["reason"] == "stopped" else "done"
            if answer.text.strip():
                self.transcript.answer(answer.text)

    def failed(self, error: str) -> None:
        """The answer broke off; what there is of it stays to be read, and the question can be asked again."""
        self.answers[-1].state, self.answers[-1].error = "failed", error

    def stopped(self) -> None:
        """The question was taken back before its answer began."""
        self.answers[-1].state = "stopped"

    def retract(self) -> str | None:
        """Take the last question back, to ask it again; returns it, None if there is none."""
        if not self.transcript.turns:
            return None
        self.transcript.retract_answer()
        text = self.transcript.turns.pop().content
        self.answers.pop()
        self.transcript.first = min(self.transcript.first, len(self.transcript.turns))
        return text

    def clear(self) -> None:
        """Begin a new conversation."""
        self.transcript.reset()
        self.answers = []

    def go_on_from(self, other: Column) -> None:
        """Have the conversation of another column from now on."""
        self.transcript = Transcript(other.transcript.system, list(other.transcript.turns), other.transcript.first)
        self.answers = [Answer(a.prompt, a.text, a.thinks, a.state, origin=a.origin) for a in other.answers]


@dataclass(frozen=True)
class Judge:
    """Writes what a reader says of answers to the run's file of feedback. All methods raise MlxZhError."""

    file: Path

    @property
    def target(self) -> Path:
        """The file, to write to. Raises StorageError if it is a link out of the run folder."""
        check_file(self.file.parent, self.file, StorageError)
        return self.file

    def say(self, answer: Answer, said: Literal["good", "bad"]) -> None:
        """An answer is good, or bad; said twice, it is taken back."""
        _require(answer)
        if answer.said == said:
            feedback.withdrawn(self.target, answer.prompt, [answer.given])
            answer.said = None
            return
        (feedback.good if said == "good" else feedback.bad)(self.target, answer.prompt, answer.given)
        answer.said = said

    def edit(self, column: Column, text: str) -> None:
        """What the last answer of a column should have been; the conversation goes on from it."""
        answer = column.answers[-1]
        _require(answer)
        if text.strip() == answer.text.strip() or not text.strip():
            raise StudioError("nothing was changed, so there is nothing to record.")
        feedback.edited(self.target, answer.prompt, answer.given, text)
        column.transcript.retract_answer()
        column.transcript.answer(text)
        answer.before, answer.text, answer.origin, answer.said = answer.text, text, None, "edited"

    def better(self, columns: Sequence[Column], best: int | Literal["both", "neither"]) -> int:
        """The last answer of column `best` is better than each other one, or all or none are good.

        Returns the number of rows written. Equal answers make no pair.
        """
        answers = _compared(columns)
        prompt = answers[0].prompt
        if isinstance(best, int):
            others = [a for a in answers if a.text.strip() != answers[best].text.strip()]
            for other in others:
                feedback.compared(self.target, prompt, (other.given, answers[best].given), 1)
            return len(others)
        say = feedback.good if best == "both" else feedback.bad
        unique = {answer.text.strip(): answer for answer in answers}
        if len(answers) == 2:
            feedback.compared(self.target, prompt, (answers[0].given, answers[1].given), best)
            return 1
        for answer in unique.values():
            say(self.target, prompt, answer.given)
        return len(unique)

    def take_back(self, columns: Sequence[Column], best: int | Literal["both", "neither"]) -> None:
        """Take the last comparison back."""
        answers = _compared(columns)
        if len(answers) == 2:
            feedback.withdrawn(self.target, answers[0].prompt, [answer.given for answer in answers])
        elif isinstance(best, int):
            for other in answers:
                if other.text.strip() != answers[best].text.strip():
                    feedback.withdrawn(self.target, other.prompt, [other.given, answers[best].given])
        else:
            for answer in {answer.text.strip(): answer for answer in answers}.values():
                feedback.withdrawn(self.target, answer.prompt, [answer.given])


def comparable(columns: Sequence[Column]) -> bool:
    """Whether the last answers of all columns answer the same messages, and are not all the same."""
    last = [column.last for column in columns]
    if len(last) < 2 or not all(answer is not None and answer.complete for answer in last):
        return False
    answers = [answer for answer in last if answer is not None]
    same_prompt = all(answer.prompt == answers[0].prompt for answer in answers)
    return same_prompt and len({answer.text.strip() for answer in answers}) > 1


def diverged(columns: Sequence[Column]) -> bool:
    """Whether complete answers cannot be compared because they answer different conversations."""
    answers = [column.last for column in columns]
    prompts = [answer.prompt for answer in answers if answer is not None and answer.complete]
    return len(prompts) == len(columns) > 1 and any(prompt != prompts[0] for prompt in prompts)


def split_reasoning(text: str, thinks: bool) -> tuple[str, str, bool]:
    """Reasoning, answer, and whether the reasoning has not ended; `thinks`: the prompt ends inside of a thought."""
    start = text.lstrip()
    if start.startswith(OPEN):
        start = start[len(OPEN) :]
    elif not thinks:
        return "", text, False
    thought, closed, answer = start.partition(CLOSE)
    return thought.strip(), answer.lstrip("\n"), not closed


def _compared(columns: Sequence[Column]) -> list[Answer]:
    if not comparable(columns):
        raise StudioError("these answers cannot be compared: they answer different conversations, or are the same.")
    return [column.answers[-1] for column in columns]


def _require(answer: Answer) -> None:
    if not (answer.complete or answer.said == "edited"):
        raise StudioError("an answer that was broken off cannot be judged.")


def _origin_in(values: Mapping[str, Any]) -> Origin:
    return Origin(**{**values, "sampling": Sampling(**values["sampling"])})
