"""A benchmark's table in the page."""

from __future__ import annotations

from mlx_zh.reporting.exam_results import Cell, Change, ExamResult, ExamRow
from mlx_zh.reporting.markup import Html, tag
from mlx_zh.reporting.messages import Text, named, say
from mlx_zh.reporting.words import points, verdict


def table(exam: ExamResult) -> list[Html]:
    """The rows of one benchmark, models side by side, and what is to be said of it."""
    head = tag("p", head_line(exam), class_="note")
    if not exam.rows:
        return [head, tag("p", say("unlabelled"), class_="note")]
    names: list[Text] = [say("category"), *map(named, exam.stages)]
    if exam.compared:
        before, after = map(named, exam.compared)
        names.append(say("change", before=before, after=after))
    heads = [tag("th", name, scope="col") for name in names]
    if exam.compared:
        heads.append(tag("th", say("verdict"), scope="col", class_="last"))
    columns = tag("tr", *heads)
    rows = [_row(exam, row, first=number == 0) for number, row in enumerate(exam.rows)]
    body = tag("table", tag("thead", columns), tag("tbody", *rows), class_="exam", data_exam=exam.key)
    return [head, tag("div", body, class_="wide")]


def head_line(exam: ExamResult) -> Text:
    """What was asked, and how."""
    return say("exam_head", split=exam.split, questions=f"{exam.questions:,}", protocol=exam.protocol)


def _row(exam: ExamResult, row: ExamRow, *, first: bool) -> Html:
    cells = [tag("th", named(row.name), scope="row")]
    cells += [_cell(row.cells.get(stage)) for stage in exam.stages]
    if exam.compared:
        cells += _changed(row.change)
    return tag("tr", *cells, class_="first-row" if first else None)


def _cell(cell: Cell | None) -> Html:
    if cell is None:
        return tag("td", "–")
    return tag("td", f"{100 * cell.macro:.2f}", tag("small", f"{100 * cell.low:.1f} – {100 * cell.high:.1f}"))


def _changed(change: Change | None) -> list[Html]:
    if change is None:
        return [tag("td", "–"), tag("td", "–", class_="last")]
    interval = f"[{points(change.low, 1)}, {points(change.high, 1)}]"
    text, kind = verdict(change)
    # A narrow page has no room for the last column and shows the verdict below the interval.
    known = [tag("span", points(change.difference), class_=kind), tag("small", interval)]
    return [tag("td", *known, tag("small", text, class_="narrow")), tag("td", text, class_=f"{kind} last")]
