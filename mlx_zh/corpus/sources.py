"""The sources of rows: files in a known format, or the generator of arithmetic problems."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_zh.corpus import formats, preferences
from mlx_zh.corpus.arithmetic import problems
from mlx_zh.corpus.conversation import Conversation, Preference
from mlx_zh.corpus.rows import Change, LoadReport
from mlx_zh.recipe import filled

Item = Conversation | Preference


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
        """Every usable conversation (kind "sft") or preference ("dpo"). Fills `report`. Raises DataError.

        The variables are filled in every text, then `change` is applied to it, and then the row is checked.
        """
        if self.generate is not None:
            yield from self._generated(report)
            return
        for path in self.files:
            file_report = LoadReport()
            options: dict[str, Any] = {"on_invalid": on_invalid, "columns": self.columns, "sheet": self.sheet}
            options["change"] = self._change(change)
            read = formats.iter_conversations if kind == "sft" else preferences.iter_preferences
            try:
                yield from read(Path(path), format=self.format, report=file_report, **options)
            finally:
                report.add(file_report)

    def _change(self, change: Change | None) -> Change | None:
        """The variables filled in, and then `change`; None if neither does anything."""
        if not self.variables:
            return change
        if change is None:
            return lambda text: filled(text, self.variables)
        return lambda text: change(filled(text, self.variables))

    def _generated(self, report: LoadReport) -> Iterator[Item]:
        assert self.generate is not None
        seed, count = self.generate
        report.format = "mathglm"
        for number, line in enumerate(problems(seed, count)):
            report.rows += 1
            report.kept += 1
            yield Conversation(formats.arithmetic(line), f"{self.name}[{number}]")
