"""Texts of the report in Chinese and English; the wordings are in `mlx_zh.language`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_zh.language.catalogue import Language, catalogue, fill
from mlx_zh.language.notice import Notice


@dataclass(frozen=True, slots=True)
class Text:
    """A text in both languages."""

    zh: str
    en: str

    @staticmethod
    def same(text: object) -> Text:
        """A text that is the same in both languages: a name, a number, a path."""
        return Text(str(text), str(text))

    def in_language(self, language: Language) -> str:
        """The text in one language."""
        return self.zh if language == "zh" else self.en

    @staticmethod
    def of(sentence: str) -> Text:
        """A notice in both languages; any other sentence as it is."""
        return Text(sentence.text("zh"), str(sentence)) if isinstance(sentence, Notice) else Text.same(sentence)

    def both(self) -> str:
        """Both languages on one line; one of them where they are equal."""
        return self.zh if self.zh == self.en else f"{self.zh} {self.en}"


def say(code: str, **values: Any) -> Text:
    """The wording of `code` with its values; a value that is a `Text` appears in the language of the wording.

    Raises KeyError for an unknown code or a missing value.
    """

    def side(language: Language) -> str:
        filled = {name: getattr(v, language) if isinstance(v, Text) else v for name, v in values.items()}
        return fill(code, filled, language)

    return Text(side("zh"), side("en"))


def named(name: str) -> Text:
    """The wording of a name from a file (a stage, a metric); the name itself where the catalogue has none."""
    wording = catalogue().get(name)
    return say(name) if wording and "{" not in wording.zh else Text.same(name)


def joined(texts: list[Text]) -> Text:
    """The texts as a list, with the comma of each language."""
    return Text("，".join(text.zh for text in texts), ", ".join(text.en for text in texts))
