"""A sentence for people, kept as a code with values, so that it can be shown in any language of the catalogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, TypedDict

from mlx_zh.language.catalogue import SEPARATORS, Language, fill

Value = str | int | float | Sequence[Any]  # plain JSON, other notices, or lists of them


class NoticeRecord(TypedDict):
    """A notice as JSON holds it."""

    code: str
    values: dict[str, Any]  # plain values, records of other notices, or lists of them


class Notice(str):
    """A code of the catalogue with its values; as a `str` it is the English sentence.

    So a notice is printed, compared and written to JSON like any other text. `text("zh")` is the Chinese sentence,
    `as_dict()` what JSON keeps to show it in both languages. A value may be a notice itself, or a list.

    Raises KeyError for a code that the catalogue does not have, and for a value that its wording needs.
    """

    __slots__ = ("_code", "_values")
    _code: str
    _values: Mapping[str, Value]

    def __new__(cls, code: str, /, **values: Value) -> Notice:
        notice = super().__new__(cls, _worded(code, values, "en"))
        notice._code, notice._values = code, MappingProxyType(dict(values))
        return notice

    @property
    def code(self) -> str:
        """Its name in the catalogue."""
        return self._code

    @property
    def values(self) -> Mapping[str, Value]:
        """What its wording is filled with."""
        return self._values

    def text(self, language: Language) -> str:
        """The sentence in one language."""
        return _worded(self._code, self._values, language)

    def as_dict(self) -> NoticeRecord:
        """Code and values as plain JSON; `notice_of` reads it."""
        return {"code": self._code, "values": {name: _plain(value) for name, value in self._values.items()}}

    def __reduce__(self) -> tuple[Any, ...]:  # for pickle and deepcopy, which would call the class with the English
        return partial(Notice, self._code, **self._values), ()


def notice_of(record: object) -> Notice | None:
    """The notice that `as_dict` described; None for anything else, as another version of this program may write."""
    if not isinstance(record, Mapping):
        return None
    code, values = record.get("code"), record.get("values")
    if not isinstance(code, str) or not isinstance(values, Mapping):
        return None
    try:
        return Notice(code, **{str(name): _revived(value) for name, value in values.items()})
    except (KeyError, ValueError, TypeError, IndexError, AttributeError):  # an unknown code, other or odd values
        return None


def notices_of(texts: Sequence[Any], records: Sequence[Any]) -> list[str]:
    """Sentences read from a file: notices where `records` has their codes, else the texts as they are."""
    known = [*records, *[None] * (len(texts) - len(records))]
    return [notice_of(record) or str(text) for text, record in zip(texts, known, strict=False)]


def _worded(code: str, values: Mapping[str, Value], language: Language) -> str:
    return fill(code, {name: _said(value, language) for name, value in values.items()}, language)


def _said(value: Any, language: Language) -> Any:
    if isinstance(value, Notice):
        return value.text(language)
    if isinstance(value, list | tuple):
        return SEPARATORS[language].join(str(_said(part, language)) for part in value)
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Notice):
        return value.as_dict()
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _revived(value: Any) -> Any:
    if isinstance(value, list):
        return [_revived(part) for part in value]
    return notice_of(value) or value
