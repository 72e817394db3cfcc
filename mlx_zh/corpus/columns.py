"""What the columns of a file mean: recognised by a format, else guessed from their names, else from their content."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml

from mlx_zh.corpus import formats, labelled, preferences
from mlx_zh.corpus.key_names import number_of
from mlx_zh.corpus.reader import InvalidRow
from mlx_zh.corpus.row_messages import Row
from mlx_zh.corpus.rows import Format

Kind = Literal["sft", "dpo", "kto"]
FORMATS: Mapping[Kind, Mapping[str, Format[Any]]] = {
    "dpo": preferences.FORMATS,
    "sft": formats.FORMATS,
    "kto": labelled.FORMATS,
}

_FEW = 10  # among fewer rows, texts that occur again say nothing
_FILLED = 0.6  # share of the rows in which a column of questions or answers has text
_VARIED = 0.5  # share of different texts below which a column holds categories
_LONGEST_NAME = 200  # characters of a column's name that are looked at
_NUMBER = re.compile(r"[-+\d\s.,:/%年月日时分]*")
_CODE = re.compile(r"[A-Za-z0-9_.:/-]+")


@dataclass(frozen=True)
class Guess:
    """How a file is to be read. `columns` maps our column names to the file's, as in a recipe."""

    kind: Kind
    format: str  # a key of FORMATS[kind]
    columns: dict[str, str] = field(default_factory=dict)
    basis: Literal["format", "names", "content", "given"] = "format"
    explicit: bool = False  # whether the format must be named, because another one would be recognised


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The names of all columns of these rows, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row))


def guess_columns(rows: Sequence[Row]) -> Guess | None:
    """How a file with these first rows is to be read; None if neither names nor content tell it."""
    return _labelled(_guessed(rows), rows)


def _labelled(guess: Guess | None, rows: Sequence[Row]) -> Guess | None:
    """The guess, for KTO if conversations have labels and some are bad. A 0 may be the number of a class."""
    if guess is None or guess.kind != "sft" or guess.format not in FORMATS["kto"]:
        return guess
    bad = any(_is_bad(_renamed(row, guess.columns), guess.format == "kto") for row in rows)
    return replace(guess, kind="kto") if bad else guess


def _is_bad(row: Row, numbers: bool) -> bool:
    """Whether a row says that its answer is bad, if `numbers` also with a 0."""
    try:
        values = labelled.labels_in(row).values()
        return not labelled.label_of(row) and (numbers or any(number_of(value) is None for value in values))
    except InvalidRow:
        return False


def _guessed(rows: Sequence[Row]) -> Guess | None:
    known = _known_format(rows)
    if known is not None:
        return known
    names = columns_of(rows)
    roles, sure = _roles_by_name(names)
    roles = _only_usable(roles, rows)
    by_content = _fill_by_content(roles, rows, names)
    if by_content is None:
        return None
    guess = _as_guess(by_content, rows)
    if guess is None:
        return None
    return Guess(guess[0], guess[1], guess[2], "names" if sure and by_content == roles else "content", guess[3])


def given_columns(columns: Mapping[str, str], rows: Sequence[Row]) -> Guess | None:
    """How a file is to be read with the user's own mapping; None if no format has these columns."""
    renamed = [_renamed(row, columns) for row in rows]
    for kind, known in FORMATS.items():
        for name, form in known.items():
            if columns.keys() <= {*form.columns, "reasoning_content"} and any(form.fits(row) for row in renamed):
                return _labelled(Guess(kind, name, dict(columns), "given", _explicit(kind, name, renamed)), rows)
    return None


def better_answers(guess: Guess, rows: Sequence[Row]) -> Guess | None:
    """How the better answers of a file of pairs are read for SFT; None if most rows do not give a conversation."""
    if guess.format == "feedback":
        readable = any(_is_readable(FORMATS["sft"]["feedback"], row) for row in rows)
        return Guess("sft", "feedback") if readable else None
    theirs = {name: guess.columns.get(name, name) for name in ("chosen", "prompt", "question", "instruction")}
    kept = {name: column for name, column in guess.columns.items() if name in ("input", "system", "history")}
    forms: dict[str, tuple[str, dict[str, str]]] = {
        "alpaca": ("alpaca", {"instruction": theirs["instruction"], **kept, "output": theirs["chosen"]}),
        "orca": ("prompt-response", {"prompt": theirs["question"], **kept, "response": theirs["chosen"]}),
        "prompt": ("prompt-response", {"prompt": theirs["prompt"], **kept, "response": theirs["chosen"]}),
        "implicit": ("messages", {"messages": theirs["chosen"]}),
        "swift": ("messages", {"messages": guess.columns.get("messages", "messages")}),
    }
    if guess.format not in forms:
        return None
    format, mapped = forms[guess.format]
    renamed = [_renamed(row, mapped) for row in rows]
    if 2 * sum(_is_readable(FORMATS["sft"][format], row) for row in renamed) < len(rows):
        return None
    # Messages that end with the better answer are named even so: the row has the other answer too.
    columns = {ours: name for ours, name in mapped.items() if ours != name or guess.format == "swift"}
    return Guess("sft", format, columns, guess.basis, _explicit("sft", format, renamed))


def _known_format(rows: Sequence[Row]) -> Guess | None:
    """The format that `rows` has without any mapping, if at least one row can be read in it."""
    for kind, known in FORMATS.items():
        name = _recognised(known, rows)
        if name is not None and any(_is_readable(known[name], row) for row in rows):
            return Guess(kind, name)
    return None


def _recognised(known: Mapping[str, Format[Any]], rows: Sequence[Row]) -> str | None:
    """The format that the reader would recognise."""
    return next((name for row in rows for name, form in known.items() if form.fits(row)), None)


def _is_readable(form: Format[Any], row: Row) -> bool:
    try:
        return bool(list(form.parse(row)))
    except InvalidRow:
        return False


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    rest = {name: value for name, value in row.items() if name not in columns.values()}
    return {**rest, **{ours: row[theirs] for ours, theirs in columns.items() if theirs in row}}


def _explicit(kind: Kind, format: str, renamed: Sequence[Row]) -> bool:
    return _recognised(FORMATS[kind], renamed) != format


# ---- names


@cache
def _names() -> Mapping[str, list[str]]:
    text = files(__package__).joinpath("column_names.yaml").read_text(encoding="utf-8")
    return {role: [_plain(str(name)) for name in names] for role, names in yaml.safe_load(text).items()}


def is_column_name(text: str) -> bool:
    """Whether people call a column so."""
    return any(_plain(text) in map(_plain, names) for names in _names().values())


def _plain(name: str) -> str:
    """A column's name without case, width, spaces, underscores, marks, and anything in brackets."""
    name = re.sub(r"[(\[【〔].*?[)\]】〕]", "", unicodedata.normalize("NFKC", name[:_LONGEST_NAME]).lower())
    return re.sub(r"[\s_*:.'\"#-]", "", name)


def _roles_by_name(columns: Sequence[str]) -> tuple[dict[str, str], bool]:
    """The column of each role (a key of column_names.yaml), and whether all names fit exactly."""
    plain = {column: _plain(column) for column in columns}
    table = {role: names for role, names in _names().items() if role != "about"}
    roles: dict[str, str] = {}
    for role, names in table.items():
        ranked = [c for c in columns if plain[c] in names and c not in roles.values()]
        if ranked:
            roles[role] = min(ranked, key=lambda column: names.index(plain[column]))
    exact = dict(roles)
    about = _names()["about"]
    for role in ("chosen", "rejected", "question", "answer"):
        if role in roles:
            continue
        long = [name for name in table[role] if len(name) >= (2 if name[0] > "\u2e80" else 4)]
        for column in columns:
            if column in roles.values() or any(word in plain[column] for word in about):
                continue
            if any(name in plain[column] for name in long):
                roles[role] = column
                break
    return roles, roles == exact


# ---- content


def _only_usable(roles: Mapping[str, str], rows: Sequence[Row]) -> dict[str, str]:
    """The roles whose columns hold values of the right kind: lists for messages and history, text for the others."""
    usable = {}
    for role, column in roles.items():
        values = [row[column] for row in rows if row.get(column) not in (None, "")]
        if role in ("messages", "history"):
            fits = bool(values) and all(isinstance(value, list) for value in values)
        elif role in ("chosen", "rejected"):
            fits = True
        else:
            fits = all(isinstance(value, str) for value in values)
        if fits:
            usable[role] = column
    return usable


def _fill_by_content(roles: dict[str, str], rows: Sequence[Row], columns: Sequence[str]) -> dict[str, str] | None:
    """The roles with question and answer filled in, as far as the content tells which columns they are."""
    roles = dict(roles)
    if "question" not in roles and "input" in roles:
        roles["question"] = roles.pop("input")
    if "messages" in roles:
        return roles
    wanted = [role for role in ("question", "answer") if role not in roles]
    if "chosen" in roles and "rejected" in roles:
        wanted = [role for role in wanted if role == "question"]
    if wanted == ["question", "answer"] and "title" in roles and "text" in roles:
        return {"question": roles["title"], "answer": roles["text"]}
    if not wanted:
        return roles
    texts = _text_columns(rows, [c for c in columns if c not in _taken(roles)])
    if len(texts) > len(wanted):
        texts = {c: values for c, values in texts.items() if not _is_category(values)}
    if len(texts) != len(wanted):
        return None
    order = sorted(texts, key=lambda column: sum(map(len, texts[column])) / len(texts[column]))
    return roles | dict(zip(wanted, order, strict=True))


def _taken(roles: Mapping[str, str]) -> set[str]:
    """The columns whose meaning is certain; a title or text may be a question or an answer."""
    return {column for role, column in roles.items() if role not in ("title", "text")}


def _text_columns(rows: Sequence[Row], columns: Sequence[str]) -> dict[str, list[str]]:
    """The columns that hold text in most rows, with their texts."""
    texts = {}
    for column in columns:
        values = [row[column].strip() for row in rows if isinstance(row.get(column), str)]
        values = [value for value in values if value]
        numbers = sum(bool(_NUMBER.fullmatch(value)) for value in values)
        if values and len(values) >= _FILLED * len(rows) and numbers < len(values) / 2:
            texts[column] = values
    return texts


def _is_category(values: Sequence[str]) -> bool:
    """Whether texts are codes, or few that occur again and again."""
    repeated = len(values) >= _FEW and len(set(values)) < _VARIED * len(values)
    return repeated or all(_CODE.fullmatch(value) for value in values)


# ---- from roles to a format


def _as_guess(roles: Mapping[str, str], rows: Sequence[Row]) -> tuple[Kind, str, dict[str, str], bool] | None:
    """(kind, format, columns, explicit) of these roles, or None if they make no format."""
    pairs = "chosen" in roles and "rejected" in roles
    kind: Kind = "dpo" if pairs else "sft"
    if "messages" in roles:
        format, mapped = "messages", {"messages": "messages"}
    elif "question" not in roles or not (pairs or "answer" in roles):
        return None
    elif "input" in roles or "history" in roles:
        format = "alpaca"
        mapped = {"instruction": "question", "input": "input", "output": "answer", "history": "history"}
    else:
        format, mapped = ("prompt", {"prompt": "question"}) if pairs else ("prompt-response", {"prompt": "question"})
        mapped["response"] = "answer"
    if pairs:
        mapped = {ours: role for ours, role in mapped.items() if role != "answer"}
        mapped |= {"chosen": "chosen", "rejected": "rejected"}
    if "messages" not in roles:
        mapped["system"] = "system"
    columns = {ours: roles[role] for ours, role in mapped.items() if role in roles}
    explicit = _explicit(kind, format, [_renamed(row, columns) for row in rows])
    return kind, format, {ours: theirs for ours, theirs in columns.items() if ours != theirs}, explicit
