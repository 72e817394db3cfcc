"""The sources of rows: files in a known format, or the generator of arithmetic problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_zh.corpus import formats, labelled, preferences
from mlx_zh.corpus.arithmetic import problems
from mlx_zh.corpus.conversation import Conversation, Document, Preference
from mlx_zh.corpus.row_messages import Change
from mlx_zh.corpus.rows import LoadReport
from mlx_zh.recipe import filled, placeholders

Item = Conversation | Document | Preference
_READERS: dict[str, Callable[..., Iterator[Item]]] = {
    "sft": formats.iter_conversations,
    "dpo": preferences.iter_preferences,
    "kto": labelled.iter_labelled,
}
_PLACEHOLDERS = 1000  # names that are no variable's and are kept


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

    def items(self, kind: str, on_invalid: str, report: LoadReport, change: Change | None = None) -> Iterator[Item]:
        """Every usable row: conversations and documents (kind "sft"), preferences ("dpo"), labelled answers ("kto").


        The variables are filled in every text, then `change` is applied to it, and then the row is checked. Fills
        `report`. Raises DataError.
        """
        if self.generate is not None:
            yield from self._generated(report)
            return
        for path in self.files:
            file_report = LoadReport()
            options: dict[str, Any] = {"on_invalid": on_invalid, "columns": self.columns, "sheet": self.sheet}
            options["change"] = self._change(change, file_report)
            read = _READERS[kind]
            try:
                yield from read(Path(path), format=self.format, report=file_report, **options)
            finally:
                report.add(file_report)

    def _change(self, change: Change | None, report: LoadReport) -> Change | None:
        """The variables filled in, then `change`; None if neither does anything. `report` gets the placeholders."""
        if not self.variables:
            return change
        names = dict.fromkeys(report.placeholders)

        def fill(text: str) -> str:
            for name in placeholders(text):
                if name not in names and (name in self.variables or len(names) < _PLACEHOLDERS):
                    names[name] = None
                    report.placeholders.append(name)
            text = filled(text, self.variables)
            return text if change is None else change(text)

        return fill

    def _generated(self, report: LoadReport) -> Iterator[Item]:
        assert self.generate is not None
        seed, count = self.generate
        report.format = "mathglm"
        for number, line in enumerate(problems(seed, count)):
            report.rows += 1
            report.kept += 1
            yield Conversation(formats.arithmetic(line), f"{self.name}[{number}]")
