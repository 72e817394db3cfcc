"""The sources of rows: files in a known format, or the generator of arithmetic problems."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_zh.corpus import formats, preferences
from mlx_zh.corpus.arithmetic import problems
from mlx_zh.corpus.conversation import Conversation, Message, Preference
from mlx_zh.corpus.rows import LoadReport
from mlx_zh.recipe import filled

Item = Conversation | Preference


def with_variables(item: Item, variables: Mapping[str, str]) -> Item:
    """The item with `variables` filled in all of its texts."""

    def turns(messages: tuple[Message, ...]) -> tuple[Message, ...]:
        return tuple(Message(message.role, filled(message.content, variables)) for message in messages)

    if isinstance(item, Conversation):
        return replace(item, messages=turns(item.messages))
    chosen, rejected = (filled(text, variables) for text in (item.chosen, item.rejected))
    return replace(item, prompt=turns(item.prompt), chosen=chosen, rejected=rejected)


@dataclass(frozen=True)
class DataSource:
    """One source of a recipe: its name, its files on this disk, and how they are read and used."""

    name: str
    files: tuple[str, ...]
    format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)  # our column names -> the file's
    sheet: str | None = None  # of an Excel workbook; None: the first one with rows
    max_samples: int | None = None
    weight: float = 1.0
    near_duplicates: bool = True  # whether near duplicates are searched for in it
    validation: bool = False  # whether all its rows are for validation
    generate: tuple[int, int] | None = None  # seed and count of generated problems, instead of files
    variables: dict[str, str] = field(default_factory=dict)  # name -> text that replaces {{name}} in every message

    def items(self, kind: str, on_invalid: str, report: LoadReport) -> Iterator[Item]:
        """Every usable conversation (kind "sft") or preference ("dpo"). Fills `report`. Raises DataError."""
        if self.generate is not None:
            yield from self._generated(report)
            return
        for path in self.files:
            file_report = LoadReport()
            options: dict[str, Any] = {"on_invalid": on_invalid, "columns": self.columns, "sheet": self.sheet}
            read = formats.iter_conversations if kind == "sft" else preferences.iter_preferences
            try:
                for item in read(Path(path), format=self.format, report=file_report, **options):
                    yield with_variables(item, self.variables) if self.variables else item
            finally:
                report.add(file_report)

    def _generated(self, report: LoadReport) -> Iterator[Item]:
        assert self.generate is not None
        seed, count = self.generate
        report.format = "mathglm"
        for number, line in enumerate(problems(seed, count)):
            report.rows += 1
            report.kept += 1
            yield Conversation(formats.arithmetic(line), f"{self.name}[{number}]")
