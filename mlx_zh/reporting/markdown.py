"""`report.md`: the findings as Markdown, in Chinese and English side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mlx_zh.reporting import data_view, words
from mlx_zh.reporting.exam_results import Cell, ExamResult
from mlx_zh.reporting.exam_view import columns, head_line, interval, percent
from mlx_zh.reporting.figures_view import exports, flat
from mlx_zh.reporting.findings import Findings, mapped
from mlx_zh.reporting.messages import named, say

_SPECIAL = re.compile(r"[\\`*_\[\]|~$]")
# What begins a heading, a quotation, a list, a rule or the underline of a heading.
_FIRST = re.compile(r"^(?=[#>]|[+-](?: |$)|[=-]+$)")
_NUMBER = re.compile(r"^(\d+)(?=[.)](?: |$))")  # begins a numbered list
_LINK = re.compile(r"(?i)\b(https?:|ftp:|www\.)")  # some viewers turn addresses into links


def markdown(findings: Findings, created: str, plots: Sequence[str]) -> str:
    """The report as Markdown; `created` is its date, `plots` the paths of its pictures relative to the report."""
    parts = [f"# {safe(findings.name)}: {say('report').both()}", f"{say('created', time=created).both()}"]
    parts += _summary(findings)
    parts += _benchmarks(findings, plots)
    parts += _training(findings, plots)
    parts += _answers(findings)
    parts += _data(findings)
    if exported := exports(findings):
        heads = [name.both() for name in exported.columns]
        parts += [f"## {say('export').both()}", exported.note.both(), _table(heads, exported.rows)]
    parts += _machine(findings)
    return "\n\n".join(parts) + "\n"


def safe(text: object) -> str:
    """The text on one line, escaped so that it is neither Markdown nor HTML nor a link."""
    line = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    # A backslash is an escape before punctuation alone (CommonMark 0.31, section 2.4), so never before a digit.
    line = _NUMBER.sub(r"\1\\", _FIRST.sub(r"\\", _SPECIAL.sub(r"\\\g<0>", line)))
    return _LINK.sub("\\g<1>\u200b", line)


def _summary(findings: Findings) -> list[str]:
    rows = [[tile.name.both(), tile.value, tile.remark.both()] for tile in words.tiles(findings)]
    parts = [f"## {say('summary').both()}"]
    if rows:
        parts.append(_table(["", "", ""], rows))
    if not findings.alarms:
        return [*parts, f"✓ {say('no_alarm').both()}"]
    entries = [f"- **{safe(alarm.where.both())}**: {safe(alarm.what.both())}" for alarm in findings.alarms]
    return [*parts, f"### {say('alarms').both()}", "\n".join(entries)]


def _benchmarks(findings: Findings, plots: Sequence[str]) -> list[str]:
    parts = []
    for exam in findings.exams:
        parts += [f"### {safe(exam.title)}", safe(head_line(exam).both())]
        parts.append(_exam(exam) if exam.rows else say("unlabelled").both())
    if not parts:
        return []
    return [f"## {say('benchmarks').both()}", say("exam_note").both(), *parts, *_pictures(plots, "exam-")]


def _exam(exam: ExamResult) -> str:
    head = [name.both() for name in columns(exam)]
    rows = []
    for row in exam.rows:
        cells = [named(row.name).both(), *(_cell(row.cells.get(stage)) for stage in exam.stages)]
        if exam.compared and row.change:
            change = row.change
            moved = f"{words.points(change.difference)} {interval(change)}"
            cells += [moved, words.verdict(change)[0].both()]
        rows.append(cells + ["–"] * (len(head) - len(cells)))
    return _table(head, rows, right=True)


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    return f"{percent(cell.macro, 2)} [{percent(cell.low, 1)}, {percent(cell.high, 1)}]"


def _pictures(plots: Sequence[str], prefix: str) -> list[str]:
    names = {path: path.rpartition("/")[2].removesuffix(".png") for path in plots}
    shown = [f"![{name}]({path})" for path, name in names.items() if name.startswith(prefix)]
    return ["\n".join(shown)] if shown else []


def _training(findings: Findings, plots: Sequence[str]) -> list[str]:
    parts: list[str] = []
    for stage, training in findings.training.items():
        facts = [[name.both(), value.both()] for name, value in words.training_facts(training)]
        parts += [f"## {say(f'training_{stage}').both()}", _table(["", ""], facts)]
        parts += _pictures(plots, f"{stage}-")
    return parts


def _answers(findings: Findings) -> list[str]:
    if not findings.answers:
        return []
    stages = list(findings.answers)
    parts = [f"## {say('answers').both()}", say("answers_note").both()]
    for index, prompt in enumerate(findings.prompts):
        rows = []
        for stage in stages:
            answers = findings.answers[stage]
            right = findings.is_right(stage, index)
            name = named(stage).both() if right is None else f"{words.mark(right)} {named(stage).both()}"
            rows.append([name, answers[index] if index < len(answers) else ""])
        parts += [f"**{safe(prompt)}**", _table(["", ""], rows)]
    return parts


def _data(findings: Findings) -> list[str]:
    parts: list[str] = []
    heads = [name.both() for name in data_view.source_columns()]
    for stage in data_view.stages(findings):
        facts = [[name.both(), value.both()] for name, value in stage.facts]
        parts += [f"### {safe(stage.title.both())}", _table(["", ""], facts)]
        parts.append(_table(heads, [[cell.both() for cell in row] for row in stage.sources]))
    if digests := mapped(findings.manifest.get("data")):
        parts.append(_table([say("file").both(), say("digest").both()], [list(row) for row in flat(digests)]))
    return [f"## {say('data').both()}", *parts] if parts else []


def _machine(findings: Findings) -> list[str]:
    rows = [[name, text] for name, text in flat({k: v for k, v in findings.manifest.items() if k != "data"})]
    parts = [f"## {say('run').both()}"]
    if findings.times:
        times = []
        for time in findings.times:
            drawn = "" if time.joules is None else words.energy(time.joules)
            times.append([named(time.name).both(), words.duration(time.seconds), drawn])
        parts.append(_table([say("stage").both(), say("time").both(), say("energy").both()], times))
    if rows:
        parts.append(_table([say("setting").both(), say("value").both()], rows))
    if findings.recipe:
        fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", findings.recipe)), default=0))
        parts += [f"### {say('recipe').both()}", f"{fence}yaml\n{findings.recipe.rstrip()}\n{fence}"]
    return parts if len(parts) > 1 else []


def _table(head: list[str], rows: list[list[str]], *, right: bool = False) -> str:
    rule = ["---", *["---:" if right else "---"] * (len(head) - 1)]
    lines = [_row(head, escape=False), "|" + "|".join(rule) + "|", *(_row(row) for row in rows)]
    return "\n".join(lines)


def _row(cells: list[str], *, escape: bool = True) -> str:
    return "| " + " | ".join(safe(cell) if escape else cell for cell in cells) + " |"
