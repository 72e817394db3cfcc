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

    A notice is therefore printed, compared and written to JSON like any other text. `text("zh")` is the Chinese
    sentence; `as_dict()` is what JSON keeps to show it in both languages. A value may be a notice itself, or a list.

    Raises KeyError for a code that the catalogue does not have, and for a missing value.
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
        """The notice's name in the catalogue."""
        return self._code

    @property
    def values(self) -> Mapping[str, Value]:
        """The values of the wording's fields."""
        return self._values

    def text(self, language: Language) -> str:
        """The sentence in one language."""
        return _worded(self._code, self._values, language)

    def as_dict(self) -> NoticeRecord:
        """Code and values as plain JSON values; `notice_of` reads them back."""
        return {"code": self._code, "values": {name: _plain(value) for name, value in self._values.items()}}

    def __reduce__(self) -> tuple[Any, ...]:  # pickle and deepcopy would call the class with the English sentence
        return partial(Notice, self._code, **self._values), ()


def notice_of(record: object) -> Notice | None:
    """The notice of a record that `as_dict` made; None for anything else, such as a record of another version."""
    if not isinstance(record, Mapping):
        return None
    code, values = record.get("code"), record.get("values")
    if not isinstance(code, str) or not isinstance(values, Mapping):
        return None
    try:
        return Notice(code, **{str(name): _revived(value) for name, value in values.items()})
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):  # unknown or unfit
        return None


def notices_of(texts: Sequence[Any], records: Sequence[Any]) -> list[str]:
    """Sentences from a file: notices where `records` holds their codes and values, else the texts as they are."""
    padded = [*records, *[None] * (len(texts) - len(records))]
    return [notice_of(record) or str(text) for text, record in zip(texts, padded, strict=False)]


def _worded(code: str, values: Mapping[str, Value], language: Language) -> str:
    return fill(code, {name: _in_language(value, language) for name, value in values.items()}, language)


def _in_language(value: Any, language: Language) -> Any:
    """A notice as its sentence in `language`, a list joined with that language's comma, any other value as it is."""
    if isinstance(value, Notice):
        return value.text(language)
    if isinstance(value, list | tuple):
        return SEPARATORS[language].join(str(_in_language(part, language)) for part in value)
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Notice):
        return value.as_dict()
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _revived(value: Any) -> Any:
    if isinstance(value, list):
        return [_revived(part) for part in value]
    if isinstance(value, Mapping) and (notice := notice_of(value)) is None:
        raise ValueError(f"an unknown notice: {value.get('code')}")  # then the English text stands for the whole
    return notice if isinstance(value, Mapping) else value
