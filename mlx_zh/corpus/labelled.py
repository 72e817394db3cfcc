"""Local files to labelled answers for KTO: a conversation, and whether its last reply is good.

A row in a format of conversations (`corpus.formats`) with a label, true or false, is one answer. The label stands in
`label` (TRL, ms-swift) or `kto_tag` (LLaMA-Factory). A row in a format of preference pairs (`corpus.preferences`) is
two answers: the chosen one is good and the rejected one bad. What was said of a model's answers in the chat
(`corpus.feedback`) is one or two. Formats are recognised by their columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Unpack

from mlx_zh.corpus import feedback, formats, preferences
from mlx_zh.corpus.conversation import Answer, Labelled
from mlx_zh.corpus.key_names import kind_of_name, number_of, says_no, says_yes
from mlx_zh.corpus.reader import InvalidRow
from mlx_zh.corpus.row_keys import LABELS
from mlx_zh.corpus.row_messages import Change, Row, changed, check_turns, reasoning_of
from mlx_zh.corpus.rows import REASONING_WAY, Format, LoadReport, Reading, iter_rows


def load_labelled(path: Path, **reading: Unpack[Reading]) -> tuple[list[Labelled], LoadReport]:
    """All labelled answers of a file, and a report on its rows. Raises the errors of `load_conversations`."""
    report = LoadReport()
    return list(iter_labelled(path, report, **reading)), report


def iter_labelled(
    path: Path, report: LoadReport | None = None, *, change: Change | None = None, **reading: Unpack[Reading]
) -> Iterator[Labelled]:
    """Like `load_labelled`, one at a time. Fills `report`; an error about rows is raised after the last row.

    `change` is applied to every text before the rows are checked.
    """

    def finish(answer: Answer) -> Answer:
        if change is None:
            return answer
        return Answer(check_turns(changed(answer.messages, change), last="assistant"), answer.label)

    for place, answer in iter_rows(path, FORMATS, report=report, finish=finish, **reading):
        yield Labelled(answer.messages, place, answer.label)


def labels_in(row: Row) -> dict[str, Any]:
    """The columns of a row that say whether its answer is good, with their values.

    Beside `label` and `kto_tag` these are columns whose names tell, such as thumbs_up, if their values say yes or no.
    """
    named = {n: v for n, v in row.items() if kind_of_name(n) in ("good", "bad") and as_label(v) is not None}
    return {name: row[name] for name in LABELS if row.get(name) not in (None, "")} | named


def as_label(value: Any) -> bool | None:
    """What a value says: true, false, 1, 0, yes or no, also as a text; None for anything else."""
    if isinstance(value, list | dict) or number_of(value) not in (None, 0, 1):
        return None
    return True if says_yes(value) else False if says_no(value) else None


def label_of(row: Row) -> bool:
    """Whether a row says that its answer is good. Raises InvalidRow if it does not say, or says both."""
    given = labels_in(row)
    if not given:
        raise InvalidRow("no label", "neither 'label' nor 'kto_tag' says whether the answer is good: true or false")
    labels = {}
    for name, value in given.items():
        label = as_label(value)
        if label is None:
            raise InvalidRow("wrong type", f"{name!r} must be true or false, got {value!r:.40}")
        labels[name] = label != (kind_of_name(name) == "bad")
    if len(set(labels.values())) > 1:
        good, bad = (next(name for name, label in labels.items() if label is side) for side in (True, False))
        raise InvalidRow("two labels", f"{good!r} says that the answer is good, and {bad!r} that it is bad")
    return next(iter(labels.values()))


def _labelled(form: Format[Any], row: Row) -> Iterator[Answer]:
    label = label_of(row)
    completion = row.get("completion")
    if isinstance(completion, list) and len(completion) > 1:
        raise InvalidRow("several replies", "'completion' must be one reply; put the turns before it into 'prompt'")
    for messages in form.parse({name: value for name, value in row.items() if name not in LABELS}):
        if not messages[-1].trained:
            raise InvalidRow("not to be trained", "the last reply has weight 0 or loss false")
        yield Answer(messages, label)


def _both(form: Format[preferences.Pair], row: Row) -> Iterator[Answer]:
    if reasoning_of(row, "the row"):
        raise InvalidRow("separate reasoning", f"the row has reasoning apart from its answers; {REASONING_WAY}")
    for prompt, chosen, rejected in form.parse(row):
        yield Answer((*prompt, chosen), True)
        yield Answer((*prompt, rejected), False)


def _is_pair(row: Row) -> bool:
    return any(form.fits(row) for form in preferences.FORMATS.values())


def _joined(alone: Format[Any] | None, pairs: Format[preferences.Pair] | None) -> Format[Answer]:
    """The format that reads labelled answers as `alone` does, and preference pairs as `pairs` does."""

    def fits(row: Row) -> bool:
        if pairs is not None and pairs.fits(row):
            return True
        return alone is not None and alone.fits(row) and not _is_pair(row)

    def parse(row: Row) -> Iterator[Answer]:
        if pairs is not None and (alone is None or pairs.fits(row)):
            return _both(pairs, row)
        assert alone is not None
        return _labelled(alone, row)

    columns = [name for form in (alone, pairs) if form is not None for name in form.columns]
    labels = LABELS if alone is not None else ()
    return Format(tuple(dict.fromkeys((*columns, *labels))), fits, parse, labelled=True)


def _feedback(row: Row) -> Iterator[Answer]:
    return (Answer(messages, label) for messages, label in feedback.labelled(row))


def _all_formats() -> Mapping[str, Format[Answer]]:
    alone = {name: form for name, form in formats.FORMATS.items() if name not in ("text", "mathglm")}
    alone["kto"] = formats.FORMATS["prompt-response"]
    names = dict.fromkeys((*alone, *preferences.FORMATS))
    joined = {name: _joined(alone.get(name), preferences.FORMATS.get(name)) for name in names}
    judged = Format(feedback.COLUMNS, feedback.is_feedback, _feedback, settle=feedback.settled)
    return {**joined, "feedback": judged}


FORMATS = _all_formats()
