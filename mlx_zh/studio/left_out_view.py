"""The rows that were left out of the prepared data, beside what they resemble."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

from nicegui import ui

from mlx_zh.corpus.left_out import LeftOutRow
from mlx_zh.reporting.differences import marked
from mlx_zh.reporting.findings import listed, mapped
from mlx_zh.reporting.messages import named
from mlx_zh.stages.prepared_rows import (
    PreparedData,
)
from mlx_zh.stages.showing import visible
from mlx_zh.studio import widgets
from mlx_zh.studio.paging import page_numbers
from mlx_zh.studio.projects import Studio
from mlx_zh.studio.rows_view import ROLES
from mlx_zh.studio.texts import worded
from mlx_zh.system.redaction import hide

_LEFT_OUT = 6  # rows that were left out, drawn at once


class LeftOutView:
    """The rows that were left out for what they resemble, by reason."""

    def __init__(self, studio: Studio, data: PreparedData, report: Mapping[str, Any]) -> None:
        self._studio, self._rows = studio, data.left_out()
        self._counts: Counter[str] = Counter()
        for source in map(mapped, listed(report.get("sources"))):
            for reason, count in mapped(source.get("dropped")).items():
                self._counts[reason] += count if isinstance(count, int) else 0

    def draw(self) -> None:
        """Draw the section; nothing where no row was left out."""
        say = self._studio.say
        if not self._counts:
            return
        with widgets.section(say("Left out")):
            if self._rows is None:
                text = worded("The texts of these rows were not kept, because an earlier version prepared this data.")
                ui.label(say(text)).classes("z-note")
            reasons = {row["reason"]: None for row in self._rows or ()}
            names = {reason: self._label(reason) for reason in [*reasons, *(self._counts.keys() - reasons.keys())]}
            self._place = ui.element("div").classes("z-column")
            first = next(iter(names))
            widgets.toggle(names, first, lambda event: self._show(event.value)).move(target_index=1)
            self._show(first)

    def _label(self, reason: str) -> str:
        return f"{named(reason).in_language(self._studio.language)} {self._counts[reason]:,}"

    def _show(self, reason: str, page: int = 1) -> None:
        rows = [row for row in self._rows or () if row["reason"] == reason]
        self._place.clear()
        with self._place:
            if not rows:
                text = worded("These rows resemble no other row; their places are in the report of `mlx-zh prepare`.")
                ui.label(self._studio.say(text)).classes("z-note")
                return
            if len(rows) < self._counts[reason]:
                shown, count = f"{len(rows):,}", f"{self._counts[reason]:,}"
                text = self._studio.say(
                    "The first {shown} of {count} are kept to be looked at.", shown=shown, count=count
                )
                ui.label(text).classes("z-note")
            for row in rows[(page - 1) * _LEFT_OUT : page * _LEFT_OUT]:
                self._draw_row(row)
            page_numbers(page, len(rows), _LEFT_OUT, partial(self._show, reason))

    def _draw_row(self, row: LeftOutRow) -> None:
        say = self._studio.say
        is_exam = row["overlap"] is not None
        heads = (say("Left out"), say("Exam question") if is_exam else say("Kept"))
        sides = ((row["row"], row["said"]), (row["like"], row["like_said"]))
        others = ["\n".join(turn["text"] for turn in said) for _, said in reversed(sides)]
        with ui.element("div").classes("z-card z-beside"):
            for head, (place, said), other in zip(heads, sides, others, strict=True):
                with ui.element("div"):
                    ui.label(f"{head}: {hide(place)}").classes("z-note")
                    for turn in said:
                        role = say(ROLES[turn["role"]]) if turn["role"] in ROLES else turn["role"]
                        with ui.element("div").classes("z-text"):
                            ui.label(role + (" " if len(role) == 1 else "\n")).classes("z-span z-role")
                            for text, same in marked(turn["text"], other):
                                is_marked = same if is_exam else not same
                                style = "z-span z-marked" if is_marked else "z-span"
                                ui.label(visible(hide(text))).classes(style)
            if row["overlap"] is not None:
                text = say("{share} of the question's letter groups are in the row.", share=f"{row['overlap']:.0%}")
                ui.label(text).classes("z-note z-across")
