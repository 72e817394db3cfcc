"""The files that a user has: found, their columns guessed, their rows counted, all of it told."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mlx_zh.corpus import llama_factory
from mlx_zh.corpus.columns import Guess
from mlx_zh.corpus.data_files import (
    LOCAL_SUFFIXES,
    STORED_SUFFIXES,
    TABLE_SUFFIXES,
    folder_files,
    other_files,
    patterns_of,
)
from mlx_zh.corpus.feedback import tally
from mlx_zh.corpus.survey import Head, Survey, guess_of, read_head, survey
from mlx_zh.corpus.tables import is_saved, saved_files
from mlx_zh.errors import DataError, MlxZhError
from mlx_zh.language.catalogue import catalogue, fill
from mlx_zh.language.reader import reader_language, say
from mlx_zh.language.translation import in_readers_language
from mlx_zh.recipe_text.values import is_utf8
from mlx_zh.stages.showing import visible
from mlx_zh.system import console
from mlx_zh.system.links import check_regular

_EXAMPLE = 60  # characters of a column's example
_DETAIL = 200  # characters of what is wrong with a row
_COLUMNS = 20  # columns that are listed
_NAMED = 5  # unusable rows, and files passed over, that are named
_BASES = {"format": "init-basis-format", "names": "init-basis-names", "given": "init-basis-given"}
_SHELL = set(" \t\n\"'\\$`;&|<>()*?[]{}!#~")
_MAC_NOTES = "._"  # macOS writes such a file beside each file on some disks


@dataclass
class OwnData:
    """What was found: a survey of each usable file, and (name, reason) of each that was passed over."""

    surveys: list[Survey] = field(default_factory=list)
    passed_over: list[tuple[str, str]] = field(default_factory=list)


class _Wish(NamedTuple):
    """What the user said about the files."""

    columns: Mapping[str, str] | None
    sheet: str | None
    command: str  # the command line so far, for the advice in errors


def survey_files(
    paths: Sequence[Path], columns: Mapping[str, str] | None, sheet: str | None, command: str
) -> OwnData:
    """Look at files, folders and tables of LLaMA-Factory. `command` is the command that an error repeats.

    A file in a folder that cannot be used is passed over. Raises DataError for a file that was named itself, or if no
    file is left.
    """
    data, wish = OwnData(), _Wish(columns, sheet, command)
    for path in paths:
        if not path.exists():
            raise DataError(say("init-no-file", file=path))
        table = path / llama_factory.NAME if path.is_dir() else path
        if llama_factory.is_dataset_info(table):
            _add_entries(data, table)
        elif path.is_dir():
            _add_folder(data, path, wish)
        else:
            data.surveys.append(_usable(_look(path, wish)))
    return data


def _add_entries(data: OwnData, table: Path) -> None:
    for entry in llama_factory.read_entries(table):
        if entry.guess is None:
            data.passed_over.append((entry.name, entry.reason))
            continue
        try:
            paths = folder_files(entry.path) if entry.path.is_dir() else [entry.path]
            for path in paths:
                result = _usable(survey(path, read_head(path), entry.guess))
                result.max_samples = entry.max_samples
                data.surveys.append(result)
        except MlxZhError as error:
            data.passed_over.append((entry.name, str(error)))
    _require_any(data, table)


def _add_folder(data: OwnData, folder: Path, wish: _Wish) -> None:
    if is_saved(folder):
        paths = saved_files(folder, None)
    else:
        patterns = patterns_of((*LOCAL_SUFFIXES, *TABLE_SUFFIXES, *STORED_SUFFIXES))
        paths = folder_files(folder, patterns)
        others = other_files(folder, patterns)
        data.passed_over += [(str(path), say("init-other-split", split=split)) for path, split in others.items()]
    if len(paths) == 1:
        data.surveys.append(_usable(_look(paths[0], wish)))
        return
    for path in paths:
        try:
            data.surveys.append(_usable(_look(path, wish)))
        except MlxZhError as error:
            data.passed_over.append((str(path), str(error).split("\n")[0]))
    _require_any(data, folder)


def _require_any(data: OwnData, place: Path) -> None:
    if not data.surveys:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in data.passed_over[:_NAMED])
        raise DataError(say("init-none-usable", place=place, reasons=reasons))


def _look(path: Path, wish: _Wish) -> Survey:
    check_regular(path, DataError)
    if not is_utf8(str(path)):
        raise DataError(say("init-not-utf8", file=path))
    if path.name.startswith(_MAC_NOTES):
        raise DataError(say("init-mac-notes", file=path, name=path.name.removeprefix(_MAC_NOTES)))
    head = read_head(path, wish.sheet)
    guess = guess_of(head, wish.columns)
    if guess is None:
        raise _not_guessed(path, head, wish)
    return survey(path, head, guess)


def _usable(result: Survey) -> Survey:
    """The survey itself. Raises DataError if none of the file's rows can be used."""
    if not result.usable:
        examples = "".join(f"\n{line}" for line in _unusable_lines(result))
        raise DataError(say("init-nothing-usable", file=result.path, rows=result.rows, examples=examples))
    return result


def _not_guessed(path: Path, head: Head, wish: _Wish) -> DataError:
    """An error that lists the columns, each with an example, and the command to go on with."""
    listed = list(head.examples().items())
    lines = "".join(f"\n  {name}: {visible(text)[:_EXAMPLE]}" for name, text in listed[:_COLUMNS])
    names = head.columns
    if wish.columns is None:
        if len(names) == 1:
            return DataError(say("init-only-text", file=path, column=names[0], columns=lines))
        command = f"{wish.command} --columns {quoted(f'prompt={names[0]},response={names[1]}')}" if names else ""
        return DataError(say("init-no-columns", file=path, columns=lines, command=command))
    given = ",".join(f"{ours}={theirs}" for ours, theirs in wish.columns.items())
    missing = next((theirs for theirs in wish.columns.values() if theirs not in names), None)
    problem = say("init-columns-incomplete") if missing is None else say("init-column-missing", column=missing)
    example = f"prompt={names[0]},response={names[min(1, len(names) - 1)]}" if names else ""
    command = f"{wish.command} --columns {quoted(example)}"
    return DataError(
        say("init-wrong-columns", given=given, file=path, problem=problem, columns=lines, command=command)
    )


def quoted(text: str) -> str:
    """A word of a command line, between quotation marks if the shell would not take it as it is.

    `shlex.quote` also quotes Chinese letters, which no shell minds.
    """
    return text if text and not set(text) & _SHELL else shlex.quote(text)


# ---- telling


def tell(data: OwnData) -> None:
    """Print what was found in each file."""
    for result in data.surveys:
        for line in lines_of(result):
            console.say(line)
    for name, reason in data.passed_over[:_NAMED]:
        console.say(say("init-passed-over", name=name, reason=reason))
    if len(data.passed_over) > _NAMED:
        console.say(f"… {len(data.passed_over) - _NAMED}")


def lines_of(result: Survey) -> list[str]:
    """What was found in a file, in the reader's language; the first line names it."""
    lines = _lines_above(result)
    lines.append(say("init-columns", columns=_mapping(result.guess, result.head), basis=_basis(result)))
    first = say("init-file", file=result.path, rows=result.rows, usable=result.usable)
    return [first, *[f"  {line}" for line in lines + _lines_below(result)]]


def remarks_on(result: Survey) -> list[str]:
    """What is worth knowing about a file beside its columns, in the reader's language."""
    return _lines_above(result) + _lines_below(result)


def _lines_above(result: Survey) -> list[str]:
    lines = []
    if result.head.titles:
        lines.append(say("init-titles", titles=" / ".join(map(visible, result.head.titles))))
    if result.head.sheet is not None:
        lines.append(say("init-sheet", sheet=visible(result.head.sheet)))
    return lines


def _lines_below(result: Survey) -> list[str]:
    lines = []
    if result.head.without_names():
        lines.append(say("init-no-header"))
    if result.cut:
        lines.append(say("init-file-cut", rows=result.rows))
    if result.unusable:
        lines.append(say("init-unusable", count=result.rows - result.usable))
        lines += _unusable_lines(result)
    if result.guess.format == "feedback":
        held = tally(result.path)
        lines.append(say("init-feedback", rows=held.rows, sft=held.sft, dpo=held.dpo, kto=held.kto))
    if result.repeated:
        lines.append(say("init-repeated", count=result.repeated))
    return lines


def _mapping(guess: Guess, head: Head) -> str:
    if not guess.columns:
        return f"{guess.format}: {', '.join(visible(name) for name in head.columns[:_COLUMNS])}"
    return ", ".join(f"{visible(theirs)} → {ours}" for ours, theirs in guess.columns.items())


def _basis(result: Survey) -> str:
    if result.guess.basis == "content":
        turned = list(result.guess.columns.items())
        example = ",".join(
            f"{ours}={theirs}" for (ours, _), (_, theirs) in zip(turned[:2], reversed(turned[:2]), strict=True)
        )
        return say("init-guessed", example=quoted(example))
    return say(_BASES[result.guess.basis])


def _unusable_lines(result: Survey) -> list[str]:
    """The first unusable rows, named as in the file, and the number of the others by reason."""
    lines = []
    for place, reason, detail in result.unusable:
        where = place.replace(str(result.path), result.path.name, 1)
        detail = in_readers_language(visible(detail))[:_DETAIL]
        lines.append("  " + say("init-unusable-row", place=where, reason=_reason(reason), detail=detail))
    more = result.rows - result.usable - len(result.unusable)
    if more > 0:
        counted = ", ".join(f"{_reason(reason)} {count:,}" for reason, count in result.reasons.most_common(_NAMED))
        lines.append("  " + say("init-unusable-more", count=more, reasons=counted))
    return lines


def _reason(reason: str) -> str:
    """The reason for leaving out a row, in the reader's language."""
    return fill(reason, {}, reader_language()) if reason in catalogue() else reason
