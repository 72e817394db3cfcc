"""Feedback on a model's answers, as the chat records it, read as data for SFT, DPO and KTO.

A row has `prompt` (messages, the last one the user's), `answers` (one, or the two that were compared) and `choice`:

    choice    answers  meaning                        SFT learns  the pair of DPO    KTO
    good      1        a good answer                  it                             it: good
    bad       1        a bad answer                                                  it: bad
    0, 1      2        the index of the better one    the better  better, other      better: good, other: bad
    both      2        both are good                  both                           both: good
    neither   2        both are bad                                                  both: bad
    edited    1        `edited` is what it should be  `edited`    `edited`, answer   `edited`: good, answer: bad

What was said last about an answer to a prompt counts, and so does the last choice between two answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.invalid_row import InvalidRow, LeftOut
from mlx_zh.corpus.reader import read_rows
from mlx_zh.corpus.row_messages import Row, check_turns, is_blank, kind_of, messages_of
from mlx_zh.errors import DataError

KIND = "feedback"
COLUMNS = (
    *("kind", "version", "prompt", "answers", "choice", "edited"),
    *("model", "adapter", "fingerprint", "sampling", "time"),
)
_OF_ONE, _OF_TWO = ("good", "bad", "edited"), (0, 1, "both", "neither")
WITHDRAWN = "withdrawn"  # takes back what was said of one answer or two
CHOICES: tuple[str | int, ...] = (*_OF_ONE, *_OF_TWO, WITHDRAWN)
_REPLACED = "replaced"  # column of the keys of what a later row says anew
_HEAD = 100  # rows among which a file's first one is looked for


@dataclass(frozen=True)
class Judgement:
    """What a row says: of each answer whether it is good, and which answer is better than which other."""

    prompt: tuple[Message, ...]
    votes: tuple[tuple[str, bool], ...]
    pair: tuple[str, str] | None  # the better answer and the other one


def is_feedback(row: Mapping[str, Any]) -> bool:
    """Whether a row has this form."""
    return row.get("kind") == KIND and "answers" in row and "choice" in row


def judgement_of(row: Row) -> Judgement:
    """What a row says. Raises InvalidRow."""
    prompt = check_turns(messages_of(row.get("prompt"), "'prompt'"), last="user")
    prompt = tuple(replace(message, trained=message.role != "assistant") for message in prompt)
    choice = row.get("choice")
    if type(choice) not in (str, int) or choice not in CHOICES:  # true and 1.0 are equal to 1
        listed = ", ".join(json.dumps(known) for known in CHOICES)
        raise InvalidRow("wrong type", f"'choice' must be one of {listed}; got {choice!r}")
    if choice == WITHDRAWN:
        _answers(row, 1 if isinstance(row.get("answers"), list) and len(row["answers"]) == 1 else 2)
        return Judgement(prompt, (), None)
    answers = _answers(row, 1 if choice in _OF_ONE else 2)
    if choice == "edited":
        edited = _text(row.get("edited"), "'edited'")
        better, other = edited, answers[0]
    elif choice in (0, 1):
        better, other = answers[choice], answers[1 - choice]
    else:
        good = choice in ("good", "both")
        return Judgement(prompt, tuple((answer, good) for answer in dict.fromkeys(answers)), None)
    if better.strip() == other.strip():
        raise InvalidRow("identical responses", "the better and the other answer are the same")
    return Judgement(prompt, ((better, True), (other, False)), (better, other))


def _answers(row: Row, count: int) -> list[str]:
    answers = row.get("answers")
    if not isinstance(answers, list) or len(answers) != count:
        got = f"{len(answers)}" if isinstance(answers, list) else f"a {kind_of(answers)}"
        raise InvalidRow(
            "wrong type", f"'answers' must be a list of {count} texts with choice {row.get('choice')!r}, got {got}"
        )
    return [_text(answer, f"'answers'[{i}]") for i, answer in enumerate(answers)]


def _text(value: Any, label: str) -> str:
    if not isinstance(value, str):
        raise InvalidRow("wrong type", f"{label} must be text, got a {kind_of(value)}")
    if is_blank(value):
        raise InvalidRow("empty response", f"{label} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRow("broken Unicode", f"{label} holds half of a surrogate pair") from None
    return value


def conversations(row: Row) -> Iterator[tuple[Message, ...]]:
    """The good answers of a row after its prompt; only they are learned. Raises InvalidRow, LeftOut."""
    judged, replaced = judgement_of(row), row.get(_REPLACED, ())
    votes = _current_votes(judged, replaced)
    good = [answer for answer, is_good in votes if is_good]
    if not good:
        raise _again(row) if not votes else LeftOut("answer not to imitate", "the answer was called bad")
    for answer in good:
        yield check_turns([*judged.prompt, Message("assistant", answer)], last="assistant")


def pair_of(row: Row) -> tuple[tuple[Message, ...], Message, Message]:
    """The prompt, the better answer and the other one. Raises InvalidRow, and LeftOut if the row compares none."""
    judged = judgement_of(row)
    if row.get("choice") == WITHDRAWN:
        raise _again(row)
    if judged.pair is None:
        one = len(judged.votes) == 1
        reason = "one answer, no pair" if one else "no answer better than the other"
        raise LeftOut(reason, "the row does not say that one answer is better than another")
    if _pair_key(judged) in row.get(_REPLACED, ()):
        raise _again(row)
    better, other = judged.pair
    return judged.prompt, Message("assistant", better), Message("assistant", other)


def labelled(row: Row) -> Iterator[tuple[tuple[Message, ...], bool]]:
    """Each answer after its prompt, and whether it is good. Raises InvalidRow, LeftOut."""
    judged = judgement_of(row)
    votes = _current_votes(judged, row.get(_REPLACED, ()))
    if not votes:
        raise _again(row)
    for answer, is_good in votes:
        yield check_turns([*judged.prompt, Message("assistant", answer)], last="assistant"), is_good


def _again(row: Row) -> LeftOut:
    if row.get("choice") == WITHDRAWN:
        return LeftOut("taken back", "the row takes back what an earlier row says")
    return LeftOut("judged again later", "a later row judges the same answers to the same prompt")


def settled(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The rows with their places, each with the keys of what a later row says anew.

    A last line that a killed program left half-written is no fault.
    """
    kept = list(rows)
    keys = [_keys(row) for _, row in kept]
    last = {key: number for number, of_row in enumerate(keys) for key in of_row}
    for number, ((place, row), of_row) in enumerate(zip(kept, keys, strict=True)):
        replaced = [key for key in of_row if last[key] != number]
        if number == len(kept) - 1 and isinstance(row, InvalidRow) and row.reason == "broken JSON":
            row = LeftOut("half-written last line", str(row))
        own = isinstance(row, dict) and _REPLACED in row  # a column of the file with this name, which says nothing
        yield place, {**row, _REPLACED: replaced} if replaced or own else row


def _keys(row: Any) -> list[str]:
    """A key of each thing that a row says."""
    try:
        judged = judgement_of(row) if isinstance(row, dict) and is_feedback(row) else None
    except InvalidRow:
        judged = None
    if judged is None:
        return []
    if row["choice"] == WITHDRAWN:
        both = [_key(judged, sorted(row["answers"]))] if len(row["answers"]) == 2 else []
        return [*(_vote_key(judged, answer) for answer in row["answers"]), *both]
    votes = [_vote_key(judged, answer) for answer, _ in judged.votes]
    return votes if judged.pair is None else [*votes, _pair_key(judged)]


def _current_votes(judged: Judgement, replaced: Iterable[str]) -> list[tuple[str, bool]]:
    return [vote for vote in judged.votes if _vote_key(judged, vote[0]) not in replaced]


def _vote_key(judged: Judgement, answer: str) -> str:
    return _key(judged, [answer])


def _pair_key(judged: Judgement) -> str:
    return _key(judged, sorted(judged.pair or ()))


def _key(judged: Judgement, answers: list[str]) -> str:
    said = [[message.role, *message.texts] for message in judged.prompt]
    return hashlib.sha256(json.dumps([said, answers]).encode()).hexdigest()


@dataclass
class Tally:
    """What a file of feedback holds. `sft`, `dpo` and `kto` are the rows that each kind of training gets."""

    rows: int = 0
    choices: dict[str | int, int] | None = None
    sft: int = 0
    dpo: int = 0
    kto: int = 0
    unusable: int = 0
    latest: list[Row] | None = None


def tally(path: Path, latest: int = 0) -> Tally:
    """Count a file of feedback, and keep its last rows. A file that is not there is empty. Raises DataError."""
    counts: dict[str | int, int] = {}
    result = Tally(choices=counts, latest=[])
    if not path.exists() or not path.stat().st_size:
        return result
    kept: list[Row] = []
    for _, row in settled(read_rows(path)):
        try:
            if not isinstance(row, dict):
                raise row if isinstance(row, InvalidRow) else InvalidRow("wrong type", "a row must be an object")
            judgement_of(row)
        except LeftOut:
            continue
        except InvalidRow:
            result.unusable += 1
            continue
        result.rows += 1
        counts[row["choice"]] = counts.get(row["choice"], 0) + 1
        result.sft += _count(conversations, row)
        result.dpo += _count(lambda judged: iter([pair_of(judged)]), row)
        result.kto += _count(labelled, row)
        kept = [*kept, row][-latest:] if latest else []
    result.latest = kept
    return result


def _count(read: Any, row: Row) -> int:
    try:
        return sum(1 for _ in read(row))
    except InvalidRow:
        return 0


def require_feedback(path: Path) -> None:
    """Raise DataError if the file exists and holds something else than feedback."""
    if not path.exists():
        return
    if path.is_file():
        if not path.stat().st_size:
            return
        rows = [row for _, row in islice(read_rows(path), _HEAD)]
        if any(isinstance(row, dict) and is_feedback(row) for row in rows):
            return
        if len(rows) == 1 and isinstance(rows[0], InvalidRow) and path.read_bytes()[:1] == b"{":
            return  # a first line that a killed program left half-written
    raise DataError(f"{path} exists and holds no feedback; choose another name")
